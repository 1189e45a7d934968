"""One linear operator after another as one: the constants of their product.

    y = B (A x + a) + b   =   (B A) x + (B a + b)

One of the two is *pointwise* (a matrix product, or a convolution with a kernel of one element), so that the product
has the kernel of the other.  Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fuser import affine as algebra
from fuser.affine import Array, Constants, WeightLayout
from fuser.kernels import Kernel


@dataclass(frozen=True, eq=False)
class Factor:
    """The constants of one operator, and where the channels are in its weight; a bias is [Cout]."""

    constants: Constants
    layout: WeightLayout

    @property
    def groups(self) -> int:
        return self.layout.groups

    @property
    def outputs(self) -> int:
        return self.layout.outputs(self.constants.weight.shape)

    @property
    def inputs(self) -> int:
        return self.layout.inputs(self.constants.weight.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.constants.weight.shape[2:])

    @property
    def size(self) -> int:
        """How many numbers the weight has: what is multiplied and added for one position."""
        return int(self.constants.weight.size)

    def rows(self) -> Array:
        """alpha * weight in float64: [Cout, Cin/groups, *kernel]."""
        weight = self.constants.weight.astype(np.float64) * self.constants.alpha
        return _turned(weight, self.groups) if self.layout.transposed else weight

    def at(self, channel: int) -> tuple[Array, slice]:
        """The weights [Cin/groups, taps] of one output channel, and the inputs they meet; found by another way."""
        weight, block = self.layout.window(self.constants.weight, channel)
        taps = weight.astype(np.float64).reshape(block.stop - block.start, -1)
        return taps * self.constants.alpha, block


def into_first(first: Factor, second: Factor) -> Constants:
    """The product with the groups and the layout of the first; the second is pointwise, its groups a multiple."""
    a, b, groups = first.rows(), second.rows(), second.groups
    product = b.reshape(groups, second.outputs // groups, -1) @ a.reshape(groups, first.outputs // groups, -1)
    return _constants(product.reshape(second.outputs, *a.shape[1:]), first, second, first.layout)


def into_second(first: Factor, second: Factor) -> Constants:
    """The product with the groups and the layout of the second; the first is pointwise, its groups a multiple.

    Where the second pads with zeros, the first must have no bias: what it makes of zeros has to be zero.
    """
    groups = second.groups
    a = Kernel(first.rows().reshape(first.outputs, -1), first.constants.bias, first.groups).regrouped(groups)
    b = second.rows()
    taps = b.reshape(groups, second.outputs // groups, second.inputs // groups, -1)
    product = taps.swapaxes(2, 3) @ a.reshape(groups, 1, first.outputs // groups, -1)
    rows = product.swapaxes(2, 3).reshape(second.outputs, first.inputs // groups, *b.shape[2:])
    return _constants(rows, first, second, second.layout)


def _constants(rows: Array, first: Factor, second: Factor, layout: WeightLayout) -> Constants:
    dtype = second.constants.weight.dtype
    bias = second.constants.bias + second.constants.alpha * algebra.carried(
        second.constants.weight, first.constants.bias, second.layout
    )
    weight = _turned(rows, layout.groups) if layout.transposed else rows
    return Constants(np.ascontiguousarray(algebra.rounded(weight, dtype)), algebra.rounded(bias, dtype))


def _turned(weight: Array, groups: int) -> Array:
    """[Cin, Cout/groups, *kernel] of [Cout, Cin/groups, *kernel], and the other way round."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
    turned: Array = blocks.reshape(-1, *blocks.shape[2:])
    return turned


def agree(first: Factor, second: Factor, product: Factor) -> bool:
    """Whether the product does what the two did, on one window and a few channels, up to rounding."""
    weight = product.constants.weight
    x = algebra.sample_inputs(first.inputs * math.prod(product.kernel)).reshape(first.inputs, -1)
    for channel in {0, product.outputs // 2, product.outputs - 1} if product.outputs else ():
        taps, block = second.at(channel)
        value = size = 0.0
        for weights, hidden in zip(taps, range(block.start, block.stop), strict=True):
            inner, seen = first.at(hidden)
            products = inner * x[seen]
            # Where the second has the kernel, it meets a hidden value at each of its taps.
            axis = 0 if math.prod(second.kernel) > 1 else None
            bias = float(first.constants.bias[hidden])
            value += float((weights * (products.sum(axis=axis) + bias)).sum())
            size += float((np.abs(weights) * (np.abs(products).sum(axis=axis) + abs(bias))).sum())
        value, size = value + float(second.constants.bias[channel]), size + abs(float(second.constants.bias[channel]))
        taps, block = product.at(channel)
        bias = float(product.constants.bias[channel])
        found, new_size = float((taps * x[block]).sum()) + bias, float(np.abs(taps * x[block]).sum()) + abs(bias)
        if not algebra.are_close((value, size), (found, new_size), weight.dtype, x.size):
            return False
    return True
