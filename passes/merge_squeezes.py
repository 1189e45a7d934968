"""Merge a reshape that only puts axes of one element back, or drops them, into the reduction before it.

unsqueeze(reduce(x, axes), axes)       =>   reduce(x, axes, keepdims=1)   where nobody else reads the reduction
squeeze(reduce(x, axes, keepdims=1))   =>   reduce(x, axes)
"""

from __future__ import annotations

from dataclasses import dataclass

from fuser.graph import Graph
from fuser.neutral import keeps_shape
from fuser.ops import Reduction, Reshape
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


@dataclass(frozen=True, eq=False)
class InShape:
    """`reduction` is to make what `reshape` makes of its result."""

    reduction: Reduction
    reshape: Reshape


class MergeSqueezes(RewritePass[Reshape, InShape]):
    """unsqueeze(reduce(x)) => reduce(x, keepdims=1)"""

    name, root, contract = "merge-squeezes", Reshape, Contract.EXACT
    hosts = ("onnx",)  # on torch a view costs nothing

    def concerns(self, graph: Graph, op: Reshape) -> bool:
        return _found(graph, op) is not None

    def match(self, graph: Graph, op: Reshape) -> InShape | Missed:
        found = _found(graph, op)
        assert found is not None  # otherwise it is no candidate
        return found

    def rewrite(self, graph: Graph, match: InShape) -> str:
        name = graph.describe(match.reduction)
        graph.reduce_in_shape(match.reduction, match.reshape)
        return f"{name} makes that shape"


def _found(graph: Graph, op: Reshape) -> InShape | None:
    reduction, readers = graph.op_producing(op.input), graph.readers(op.input)
    if not isinstance(reduction, Reduction) or len(readers) != 1 or not isinstance(readers[0].op, Reshape):
        return None  # or one in a body
    shape = graph.shape(reduction.input)
    if shape is None:
        return None
    sizes = enumerate(shape)
    if reduction.keeps_axes:
        other = [size for axis, size in sizes if axis not in reduction.axes]
    else:
        other = [1 if axis in reduction.axes else size for axis, size in sizes]
    return InShape(reduction, op) if keeps_shape(other, graph.shape(op.output)) else None
