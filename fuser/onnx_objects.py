"""ONNX models in memory, of whatever library: as a ModelProto, and as the same kind again.

Understood are onnx.ModelProto, onnx_graphsurgeon.Graph, onnx_ir.Model (also known as onnxscript.ir.Model) and
torch.onnx.ONNXProgram.  None of these libraries is imported before an object of its own is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fuser.errors import InputError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class InMemory:
    """A model in memory.

    name: what its author called it; may be empty.
    proto: the same model; it shares nothing with the object that may be edited, unless it is that object.
    back: makes an object of the same kind of another ModelProto.
    """

    name: str
    proto: onnx.ModelProto
    back: Callable[[onnx.ModelProto], Any]


def in_memory(model: Any) -> InMemory | None:
    """The model, or None where it is of no kind that is understood; it is not changed.

    Raises `InputError` for one that cannot be written as a ModelProto.
    """
    kind = _kind(model)
    if kind is None:
        return None
    try:
        return _OPENERS[kind](model)
    except Exception as error:  # whatever a stranger's serializer may raise
        raise InputError(f"this {kind} cannot be written as an onnx.ModelProto: {_first_line(error)}") from error


def is_in_memory(model: Any) -> bool:
    """Whether `model` is of a kind that `in_memory` understands."""
    return _kind(model) is not None


def _kind(model: Any) -> str | None:
    names = (f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__)
    return next((name for name in names if name in _OPENERS), None)


def _proto(model: onnx.ModelProto) -> InMemory:
    return InMemory(model.graph.name, model, lambda done: done)


def _graphsurgeon(graph: Any) -> InMemory:
    import onnx_graphsurgeon as gs

    return InMemory(graph.name, gs.export_onnx(graph), gs.import_onnx)


def _ir_model(model: Any) -> InMemory:
    import onnx_ir

    initializers = [value for graph in model.graphs() for value in graph.initializers.values()]
    if missing := next((value.name for value in initializers if value.const_value is None), None):
        raise ValueError(f"the initializer {missing!r} has no value")  # it would be left out without a word
    if any(isinstance(value.const_value, onnx_ir.ExternalTensor) for value in initializers):
        # A proto names data files without their folder; tensors are shared with the clone, and not touched.
        model = onnx_ir.external_data.load_to_model(model.clone())
    return InMemory(model.graph.name or "", onnx_ir.to_proto(model), onnx_ir.from_proto)


def _onnx_program(program: Any) -> InMemory:
    inner = _ir_model(program.model)

    def back(done: onnx.ModelProto) -> Any:
        # `exported_program` is what the original was made of; it still tells how the program is called.
        return type(program)(inner.back(done), program.exported_program)

    return InMemory(inner.name, inner.proto, back)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_OPENERS: dict[str, Callable[[Any], InMemory]] = {
    "onnx.ModelProto": _proto,
    "onnx_graphsurgeon.Graph": _graphsurgeon,
    "onnx_ir.Model": _ir_model,
    "torch.ONNXProgram": _onnx_program,
}
