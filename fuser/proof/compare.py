"""Judge one output: how far a candidate is from the reference, against how far right evaluations are from it.

The rule, for floating point outputs, over the whole output and along each of its axes by itself (so that one bad
channel is not lost among good ones):

    rms(candidate - reference)  <=  FACTOR * rms(noise) + ROUNDINGS * u * rms(reference)
    and the same for the largest absolute value

`reference` is the float64 truth of the original (or, where that cannot be had, its own output), u the unit roundoff
of the output's type (of a run, with that of the sums in it: `rounding.run_roundoff`), and `noise`, element by element,
the largest distance from the reference of any evaluation that is right by definition: the original at run time, and
the original with constants or inputs moved by one rounding.  NaN and infinity must stand where some right evaluation
has them.

Where a few numbers are far larger than the others (a mask of -1e9), the others are judged by themselves, too.

Integers, booleans and strings must be equal, except where right evaluations do not agree among themselves: there
the value is decided by rounding (the arg max of a tie), and nothing can be asked of it.  Among many elements each
evaluation has some such places to itself; the candidate may have FACTOR times as many, and one in CROWD at most.
Integers of which rounding decides nearly all (a product of 1e8) are judged as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fuser.proof.rounding import is_float, unit_roundoff

Array = np.ndarray[Any, Any]

FACTOR = 8.0
"""How many times the noise a candidate may show.  Errors within a group are not independent (a rounded bias moves a
whole channel), so a lucky evaluation can make the noise look small however many elements there are."""
ROUNDINGS = 4.0
"""Roundings of its own magnitude that are allowed to any output: a fold computed in the stored type has as many."""
CROWD = 32
"""Elements that a group must have to be judged by itself."""
BLIND = 0.5
"""Noise over signal from which on passing proves nothing."""
STABLE = 0.1
"""The share of elements on which right evaluations agree, from which on integers are compared for equality."""
RARE = 1 << 16
"""Among so many integers one more may differ than right evaluations show: these are few."""
OUTLYING = 2.0**16
"""How many times a small element the largest one must be for the others to be judged without it."""


@dataclass
class Figures:
    """How far the candidate's output is from the reference; the worst over all sets of inputs.

    max_abs: the largest absolute error, and `original` the same for the original model.
    relative: max_abs over the largest absolute value of the reference.
    ulp: max_abs in units of the last place at that largest value, in the output's type.
    snr_db: signal to noise ratio in decibels; inf for no error.
    cosine: cosine similarity.
    top1: the share of rows with the same arg max, where the output looks like a classifier's; else None.
    mismatches: elements that differ, for types other than floating point.
    excess: error over what is allowed; above 1 fails.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs: float = 0.0
    original: float = 0.0
    relative: float = 0.0
    ulp: float = 0.0
    snr_db: float = math.inf
    cosine: float = 1.0
    top1: float | None = None
    mismatches: int = 0
    excess: float = 0.0

    def worst(self, other: Figures) -> Figures:
        """The worse of each figure."""
        top1 = [figure for figure in (self.top1, other.top1) if figure is not None]
        return Figures(
            self.name,
            self.dtype,
            self.shape,
            max_abs=max(self.max_abs, other.max_abs),
            original=max(self.original, other.original),
            relative=max(self.relative, other.relative),
            ulp=max(self.ulp, other.ulp),
            snr_db=min(self.snr_db, other.snr_db),
            cosine=min(self.cosine, other.cosine),
            top1=min(top1) if top1 else None,
            mismatches=max(self.mismatches, other.mismatches),
            excess=max(self.excess, other.excess),
        )

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types: infinite figures as None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass
class Judgement:
    """What came of one output: `excess` above 1 fails, and `problem` says how, for a person.

    noise: the root mean square of the noise over that of the reference; None where that is zero, and for integers.
    """

    excess: float = 0.0
    problem: str = ""
    noise: float | None = None

    @property
    def fine(self) -> bool:
        return self.excess <= 1.0


@dataclass
class Judge:
    """The rule of this module, ready for one output of one set of inputs.

    reference: the truth.
    right: other right evaluations of the original.
    roundoff: of the type in which the output is computed.
    """

    reference: Array
    right: Sequence[Array]
    roundoff: float

    def judge(self, candidate: Array) -> Judgement:
        """Hold `candidate` to the rule."""
        if candidate.shape != self.reference.shape:
            if any(other.shape == candidate.shape for other in self.right):
                return Judgement()  # rounding decides the shape: how many boxes pass a threshold, say
            return Judgement(math.inf, f"shape {list(candidate.shape)} instead of {list(self.reference.shape)}")
        right = [other for other in self.right if other.shape == self.reference.shape]
        if not is_float(self.reference.dtype):
            return self._equal(candidate, right)
        return self._near(candidate.astype(np.float64), [other.astype(np.float64) for other in right])

    def _equal(self, candidate: Array, right: list[Array]) -> Judgement:
        others = np.array([other != self.reference for other in right]).reshape(len(right), *self.reference.shape)
        differing = others.sum(axis=0)
        stable = differing == 0
        if right and stable.size and stable.mean() < STABLE:
            if self.reference.dtype.kind in "iu":
                return self._near(candidate.astype(np.float64), [other.astype(np.float64) for other in right])
            return Judgement(noise=1.0)
        wrong = (candidate != self.reference) & stable
        if not wrong.any():
            return Judgement()
        excess = _excess_of_counts(wrong, [other & (differing == 1) for other in others])
        return Judgement(excess, f"{np.count_nonzero(wrong)} of {candidate.size} elements differ")

    def _near(self, candidate: Array, right: list[Array]) -> Judgement:
        reference = self.reference.astype(np.float64)
        finite = np.isfinite(candidate) & np.isfinite(reference)
        if not finite.all() and (problem := _strange(candidate, reference, right)):
            return Judgement(10.0, problem)
        noise = np.zeros(reference.shape)
        for other in right:
            np.maximum(noise, _error(other, reference), out=noise)
        error = np.where(finite, _error(candidate, reference), 0.0)
        scale = np.where(finite, np.abs(reference), 0.0)
        excess = _excess(error, noise, scale, self.roundoff)
        if (ordinary := _ordinary(scale)) is not None:
            excess = max(excess, _excess(error[ordinary], noise[ordinary], scale[ordinary], self.roundoff))
        size = float(_rms(np.where(finite, reference, 0.0), tuple(range(reference.ndim))))
        share = float(_rms(noise, tuple(range(noise.ndim)))) / size if size else None
        if excess <= 1:
            return Judgement(excess, noise=share)
        return Judgement(
            excess,
            f"the largest error is {error.max():.3g}, {excess:.3g} times what is allowed "
            f"(the original's noise is {noise.max():.3g}, the output's scale {np.abs(reference[finite]).max():.3g})",
            share,
        )


def bit_identical(candidate: Array, original: Array) -> Judgement:
    """Hold `candidate` to an exact contract: the same bits, signs of zero and payloads of NaN included."""
    if candidate.dtype == original.dtype and candidate.shape == original.shape:
        if candidate.dtype == object:
            wrong = int(np.count_nonzero(candidate != original))
        else:
            width = original.dtype.itemsize
            same = np.frombuffer(candidate.tobytes(), f"V{width}") == np.frombuffer(original.tobytes(), f"V{width}")
            wrong = original.size - int(np.count_nonzero(same))
        if not wrong:
            return Judgement()
        return Judgement(math.inf, f"{wrong} of {original.size} elements are not bit-identical")
    return Judgement(
        math.inf, f"{candidate.dtype}{list(candidate.shape)} instead of {original.dtype}{list(original.shape)}"
    )


def figures(name: str, candidate: Array, reference: Array, original: Array | None) -> Figures:
    """The figures of one output for one set of inputs.

    original: the original's own output, where there is one: its type counts, and its error is shown beside.
    """
    result = Figures(name, str(candidate.dtype), candidate.shape)
    if candidate.shape != reference.shape:
        result.mismatches = candidate.size
        return result
    if not is_float(reference.dtype):
        result.mismatches = int(np.count_nonzero(candidate != reference))
        return result
    dtype = candidate.dtype if is_float(candidate.dtype) else np.dtype(np.float64)
    wide, reference = candidate.astype(np.float64), reference.astype(np.float64)
    error = _error(wide, reference)
    scale = float(np.abs(reference[np.isfinite(reference)]).max(initial=0.0))
    result.max_abs = float(error.max(initial=0.0))
    if original is not None and original.shape == reference.shape:
        result.original = float(_error(original.astype(np.float64), reference).max(initial=0.0))
    result.relative = result.max_abs / scale if scale else math.inf if result.max_abs else 0.0
    result.ulp = result.relative / (2 * unit_roundoff(dtype))
    finite = np.isfinite(wide) & np.isfinite(reference)
    signal, power = float(np.sum(reference[finite] ** 2)), float(np.sum(error**2))
    if power:
        result.snr_db = 10 * math.log10(signal / power) if signal else -math.inf
    norm = math.sqrt(signal * float(np.sum(wide[finite] ** 2)))
    if norm:
        result.cosine = min(1.0, float(np.sum(wide[finite] * reference[finite])) / norm)
    if wide.ndim == 2 and wide.shape[1] > 1 and wide.size:
        result.top1 = float(np.mean(wide.argmax(1) == reference.argmax(1)))
    return result


def _error(values: Array, reference: Array) -> Array:
    """|values - reference| where both are finite, else 0."""
    with np.errstate(invalid="ignore"):
        error = np.abs(values - reference)
    return np.where(np.isfinite(error), error, 0.0)


def _strange(candidate: Array, reference: Array, right: Sequence[Array]) -> str:
    """NaN or infinity where no right evaluation has it, or none where all have it."""
    strange = _kind(candidate) != _kind(reference)
    for other in right:
        strange &= _kind(candidate) != _kind(other)
    if not strange.any():
        return ""
    place = tuple(int(i) for i in np.argwhere(strange)[0])
    return f"{candidate[place]} at {list(place)} where the original has {reference[place]:.6g}"


def _kind(values: Array) -> Array:
    """0 for finite, 1 and -1 for the infinities, 2 for NaN."""
    return np.where(np.isnan(values), 2.0, np.where(np.isinf(values), np.sign(values), 0.0))


def _excess(error: Array, noise: Array, scale: Array, roundoff: float) -> float:
    """The largest ratio of what is found to what is allowed, over all groups of elements and both statistics."""
    worst = 0.0
    for axes in _groups(error.shape):
        for statistic in (_rms, _max):
            found = statistic(error, axes)
            allowed = FACTOR * statistic(noise, axes) + ROUNDINGS * roundoff * statistic(scale, axes)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(found > 0, found / allowed, 0.0)
            worst = max(worst, float(ratio.max(initial=0.0)))
    return worst


def _excess_of_counts(wrong: Array, alone: Sequence[Array]) -> float:
    """The largest ratio of how many elements differ to how many may, over all groups of elements.

    alone: for each right evaluation, the elements in which it differs from all others, as `wrong` does.
    """
    spare = wrong.size // RARE
    most = max((int(np.count_nonzero(one)) for one in alone), default=0)
    worst = 0.0
    for axes in _groups(wrong.shape):
        found = np.asarray(np.sum(wrong, axis=axes))
        counts = [np.asarray(np.sum(one, axis=axes)) for one in alone]
        shared = min(most, max(1.0, most / found.size))  # they are somewhere else each time
        most_here = wrong.size / found.size / CROWD
        allowed = np.minimum(FACTOR * np.maximum(shared, np.max(counts, axis=0) if counts else 0), most_here) + spare
        ratio = np.divide(found, allowed, out=np.where(found > 0, 10.0, 0.0), where=allowed > 0)
        worst = max(worst, float(ratio.max(initial=0.0)))
    return worst


def _ordinary(scale: Array) -> Array | None:
    """Which elements are no outliers, in size; None where there are none, or they are all but a few."""
    sizes = scale[scale > 0]
    if sizes.size < CROWD:
        return None
    small = float(np.quantile(sizes, 0.1))
    ordinary: Array = scale <= math.sqrt(OUTLYING) * small
    return ordinary if float(sizes.max()) > OUTLYING * small and np.count_nonzero(ordinary) >= CROWD else None


def _groups(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Axes to reduce: all of them, and all but one where that leaves a crowd to each index."""
    every = tuple(range(len(shape)))
    yield every
    for kept in every:
        if shape[kept] > 1 and math.prod(shape) // shape[kept] >= CROWD:
            yield tuple(axis for axis in every if axis != kept)


def _rms(values: Array, axes: tuple[int, ...]) -> Array:
    return np.asarray(np.sqrt(np.mean(values * values, axis=axes))) if values.size else np.zeros(())


def _max(values: Array, axes: tuple[int, ...]) -> Array:
    return np.asarray(np.max(values, axis=axes)) if values.size else np.zeros(())
