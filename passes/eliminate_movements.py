"""Eliminate reshapes and transposes that the next one undoes, makes irrelevant, or can do as well.

    transpose(transpose(x, p), q)   =>   x                     where q undoes p
    transpose(transpose(x, p), q)   =>   transpose(x, p[q])    where nobody else reads the first one
    reshape(reshape(x, s), t)       =>   x                     where x has the shape t
    reshape(reshape(x, s), t)       =>   reshape(x, t)         where t says all, and nobody else reads the first one

On ONNX a Squeeze, an Unsqueeze, a Flatten, and a Transpose that only moves axes of one element say all once they are a
Reshape to the shape they make, where no more than one size of that is unknown.

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
    """The op that goes, and what its readers are to read.

    reshapes: readers that have to say their shape by themselves.
    """

    op: Op
    by: Value
    reshapes: tuple[Movement, ...] = ()


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The second of two transposes, which does what both did to `by`."""

    op: Transpose
    by: Value
    permutation: tuple[int, ...]


class EliminateMovements(RewritePass[Movement, Detour | Shortcut]):
    """there and back again => nothing"""

    name, root, contract = "eliminate-movements", Movement, Contract.EXACT

    def concerns(self, graph: Graph, op: Movement) -> bool:
        return _found(graph, op) is not None

    def match(self, graph: Graph, op: Movement) -> Detour | Shortcut | Missed:
        found = _found(graph, op)
        assert found is not None  # otherwise it is no candidate
        if not graph.is_stable(found.by):
            return written(graph, found.by)
        if isinstance(found, Detour) and not graph.can_vanish(found.op, found.by):
            return Missed("both-public", "it joins two names of the signature; without it one of them would be gone")
        return found

    def rewrite(self, graph: Graph, match: Detour | Shortcut) -> str:
        if isinstance(match, Shortcut):
            graph.set_permutation(match.op, match.permutation)
            graph.set_input(match.op, match.by)
            return f"it permutes {graph.describe(match.by)}"
        for reshape in match.reshapes:
            graph.set_shape(reshape)
        graph.replace(match.op, by=match.by)
        return f"its readers read {graph.describe(match.by)}"


def _found(graph: Graph, op: Movement) -> Detour | Shortcut | None:
    inner = graph.op_producing(op.input)
    if inner is not None and not inner.hooked:
        match inner, op:
            case Transpose(), Transpose() if (found := _transposes(graph, inner, op)) is not None:
                return found
            case Reshape(), Reshape() if keeps_shape(graph.shape(inner.input), graph.shape(op.output)):
                return Detour(op, inner.input)
    readers = _that_say_all(graph, op) if isinstance(op, Reshape) or op.absolute else ()
    return Detour(op, op.input, readers) if readers else None


def _transposes(graph: Graph, inner: Transpose, op: Transpose) -> Detour | Shortcut | None:
    both = tuple(inner.permutation[axis] for axis in op.permutation)
    if both == tuple(range(len(both))):
        return Detour(op, inner.input)
    (reader, *others) = graph.readers(inner.output)
    if others or not isinstance(reader.op, Transpose):  # another one, or one in a body that may run many times
        return None
    return Shortcut(op, inner.input, both)


def _that_say_all(graph: Graph, op: Movement) -> tuple[Movement, ...]:
    """The readers, where all bring what they get into a shape that does not depend on this one."""
    readers = [reader.op for reader in graph.readers(op.output)]
    found = tuple(r for r in readers if isinstance(r, Movement) and r.absolute and r.input is op.output)
    return found if len(found) == len(readers) else ()
