"""From a module to a verified ONNX file: `fuser.export(module, (x,), "model.onnx")`.

    module --torch passes--> program --torch.onnx.export--> model --ONNX passes--> file, judged by the module

Each stage is held to its own contract, so a wrong rewrite is found where it was made, left out and named.  What torch's
exporter makes of the program is nobody's rewrite: where the finished file differs from the module all the same, the
exporter's own file is judged too, and the error says which of them is wrong.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuser import registry
from fuser.api import _as_verify, _check, _one_of, _select
from fuser.errors import InputError, VerificationError
from fuser.job import LARGE, UNVERIFIABLE, Check, Job, Progress
from fuser.remarks import Remark
from fuser.report import Report
from fuser.rewrite import Contract
from fuser.scratch import scratch_folder
from fuser.sources import Destination, OnnxSource, TorchSource, capture

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fuser.files.save import Layout
    from fuser.proof import Verification

_OWNED = {
    "f": "the path is the third argument",
    "args": "they are `example_inputs`",
    "kwargs": "they are `example_kwargs`",
    "dynamo": "only the exporter on top of torch.export is supported",
    "dynamic_axes": "say it with `dynamic_shapes`",
    "external_data": "say it with `layout`",
    "training": "only modules in eval mode are exported",
}
"""Options of torch.onnx.export that are decided here, and what takes their place."""


@dataclass
class ExportReport:
    """The story of both stages.

    torch, onnx: what was done before and after torch.onnx.export.
    verification: the finished file against the module, in float64; None where it was not made, and `unverified`
        says why.
    """

    torch: Report
    onnx: Report
    verification: Verification | None = None
    unverified: str = ""

    @property
    def applied(self) -> list[Remark]:
        """The applied rewrites of both stages, in order."""
        return [*self.torch.applied, *self.onnx.applied]

    @property
    def missed(self) -> list[Remark]:
        """The candidates that are left in the file.  What the first stage missed, the second has looked at again."""
        return self.onnx.missed

    @property
    def warnings(self) -> list[str]:
        """What a person should know even if all went well."""
        return [*self.torch.warnings, *self.onnx.warnings]

    @property
    def written(self) -> list[str]:
        """The files that were written."""
        return self.onnx.written

    def to_dict(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        return {
            "torch": self.torch.to_dict(),
            "onnx": self.onnx.to_dict(),
            "verification": self.verification.to_dict() if self.verification is not None else None,
            "unverified": self.unverified,
        }

    def to_json(self) -> str:
        import json

        return json.dumps(self.to_dict(), indent=2, default=str)

    def render(self, *, verbose: bool = False) -> RenderableType:
        """The tables of both stages, and what came of the file; `verbose` adds a line for each candidate."""
        from rich.console import Group
        from rich.text import Text

        parts = [self.torch.render(verbose=verbose), Text(""), self.onnx.render(verbose=verbose), Text("")]
        return Group(*parts, *(Text(line) for line in self._conclusion()))

    def _conclusion(self) -> Iterator[str]:
        if self.unverified:
            yield f"the file was not verified against the module: {self.unverified}"
        elif self.verification is not None:
            yield f"the file against the module: {self.verification} ({self.verification.cost})"

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=110, color_system=None).print(self.render())
        return text.getvalue().rstrip()


@dataclass
class ExportResult:
    """The file that was written, and the story of it."""

    model: Path
    report: ExportReport

    def __str__(self) -> str:
        return str(self.report)


def export(
    module: Any,
    example_inputs: Sequence[Any],
    output: str | os.PathLike[str],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    shared_weights: str = "copy",
    max_growth: int | None = None,
    verify: bool | str = True,
    on_failure: str = "rollback",
    inputs: Any = None,
    layout: Layout = "auto",
    threshold: int = 1024,
    progress: Progress | None = None,
    **export_options: Any,
) -> ExportResult:
    """Optimize `module`, export it, optimize the model, verify the file against `module`, and write it.

        result = fuser.export(module, (x,), "model.onnx", dynamic_shapes=({0: Dim.DYNAMIC},), opset_version=20)
        print(result.report)

    Nothing is written before everything is verified, and the file is replaced whole or not at all; `module` is not
    changed.

    Args:
        module: a torch.nn.Module in eval mode.
        example_inputs, example_kwargs, dynamic_shapes: as for `torch.export.export`.
        output: where the model is written.
        passes, skip, shared_weights, max_growth, on_failure, progress: as for `fuser.optimize`, in both stages.
        verify: check each stage, and the file against `module`, both in float64.  Models with more than 512 MB of
            constants are run for that only with "whole"; each of their rewrites is checked by itself.
        inputs: data for the check, in order; by default the example inputs, and others like them.
        layout, threshold: "single" (weights inside the file) or "external" (those of `threshold` bytes and more in
            `OUT.data`); "auto" is a single file up to the 2 GB that one can have.
        export_options: further options of `torch.onnx.export`, such as `opset_version` or `input_names`.

    Returns:
        The path that was written and the story, as an `ExportResult`.

    Raises:
        InputError: the module is in training mode, cannot be exported, or an option is not usable.
        VerificationError: a stage or the file is not equivalent, and no rewrite could be left out to mend that.
        PassError: the passes undo each other's work for ever.
    """
    _one_of("on_failure", on_failure, ("rollback", "abort"))
    _one_of("layout", layout, ("auto", "single", "external"))
    verify = _as_verify(verify)
    _refuse(module, export_options)
    chosen = _select(registry.load(), passes, skip, shared_weights, max_growth)
    if not isinstance(example_inputs, (tuple, list)):
        raise InputError(f"example_inputs is a tuple of positional arguments, not a {type(example_inputs).__name__}")
    destination = Destination(Path(output), layout, threshold)
    destination.check()
    name = type(module).__name__
    abort, whole = on_failure == "abort", verify == "whole"
    program = capture(module, tuple(example_inputs), dict(example_kwargs or {}), dynamic_shapes)

    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        source = _before(name, module, program)
        first = Job(source, chosen, progress)
        first.rewrite()
        if verify:
            check = _check(source, stack, example_inputs, example_kwargs, inputs, None)
            first.prove(check, abort=abort, whole=whole)
        optimized = first.finish()
        with first.stage("export"):
            exported = _to_onnx(optimized, folder / "exported.onnx", export_options)

        after = _after(destination, exported)
        stack.enter_context(after)
        second = Job(after, chosen, progress)
        second.rewrite()
        report = ExportReport(first.report, second.report)
        if not verify:
            return ExportResult(second.finish(), report)
        second.prove(_check_onnx(after, stack, inputs, example_inputs, example_kwargs), abort=abort, whole=whole)
        if second.report.after.bytes > LARGE and not whole:
            report.unverified = "it is too large to be run whole (verify='whole' does it)"
            return ExportResult(second.finish(), report)

        with second.stage("verify"):
            report.verification = check(second.candidate.model, Contract.ROUNDING)
            _judge(report.verification, lambda: check(exported, Contract.ROUNDING))
        if report.verification.verdict == UNVERIFIABLE:
            report.unverified = report.verification.reason
        return ExportResult(second.finish(), report)


def _refuse(module: Any, options: Mapping[str, Any]) -> None:
    """Raise `InputError` for what torch's exporter would silently make something else of."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise InputError(f"export takes a torch.nn.Module, not a {type(module).__module__}.{type(module).__qualname__}")
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        shown = ", ".join(training[:3]) + (f" and {len(training) - 3} more" if len(training) > 3 else "")
        raise InputError(f"the module is in training mode ({shown}); call module.eval() before the export")
    for name, instead in _OWNED.items():
        if name in options:
            raise InputError(f"fuser.export does not take {name!r}: {instead}")


def _before(name: str, module: Any, program: Any) -> TorchSource:
    """The program, judged by the module it was captured from."""
    from fuser.graphs.torch.graph import TorchGraph

    return TorchSource(name, module, lambda: TorchGraph.from_exported_program(program), may_lack_inputs=False)


def _to_onnx(program: Any, path: Path, options: Mapping[str, Any]) -> Path:
    """What torch's own exporter makes of the program, in a file."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, dynamo=True, **{"verbose": False, **options})
            assert made is not None
            made.save(path)  # of its own accord with external data where one file could not hold it
    except TypeError as error:
        raise InputError(f"torch.onnx.export: {error}") from error
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"torch.onnx.export cannot write this program: {first}") from error
    asked, opset = options.get("opset_version"), made.model.opset_imports.get("")
    if asked is not None and opset != asked:  # where it cannot convert, it only logs that
        raise InputError(f"torch.onnx.export cannot make opset {asked} of this program, only {opset}")
    return path


def _after(destination: Destination, exported: Path) -> OnnxSource:
    """The exported model, judged by itself: the module is asked in the end."""
    from fuser import files

    return OnnxSource(destination.path.name, exported, lambda: files.load(exported), None, destination, False)


def _check_onnx(
    source: OnnxSource,
    stack: ExitStack,
    inputs: Any,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None,
) -> Check:
    """The check on generated inputs of several sizes or, where the model accepts none of them, on the examples."""
    from fuser.proof.torch_side import Arguments

    check = _check(source, stack, None, None, inputs, None)
    on_examples = _check(source, stack, None, None, Arguments(example_inputs, example_kwargs or {}).examples, None)

    def checked(candidate: Any, contract: Contract, before: Any = None) -> Verification:
        try:
            return check(candidate, contract, before)
        except InputError:
            return on_examples(candidate, contract, before)

    return checked


def _judge(found: Verification, of_exporter: Callable[[], Verification]) -> None:
    """Raise `VerificationError` unless the file is equivalent to the module, or cannot be compared with it."""
    if found.passed or found.verdict == UNVERIFIABLE:
        return
    own = of_exporter()
    culprit = "the rewrites add up to more than rounding" if own.passed else "torch.onnx.export's own file is not"
    raise VerificationError(f"the file is not equivalent to the module ({culprit}): {found.reason}")
