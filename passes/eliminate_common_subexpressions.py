"""Eliminate operators that compute what another one has computed already.

    y1 = f(x), y2 = f(x)   =>   y1 = f(x), y2 = y1

Same operator, attributes and operands, in one graph, function or body.  Random operators, operators with bodies of
their own, and in torch whatever reads or makes memory that is written in place, are no candidates.

Refusals:
    both-public   both results are in the signature, so that each has to be made
"""

from __future__ import annotations

from fuser.graph import Graph
from fuser.ops import Duplicate
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


class EliminateCommonSubexpressions(RewritePass[Duplicate, Duplicate]):
    """y1 = f(x), y2 = f(x) => y2 = y1"""

    name, root, contract = "eliminate-common-subexpressions", Duplicate, Contract.EXACT
    late = True  # conv(x) twice, with a BatchNorm for each, can be folded; one convolution with two readers cannot

    def match(self, graph: Graph, op: Duplicate) -> Duplicate | Missed:
        if not graph.can_vanish(op, op.twin):
            return Missed(
                "both-public", f"it makes the same as {graph.describe(op.twin)}, but both are in the signature"
            )
        return op

    def rewrite(self, graph: Graph, match: Duplicate) -> str:
        graph.replace(match, by=match.twin)
        return f"its readers read {graph.describe(match.twin)}, which is the same"
