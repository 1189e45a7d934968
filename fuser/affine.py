"""The algebra: per-channel affine maps, and what they do to the constants of a linear operator.

Arrays in, arrays out; no graph and no framework.  Everything is computed in float64 and rounded once, at the
end, to the type that is stored.

    after:   s * (W x + b) + t   =  (s W) x + (s b + t)        s belongs to the output channel
    before:  W (s x + t) + b     =  (W s) x + (W t + b)        s belongs to the input channel
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

CHUNK = 1 << 18
"""How many elements of a weight are held in float64 at a time: 2 MB, so that they stay in a cache."""


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """y = x * scale + shift, one scale and one shift for each channel; float64, [C] each.

    A map of one channel ([1]) stands for the same scalar on every channel, see `sized`.
    """

    scale: Array
    shift: Array

    @classmethod
    def from_batch_norm(
        cls, scale: Array | None, bias: Array | None, mean: Array, var: Array, epsilon: float
    ) -> ChannelAffine:
        """(x - mean) / sqrt(var + epsilon) * scale + bias; parameters [C] (Ioffe and Szegedy 2015, algorithm 2)."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            s = (1.0 if scale is None else _float64(scale)) / np.sqrt(_float64(var) + epsilon)
            return cls(s, (0.0 if bias is None else _float64(bias)) - _float64(mean) * s)

    @classmethod
    def identity(cls, channels: int) -> ChannelAffine:
        """x -> x."""
        return cls(np.ones(channels), np.zeros(channels))

    @classmethod
    def join(cls, parts: Sequence[ChannelAffine]) -> ChannelAffine:
        """The maps of consecutive runs of channels as one; the inverse of `split`."""
        return cls(np.concatenate([p.scale for p in parts]), np.concatenate([p.shift for p in parts]))

    @property
    def channels(self) -> int:
        return int(self.scale.size)

    @property
    def is_finite(self) -> bool:
        return is_finite(self.scale) and is_finite(self.shift)

    def __call__(self, x: Array, axis: int) -> Array:
        """x * scale + shift along `axis`, in float64."""
        shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        return _float64(x) * self.scale.reshape(shape) + self.shift.reshape(shape)

    def then(self, outer: ChannelAffine) -> ChannelAffine:
        """x -> outer(self(x))."""
        return ChannelAffine(self.scale * outer.scale, self.shift * outer.scale + outer.shift)

    def sized(self, channels: int) -> ChannelAffine:
        """The same map on `channels` channels; only a scalar can be resized."""
        if self.channels == channels:
            return self
        if self.channels != 1:
            raise ValueError(f"a map of {self.channels} channels does not fit {channels}")
        return ChannelAffine(np.repeat(self.scale, channels), np.repeat(self.shift, channels))

    def take(self, channels: Array) -> ChannelAffine:
        """The map whose channel i is channel `channels[i]` of this one."""
        return ChannelAffine(self.scale[channels], self.shift[channels])

    def among(self, channels: int, places: Array) -> ChannelAffine:
        """The map on so many channels whose channel `places[i]` is channel i of this one; the others stay alone."""
        scale, shift = np.ones(channels), np.zeros(channels)
        scale[places], shift[places] = self.scale, self.shift
        return ChannelAffine(scale, shift)

    def split(self, sizes: Sequence[int]) -> list[ChannelAffine]:
        """The maps of consecutive runs of channels."""
        ends = np.cumsum(sizes)
        return [self.take(np.arange(end - size, end)) for end, size in zip(ends, sizes, strict=True)]

    def scale_only(self) -> ChannelAffine:
        """x * scale."""
        return ChannelAffine(self.scale, np.zeros_like(self.shift))


@dataclass(frozen=True)
class WeightLayout:
    """Where the channels are in the weight of a linear operator.

    conv: [Cout, Cin/groups, *kernel]; transposed conv: [Cin, Cout/groups, *kernel], where row block i of Cin
    belongs to group i; linear: [out, in], or [in, out] when transposed.
    """

    transposed: bool = False
    groups: int = 1

    def outputs(self, shape: Sequence[int]) -> int:
        """How many output channels a weight of this shape has."""
        return shape[1] * self.groups if self.transposed else shape[0]

    def inputs(self, shape: Sequence[int]) -> int:
        """How many input channels a weight of this shape has."""
        return shape[0] if self.transposed else shape[1] * self.groups

    def along_outputs(self, values: Array, shape: Sequence[int]) -> Array:
        """[Cout] values, shaped to multiply the weight: each element meets the value of its output channel."""
        return self._along(values, shape, first=not self.transposed)

    def along_inputs(self, values: Array, shape: Sequence[int]) -> Array:
        """[Cin] values, shaped to multiply the weight: each element meets the value of its input channel."""
        return self._along(values, shape, first=self.transposed)

    def _along(self, values: Array, shape: Sequence[int], *, first: bool) -> Array:
        """One value for each row of the weight, or for each entry of its second axis in each group of rows."""
        if first:
            return values.reshape(-1, *[1] * (len(shape) - 1))
        rows = values.reshape(self.groups, -1)
        if self.groups > 1:
            rows = np.repeat(rows, shape[0] // self.groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))

    def window(self, weight: Array | Scaled, channel: int) -> tuple[Array, slice]:
        """What output channel `channel` is made of: its weights [Cin/groups, *kernel], and the inputs they meet."""
        outputs, inputs = self.outputs(weight.shape) // self.groups, self.inputs(weight.shape) // self.groups
        group, index = divmod(channel, outputs)
        block = slice(group * inputs, (group + 1) * inputs)
        return (weight[block, index] if self.transposed else weight[channel]), block


@dataclass(frozen=True, eq=False)
class Scaled:
    """weight * factor, rounded once to the type of the weight: computed where it is read, and as much of it.

    factor: float64, with as many axes as the weight; each has its size or 1.
    """

    weight: Array
    factor: Array

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.weight.shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.weight.dtype
        return dtype

    @property
    def size(self) -> int:
        return self.weight.size

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __getitem__(self, index: Any) -> Array:
        """A few rows, by their numbers or as a slice, and where a second index is given, that column of them."""
        rows, *column = index if isinstance(index, tuple) else (index,)
        if not isinstance(rows, slice):
            return np.concatenate([self[row : row + 1] for row in rows])
        place = (slice(None), *column)
        found: Array = self.rows(self.weight[rows], rows)[place]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return scaled(self.weight, self.factor, self.dtype if dtype is None else np.dtype(dtype))

    @property
    def rows(self) -> Callable[[Array, slice], Array]:
        """What makes of rows of the weight those of the product; it does not hold the weight."""
        factor = self.factor
        return lambda weight, rows: scaled(weight, _rows(factor, rows), weight.dtype)

    @property
    def is_finite(self) -> bool:
        """Whether every element is a finite number; mostly the largest ones tell."""
        with np.errstate(over="ignore", invalid="ignore"):
            largest = np.multiply(_largest(self.weight), np.abs(self.factor).max())
        if np.isfinite(rounded(largest, self.dtype)):
            return True
        return all(is_finite(self[rows]) for rows in chunks(self.weight))


class Constants(NamedTuple):
    """What a linear operator multiplies by and adds: alpha * weight, and a bias of [Cout] or [M, Cout]."""

    weight: Array
    bias: Array
    alpha: float = 1.0


class NewConstants(NamedTuple):
    """What is to be stored in the place of `Constants`."""

    weight: Array | Scaled
    bias: Array


def scaled(weight: Array, factor: Array, dtype: np.dtype[Any]) -> Array:
    """weight * factor, computed in float64 and rounded once to `dtype`; `factor` broadcasts against the weight."""
    out = np.empty(weight.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        # numpy widens a few thousand elements at a time, so a weight is never held in float64.
        np.multiply(weight, factor, out=out, dtype=np.float64, casting="unsafe")
    return out


def carried(weight: Array, shift: Array, layout: WeightLayout) -> Array:
    """What a constant [Cin] at every input position adds to each output channel: [Cout].

    The sum over input channels and kernel of weight * shift.
    """
    factor = layout.along_inputs(shift, weight.shape)
    sums = np.empty(weight.shape[:2])
    for rows in chunks(weight):
        product = _float64(weight[rows]) * _rows(factor, rows)
        sums[rows] = product.reshape(*product.shape[:2], -1).sum(axis=2)
    total: Array = sums.sum(axis=1)
    if layout.transposed:
        total = sums.reshape(layout.groups, -1, weight.shape[1]).sum(axis=1).reshape(-1)
    return total


def agree(
    old: Constants,
    new: Constants | NewConstants,
    layout: WeightLayout,
    *,
    before: ChannelAffine | None = None,
    after: ChannelAffine | None = None,
) -> bool:
    """Whether the new constants do what the old ones did with a map `before` the operator, or `after` it.

    Both are evaluated in float64 on one window of inputs, for a few output channels, and may differ by what
    rounding the new constants explains.  It shares no indexing with what computed them.
    """
    outputs = layout.outputs(new.weight.shape)
    if not outputs:
        return True
    channels = [0, outputs // 2, outputs - 1]
    weights = np.concatenate([_windows(each.weight, layout, channels) for each in (old, new)], dtype=np.float64)
    x = sample_inputs(weights.shape[1])
    seen = x
    if before is not None:
        blocks = [layout.window(old.weight, channel)[1] for channel in channels]
        taps = math.prod(old.weight.shape[2:])
        scale, shift = (np.stack([np.repeat(v[block], taps) for block in blocks]) for v in (before.scale, before.shift))
        seen = np.concatenate((x * scale + shift, np.broadcast_to(x, scale.shape)))
    values, sizes = _products(weights, seen)
    alpha, count = float(old.alpha), len(channels)
    biases, new_biases = _first_row(old.bias, channels), _first_row(new.bias, channels)
    for i, (channel, bias, new_bias) in enumerate(zip(channels, biases, new_biases, strict=True)):
        value, size = alpha * values[i] + bias, abs(alpha) * sizes[i] + abs(bias)
        if after is not None:
            factor, summand = float(after.scale[channel]), float(after.shift[channel])
            value, size = value * factor + summand, size * abs(factor) + abs(summand)
        found = values[count + i] + new_bias, sizes[count + i] + abs(new_bias)
        if not are_close((value, size), found, new.weight.dtype, x.size):
            return False
    return True


def are_close(old: tuple[float, float], new: tuple[float, float], dtype: np.dtype[Any], count: int) -> bool:
    """Whether two sums of products differ by no more than the rounding of `count` new constants to `dtype` explains.

    old, new: (sum, sum of the magnitudes), in float64.
    """
    (value, size), (new_value, new_size) = old, new
    eps, tiniest = _precision(dtype)
    return abs(value - new_value) <= eps * new_size + tiniest * (count + 1) + 1e-12 * (size + new_size)


def leaves_no_fraction(summands: Array, dtype: np.dtype[Any]) -> bool:
    """Whether `dtype` has no digits behind the point for a sum with one of these: x + 1.5e7 - 1.5e7 rounds x."""
    return bool((np.abs(summands) * _precision(dtype)[0] >= 1).any())


def is_normal(numbers: Array) -> bool:
    """Whether all are 0, or of a size at which their type has all its digits."""
    info = ml_dtypes.finfo(numbers.dtype)  # type: ignore[no-untyped-call]
    sizes = np.abs(_float64(numbers[numbers != 0]))
    return bool(((sizes >= float(info.tiny)) & (sizes <= float(info.max))).all())


@cache
def _precision(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The spacing at 1, and at 0."""
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(info.eps), float(info.smallest_subnormal)


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """`values` rounded to `dtype`, overflow to infinity included."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(dtype)


def is_finite(array: Array | Scaled) -> bool:
    """Whether every element is a finite number; without a copy as large as the array."""
    if isinstance(array, Scaled):
        return array.is_finite
    if array.size <= CHUNK:
        return all_true(np.isfinite(array))
    return all(all_true(np.isfinite(array[rows])) for rows in chunks(array))


def all_true(mask: Array) -> bool:
    """`mask.all()`; most masks have a few channels, for which numpy's own takes three times as long."""
    return b"\0" not in mask.tobytes()


def _largest(array: Array) -> float:
    """The largest magnitude; not finite where an element is not."""
    bounds = [float(bound) for rows in chunks(array) for bound in (array[rows].min(), array[rows].max())]
    return float(np.abs(bounds).max())


def chunks(array: Array) -> Iterator[slice]:
    """Slices of the first axis, of about CHUNK elements each."""
    row = max(1, array.size // max(1, array.shape[0]))
    step = max(1, CHUNK // row)
    return (slice(start, start + step) for start in range(0, array.shape[0], step))


def _windows(weight: Array | Scaled, layout: WeightLayout, channels: Sequence[int]) -> Array:
    """What a few output channels are made of: [channels, Cin/groups * taps]."""
    if layout.transposed:
        windows = np.stack([layout.window(weight, channel)[0] for channel in channels])
    else:  # the same, in one step
        windows = weight[channels] if isinstance(weight, Scaled) else weight.take(channels, axis=0)
    return windows.reshape(len(channels), -1)


def _products(weights: Array, x: Array) -> tuple[list[float], list[float]]:
    """(sum, sum of magnitudes) of weight * x, for each channel; x is the same for all of them, or one for each."""
    if x.ndim == 1:
        return weights.dot(x).tolist(), np.abs(weights).dot(np.abs(x)).tolist()
    products = weights * x
    return products.sum(axis=1).tolist(), np.abs(products).sum(axis=1).tolist()


@lru_cache(maxsize=8)
def sample_inputs(count: int) -> Array:
    """A window of inputs, none like another."""
    x: Array = np.cos(np.arange(1.0, count + 1))
    x.flags.writeable = False
    return x


def _first_row(bias: Array, channels: Sequence[int]) -> list[float]:
    """The biases of a few channels, in the first row where rows differ."""
    row = bias if bias.ndim == 1 else bias.reshape(-1, bias.shape[-1])[0]
    return [float(row[channel]) for channel in channels]


_float64 = partial(np.asarray, dtype=np.float64)


def _rows(factor: Array, rows: slice) -> Array:
    return factor[rows] if factor.ndim and factor.shape[0] != 1 else factor
