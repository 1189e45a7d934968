"""The natural way through the house: open, rewrite, prove, finish, tell.

import fuser

fuser.optimize("model.onnx", "model.fused.onnx")        # a file
fuser.optimize(model_proto).model                       # the same kind out as in, whatever the kind
fuser.optimize(module, example_inputs=(x,)).model       # a module, before its export
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from fuser import foreign, registry
from fuser.errors import InputError
from fuser.job import Check, Job, Passes, Progress
from fuser.registry import PassInfo
from fuser.remarks import Remark
from fuser.report import Report
from fuser.rewrite import Contract
from fuser.sources import Source, open_source

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fuser.files.save import Layout
    from fuser.proof import Verification


@dataclass
class Result:
    """An optimized model, of the kind that was given (for a path: the path that was written), and the story."""

    model: Any
    report: Report

    def __str__(self) -> str:
        return str(self.report)


def optimize(
    model: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    then: Iterable[str] = (),
    freeze_inputs: bool = False,
    shared_weights: str = "copy",
    max_growth: int | None = None,
    verify: bool | str = True,
    on_failure: str = "rollback",
    inputs: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    layout: Layout = "auto",
    threshold: int = 1024,
    progress: Progress | None = None,
) -> Result:
    """Optimize `model`; the same kind comes out as went in, and what went in is not changed.

    A module that comes out shares with the one that went in the parameters and buffers that no rewrite replaced.

    Args:
        model: the path of an .onnx file, an onnx.ModelProto, a gs.Graph, an onnx_ir.Model, a
            torch.onnx.ONNXProgram, a torch.nn.Module, a torch.fx.GraphModule or a torch.export.ExportedProgram.  A
            module goes through torch.export where `example_inputs` are given, and is traced where they are not.
        output: where an ONNX model is written; for a path, `IN.fused.onnx` when omitted.
        example_inputs, example_kwargs, dynamic_shapes: as for `torch.export.export`; a GraphModule is only told how
            many axes its values have.
        passes, skip: names of passes to run, in this order, and not to run; all by default.
        then: optimizers of other people to run on the result, for ONNX models: onnxsim, onnxslim, onnxscript,
            onnxruntime, or `module:function`; see `fuser.foreign`.  What fails the check is left out and named.
        freeze_inputs: treat initializers that are also graph inputs as constants, and drop those inputs.
        shared_weights: "copy" gives a rewritten layer its own copy of a weight that others use, "refuse" leaves
            such layers alone.
        max_growth: how many elements one folded constant may add to the model; by default 65,536, or a 32nd of its
            parameters where that is more.
        verify: check the result against the original; what fails is never returned or written.  Models with more
            than 512 MB of constants are run for that only with "whole"; each of their rewrites is checked by itself.
        on_failure: "rollback" finds the rewrites at fault, leaves them out and keeps the rest; "abort" raises.
        inputs, input_shapes: data or shapes for the check; by default they are generated.
        layout, threshold: "auto" (as in the source), "single" (weights inside the file) or "external" (those of
            `threshold` bytes and more in `OUT.data`).
        progress: called with a few words when a stage begins.

    Raises:
        InputError: the model or an option is not usable.
        VerificationError: the result is not equivalent, and no rewrite could be left out to mend that.
        PassError: the passes undo each other's work for ever.
    """
    _check_words(on_failure, layout)
    verify = _as_verify(verify)
    job = _job(
        model,
        output,
        layout,
        threshold,
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        dynamic_shapes=dynamic_shapes,
        passes=passes,
        skip=skip,
        freeze_inputs=freeze_inputs,
        shared_weights=shared_weights,
        max_growth=max_growth,
        progress=progress,
    )
    steps = foreign.select(then)
    if steps and not job.source.is_onnx:
        raise InputError("`then` is for ONNX models; use fuser.export, or optimize what torch.onnx.export made")
    if input_shapes and not job.source.is_onnx:
        raise InputError("input_shapes is for ONNX models; the shapes of a module's inputs are those of example_inputs")
    if inputs is not None and job.source.may_lack_inputs:
        raise InputError("inputs are values for the arguments that example_inputs shows; give example_inputs, too")
    job.source.check()
    with job.source, ExitStack() as stack:
        if verify:
            check = _check(job.source, stack, example_inputs, example_kwargs, inputs, input_shapes)
        job.rewrite()
        if verify:
            job.prove(check, abort=on_failure == "abort", whole=verify == "whole")
        job.follow(steps, check if verify else None, whole=verify == "whole")
        return Result(job.finish(), job.report)


def check_options(
    *,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    then: Iterable[str] = (),
    shared_weights: str = "copy",
    max_growth: int | None = None,
    verify: bool | str = True,
    on_failure: str = "rollback",
    layout: str = "auto",
    **others: Any,
) -> None:
    """Raise `InputError` for options of `optimize` that are wrong whatever the model is; `others` depend on it."""
    _check_words(on_failure, layout)
    _as_verify(verify)
    _select(registry.load(), passes, skip, shared_weights, max_growth)
    foreign.select(then)


class Asked(TypedDict, total=False):
    """What is read and how it is rewritten: the arguments that `explain` and `bisect` share with `optimize`."""

    example_inputs: Sequence[Any] | None
    example_kwargs: Mapping[str, Any] | None
    dynamic_shapes: Any
    passes: Iterable[str] | None
    skip: Iterable[str]
    freeze_inputs: bool
    shared_weights: str
    max_growth: int | None
    progress: Progress | None


def explain(model: Any, **asked: Unpack[Asked]) -> Report:
    """What `optimize` would do, and why not elsewhere; nothing is verified or written.

    Takes the arguments of `optimize` that are named in `Asked`; raises `InputError` and `PassError` as it does.
    """
    job = _job(model, **asked)
    with job.source:
        job.rewrite()
        return job.report


def bisect(
    model: Any,
    *,
    inputs: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    **asked: Unpack[Asked],
) -> Remark | None:
    """The first rewrite after which `model` is no longer equivalent to itself; None where all are right.

    Takes the arguments of `optimize` that are named in `Asked`, and those for the check; raises `InputError` and
    `PassError` as it does; writes nothing.
    """
    job = _job(model, **asked)
    with job.source, ExitStack() as stack:
        examples = asked.get("example_inputs"), asked.get("example_kwargs")
        check = _check(job.source, stack, *examples, inputs, input_shapes)
        job.rewrite()
        return job.first_wrong(check)


def list_passes() -> list[PassInfo]:
    """The registered passes, in the order in which they run."""
    return list(registry.load().passes)


def _job(
    model: Any,
    output: str | os.PathLike[str] | None = None,
    layout: Layout = "auto",
    threshold: int = 1024,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    freeze_inputs: bool = False,
    shared_weights: str = "copy",
    max_growth: int | None = None,
    progress: Progress | None = None,
) -> Job:
    """The job that is asked for; nothing of it is done."""
    installed = registry.load()
    chosen = _select(installed, passes, skip, shared_weights, max_growth)
    source = open_source(
        model,
        output,
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        dynamic_shapes=dynamic_shapes,
        freeze_inputs=freeze_inputs,
        layout=layout,
        threshold=threshold,
    )
    job = Job(source, chosen, progress)
    if passes is None:
        job.report.warnings += map(str, installed.broken)
    return job


def _select(
    installed: registry.Registry,
    passes: Iterable[str] | None,
    skip: Iterable[str],
    shared_weights: str,
    max_growth: int | None,
) -> Passes:
    _one_of("shared_weights", shared_weights, ("copy", "refuse"))
    if max_growth is not None and (not isinstance(max_growth, int) or max_growth < 0):
        raise InputError(f"max_growth is a number of elements, not {max_growth!r}")
    if isinstance(passes, str) or isinstance(skip, str):
        raise InputError("passes and skip are lists of names")
    options: dict[str, Any] = {} if max_growth is None else {"max_growth": max_growth}
    return installed.select(passes, skip, shared_weights=shared_weights, **options)


def _check(
    source: Source,
    stack: ExitStack,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
    inputs: Any,
    input_shapes: Mapping[str, Sequence[int]] | None,
) -> Check:
    """How a rewritten model compares with the source's original; the processes for that end with `stack`."""
    from fuser import proof
    from fuser.proof.data import check_path
    from fuser.proof.runners import Workers
    from fuser.proof.sides import Original

    check_path(inputs)
    workers, original = stack.enter_context(Workers()), stack.enter_context(Original())
    if source.is_onnx:
        workers.first.start()  # it imports what it needs while the passes run

    def check(candidate: Any, contract: Contract, before: Any = None) -> Verification:
        return proof.verify(
            source.original if before is None else before,
            candidate,
            example_inputs=example_inputs,
            example_kwargs=example_kwargs,
            inputs=inputs,
            input_shapes=input_shapes,
            contract=contract.value,
            removed_inputs=source.removable_inputs,
            workers=workers,
            original=original if before is None else None,
        )

    return check


def _as_verify(verify: bool | str) -> bool | str:
    """The words of the command line are understood, too."""
    asked = {"auto": True, "none": False}.get(verify, verify) if isinstance(verify, str) else verify
    if asked not in (True, False, "whole"):
        raise InputError(f"verify is True, False or 'whole'; not {verify!r}")
    return asked


def _check_words(on_failure: str, layout: str) -> None:
    _one_of("on_failure", on_failure, ("rollback", "abort"))
    _one_of("layout", layout, ("auto", "single", "external"))


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is one of {', '.join(allowed)}; not {value!r}")
