"""`verify`: are two models the same function, to within rounding, with the same interface?

The steps, each in a module of its own: inputs that the original accepts (`inputs`, `hints`, `data`), both models run
(`runners`), the float64 truth of both (`float64_onnx`, `float64_torch`), every output judged (`compare`, `trial`),
the interfaces compared (`interface`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from fuser.errors import InputError
from fuser.isolate import cores
from fuser.proof.compare import Figures
from fuser.proof.inputs import InputSet
from fuser.proof.outcome import Failure, Outcome
from fuser.proof.rounding import is_float
from fuser.proof.runners import Float64Runner, OnnxRunner, Workers
from fuser.proof.sides import Original, Side, open_sides
from fuser.proof.trial import FIRST_NUDGES, Trial
from fuser.proof.verification import Truth, Verification

CONTRACTS = ("exact", "rounding")

_SETS = ((0.3, 9), (1.0, 3), (5.0, 2))
"""(seconds that one load and run takes, at most; number of input sets); one set for what is slower still."""

_LONG = 0.2
"""Seconds that the original takes, from which on a second process is worth its start."""

_TOGETHER = 1 << 27
"""Elements of constants that both models may have to be in memory at the same time."""

T = TypeVar("T")
S = TypeVar("S")


def verify(
    before: Any,
    after: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    inputs: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    contract: str = "rounding",
    timeout: float = 300.0,
    removed_inputs: Collection[str] = (),
    workers: Workers | None = None,
    original: Original | None = None,
) -> Verification:
    """Compare `after` with `before`; neither is changed.

    Args:
        before, after: paths of ONNX files, ONNX models in memory (of the kinds that `optimize` takes), torch modules,
            GraphModules or ExportedPrograms; torch may be compared with ONNX, inputs and outputs then correspond by
            their order.
        example_inputs, example_kwargs: arguments for torch modules.
        inputs: data to compare on, instead of generated data: a path (.npz, .npy, a test_data_set folder), arrays
            by name, arrays in order, or a list of these.
        input_shapes: shapes by input name, for ONNX models with dynamic dimensions.
        seed: of the generated data.
        contract: "rounding", or "exact" for bit-identical outputs.
        timeout: seconds for each call of a runtime.
        removed_inputs: inputs that `after` is allowed to lack.
        workers: the processes in which runtimes run, for many comparisons in a row; else they are started and ended.
        original: what earlier comparisons of the same `before` on the same `inputs` found of it.

    Raises:
        InputError: a model or an option is not usable, or inputs can be neither generated nor found.
    """
    if contract not in CONTRACTS:
        raise InputError(f"contract is 'exact' or 'rounding', not {contract!r}")
    if seed < 0:
        raise InputError(f"seed must not be negative, and is {seed}")
    started = time.perf_counter()
    with ExitStack() as stack:
        workers = workers or stack.enter_context(Workers())
        first, second = open_sides(
            stack,
            workers.first,
            before,
            after,
            example_inputs=example_inputs,
            example_kwargs=example_kwargs,
            input_shapes=input_shapes,
            timeout=timeout,
            removed_inputs=removed_inputs,
            original=original,
        )
        found = {} if original is None or original.side is not first else original.found
        result = _Comparison(first, second, contract, seed, workers, found).run(inputs)
    result.seconds = time.perf_counter() - started
    if result.cost_ratio:  # until here, the seconds of one pass over the original
        result.cost_ratio = result.seconds / result.cost_ratio
    return result


class _Comparison:
    """One comparison, step by step."""

    def __init__(
        self, before: Side, after: Side, contract: str, seed: int, workers: Workers, found: dict[Any, Any]
    ) -> None:
        self._before, self._after, self._contract, self._seed = before, after, contract, seed
        self._workers, self._found = workers, found
        self._seconds = 0.0  # of the original, loaded and run
        self._result = Verification("equivalent", contract=contract)
        self._discarded = 0
        self._light = True
        self._blind = False

    def run(self, inputs: Any) -> Verification:
        """Fill in the result."""
        result = self._result
        result.interface = self._before.lost_by(self._after)
        if mismatch := self._before.cannot_pair(self._after):
            return self._conclude("incompatible", mismatch)
        sets, originals = self._known("run", lambda: self._originals(inputs))
        result.sets, result.discarded = [one.label for one in sets], self._discarded
        result.cost_ratio = self._seconds
        if isinstance(originals, Failure):
            why = getattr(self._before.runner, "why", "the original cannot be run")
            return self._conclude("unverifiable", f"{why}: {originals}")
        if isinstance(self._before.runner, Float64Runner):
            result.truth_note = self._before.runner.why
            self._after.runner = Float64Runner(self._after.runner, "")
        candidates, truths, wide = self._evidence(sets, originals)
        for one, candidate in zip(sets, candidates, strict=True):
            if isinstance(candidate, Failure):
                return self._conclude("different", f"the optimized model fails for {one.label}: {candidate}")
        problem = self._judge(sets, originals, candidates, truths, wide)
        if problem and self._before.is_random():
            return self._conclude("unverifiable", f"the model draws random numbers, so that proves nothing: {problem}")
        if problem:
            return self._conclude("different", problem)
        if self._blind:
            return self._conclude("unverifiable", "rounding alone changes an output by half of its size, in every set")
        if any(map(_has_elements, originals)) and not any(map(_says_something, originals)):
            return self._conclude(
                "unverifiable", "the original makes nothing but infinity and not-a-number of the inputs"
            )
        if result.interface:
            return self._conclude("incompatible", result.interface[0])
        if not any(map(_has_elements, originals)):
            return self._conclude("equivalent", "no output has any elements, so only types and shapes were compared")
        return result

    def _known(self, what: str, find: Callable[[], T]) -> T:
        """What an earlier comparison found of the original; else what `find` finds, for those to come."""
        key = what, self._seed, tuple(self._before.overridable)
        if key not in self._found:
            value = find()
            self._found[key] = value, self._seconds, self._discarded, self._light
        found: T
        found, self._seconds, self._discarded, self._light = self._found[key]
        return found

    def _conclude(self, verdict: Any, reason: str) -> Verification:
        self._result.verdict, self._result.reason = verdict, reason
        return self._result

    def _originals(self, inputs: Any) -> tuple[list[InputSet], list[Any] | Failure]:
        """Input sets that the original accepts, and its outputs for them."""
        if inputs is not None:
            sets = self._before.given(inputs)
        else:
            probe = self._before.probe(self._seed)
            number = _number_of_sets(probe.seconds)
            self._light = number == _SETS[0][1]
            sets = self._before.more(probe.sizes, self._seed, number)
        outcomes = self._before.runner.run([one.values for one in sets])
        if isinstance(outcomes[0], Failure) and self._before.stand_in(outcomes[0]):
            outcomes = self._before.runner.run([one.values for one in sets])
        self._seconds = self._before.runner.seconds
        good = [(one, out) for one, out in zip(sets, outcomes, strict=True) if not isinstance(out, Failure)]
        failures = [out for out in outcomes if isinstance(out, Failure)]
        if inputs is not None and failures:
            raise InputError(f"the original model rejects the given inputs: {failures[0]}")
        self._discarded = len(failures)
        if not good:
            return sets, failures[0]
        if inputs is None and len(good) > 1:
            tame = [pair for pair in good if self._before.is_finite(pair[1])]
            self._discarded += len(good) - len(tame or good)
            good = tame or good
        return [one for one, _ in good], [out for _, out in good]

    @cached_property
    def _exact(self) -> bool:
        return self._contract == "exact" or (not self._before.is_seeded and self._before.is_random())

    def _both(self, of_original: Callable[[], T], of_candidate: Callable[[], S]) -> tuple[T, S]:
        """Both results; at the same time, in a process each, where that saves more than it takes to start another."""
        runner = self._after.runner
        small = self._before.size + self._after.size <= _TOGETHER
        if self._seconds < _LONG or not small or cores() == 1 or not isinstance(runner, OnnxRunner):
            return of_original(), of_candidate()
        runner.worker = self._workers.second
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(of_candidate)
            try:
                return of_original(), later.result()
            except BaseException:  # Ctrl-C: the other thread is not to be waited for
                self._workers.second.close()
                raise

    def _evidence(
        self, sets: list[InputSet], originals: list[Any]
    ) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
        """For each set: the candidate's outputs, and those of both models in float64."""
        values = [one.values for one in sets]
        unasked: list[Outcome] = [Failure("refused", "not asked for")] * len(sets)
        if isinstance(self._before.runner, Float64Runner):  # there is nothing else
            candidates = self._after.runner.run(values)
            return candidates, list(originals), candidates
        if self._exact:
            return self._after.runner.run(values), unasked, unasked

        def of_candidate() -> tuple[list[Outcome], list[Outcome]]:
            candidates = self._after.runner.run(values)
            if any(isinstance(candidate, Failure) for candidate in candidates):
                return candidates, unasked
            # Of heavy models the optimized one is evaluated once: it only sharpens what the truth alone shows.
            number = len(sets) if self._light else 1
            return candidates, self._after.runner.truth(values[:number])[0] + unasked[number:]

        def of_original() -> list[Outcome]:
            return self._known("truth", lambda: list(self._before.runner.truth(values)[0]))

        truths, (candidates, wide) = self._both(of_original, of_candidate)
        return candidates, truths, wide

    def _judge(
        self,
        sets: list[InputSet],
        originals: list[Any],
        candidates: list[Outcome],
        truths: list[Outcome],
        wide: list[Outcome],
    ) -> str:
        """What is wrong with the candidates' outputs, in one line; empty when nothing is."""
        result = self._result
        problem, used = "", set()
        blind: list[bool] = []
        for index, one in enumerate(sets):
            outcomes = originals[index], candidates[index], truths[index], wide[index]
            trial = Trial(self._before, self._after, one, *outcomes, partial(self._nudged, sets, index))
            found = trial.bits() if self._exact else trial.rounding()
            used.add(trial.truth)
            result.truth_note = result.truth_note or trial.note
            result.outputs = _worst(result.outputs, trial.figures)
            blind += [trial.blind] if trial.blind is not None else []
            if found:
                problem = f"{found}, for {one.label}"
                break
        self._blind = bool(blind) and all(blind)
        result.truth = _truth_used(used)
        return problem

    def _nudged(self, sets: list[InputSet], index: int, seeds: Sequence[int]) -> list[Outcome]:
        """The truth of one set with constants moved, for each seed.

        Of light models those of all sets are found at once, as it takes longer to make one ready than to run it.
        """
        if not self._light or tuple(seeds) != FIRST_NUDGES:
            return [answer[0] for answer in self._before.runner.truth([sets[index].values], seeds)]
        answers = self._known("nudged", lambda: self._before.runner.truth([one.values for one in sets], seeds))
        return [answer[index] for answer in answers]


def _has_elements(outcome: Any) -> bool:
    """Whether there is anything in an output, or in a list of them."""
    return any(map(_has_elements, outcome)) if isinstance(outcome, list) else bool(np.size(outcome))


def _says_something(outcome: Any) -> bool:
    """Whether there is anything but infinity and not-a-number in an output, or in a list of them."""
    if isinstance(outcome, list):
        return any(map(_says_something, outcome))
    if isinstance(outcome, np.ndarray) and is_float(outcome.dtype):
        return bool(np.isfinite(outcome.astype(np.float64)).any())
    return _has_elements(outcome)


def _number_of_sets(seconds: float) -> int:
    return next((number for limit, number in _SETS if seconds <= limit), 1)


def _truth_used(used: set[Truth]) -> Truth:
    return "noise-floor" if "noise-floor" in used else next(iter(used), "none")


def _worst(so_far: list[Figures], new: list[Figures]) -> list[Figures]:
    known = {figures.name: figures for figures in so_far}
    for figures in new:
        known[figures.name] = known[figures.name].worst(figures) if figures.name in known else figures
    return list(known.values())
