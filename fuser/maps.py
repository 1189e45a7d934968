"""Which ops are affine maps of one operand, and along which axis: read once, for every pass that asks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fuser.affine import ChannelAffine, leaves_no_fraction
from fuser.graph import Array, Graph
from fuser.ops import (
    AveragePool,
    BatchNorm,
    Concat,
    Conv,
    Elementwise,
    Linear,
    MaxPool,
    Normalization,
    Resize,
    Value,
)
from fuser.remarks import GIVE_SHAPES, Missed


@dataclass(frozen=True, eq=False)
class Map:
    """An affine map of a value along `axis`; None for a scalar, which is the same along every axis.

    axis: -1 where only that is known: it is the last one.
    """

    affine: ChannelAffine
    axis: int | None

    def along(self, axis: int, affine: ChannelAffine | None = None) -> Map:
        return Map(affine or self.affine, None if self.axis is None else axis)

    def then(self, outer: Map) -> Map | None:
        """x -> outer(self(x)); None where the two work along different axes."""
        axis = outer.axis if self.axis is None else self.axis
        channels = max(self.affine.channels, outer.affine.channels)
        sizes = {self.affine.channels, outer.affine.channels, 1} - {channels}
        if outer.axis not in (None, axis) or sizes - {1}:
            return None
        return Map(self.affine.sized(channels).then(outer.affine.sized(channels)), axis)


IDENTITY = Map(ChannelAffine.identity(1), None)


@dataclass(frozen=True, eq=False)
class AffineOp:
    """y = map(operand)."""

    operand: Value
    map: Map


def affine_op(graph: Graph, op: BatchNorm | Elementwise) -> AffineOp | Missed:
    """What the op does to its operand, if that is an affine map whose numbers are known."""
    return _batch_norm(graph, op) if isinstance(op, BatchNorm) else _arithmetic(graph, op)


def _batch_norm(graph: Graph, op: BatchNorm) -> AffineOp | Missed:
    if op.training:
        return Missed(
            "training-mode",
            "it normalizes with the statistics of the batch",
            "put the model in eval mode before it is exported",
        )
    if not op.per_channel:
        return Missed("not-per-channel", "it keeps statistics for each element (spatial=0)")
    parameters: dict[str, Array | None] = {}
    for field in ("scale", "bias", "mean", "var"):
        value = getattr(op, field)
        found = None if value is None else graph.constant(value)
        if isinstance(found, Missed):
            return Missed(found.code, f"its {field}: {found.reason}", found.remedy)
        parameters[field] = found
    mean, var = parameters["mean"], parameters["var"]
    if mean is None or var is None:
        return Missed("training-mode", "it has no running statistics, so it normalizes with those of the batch")
    shapes = {p.shape for p in parameters.values() if p is not None}
    if len(shapes) != 1 or mean.ndim != 1:
        return Missed("shape-mismatch", f"its parameters have the shapes {', '.join(map(str, sorted(shapes)))}")
    if op.epsilon is None:
        return Missed("not-constant", "its epsilon is decided by the caller of the function that it is in")
    affine = ChannelAffine.from_batch_norm(parameters["scale"], parameters["bias"], mean, var, op.epsilon)
    if not affine.is_finite:
        channel = int(np.flatnonzero(~(np.isfinite(affine.scale) & np.isfinite(affine.shift)))[0])
        numbers = {field: float(array[channel]) for field, array in parameters.items() if array is not None}
        named = [f"{field} {number:g}" for field, number in numbers.items() if not np.isfinite(number)]
        named = named or [f"variance {numbers['var']:g} with epsilon {op.epsilon:g}"]
        return Missed("not-finite", f"channel {channel} has {', '.join(named)}")
    return AffineOp(op.input, Map(affine, 1))


def _arithmetic(graph: Graph, op: Elementwise) -> AffineOp | Missed:
    left, right = graph.constant(op.left), graph.constant(op.right)
    if isinstance(right, Missed):
        operand, constant, reverse = op.right, left, True
    else:
        operand, constant, reverse = op.left, right, False
    if isinstance(constant, Missed):
        # One that the caller may replace says more than one that is simply computed.
        return constant if constant.code != "not-constant" or not isinstance(right, Missed) else right
    affine = _affine(op.function, constant, reverse)
    if isinstance(affine, Missed):
        return affine
    axis = _axis(graph, op, operand, constant)
    if isinstance(axis, Missed):
        return axis
    if leaves_no_fraction(affine.shift, constant.dtype):
        largest = np.abs(affine.shift).max()
        return Missed("rounds", f"a sum with {largest:g} is rounded to a whole number, and may be there for that")
    return AffineOp(operand, Map(affine, axis))


def _has_axes(graph: Graph, op: Elementwise, operand: Value) -> bool:
    """Whether the operand is sure to be no scalar, which a constant with one axis would make something else of."""
    rank = graph.rank(operand)
    if rank is not None:
        return rank > 0
    if isinstance(graph.op_producing(operand), (*_IMAGES, Linear, Normalization, Concat)):
        return True
    return any(isinstance(reader.op, _IMAGES) for reader in graph.readers(op.output))


_IMAGES = (Conv, BatchNorm, AveragePool, MaxPool, Resize)
"""What takes, and makes, values of two axes and more."""


def _affine(function: str, constant: Array, reverse: bool) -> ChannelAffine | Missed:
    """x -> x `function` constant, or the other way round; one map for each element of the constant."""
    if constant.dtype.kind in "biuc":
        return Missed("not-affine", "it is not arithmetic of real numbers")
    c = constant.astype(np.float64).reshape(-1)
    one, zero = np.ones_like(c), np.zeros_like(c)
    with np.errstate(divide="ignore"):
        match function, reverse:
            case "+", _:
                affine = ChannelAffine(one, c)
            case "-", False:
                affine = ChannelAffine(one, -c)
            case "-", True:
                affine = ChannelAffine(-one, c)
            case "*", _:
                affine = ChannelAffine(c, zero)
            case "/", False:
                affine = ChannelAffine(1 / c, zero)
            case _:
                return Missed("not-affine", "a constant is divided by the operand")
    return affine if affine.is_finite else Missed("not-finite", "the constant is not finite, or divides by zero")


def _axis(graph: Graph, op: Elementwise, operand: Value, constant: Array) -> int | Missed | None:
    """The axis of the operand along which the constant varies; None for a single number.

    Broadcasting aligns axes from the right, whatever their sizes are.
    """
    wide = [axis for axis, size in enumerate(constant.shape) if size != 1]
    if not wide and (constant.ndim == 0 or (constant.ndim == 1 and _has_axes(graph, op, operand))):
        return None
    rank = graph.rank(operand)
    if rank is None:
        return Missed(
            "rank",
            f"how many axes {graph.describe(operand)} has is not known, so neither is the axis of the constant",
            GIVE_SHAPES,
        )
    if constant.ndim > rank:
        return Missed("broadcasts", f"the constant has {constant.ndim} axes, and {graph.describe(operand)} has {rank}")
    if len(wide) > 1:
        return Missed("not-per-channel", f"the constant varies along {len(wide)} axes: its shape is {constant.shape}")
    return wide[0] - constant.ndim + rank if wide else None
