"""Fold operators whose inputs are all known before run time into the constant they make.

    y = f(c1, c2, ...)   =>   y = c

The graph computes the value as its runtime would, so the outputs of the model keep their bits.  Sizes that are known
are constants, whatever else of a shape is not; a Reshape is given -1 for the one that is not.

Refusals:
    grows   the constant would take more room than what it replaces, by more than the budget
"""

from __future__ import annotations

from dataclasses import dataclass

from fuser.graph import Graph
from fuser.ops import Constant
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass

ALWAYS = 65_536
"""Elements that a constant may add to the smallest model, too."""

SHARE = 32
"""A constant may add this part of the parameters that there are: a table of relative positions for a layer, say."""


@dataclass(frozen=True)
class FoldConstants(RewritePass[Constant, Constant]):
    """max_growth: how many elements more than before the model may hold for one constant; by default 65,536, or a
    32nd of its parameters where that is more."""

    max_growth: int | None = None

    name, root, contract = "fold-constants", Constant, Contract.EXACT

    def match(self, graph: Graph, op: Constant) -> Constant | Missed:
        growth = op.elements_made - op.elements_freed
        if growth > (ALWAYS if self.max_growth is None else self.max_growth) and not self._is_small(graph, growth):
            return Missed(
                "grows",
                f"it would store {op.elements_made:,} elements in the place of {op.elements_freed:,}",
                f"--max-growth={growth} allows that",
            )
        return op

    def _is_small(self, graph: Graph, growth: int) -> bool:
        """Whether nobody has said what is small, and it is beside what the model holds."""
        return self.max_growth is None and growth * SHARE <= graph.summary().parameters

    def rewrite(self, graph: Graph, match: Constant) -> str:
        graph.replace_with_constant(match)
        return f"a constant of {match.elements_made:,} elements"
