"""The check of one rewrite before it is accepted: its constants, on one random receptive field, in float64.

    expected   what the original ops compute on the field, in exact constants
    actual     what the new op computes with its constants as stored
    magnitude  the sum of |terms| of which each element of `expected` is made

A right rewrite moves each term by a rounding or two of the stored type, so
|actual - expected| <= ROUNDINGS * u * magnitude, whatever cancels.  A wrong axis, sign, scale or epsilon does not
stay within that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fuser.proof.rounding import largest, tiniest, unit_roundoff

Array = np.ndarray[Any, Any]

ROUNDINGS = 4.0
"""Roundings that are allowed to each term: the new constant's own, and as many again for its inputs'."""


def agree(expected: Array, actual: Array, magnitude: Array, dtype: Any) -> str | None:
    """None when `actual` is right within the rounding of `dtype`, else a sentence for a person.

    All three are float64 and of one shape; `magnitude` is never negative.
    """
    if expected.shape != actual.shape:
        return f"the new constants give shape {list(actual.shape)} instead of {list(expected.shape)}"
    if not np.isfinite(actual).all():
        return "the new constants are not finite"
    error = np.abs(actual - expected)
    allowed = ROUNDINGS * unit_roundoff(dtype) * (magnitude + np.abs(expected)) + tiniest(dtype) * 4
    wrong = error > allowed
    if not wrong.any():
        return None
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(np.where(wrong, error / allowed, 0))), error.shape))
    return (
        f"the new constants give {actual[place]:.6g} at {list(place)} of a random window where the original gives "
        f"{expected[place]:.6g}; rounding to {np.dtype(dtype).name} explains {allowed[place]:.2g}"
    )


def in_range(values: Array, dtype: Any, name: str) -> str | None:
    """None when `values` (float64) are finite and fit into `dtype`, else a sentence for a person."""
    if not np.isfinite(values).all():
        return f"the new {name} is not finite"
    if values.size and float(np.abs(values).max()) > largest(dtype):
        return f"the new {name} reaches {np.abs(values).max():.3g}, beyond the range of {np.dtype(dtype).name}"
    return None


def field(shape: tuple[int, ...], seed: int = 0) -> Array:
    """A random input of `shape`, standard normal, in float64."""
    return np.random.default_rng(seed).standard_normal(shape)
