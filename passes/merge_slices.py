"""Merge a slice into the one that reads it.

    slice(slice(x, r), s)   =>   slice(x, r, s)   where nobody else reads the first one

Along different axes the two are one slice of both; along the same one, x[a:b][c:d] = x[a + c : min(b, a + d)], where
nothing counts from the end and no element is left out in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.graph import Graph
from fuser.ops import Range, Slice
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass

LARGEST = 2**63 - 1
"""A bound is a 64-bit number; this one is what exporters write for a slice without an end."""


@dataclass(frozen=True, eq=False)
class Both:
    """`op` takes `ranges` of what the one before it reads."""

    op: Slice
    inner: Slice
    ranges: tuple[Range, ...]


class MergeSlices(RewritePass[Slice, Both]):
    """slice(slice(x)) => slice(x)"""

    name, root, contract = "merge-slices", Slice, Contract.EXACT
    hosts = ("onnx",)  # torch slices one axis at a time, and a view costs nothing

    def concerns(self, graph: Graph, op: Slice) -> bool:
        return _both(graph, op) is not None

    def match(self, graph: Graph, op: Slice) -> Both | Missed:
        found = _both(graph, op)
        assert found is not None  # otherwise it is no candidate
        return found

    def rewrite(self, graph: Graph, match: Both) -> str:
        graph.set_ranges(match.op, match.ranges)
        graph.set_input(match.op, match.inner.input)
        return f"it slices {len(match.ranges)} axes"


def _both(graph: Graph, op: Slice) -> Both | None:
    inner, readers = graph.op_producing(op.input), graph.readers(op.input)
    if not isinstance(inner, Slice) or len(readers) != 1 or not isinstance(readers[0].op, Slice):  # or one in a body
        return None
    ranges = _composed(inner.ranges, op.ranges)
    return None if ranges is None else Both(op, inner, ranges)


def _composed(first: Sequence[Range], second: Sequence[Range]) -> tuple[Range, ...] | None:
    """What both do; None where that is no slice, or the axes count from different ends."""
    if len({range_.axis < 0 for range_ in (*first, *second)}) > 1:
        return None
    ranges = {range_.axis: range_ for range_ in first}
    for range_ in second:
        before = ranges.get(range_.axis)
        if before is not None:
            if min(before.start, before.end, range_.start, range_.end) < 0 or (before.step, range_.step) != (1, 1):
                return None
            end = min(before.end, before.start + range_.end)
            range_ = Range(range_.axis, min(before.start + range_.start, LARGEST), end)
        ranges[range_.axis] = range_
    return tuple(ranges.values())
