"""ONNX Runtime sessions, timed."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fuser.bench.instance import Job, OpTime, peak_memory
from fuser.scratch import scratch_folder

LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "on": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class OnnxInstance:
    """A session and its inputs, as `OrtValue`s on the device: no copy is timed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        session: Any = _session(job)
        names = [output.name for output in session.get_outputs()]
        values = _values(session, job)
        if job.device == "cuda":
            binding = session.io_binding()
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(name, "cuda")
            self.run: Callable[[], Any] = lambda: session.run_with_iobinding(binding)
        else:
            self.run = _runner(session, names, values)

    def time(self, inner: int) -> float:
        run = self.run
        started = time.perf_counter_ns()
        for _ in range(inner):
            run()
        return (time.perf_counter_ns() - started) / inner / 1e9

    def peak_bytes(self) -> int | None:
        return peak_memory()

    def profile(self, runs: int) -> list[OpTime]:
        """From ONNX Runtime's profiler, over a session of its own; the first run is left out."""
        with scratch_folder() as folder:
            session: Any = _session(self._job, profile=str(folder / "ort"))
            names = [output.name for output in session.get_outputs()]
            run = _runner(session, names, _values(session, self._job, device="cpu"))
            for _ in range(runs + 1):
                run()
            events = json.loads(Path(session.end_profiling()).read_text())
        return op_times(events, runs)


def op_times(events: list[dict[str, Any]], runs: int) -> list[OpTime]:
    """Sum the kernel times of the last `runs` of `runs` + 1 runs in a profile of ONNX Runtime, by type."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    kernels.sort(key=lambda event: event["ts"])
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in kernels[len(kernels) // (runs + 1) :]:
        op = event["args"]["op_name"]
        seconds[op] += event["dur"] / 1e6 / runs
        counts[op] += 1
    return [OpTime(op, seconds[op], round(counts[op] / runs)) for op in seconds]


def open_model(job: Job) -> OnnxInstance:
    """A session for `job.model`; raises what ONNX Runtime raises, and RuntimeError when it falls back."""
    return OnnxInstance(job)


def _session(job: Job, profile: str | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[job.settings["optimizer"]]
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    # Idle threads that spin steal the cores from the instance whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    provider = job.settings["provider"]
    disabled = list(job.settings.get("disabled", ()))
    session = ort.InferenceSession(job.model, options, providers=[provider], disabled_optimizers=disabled or None)
    if provider not in session.get_providers():
        fallback = session.get_providers()[0]
        raise RuntimeError(f"{provider} could not be started and ONNX Runtime fell back to {fallback}")
    return session


def _runner(session: Any, names: list[str], values: dict[str, Any]) -> Callable[[], Any]:
    if all(isinstance(value, ort.OrtValue) for value in values.values()):
        return lambda: session.run_with_ort_values(names, values)
    return lambda: session.run(names, values)


def _values(session: Any, job: Job, device: str | None = None) -> dict[str, Any]:
    """The inputs that the session has, as `OrtValue`s where all of them can be."""
    names = {value.name for value in session.get_inputs()}
    inputs = {name: value for name, value in job.inputs.items() if name in names}
    if all(isinstance(value, np.ndarray) and value.dtype != object for value in inputs.values()):
        return {name: _value(value, device or job.device) for name, value in inputs.items()}
    return inputs  # sequences and strings


def _value(array: np.ndarray[Any, Any], device: str) -> ort.OrtValue:
    array = np.asarray(array, order="C")
    if array.dtype.name in _RAW:  # ml_dtypes: ONNX Runtime wants the bits
        bits = array.view(np.uint8 if array.itemsize == 1 else np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _RAW[array.dtype.name])
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


_RAW = {"bfloat16": 16, "float8_e4m3fn": 17, "float8_e4m3fnuz": 18, "float8_e5m2": 19, "float8_e5m2fnuz": 20}
"""TensorProto.DataType of the types that numpy lacks."""
