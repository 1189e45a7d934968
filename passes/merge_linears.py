"""Merge a linear operator into the one before or after it.

    y = B (A x + a) + b             =>   y = (B A) x + (B a + b)        matrix products
    y = conv1x1(conv(x, A), B)      =>   y = conv(x, B A)               whatever the first one pads
    y = conv(conv1x1(x, A), B)      =>   y = conv(x, B A)               where B pads, A has no bias

Only where neither numbers nor multiplications are added: a product of low rank (in -> few -> out) keeps its two
factors, and a depthwise convolution stays apart from the pointwise one that follows.

Refusals:
    shared-output  what the first one makes is read elsewhere, too
    geometry       both convolutions have a kernel, or the pointwise one has a stride or pads
    grows          the product has more numbers, or more multiplications, than its two factors
    padding        the second one pads with zeros, which the first one would have made something else of
    written        the input of the first one is written in place, so that the second one cannot read it later
    type, not-constant, overridable, quantized, axis-mismatch, shape-mismatch, not-finite, hooks, body, unsound: as for
    fold-batch-norm
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fuser import affine as algebra
from fuser.absorb import constants_of, layout_of, shared_output, written
from fuser.affine import Array, Constants
from fuser.graph import Graph
from fuser.ops import Conv, Linear, LinearOperator
from fuser.products import Factor, agree, into_first, into_second
from fuser.remarks import Missed
from fuser.rewrite import HOOKED, RewritePass


@dataclass(frozen=True, eq=False)
class Pair:
    """Two operators, one after the other, and their constants."""

    first: Conv | Linear
    second: Conv | Linear
    a: Factor
    b: Factor


@dataclass(frozen=True, eq=False)
class Merge:
    """`stays` takes new constants, the other one of the pair goes."""

    pair: Pair
    stays: Conv | Linear
    arrays: dict[str, Array]
    saved: int


class MergeLinears(RewritePass[LinearOperator, Merge]):
    """B (A x + a) + b => (B A) x + (B a + b)"""

    name, root = "merge-linears", LinearOperator

    def concerns(self, graph: Graph, op: LinearOperator) -> bool:
        """Whether it reads what another operator of its kind makes, in the same graph."""
        return _first(graph, op) is not None

    def match(self, graph: Graph, op: LinearOperator) -> Merge | Missed:
        first = _first(graph, op)
        assert first is not None and isinstance(op, Conv | Linear)  # otherwise it is no candidate
        if first.hooked:
            return HOOKED
        if (shared := shared_output(graph, first.output, shapes=True)) is not None:
            return shared
        pair = _pair(graph, first, op)
        if isinstance(pair, Missed):
            return pair
        stays = _which_stays(graph, pair)
        if isinstance(stays, Missed):
            return stays
        freed = sum(graph.freed(v) for one in (first, op) for v in (one.weight, one.bias) if v is not None)
        return _grows(pair, stays, freed) or _merged(graph, pair, stays, freed)

    def rewrite(self, graph: Graph, match: Merge) -> str:
        first, second, stays = match.pair.first, match.pair.second, match.stays
        names = graph.describe(first), graph.describe(second)
        graph.set_constants(stays, **match.arrays)
        if stays is first:
            graph.replace(second, by=first.output)
        else:
            graph.set_input(second, first.input)
        kept, gone = names if stays is first else names[::-1]
        return f"{gone} is part of {kept}, with {match.saved:,} numbers less"


def _first(graph: Graph, op: LinearOperator) -> Conv | Linear | None:
    """The operator whose output `op` reads; None where it is of another kind, or runs at another time."""
    first = graph.op_producing(op.input)
    if not isinstance(first, Conv | Linear) or type(first) is not type(op):
        return None
    is_read_here = any(reader.op is not None and reader.op.node is op.node for reader in graph.readers(first.output))
    return first if is_read_here else None


def _pair(graph: Graph, first: Conv | Linear, second: Conv | Linear) -> Pair | Missed:
    if isinstance(second, Linear) and second.in_axis != -1:
        return Missed("axis-mismatch", f"{graph.describe(second)} sums over the first axis")
    factors = []
    for op in (first, second):
        constants = constants_of(graph, op)
        if isinstance(constants, Missed):
            return constants
        if constants.bias.ndim != 1:
            return Missed("shape-mismatch", f"the bias of {graph.describe(op)} differs from row to row")
        factors.append(Factor(constants, layout_of(op)))
    a, b = factors
    if a.outputs != b.inputs or a.constants.weight.dtype != b.constants.weight.dtype:
        return Missed("shape-mismatch", f"{graph.describe(second)} reads something else than is made")
    return Pair(first, second, a, b)


def _which_stays(graph: Graph, pair: Pair) -> Conv | Linear | Missed:
    """The one that has the kernel; the product has its groups, so those of the other one must lie inside them."""
    first, second, a, b = pair.first, pair.second, pair.a, pair.b
    if not _is_pointwise(first, a) and not _is_pointwise(second, b):
        return Missed("geometry", f"neither {graph.describe(first)} nor {graph.describe(second)} is pointwise")
    if _is_pointwise(second, b) and b.groups % a.groups == 0:
        return first
    if not _is_pointwise(first, a) or a.groups % b.groups:
        return Missed("grows", f"of {a.groups} and of {b.groups} groups: their product is denser than both")
    if a.constants.bias.any() and _pads(second):
        names = graph.describe(first), graph.describe(second)
        return Missed("padding", f"{names[1]} pads with zeros, where {names[0]} would make its bias of them")
    return second if graph.is_stable(first.input) else written(graph, first.input)


def _is_pointwise(op: Conv | Linear, factor: Factor) -> bool:
    """Whether each output position is made of the input at that very position."""
    return isinstance(op, Linear) or (set(factor.kernel) | set(op.strides) <= {1} and not _pads(op))


def _pads(op: Conv | Linear) -> bool:
    """Whether a window may lie beside the input; that of a transposed convolution always does."""
    return isinstance(op, Conv) and (op.transposed or op.padding is None or any(map(any, op.padding)))


def _grows(pair: Pair, stays: Conv | Linear, freed: int) -> Missed | None:
    """Nothing is paid for one operator less: neither numbers nor multiplications."""
    a, b = pair.a, pair.b
    host, guest = (a, b) if stays is pair.first else (b, a)
    weight = b.outputs * a.inputs // host.groups * math.prod(host.kernel)
    has_bias = stays.bias is not None or a.constants.bias.any() or b.constants.bias.any()
    stored = weight + (b.outputs if has_bias else 0)
    if stored > freed:
        return Missed("grows", f"one operator would store {stored:,} numbers in the place of {freed:,}")
    # For each position that the one that stays works on; the other one works on as many or more, or may not.
    multiplied = host.size + (0 if _may_work_on_more(pair, stays, host) else guest.size)
    if weight > multiplied:
        return Missed("grows", f"one operator would multiply {weight:,} times in the place of {multiplied:,}")
    return None


def _may_work_on_more(pair: Pair, stays: Conv | Linear, host: Factor) -> bool:
    """Whether the one that stays may work on more positions than the pointwise one.

    A convolution works on the positions of its output, a transposed one on those of its input.  On the other side of
    it there are fewer only where more is padded, or cropped, than the window is wide.
    """
    if isinstance(stays, Linear) or (stays is pair.first) != stays.transposed:
        return False
    if stays.padding is None:
        return True
    windows = zip(stays.padding, stays.dilations, host.kernel, strict=True)
    return any(sum(pads) > step * (size - 1) for pads, step, size in windows)


def _merged(graph: Graph, pair: Pair, stays: Conv | Linear, freed: int) -> Merge | Missed:
    into = into_first if stays is pair.first else into_second
    new = into(pair.a, pair.b)
    if not (algebra.is_finite(new.weight) and algebra.is_finite(new.bias)):
        return Missed("not-finite", f"the product is not finite in {new.weight.dtype}")
    product = Factor(Constants(new.weight, new.bias.astype(np.float64)), layout_of(stays))
    if not agree(pair.a, pair.b, product):
        return Missed("unsound", "the product does not do what the two operators did, on a test input")
    arrays = {"weight": new.weight}
    if stays.bias is not None or new.bias.any():
        arrays["bias"] = new.bias
    return Merge(pair, stays, arrays, freed - sum(array.size for array in arrays.values()))
