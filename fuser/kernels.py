"""Convolutions of one input as values: what makes two of them one.

    y[c, o] = bias[c] + sum over inputs i of c's group and taps t of weight[c, i, t] * x[i, o * stride + t]

A tap is a position relative to the window's origin, padding included; x is zero outside of its bounds.  So a 1x1
kernel is a 3x3 kernel with one tap that is not zero, an identity is a depthwise 1x1 kernel of ones, and a matrix
product has no spatial axes at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fuser import affine as algebra
from fuser.affine import Array, ChannelAffine, Constants, WeightLayout


@dataclass(frozen=True, eq=False)
class Kernel:
    """A convolution that is not transposed.

    weight: [Cout, Cin/groups, *taps]; bias: [Cout] in float64.
    taps: for each spatial axis, the positions of the weight's elements.
    growth: for each spatial axis, what padding and kernel add to the size at stride 1 (0 for "same").
    """

    weight: Array
    bias: Array
    groups: int = 1
    strides: tuple[int, ...] = ()
    taps: tuple[range, ...] = ()
    growth: tuple[int, ...] = ()

    @classmethod
    def conv(
        cls,
        constants: Constants,
        groups: int,
        strides: Sequence[int],
        dilations: Sequence[int],
        padding: Sequence[tuple[int, int]],
    ) -> Kernel:
        """A convolution with zeros added (before, after) each spatial axis."""
        sizes = constants.weight.shape[2:]
        taps = tuple(
            range(-before, -before + size * step, step)
            for size, step, (before, _) in zip(sizes, dilations, padding, strict=True)
        )
        growth = tuple(
            sum(pads) - step * (size - 1) for size, step, pads in zip(sizes, dilations, padding, strict=True)
        )
        return cls(constants.weight, constants.bias, groups, tuple(strides), taps, growth)

    @classmethod
    def pointwise(cls, affine: ChannelAffine, axes: int) -> Kernel:
        """x * scale + shift along the channels, over so many spatial axes: depthwise, one tap."""
        channels = affine.channels
        weight = affine.scale.reshape(channels, 1, *[1] * axes)
        return cls(weight, affine.shift, channels, (1,) * axes, (range(1),) * axes, (0,) * axes)

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether each position of y is made of x at that very position."""
        taps = zip(self.taps, self.strides, self.growth, strict=True)
        return all(tuple(at) == (0,) and (stride, growth) == (1, 0) for at, stride, growth in taps)

    @property
    def pads(self) -> bool:
        """Whether some window reaches beyond x."""
        ends = zip(self.taps, self.growth, strict=True)
        return any(taps[0] < 0 or taps[-1] + growth > 0 for taps, growth in ends)

    def times(self, factor: float) -> Kernel:
        """factor * y, for a factor of 1 or -1, so that nothing is rounded."""
        return self if factor == 1 else replace(self, weight=-self.weight, bias=-self.bias)

    def misfit(self, host: Kernel, *, same_size: bool = False) -> str:
        """Why `host` has no room for this kernel, as a clause; empty where it has.

        same_size: the results are known to be of one size; else they are where both grow alike.
        """
        if (self.outputs, self.inputs) != (host.outputs, host.inputs):
            return f"{self.inputs} to {self.outputs} channels against {host.inputs} to {host.outputs}"
        if self.strides != host.strides:
            return f"strides {self.strides} against {host.strides}"
        if self.growth != host.growth and not same_size:
            return "the sizes of their results differ"
        if self.groups % host.groups:
            return f"{self.groups} groups against {host.groups}"
        if any(set(mine) - set(theirs) for mine, theirs in zip(self.taps, host.taps, strict=True)):
            return "the window of one is not inside that of the other"
        return ""

    def regrouped(self, groups: int) -> Array:
        """The weight with fewer groups: [Cout, Cin/groups, *taps], zero where no input was read."""
        if groups == self.groups:
            return self.weight
        outputs, block = self.weight.shape[:2]
        first = np.arange(outputs) // (outputs // self.groups) * block  # of its inputs, among all
        start = np.arange(outputs) // (outputs // groups) * (self.inputs // groups)
        wide = np.zeros((outputs, self.inputs // groups, *self.weight.shape[2:]), self.weight.dtype)
        wide[np.arange(outputs)[:, None], (first - start)[:, None] + np.arange(block)] = self.weight
        return wide

    def after(self, inner: Kernel) -> Kernel | None:
        """y = self(inner(x)) in float64; None where that is no convolution of x.

        One of the two has to be pointwise, and where `self` pads, `inner` has to make zeros of zeros.
        """
        if not (self.is_pointwise or inner.is_pointwise) or (self.pads and inner.bias.any()):
            return None
        window, groups = (inner if self.is_pointwise else self), math.gcd(self.groups, inner.groups)
        first = inner.regrouped(groups).reshape(groups, inner.outputs // groups, inner.inputs // groups, -1)
        second = self.regrouped(groups).reshape(groups, self.outputs // groups, self.inputs // groups, -1)
        product = np.einsum("gomt,gmiu->goitu", second.astype(np.float64), first.astype(np.float64), optimize=True)
        shape = self.outputs, inner.inputs // groups, *map(len, window.taps)
        bias = self.bias + algebra.carried(self.weight, inner.bias, WeightLayout(groups=self.groups))
        return Kernel(product.reshape(shape), bias, groups, window.strides, window.taps, window.growth)

    def plus(self, other: Kernel, dtype: np.dtype[Any]) -> Constants:
        """The constants of self + other, rounded once to `dtype`; `other` has to fit."""
        places = [
            slice(host.index(taps[0]), host.index(taps[-1]) + 1, max(1, taps.step // host.step))
            for taps, host in zip(other.taps, self.taps, strict=True)
        ]
        where = (slice(None), slice(None), *places)
        weight = np.empty(self.weight.shape, dtype)
        addend = other.regrouped(self.groups)
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in algebra.chunks(weight):
                total = self.weight[rows].astype(np.float64)
                total[where] += addend[rows]
                weight[rows] = total.astype(dtype)
        return Constants(weight, algebra.rounded(self.bias + other.bias, dtype))

    def __call__(self, window: Array, channel: int, origin: Sequence[int]) -> tuple[float, float]:
        """(value, sum of magnitudes) of output `channel` for a window [Cin, *size] with tap 0 at `origin`."""
        weight, block = WeightLayout(groups=self.groups).window(self.weight, channel)
        seen = window[block]
        for axis, (taps, zero) in enumerate(zip(self.taps, origin, strict=True), start=1):
            seen = np.take(seen, [tap + zero for tap in taps], axis=axis)
        product = weight.astype(np.float64) * seen
        bias = float(self.bias[channel])
        return float(product.sum()) + bias, float(np.abs(product).sum()) + abs(bias)


def agree(parts: Sequence[Kernel], merged: Kernel, dtype: np.dtype[Any]) -> bool:
    """Whether the merged kernel does what its parts did, on one window and a few channels, up to rounding."""
    size = [max(taps) - min(taps) + 1 for taps in merged.taps]
    origin = [-min(taps) for taps in merged.taps]
    count = merged.inputs * int(np.prod(size))
    window = algebra.sample_inputs(count).reshape(merged.inputs, *size)
    for channel in {0, merged.outputs // 2, merged.outputs - 1} if merged.outputs else ():
        values, sizes = zip(*(part(window, channel, origin) for part in parts), strict=True)
        if not algebra.are_close((sum(values), sum(sizes)), merged(window, channel, origin), dtype, count):
            return False
    return True
