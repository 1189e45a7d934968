"""The statistics of a benchmark, on arrays alone: properties, known values, and simulated machines."""

from __future__ import annotations

from math import exp, inf, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fuser.bench import statistics
from fuser.bench.statistics import FASTER, INCONCLUSIVE, NO_CHANGE, SLOWER, Interval

times = st.floats(1e-6, 10.0)


def interval(low: float, high: float) -> Interval:
    return Interval((log(low) + log(high)) / 2, log(low), log(high))


def machine(rng: np.random.Generator, change: float, process: float, launches: int, wild: float = 0.0):
    """Effects and controls of a machine whose processes differ by `process` (one sigma), with rounds that
    scatter by 2 %, a tenth of them interrupted; a launch is `wild` with the given probability."""
    effects, controls = [], []
    for _ in range(launches):
        upset = 0.5 if rng.random() < wild else 0.0
        roles = []
        for shift in (0.0, change, 0.0):
            rounds = shift + rng.normal(0, process) + rng.normal(0, upset) + rng.normal(0, 0.02, 12)
            roles.append(np.exp(rounds + (rng.random(12) < 0.1) * rng.exponential(0.2, 12)))
        effects.append(statistics.effect(*roles))
        controls.append(statistics.control(roles[0], roles[2]))
    change_interval, same = statistics.estimate(effects, rng), statistics.estimate(controls, rng)
    return change_interval, statistics.judge(change_interval, same, launches)


# -- summaries


@given(st.lists(times, min_size=1, max_size=200))
def test_summary_is_ordered_and_within_the_samples(samples):
    s = statistics.summarize(samples)
    assert min(samples) == s.min <= s.p5 <= s.q1 <= s.median <= s.q3 <= s.p95 <= max(samples)
    assert s.n == len(samples) and s.iqr == s.q3 - s.q1 and s.cv >= 0


def test_summary_of_known_values():
    s = statistics.summarize(np.arange(1, 1001.0))
    assert (s.median, s.q1, s.q3, s.min, s.mean) == (500.5, 250.75, 750.25, 1, 500.5)
    assert s.p5 == pytest.approx(50.95) and s.p95 == pytest.approx(950.05) and s.p99 == pytest.approx(990.01)
    assert s.cv == pytest.approx(np.std(np.arange(1, 1001)) / 500.5)


def test_p99_needs_enough_samples():
    assert statistics.summarize(np.ones(999)).p99 is None
    assert statistics.summarize(np.ones(1000)).p99 == 1


# -- contrasts


@given(st.lists(st.tuples(times, times, times), min_size=1, max_size=20), st.floats(0.1, 10))
def test_contrasts_know_no_unit(rounds, scale):
    before, after, again = np.array(rounds).T
    np.testing.assert_allclose(
        statistics.effect(before, after, again),
        statistics.effect(before * scale, after * scale, again * scale),
        atol=1e-9,
    )
    np.testing.assert_allclose(statistics.control(before, again), -statistics.control(again, before))


def test_effect_is_measured_against_both_instances():
    effect = statistics.effect(np.array([1.0]), np.array([4.0]), np.array([4.0]))
    assert effect == pytest.approx(log(2))


def test_effect_and_control_do_not_share_their_luck():
    rng = np.random.default_rng(0)
    before, after, again = np.exp(rng.normal(0, 0.05, (3, 20_000)))
    effect, control = statistics.effect(before, after, again), statistics.control(before, again)
    assert abs(np.corrcoef(effect, control)[0, 1]) < 0.03


# -- intervals


def test_widening_uses_students_t():
    degrees = np.arange(1, len(statistics._T) + 1)
    np.testing.assert_allclose(statistics._T, stats.t.ppf((1 + statistics.LEVEL) / 2, degrees), rtol=1e-3)
    assert pytest.approx(stats.norm.ppf((1 + statistics.LEVEL) / 2), abs=1e-4) == statistics._Z


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_centre_is_within_the_values_and_follows_them(values):
    x = np.array(values)
    centre = float(statistics.centre(x))
    assert x.min() - 1e-12 <= centre <= x.max() + 1e-12
    assert float(statistics.centre(x + 3)) == pytest.approx(centre + 3)
    assert float(statistics.centre(-x)) == pytest.approx(-centre)


def test_centre_survives_a_wild_launch():
    assert abs(float(statistics.centre(np.array([0.0, 0.01, -0.01, 0.0, 5.0])))) <= 0.01


def test_centre_of_many_at_once():
    x = np.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(statistics.centre(x), [statistics.centre(row) for row in x])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=6), min_size=2, max_size=8))
def test_interval_contains_its_estimate(launches):
    x = statistics.estimate([np.array(rounds) for rounds in launches], np.random.default_rng(0))
    assert x.log_low <= x.log <= x.log_high


def test_interval_of_equal_launches_is_a_point():
    x = statistics.estimate([np.full(4, 0.3)] * 5, np.random.default_rng(0))
    assert (x.log_low, x.log, x.log_high) == pytest.approx((0.3, 0.3, 0.3))


def test_one_launch_says_nothing_about_the_next():
    x = statistics.estimate([np.array([0.1, 0.2, 0.3])], np.random.default_rng(0))
    assert (x.log, x.log_low, x.log_high) == (pytest.approx(0.2), -inf, inf)


def test_more_rounds_do_not_hide_the_scatter_of_launches():
    """What a bootstrap over rounds alone would get wrong."""
    rng = np.random.default_rng(0)
    shifts = rng.normal(0, 0.05, 6)
    x = statistics.estimate([shift + rng.normal(0, 0.001, 5000) for shift in shifts], rng)
    assert x.log_high - x.log_low > 2 * shifts.std()


@pytest.mark.parametrize("launches", [5, 10])
def test_intervals_cover_the_truth(launches):
    rng = np.random.default_rng(1)
    found = [statistics.estimate(list(rng.normal(0.1, 0.03, (launches, 1))), rng) for _ in range(150)]
    assert np.mean([x.log_low <= 0.1 <= x.log_high for x in found]) >= 0.95


def test_interval_in_ratios():
    x = Interval(log(2), log(1.5), log(4))
    assert (x.ratio, x.low, x.high, x.reach) == pytest.approx((2, 1.5, 4, log(4)))
    assert x.beyond(log(1.4)) and not x.beyond(log(1.6))
    assert Interval(-log(2), -log(4), -log(1.5)).beyond(log(1.4))


# -- verdicts


@pytest.mark.parametrize(
    ("change", "same", "word"),
    [
        ((0.78, 0.82), (0.99, 1.01), FASTER),
        ((1.18, 1.22), (0.99, 1.01), SLOWER),
        ((0.98, 1.02), (0.99, 1.01), NO_CHANGE),
        ((0.990, 0.995), (0.999, 1.001), NO_CHANGE),  # real, but below 1 %
        ((0.92, 0.96), (0.93, 1.05), NO_CHANGE),  # within what the same model shows
        ((0.92, 0.96), (0.93, 0.97), INCONCLUSIVE),  # the control failed
        ((0.78, 0.82), (0.93, 0.97), FASTER),  # the control failed, but this is clear of it
        ((0.70, 1.02), (0.99, 1.01), INCONCLUSIVE),  # too coarse
        ((0.99, 1.01), (0.70, 1.30), INCONCLUSIVE),
    ],
)
def test_verdicts(change, same, word):
    assert statistics.judge(interval(*change), interval(*same), 10).word == word


def test_too_few_launches_are_inconclusive():
    verdict = statistics.judge(interval(0.5, 0.5), interval(1, 1), statistics.MIN_LAUNCHES - 1)
    assert verdict.word == INCONCLUSIVE and "launches" in verdict.reason


def test_reasons_are_sentences_for_a_person():
    judge = statistics.judge
    assert judge(interval(0.5, 0.5), interval(1, 1), 5).reason == "2.00 times as fast"
    assert judge(interval(1.5, 1.5), interval(1, 1), 5).reason == "takes 1.50 times as long"
    assert judge(interval(0.99, 1 / 0.99), interval(1, 1), 5).reason == "a change above 2.0% would be seen"
    assert "differs from itself by 5" in judge(interval(0.92, 0.96), interval(0.93, 0.97), 5).reason
    assert "not even a factor of two" in judge(interval(0.1, 9), interval(1, 1), 5).reason


@given(st.floats(-0.5, 0.5), st.floats(0, 0.2), st.floats(-0.2, 0.2), st.floats(0, 0.2))
def test_verdicts_are_symmetric(change, width, same, spread):
    def judged(sign: int) -> str:
        a, b = sign * change, sign * same
        return statistics.judge(Interval(a, a - width, a + width), Interval(b, b - spread, b + spread), 10).word

    mirrored = {FASTER: SLOWER, SLOWER: FASTER}
    assert judged(-1) == mirrored.get(judged(1), judged(1))


@given(st.floats(0.01, 0.3), st.floats(0, 0.02))
def test_a_change_above_the_resolution_is_seen(margin, width):
    same = Interval(0, -width, width)
    resolution = statistics.judge(Interval(0, -width, width), same, 10).resolution
    change = log(1 + resolution) + margin
    assert statistics.judge(Interval(change, change - width, change + width), same, 10).word == SLOWER


# -- simulated machines


@pytest.mark.parametrize("process", [0.002, 0.01, 0.02])
def test_the_same_model_is_never_called_a_change(process):
    rng = np.random.default_rng(2)
    words = [machine(rng, 0.0, process, 10)[1].word for _ in range(60)]
    assert words == [NO_CHANGE] * 60


def test_wild_launches_do_not_make_a_change():
    rng = np.random.default_rng(3)
    words = {machine(rng, 0.0, 0.01, 10, wild=0.2)[1].word for _ in range(60)}
    assert words <= {NO_CHANGE, INCONCLUSIVE}


@pytest.mark.parametrize(("change", "word"), [(-0.1, FASTER), (0.1, SLOWER)])
def test_ten_per_cent_is_seen(change, word):
    rng = np.random.default_rng(4)
    words = [machine(rng, change, 0.01, 10)[1].word for _ in range(40)]
    assert words.count(word) >= 38 and set(words) <= {word, NO_CHANGE, INCONCLUSIVE}


def test_estimates_are_reproducible():
    first, second = (machine(np.random.default_rng(5), 0.05, 0.01, 6)[0] for _ in range(2))
    assert first == second and exp(first.log) == first.ratio


# -- warm-up and drift


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([], False),
        ([1.0, 1.0], False),
        ([9.0, 1.0, 1.0, 1.019], True),
        ([1.0, 1.0, 1.021], False),
        ([1.0, 1.03, 1.0], False),
    ],
)
def test_settled(medians, expected):
    assert statistics.settled(medians) is expected


def test_drift():
    assert statistics.drift([1.0] * 5) == 0
    assert statistics.drift([1.0, 1.0, 5.0, 5.0, 1.1, 1.1]) == pytest.approx(0.1)
    assert statistics.drift([1.1, 1.1, 5.0, 5.0, 1.0, 1.0]) < 0
