"""The rule by which an output is judged, and the figures that are shown."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fuser.proof.compare import FACTOR, Figures, Judge, bit_identical, figures
from fuser.proof.rounding import Nudge, run_roundoff, unit_roundoff

RNG = np.random.default_rng(7)
U = unit_roundoff(np.float32)
TRUTH = RNG.standard_normal((2, 8, 16, 16))
NOISE = 1e-4


def noisy(size: float = NOISE, truth: np.ndarray = TRUTH) -> np.ndarray:
    return truth + size * RNG.standard_normal(truth.shape)


def test_noise_like_the_originals_passes_and_more_does_not() -> None:
    judge = Judge(TRUTH, [noisy()], U)
    assert 0.9 / FACTOR < judge.judge(noisy()).excess < 2 / FACTOR
    assert judge.judge(noisy(2 * NOISE)).fine
    assert not judge.judge(noisy(2 * FACTOR * NOISE)).fine


def test_without_noise_a_rounding_of_the_output_is_allowed_and_not_much_more() -> None:
    assert Judge(TRUTH, [], U).judge(TRUTH * (1 + U)).fine
    assert not Judge(TRUTH, [], U).judge(TRUTH * (1 + 8 * U)).fine
    assert Judge(TRUTH, [], unit_roundoff(np.float16)).judge(TRUTH.astype(np.float16)).fine


def test_a_sum_may_begin_with_a_bias_far_larger_than_its_products() -> None:
    products = np.float32(1e-3) * RNG.standard_normal((576, 8, 64)).astype(np.float32)
    bias = RNG.uniform(1, 2, (8, 1)).astype(np.float32)
    truth = bias + products.sum(0, np.float64)
    candidate = np.broadcast_to(bias, truth.shape)
    for product in products:
        candidate = candidate + product  # as the kernels of some processors do
    original = (bias + products.sum(0)).astype(np.float32)
    assert candidate.dtype == np.float32
    assert not Judge(truth, [original], U).judge(candidate).fine
    judge = Judge(truth, [original], run_roundoff(np.float32, 576))
    assert judge.judge(candidate).fine
    assert not judge.judge(truth * (1 + 2e-5)).fine
    assert run_roundoff(np.float16, 576) < 1.01 * unit_roundoff(np.float16)  # its sums are of float32


def test_one_channel_is_not_lost_among_large_ones() -> None:
    scales = np.array([1e3] * 7 + [1e-3]).reshape(1, 8, 1, 1)
    truth = TRUTH * scales
    candidate = truth.copy()
    candidate[:, 7] *= 1.01
    assert np.abs(candidate - truth).max() < U * np.abs(truth).max()  # invisible to a single number
    assert not Judge(truth, [], U).judge(candidate).fine


def test_a_shift_below_the_largest_error_is_seen_by_the_mean() -> None:
    row = TRUTH.reshape(-1)
    original = noisy(truth=row)
    original[0] += 100 * NOISE  # one outlier must not buy everything else a hundredfold
    assert not Judge(row, [original], U).judge(row + 50 * NOISE).fine


def test_one_wrong_element_is_seen_by_the_largest_error() -> None:
    row = TRUTH.reshape(-1)
    candidate = noisy(truth=row)
    candidate[17] += 100 * NOISE  # too little to move the mean of thousands
    assert not Judge(row, [noisy(truth=row)], U).judge(candidate).fine


def test_nan_and_infinity_stand_where_a_right_evaluation_has_them() -> None:
    truth = np.array([1.0, np.nan, np.inf, 70000.0, 2.0])
    overflown = np.array([1.0, np.nan, np.inf, np.inf, 2.0])
    assert Judge(truth, [overflown], U).judge(overflown).fine
    assert Judge(truth, [overflown], U).judge(truth).fine
    for place, value in ((0, np.nan), (1, 1.0), (2, -np.inf), (4, np.inf)):
        wrong = overflown.copy()
        wrong[place] = value
        problem = Judge(truth, [overflown], U).judge(wrong)
        assert not problem.fine and f"[{place}]" in problem.problem
    assert not Judge(truth, [truth], U).judge(overflown).fine


def test_integers_are_equal_but_where_right_evaluations_disagree() -> None:
    truth, tie = np.array([3, 1, 4]), np.array([3, 2, 4])
    assert Judge(truth, [truth], 0.0).judge(truth).fine
    assert not Judge(truth, [truth], 0.0).judge(tie).fine
    assert Judge(truth, [tie], 0.0).judge(np.array([3, 7, 4])).fine
    assert not Judge(truth, [tie], 0.0).judge(np.array([3, 2, 5])).fine
    words = np.array(["a", "b"], object)
    assert Judge(words, [], 0.0).judge(words.copy()).fine
    assert not Judge(words, [], 0.0).judge(np.array(["a", "c"], object)).fine


def flipped(mask: np.ndarray, count: int, seed: int) -> np.ndarray:
    places = np.random.default_rng(seed).choice(mask.size, count, replace=False)
    other = mask.copy()
    other.reshape(-1)[places] ^= True
    return other


def test_among_many_integers_each_right_evaluation_differs_somewhere_else() -> None:
    mask = RNG.random((1, 4, 256, 256)) < 0.5
    judge = Judge(mask, [flipped(mask, 5, seed) for seed in range(8)], 0.0)
    assert judge.judge(flipped(mask, 9, 100)).fine
    assert not judge.judge(flipped(mask, 500, 100)).fine
    channel = mask.copy()
    channel[0, 2, :8, :8] ^= True
    assert not judge.judge(channel).fine
    assert Judge(mask, [mask], 0.0).judge(flipped(mask, 3, 100)).fine  # of a quarter of a million
    assert not Judge(mask, [mask], 0.0).judge(flipped(mask, 9, 100)).fine
    few = mask.reshape(-1)[:30]
    assert not Judge(few, [flipped(few, 1, seed) for seed in range(8)], 0.0).judge(flipped(few, 2, 100)).fine


def test_integers_that_rounding_decides_are_judged_as_numbers() -> None:
    truth = (TRUTH * 1e8).astype(np.int64)
    judge = Judge(truth, [(noisy(1e-7) * 1e8).astype(np.int64) for _ in range(2)], 0.0)
    assert judge.judge((noisy(1e-7) * 1e8).astype(np.int64)).fine
    assert not judge.judge((TRUTH * 1.01e8).astype(np.int64)).fine
    words = Judge(np.array(["a"] * 40, object), [np.array(["b"] * 40, object)], 0.0).judge(np.array(["c"] * 40, object))
    assert words.fine and words.noise == 1.0  # which proves nothing


@pytest.mark.parametrize("mask", [-1e9, float(np.finfo(np.float32).min)])
def test_a_mask_hides_nothing(mask: float) -> None:
    kept = np.tril(np.ones((40, 40), bool))
    scores = RNG.standard_normal((40, 40))
    truth, wrong = np.where(kept, scores, mask), np.where(kept, scores * 1.01, mask)
    original = np.where(kept, scores * (1 + U), mask)
    assert Judge(truth, [original], U).judge(np.where(kept, scores * (1 - U), mask)).fine
    assert not Judge(truth, [original], U).judge(wrong).fine


def test_another_shape_fails_unless_rounding_decides_the_shape() -> None:
    judgement = Judge(TRUTH, [TRUTH], U).judge(TRUTH[:1])
    assert judgement.excess == math.inf and "shape [1, 8, 16, 16] instead of [2, 8, 16, 16]" in judgement.problem
    assert Judge(np.arange(4), [np.arange(5)], 0.0).judge(np.arange(5)).fine


def test_a_scalar_and_an_empty_output() -> None:
    assert Judge(np.array(1.0), [np.array(1.0 + U)], U).judge(np.array(1.0 + 8 * U)).fine
    assert not Judge(np.array(1.0), [np.array(1.0 + U)], U).judge(np.array(1.0 + 40 * U)).fine
    assert Judge(np.zeros((0, 3)), [], U).judge(np.zeros((0, 3))).fine


def test_exact_means_the_same_bits() -> None:
    values = np.array([0.0, np.nan, 1.0], np.float32)
    assert bit_identical(values.copy(), values).fine
    assert not bit_identical(np.array([-0.0, np.nan, 1.0], np.float32), values).fine
    assert not bit_identical(np.nextafter(values, 2, dtype=np.float32), values).fine
    assert not bit_identical(values.astype(np.float64), values).fine
    assert not bit_identical(values[None], values).fine
    words = np.array(["a"], object)
    assert bit_identical(words.copy(), words).fine and not bit_identical(np.array(["b"], object), words).fine


def test_figures_by_hand() -> None:
    reference = np.array([[1.0, 2.0, 4.0], [4.0, 2.0, 1.0]])
    candidate = reference.astype(np.float32)
    candidate[0, 2] = 3.0
    candidate[1, 1] = 4.5
    shown = figures("y", candidate, reference, reference.astype(np.float32))
    assert shown.max_abs == 2.5 and shown.relative == 2.5 / 4 and shown.original == 0.0
    assert shown.ulp == pytest.approx(2.5 / 4 * 2**23)
    assert shown.snr_db == pytest.approx(10 * math.log10(42 / 7.25))
    assert shown.top1 == 0.5
    assert shown.cosine == pytest.approx((1 + 4 + 12 + 16 + 9 + 1) / math.sqrt(42 * (1 + 4 + 9 + 16 + 20.25 + 1)))
    same = figures("y", reference, reference, None)
    assert (same.max_abs, same.snr_db, same.top1) == (0.0, math.inf, 1.0) and same.cosine == pytest.approx(1)
    assert figures("n", np.array([1, 2]), np.array([1, 3]), None).mismatches == 1


def test_figures_of_bfloat16_and_of_the_worst_set() -> None:
    reference = RNG.standard_normal(50)
    shown = figures("y", reference.astype(ml_dtypes.bfloat16), reference, None)
    assert 0 < shown.ulp <= 1 and shown.dtype == "bfloat16"
    worst = shown.worst(Figures("y", "bfloat16", (50,), max_abs=9.0, snr_db=-3.0, cosine=0.1, top1=0.25))
    assert (worst.max_abs, worst.snr_db, worst.cosine, worst.top1) == (9.0, -3.0, 0.1, 0.25)
    assert Figures("y", "float32", ()).to_dict()["snr_db"] is None


def test_a_nudge_is_at_most_one_rounding_and_leaves_sizes_alone() -> None:
    values = RNG.standard_normal(1000).astype(np.float16)
    moved = Nudge(1).constant(values)
    relative = np.abs(moved / values.astype(np.float64) - 1)
    assert 0 < relative.max() <= unit_roundoff(np.float16) and relative.mean() > unit_roundoff(np.float16) / 4
    assert np.array_equal(Nudge(1).constant(values), moved) and not np.array_equal(Nudge(2).constant(values), moved)
    wide, half = RNG.standard_normal((6, 500)).astype(np.float32), RNG.standard_normal((6, 500)).astype(np.float16)
    rows = np.mean(Nudge(1).constant(wide) / wide.astype(np.float64) - 1, axis=1)
    assert np.abs(rows).max() > U / 2 and np.abs(rows).max() <= 4.5 * U  # a row is off as a whole
    assert np.abs(Nudge(1).constant(half) / half.astype(np.float64) - 1).max() <= unit_roundoff(np.float16)
    sizes = np.array([1, 1, 2.0, 224], np.float32)
    assert np.array_equal(Nudge(1).constant(sizes), sizes)
    assert not np.array_equal(Nudge(1).constant(np.array([0.1], np.float32)), np.array([0.1], np.float32))
