"""Fold a Pad into the convolutions and pools that read it.

    y = conv(pad(x, p), q)       =>   y = conv(x, p + q)       where it pads with zeros
    y = avg_pool(pad(x, p), q)   =>   y = avg_pool(x, p + q)   where it pads with zeros, which count in the mean
    y = max_pool(pad(x, p), q)   =>   y = max_pool(x, p + q)   where it pads with what is below every element

p and q are what is added (before, after) each spatial axis.  Zeros are below every element of a ReLU, say.
All readers of the Pad have to take it, or it stays.

Refusals:
    mode           it repeats elements of its input (reflect, edge, wrap)
    not-constant   how much, or what, it pads with is not known before run time
    overridable    how much, or what, it pads with is an initializer that the caller may replace
    rank           the axes count from the front, and how many the input has is not known
    negative       it takes elements away
    written        its input is written in place, so that it cannot be read later
    shared-output  it is read by something that cannot pad
    axes           it pads more than the spatial axes of the operator that reads it
    geometry       the operator is transposed, or what it reads depends on the size of its input
    value          the operator would pad with something else
    window         the windows of a pool would lie in the padding, or nearly
    asymmetric     torch pads both sides of an axis alike
    layout         the result would be laid out differently in memory
    hooks          user code watches one of the operators
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from fuser.absorb import written
from fuser.graph import Graph, Reader
from fuser.ops import AveragePool, Bounded, Conv, MaxPool, Pad, Padding
from fuser.remarks import Missed
from fuser.rewrite import HOOKED, RewritePass

Padder: TypeAlias = Conv | AveragePool | MaxPool


@dataclass(frozen=True, eq=False)
class Folding:
    """`takers`: the operators that read the Pad, and what each pads by then."""

    pad: Pad
    takers: tuple[tuple[Padder, Padding], ...]


class FoldPad(RewritePass[Pad, Folding]):
    """conv(pad(x)) => conv(x), padded"""

    name, root = "fold-pad", Pad

    def concerns(self, graph: Graph, op: Pad) -> bool:
        """Whether something that can pad reads it."""
        return any(isinstance(reader.op, Padder) for reader in graph.readers(op.output))

    def match(self, graph: Graph, op: Pad) -> Folding | Missed:
        if op.mode != "constant":
            return Missed("mode", f"it pads with what it finds in its input ({op.mode})")
        for known in (op.padding, op.value):
            if isinstance(known, Missed):
                return known
        assert not isinstance(op.padding, Missed)
        if any(side < 0 for pair in op.padding for side in pair):
            return Missed("negative", f"it takes elements away: {op.padding}")
        if not graph.is_stable(op.input):
            return written(graph, op.input)
        takers: list[tuple[Padder, Padding]] = []
        for reader in graph.readers(op.output):
            found = _into(graph, op, op.padding, reader)
            if isinstance(found, Missed):
                return found
            takers.append(found)
        return Folding(op, tuple(takers))

    def rewrite(self, graph: Graph, match: Folding) -> str:
        names = ", ".join(graph.describe(taker) for taker, _ in match.takers)
        for taker, padding in match.takers:
            graph.set_padding(taker, padding)
            graph.set_input(taker, match.pad.input)
        graph.replace(match.pad, by=match.pad.input)  # which nobody reads any more, but a signature may name it
        return f"into {names}"


def _into(graph: Graph, pad: Pad, added: Padding, reader: Reader) -> tuple[Padder, Padding] | Missed:
    """The operator that reads the Pad, and what it has to pad by itself; or why it cannot."""
    op = reader.op
    if not isinstance(op, Padder) or op.input is not pad.output or reader.shape_only:
        return Missed("shared-output", f"{reader.name} reads it, and cannot pad by itself")
    if op.hooked:
        return HOOKED
    name = graph.describe(op)
    own = _own_padding(op)
    if own is None:
        return Missed("geometry", f"{name} is transposed, or what it reads depends on the size of its input")
    if len(added) > len(own):
        return Missed("axes", f"it pads {len(added)} axes, and {name} the last {len(own)}")
    if not _pads_with(graph, op, pad):
        return Missed("value", f"it pads with {pad.value}, and {name} would pad with something else")
    padding = tuple(_sums(own, added))
    sizes = () if isinstance(op, Conv) or op.window is None else op.window.size
    if any(max(pair) >= size for size, pair in zip(sizes, padding, strict=False)):
        return Missed("window", f"a window of {name} would have nothing but padding in it")
    return graph.refuses_padding(op, pad, padding) or (op, padding)


def _own_padding(op: Padder) -> Padding | None:
    if isinstance(op, Conv):
        return None if op.transposed else op.padding
    return None if op.window is None else op.window.padding


def _sums(own: Padding, added: Padding) -> Iterator[tuple[int, int]]:
    """What is padded together; `added` is for the last axes."""
    rest = ((0, 0),) * (len(own) - len(added))
    for (before, after), (more_before, more_after) in zip(own, (*rest, *added), strict=True):
        yield before + more_before, after + more_after


def _pads_with(graph: Graph, op: Padder, pad: Pad) -> bool:
    """Whether the padding of `op` does what the value of `pad` does."""
    assert not isinstance(pad.value, Missed)
    match op:
        case Conv():
            return pad.value == 0
        case AveragePool():
            counted = op.pads_counted or not any(any(pair) for pair in op.window.padding)  # type: ignore[union-attr]
            return pad.value == 0 and counted
        case MaxPool():
            below = graph.op_producing(pad.input)
            return pad.value <= max(pad.lowest, below.low if isinstance(below, Bounded) else pad.lowest)
