"""Erase multiplications by one.

    y = x * 1   =>   y = x

Refusals:
    not-one       the factor is another number
    broadcasts    the factor may make the result larger than x
    both-public   both names are in the signature, so that something has to stay between them
"""

from __future__ import annotations

from fuser.graph import Graph
from fuser.ops import Elementwise
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


class EraseNeutral(RewritePass[Elementwise, Elementwise]):
    """x * 1 => x"""

    name, root, contract = "erase-neutral", Elementwise, Contract.EXACT

    def concerns(self, graph: Graph, op: Elementwise) -> bool:
        """Whether it is a product with a constant on its right."""
        return op.function == "*" and not isinstance(graph.constant(op.right), Missed)

    def match(self, graph: Graph, op: Elementwise) -> Elementwise | Missed:
        factor = graph.constant(op.right)
        assert not isinstance(factor, Missed)  # it is no candidate otherwise
        if (factor != 1).any():
            return Missed("not-one", f"the factor {graph.describe(op.right)} is not 1")
        if factor.size != 1 or factor.ndim > (graph.rank(op.left) or 0):
            return Missed("broadcasts", f"the factor {graph.describe(op.right)} has the shape {factor.shape}")
        if not graph.can_vanish(op, op.left):
            return Missed("both-public", "it joins two names of the signature; without it one of them would be gone")
        return op

    def rewrite(self, graph: Graph, match: Elementwise) -> str:
        graph.replace(match, by=match.left)
        return "it multiplied by 1"
