"""Who can take a per-channel affine map: legality, once for all graphs.

`into_producer` walks back from a value to the linear operators that make it; `into_readers` walks forward to
those that read it.  Both end in an `Absorption`, a plan of new constants, or in the `Missed` that says what
stood in the way.  Neither edits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from fuser import affine as algebra
from fuser.affine import ChannelAffine, Constants, NewConstants, Scaled, WeightLayout
from fuser.graph import Array, Dim, Graph, Reader
from fuser.maps import Map
from fuser.ops import (
    Arithmetic,
    AveragePool,
    Concat,
    Conv,
    Dequantize,
    Identity,
    Linear,
    MaxPool,
    Op,
    Pad,
    Reduction,
    Reshape,
    Resize,
    Slice,
    Transpose,
    Value,
)
from fuser.remarks import GIVE_SHAPES, Missed
from fuser.rewrite import HOOKED

MAX_BRANCHES = 64
"""How deep sums and concatenations may nest before the walk gives up."""

MAX_NAMES = 8
"""How many readers a remark names: thousands of remarks are not to name thousands each."""

MAX_SPREAD = 1 << 24
"""How many elements a map may be spread over to follow it through a change of shape."""

MAX_COPY = 1 << 22
"""How many elements a copy of a shared weight may have: more than a convolution's, less than a table of embeddings'."""


@dataclass(frozen=True, eq=False)
class Take:
    """A linear operator that can take `affine`: applied to its output, or else to its input."""

    op: Conv | Linear
    affine: ChannelAffine
    after: bool

    def with_(self, other: Take | None) -> Take:
        """Both: two maps come together in a concatenation, and work on different channels of it."""
        if other is None:
            return self
        channels = max(self.affine.channels, other.affine.channels)
        return replace(self, affine=self.affine.sized(channels).then(other.affine.sized(channels)))


Takes: TypeAlias = list[Take] | Missed


@dataclass(frozen=True, eq=False)
class Edit:
    """New constants for one op."""

    op: Op
    arrays: Mapping[str, Array | Scaled]


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

    def around(self, operand: Value, value: Value, m: Map, enlarged: Missed | None = None) -> Absorption | Missed:
        """Absorb a map into what produces its operand, or else into all that read `value`, its result.

        enlarged: why the operand may not be as large as the result, so that readers of the one cannot have the other.
        """
        backward = self.into_producer(operand, m)
        if isinstance(backward, Absorption):
            return backward
        forward = self.into_readers(operand, value, m)
        if isinstance(forward, Absorption):
            return enlarged or forward
        refusals = [missed for missed in (backward, forward) if missed.code != "no-linear"] or [backward, forward]
        reason = "; ".join(dict.fromkeys(missed.reason for missed in refusals))
        return Missed(refusals[-1].code, reason, refusals[-1].remedy)

    def into_producer(self, value: Value, m: Map) -> Absorption | Missed:
        """Absorb a map of `value` into what produces the value.

        Legal when every value on the way is read once, and the linear operators' constants are known.
        """
        return self._absorption(self._back(value, m, 0))

    def into_readers(self, operand: Value, value: Value, m: Map) -> Absorption | Missed:
        """Absorb a map into everything that reads `value`, which is the map of `operand`.

        Legal when every reader can take it, and sees the operand as the map did.
        """
        if not self.graph.is_stable(operand):
            return written(self.graph, operand)
        return self._absorption(self._forth(value, m, 0))

    def _absorption(self, takes: Takes) -> Absorption | Missed:
        if isinstance(takes, Missed):
            return takes
        edits, notes = [], []
        for take in takes:
            found = self._edits(take)
            if isinstance(found, Missed):
                return found
            edits += found
        for edit in edits:
            for field, array in edit.arrays.items():
                if field not in ("weight", "scale") or self.graph.freed(getattr(edit.op, field)):
                    continue
                if self.shared_weights == "refuse":
                    return shared_weights(self.graph, edit.op)
                copy = f"its own copy of a shared weight: {array.nbytes:,} bytes"
                if array.size > MAX_COPY:
                    return Missed("grows", f"{self.graph.describe(edit.op)} would need {copy}")
                notes.append(f" ({copy})")
        names = ", ".join(self.graph.describe(take.op) for take in takes)
        return Absorption(tuple(edits), f"into {names}{''.join(notes)}")

    # -- backward

    def _back(self, value: Value, m: Map, depth: int) -> Takes:
        while True:
            op = self.graph.op_producing(value)
            if op is None or depth > MAX_BRANCHES:
                return Missed("no-linear", f"{self.graph.describe(value)} is not made by a linear operator")
            if (shared := shared_output(self.graph, value)) is not None:
                return shared
            if op.hooked:
                return HOOKED
            match op:
                case Conv():
                    return self._conv_after(op, m)
                case Linear():
                    return self._linear_after(op, m)
                case Concat():
                    return self._concat_after(op, m, depth)
                case Arithmetic() if op.terms:
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
            case Reshape():
                return self._through_reshape(op, op.output, op.input, m)
            case Slice():
                return self._through_slice(op, m, behind=False)
            case Reduction(function="mean" | "max"):
                axis = None if m.axis is None else op.axis_before(m.axis)
                return self._refused(op, m, m.axis is None or axis is not None) or m.along(axis or 0)
        found = self._in_place(op, m)
        return found or Missed("no-linear", f"{self.graph.describe(op)}, which feeds it, is not a linear operator")

    def _in_place(self, op: Op, m: Map) -> Map | Missed | None:
        """The map on either side of an op that leaves each element in its place along the axis of the map."""
        match op:
            case AveragePool() | Resize():
                return self._refused(op, m, m.axis in (None, 1)) or m
            case MaxPool(spatial=moved):
                pass
            case Pad(padding=tuple() as padding):
                moved = len(padding)
            case _:
                return None
        if m.axis is None:
            return self._refused(op, m, True) or m
        rank = self.graph.rank(op.input)
        if rank is None:
            return _unknown_rank(self.graph.describe(op))
        return self._refused(op, m, 0 <= m.axis < rank - moved) or m

    def _refused(self, op: Op, m: Map, keeps_axis: bool) -> Missed | None:
        """Why a map does not commute with what an op does to the elements along other axes."""
        name = self.graph.describe(op)
        if not keeps_axis:
            return Missed("axis-mismatch", f"{name} mixes or moves what is on axis {m.axis}")
        match op:
            case AveragePool(pads_counted=True) if m.affine.shift.any():
                return Missed("padding", f"{name} averages over padding zeros, too")
            case MaxPool(hollow=True) | AveragePool(hollow=True) if isinstance(op, MaxPool) or m.affine.shift.any():
                return Missed("padding", f"{name} may have windows that lie in the padding alone")
            case MaxPool() | Reduction(function="max") if not (m.affine.scale > 0).all():
                return Missed("not-monotone", f"{name} takes the largest elements, and not all factors are positive")
            case Pad(mode="constant") if _adds_elements(op) and not _keeps(m.affine, op.value):
                return Missed("padding", f"{name} adds elements that it would change")
        return None

    def _concat_after(self, op: Concat, m: Map, depth: int) -> Takes:
        parts = [m.affine] * len(op.inputs)
        if m.axis is not None and m.axis == op.axis:
            sizes = self._sizes(op, m.affine.channels)
            if isinstance(sizes, Missed):
                return sizes
            if sum(sizes) != m.affine.channels:
                return _misfit(self.graph.describe(op), sum(sizes), m.affine)
            parts = m.affine.split(sizes)
        return self._all_back([(v, Map(a, m.axis)) for v, a in zip(op.inputs, parts, strict=True)], depth)

    def _sum_after(self, op: Arithmetic, m: Map, depth: int) -> Takes:
        """s (a + b) + t = (s a + t) + s b, also where one of the two is broadcast along other axes.

        That it has all channels is told by its producer in the end, which has to have as many as the map.
        """
        values = [value for _, value in op.terms]
        affines = [m.affine, *[m.affine.scale_only()] * (len(values) - 1)]
        maps = [Map(affine, m.axis) for affine in affines]
        if m.axis is not None:
            ranks = [rank for value in values if (rank := self.graph.rank(value)) is not None]
            if len(ranks) < len(values):
                return _unknown_rank(self.graph.describe(op))
            axes = [m.axis + rank - max(ranks) for rank in ranks]
            if min(axes) < 0:
                return Missed("axis-mismatch", f"one operand of {self.graph.describe(op)} does not have axis {m.axis}")
            maps = [each.along(axis) for each, axis in zip(maps, axes, strict=True)]
        return self._all_back(list(zip(values, maps, strict=True)), depth)

    def _all_back(self, branches: Sequence[tuple[Value, Map]], depth: int) -> Takes:
        takes: list[Take] = []
        for value, m in branches:
            found = self._back(value, m, depth + 1)
            if isinstance(found, Missed):
                return found
            takes += found
        return takes

    def _conv_after(self, op: Conv, m: Map) -> Takes:
        name = self.graph.describe(op)
        if m.axis not in (None, 1):
            return Missed("axis-mismatch", f"it works along axis {m.axis}, but the channels of {name} are on axis 1")
        if m.axis is not None and (refused := self._unbatched(op)) is not None:
            return refused
        return [Take(op, m.affine, after=True)]

    def _linear_after(self, op: Linear, m: Map) -> Takes:
        if m.axis is not None:
            name, rank = self.graph.describe(op), self.graph.rank(op.output)
            if rank is None:
                return _unknown_rank(name)
            if m.axis != rank - 1:
                return Missed(
                    "axis-mismatch",
                    f"it works along axis {m.axis}, but the features of {name} are on axis {rank - 1}",
                )
        return [Take(op, m.affine, after=True)]

    # -- forward

    def _forth(self, value: Value, m: Map, depth: int) -> Takes:
        readers = element_readers(self.graph, value)
        if not readers or depth > MAX_BRANCHES:
            return Missed("no-linear", f"nothing reads {self.graph.describe(value)} that could take it")
        takes: dict[int, Take] = {}
        joins: set[int] = set()
        for reader in readers:
            if isinstance(reader.op, Concat):
                if id(reader.op.node) in joins:  # it was seen with all that it joins of this value
                    continue
                joins.add(id(reader.op.node))
            found = self._into_reader(value, reader.name, reader.op, m, depth)
            if isinstance(found, Missed):
                return found
            for take in found:
                takes[id(take.op.node)] = take.with_(takes.get(id(take.op.node)))
        bare = [take for take in takes.values() if isinstance(take.op, Linear) and take.op.bias is None]
        if len(bare) > 1 and m.affine.shift.any():
            return Missed("grows", f"{len(bare)} matrix products without a bias would each need one")
        return list(takes.values())

    def _into_reader(self, value: Value, name: str, op: Op | None, m: Map, depth: int) -> Takes:
        if isinstance(op, Concat) and not op.hooked:
            moved = self._in_concat(value, op, m)
            return moved if isinstance(moved, Missed) else self._forth(op.output, moved, depth + 1)
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
                return m if m.axis is None else m.along(op.permutation.index(m.axis % len(op.permutation)))
            case Reshape():
                return self._through_reshape(op, op.input, op.output, m)
            case Slice():
                return self._through_slice(op, m, behind=True)
            case Reduction(function="mean" | "max"):
                axis = None if m.axis is None else op.axis_behind(m.axis)
                return self._refused(op, m, m.axis is None or axis is not None) or m.along(axis or 0)
        found = self._in_place(op, m)
        return found or Missed("no-linear", f"{self.graph.describe(op)}, which reads it, cannot take it")

    def _in_concat(self, value: Value, op: Concat, m: Map) -> Map | Missed:
        """The map on a concatenation that does nothing to the other inputs."""
        sizes = self._sizes(op)
        if m.axis not in (None, op.axis) or isinstance(sizes, Missed):
            return Missed("no-linear", f"{self.graph.describe(op)}, which reads it, cannot take it")
        starts = np.cumsum([0, *sizes])
        here = [place for place, joined in enumerate(op.inputs) if joined is value]
        if m.affine.channels not in (1, sizes[here[0]]):
            return _misfit(self.graph.describe(value), sizes[here[0]], m.affine)
        affine = ChannelAffine.join([m.affine.sized(sizes[place]) for place in here])
        places = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in here])
        return Map(affine.among(int(starts[-1]), places), op.axis)

    def _conv_before(self, op: Conv, m: Map) -> Takes:
        name = self.graph.describe(op)
        if m.axis not in (None, 1):
            return Missed("axis-mismatch", f"it works along axis {m.axis}, but {name} reads its channels on axis 1")
        if m.axis is not None and (refused := self._unbatched(op)) is not None:
            return refused
        padded = op.transposed or op.padding is None or any(side for pads in op.padding for side in pads)
        if padded and op.pads_zeros and m.affine.shift.any():
            return Missed(
                "padding",
                f"{name}, which reads it, pads with zeros, and a shift does not commute with that",
                "move the padding before the normalization, or retrain with the normalization after the convolution",
            )
        return [Take(op, m.affine, after=False)]

    def _linear_before(self, op: Linear, m: Map) -> Takes:
        if m.axis is not None and m.axis != op.in_axis:
            rank = self.graph.rank(op.input)
            if rank is None:
                return _unknown_rank(self.graph.describe(op))
            if m.axis != op.in_axis % rank:
                name = self.graph.describe(op)
                return Missed("axis-mismatch", f"it works along axis {m.axis}, but {name} sums over another axis")
        return [Take(op, m.affine, after=False)]

    # -- the constants

    def _edits(self, take: Take) -> list[Edit] | Missed:
        """The new constants of one operator; equations in `fuser.affine`."""
        op, name = take.op, self.graph.describe(take.op)
        layout = layout_of(op)
        if isinstance(producer := self.graph.op_producing(op.weight), Dequantize) and take.after:
            return self._requantized(op, producer, take.affine, layout)
        old = constants_of(self.graph, op)
        if isinstance(old, Missed):
            return old
        shape = old.weight.shape
        channels = layout.outputs(shape) if take.after else layout.inputs(shape)
        if take.affine.channels not in (1, channels):
            return _misfit(name, channels, take.affine)
        affine = take.affine.sized(channels)
        if take.after:
            factor, bias = layout.along_outputs(affine.scale, shape), old.bias * affine.scale + affine.shift
        else:
            shift = old.alpha * algebra.carried(old.weight, affine.shift, layout) if affine.shift.any() else 0.0
            factor, bias = layout.along_inputs(affine.scale, shape), old.bias + shift
        arrays = new_constants(op, old, factor * old.alpha, bias)
        new = NewConstants(arrays.get("weight", old.weight), np.asarray(arrays.get("bias", bias)))
        if not (algebra.is_finite(new.weight) and algebra.is_finite(new.bias)):
            if not (algebra.is_finite(old.weight) and algebra.is_finite(old.bias)):
                return Missed("not-finite", f"the constants of {name} are not finite as they are")
            return Missed(
                "not-finite",
                f"the new constants of {name} would not be finite in {old.weight.dtype}",
                "look for a variance of zero without epsilon, or keep this layer in a wider type",
            )
        side = {"after" if take.after else "before": affine}
        if not algebra.agree(old, new, layout, **side):
            return Missed("unsound", f"the new constants of {name} do not do what the old ones did, on a test input")
        return [Edit(op, arrays)] if arrays else []

    def _requantized(
        self, op: Conv | Linear, dequantize: Dequantize, affine: ChannelAffine, layout: WeightLayout
    ) -> list[Edit] | Missed:
        """The integers stay: s * ((q - z) * scale) = (q - z) * (s * scale), for one scale per output channel."""
        name = self.graph.describe(op)
        axis = 1 if layout.transposed else 0
        if dequantize.axis != axis or (layout.transposed and layout.groups > 1) or dequantize.hooked:
            return Missed("quantized", f"the weight of {name} has no scale of its own for each output channel")
        if len(self.graph.readers(dequantize.output)) != 1:
            return Missed("quantized", f"the quantized weight of {name} has other readers")
        if not (affine.scale > 0).all():
            return Missed("quantized", f"a factor for the quantization scales of {name} is not positive")
        scale = self.graph.constant(dequantize.scale)
        bias = None if op.bias is None else self.graph.constant(op.bias)
        if isinstance(scale, Missed):
            return scale
        if isinstance(bias, Missed):
            return bias
        if isinstance(op, Linear) and (op.alpha, op.beta) != (1, 1):
            return Missed("quantized", f"{name} has factors of its own (alpha, beta)")
        if affine.channels not in (1, scale.size):
            return _misfit(name, scale.size, affine)
        affine = affine.sized(scale.size)
        old = 0.0 if bias is None else np.asarray(bias, np.float64)
        new_scale = algebra.scaled(scale, affine.scale, scale.dtype)
        new_bias = algebra.rounded(old * affine.scale + affine.shift, scale.dtype)
        if not (algebra.is_finite(new_scale) and algebra.is_finite(new_bias)) or not (new_scale > 0).all():
            return Missed("not-finite", f"the new quantization scales of {name} would leave the range of {scale.dtype}")
        edits = [Edit(dequantize, {"scale": new_scale})]
        if op.bias is not None or new_bias.any():  # an addition of zeros would be folded again, for ever
            edits.append(Edit(op, {"bias": new_bias}))
        return edits

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

    def _sizes(self, op: Concat, total: int | None = None) -> list[int] | Missed:
        """How much of the axis that is joined belongs to each input; one of them may have what is left of `total`."""
        sizes = [self._size(value, op.axis) for value in op.inputs]
        known = [size for size in sizes if isinstance(size, int)]
        if total is not None and len(known) == len(sizes) - 1:
            known = [size if isinstance(size, int) else total - sum(known) for size in sizes]
        if len(known) < len(sizes) or min(known) < 0:
            return Missed("axis-mismatch", f"the sizes that {self.graph.describe(op)} joins are not known", GIVE_SHAPES)
        return known

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
        return layout_of(op).outputs([int(dim) for dim in weight if dim is not None])

    def _through_reshape(self, op: Reshape, source: Value, target: Value, m: Map) -> Map | Missed:
        """The map of `target` that is the map `m` of `source`, where it is still one along an axis."""
        if m.axis is None:
            return m
        here, there = self.graph.shape(source), self.graph.shape(target)
        moved = None if here is None or there is None else moved_axis(here, there, m.along(m.axis % len(here)))
        if moved is None:
            moved = self._kept_axis(op, source, target, m)
        if moved is None:
            known = here is not None and there is not None
            return Missed(
                "axis-mismatch",
                f"after {self.graph.describe(op)} it is not known to be a map along one axis",
                "" if known else GIVE_SHAPES,
            )
        return moved

    def _through_slice(self, op: Slice, m: Map, *, behind: bool) -> Map | Missed:
        """The map of what is taken, or of what it is taken from: there it does nothing to what is left out."""
        if m.axis is None:
            return m
        name, rank = self.graph.describe(op), self.graph.rank(op.input)
        if rank is None:
            return _unknown_rank(name)
        taken = next((one for one in op.ranges if one.axis % rank == m.axis % rank), None)
        if taken is None:
            return m
        size = self._size(op.input, m.axis)
        if not isinstance(size, int):
            return Missed("axis-mismatch", f"the size of which {name} takes a range is not known", GIVE_SHAPES)
        places = np.arange(size)[taken.start : taken.end : taken.step]
        channels = size if behind else places.size
        if m.affine.channels not in (1, channels):
            return _misfit(name, channels, m.affine)
        affine = m.affine.sized(channels)
        return m.along(m.axis, affine.take(places) if behind else affine.among(size, places))

    def _kept_axis(self, op: Reshape, source: Value, target: Value, m: Map) -> Map | None:
        """The map along an axis that the reshape leaves as it is; for that no sizes have to be known."""
        assert m.axis is not None
        if m.axis < 0:
            return m if op.back else None
        if m.axis < op.front:
            return m
        here, there = self.graph.rank(source), self.graph.rank(target)
        if here is None or there is None or m.axis < here - op.back:
            return None
        return m.along(m.axis - here + there)


def element_readers(graph: Graph, value: Value) -> list[Reader]:
    """Who reads the elements of a value: for who only asks for the shape, other elements change nothing."""
    return [reader for reader in graph.readers(value) if not reader.shape_only]


def shared_output(graph: Graph, value: Value, *, shapes: bool = False) -> Missed | None:
    """Said where more than one reader asks for the elements of a value, or, with `shapes`, for anything of it."""
    readers = (reader.name for reader in graph.readers(value) if shapes or not reader.shape_only)
    first = list(itertools.islice(readers, MAX_NAMES + 1))
    if len(first) < 2:
        return None
    names = ", ".join(dict.fromkeys(first[:MAX_NAMES])) + (" and others" if len(first) > MAX_NAMES else "")
    return Missed("shared-output", f"{graph.describe(value)} is read by more than this: {names}")


def shared_weights(graph: Graph, op: Op) -> Missed:
    """Said where copies of shared weights are not wanted."""
    return Missed(
        "shared-weights",
        f"the weight of {graph.describe(op)} has other readers",
        "--shared-weights=copy gives this layer its own copy",
    )


def written(graph: Graph, value: Value) -> Missed:
    """Said where a value would be read at another time than it was."""
    if any(reader.op is not None and reader.op.hooked for reader in graph.readers(value)):
        return HOOKED  # nothing says that it is written, but for the hook that may do so
    return Missed(
        "written",
        f"{graph.describe(value)} is written in place, so it is not the same at all times",
        "give example_inputs to a graph without operations in place",
    )


def layout_of(op: Conv | Linear) -> WeightLayout:
    """Where the channels are in the weight of `op`."""
    if isinstance(op, Conv):
        return WeightLayout(op.transposed, op.groups)
    return WeightLayout(transposed=op.out_axis == 1)


def constants_of(graph: Graph, op: Conv | Linear) -> Constants | Missed:
    """The constants of `op`, the bias in float64 as it is added: zeros where there is none."""
    weight = graph.constant(op.weight)
    if isinstance(weight, Missed):
        return Missed(weight.code, f"the weight of {graph.describe(op)}: {weight.reason}", weight.remedy)
    if weight.dtype.kind in "biuc":
        return Missed("type", f"the weight of {graph.describe(op)} is of {weight.dtype}, not of real floating point")
    alpha, beta = (op.alpha, op.beta) if isinstance(op, Linear) else (1.0, 1.0)
    outputs = layout_of(op).outputs(weight.shape)
    if op.bias is None or beta == 0:
        return Constants(weight, np.zeros(outputs), alpha)
    bias = graph.constant(op.bias)
    if isinstance(bias, Missed):
        return Missed(bias.code, f"the bias of {graph.describe(op)}: {bias.reason}", bias.remedy)
    if bias.ndim and bias.shape[-1] not in (1, outputs):
        return Missed("shape-mismatch", f"the bias of {graph.describe(op)} has the shape {bias.shape}")
    wide = np.broadcast_to(bias.astype(np.float64) * beta, (*bias.shape[:-1], outputs))
    return Constants(weight, wide.reshape(-1) if wide.size == outputs else wide, alpha)


DEFERRED = 1 << 20
"""From so many bytes on, a weight times a factor is left for the graph to compute where it is stored; but for a factor
that takes as much itself, as those of groups may."""


def new_constants(op: Conv | Linear, old: Constants, factor: Array, bias: Array) -> dict[str, Array | Scaled]:
    """What `set_constants` has to be given for weight * factor and `bias`: only what changes, in the stored type."""
    neutral = not isinstance(op, Linear) or (op.alpha, op.beta) == (1.0, 1.0)
    dtype = old.weight.dtype
    arrays: dict[str, Array | Scaled] = {}
    if not neutral or not algebra.all_true(factor == 1):
        is_light = old.weight.nbytes >= max(DEFERRED, 8 * factor.nbytes)
        arrays["weight"] = Scaled(old.weight, factor) if is_light else algebra.scaled(old.weight, factor, dtype)
    if (op.bias is not None and not neutral) or not algebra.all_true(bias == old.bias):
        arrays["bias"] = algebra.rounded(bias, dtype)
    return arrays


def moved_axis(here: Sequence[Dim], there: Sequence[Dim], m: Map) -> Map | None:
    """A map along an axis of the shape `here`, after a reshape to `there`; None where it is no map along an axis.

    Axes that stay in front or at the back are told by equal sizes; in between, the factors of all elements are laid
    out in the new shape, where they have to depend on one axis alone.
    """
    assert m.axis is not None
    if here and there and _product(here[1:]) is not None and _product(here[1:]) == _product(there[1:]):
        here, there = ("batch", *here[1:]), ("batch", *there[1:])
    front = _common(here, there)
    if m.axis < front:
        return m
    back = _common(here[front:][::-1], there[front:][::-1])
    if m.axis >= len(here) - back:
        # The sizes behind are the same on both sides, so whatever is in front of them is, too.
        return m.along(m.axis - len(here) + len(there))
    old, new = here[front : len(here) - back], there[front : len(there) - back]
    size = _product(old)
    if size is None or size != _product(new) or not 0 < size <= MAX_SPREAD:
        return None
    lengths = [dim for dim in old if isinstance(dim, int)]
    if m.affine.channels not in (1, lengths[m.axis - front]):
        return None
    affine = m.affine.sized(lengths[m.axis - front])
    trailing = [1] * (len(old) - (m.axis - front) - 1)
    values = [
        np.broadcast_to(v.reshape(-1, *trailing), lengths).reshape([dim for dim in new if isinstance(dim, int)])
        for v in (affine.scale, affine.shift)
    ]
    for axis in range(len(new)):
        along = tuple(slice(None) if i == axis else slice(0, 1) for i in range(len(new)))
        if all((v == v[along]).all() for v in values):
            scale, shift = (v[along].reshape(-1) for v in values)
            return m.along(front + axis, ChannelAffine(scale, shift))
    return None


def _common(a: Sequence[Dim], b: Sequence[Dim]) -> int:
    """How many sizes are known and the same at the beginning of two shapes."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x is None or x != y:
            break
        count += 1
    return count


def _product(shape: Sequence[Dim]) -> int | None:
    sizes = [dim for dim in shape if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def _adds_elements(op: Pad) -> bool:
    return isinstance(op.padding, Missed) or any(side > 0 for pair in op.padding for side in pair)


def _keeps(affine: ChannelAffine, value: float | Missed) -> bool:
    """Whether a map makes of a value, in every channel, that value."""
    if isinstance(value, Missed):
        return False
    with np.errstate(invalid="ignore"):
        return bool((affine.scale * value + affine.shift == value).all())


def _unknown_rank(name: str) -> Missed:
    return Missed(
        "rank",
        f"how many axes {name} works on is not known, and it takes input with and without a batch axis",
        GIVE_SHAPES,
    )


def _misfit(name: str, channels: int, affine: ChannelAffine) -> Missed:
    return Missed("shape-mismatch", f"{name} has {channels} channels there, and the map {affine.channels}")
