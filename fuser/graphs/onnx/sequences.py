"""Sequences that an ONNX model makes of a tensor, to take their elements one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuser.graphs.onnx.editor import ABSENT, Node, Tensor
from fuser.graphs.onnx.values import Shape
from fuser.graphs.onnx.wiring import is_standard
from fuser.ops import SplitSequence
from fuser.remarks import Missed

if TYPE_CHECKING:
    from fuser.graphs.onnx.graph import OnnxGraph


def split_sequence(graph: OnnxGraph, node: Node) -> SplitSequence | None:
    """What a SplitToSequence node is; None where its elements are no parts of the tensor."""
    data, sequence = node.inputs[0], node.outputs[0]
    shape = graph.shape(data)
    if not shape:
        return None
    axis = node.attrs.get("axis", 0) % len(shape)
    has_split = len(node.inputs) > 1 and node.inputs[1] is not ABSENT
    if not has_split and not node.attrs.get("keepdims", 1):  # the elements lack the axis
        return None
    sizes = _sizes(graph, node.inputs[1] if has_split else None, shape, axis)
    taken, others = [], int(bool(sequence.public))
    for reader, _ in sequence.uses():
        index = _index(graph, reader, len(sizes or ()))
        if index is None or reader.scope is not node.scope:
            others += 1
        else:
            taken.append((index, reader.outputs[0]))
    return SplitSequence(node, sequence, data, axis, sizes, tuple(taken), others)


def _sizes(graph: OnnxGraph, split: Tensor | None, shape: Shape, axis: int) -> tuple[int, ...] | None:
    total = shape[axis]
    if not isinstance(total, int):
        return None
    if split is None:
        return (1,) * total
    value = graph.constant(split)
    if isinstance(value, Missed):
        return None
    if value.ndim == 0:
        size = int(value)
        return tuple(min(size, total - start) for start in range(0, total, size)) if size > 0 else None
    sizes = tuple(int(size) for size in value)
    return sizes if sum(sizes) == total else None


def _index(graph: OnnxGraph, reader: Node, count: int) -> int | None:
    """Which element a SequenceAt takes."""
    if reader.op != "SequenceAt" or not is_standard(reader):
        return None
    value = graph.constant(reader.inputs[1])
    if isinstance(value, Missed) or not -count <= int(value) < count:
        return None
    return int(value) % count
