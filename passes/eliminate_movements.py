"""Eliminate reshapes and transposes that the next one undoes, or makes irrelevant.

    transpose(transpose(x, p), q)   =>   x                  where q undoes p
    reshape(reshape(x, s), t)       =>   x                  where x has the shape t
    reshape(reshape(x, s), t)       =>   reshape(x, t)      where t says all, and nobody else reads the first one

Refusals:
    both-public   two names of the signature would become one
    written       x is written in place, so that it cannot be read later
"""

from __future__ import annotations

from dataclasses import dataclass

from fuser.absorb import written
from fuser.graph import Graph
from fuser.neutral import keeps_shape
from fuser.ops import Movement, Op, Reshape, Transpose, Value
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


@dataclass(frozen=True, eq=False)
class Detour:
    """The op that goes, and what its readers are to read."""

    op: Op
    by: Value


class EliminateMovements(RewritePass[Movement, Detour]):
    """there and back again => nothing"""

    name, root, contract = "eliminate-movements", Movement, Contract.EXACT

    def concerns(self, graph: Graph, op: Movement) -> bool:
        return _detour(graph, op) is not None

    def match(self, graph: Graph, op: Movement) -> Detour | Missed:
        found = _detour(graph, op)
        assert found is not None  # otherwise it is no candidate
        if not graph.is_stable(found.by):
            return written(graph, found.by)
        if not graph.can_vanish(found.op, found.by):
            return Missed("both-public", "it joins two names of the signature; without it one of them would be gone")
        return found

    def rewrite(self, graph: Graph, match: Detour) -> str:
        graph.replace(match.op, by=match.by)
        return f"its readers read {graph.describe(match.by)}"


def _detour(graph: Graph, op: Movement) -> Detour | None:
    inner = graph.op_producing(op.input)
    match inner, op:
        case Transpose(), Transpose():
            there_and_back = tuple(inner.permutation[axis] for axis in op.permutation)
            if there_and_back == tuple(range(len(there_and_back))) and not inner.hooked:
                return Detour(op, inner.input)
        case Reshape(), Reshape():
            if inner.hooked:
                return None
            if keeps_shape(graph.shape(inner.input), graph.shape(op.output)):
                return Detour(op, inner.input)
    if isinstance(op, Reshape) and _matters_to_nobody(graph, op):
        return Detour(op, op.input)
    return None


def _matters_to_nobody(graph: Graph, op: Reshape) -> bool:
    """Whether all readers reshape what they get to a shape that does not depend on this one."""
    readers = graph.readers(op.output)
    return bool(readers) and all(
        isinstance(reader.op, Reshape) and reader.op.absolute and reader.op.input is op.output for reader in readers
    )
