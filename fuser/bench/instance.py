"""What happens in the process of an instance: open a model, warm it up, time it, profile it.

An instance is one model, ready to run, under one arm.  The functions below are what the parent calls, over
`fuser.isolate.Worker`, or directly where a torch module cannot be sent to another process.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fuser.bench.statistics import settled

HOSTS = {"onnx": "fuser.bench.host_onnx", "torch": "fuser.bench.host_torch"}


@dataclass(frozen=True)
class Job:
    """What to open.  `model` is a path, or a torch module when it stays in this process; `inputs` are arrays
    by name for ONNX, and `(args, kwargs)` or the path they were saved to for torch."""

    host: str
    model: Any
    inputs: Any
    threads: int
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def isolated(self) -> bool:
        """Whether it can be opened in another process."""
        return isinstance(self.model, str)


class Instance(Protocol):
    """A model under an arm, with its inputs in place."""

    def run(self) -> Any:
        """One inference, finished when the call returns; on CUDA, only enqueued."""
        ...

    def time(self, inner: int) -> float:
        """Seconds for each of `inner` inferences in a row."""
        ...

    def profile(self, runs: int) -> list[OpTime]:
        """The runtime's own profile."""
        ...

    def peak_bytes(self) -> int | None:
        """The most memory taken so far: of the GPU where there is one, else of this process."""
        ...


@dataclass(frozen=True)
class Opened:
    """How a model came up: seconds to create the session (to read the module, for torch) and for its first
    run, which compiles where the arm compiles; the peak memory of the process before the model was read."""

    handle: int
    load_seconds: float
    first_seconds: float
    baseline_bytes: int | None


@dataclass(frozen=True)
class Warm:
    """seconds: of one inference when nothing disturbs it, about; settled: whether it stopped drifting within its time;
    peak_bytes: the most memory taken until then."""

    seconds: float
    settled: bool
    peak_bytes: int | None


@dataclass(frozen=True)
class OpTime:
    """Seconds that one inference spends in the operators of one type, and how many of them run."""

    op: str
    seconds: float
    count: int


_instances: dict[int, Instance] = {}


def open_instance(job: Job) -> Opened:
    """Open a model and run it once; whatever the runtime raises comes through."""
    host = importlib.import_module(HOSTS[job.host])
    baseline = peak_memory()
    started = time.perf_counter()
    instance: Instance = host.open_model(job)
    loaded = time.perf_counter()
    instance.time(1)
    ready = time.perf_counter()
    handle = len(_instances)
    _instances[handle] = instance
    return Opened(handle, loaded - started, ready - loaded, baseline)


def warm_up(handle: int, limit: float) -> Warm:
    """Run until three medians in a row agree, for at most `limit` seconds (once more at the least)."""
    instance, medians = _instances[handle], list[float]()
    deadline = time.perf_counter() + limit
    estimate = fastest = instance.time(1)
    while time.perf_counter() < deadline and not settled(medians):
        batch = max(3, min(50, int(limit / 20 / estimate)))
        medians.append(statistics.median(instance.time(1) for _ in range(batch)))
        estimate, fastest = medians[-1], min(fastest, medians[-1])
    return Warm(fastest, settled(medians), instance.peak_bytes())


def measure(handle: int, samples: int, inner: int, lead_in: int) -> list[float]:
    """`samples` times in seconds, each the mean of `inner` inferences; `lead_in` inferences go untimed.

    The process has just been woken up and its caches hold what others left there: that is what the lead-in
    is for.
    """
    instance = _instances[handle]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(lead_in):
            instance.run()
        return [instance.time(inner) for _ in range(samples)]
    finally:
        if collecting:
            gc.enable()


def profile(handle: int, runs: int) -> list[OpTime]:
    """Where the time goes, by operator type, the slowest first."""
    return sorted(_instances[handle].profile(runs), key=lambda op: -op.seconds)


def close_all() -> None:
    """Forget every instance of this process; only torch modules are ever opened in the parent."""
    _instances.clear()
    importlib.import_module(HOSTS["torch"]).forget()
    gc.collect()


def peak_memory() -> int | None:
    """Peak resident bytes of this process, or None where the system does not tell.

    Not `getrusage`: on Linux a child's maximum starts at its parent's.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
