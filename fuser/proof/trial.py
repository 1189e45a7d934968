"""One set of inputs, both models run on it: judged in steps, gathering more evidence only where it is needed.

Two questions are asked, each with the rule of `compare.py`:
- of the function: both models in float64.  A right rewrite differs by the rounding of its new constants alone.
- of the run: the optimized model as the runtime computes it, against the same truth.

The first answer costs one evaluation of each.  Only an output that seems wrong has the noise measured better: first
the truth with every constant moved by a rounding, then the original with inputs moved, and in the runtime's own
optimizer.  What is wrong by orders of magnitude is not looked into further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fuser.proof.compare import BLIND, Array, Figures, Judge, Judgement, bit_identical, figures
from fuser.proof.inputs import InputSet
from fuser.proof.outcome import Failure, Outcome
from fuser.proof.rounding import is_float, run_roundoff, unit_roundoff
from fuser.proof.runners import OnnxRunner
from fuser.proof.sides import Side
from fuser.proof.verification import Truth

HOPELESS = 100.0
"""Times what is allowed, beyond which no better measure of the noise is sought."""

FIRST_NUDGES = (1, 2)
"""Seeds of the nudges that are tried first."""

_MORE_NUDGES = (3, 4, 5, 6, 7, 8)
_FIRST_MOVES = (1, 2)
_MORE_MOVES = (3, 4, 5, 6)


class Trial:
    """Both models on one set of inputs.

    truth: what the outputs are judged against.
    note: why that is not float64.
    figures: one entry for each output, once judged.
    blind: whether some output is so noisy that passing proves nothing; None where there is nothing but zeros.
    """

    def __init__(
        self,
        before: Side,
        after: Side,
        inputs: InputSet,
        original: list[Any],
        candidate: Any,
        truth: Outcome,
        candidate_truth: Outcome,
        nudged: Callable[[Sequence[int]], list[Outcome]],
    ) -> None:
        """nudged: the truth with constants moved, one outcome for each seed."""
        self._before, self._after, self._inputs = before, after, inputs
        self._original = dict(_named(before.output_names, original))
        self._candidate = dict(_named(before.output_names, before.paired(after, candidate)))
        self._outcomes = truth, candidate_truth
        self._truths = nudged
        self._nudged: list[dict[str, Any]] = []
        self._moved: list[dict[str, Any]] = []
        self.truth: Truth = "none"
        self.note = ""
        self.figures: list[Figures] = []
        self.blind: bool | None = None

    def bits(self) -> str:
        """Hold the candidate to an exact contract; what is wrong, or nothing."""
        self.truth = "bits"
        found = self._judge(self._original, lambda name: bit_identical(self._candidate[name], self._original[name]))
        if found and self._same_by_operator():
            runtime = self._before.runner.runtime
            note = f"{runtime} rounds otherwise where an operand is a constant; operator by operator the bits are equal"
            self.figures = []
            found = self._noise_floor()  # what cannot be rounding is the runtime's own idea of an operator
            self.truth, self.note = "bits", "" if found else note
        return found

    def _same_by_operator(self) -> bool:
        """Whether the bits are equal where no kernel is chosen by what is constant."""
        before, after = self._before.runner, self._after.runner
        if not (isinstance(before, OnnxRunner) and isinstance(after, OnnxRunner)):
            return False
        original, candidate = before.stored(self._inputs.values), after.stored(self._inputs.values)
        if isinstance(original, Failure) or isinstance(candidate, Failure):
            return False
        first = dict(_named(self._before.output_names, original))
        second = dict(_named(self._before.output_names, self._before.paired(self._after, candidate)))
        return not self._each(first, second, lambda name: bit_identical(second[name], first[name]))

    def rounding(self) -> str:
        """Hold the candidate to the bound; what is wrong, or nothing."""
        truth, candidate_truth = self._outcomes
        if isinstance(truth, Failure):
            self.note = f"the float64 evaluation is not possible: {truth}"
            return self._noise_floor()
        wide = dict(_named(self._before.output_names, truth))
        if problem := self._distrust(wide):
            self.note = problem
            return self._noise_floor()
        self.truth = "float64"
        if not isinstance(candidate_truth, Failure):
            candidate = dict(_named(self._before.output_names, self._before.paired(self._after, candidate_truth)))
            judgements: dict[str, Judgement] = {}

            def judge(name: str) -> Judgement:
                judgements[name] = self._same_function(name, candidate, wide)
                return judgements[name]

            if found := self._each(wide, candidate, judge):
                self._figures(wide, judgements)
                return f"{found} (both models in float64)"
        return self._judge(wide, lambda name: self._same_run(name, wide))

    def _same_function(self, name: str, candidate: dict[str, Any], truth: dict[str, Any]) -> Judgement:
        judgement = Judgement()
        for samples in self._stages(lambda: self._nudge(FIRST_NUDGES), lambda: self._nudge(_MORE_NUDGES)):
            right = [sample[name] for sample in samples if name in sample]
            judgement = Judge(truth[name], right, self._roundoff(name)).judge(candidate[name])
            if judgement.fine or (judgement.excess > HOPELESS and samples):
                break
        return judgement

    def _same_run(self, name: str, truth: dict[str, Any]) -> Judgement:
        def more() -> list[dict[str, Any]]:
            return self._nudge(_MORE_NUDGES) + self._move(_FIRST_MOVES) + self._move(_MORE_MOVES)

        judgement = Judgement()
        for samples in self._stages(lambda: self._nudge(FIRST_NUDGES), more):
            right = [self._original[name], *(sample[name] for sample in samples if name in sample)]
            judgement = Judge(truth[name], right, self._roundoff(name, self._after.terms)).judge(self._candidate[name])
            if judgement.fine or (judgement.excess > HOPELESS and samples):
                break
        return judgement

    def _noise_floor(self) -> str:
        """Judge against the original itself, and how much it varies by rounding alone."""
        self.truth = "noise-floor"

        def judge(name: str) -> Judgement:
            judgement = Judgement()
            roundoff = self._roundoff(name, self._before.terms) + self._roundoff(name, self._after.terms)
            for samples in self._stages(lambda: self._move(_FIRST_MOVES), lambda: self._move(_MORE_MOVES)):
                right = [sample[name] for sample in samples if name in sample]
                judgement = Judge(self._original[name], right, roundoff).judge(self._candidate[name])
                if judgement.fine or (judgement.excess > HOPELESS and samples):
                    break
            return judgement

        return self._judge(self._original, judge)

    def _judge(self, reference: dict[str, Any], judge: Callable[[str], Judgement]) -> str:
        """Judge every output of the candidate's run, and note the figures; what is wrong, or nothing."""
        judgements: dict[str, Judgement] = {}

        def checked(name: str) -> Judgement:
            original, candidate = self._original[name], self._candidate[name]
            if original.dtype != candidate.dtype:
                judgements[name] = Judgement(np.inf, f"its type is {candidate.dtype} instead of {original.dtype}")
            else:
                judgements[name] = judge(name)
            return judgements[name]

        found = self._each(reference, self._candidate, checked)
        self._figures(reference, judgements)
        noise = [judgement.noise for judgement in judgements.values() if judgement.noise is not None]
        self.blind = max(noise) > BLIND if noise else None
        return found

    def _each(self, reference: dict[str, Any], candidate: dict[str, Any], judge: Callable[[str], Judgement]) -> str:
        """Judge every output; the worst problem."""
        if list(candidate) != list(reference):
            return f"it returns {len(candidate)} values instead of {len(reference)}"
        worst, where = Judgement(), ""
        for name, value in reference.items():
            if (value is None) != (candidate[name] is None):
                judgement = Judgement(np.inf, "one of the models returns nothing here")
            else:
                judgement = Judgement() if value is None else judge(name)
            if judgement.excess > max(worst.excess, 1.0):
                worst, where = judgement, name
        return f"output {where!r}: {worst.problem}" if where else ""

    def _figures(self, reference: dict[str, Any], judgements: dict[str, Judgement]) -> None:
        for name, original in self._original.items():
            if original is None or self._candidate.get(name) is None or name not in reference:
                continue
            entry = figures(name, self._candidate[name], reference[name], original)
            entry.excess = judgements[name].excess if name in judgements else 0.0
            self.figures.append(entry)

    def _distrust(self, truth: dict[str, Any]) -> str:
        """Why `truth` cannot be the original's function; empty where it can.

        The runtime's own result must be within a tenth of it, unless the model amplifies rounding to that size.
        """
        runtime = self._before.runner.runtime
        for name, original in self._original.items():
            wide = truth.get(name)
            if original is None or wide is None:
                continue
            if wide.shape != original.shape:
                return f"the float64 evaluation gives another shape for {name!r} than the original"
            if is_float(original.dtype) and (_is_finite(original) & ~_is_finite(wide)).any():
                return f"the float64 evaluation of {name!r} is not finite where that of {runtime} is"
            if not is_float(original.dtype):
                wrong = original != wide
                for sample in self._nudge(FIRST_NUDGES) if wrong.any() else []:
                    if name in sample and sample[name].shape == wide.shape:
                        wrong &= sample[name] == wide
                if wrong.mean() > 0.01:
                    return f"the float64 evaluation gives other values for {name!r} than the original"
            elif _far(original, wide):
                spread = [_distance(sample[name], wide) for sample in self._nudge(FIRST_NUDGES) if name in sample]
                if _distance(original, wide) > 100 * max(spread, default=0.0):
                    return f"the float64 evaluation of {name!r} is far from what {runtime} computes"
        return ""

    def _stages(self, *more: Callable[[], list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
        """Growing evidence, gathered only when asked for."""
        samples: list[dict[str, Any]] = []
        yield samples
        for gather in more:
            samples = samples + gather()
            yield samples

    def _nudge(self, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
        """The truth with constants moved by a rounding; kept, because several outputs ask."""
        known = len(self._nudged)
        wanted = len(FIRST_NUDGES) if seeds == FIRST_NUDGES else len(FIRST_NUDGES) + len(_MORE_NUDGES)
        if known < wanted:
            order = (FIRST_NUDGES + _MORE_NUDGES)[known:wanted]
            self._nudged += map(self._sample, self._truths(order))
        first = len(FIRST_NUDGES)
        return self._nudged[:first] if seeds == FIRST_NUDGES else self._nudged[first:]

    def _move(self, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
        """The original at run time with inputs moved by a unit in the last place; first of all, optimized."""
        known = len(self._moved)
        wanted = 1 + len(_FIRST_MOVES) if seeds == _FIRST_MOVES else 1 + len(_FIRST_MOVES) + len(_MORE_MOVES)
        if known < wanted:
            values = self._inputs.values
            if not known:
                self._moved += [self._sample(self._before.runner.run([values], optimize=True)[0])]
            order = (_FIRST_MOVES + _MORE_MOVES)[len(self._moved) - 1 : wanted - 1]
            answers = self._before.runner.run([_moved(values, seed) for seed in order])
            self._moved += [self._sample(answer) for answer in answers]
        first = 1 + len(_FIRST_MOVES)
        return self._moved[:first] if seeds == _FIRST_MOVES else self._moved[first:]

    def _sample(self, outcome: Outcome) -> dict[str, Any]:
        return {} if isinstance(outcome, Failure) else dict(_named(self._before.output_names, outcome))

    def _roundoff(self, name: str, terms: int = 0) -> float:
        """Of one output, computed as a sum of so many products."""
        dtype = self._before.output_dtype(name, self._original[name])
        return run_roundoff(dtype, terms) if is_float(dtype) else 0.0


def _named(names: list[str], outputs: list[Any]) -> Iterator[tuple[str, Any]]:
    """Every array by name; the items of a sequence get an index, those of a map their key.  Complex numbers are two."""
    for name, value in zip(names, outputs, strict=True):
        if isinstance(value, list):
            yield from _named([f"{name}[{index}]" for index in range(len(value))], value)
        elif isinstance(value, dict):
            yield from _named([f"{name}[{key!r}]" for key in value], list(map(np.asarray, value.values())))
        elif isinstance(value, np.ndarray) and value.dtype.kind == "c":
            yield name, np.stack([value.real, value.imag], axis=-1)
        else:
            yield name, value


def _moved(values: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if not isinstance(value, np.ndarray) or not is_float(value.dtype):
            return value
        step = 2 * unit_roundoff(value.dtype) * rng.choice([-1.0, 1.0], value.shape)
        wide = value.astype(np.float64)
        # Zeros among other numbers mean something; nothing but zeros has to move, too.
        return (wide + step * (np.abs(wide) if wide.any() else 1.0)).astype(value.dtype)

    return type(values)(move(value) for value in values)


def _is_finite(values: Array) -> Array:
    return np.isfinite(values.astype(np.float64))


def _distance(values: Array, reference: Array) -> float:
    if values.shape != reference.shape:
        return 0.0
    with np.errstate(invalid="ignore"):
        error = values.astype(np.float64) - reference.astype(np.float64)
    error = error[np.isfinite(error)]
    return float(np.sqrt(np.mean(error**2))) if error.size else 0.0


def _far(values: Array, reference: Array) -> bool:
    finite = reference[np.isfinite(reference)]
    scale = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    return _distance(values, reference) > 0.1 * scale
