"""The algebra on arrays alone, against a convolution written out in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from direct import convolve
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser import affine
from fuser.affine import ChannelAffine, Constants, WeightLayout

Array = np.ndarray[Any, Any]

seeds = st.integers(0, 2**32 - 1)


def random_map(rng: np.random.Generator, channels: int) -> ChannelAffine:
    return ChannelAffine(rng.standard_normal(channels), rng.standard_normal(channels))


# -- maps


@given(seeds, st.integers(1, 5))
def test_composition_is_evaluation_in_turn_and_associates(seed: int, channels: int) -> None:
    rng = np.random.default_rng(seed)
    f, g, h = (random_map(rng, channels) for _ in range(3))
    x = rng.standard_normal((2, channels, 3))
    np.testing.assert_allclose(f.then(g)(x, 1), g(f(x, 1), 1), rtol=1e-9, atol=1e-9)
    left, right = f.then(g).then(h), f.then(g.then(h))
    np.testing.assert_allclose(left.scale, right.scale, rtol=1e-12)
    np.testing.assert_allclose(left.shift, right.shift, rtol=1e-9, atol=1e-12)
    for same in (f.then(ChannelAffine.identity(channels)), ChannelAffine.identity(channels).then(f)):
        np.testing.assert_array_equal(same.scale, f.scale)
        np.testing.assert_array_equal(same.shift, f.shift)


@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_split_is_undone_by_join(seed: int, sizes: list[int]) -> None:
    whole = random_map(np.random.default_rng(seed), sum(sizes))
    parts = whole.split(sizes)
    assert [part.channels for part in parts] == sizes
    np.testing.assert_array_equal(ChannelAffine.join(parts).scale, whole.scale)
    np.testing.assert_array_equal(ChannelAffine.join(parts).shift, whole.shift)


@pytest.mark.parametrize("missing", ["none", "scale", "bias"])
def test_batch_norm_is_the_formula(missing: str) -> None:
    rng = np.random.default_rng(1)
    scale, bias, mean = rng.standard_normal((3, 4)).astype(np.float32)
    var = rng.uniform(0.1, 2, 4).astype(np.float32)
    x = rng.standard_normal((2, 4, 3))
    found = ChannelAffine.from_batch_norm(
        None if missing == "scale" else scale, None if missing == "bias" else bias, mean, var, 0.25
    )
    c = (slice(None), np.newaxis)
    expected = (x - mean[c]) / np.sqrt(var.astype(np.float64)[c] + 0.25)
    expected = expected * (1 if missing == "scale" else scale[c]) + (0 if missing == "bias" else bias[c])
    np.testing.assert_allclose(found(x, 1), expected, rtol=1e-12, atol=1e-12)
    assert found.scale.dtype == np.float64


def test_batch_norm_without_variance_and_epsilon_is_not_finite() -> None:
    one = np.ones(2)
    assert not ChannelAffine.from_batch_norm(one, one, one, np.array([1.0, 0.0]), 0.0).is_finite
    assert ChannelAffine.from_batch_norm(one, one, one, np.array([1.0, 0.0]), 1e-5).is_finite


def test_only_a_scalar_can_be_resized() -> None:
    scalar = ChannelAffine(np.array([2.0]), np.array([3.0])).sized(3)
    assert scalar.scale.tolist() == [2, 2, 2]
    assert scalar.shift.tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="a map of 3 channels does not fit 4"):
        scalar.sized(4)


# -- linear operators

LAYERS = st.tuples(
    seeds,
    st.integers(1, 3),  # groups
    st.integers(1, 2),  # inputs of a group
    st.integers(1, 2),  # outputs of a group
    st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),  # kernel
    st.booleans(),  # transposed
    st.integers(1, 2),  # stride
    st.integers(1, 2),  # dilation
)


@settings(max_examples=60, deadline=None)
@given(LAYERS)
def test_a_map_after_a_convolution_is_in_its_constants(layer: Any) -> None:
    seed, groups, inputs, outputs, kernel, transposed, stride, dilation = layer
    rng = np.random.default_rng(seed)
    layout = WeightLayout(transposed, groups)
    shape = (inputs * groups, outputs, *kernel) if transposed else (outputs * groups, inputs, *kernel)
    weight, bias = rng.standard_normal(shape), rng.standard_normal(outputs * groups)
    assert (layout.inputs(shape), layout.outputs(shape)) == (inputs * groups, outputs * groups)
    x = rng.standard_normal((inputs * groups, *[6] * len(kernel)))
    how = {
        "groups": groups,
        "transposed": transposed,
        "strides": (stride,) * len(kernel),
        "dilations": (dilation,) * len(kernel),
    }
    m = random_map(rng, outputs * groups)
    new = affine.scaled(weight, layout.along_outputs(m.scale, shape), weight.dtype)
    new_bias = bias * m.scale + m.shift
    np.testing.assert_allclose(
        convolve(x, new, new_bias, **how), m(convolve(x, weight, bias, **how), 0), rtol=1e-9, atol=1e-9
    )
    assert affine.agree(Constants(weight, bias), Constants(new, new_bias), layout, after=m)


@settings(max_examples=60, deadline=None)
@given(LAYERS)
def test_a_map_before_a_convolution_is_in_its_constants(layer: Any) -> None:
    seed, groups, inputs, outputs, kernel, transposed, stride, dilation = layer
    rng = np.random.default_rng(seed)
    layout = WeightLayout(transposed, groups)
    shape = (inputs * groups, outputs, *kernel) if transposed else (outputs * groups, inputs, *kernel)
    weight, bias = rng.standard_normal(shape), rng.standard_normal(outputs * groups)
    x = rng.standard_normal((inputs * groups, *[6] * len(kernel)))
    how = {
        "groups": groups,
        "transposed": transposed,
        "strides": (stride,) * len(kernel),
        "dilations": (dilation,) * len(kernel),
    }
    m = random_map(rng, inputs * groups)
    if transposed:  # at the border not every tap meets an input, so a shift has no constant
        m = m.scale_only()
    new = affine.scaled(weight, layout.along_inputs(m.scale, shape), weight.dtype)
    new_bias = bias + affine.carried(weight, m.shift, layout)
    np.testing.assert_allclose(
        convolve(x, new, new_bias, **how), convolve(m(x, 0), weight, bias, **how), rtol=1e-9, atol=1e-9
    )
    assert affine.agree(Constants(weight, bias), Constants(new, new_bias), layout, before=m)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_product_is_rounded_once(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((8, 3)).astype(dtype)
    factor = rng.standard_normal((8, 1))
    found = affine.scaled(weight, factor, weight.dtype)
    assert found.dtype == weight.dtype
    expected = (weight.astype(np.float64) * factor).astype(dtype)
    assert found.tobytes() == expected.tobytes()


def test_overflow_is_seen_and_not_warned_of() -> None:
    weight = np.full((2, 2), 6e4, np.float16)
    assert not affine.is_finite(affine.scaled(weight, np.array([[1.0], [2.0]]), weight.dtype))
    assert affine.is_finite(affine.scaled(weight, np.array([[1.0], [0.5]]), weight.dtype))
    assert not affine.is_finite(affine.rounded(np.array(1e6), np.dtype(np.float16)))


def test_the_sum_over_a_kernel_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    for layout, shape in ((WeightLayout(False, 2), (8, 3, 2)), (WeightLayout(True, 2), (6, 4, 2))):
        weight, shift = rng.standard_normal(shape), rng.standard_normal(6)
        whole = affine.carried(weight, shift, layout)
        monkeypatch.setattr(affine, "CHUNK", 4)
        np.testing.assert_allclose(affine.carried(weight, shift, layout), whole, rtol=1e-12)
        monkeypatch.undo()


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
FACTORS = [(6, 1, 1), (1, 4, 1), (6, 4, 1), (1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FACTORS)
def test_a_part_of_a_product_is_that_part_of_the_whole(shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(5)
    weight, factor = rng.standard_normal((6, 4, 3)).astype(dtype), rng.standard_normal(shape)
    product = affine.Scaled(weight, factor)
    whole = affine.scaled(weight, factor, weight.dtype)
    assert (product.shape, product.dtype, product.size, product.nbytes) == (
        whole.shape,
        whole.dtype,
        whole.size,
        whole.nbytes,
    )
    assert np.asarray(product).tobytes() == whole.tobytes()
    for index in ([0, 3, 5], (slice(2, 4), 1), slice(1, 5)):
        assert product[index].tobytes() == whole[index].tobytes()
    for rows in (slice(0, 6), slice(2, 5), slice(5, 6)):
        assert product.rows(weight[rows], rows).tobytes() == whole[rows].tobytes()


@pytest.mark.parametrize("shape", FACTORS)
@pytest.mark.parametrize("spoilt", [None, np.inf, -np.inf, np.nan, 6e4, -6e4])
def test_whether_a_product_is_finite_is_told_by_all_its_elements(
    spoilt: float | None, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affine, "CHUNK", 5)
    rng = np.random.default_rng(6)
    for place in ((0, 0, 0), (5, 3, 2), (3, 1, 1)):
        weight, factor = rng.uniform(-1, 1, (6, 4, 3)).astype(np.float16), rng.uniform(0.5, 1, shape)
        factor.reshape(-1)[-1] = -2.0  # the largest factor may meet the largest element, or not
        if spoilt is not None:
            weight[place] = spoilt
        whole = affine.scaled(weight, factor, weight.dtype)
        assert affine.is_finite(affine.Scaled(weight, factor)) == bool(np.isfinite(whole).all())


# -- the check of one window

LAYOUTS = [(WeightLayout(), (6, 6, 3)), (WeightLayout(True), (6, 6, 3)), (WeightLayout(groups=2), (6, 3, 3))]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_the_window_accepts_rounding_and_nothing_else(layout: WeightLayout, shape: Any, dtype: Any) -> None:
    rng = np.random.default_rng(4)
    weight, bias = rng.standard_normal(shape).astype(dtype), rng.standard_normal(6)
    m = random_map(rng, 6)
    old, right = Constants(weight, bias), affine.scaled(weight, layout.along_outputs(m.scale, shape), weight.dtype)
    right_bias = affine.rounded(bias * m.scale + m.shift, weight.dtype)
    assert affine.agree(old, Constants(right, right_bias), layout, after=m)
    wrong_axis = affine.scaled(weight, layout.along_inputs(m.scale, shape), weight.dtype)
    assert not affine.agree(old, Constants(wrong_axis, right_bias), layout, after=m)
    assert not affine.agree(old, Constants(right, np.zeros(6, dtype)), layout, after=m)
    assert not affine.agree(old, Constants(weight, right_bias), layout, after=m)
    for shape_of_factor, fine in ((layout.along_outputs, True), (layout.along_inputs, False)):
        product = affine.Scaled(weight, shape_of_factor(m.scale, shape))
        assert affine.agree(old, affine.NewConstants(product, right_bias), layout, after=m) == fine
    spoilt = right.copy()
    spoilt.reshape(-1)[0] = float(spoilt.reshape(-1)[0]) * 2 + 1
    assert not affine.agree(old, Constants(spoilt, right_bias), layout, after=m)
    spoilt.reshape(-1)[0] = np.nan
    assert not affine.agree(old, Constants(spoilt, right_bias), layout, after=m)
