"""Fold the scale and shift of a LayerNorm, RMSNorm or GroupNorm into all linear operators that read it.

    y = W (g n + b) + c   =>   y = (W g) n + (W b + c)       n is the normalized input

The normalization stays, without the operands that it no longer needs.  ONNX has no LayerNormalization without a
scale, so there only the shift moves and the weights stay as they are.  Of a decomposed normalization the
multiplication and the addition are left to fold-affine.

Refusals:
    no-linear       something else reads it, too, such as the sum around a residual branch
    grows           the readers would have to store more than the normalization frees: a copy of a tied weight, or a
                    bias for a matrix product that has none
    type, not-constant, overridable, axis-mismatch, rank, padding, written, shape-mismatch, not-finite, quantized,
    hooks, body, shared-weights, unsound: as for fold-batch-norm
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fuser.absorb import Absorption, Walker
from fuser.affine import ChannelAffine
from fuser.graph import Array, Graph
from fuser.maps import Map
from fuser.ops import Linear, Normalization
from fuser.remarks import Missed
from fuser.rewrite import RewritePass


@dataclass(frozen=True, eq=False)
class Folding:
    """The fields of `op` that go, and where they move."""

    op: Normalization
    fields: tuple[str, ...]
    absorption: Absorption


@dataclass(frozen=True)
class FoldLayerNorm(RewritePass[Normalization, Folding]):
    """shared_weights: "copy" lets a layer have its own copy of a shared weight where that is no larger than what the
    normalization frees, "refuse" leaves it alone."""

    shared_weights: str = "copy"

    name, root = "fold-layer-norm", Normalization

    def concerns(self, graph: Graph, op: Normalization) -> bool:
        """Whether the operator has an operand that it can do without."""
        return bool(_optional(op))

    def match(self, graph: Graph, op: Normalization) -> Folding | Missed:
        fields = _optional(op)
        affine = _affine(graph, op, fields)
        if isinstance(affine, Missed):
            return affine
        if (affine.scale == 1).all() and not affine.shift.any():
            return Folding(op, fields, Absorption((), "nowhere: it does nothing"))
        found = Walker(graph, self.shared_weights).into_readers(op.output, op.output, Map(affine, op.axis))
        if isinstance(found, Missed):
            return found
        return _growth(graph, op, fields, found) or Folding(op, fields, found)

    def rewrite(self, graph: Graph, match: Folding) -> str:
        done = match.absorption.apply(graph)
        graph.set_constants(match.op, **dict.fromkeys(match.fields))
        return f"{' and '.join(match.fields)} {done}"


def _optional(op: Normalization) -> tuple[str, ...]:
    """The operands that the operator has and can do without."""
    fields = ("bias",) if op.keeps_scale else ("scale", "bias")
    return tuple(field for field in fields if getattr(op, field) is not None)


def _affine(graph: Graph, op: Normalization, fields: tuple[str, ...]) -> ChannelAffine | Missed:
    """What the operands do to the normalized values; a scale that stays counts as part of the normalization."""
    values: dict[str, Array] = {}
    for field in fields:
        found = graph.constant(getattr(op, field))
        if isinstance(found, Missed):
            return found
        values[field] = found.astype(np.float64)
    shapes = {value.shape for value in values.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1:
        return Missed("shape-mismatch", "its scale and bias are not one number for each channel")
    return ChannelAffine(values.get("scale", np.ones(shape)), values.get("bias", np.zeros(shape)))


def _growth(graph: Graph, op: Normalization, fields: tuple[str, ...], absorption: Absorption) -> Missed | None:
    """No operator goes, so nothing may be paid for it: neither an addition nor a larger model."""
    stored = 0
    for edit in absorption.edits:
        if isinstance(edit.op, Linear) and edit.op.bias is None and "bias" in edit.arrays:
            return Missed("grows", f"{graph.describe(edit.op)} has no bias, and would need one")
        for field, array in edit.arrays.items():
            old = getattr(edit.op, field)
            stored += array.size - (0 if old is None else graph.freed(old))
    freed = sum(graph.freed(getattr(op, field)) for field in fields)
    if stored > freed:
        return Missed("grows", f"its readers would store {stored:,} numbers more, in the place of {freed:,}")
    return None
