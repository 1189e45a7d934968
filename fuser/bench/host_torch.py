"""Torch modules, exported programs and graph modules, eager or compiled, timed."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fuser.bench.instance import Job, OpTime, peak_memory

_FLUSH_BYTES = 256 << 20
"""More than the L2 cache of any GPU: writing this many bytes leaves nothing of the model in it."""


class TorchInstance:
    """A module and its inputs on a device; `settings["mode"]` is eager, compile, freeze or cuda-graph."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], job: Job) -> None:
        mode = job.settings["mode"]
        if mode in ("compile", "freeze"):
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it runs eagerly and says nothing
            if mode == "freeze":
                import torch._inductor.config as inductor

                inductor.freezing = True
            model = torch.compile(model, dynamic=False)
        self.run: Callable[[], Any] = torch.inference_mode()(lambda: model(*args, **kwargs))
        self._cuda = job.device == "cuda"
        if self._cuda:
            self._scratch = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        if mode == "cuda-graph":
            self.run = _captured(self.run)

    def time(self, inner: int) -> float:
        return self._time_on_gpu(inner) if self._cuda else self._time(inner)

    def _time(self, inner: int) -> float:
        run = self.run
        started = time.perf_counter_ns()
        for _ in range(inner):
            run()
        return (time.perf_counter_ns() - started) / inner / 1e9

    def _time_on_gpu(self, inner: int) -> float:
        """By CUDA events, from an idle GPU with a cold L2 cache, so that launch gaps count."""
        total = 0.0
        for _ in range(inner):
            start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._scratch.zero_()
            torch.cuda.synchronize()
            start.record()
            self.run()
            end.record()
            torch.cuda.synchronize()
            total += start.elapsed_time(end) / 1e3
        return total / inner

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if self._cuda else peak_memory()

    def profile(self, runs: int) -> list[OpTime]:
        """From torch's profiler: self time, on the GPU where there is one."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(runs):
                self.run()
        field = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        times = [(e.key, getattr(e, field) / 1e6 / runs, e.count) for e in profiler.key_averages()]
        return [OpTime(op, seconds, round(count / runs)) for op, seconds, count in times if seconds > 0]


def open_model(job: Job) -> TorchInstance:
    """Load what `fuser.bench.subject` saved, or copy a module of this process; moves it to the device."""
    torch.set_num_threads(job.threads)
    dtype = job.settings.get("dtype")
    # A fresh copy lies elsewhere in memory, as it would in a fresh process, and `to` works in place.
    model = _load(job.model) if isinstance(job.model, str) else _copied(job.model)
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if isinstance(model, torch.nn.Module) and (dtype or job.device != "cpu"):
        model = model.to(device=job.device, dtype=getattr(torch, dtype) if dtype else None)
    args, kwargs = _load(job.inputs) if isinstance(job.inputs, str) else job.inputs
    return TorchInstance(model, _moved(args, job, dtype), _moved(kwargs, job, dtype), job)


def forget() -> None:
    """Drop compiled code: dynamo counts the copies of a module against one limit."""
    torch._dynamo.reset()


def _copied(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of how it copies its own graphs
        return copy.deepcopy(model)


def _load(path: str) -> Any:
    return torch.export.load(path) if path.endswith(".pt2") else torch.load(path, weights_only=False)


def _moved(inputs: Any, job: Job, dtype: str | None) -> Any:
    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        cast = getattr(torch, dtype) if dtype and value.is_floating_point() else None
        return value.to(device=job.device, dtype=cast)

    return torch.utils._pytree.tree_map(move, inputs)


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph; warmed up on a side stream first, as capture demands."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
