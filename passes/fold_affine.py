"""Fold arithmetic with constants into the linear operators around it.

    y = (W x + b) * s + t         =>   y = (s W) x + (s b + t)       into what produces the operand, or
    y = W (x * s + t) + b         =>   y = (W s) x + (W t + b)       into all that read the result, or
    y = (x * a) * b               =>   y = x * (a b)                 into the arithmetic before it, as (x + a) + b

One operation at a time: x * c, x + c, x - c, c - x or x / c, where c is one number or has one for each channel.
So decomposed and frozen BatchNorms, LayerScale, the scale of a decomposed RMSNorm and (x - mean) / std in front of
a network go step by step.  The axis of c comes from right-aligned broadcasting.

Refusals:
    not-affine       a constant is divided by the operand, or the numbers are not real
    not-per-channel  the constant varies along more than one axis
    broadcasts       the result is larger than the operand, or may be
    rounds           the number added is so large that its type has no digits behind the point: x + 1.5e7 - 1.5e7 rounds
    type, overridable, quantized, no-linear, shared-output, axis-mismatch, rank, padding, written, grows,
    not-monotone, shape-mismatch, not-finite, shared-weights, unsound: as for fold-batch-norm
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fuser.absorb import Absorption, Edit, Walker, element_readers
from fuser.affine import ChannelAffine, is_normal, rounded
from fuser.graph import Array, Dim, Graph
from fuser.maps import AffineOp, affine_op
from fuser.ops import Elementwise, Value
from fuser.remarks import GIVE_SHAPES, Missed
from fuser.rewrite import RewritePass


@dataclass(frozen=True, eq=False)
class Folding:
    """The arithmetic that goes, its operand, and where it moves."""

    op: Elementwise
    operand: Value
    absorption: Absorption


@dataclass(frozen=True)
class FoldAffine(RewritePass[Elementwise, Folding]):
    """shared_weights: "copy" gives a layer its own copy of a weight that others read, "refuse" leaves it alone."""

    shared_weights: str = "copy"

    name, root = "fold-affine", Elementwise

    def concerns(self, graph: Graph, op: Elementwise) -> bool:
        """Whether an operand is a constant, or would be if the caller could not replace it."""
        found = (graph.constant(operand) for operand in (op.left, op.right))
        return any(not isinstance(x, Missed) or x.code != "not-constant" for x in found)

    def match(self, graph: Graph, op: Elementwise) -> Folding | Missed:
        found = affine_op(graph, op)
        if isinstance(found, Missed):
            return found
        size = _size(graph, found)
        name = graph.describe(found.operand)
        if isinstance(size, int) and size != found.map.affine.channels:
            return Missed("broadcasts", f"{name} is not as large as the result")
        enlarged = (
            None
            if isinstance(size, int)
            else Missed("broadcasts", f"{name} may be smaller than the result", GIVE_SHAPES)
        )
        absorption = Walker(graph, self.shared_weights).around(found.operand, op.output, found.map, enlarged)
        if isinstance(absorption, Missed):
            absorption = _into_arithmetic(graph, op, found) or absorption
        return absorption if isinstance(absorption, Missed) else Folding(op, found.operand, absorption)

    def rewrite(self, graph: Graph, match: Folding) -> str:
        done = match.absorption.apply(graph)
        graph.replace(match.op, by=match.operand)
        return done


def _into_arithmetic(graph: Graph, op: Elementwise, found: AffineOp) -> Absorption | None:
    """The constant of the arithmetic that makes the operand, if it can do the work of both: factors, or summands."""
    inner = graph.op_producing(found.operand)
    if not isinstance(inner, Elementwise) or inner.hooked or len(element_readers(graph, inner.output)) != 1:
        return None
    outer_field, inner_field = _constant_field(graph, op), _constant_field(graph, inner)
    if outer_field is None or inner_field is None or not graph.is_stable(found.operand):
        return None
    a, b = graph.constant(getattr(inner, inner_field)), graph.constant(getattr(op, outer_field))
    assert not isinstance(a, Missed) and not isinstance(b, Missed)
    if a.dtype != b.dtype:  # one number does not decide the type of a product on torch, several do
        return None
    both = _both(inner, inner_field, a, found.map.affine, b)
    if both is None or both.size > max(a.size, b.size) or both.ndim > (graph.rank(found.operand) or a.ndim):
        return None
    return Absorption((Edit(inner, {inner_field: both}),), f"into {graph.describe(inner)}")


def _constant_field(graph: Graph, op: Elementwise) -> str | None:
    """Which operand is the constant."""
    known = [field for field in ("left", "right") if not isinstance(graph.constant(getattr(op, field)), Missed)]
    return known[0] if len(known) == 1 else None


def _both(inner: Elementwise, field: str, a: Array, outer: ChannelAffine, b: Array) -> Array | None:
    """The constant of `inner` that does what the map `outer`, with the constant `b`, did behind it."""
    scale, shift = (np.asarray(v).reshape(b.shape) for v in (outer.scale, outer.shift))
    wide = a.astype(np.float64)
    if inner.function in "+-" and (scale == 1).all():
        both = wide - shift if (inner.function, field) == ("-", "right") else wide + shift
    elif inner.function in "*/" and scale.all() and not shift.any():
        both = wide * scale if inner.function == "*" or field == "left" else wide / scale
    else:
        return None
    found = rounded(both, a.dtype)
    return found if is_normal(found) and found[both != 0].all() else None


def _size(graph: Graph, found: AffineOp) -> Dim:
    """How large the operand is along the axis of the map; one number fits any size."""
    axis, shape = found.map.axis, graph.shape(found.operand)
    if axis is None:
        return found.map.affine.channels
    return None if shape is None else shape[axis]
