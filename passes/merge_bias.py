"""Merge a matrix product and the addition of its bias into one operator.

    y = x W + b                              =>   y = linear(x, W, b)
    y = reshape(reshape(x, s) W + b, t)      =>   y = reshape(linear(reshape(x, [-1, k]), W, b), t)

On ONNX it is a Gemm, which takes a matrix: data of more axes is only given as rows where that adds no reshape.  On
torch it is `addmm` or `linear`.

Refusals:
    rank         how many axes the data has is not known
    broadcasts   the bias does not have one number for each output
    type         the operator is not there for the type of the data
    grows        `linear` takes the matrix the other way round, and the one there is has other readers
"""

from __future__ import annotations

from dataclasses import dataclass

from fuser.graph import Graph
from fuser.ops import Linear, Reshape, Value
from fuser.remarks import Missed
from fuser.rewrite import RewritePass


@dataclass(frozen=True, eq=False)
class Union:
    """`around`: the reshapes in front of the operator and behind it that are to make rows, and take rows."""

    op: Linear
    around: tuple[Reshape, Reshape] | None


class MergeBias(RewritePass[Linear, Union]):
    """x W + b => linear(x, W, b)"""

    name, root, late = "merge-bias", Linear, True

    def concerns(self, graph: Graph, op: Linear) -> bool:
        """Whether the bias is added by a node of its own, and one node could do both without a reshape more."""
        if not op.apart:
            return False
        return not graph.rows_only or graph.rank(op.input) in (2, None) or _around(graph, op) is not None

    def match(self, graph: Graph, op: Linear) -> Union | Missed:
        around = _around(graph, op) if graph.rows_only and graph.rank(op.input) != 2 else None
        if graph.rows_only and graph.rank(op.input) is None and around is None:
            return Missed(
                "rank",
                f"how many axes {graph.describe(op.input)} has is not known",
                "give example_inputs, or a model with shapes",
            )
        weight, bias = graph.shape(op.weight), graph.shape(op.bias)
        if weight is None or bias != weight[1:]:
            return Missed("broadcasts", f"the bias has the shape {bias}, and the matrix {weight}")
        return graph.refuses_uniting(op) or Union(op, around)

    def rewrite(self, graph: Graph, match: Union) -> str:
        graph.unite(match.op, match.around)
        return "one operator, bias included"


def _around(graph: Graph, op: Linear) -> tuple[Reshape, Reshape] | None:
    """The reshapes in front and behind, where nobody else reads what is between, and the shape of rows can be said."""
    before, after = graph.op_producing(op.input), _only_reader(graph, op.output)
    if not isinstance(before, Reshape) or before.hooked or not isinstance(after, Reshape) or after.hooked:
        return None
    weight = graph.shape(op.weight)
    if weight is None or not isinstance(weight[0], int) or not weight[0] or not after.absolute:
        return None
    reader = _only_reader(graph, op.input)
    return (before, after) if isinstance(reader, Linear) and after.input is op.output else None


def _only_reader(graph: Graph, value: Value) -> object:
    readers = graph.readers(value)
    return readers[0].op if len(readers) == 1 else None
