"""Merge a concatenation into the one that reads it.

    concat(concat(x, y), z)   =>   concat(x, y, z)   along the same axis, where nobody else reads the first one

Refusals:
    written   an input of the first one is written in place, so that it cannot be read later
"""

from __future__ import annotations

from dataclasses import dataclass

from fuser.absorb import written
from fuser.graph import Graph
from fuser.ops import Concat, Value
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


@dataclass(frozen=True, eq=False)
class Joined:
    """`op` joins `values`."""

    op: Concat
    values: tuple[Value, ...]


class MergeConcats(RewritePass[Concat, Joined]):
    """concat(concat(x, y), z) => concat(x, y, z)"""

    name, root, contract = "merge-concats", Concat, Contract.EXACT

    def concerns(self, graph: Graph, op: Concat) -> bool:
        return any(_inner(graph, op, value) is not None for value in op.inputs)

    def match(self, graph: Graph, op: Concat) -> Joined | Missed:
        values: list[Value] = []
        for value in op.inputs:
            inner = _inner(graph, op, value)
            for part in (value,) if inner is None else inner.inputs:
                if inner is not None and not graph.is_stable(part):
                    return written(graph, part)
                values.append(part)
        return Joined(op, tuple(values))

    def rewrite(self, graph: Graph, match: Joined) -> str:
        graph.set_inputs(match.op, match.values)
        return f"it joins {len(match.values)} values"


def _inner(graph: Graph, op: Concat, value: Value) -> Concat | None:
    """The concatenation that makes `value`, where the one that reads it can do its work."""
    inner = graph.op_producing(value)
    if not isinstance(inner, Concat) or inner.axis != op.axis:
        return None
    readers = graph.readers(value)
    return inner if len(readers) == 1 and isinstance(readers[0].op, Concat) else None  # not one in a body
