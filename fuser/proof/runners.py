"""Running models: ONNX in a worker process, where a crash or a hang harms nobody, torch in this one.

A `Runner` gives a model's outputs for sets of inputs, as the runtime computes them (`run`) and in float64
(`truth`).  Inputs and outputs are numpy arrays throughout.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fuser.isolate import Crashed, Raised, TimedOut, Worker, cores
from fuser.onnx_objects import in_memory
from fuser.proof.outcome import Failure, Outcome, first_line
from fuser.scratch import scratch_folder

ONNX_RUNTIME = "fuser.proof.runners:run_onnx"
"""The function that runs a model in the worker process."""

Feeds = Sequence[Any]
"""Values in the order of the model's inputs; None leaves an input to its default."""


class Runner(Protocol):
    """A model that can be run.

    runtime: what runs it, for the report.
    seconds: what loading it once and the last `run` took together.
    """

    runtime: str
    seconds: float

    def run(self, sets: Sequence[Feeds], *, optimize: bool = False, first: bool = False) -> list[Outcome]:
        """Outputs as the runtime computes them, with its own optimizer off or on.

        first: stop after the first set that the model accepts, and return the outcomes so far.
        """
        ...

    def truth(self, sets: Sequence[Feeds], nudges: Sequence[int | None] = (None,)) -> list[list[Outcome]]:
        """Outputs in float64: a list for each nudge (a seed; None moves nothing), an outcome for each set."""
        ...


class Workers:
    """Processes in which ONNX models run: the second one is started only for two models that take long."""

    def __init__(self) -> None:
        # Two products at a time share the cores; threads that wait for each other would slow both down many times.
        threads = str(max(1, cores() // 2))
        env = {name: os.environ.get(name, threads) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self.first, self.second = (Worker(env, preload=("onnxruntime", "fuser.proof.float64_onnx")) for _ in range(2))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.first.close()
        self.second.close()


class OnnxRunner:
    """An ONNX model in ONNX Runtime's CPU provider.

    worker: the process in which it runs.
    """

    runtime = "ONNX Runtime"

    def __init__(self, path: str, names: Sequence[str | None], worker: Worker, timeout: float) -> None:
        """names: of the inputs, in the order of the values; None for a value that this model does not take."""
        self.path = path
        self.seconds = self._loading = 0.0
        self._names = names
        self.worker = worker
        self._timeout = timeout

    def run(self, sets: Sequence[Feeds], *, optimize: bool = False, first: bool = False) -> list[Outcome]:
        """See `Runner.run`."""
        return self._each([self._feeds(values) for values in sets], optimize, first)

    def truth(self, sets: Sequence[Feeds], nudges: Sequence[int | None] = (None,)) -> list[list[Outcome]]:
        """See `Runner.truth`."""
        feeds = [self._feeds(values) for values in sets]
        try:
            answer: list[list[Outcome]] = self.worker.call(
                "fuser.proof.float64_onnx:evaluate", self.path, feeds, nudges, timeout=self._timeout
            )
        except (Crashed, TimedOut, Raised) as error:
            return [[_failure(error)] * len(sets) for _ in nudges]
        return answer

    def stored(self, values: Feeds) -> Outcome:
        """Outputs in the types that are stored, each operator computed the same way wherever its operands come from."""
        try:
            (answer,) = self.worker.call(
                "fuser.proof.float64_onnx:evaluate_stored", self.path, [self._feeds(values)], timeout=self._timeout
            )
        except (Crashed, TimedOut, Raised) as error:
            return _failure(error)
        outcome: Outcome = answer
        return outcome

    def tensors(self, feeds: Feeds, names: Sequence[str], nudge: int | None = None) -> dict[str, Any]:
        """The float64 values of inner tensors; raises `IsolatedFailure`."""
        function = "fuser.proof.float64_onnx:intermediates"
        answer: dict[str, Any] = self.worker.call(
            function, self.path, self._feeds(feeds), list(names), nudge, timeout=self._timeout
        )
        return answer

    def _feeds(self, values: Feeds) -> dict[str, Any]:
        pairs = zip(self._names, values, strict=False)  # what is beyond the values has a default
        return {name: value for name, value in pairs if name is not None and value is not None}

    def _each(self, feeds: list[dict[str, Any]], optimize: bool, first: bool) -> list[Outcome]:
        """All sets in one call; where the child dies of one of them, each in a call of its own."""
        if not feeds:
            return []
        try:
            ran: Ran = self.worker.call(ONNX_RUNTIME, self.path, feeds, optimize, first, timeout=self._timeout)
        except (Crashed, TimedOut, Raised) as error:
            if len(feeds) == 1:
                return [_failure(error)]
            alone = self._each(feeds[:1], optimize, first)
            if isinstance(alone[0], Failure) and alone[0].kind in ("crashed", "timed out"):
                return alone * len(feeds)  # it is the model, not the input
            return alone + self._each(feeds[1:], optimize, first)
        self._loading = ran.loading or self._loading
        self.seconds = self._loading + ran.running
        return ran.outcomes


class Float64Runner:
    """Stands in for a runtime that cannot run a model: the float64 evaluation."""

    def __init__(self, runner: Runner, why: str) -> None:
        self.runtime = "the float64 evaluation"
        self.why = f"{runner.runtime} cannot run the original ({why})"
        self.inner = runner
        self.seconds = 0.0

    def run(self, sets: Sequence[Feeds], *, optimize: bool = False, first: bool = False) -> list[Outcome]:
        """See `Runner.run`."""
        started = time.perf_counter()
        outcomes: list[Outcome] = []
        for some in [[values] for values in sets] if first else [sets]:
            outcomes += self.inner.truth(some)[0]
            if first and not isinstance(outcomes[-1], Failure):
                break
        self.seconds = time.perf_counter() - started
        return outcomes

    def truth(self, sets: Sequence[Feeds], nudges: Sequence[int | None] = (None,)) -> list[list[Outcome]]:
        """See `Runner.truth`."""
        return self.inner.truth(sets, nudges)


class Ran(NamedTuple):
    """What came of a run: an outcome for each set of inputs, and the seconds of loading and running by themselves.

    loading: zero for a session that was kept.
    """

    outcomes: list[Outcome]
    loading: float
    running: float


def run_onnx(path: str, sets: Sequence[Mapping[str, Any]], optimize: bool, first: bool) -> Ran:
    """The outputs of the model at `path` in ONNX Runtime; see `Runner.run`.

    The session is kept for the next call, until another model is run or `release` is called.
    """
    import onnxruntime  # noqa: F401  - before the clock starts

    started = time.perf_counter()
    try:
        session, kept = _session(path, optimize)
    except Exception as error:
        return Ran([Failure("unsupported", first_line(error))] * len(sets), 0.0, 0.0)
    loaded = time.perf_counter()
    bfloat16 = {value.name for value in session.get_inputs() if value.type == "tensor(bfloat16)"}
    outcomes: list[Outcome] = []
    for feeds in sets:
        try:
            outcomes.append(session.run(None, {n: _fed(v, n in bfloat16) for n, v in feeds.items()}))
        except Exception as error:
            outcomes.append(Failure("refused", first_line(error)))
            continue
        if first:
            break
    return Ran(outcomes, 0.0 if kept else loaded - started, time.perf_counter() - loaded)


_sessions: dict[tuple[Any, ...], Any] = {}  # the last one, by what it was made from


def _session(path: str, optimize: bool) -> tuple[Any, bool]:
    """A session for the model, and whether it is that of the last call."""
    import onnxruntime as ort

    status = os.stat(path)
    key = path, optimize, status.st_ino, status.st_mtime_ns, status.st_size
    kept = key in _sessions
    if not kept:
        release()
        ort.set_default_logger_severity(4)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A constant weight would be packed and go through another kernel than one that is computed: other last bits.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False  # it would look for a place for each of them, one among all the others
        _sessions[key] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return _sessions[key], kept


def release() -> None:
    """Give the memory of the last run back."""
    _sessions.clear()


def _fed(value: Any, bfloat16: bool) -> Any:
    if not bfloat16:
        return value
    import onnx
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(np.uint16), onnx.TensorProto.BFLOAT16)


def _failure(error: Crashed | TimedOut | Raised) -> Failure:
    if isinstance(error, Crashed):
        return Failure("crashed", str(error))
    if isinstance(error, TimedOut):
        return Failure("timed out", str(error))
    return Failure("too-large" if "MemoryError" in str(error) else "unsupported", first_line(error))


@contextlib.contextmanager
def as_path(model: Any) -> Iterator[str]:
    """The path of an ONNX file that holds `model`: a path as it is, a model in memory in a temporary folder."""
    if isinstance(model, (str, os.PathLike)):
        yield os.fspath(model)
        return
    from fuser import files

    opened = in_memory(model)
    assert opened is not None
    with scratch_folder() as folder:
        target = folder / "model.onnx"
        files.save(files.ModelFile.from_proto(opened.proto), target)
        yield str(target)
