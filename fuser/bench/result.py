"""The result of a benchmark: what was measured, and how sure it is."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from math import log
from typing import Any

import numpy as np

from fuser.bench import statistics
from fuser.bench.arms import Arm
from fuser.bench.costs import Costs
from fuser.bench.environment import OTHER_LOAD
from fuser.bench.instance import OpTime
from fuser.bench.sampling import AFTER, BEFORE, Comparison, Samples
from fuser.bench.statistics import Interval, Summary

DRIFT = 0.05
"""How much slower the last third of the measurements may be than the first before it is worth a warning."""


@dataclass
class ArmResult:
    """One arm.  `skipped` says why it could not be run here, `samples.error` what went wrong when it was.

    profile: the time in operators, by role, where it was asked for.
    other_load: what other processes took of the machine meanwhile, 0 to 1.
    """

    arm: Arm
    samples: Samples = field(default_factory=Samples)
    skipped: str | None = None
    isolated: bool = True
    profile: dict[str, list[OpTime]] = field(default_factory=dict)
    other_load: float | None = None
    notes: list[str] = field(default_factory=list)
    seed: int = 0

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """By role, over all launches."""
        launches = self.samples.complete
        roles = launches[0].rounds[0] if launches else ()
        return {role: statistics.summarize(self.samples.of(role)) for role in roles}

    @cached_property
    def comparison(self) -> Comparison | None:
        """None where one model was measured, or nothing."""
        return self.samples.compare(self.seed)

    @property
    def problem(self) -> str | None:
        """Why there is nothing, or less than there should be."""
        return self.skipped or self.samples.error

    def load_seconds(self, role: str) -> float | None:
        """The median time to create the session; for torch, to read the module and import the compiler."""
        return _median([x.opened[role].load_seconds for x in self.samples.launches if role in x.opened])

    def first_seconds(self, role: str) -> float | None:
        """The median time of the first run, which compiles where the arm compiles."""
        return _median([x.opened[role].first_seconds for x in self.samples.launches if role in x.opened])

    def peak_bytes(self, role: str) -> int | None:
        """The peak memory of a fresh process, or of the GPU; None where the model had no process of its own."""
        peaks = [x.warm[role].peak_bytes for x in self.samples.launches if role in x.warm]
        peak = _median([float(p) for p in peaks if p is not None])
        own = self.isolated or self.arm.device == "cuda"
        return None if peak is None or not own else int(peak)

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader should hold against the numbers."""
        found = list(self.notes)
        for role, summary in self.summaries.items():
            who = f"{role}: " if len(self.summaries) > 1 else ""
            if summary.cv > statistics.HIGH_VARIATION:
                limit = f"{statistics.HIGH_VARIATION:.0%}"
                found.append(f"{who}the coefficient of variation is {summary.cv:.0%} (over {limit})")
            if summary.n < statistics.MIN_SAMPLES:
                found.append(f"{who}{summary.n} samples are few (under {statistics.MIN_SAMPLES}); give it more time")
        if self.summaries:
            drift = statistics.drift([float(m) for x in self.samples.complete for m in x.medians(BEFORE)])
            if drift > DRIFT:
                found.append(f"the machine became {drift:.0%} slower meanwhile: throttling, or other load")
            if self.other_load is not None and self.other_load > OTHER_LOAD:
                found.append(f"other processes took {self.other_load:.0%} of the machine meanwhile")
            unsettled = [x for x in self.samples.complete if not all(w.settled for w in x.warm.values())]
            if len(unsettled) * 2 > len(self.samples.complete):
                found.append(f"the latency did not settle during warm-up in {len(unsettled)} launches")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; times in seconds."""
        comparison = self.comparison
        launches = [
            {
                "opened": {role: dataclasses.asdict(x) for role, x in launch.opened.items()},
                "warm_up": {role: dataclasses.asdict(x) for role, x in launch.warm.items()},
                "rounds": launch.rounds,
            }
            for launch in self.samples.launches
        ]
        return {
            "name": self.arm.name,
            "title": self.arm.title,
            "settings": dict(self.arm.settings),
            "problem": self.problem,
            "isolated": self.isolated,
            "interrupted": self.samples.interrupted,
            "summary": {role: dataclasses.asdict(summary) for role, summary in self.summaries.items()},
            "load_seconds": {role: self.load_seconds(role) for role in self.summaries},
            "first_seconds": {role: self.first_seconds(role) for role in self.summaries},
            "peak_bytes": {role: self.peak_bytes(role) for role in self.summaries},
            "ratio": _interval(comparison.change) if comparison else None,
            "control": _interval(comparison.same) if comparison else None,
            "verdict": dataclasses.asdict(comparison.verdict) if comparison else None,
            "warnings": self.warnings,
            "other_load": self.other_load,
            "profile": {role: [dataclasses.asdict(op) for op in ops] for role, ops in self.profile.items()},
            "inner": self.samples.inner,
            "launches": launches,
        }


@dataclass
class Benchmark:
    """What `fuser.benchmark` returns.  Roles: `before`, `after`, and `again`, a second instance of `before`.

    interrupted: Ctrl-C ended it early; what was measured until then is here.
    """

    names: dict[str, str]
    costs: dict[str, Costs]
    inputs: dict[str, str]
    arms: list[ArmResult]
    environment: dict[str, Any]
    interrupted: bool = False

    @property
    def verdicts(self) -> dict[str, str]:
        """The word of each arm that could compare: faster, slower, no measurable change, inconclusive."""
        return {a.arm.name: a.comparison.verdict.word for a in self.arms if a.comparison}

    @property
    def measured(self) -> list[ArmResult]:
        """The arms that have samples."""
        return [arm for arm in self.arms if arm.summaries]

    def slower_than(self, percent: float = 0.0) -> list[ArmResult]:
        """The arms that fail a check: *slower*, with the whole interval of the ratio above `percent`; and
        those in which only the second model failed to run."""
        slower = []
        for result in self.arms:
            comparison, error = result.comparison, result.samples.error
            if error and error.startswith(f"{AFTER}:"):
                slower.append(result)
            elif comparison and comparison.verdict.word == statistics.SLOWER:
                slower += [result] if comparison.change.log_low > log(1 + percent / 100) else []
        return slower

    def to_dict(self) -> dict[str, Any]:
        """Everything, raw samples and environment included, as plain values for JSON."""
        return {
            "schema": 1,
            "models": {role: {"name": self.names[role], **dataclasses.asdict(self.costs[role])} for role in self.names},
            "inputs": self.inputs,
            "environment": self.environment,
            "confidence": statistics.LEVEL,
            "interrupted": self.interrupted,
            "arms": [arm.to_dict() for arm in self.arms],
        }

    def render(self) -> Any:
        """A rich renderable: tables that a person can read."""
        from fuser.bench.render import render

        return render(self)

    def __str__(self) -> str:
        from fuser.bench.render import as_text

        return as_text(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the distributions and the ratios to a .png or .svg file.

        Raises `InputError` when matplotlib is missing, or for another kind of file.
        """
        from fuser.bench.plot import plot

        plot(self, path)


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _interval(interval: Interval) -> dict[str, float | None]:
    """JSON knows no infinity: an open end is null."""
    ends = {"ratio": interval.ratio, "low": interval.low, "high": interval.high}
    return {name: value if math.isfinite(value) else None for name, value in ends.items()}
