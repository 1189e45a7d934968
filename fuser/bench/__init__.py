"""Latency, before and after, with a verdict that can be believed.

    result = fuser.benchmark("model.onnx", "model.fused.onnx")
    print(result)                      # a table
    result.verdicts                    # {"ort-off": "faster", "ort-on": "no measurable change", ...}

How it measures is in `fuser.bench.sampling`, how it concludes in `fuser.bench.statistics`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fuser.bench import environment
from fuser.bench.arms import Arm, select
from fuser.bench.instance import Job
from fuser.bench.result import ArmResult, Benchmark
from fuser.bench.sampling import AFTER, AGAIN, BEFORE, Plan, profile_of, take, worker_environment
from fuser.bench.subject import Subjects, prepare
from fuser.errors import FuserError, InputError
from fuser.scratch import scratch_folder

__all__ = ["ArmResult", "Benchmark", "Plan", "benchmark", "check_seconds"]

_MOST_THREADS = 1024
"""More than any machine has cores for; a runtime that is asked for a million of them does not come back."""

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def benchmark(
    before: Any,
    after: Any = None,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    batch: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    arms: Sequence[str] | None = None,
    profile: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure the latency of a model, or compare two.

    Args:
        before, after: paths (.onnx, or .pt2 of torch.export), ModelProtos, gs.Graphs, torch modules,
            GraphModules or ExportedPrograms; both of one kind.
        example_inputs: arrays by name for ONNX, positional arguments for torch; else seeded random values.
        example_kwargs: keyword arguments for torch.
        device: "cpu" or "cuda".
        threads: for each instance; by default as many as there are cores this process may use.
        batch: the size of the first axis.
        input_shapes: shapes by input name.
        dtype: float32, float16 or bfloat16, to which a torch module and its inputs are cast.
        seconds: how long each arm is measured, not counting the starting of processes; half of it when the
            verdict is clear by then, twice as long while it is inconclusive.
        arms: names from `fuser.bench.arms.ARMS`; by default those that fit the models and the device.
        profile: also say where the time goes, from the runtime's own profiler.
        progress: called with a line whenever something begins.

    A model that fails on one arm is reported there, and the other arms go on.  Ctrl-C ends the measurement;
    what there is by then is returned, and marked so.  Raises `InputError` for models or inputs that do not fit.
    """
    check_seconds(seconds)
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise InputError(f"threads must be from 1 to {_MOST_THREADS}, not {threads}")
    if batch is not None and batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    if seed < 0:
        raise InputError(f"seed must not be negative, and is {seed}")
    dtype = _DTYPES.get(dtype or "", dtype)
    if dtype not in (None, *_DTYPES.values()):
        raise InputError(f"there is no dtype {dtype!r}; give one of {', '.join(_DTYPES)}")
    threads = threads or environment.usable_cores()
    models = {BEFORE: before} if after is None else {BEFORE: before, AFTER: after}
    with scratch_folder() as folder:
        subjects = prepare(
            models,
            folder,
            example_inputs=example_inputs,
            example_kwargs=example_kwargs,
            batch=batch,
            input_shapes=input_shapes,
            dtype=dtype,
            seed=seed,
        )
        chosen = select(subjects.host, device, arms)
        result = Benchmark(
            subjects.names,
            subjects.costs,
            subjects.input_shapes,
            [],
            {**environment.describe(device, threads, seed), "worker_environment": worker_environment()},
        )
        for arm in chosen:
            result.arms.append(ArmResult(arm, seed=seed))
            _measure(result.arms[-1], subjects, threads, dtype, Plan(seconds), profile, progress)
            if result.arms[-1].samples.interrupted:
                result.interrupted = True
                break
    return result


def _measure(
    result: ArmResult,
    subjects: Subjects,
    threads: int,
    dtype: str | None,
    plan: Plan,
    profile: bool,
    progress: Callable[[str], None],
) -> None:
    """Fill in one arm."""
    arm = result.arm
    result.skipped = arm.unavailable()
    if result.skipped:
        return
    jobs = {role: _job(arm, subjects, role, threads, dtype) for role in subjects.models}
    result.isolated = all(job.isolated for job in jobs.values())
    if not result.isolated:
        result.notes.append("measured in this process: the module cannot be sent to another one")
    roles = {**jobs, AGAIN: jobs[BEFORE]} if AFTER in jobs else jobs
    with _torch_threads_kept(), environment.watch() as load:
        take(roles, plan, result.seed, result.samples, lambda line: progress(f"{arm.name}: {line}"))
        if profile and not result.samples.interrupted and not result.samples.error:
            progress(f"{arm.name}: profile")
            try:
                result.profile = {role: profile_of(job) for role, job in jobs.items()}
            except FuserError as error:
                result.notes.append(f"no profile: {error}")
            except KeyboardInterrupt:
                result.samples.interrupted = True
    result.other_load = load.share


def check_seconds(seconds: float) -> None:
    """Raise `InputError` for what is no time to measure in."""
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds must be positive, not {seconds:g}")


def _job(arm: Arm, subjects: Subjects, role: str, threads: int, dtype: str | None) -> Job:
    settings = {**arm.settings, "dtype": dtype} if dtype else arm.settings
    return Job(arm.host, subjects.models[role], subjects.inputs, threads, arm.device, settings)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """A module that is measured in this process sets the number of threads of this process."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(threads)
