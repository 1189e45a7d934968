"""What an ONNX graph says about its inputs: which ids are in range, which sizes and values it is written for."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx

from fuser.files import ModelFile

_TRANSPARENT = {
    *("Cast", "CastLike", "Clip", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice"),
    *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
}
"""Ops whose output holds the same values as their input, so that what is asked of one is asked of the other."""

_KEEPS_AXES = {"Cast", "CastLike", "Clip", "Identity", "Relu", "Add", "Sub", "Mul", "Div", "Pad", "Neg", "Sqrt", "Abs"}
"""Ops that keep rank and channel where the other operand is a constant."""

_SHAPES = {("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0), ("Tile", 1), ("TopK", 1), ("Resize", 3), ("Range", 1)}
_LENGTHS = {("LSTM", 4), ("GRU", 4), ("RNN", 4), ("ReverseSequence", 1)}


@dataclass
class Hint:
    """What is known of an input.

    below: its integers index something of this size.
    choices: constants that the graph compares it with.
    is_size: its integers are a shape or a count.
    is_length: its integers are lengths of sequences.
    rank, pins: number of axes, and sizes by axis, that its readers demand.
    words: strings that the model knows.
    """

    below: int | None = None
    choices: list[Any] = field(default_factory=list)
    is_size: bool = False
    is_length: bool = False
    rank: int | None = None
    pins: dict[int, int] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def hints(model: ModelFile) -> Callable[[str], Hint]:
    """A function from the name of an input to what the graph says of it."""
    return _Reader(model).hint


class _Reader:
    def __init__(self, model: ModelFile) -> None:
        proto = model.proto
        if proto.functions:
            import onnx.inliner

            with contextlib.suppress(Exception):  # the C++ side raises its own types; a hint is no more than that
                proto = onnx.inliner.inline_local_functions(proto)
        self._model = model
        self._uses: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        self._constants: dict[str, onnx.TensorProto] = {}
        for graph in _graphs(proto.graph):
            self._constants |= {tensor.name: tensor for tensor in graph.initializer}
            for node in graph.node:
                for index, name in enumerate(node.input):
                    self._uses[name].append((node, index))
                if node.op_type == "Constant":
                    values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
                    self._constants |= dict(zip(node.output, values, strict=False))

    def hint(self, name: str) -> Hint:
        hint = Hint()
        for node, index in self._reached(name, self._same_values):
            self._values(hint, node, index)
        for node, index in self._reached(name, self._same_axes):
            self._axes(hint, node, index)
        return hint

    def _reached(
        self, name: str, through: Callable[[onnx.NodeProto, int], bool]
    ) -> Iterator[tuple[onnx.NodeProto, int]]:
        """Every use of a value, and of what is made of it by ops that `through` looks through."""
        waiting, seen = [name], {name}
        while waiting:
            for node, index in self._uses[waiting.pop()]:
                yield node, index
                if through(node, index):
                    waiting += [output for output in node.output if output and output not in seen]
                    seen.update(node.output)

    def _same_values(self, node: onnx.NodeProto, index: int) -> bool:
        return node.op_type in _TRANSPARENT and (index == 0 or node.op_type in ("Concat", "Where"))

    def _same_axes(self, node: onnx.NodeProto, index: int) -> bool:
        others = [name for position, name in enumerate(node.input) if position != index]
        return node.op_type in _KEEPS_AXES and all(name in self._constants for name in others if name)

    def _values(self, hint: Hint, node: onnx.NodeProto, index: int) -> None:
        if node.op_type == "Gather" and index == 1 and (data := self._constants.get(node.input[0])) is not None:
            axis = _attribute(node, "axis", 0)
            _lower(hint, data.dims[axis] if data.dims else None)
        elif node.op_type == "OneHot" and index == 0:
            depth = self._values_of(node.input[1])
            _lower(hint, int(depth[0]) if depth else None)
        elif node.op_type in ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"):
            hint.choices += self._values_of(node.input[1 - index])
        elif (node.op_type, index) in _SHAPES:
            hint.is_size = True
        elif (node.op_type, index) in _LENGTHS:
            hint.is_length = True
        for attribute in node.attribute:
            if attribute.name in ("keys_strings", "cats_strings", "classlabels_strings"):
                hint.words += [word.decode() for word in attribute.strings]

    def _axes(self, hint: Hint, node: onnx.NodeProto, index: int) -> None:
        if index != 0 or len(node.input) < 2:
            return
        weight = self._constants.get(node.input[1])
        if weight is None:
            return
        dims = list(weight.dims)
        if node.op_type == "Conv":
            hint.rank, hint.pins[1] = len(dims), dims[1] * _attribute(node, "group", 1)
        elif node.op_type == "ConvTranspose":
            hint.rank, hint.pins[1] = len(dims), dims[0]
        elif node.op_type == "BatchNormalization":
            hint.pins[1] = dims[0]
        elif node.op_type == "Gemm":
            hint.rank, transposed = 2, _attribute(node, "transB", 0)
            hint.pins[0 if _attribute(node, "transA", 0) else 1] = dims[1] if transposed else dims[0]
        elif node.op_type == "MatMul" and len(dims) == 2:
            hint.pins[-1] = dims[0]
        elif node.op_type in ("LSTM", "GRU", "RNN"):
            hint.rank, hint.pins[2] = 3, dims[2]

    def _values_of(self, name: str) -> list[Any]:
        """The elements of a small constant."""
        tensor = self._constants.get(name)
        if tensor is None:
            return []
        size = 1
        for dim in tensor.dims:
            size *= dim
        return self._model.array(tensor).reshape(-1).tolist() if size <= 16 else []


def _lower(hint: Hint, bound: int | None) -> None:
    if bound:
        hint.below = bound if hint.below is None else min(hint.below, bound)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else [])):
                yield from _graphs(inner)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
