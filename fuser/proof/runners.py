"""Running models: ONNX in a worker process, where a crash or a hang harms nobody, torch in this one.

A `Runner` gives a model's outputs for sets of inputs, as the runtime computes them (`run`) and in float64
(`truth`).  Inputs and outputs are numpy arrays throughout.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fuser.isolate import Crashed, IsolatedFailure, Raised, TimedOut, Worker
from fuser.proof.outcome import Failure, Outcome, first_line

ONNX_RUNTIME = "fuser.proof.runners:run_onnx"
"""The function that runs a model in the worker process."""

Feeds = Sequence[Any]
"""Values in the order of the model's inputs; None leaves an input to its default."""


class Runner(Protocol):
    """A model that can be run.

    runtime: what runs it, for the report.
    """

    runtime: str

    def run(self, sets: Sequence[Feeds], *, optimize: bool = False, first: bool = False) -> list[Outcome]:
        """Outputs as the runtime computes them, with its own optimizer off or on.

        first: stop after the first set that the model accepts, and return the outcomes so far.
        """
        ...

    def truth(self, sets: Sequence[Feeds], nudges: Sequence[int | None] = (None,)) -> list[list[Outcome]]:
        """Outputs in float64: a list for each nudge (a seed; None moves nothing), an outcome for each set."""
        ...


class OnnxRunner:
    """An ONNX model in ONNX Runtime's CPU provider."""

    runtime = "ONNX Runtime"

    def __init__(self, path: str, names: Sequence[str | None], worker: Worker, timeout: float) -> None:
        """names: of the inputs, in the order of the values; None for a value that this model does not take."""
        self.path = path
        self._names = names
        self._worker = worker
        self._timeout = timeout

    def run(self, sets: Sequence[Feeds], *, optimize: bool = False, first: bool = False) -> list[Outcome]:
        """See `Runner.run`."""
        return self._each([self._feeds(values) for values in sets], optimize, first)

    def truth(self, sets: Sequence[Feeds], nudges: Sequence[int | None] = (None,)) -> list[list[Outcome]]:
        """See `Runner.truth`."""
        feeds = [self._feeds(values) for values in sets]
        try:
            answer: list[list[Outcome]] = self._worker.call(
                "fuser.proof.float64_onnx:evaluate", self.path, feeds, nudges, timeout=self._timeout
            )
        except (Crashed, TimedOut, Raised) as error:
            return [[_failure(error)] * len(sets) for _ in nudges]
        return answer

    def warm(self) -> None:
        """Have the worker ready, so that the first run can be timed."""
        with contextlib.suppress(IsolatedFailure):  # the run itself will say
            self._worker.call("fuser.proof.runners:warm", timeout=self._timeout)

    def tensors(self, feeds: Feeds, names: Sequence[str]) -> dict[str, Any]:
        """The float64 values of inner tensors; raises `IsolatedFailure`."""
        answer: dict[str, Any] = self._worker.call(
            "fuser.proof.float64_onnx:intermediates", self.path, self._feeds(feeds), list(names), timeout=self._timeout
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
            answer: list[Outcome] = self._worker.call(
                ONNX_RUNTIME, self.path, feeds, optimize, first, timeout=self._timeout
            )
        except (Crashed, TimedOut, Raised) as error:
            if len(feeds) == 1:
                return [_failure(error)]
            alone = self._each(feeds[:1], optimize, first)
            if isinstance(alone[0], Failure) and alone[0].kind in ("crashed", "timed out"):
                return alone * len(feeds)  # it is the model, not the input
            return alone + self._each(feeds[1:], optimize, first)
        return answer


class Float64Runner:
    """Stands in for a runtime that cannot run a model: the float64 evaluation."""

    def __init__(self, runner: Runner, why: str) -> None:
        self.runtime = "the float64 evaluation"
        self.why = f"{runner.runtime} cannot run the original ({why})"
        self.inner = runner

    def run(self, sets: Sequence[Feeds], *, optimize: bool = False, first: bool = False) -> list[Outcome]:
        """See `Runner.run`."""
        if not first:
            return self.inner.truth(sets)[0]
        outcomes: list[Outcome] = []
        for values in sets:
            outcomes += self.inner.truth([values])[0]
            if not isinstance(outcomes[-1], Failure):
                break
        return outcomes

    def truth(self, sets: Sequence[Feeds], nudges: Sequence[int | None] = (None,)) -> list[list[Outcome]]:
        """See `Runner.truth`."""
        return self.inner.truth(sets, nudges)


def run_onnx(path: str, sets: Sequence[Mapping[str, Any]], optimize: bool, first: bool) -> list[Outcome]:
    """The outputs of the model at `path` in ONNX Runtime, one outcome for each set of inputs; see `Runner.run`."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimize else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return [Failure("unsupported", first_line(error))] * len(sets)
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
    return outcomes


def warm() -> None:
    """Import what a run needs."""
    import onnxruntime  # noqa: F401


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
    """The path of an ONNX file that holds `model`: a path as it is, a ModelProto in a temporary folder."""
    if isinstance(model, (str, os.PathLike)):
        yield os.fspath(model)
        return
    from fuser import files

    with tempfile.TemporaryDirectory(prefix="fuser-") as folder:
        target = Path(folder) / "model.onnx"
        files.save(files.ModelFile.from_proto(model), target)
        yield str(target)
