"""What a model costs before it runs: bytes, nodes, parameters, multiply-adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from fuser import costs
from fuser.files import ModelFile
from fuser.graph import Summary


@dataclass(frozen=True)
class Costs:
    """file_bytes: with external data, None for what is no file.  multiply_adds: of one inference with the
    inputs that are measured, in convolutions and matrix products; None when a shape is not known."""

    file_bytes: int | None
    ops: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    parameter_bytes: int = 0
    multiply_adds: int | None = None

    @property
    def nodes(self) -> int:
        return sum(self.ops.values())


def of_onnx(model: ModelFile, path: Path, inputs: Mapping[str, Any]) -> Costs:
    """The costs of an ONNX model, with the arrays it is fed."""
    from fuser.graphs.onnx.graph import OnnxGraph

    shapes = {name: array.shape for name, array in inputs.items()}
    return _costs(OnnxGraph(model).summary(), file_bytes(model.proto, path), onnx_multiply_adds(model.proto, shapes))


def of_torch(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Costs:
    """The costs of a torch module, a graph module or an exported program; it is run once."""
    import torch

    program = isinstance(model, torch.export.ExportedProgram)
    tensors = list((model.state_dict if program else model.state_dict()).values())
    floats = [t for t in tensors if t.is_floating_point()]
    ops, multiply_adds = _counted(model.module() if program else model, args, kwargs)
    summary = Summary(ops, sum(t.numel() for t in floats), sum(t.numel() * t.element_size() for t in tensors))
    return _costs(summary, None, multiply_adds)


def _costs(summary: Summary, size: int | None, multiply_adds: int | None) -> Costs:
    return Costs(size, dict(summary.ops), summary.parameters, summary.bytes, multiply_adds)


def file_bytes(proto: onnx.ModelProto, path: Path) -> int:
    """The size of a model file and of the data files it reads."""
    tensors = proto.graph.initializer
    locations = {e.value for t in tensors for e in t.external_data if e.key == "location"} - {path.name}
    files = [path, *(path.parent / location for location in locations)]
    return sum(file.stat().st_size for file in files if file.is_file())


def onnx_multiply_adds(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Multiply-adds of the main graph, its functions inlined, for inputs of the given shapes.

    Formulas in `fuser.costs`.  None when a shape cannot be inferred.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    del model.graph.value_info[:]
    for value in model.graph.input:
        if value.name in shapes:
            dims = value.type.tensor_type.shape
            del dims.dim[:]
            for size in shapes[value.name]:
                dims.dim.add().dim_value = size
    for value in model.graph.output:  # a symbolic dimension here would win over the inferred one
        value.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        return None
    known: dict[str, tuple[int, ...] | None] = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = _shape(value)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                known[node.output[0]] = tuple(attribute.t.dims)
    total = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            continue
        x, w, y = (known.get(name) for name in (node.input[0], node.input[1], node.output[0]))
        if x is None or w is None or y is None:
            return None
        if node.op_type.startswith("Conv"):
            total += costs.conv(x, w, y, transposed=node.op_type == "ConvTranspose")
        else:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            total += costs.product(x, y, axis=0 if transposed else -1)
    return total


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(d.HasField("dim_value") and d.dim_value >= 0 for d in tensor.shape.dim):
        return None
    return tuple(d.dim_value for d in tensor.shape.dim)


def _counted(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, int], int | None]:
    """The operators that one call runs, and its multiply-adds by torch's own counter.

    What runs is the one thing that a module and the graph made of it can be compared by; a view computes nothing.
    No operators and None when the call fails: the arms will say what is wrong with the model.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    ran: Counter[str] = Counter()

    class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not op.is_view and op.overloadpacket is not torch.ops.aten.empty:
                ran[str(op.overloadpacket)] += 1
            return op(*args, **(kwargs or {}))

    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, Operators():  # type: ignore[no-untyped-call]
            model(*args, **kwargs)
    except Exception:
        return {}, None
    return dict(ran), int(counter.get_total_flops()) // 2
