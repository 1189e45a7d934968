"""Who can take a per-channel affine map: legality, once for all graphs.

`into_producer` walks back from a value to the linear operators that make it; `into_readers` walks forward to
those that read it.  Both end in an `Absorption`, a plan of new constants, or in the `Missed` that says what
stood in the way.  Neither edits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuser import affine as algebra
from fuser.affine import ChannelAffine, WeightLayout
from fuser.graph import Array, Dim, Graph
from fuser.ops import (
    AveragePool,
    Concat,
    Conv,
    Dequantize,
    Elementwise,
    Identity,
    Linear,
    Op,
    Reshape,
    Transpose,
    Value,
)
from fuser.remarks import Missed
from fuser.rewrite import HOOKED

MAX_BRANCHES = 64
"""How deep sums and concatenations may nest before the walk gives up."""


@dataclass(frozen=True, eq=False)
class Map:
    """An affine map of a value along `axis`; None for a scalar, which is the same along every axis."""

    affine: ChannelAffine
    axis: int | None

    def along(self, axis: int, affine: ChannelAffine | None = None) -> Map:
        return Map(affine or self.affine, None if self.axis is None else axis)


@dataclass(frozen=True, eq=False)
class Edit:
    """New constants for one op."""

    op: Op
    arrays: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Absorption:
    """A plan: what `apply` sets, and where the map went, for a person."""

    edits: tuple[Edit, ...]
    where: str

    def apply(self, graph: Graph) -> str:
        """Set the new constants; returns what was done."""
        for edit in self.edits:
            graph.set_constants(edit.op, **edit.arrays)
        return self.where


@dataclass(frozen=True)
class Walker:
    """One walk over `graph`.

    shared_weights: "copy" gives this call site its own copy of a weight that others read, "refuse" declines.
    """

    graph: Graph
    shared_weights: str = "copy"

    def into_producer(self, value: Value, affine: ChannelAffine, axis: int | None) -> Absorption | Missed:
        """Absorb `affine`, along `axis` of `value`, into what produces the value.

        Legal when every value on the way is read once, and the linear operators' constants are known.
        """
        edits = self._back(value, Map(affine, axis), 0)
        return edits if isinstance(edits, Missed) else self._absorption(edits)

    def into_readers(self, value: Value, affine: ChannelAffine, axis: int | None) -> Absorption | Missed:
        """Absorb `affine`, along `axis` of `value`, into everything that reads the value's mapped version.

        `value` is the output of the op that applies the map.  Legal when every reader can take it.
        """
        edits = self._forth(value, Map(affine, axis), 0)
        return edits if isinstance(edits, Missed) else self._absorption(edits)

    def _absorption(self, edits: list[Edit]) -> Absorption | Missed:
        notes = []
        for edit in edits:
            for field in ("weight", "scale"):
                value = getattr(edit.op, field, None)
                if field not in edit.arrays or value is None or len(self.graph.readers(value)) < 2:
                    continue
                if self.shared_weights == "refuse":
                    return Missed(
                        "shared-weights",
                        f"the weight of {self.graph.describe(edit.op)} has other readers",
                        "--shared-weights=copy gives this layer its own copy",
                    )
                notes.append(f" (its own copy of a shared weight: {edit.arrays[field].nbytes:,} bytes)")
        names = ", ".join(self.graph.describe(edit.op) for edit in edits)
        return Absorption(tuple(edits), f"into {names}{''.join(notes)}")

    # -- backward

    def _back(self, value: Value, m: Map, depth: int) -> list[Edit] | Missed:
        while True:
            op = self.graph.op_producing(value)
            if op is None or depth > MAX_BRANCHES:
                return Missed("no-linear", f"{self.graph.describe(value)} is not made by a linear operator")
            readers = self.graph.readers(value)
            if len(readers) > 1:
                names = ", ".join(dict.fromkeys(reader.name for reader in readers))
                return Missed("shared-output", f"{self.graph.describe(value)} is read by more than this: {names}")
            if op.hooked:
                return HOOKED
            match op:
                case Conv():
                    return self._conv_after(op, m)
                case Linear():
                    return self._linear_after(op, m)
                case Concat():
                    return self._concat_after(op, m, depth)
                case Elementwise(function="+" | "-"):
                    return self._sum_after(op, m, depth)
            moved = self._before(op, m)
            if isinstance(moved, Missed):
                return moved
            value, m = op.input, moved  # type: ignore[attr-defined]

    def _before(self, op: Op, m: Map) -> Map | Missed:
        """The map on the input of an op that a map commutes with."""
        match op:
            case Identity():
                return m
            case Transpose():
                return m if m.axis is None else m.along(op.permutation[m.axis])
            case AveragePool(pads_counted=counted):
                if m.axis not in (None, 1):
                    return Missed("axis-mismatch", f"{self.graph.describe(op)} averages over axis {m.axis}")
                if counted and m.affine.shift.any():
                    return Missed("padding", f"{self.graph.describe(op)} averages over padding zeros, too")
                return m
            case Reshape():
                return self._through_reshape(op, self.graph.shape(op.output), self.graph.shape(op.input), m)
        return Missed("no-linear", f"{self.graph.describe(op)}, which feeds it, is not a linear operator")

    def _concat_after(self, op: Concat, m: Map, depth: int) -> list[Edit] | Missed:
        if m.axis is None or m.axis != op.axis:
            parts = [m.affine] * len(op.inputs)
        else:
            sizes = [self._size(value, op.axis) for value in op.inputs]
            if not all(isinstance(size, int) for size in sizes):
                return Missed("axis-mismatch", f"the sizes that {self.graph.describe(op)} joins are not known")
            if sum(sizes) != m.affine.channels:  # type: ignore[arg-type]
                return _misfit(self.graph.describe(op), sum(sizes), m.affine)  # type: ignore[arg-type]
            parts = m.affine.split(sizes)  # type: ignore[arg-type]
        return self._all_back([(v, replace(m, affine=a)) for v, a in zip(op.inputs, parts, strict=True)], depth)

    def _sum_after(self, op: Elementwise, m: Map, depth: int) -> list[Edit] | Missed:
        left, right = self.graph.shape(op.left), self.graph.shape(op.right)
        if left is None or left != right or None in left:
            return Missed("no-linear", f"{self.graph.describe(op)}, which feeds it, is not a sum of equal shapes")
        return self._all_back([(op.left, m), (op.right, replace(m, affine=m.affine.scale_only()))], depth)

    def _all_back(self, branches: Sequence[tuple[Value, Map]], depth: int) -> list[Edit] | Missed:
        edits: list[Edit] = []
        for value, m in branches:
            found = self._back(value, m, depth + 1)
            if isinstance(found, Missed):
                return found
            edits += found
        return edits

    def _conv_after(self, op: Conv, m: Map) -> list[Edit] | Missed:
        name = self.graph.describe(op)
        if m.axis not in (None, 1):
            return Missed("axis-mismatch", f"it works along axis {m.axis}, but the channels of {name} are on axis 1")
        if (refused := self._unbatched(op)) is not None:
            return refused
        return self._after(op, m.affine, WeightLayout(op.transposed, op.groups))

    def _linear_after(self, op: Linear, m: Map) -> list[Edit] | Missed:
        name = self.graph.describe(op)
        if m.axis is not None:
            rank = self.graph.rank(op.output)
            if rank is None:
                return _unknown_rank(name)
            if m.axis != rank - 1:
                return Missed(
                    "axis-mismatch",
                    f"it works along axis {m.axis}, but the features of {name} are on axis {rank - 1}",
                )
        return self._after(op, m.affine, WeightLayout(transposed=op.out_axis == 1))

    # -- forward

    def _forth(self, value: Value, m: Map, depth: int) -> list[Edit] | Missed:
        readers = self.graph.readers(value)
        if not readers or depth > MAX_BRANCHES:
            return Missed("no-linear", f"nothing reads {self.graph.describe(value)} that could take it")
        edits: list[Edit] = []
        for reader in readers:
            found = self._into_reader(value, reader.name, reader.op, m, depth)
            if isinstance(found, Missed):
                return found
            edits += found
        if len({id(edit.op.node) for edit in edits}) < len(edits):
            return Missed("no-linear", f"one reader of {self.graph.describe(value)} takes it twice")
        return edits

    def _into_reader(self, value: Value, name: str, op: Op | None, m: Map, depth: int) -> list[Edit] | Missed:
        if op is None or getattr(op, "input", None) is not value:
            return Missed("no-linear", f"{name}, which reads it, cannot take it")
        if op.hooked:
            return HOOKED
        match op:
            case Conv():
                return self._conv_before(op, m)
            case Linear():
                return self._linear_before(op, m)
        moved = self._behind(op, m)
        return moved if isinstance(moved, Missed) else self._forth(op.output, moved, depth + 1)

    def _behind(self, op: Op, m: Map) -> Map | Missed:
        """The map on the output of an op that a map commutes with."""
        match op:
            case Identity():
                return m
            case Transpose():
                return m if m.axis is None else m.along(op.permutation.index(m.axis))
            case AveragePool():
                return self._before(op, m)  # the channels stay where they are
            case Reshape():
                return self._through_reshape(op, self.graph.shape(op.input), self.graph.shape(op.output), m)
        return Missed("no-linear", f"{self.graph.describe(op)}, which reads it, cannot take it")

    def _conv_before(self, op: Conv, m: Map) -> list[Edit] | Missed:
        name = self.graph.describe(op)
        if m.axis not in (None, 1):
            return Missed("axis-mismatch", f"it works along axis {m.axis}, but {name} reads its channels on axis 1")
        if (refused := self._unbatched(op)) is not None:
            return refused
        padded = op.transposed or op.padding is None or any(side for pads in op.padding for side in pads)
        if padded and m.affine.shift.any():
            return Missed(
                "padding",
                f"{name}, which reads it, pads with zeros, and a shift does not commute with that",
                "move the padding before the normalization, or retrain with the normalization after the convolution",
            )
        return self._ahead(op, m.affine, WeightLayout(op.transposed, op.groups))

    def _linear_before(self, op: Linear, m: Map) -> list[Edit] | Missed:
        if m.axis is not None:
            rank = self.graph.rank(op.input)
            if rank is None:
                return _unknown_rank(self.graph.describe(op))
            if m.axis != op.in_axis % rank:
                name = self.graph.describe(op)
                return Missed("axis-mismatch", f"it works along axis {m.axis}, but {name} sums over another axis")
        return self._ahead(op, m.affine, WeightLayout(transposed=op.out_axis == 1))

    # -- the constants

    def _after(self, op: Conv | Linear, affine: ChannelAffine, layout: WeightLayout) -> list[Edit] | Missed:
        """s * (W x + b) + t = (s W) x + (s b + t)."""
        if isinstance(producer := self.graph.op_producing(op.weight), Dequantize):
            return self._dequantized_after(op, producer, affine, layout)
        operands = self._operands(op, layout)
        if isinstance(operands, Missed):
            return operands
        weight, bias, alpha = operands
        if affine.channels not in (1, layout.outputs(weight.shape)):
            return _misfit(self.graph.describe(op), layout.outputs(weight.shape), affine)
        affine = affine.sized(layout.outputs(weight.shape))
        factor = layout.along_outputs(affine.scale * alpha, weight.shape)
        return self._edit(op, weight, bias, factor, bias * affine.scale + affine.shift)

    def _ahead(self, op: Conv | Linear, affine: ChannelAffine, layout: WeightLayout) -> list[Edit] | Missed:
        """W (s x + t) + b = (W s) x + (W t + b)."""
        operands = self._operands(op, layout)
        if isinstance(operands, Missed):
            return operands
        weight, bias, alpha = operands
        if affine.channels not in (1, layout.inputs(weight.shape)):
            return _misfit(self.graph.describe(op), layout.inputs(weight.shape), affine)
        affine = affine.sized(layout.inputs(weight.shape))
        factor = layout.along_inputs(affine.scale * alpha, weight.shape)
        if not affine.shift.any():
            return self._edit(op, weight, bias, factor, bias)
        return self._edit(op, weight, bias, factor, bias + alpha * algebra.carried(weight, affine.shift, layout))

    def _operands(self, op: Conv | Linear, layout: WeightLayout) -> tuple[Array, Array, float] | Missed:
        """(weight, bias in float64 [Cout] or [M, Cout], alpha); the bias as it is added, zeros where there is none."""
        weight = self.graph.constant(op.weight)
        if isinstance(weight, Missed):
            return weight
        alpha, beta = (op.alpha, op.beta) if isinstance(op, Linear) else (1.0, 1.0)
        outputs = layout.outputs(weight.shape)
        if op.bias is None or beta == 0:
            return weight, np.zeros(outputs), alpha
        bias = self.graph.constant(op.bias)
        if isinstance(bias, Missed):
            return bias
        if bias.ndim and bias.shape[-1] not in (1, outputs):
            return Missed("shape-mismatch", f"the bias of {self.graph.describe(op)} has the shape {bias.shape}")
        wide = np.broadcast_to(bias.astype(np.float64) * beta, (*bias.shape[:-1], outputs))
        return weight, wide.reshape(-1) if wide.size == outputs else wide, alpha

    def _edit(
        self, op: Conv | Linear, weight: Array, bias: Array, factor: Array, new_bias: Array
    ) -> list[Edit] | Missed:
        name = self.graph.describe(op)
        new_weight = algebra.scaled(weight, factor, weight.dtype)
        new_bias = algebra.rounded(new_bias, weight.dtype)
        if not (algebra.is_finite(new_weight) and algebra.is_finite(new_bias)):
            return Missed(
                "not-finite",
                f"the new constants of {name} would not be finite in {weight.dtype}",
                "look for a variance of zero without epsilon, or keep this layer in a wider type",
            )
        arrays = {"weight": new_weight}
        if op.bias is not None or new_bias.any():
            arrays["bias"] = new_bias
        return [Edit(op, arrays)]

    def _dequantized_after(
        self, op: Conv | Linear, dequantize: Dequantize, affine: ChannelAffine, layout: WeightLayout
    ) -> list[Edit] | Missed:
        """The integers stay: s * ((q - z) * scale) = (q - z) * (s * scale), for one scale per output channel."""
        name = self.graph.describe(op)
        plain = not layout.transposed and layout.groups >= 1
        if not plain or dequantize.axis != 0 or len(self.graph.readers(dequantize.output)) != 1:
            return Missed(
                "quantized", f"the weight of {name} has no quantization scale of its own for each output channel"
            )
        if not (affine.scale > 0).all():
            return Missed("quantized", f"a factor for the quantization scales of {name} is not positive")
        scale = self.graph.constant(dequantize.scale)
        bias = None if op.bias is None else self.graph.constant(op.bias)
        for found in (scale, bias):
            if isinstance(found, Missed):
                return found
        assert isinstance(scale, np.ndarray)
        if affine.channels not in (1, scale.size) or (isinstance(op, Linear) and (op.alpha, op.beta) != (1, 1)):
            return _misfit(name, scale.size, affine)
        affine = affine.sized(scale.size)
        old = np.zeros(scale.size) if bias is None else np.asarray(bias, np.float64)
        new_scale = algebra.rounded(scale.astype(np.float64) * affine.scale, scale.dtype)
        new_bias = algebra.rounded(old * affine.scale + affine.shift, scale.dtype)
        if not (algebra.is_finite(new_scale) and algebra.is_finite(new_bias)) or not (new_scale > 0).all():
            return Missed("not-finite", f"the new quantization scales of {name} would leave the range of {scale.dtype}")
        return [Edit(dequantize, {"scale": new_scale}), Edit(op, {"bias": new_bias})]

    # -- shapes

    def _unbatched(self, op: Conv) -> Missed | None:
        rank, weight = self.graph.rank(op.output), self.graph.rank(op.weight)
        if rank is None or weight is None:
            return _unknown_rank(self.graph.describe(op))
        if rank != weight:
            return Missed(
                "rank", f"{self.graph.describe(op)} has input without a batch axis, so axis 1 is not its channels"
            )
        return None

    def _size(self, value: Value, axis: int) -> Dim:
        """The size along `axis`; a convolution tells that of axis 1 by its weight, even where shapes are not known."""
        shape = self.graph.shape(value)
        if shape is not None:
            return shape[axis]
        op = self.graph.op_producing(value)
        weight = self.graph.shape(op.weight) if isinstance(op, Conv) and axis == 1 else None
        if weight is None or not all(isinstance(dim, int) for dim in weight):
            return None
        assert isinstance(op, Conv)
        return WeightLayout(op.transposed, op.groups).outputs([int(dim) for dim in weight if dim is not None])

    def _through_reshape(
        self, op: Op, source: Sequence[Dim] | None, target: Sequence[Dim] | None, m: Map
    ) -> Map | Missed:
        """The map after a change of shape from `source` to `target`, where it is still one along an axis."""
        if m.axis is None:
            return m
        moved = None if source is None or target is None else moved_axis(source, target, m)
        if moved is None:
            return Missed(
                "axis-mismatch", f"after {self.graph.describe(op)} it is not known to be a map along one axis"
            )
        return moved


def moved_axis(here: Sequence[Dim], there: Sequence[Dim], m: Map) -> Map | None:
    """A map along an axis of the shape `here`, after a reshape to `there`; None where it is no map along an axis.

    Axes that stay in front or at the back are told by equal sizes; in between, the factors of all elements are laid
    out in the new shape, where they have to depend on one axis alone.
    """
    assert m.axis is not None
    if here and there and _product(here[1:]) is not None and _product(here[1:]) == _product(there[1:]):
        here, there = ("batch", *here[1:]), ("batch", *there[1:])
    front = 0
    while front < min(len(here), len(there)) and here[front] is not None and here[front] == there[front]:
        front += 1
    if m.axis < front:
        return m
    back = 0
    while (
        back < min(len(here), len(there)) - front
        and here[-1 - back] is not None
        and here[-1 - back] == there[-1 - back]
    ):
        back += 1
    if m.axis >= len(here) - back:
        # The sizes behind are the same on both sides, so whatever is in front of them is, too.
        return m.along(m.axis - len(here) + len(there))
    old, new = here[front : len(here) - back], there[front : len(there) - back]
    size = _product(old)
    if size is None or size != _product(new) or size == 0:
        return None
    affine = m.affine.sized(int(old[m.axis - front]))  # type: ignore[arg-type]
    values = [
        np.broadcast_to(v.reshape(-1, *[1] * (len(old) - (m.axis - front) - 1)), old).reshape(new)  # type: ignore[arg-type]
        for v in (affine.scale, affine.shift)
    ]
    for axis in range(len(new)):
        along = tuple(slice(None) if i == axis else slice(0, 1) for i in range(len(new)))
        if all((v == v[along]).all() for v in values):
            scale, shift = (v[along].reshape(-1) for v in values)
            return m.along(front + axis, ChannelAffine(scale, shift))
    return None


def _product(shape: Sequence[Dim]) -> int | None:
    return math.prod(shape) if all(isinstance(dim, int) for dim in shape) else None  # type: ignore[arg-type]


def _unknown_rank(name: str) -> Missed:
    return Missed(
        "rank",
        f"how many axes {name} works on is not known, and it takes input with and without a batch axis",
        "give example_inputs, or a model with shapes",
    )


def _misfit(name: str, channels: int, affine: ChannelAffine) -> Missed:
    return Missed("shape-mismatch", f"{name} has {channels} channels there, and the map {affine.channels}")
