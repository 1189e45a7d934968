"""Cancel two transposes of which the second undoes the first.

    y = transpose(transpose(x, p), q)   =>   y = x      where p[q[i]] = i

Refusals:
    not-inverse   the second permutation does not undo the first
    both-public   both names are in the signature, so that something has to stay between them
"""

from __future__ import annotations

from dataclasses import dataclass

from fuser.graph import Graph
from fuser.ops import Transpose, Value
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


@dataclass(frozen=True, eq=False)
class Pair:
    """The second transpose, and what the first one was given."""

    second: Transpose
    origin: Value


class CancelTransposes(RewritePass[Transpose, Pair]):
    """transpose(transpose(x, p), q) => x"""

    name, root, contract = "cancel-transposes", Transpose, Contract.EXACT

    def concerns(self, graph: Graph, op: Transpose) -> bool:
        """Whether it is applied to the result of another one."""
        return isinstance(graph.op_producing(op.input), Transpose)

    def match(self, graph: Graph, op: Transpose) -> Pair | Missed:
        first = graph.op_producing(op.input)
        assert isinstance(first, Transpose)  # it is no candidate otherwise
        if [first.permutation[axis] for axis in op.permutation] != list(range(len(op.permutation))):
            return Missed("not-inverse", f"{op.permutation} does not undo the {first.permutation} before it")
        if first.hooked or not graph.can_vanish(op, first.input):
            return Missed("both-public", "it joins two names of the signature; without it one of them would be gone")
        return Pair(op, first.input)

    def rewrite(self, graph: Graph, match: Pair) -> str:
        graph.replace(match.second, by=match.origin)
        return f"its readers read {graph.describe(match.origin)}"
