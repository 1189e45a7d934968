"""Eliminate operators without side effects whose results nobody reads, and constants that nobody reads.

    y = f(x), y unread   =>   (nothing)

Inputs of the graph stay, read or not: the caller knows them.
"""

from __future__ import annotations

from fuser.graph import Graph
from fuser.ops import Dead
from fuser.rewrite import Contract, RewritePass


class EliminateDeadCode(RewritePass[Dead, Dead]):
    """f(x), unread => nothing"""

    name, root, contract = "eliminate-dead-code", Dead, Contract.EXACT

    def match(self, graph: Graph, op: Dead) -> Dead:
        return op

    def rewrite(self, graph: Graph, match: Dead) -> str:
        graph.erase(match)
        return "nobody reads it"
