"""Kernels as values: what fits into what, and that their sum is the sum of the convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from direct import convolve
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser.affine import ChannelAffine, Constants
from fuser.kernels import Kernel, agree

RNG = np.random.default_rng(6)


def conv(
    size: tuple[int, ...] = (3, 3),
    *,
    groups: int = 1,
    stride: int = 1,
    dilation: int = 1,
    padding: Any = 1,
    channels: tuple[int, int] = (4, 4),
    rng: np.random.Generator = RNG,
) -> tuple[Kernel, dict[str, Any]]:
    """A kernel, and how to call `convolve` for it."""
    weight = rng.standard_normal((channels[1], channels[0] // groups, *size))
    constants = Constants(weight, rng.standard_normal(channels[1]))
    pads = tuple(padding if isinstance(padding, tuple) else (padding, padding) for _ in size)
    strides, dilations = (stride,) * len(size), (dilation,) * len(size)
    how = {"groups": groups, "strides": strides, "dilations": dilations, "padding": pads}
    return Kernel.conv(constants, groups, strides, dilations, pads), {"weight": weight, "bias": constants.bias, **how}


def check_sum(host: tuple[Kernel, dict[str, Any]], other: Kernel, y_other: Any, x: Any) -> None:
    kernel, how = host
    new = kernel.plus(other, np.dtype(np.float64))
    merged = convolve(x, **{**how, "weight": new.weight, "bias": new.bias})
    np.testing.assert_allclose(merged, convolve(x, **how) + y_other, rtol=1e-10, atol=1e-10)
    whole = Kernel(new.weight, new.bias, kernel.groups, kernel.strides, kernel.taps, kernel.growth)
    assert agree([kernel, other], whole, np.dtype(np.float64))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 2),
    st.sampled_from([(1, 0, 1), (3, 1, 1), (5, 2, 1), (3, 2, 2), (2, (0, 1), 1), (2, (1, 0), 1)]),
    st.sampled_from([(1, 0, 1), (3, 1, 1), (5, 2, 1), (3, 2, 2), (2, (0, 1), 1), (2, (1, 0), 1)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
)
def test_a_kernel_that_fits_adds_up(seed: int, stride: int, one: Any, two: Any, groups: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    (a, pad_a, step_a), (b, pad_b, step_b) = one, two
    host = conv((a, a), padding=pad_a, dilation=step_a, stride=stride, groups=groups, rng=rng)
    other, how = conv((b, b), padding=pad_b, dilation=step_b, stride=stride, groups=more, rng=rng)
    window, inner = set(host[0].taps[0]), set(other.taps[0])
    fits = inner <= window and more % groups == 0
    assert (other.misfit(host[0]) == "") == fits
    if fits:
        x = rng.standard_normal((4, 6, 5))
        check_sum(host, other, convolve(x, **how), x)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_pointwise_map_is_a_tap(groups: int) -> None:
    host = conv(groups=groups)
    m = ChannelAffine(RNG.standard_normal(4), RNG.standard_normal(4))
    x = RNG.standard_normal((4, 5, 5))
    other = Kernel.pointwise(m, 2)
    assert other.misfit(host[0]) == ""
    check_sum(host, other, m(x, 0), x)


def test_a_difference_is_a_sum_with_the_opposite() -> None:
    host, (other, how) = conv(), conv((1, 1), padding=0)
    x = RNG.standard_normal((4, 5, 5))
    check_sum(host, other.times(-1), -convolve(x, **how), x)
    assert other.times(1) is other


@pytest.mark.parametrize(
    ("guest", "host", "why"),
    [
        ({"channels": (4, 6)}, {}, "4 to 6 channels against 4 to 4"),
        ({"stride": 2}, {}, "strides"),
        ({"padding": 0}, {}, "sizes of their results differ"),
        ({}, {"groups": 4}, "1 groups against 4"),
        ({"channels": (6, 6), "groups": 3}, {"channels": (6, 6), "groups": 2}, "3 groups against 2"),
        ({}, {"size": (1, 1), "padding": 0}, "not inside"),
        ({"padding": (0, 2)}, {}, "not inside"),
    ],
)
def test_what_does_not_fit_says_why(guest: Any, host: Any, why: str) -> None:
    assert why in conv(**guest)[0].misfit(conv(**host)[0])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 2),
    st.sampled_from([0, 1, (2, 0)]),
    st.booleans(),
)
def test_one_kernel_after_another(seed: int, groups: int, more: int, stride: int, padding: Any, turned: bool) -> None:
    rng = np.random.default_rng(seed)
    window = conv((3, 2), groups=groups, stride=stride, padding=padding, channels=(4, 8), rng=rng)
    size = (8, 4) if turned else (4, 4)
    pointwise = conv((1, 1), groups=more, padding=0, channels=size[::-1] if not turned else size, rng=rng)
    (first, how_first), (second, how_second) = (window, pointwise) if turned else (pointwise, window)
    if second.pads:
        how_first["bias"] = np.zeros_like(how_first["bias"])
        first = Kernel(first.weight, how_first["bias"], first.groups, first.strides, first.taps, first.growth)
    both = second.after(first)
    assert both is not None
    assert (both.inputs, both.outputs, both.groups) == (4, second.outputs, math.gcd(groups, more))
    x = rng.standard_normal((4, 6, 5))
    how = {"groups": both.groups, "strides": both.strides, "padding": window[1]["padding"]}
    expected = convolve(convolve(x, **how_first), **how_second)
    np.testing.assert_allclose(convolve(x, both.weight, both.bias, **how), expected, rtol=1e-10, atol=1e-10)
    assert (both.taps, both.growth) == (window[0].taps, window[0].growth)


def test_what_is_no_kernel_after_another() -> None:
    (window, _), (pointwise, _), (strided, _) = conv(), conv((1, 1), padding=0), conv((1, 1), padding=0, stride=2)
    assert window.after(window) is None
    assert window.after(pointwise) is None  # it pads where the other one adds a bias
    assert pointwise.after(window) is not None
    assert strided.after(window) is None
    assert conv(padding=0)[0].after(pointwise) is not None
    assert (window.pads, window.is_pointwise, strided.is_pointwise, pointwise.pads) == (True, False, False, False)


def test_the_window_sees_a_wrong_sum() -> None:
    (host, _), (other, _) = conv(), conv((1, 1), padding=0)
    new = host.plus(other, np.dtype(np.float32))

    def accepted(weight: Any, bias: Any) -> bool:
        merged = Kernel(weight, bias, host.groups, host.strides, host.taps, host.growth)
        return agree([host, other], merged, np.dtype(np.float32))

    assert accepted(new.weight, new.bias)
    assert not accepted(np.roll(new.weight, 1, axis=3), new.bias)
    assert not accepted(new.weight, host.bias)
    assert not accepted(host.weight, new.bias)
    assert not accepted(new.weight * 1.001, new.bias)
    assert not accepted(np.full_like(new.weight, np.nan), new.bias)


def test_the_sum_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    (host, _), (other, _) = conv(), conv((1, 1), padding=0)
    whole = host.plus(other, np.dtype(np.float64))
    monkeypatch.setattr("fuser.affine.CHUNK", 40)
    np.testing.assert_array_equal(host.plus(other, np.dtype(np.float64)).weight, whole.weight)
