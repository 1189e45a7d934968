"""Eliminate operators that hand on what they get, in its bits, type and shape.

    y = identity(x)   =>   y = x

Identity, Dropout in eval mode, a Cast to the type it has or back from a wider one, x * 1, x / 1, x - 0; Reshape,
Transpose, Expand, Slice, Tile and Concat that change nothing, where that is proven.  x + 0 is not one of them: it
makes 0 of -0.

Refusals:
    both-public   both names are in the signature, so that something has to stay between them
"""

from __future__ import annotations

from fuser.graph import Graph
from fuser.ops import Identity
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


class EliminateIdentity(RewritePass[Identity, Identity]):
    """identity(x) => x"""

    name, root, contract = "eliminate-identity", Identity, Contract.EXACT

    def match(self, graph: Graph, op: Identity) -> Identity | Missed:
        if not graph.can_vanish(op, op.input):
            return Missed("both-public", "it joins two names of the signature; without it one of them would be gone")
        return op

    def rewrite(self, graph: Graph, match: Identity) -> str:
        graph.replace(match, by=match.input)
        return f"its readers read {graph.describe(match.input)}"
