"""The check of one rewrite's constants on a random window."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fuser.proof.window import agree, field, in_range

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
RNG = np.random.default_rng(5)


def window(dtype: type, *, factor: float = 1.0, offset: float = 0.0, spread: float = 1.0) -> str | None:
    """A convolution's window and a BatchNorm, against the fold of the two as it would be stored."""
    weight = RNG.standard_normal((16, 27)).astype(dtype).astype(np.float64)
    mean, scale = RNG.standard_normal(16) * spread, RNG.uniform(0.5, 2, 16)
    x = field((27,), seed=3)
    expected = (weight @ x - mean) * scale
    magnitude = (np.abs(weight) @ np.abs(x) + np.abs(mean)) * scale
    folded = (weight * scale[:, None]).astype(dtype).astype(np.float64)
    bias = (-mean * scale).astype(dtype).astype(np.float64)
    folded[3] *= factor
    bias[5] += offset
    return agree(expected, folded @ x + bias, magnitude, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 1000.0])
def test_a_right_fold_agrees_whatever_cancels(dtype: type, spread: float) -> None:
    for _ in range(20):
        assert window(dtype, spread=spread) is None


@pytest.mark.parametrize(("dtype", "factor"), [(np.float32, 1.001), (np.float16, 1.1), (ml_dtypes.bfloat16, 2.0)])
def test_one_wrong_channel_is_named(dtype: type, factor: float) -> None:
    problem = window(dtype, factor=factor)
    assert problem is not None and "at [3]" in problem and np.dtype(dtype).name in problem


def test_a_wrong_bias_is_named() -> None:
    problem = window(np.float32, offset=0.01)
    assert problem is not None and "at [5]" in problem


def test_shapes_and_infinities_are_told() -> None:
    ones = np.ones(3)
    assert agree(ones, np.ones(4), ones, np.float32) == "the new constants give shape [4] instead of [3]"
    assert agree(ones, np.array([1, np.inf, 1]), ones, np.float32) == "the new constants are not finite"


def test_range_is_that_of_the_stored_type() -> None:
    assert in_range(np.array([60000.0]), np.float16, "weight") is None
    assert "beyond the range of float16" in str(in_range(np.array([70000.0]), np.float16, "weight"))
    assert in_range(np.array([70000.0]), ml_dtypes.bfloat16, "weight") is None
    assert in_range(np.array([np.nan]), np.float32, "bias") == "the new bias is not finite"
    assert in_range(np.array([]), np.float32, "bias") is None
