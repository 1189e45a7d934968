"""A convolution written out in float64, for the algebra to be held against."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def convolve(
    x: Array,
    weight: Array,
    bias: Array,
    *,
    groups: int = 1,
    strides: tuple[int, ...] = (),
    dilations: tuple[int, ...] = (),
    padding: tuple[tuple[int, int], ...] = (),
    transposed: bool = False,
) -> Array:
    """A convolution of [Cin, *spatial], element by element as it is defined."""
    axes = x.ndim - 1
    strides, dilations = strides or (1,) * axes, dilations or (1,) * axes
    padding = padding or ((0, 0),) * axes
    if transposed:
        return _convolve_transposed(x, weight, bias, groups, strides, dilations)
    x = np.pad(x, [(0, 0), *padding])
    kernel = weight.shape[2:]
    size = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[1:], dilations, kernel, strides, strict=True)]
    y = np.zeros((weight.shape[0], *size))
    for c in range(weight.shape[0]):
        first = c // (weight.shape[0] // groups) * weight.shape[1]
        for o in itertools.product(*map(range, size)):
            total = float(bias[c])
            for i, k in itertools.product(range(weight.shape[1]), itertools.product(*map(range, kernel))):
                at = tuple(a * s + b * d for a, s, b, d in zip(o, strides, k, dilations, strict=True))
                total += float(weight[c][i][k]) * x[first + i][at]
            y[(c, *o)] = total
    return y


def _convolve_transposed(x: Array, weight: Array, bias: Array, groups: int, strides: Any, dilations: Any) -> Array:
    kernel, outputs = weight.shape[2:], weight.shape[1] * groups
    size = [(n - 1) * s + d * (k - 1) + 1 for n, d, k, s in zip(x.shape[1:], dilations, kernel, strides, strict=True)]
    y = np.zeros((outputs, *size)) + bias.reshape(-1, *[1] * len(size))
    for i in range(x.shape[0]):
        first = i // (x.shape[0] // groups) * weight.shape[1]
        for c, o in itertools.product(range(weight.shape[1]), itertools.product(*map(range, x.shape[1:]))):
            for k in itertools.product(*map(range, kernel)):
                at = tuple(a * s + b * d for a, s, b, d in zip(o, strides, k, dilations, strict=True))
                y[(first + c, *at)] += float(weight[(i, c, *k)]) * x[(i, *o)]
    return y
