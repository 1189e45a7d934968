"""Take the samples: launches of fresh processes, rounds in random order, one process at work at a time."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fuser.bench import instance, statistics
from fuser.bench.instance import HOSTS, Job, Opened, OpTime, Warm
from fuser.bench.statistics import Interval, Verdict
from fuser.errors import FuserError
from fuser.isolate import Raised, Worker

BEFORE, AFTER, AGAIN = "before", "after", "again"

LAUNCHES = 10
"""How many sets of fresh processes a measurement gets; twice as many while it is inconclusive or coarse."""

LOOK_AFTER = 5
"""A result that is clear after this many launches ends the measurement."""

CLEAR = 0.03
"""No measurable change is clear when a change of 3 % would have been seen."""

COARSE = 0.10
"""A measurement that would not see a change of 10 % is given more launches."""

PATIENCE = 8
"""A measurement ends early when starting processes makes it this many times as long as it was meant to be."""

REQUEST = 0.03
"""Seconds of work for one turn: long beside the waking of a process, short beside the drift of a machine."""

SHORTEST = 1e-4
"""Seconds below which one sample is the mean of several inferences, so that the clock's calls do not show."""

LEAD_IN = 0.005
"""Seconds of untimed work at the start of a turn; models slower than ten times that go without."""

MOST_SAMPLES = 32
"""Samples taken in one turn."""

PROFILED = 1.0
"""Seconds of work that a profile is made of."""

PATIENT = 1200.0
"""Seconds in which a call has to return: to open a model may mean to compile it."""


def worker_environment() -> dict[str, str]:
    """What is set for the processes of instances, unless the user has set it.

    The idle threads of torch's OpenMP (libgomp) spin for some milliseconds before they sleep: in that time they
    steal the cores from the instance whose turn it is, and where another program wants a core too, each parallel
    region waits for a time slice (measured: 1.1 ms become 400 ms).  A hundredth of that is still long enough for
    the gaps between operators: on a quiet machine the latency is the same.
    """
    return {name: value for name, value in {"GOMP_SPINCOUNT": "3000"}.items() if name not in os.environ}


class Caller(Protocol):
    """Somebody who runs a function of `fuser.bench.instance`: `Worker`, or this process."""

    def call(self, function: str, *args: Any, timeout: float | None = None) -> Any: ...


class InProcess:
    """Calls in this process, for torch modules that cannot be sent to another."""

    def call(self, function: str, *args: Any, timeout: float | None = None) -> Any:
        module, name = function.split(":")
        try:
            return getattr(importlib.import_module(module), name)(*args)
        except Exception as error:
            raise Raised.of(error) from error


@dataclass
class Launch:
    """One set of fresh instances.  A round holds the samples of each role, in seconds."""

    opened: dict[str, Opened] = field(default_factory=dict)
    warm: dict[str, Warm] = field(default_factory=dict)
    rounds: list[dict[str, list[float]]] = field(default_factory=list)

    def medians(self, role: str) -> statistics.Array:
        """The median of each round."""
        return np.array([np.median(taken[role]) for taken in self.rounds])


@dataclass
class Samples:
    """All launches of one arm; `inner` is how many inferences each sample is the mean of."""

    launches: list[Launch] = field(default_factory=list)
    inner: int = 1
    error: str | None = None
    interrupted: bool = False

    @property
    def complete(self) -> list[Launch]:
        """The launches that got as far as a round."""
        return [launch for launch in self.launches if launch.rounds]

    def of(self, role: str) -> list[float]:
        """Every sample of a role, in the order in which they were taken."""
        return [x for launch in self.launches for taken in launch.rounds for x in taken[role]]

    def compare(self, seed: int) -> Comparison | None:
        """Effect, control and verdict; None while there is nothing to compare."""
        launches = self.complete
        if not launches or AFTER not in launches[0].rounds[0]:
            return None
        rng = np.random.default_rng(seed)
        medians = [{role: launch.medians(role) for role in (BEFORE, AFTER, AGAIN)} for launch in launches]
        change = statistics.estimate([statistics.effect(m[BEFORE], m[AFTER], m[AGAIN]) for m in medians], rng)
        same = statistics.estimate([statistics.control(m[BEFORE], m[AGAIN]) for m in medians], rng)
        return Comparison(change, same, statistics.judge(change, same, len(launches)))


@dataclass(frozen=True)
class Comparison:
    """change: after over before; same: before over itself, the A/A control."""

    change: Interval
    same: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Plan:
    """How long one arm is measured, not counting the starting of processes; twice as long at most, while
    the verdict is inconclusive or a change of 10 % would not be seen."""

    seconds: float = 10.0
    launches: int = LAUNCHES


def take(
    jobs: Mapping[str, Job],
    plan: Plan,
    seed: int,
    into: Samples,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Measure one arm; `jobs` are by role.  What has been measured is in `into` whatever happens.

    An error of a model ends the arm and is kept in `into.error`; Ctrl-C sets `into.interrupted`.
    """
    rng = np.random.default_rng(seed)
    started = time.monotonic()
    try:
        while True:
            into.launches.append(Launch())
            progress(f"launch {len(into.launches)}")
            _launch(jobs, plan.seconds / plan.launches, rng, into)
            overrun = time.monotonic() - started > PATIENCE * plan.seconds
            enough = overrun and len(into.launches) >= statistics.MIN_LAUNCHES
            if into.error or enough or _is_enough(into, plan, seed):
                return
    except KeyboardInterrupt:
        into.interrupted = True


def _is_enough(samples: Samples, plan: Plan, seed: int) -> bool:
    """Whether another launch would hardly change the verdict, or the time is up."""
    n, comparison = len(samples.launches), samples.compare(seed)
    if comparison is None:
        return n >= plan.launches
    word, resolution = comparison.verdict.word, comparison.verdict.resolution or 0.0
    if word in (statistics.FASTER, statistics.SLOWER) or (word == statistics.NO_CHANGE and resolution <= CLEAR):
        return n >= LOOK_AFTER
    coarse = word == statistics.INCONCLUSIVE or resolution > COARSE
    return n >= (2 * plan.launches if coarse else plan.launches)


def _launch(jobs: Mapping[str, Job], seconds: float, rng: np.random.Generator, into: Samples) -> None:
    """One set of instances: open, warm up, and go round for `seconds`; at least once."""
    launch = into.launches[-1]
    roles = list(jobs)
    at = "starting"
    with ExitStack() as stack:
        try:
            callers = {role: stack.enter_context(_caller(jobs[role])) for role in _shuffled(roles, rng)}
            for role in _shuffled(roles, rng):
                at = f"{role}: opening"
                launch.opened[role] = callers[role].call(_f("open_instance"), jobs[role], timeout=PATIENT)
            handles = {role: opened.handle for role, opened in launch.opened.items()}
            for role in _shuffled(roles, rng):
                at = f"{role}: warming up"
                limit = max(0.1, seconds / 3)
                launch.warm[role] = callers[role].call(_f("warm_up"), handles[role], limit, timeout=PATIENT)
            turn = Turn.of(max(warm.seconds for warm in launch.warm.values()))
            if len(into.launches) == 1:
                into.inner = turn.inner
            deadline = time.monotonic() + seconds
            while True:
                taken = {}
                for role in _shuffled(roles, rng):
                    at = f"{role}: running"
                    taken[role] = callers[role].call(
                        _f("measure"), handles[role], turn.samples, into.inner, turn.lead_in, timeout=PATIENT
                    )
                launch.rounds.append(taken)  # a round counts when every role has had its turn
                if time.monotonic() >= deadline:
                    return
        except FuserError as error:
            into.error = f"{at} failed: {error}"


def profile_of(job: Job) -> list[OpTime]:
    """Where one inference spends its time, from the runtime's own profiler in a process of its own.

    Raises `FuserError` when the model cannot be profiled.
    """
    with _caller(job) as caller:
        opened: Opened = caller.call(_f("open_instance"), job, timeout=PATIENT)
        warm: Warm = caller.call(_f("warm_up"), opened.handle, PROFILED, timeout=PATIENT)
        runs = max(3, min(100, int(PROFILED / warm.seconds)))
        ops: list[OpTime] = caller.call(_f("profile"), opened.handle, runs, timeout=PATIENT)
        return ops


@dataclass(frozen=True)
class Turn:
    """What one role does when it is asked: untimed inferences, then samples of `inner` inferences each."""

    lead_in: int
    samples: int
    inner: int

    @classmethod
    def of(cls, seconds: float) -> Turn:
        """The turn for a model that takes `seconds` an inference."""
        inner = max(1, math.ceil(SHORTEST / seconds))
        samples = min(MOST_SAMPLES, max(1, round(REQUEST / (seconds * inner))))
        lead_in = 0 if seconds > 10 * LEAD_IN else math.ceil(LEAD_IN / seconds)
        return cls(lead_in, samples, inner)


@contextmanager
def _caller(job: Job) -> Iterator[Caller]:
    """A process that has begun to import the runtime, or this one."""
    if job.isolated:
        with Worker(env=worker_environment(), preload=[HOSTS[job.host]]) as worker:
            worker.start()
            yield worker
    else:
        try:
            yield InProcess()
        finally:
            instance.close_all()


def _f(name: str) -> str:
    return f"{instance.__name__}:{name}"


def _shuffled(roles: list[str], rng: np.random.Generator) -> list[str]:
    return [roles[i] for i in rng.permutation(len(roles))]
