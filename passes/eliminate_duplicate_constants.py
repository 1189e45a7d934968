"""Eliminate constants that are equal bit for bit to another one.

    y1 = f(x, c), y2 = g(x, c')   =>   y1 = f(x, c), y2 = g(x, c)      c' of the type, shape and bits of c

Weights that an exporter has written twice are stored once, and operators that differ by such a copy alone become
common subexpressions.  An initializer that is also a graph input may be replaced by the caller: it is no candidate.

On torch the names of the state_dict are an interface, too: a checkpoint with both of them would no longer load.

Refusals:
    both-public   it is an output of the graph under its own name
"""

from __future__ import annotations

from fuser.graph import Graph
from fuser.ops import DuplicateConstant
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


class EliminateDuplicateConstants(RewritePass[DuplicateConstant, DuplicateConstant]):
    """c = c', bit for bit => c"""

    name, root, contract = "eliminate-duplicate-constants", DuplicateConstant, Contract.EXACT
    hosts = ("onnx",)
    late = True  # --shared-weights=refuse would leave layers alone that share a weight only since this pass

    def match(self, graph: Graph, op: DuplicateConstant) -> DuplicateConstant | Missed:
        if not graph.can_vanish(op, op.twin):
            return Missed("both-public", f"it equals {graph.describe(op.twin)}, but is an output under its own name")
        return op

    def rewrite(self, graph: Graph, match: DuplicateConstant) -> str:
        graph.replace(match, by=match.twin)
        return f"its readers read {graph.describe(match.twin)}, which is equal"
