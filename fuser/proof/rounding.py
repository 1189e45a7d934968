"""Facts about floating point types, and the nudge: constants moved by what one rounding may move them."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

_EVALUATION = 2.0**-44
"""The error of a float64 evaluation of some hundred roundings: what is judged by it is not judged finer."""
_ROW = 4.0
"""Roundings by which all weights of a row may be off together: a mean, a variance, a root and a quotient."""
_SMALL = 16
"""A constant with no more elements, all of them short numbers (1, 0.5, 224), is taken as meant: a size, a factor."""


def is_low(array: Any) -> bool:
    """Whether `array` holds floating point numbers other than float64 (bfloat16 and float8 included)."""
    return isinstance(array, np.ndarray) and array.dtype != np.float64 and is_float(array.dtype)


def is_float(dtype: Any) -> bool:
    """Whether `dtype` is a floating point type, those of ml_dtypes included."""
    return bool(dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name))


def unit_roundoff(dtype: Any) -> float:
    """The largest relative error of one rounding to `dtype`: 2**-24 for float32, 2**-11 for float16."""
    return float(_info(dtype).eps) / 2


def roundoff(dtype: Any) -> float:
    """`unit_roundoff`, but never below what a whole float64 evaluation rounds."""
    return max(unit_roundoff(dtype), _EVALUATION)


def run_roundoff(dtype: Any, terms: int) -> float:
    """The relative error of an output of `dtype` that a runtime computes as a sum of so many products.

    A sum that begins with its bias rounds at each product, to the size of the bias, however small the products are.
    Such roundings are independent, so that their sum grows with the root of their number (Higham and Mary 2019, "A
    new approach to probabilistic rounding error analysis"); sums are kept in float32, or better.
    """
    return roundoff(dtype) + math.sqrt(terms) * min(roundoff(dtype), unit_roundoff(np.float32))


def largest(dtype: Any) -> float:
    """The largest finite number of `dtype`."""
    return float(_info(dtype).max)


def tiniest(dtype: Any) -> float:
    """The spacing of the subnormal numbers of `dtype`."""
    return float(_info(dtype).smallest_subnormal)


class Nudge:
    """Moves values at random by at most `scale` roundings of their type; the same seed gives the same moves."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        self._rng = np.random.default_rng(seed)
        self._scale = scale

    def constant(self, value: Array) -> Array:
        """A constant as float64, moved by a rounding of the type in which it is stored."""
        wide = value.astype(np.float64)
        if value.size <= _SMALL and _is_short(wide):
            return wide
        moved = self._move(wide, roundoff(value.dtype))
        if value.ndim < 2 or unit_roundoff(value.dtype) > unit_roundoff(np.float32):
            return moved
        # A weight that is computed, as in weight standardization, is off by a factor for each row as well, which no
        # sum averages away.  In narrow types that would be as large as faults that are to be found.
        rows = self._rng.uniform(-1, 1, (value.shape[0], *[1] * (value.ndim - 1)))
        return np.asarray(moved * (1 + _ROW * self._scale * roundoff(value.dtype) * rows))

    def cast(self, value: Array, dtype: np.dtype[Any]) -> Array:
        """What a Cast to `dtype` gave (kept in float64), moved by the rounding that was left out."""
        if value.dtype != np.float64 or dtype == np.float64 or (value.size <= _SMALL and _is_short(value)):
            return value
        return self._move(value, roundoff(dtype))

    def _move(self, value: Array, size: float) -> Array:
        return np.asarray(value * (1 + self._scale * size * self._rng.uniform(-1, 1, value.shape)))


def _info(dtype: Any) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def _is_short(value: Array) -> bool:
    """Whether eight significant bits hold each number."""
    mantissa = np.frexp(value)[0] * 256
    return bool(np.all(mantissa == np.round(mantissa)))
