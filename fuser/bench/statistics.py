"""From samples to a verdict: pure functions of arrays.

A round asks every role once, in random order: *before*, *after*, and *again*, a second instance of *before*.
A launch is a set of fresh processes and the rounds they answered.  Two processes that run the very same
model can differ by a per cent or two for as long as they live (where the pages of the weights landed, how
the threads were placed), so it is launches that are independent, not rounds, and the error of a ratio comes
from their scatter (Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time", ISMM 2013).

For each round, with the logarithms of the times:

    effect  = after - (before + again) / 2        what changed
    control = again - before                      nothing changed: what this machine makes of the same model

The two contrasts are uncorrelated, so bad luck in the control is not the same bad luck in the effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

LEVEL = 0.99
"""Confidence of every interval: a check that runs at every commit cannot be wrong one time in twenty."""

MINIMUM_EFFECT = log(1.01)
"""A change below 1 % is called no change, however small its interval is."""

COARSE = log(1.25)
"""A measurement that could not see a change of a quarter settles nothing."""

MIN_LAUNCHES = 3
"""Fewer independent launches say next to nothing about their scatter."""

MIN_SAMPLES = 100
"""Below this, percentiles at the edges are single measurements, and a summary says so."""

HIGH_VARIATION = 0.10
"""The coefficient of variation above which the samples are called noisy."""

SETTLED = 0.02
"""Warm-up ends when the last medians lie within 2 % of each other."""

_RESAMPLES = 5000
_Z = 2.5758
_T = (63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169, 3.106, 3.055, 3.012, 2.977)
"""Student's t at 99.5 % for 1, 2, ... 14 degrees of freedom; beyond, the last is on the safe side."""


@dataclass(frozen=True)
class Summary:
    """One role's latency in seconds over all launches; `cv` is the standard deviation over the mean.

    p99 is None below 1000 samples: fewer than ten of them would lie above it.
    """

    n: int
    median: float
    q1: float
    q3: float
    p5: float
    p95: float
    p99: float | None
    min: float
    mean: float
    cv: float

    @property
    def iqr(self) -> float:
        return self.q3 - self.q1


@dataclass(frozen=True)
class Interval:
    """A logarithm of a ratio of times, with its confidence interval at `LEVEL`."""

    log: float
    log_low: float
    log_high: float

    @property
    def ratio(self) -> float:
        return exp(self.log)

    @property
    def low(self) -> float:
        return exp(self.log_low)

    @property
    def high(self) -> float:
        return exp(self.log_high)

    @property
    def reach(self) -> float:
        """How far from "no difference" the interval extends."""
        return max(abs(self.log_low), abs(self.log_high))

    def beyond(self, band: float) -> bool:
        """Whether the whole interval lies outside [-band, band]."""
        return self.log_low > band or self.log_high < -band


@dataclass(frozen=True)
class Verdict:
    """`word` is one of the four below; `reason` is a sentence; `resolution` is the smallest change that
    this measurement would have called one, as a fraction (0.02: 2 %)."""

    word: str
    reason: str
    resolution: float | None = None


FASTER, SLOWER, NO_CHANGE, INCONCLUSIVE = "faster", "slower", "no measurable change", "inconclusive"


def summarize(samples: Sequence[float] | Array) -> Summary:
    """Median first: means follow the worst interruption.  `samples` in seconds, at least one."""
    x = np.asarray(samples, np.float64)
    p5, q1, median, q3, p95, p99 = np.percentile(x, (5, 25, 50, 75, 95, 99))
    return Summary(
        n=x.size,
        median=float(median),
        q1=float(q1),
        q3=float(q3),
        p5=float(p5),
        p95=float(p95),
        p99=float(p99) if x.size >= 1000 else None,
        min=float(x.min()),
        mean=float(x.mean()),
        cv=float(x.std() / x.mean()),
    )


def effect(before: Array, after: Array, again: Array) -> Array:
    """The change, for each round of a launch: the logarithm of `after` over the two instances of `before`."""
    return np.asarray(np.log(after) - (np.log(before) + np.log(again)) / 2)


def control(before: Array, again: Array) -> Array:
    """The difference between two instances of the same model, for each round of a launch."""
    return np.asarray(np.log(again) - np.log(before))


def centre(x: Array) -> Array:
    """The Hodges-Lehmann estimate along the last axis: the median of all pairwise means.

    As sharp as the mean for normal data (95 %), and nearly a third of the values may be wild: one launch in
    which another program took the cores does not decide.
    """
    i, j = np.triu_indices(x.shape[-1])
    return np.asarray(np.median((x[..., i] + x[..., j]) / 2, axis=-1))


def estimate(launches: Sequence[Array], rng: np.random.Generator) -> Interval:
    """The centre over launches of the median over rounds, with a bootstrap interval.

    launches: one array of log-ratios, one a round, for each launch; none of them empty.

    Whole launches are resampled and their rounds are kept: the scatter of the medians holds the noise of the
    rounds already, and resampling both levels counts it twice (Davison and Hinkley, "Bootstrap Methods and
    their Application", 1997, section 3.8).  A percentile interval of a handful of launches is too narrow, so
    its deviations are widened by sqrt(k / (k - 1)) and by Student's t over the normal quantile.
    """
    medians = np.array([np.median(rounds) for rounds in launches])
    k, point = medians.size, float(centre(medians))
    if k == 1:
        return Interval(point, float("-inf"), float("inf"))
    resampled = centre(rng.choice(medians, size=(_RESAMPLES, k)))
    low, high = np.quantile(resampled - point, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    widen = sqrt(k / (k - 1)) * _T[min(k - 1, len(_T)) - 1] / _Z
    return Interval(point, point + min(float(low), 0.0) * widen, point + max(float(high), 0.0) * widen)


def judge(change: Interval, same: Interval, launches: int) -> Verdict:
    """The verdict on an effect (`change`), given the control (`same`).

    faster, slower: the whole interval of the ratio lies beyond the larger of 1 % and everything that the A/A
        control's interval admits for one and the same model.
    inconclusive: too few launches; the control itself shows a difference and the effect is not clear of it;
        or a change of a quarter would not have been seen.
    """
    if launches < MIN_LAUNCHES:
        return Verdict(INCONCLUSIVE, f"{launches} of at least {MIN_LAUNCHES} launches were measured")
    band = max(MINIMUM_EFFECT, same.reach)
    half_width = max(change.log_high - change.log, change.log - change.log_low)
    resolution = exp(band + half_width) - 1
    if change.beyond(band):
        factor = exp(abs(change.log))
        if change.log < 0:
            return Verdict(FASTER, f"{factor:.2f} times as fast", resolution)
        return Verdict(SLOWER, f"takes {factor:.2f} times as long", resolution)
    if same.beyond(MINIMUM_EFFECT) and change.beyond(MINIMUM_EFFECT):
        own = abs(exp(same.log) - 1)
        reason = f"the same model differs from itself by {own:.1%}, and this is not clear of that"
        return Verdict(INCONCLUSIVE, reason, resolution)
    if max(band, change.reach) > COARSE:
        seen = f"only a change above {resolution:.0%}" if resolution < 1 else "not even a factor of two"
        reason = f"too noisy: {seen} would be seen"
        return Verdict(INCONCLUSIVE, reason, resolution)
    return Verdict(NO_CHANGE, f"a change above {resolution:.1%} would be seen", resolution)


def settled(medians: Sequence[float]) -> bool:
    """Whether the last three medians of a warm-up lie within 2 % of each other."""
    last = list(medians)[-3:]
    return len(last) == 3 and max(last) <= min(last) * (1 + SETTLED)


def drift(medians: Sequence[float]) -> float:
    """How much slower the last third of a series is than its first third, as a fraction; 0 below six."""
    third = len(medians) // 3
    if third < 2:
        return 0.0
    return float(np.median(medians[-third:]) / np.median(medians[:third])) - 1
