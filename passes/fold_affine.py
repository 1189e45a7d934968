"""Fold arithmetic with constants into the linear operators around it.

    y = (W x + b) * s + t         =>   y = (s W) x + (s b + t)       into what produces the operand, or
    y = W (x * s + t) + b         =>   y = (W s) x + (W t + b)       into all that read the result

One operation at a time: x * c, x + c, x - c, c - x or x / c, where c is one number or has one for each channel.
So decomposed and frozen BatchNorms, LayerScale, the scale of a decomposed RMSNorm and (x - mean) / std in front of
a network go step by step.  The axis of c comes from right-aligned broadcasting.

Refusals:
    not-affine       a constant is divided by the operand, or the numbers are not real
    not-per-channel  the constant varies along more than one axis
    broadcasts       the result is larger than the operand, or may be
    overridable, quantized, no-linear, shared-output, axis-mismatch, rank, padding, written, grows,
    not-monotone, shape-mismatch, not-finite, shared-weights, unsound: as for fold-batch-norm
"""

from __future__ import annotations

from dataclasses import dataclass

from fuser.absorb import Absorption, Walker
from fuser.graph import Dim, Graph
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
        return absorption if isinstance(absorption, Missed) else Folding(op, found.operand, absorption)

    def rewrite(self, graph: Graph, match: Folding) -> str:
        done = match.absorption.apply(graph)
        graph.replace(match.op, by=match.operand)
        return done


def _size(graph: Graph, found: AffineOp) -> Dim:
    """How large the operand is along the axis of the map; one number fits any size."""
    axis, shape = found.map.axis, graph.shape(found.operand)
    if axis is None:
        return found.map.affine.channels
    return None if shape is None else shape[axis]
