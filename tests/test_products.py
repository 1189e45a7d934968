"""The product of two linear operators, held against both of them written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from direct import convolve
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser.affine import Constants, WeightLayout
from fuser.products import Factor, agree, into_first, into_second

groups = st.sampled_from([1, 2, 4])


def factor(
    rng: np.random.Generator, inputs: int, outputs: int, kernel: tuple[int, ...], groups: int, transposed: bool
) -> Factor:
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    constants = Constants(rng.standard_normal((*shape, *kernel)), rng.standard_normal(outputs), rng.choice([1.0, -2.0]))
    return Factor(constants, WeightLayout(transposed, groups))


def apply(one: Factor, x: Any, **how: Any) -> Any:
    weight, bias, alpha = one.constants
    return convolve(x, weight * alpha, bias, groups=one.groups, transposed=one.layout.transposed, **how)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), groups, groups, st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
def test_a_pointwise_operator_after_another(seed: int, one: int, more: int, transposed: bool, kernel: Any) -> None:
    rng = np.random.default_rng(seed)
    first = factor(rng, 4, 8, kernel, one, transposed)
    second = factor(rng, 8, 4, (1,) * len(kernel), one * more if one * more <= 4 else one, False)
    x = rng.standard_normal((4, *[4] * len(kernel)))
    how: dict[str, Any] = {"strides": (2,) * len(kernel)}
    if not transposed:
        how["padding"] = ((1, 2),) * len(kernel)
    new = Factor(into_first(first, second), first.layout)
    check(apply(new, x, **how), apply(second, apply(first, x, **how)), (first, second, new))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), groups, groups, st.booleans(), st.booleans(), st.sampled_from([(), (3,), (2, 3)])
)  # fmt: skip
def test_a_pointwise_operator_before_another(
    seed: int, one: int, more: int, transposed: bool, padded: bool, kernel: Any
) -> None:
    rng = np.random.default_rng(seed)
    first = factor(rng, 4, 8, (1,) * len(kernel), one * more if one * more <= 4 else one, False)
    second = factor(rng, 8, 4, kernel, one, transposed)
    how: dict[str, Any] = {"strides": (2,) * len(kernel)}
    if transposed or padded:  # then what is beside the input has to be zero
        first = replace(first, constants=first.constants._replace(bias=np.zeros(8)))
    if not transposed and padded:
        how["padding"] = ((1, 2),) * len(kernel)
    x = rng.standard_normal((4, *[4] * len(kernel)))
    new = Factor(into_second(first, second), second.layout)
    check(apply(new, x, **how), apply(second, apply(first, x), **how), (first, second, new))


def check(found: Any, expected: Any, factors: tuple[Factor, Factor, Factor]) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert agree(*factors)


@pytest.mark.parametrize("first_stays", [True, False])
def test_the_window_sees_a_wrong_product(first_stays: bool) -> None:
    rng = np.random.default_rng(4)
    kernels = [(3, 3), (1, 1)] if first_stays else [(1, 1), (3, 3)]
    first, second = (factor(rng, 4, 4, kernel, 2, False) for kernel in kernels)
    new = (into_first if first_stays else into_second)(first, second)

    def accepted(weight: Any, bias: Any) -> bool:
        return agree(first, second, Factor(Constants(weight.astype(np.float32), bias), WeightLayout(groups=2)))

    weight, bias = new.weight, new.bias
    assert accepted(weight, bias)
    assert not accepted(np.roll(weight, 1, axis=3), bias)
    assert not accepted(np.roll(weight, 1, axis=1), bias)
    assert not accepted(np.roll(weight, 1, axis=0), bias)
    assert not accepted(weight * 1.001, bias)
    assert not accepted(weight, bias + 0.01)
    assert not accepted(weight, second.constants.bias)
    assert not accepted(np.full_like(weight, np.nan), bias)
