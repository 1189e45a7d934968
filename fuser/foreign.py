"""Optimizers of other people as steps after our passes: run apart, judged like everything else, and told of.

    fuser.optimize("model.onnx", then=["onnxsim", "onnxruntime"])

Such a step takes a whole ONNX model and gives another.  It runs in a process of its own with a time limit, so that a
crash or a hang costs nothing but the step; its result is kept only where it is equivalent to the original, interface
included.  Each step gets one remark: applied, with the node counts, or missed with one of the codes
    not-installed, crashed, timed-out, failed (it raised, or wrote no sound model), failed-verification (not equivalent,
    or not comparable), too-large (to be compared without `verify="whole"`, or for a step that writes one file),
    no-change.
The model's own metadata is put back first as it was, and so are imports of operator sets that were dropped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuser.errors import InputError
from fuser.isolate import Crashed, Raised, TimedOut, Worker
from fuser.remarks import Missed

TIMEOUT = 600.0
"""Seconds that one step may take."""

LIMIT = 2**31 - 1
"""The bytes that one ONNX file can have."""


@dataclass(frozen=True)
class Step:
    """A foreign optimizer.

    name: what the user calls it.
    function: `module:function`, called with the paths of the model to read and of the one to write.
    package: what has to be installed for it, to import and to pip.
    """

    name: str
    function: str
    package: str


STEPS = {
    step.name: step
    for step in (
        Step("onnxsim", "fuser.foreign:onnxsim", "onnxsim"),
        Step("onnxslim", "fuser.foreign:onnxslim", "onnxslim"),
        Step("onnxoptimizer", "fuser.foreign:onnxoptimizer", "onnxoptimizer"),
        Step("onnxscript", "fuser.foreign:onnxscript", "onnxscript"),
        Step("onnxruntime", "fuser.foreign:onnxruntime", "onnxruntime"),
    )
}


def select(names: Iterable[str]) -> list[Step]:
    """The steps by name; `module:function` names one that is not among STEPS.

    Raises `InputError` for a name that is unknown.
    """
    if isinstance(names, str):
        raise InputError("then is a list of names")
    steps = []
    for name in names:
        module, colon, function = name.partition(":")
        if name in STEPS:
            steps.append(STEPS[name])
        elif colon and function and all(part.isidentifier() for part in module.split(".")):
            steps.append(Step(name, name, module.partition(".")[0]))
        else:
            raise InputError(
                f"there is no step {name!r}; the steps are {', '.join(STEPS)}, and module:function for one of your own"
            )
    return steps


def run(step: Step, model: Any, folder: Path, timeout: float = TIMEOUT) -> Any:
    """What `step` makes of a `fuser.files.ModelFile`, as another one; or a `Missed` that says why not.

    folder: where the models are written; the other one reads from there as long as it lives.
    """
    from fuser import files

    if not _is_installed(step.package):
        return Missed("not-installed", f"{step.package} cannot be imported", f"pip install {step.package}")
    source, target = folder / "in.onnx", folder / "out.onnx"
    with Worker() as worker:
        try:
            size = files.save(model, source).size
            if size > LIMIT and step.name in STEPS:
                return Missed(
                    "too-large", f"the model takes {size / 1e9:.1f} GB; {step.name} writes one file, of 2 GB at most"
                )
            worker.call(step.function, str(source), str(target), timeout=timeout)
            done = files.load(target)
        except TimedOut as error:
            return Missed("timed-out", str(error))
        except Crashed as error:
            return Missed("crashed", str(error))
        except (Raised, InputError) as error:
            return Missed("failed", str(error).replace(str(folder), "..."))
    restore(model.proto, done.proto)
    return done


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # `__main__` of a script
        return False


def restore(before: Any, after: Any) -> None:
    """Give back to `after` what an optimizer has no business with: metadata, and imports of operator sets."""
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(after, field, getattr(before, field))
    if before.graph.name:
        after.graph.name = before.graph.name
    del after.metadata_props[:]
    after.metadata_props.extend(before.metadata_props)
    imported = {opset.domain or "ai.onnx" for opset in after.opset_import}
    after.opset_import.extend(o for o in before.opset_import if (o.domain or "ai.onnx") not in imported)


# -- run in the other process; each writes one file, so models over LIMIT are left as they are


def onnxsim(source: str, target: str) -> None:
    """Constant folding and the passes of onnxoptimizer."""
    import onnx
    from onnxsim import simplify

    onnx.save(simplify(source)[0], target)


def onnxslim(source: str, target: str) -> None:
    """Constant folding, fusion patterns and the elimination of common subexpressions."""
    import onnx
    from onnxslim import slim

    onnx.save(slim(source), target)


def onnxoptimizer(source: str, target: str) -> None:
    """Its fusion and elimination passes."""
    import onnx
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(source), onnxoptimizer.get_fuse_and_elimination_passes()), target)


def onnxscript(source: str, target: str) -> None:
    """The optimizer that torch.onnx.export runs."""
    import onnx_ir
    from onnxscript import optimizer

    model = onnx_ir.load(source)
    optimizer.optimize(model)
    onnx_ir.save(onnx_ir.external_data.load_to_model(model), target)


def onnxruntime(source: str, target: str) -> None:
    """The runtime's own optimizer, at the level that keeps to operators of the standard."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = target
    options.log_severity_level = 3
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
