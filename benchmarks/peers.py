"""fuser side by side with the peers that are installed, in one run, on the same files.

    python benchmarks/peers.py [--net resnet] [--seconds 10] [--write]

Each optimizer runs in a process of its own; its seconds and peak memory are told, imports and, for fuser, the
proof included.  Whether its result is right
is judged by the torch module in float64: no further from that than ten times the raw export is, and one part in
a hundred thousand.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import onnx
import onnxruntime as ort
import results
import torch

import fuser
from fuser import foreign
from fuser.bench import Benchmark
from fuser.bench.instance import peak_memory
from fuser.bench.render import byte_count, seconds
from fuser.isolate import IsolatedFailure, Worker

LIMIT = 600.0
"""Seconds after which an optimizer is given up."""

ONNX_HEADER = ("network", "optimizer", "result", "nodes", "BatchNorms", "own time", "peak memory")
TORCH_HEADER = ("network", "optimizer", "arm", "result", "BatchNorms", "own time", "after / before")


def by_fuser(source: str, target: str) -> None:
    fuser.optimize(source, target)


def by_onnxruntime(source: str, target: str) -> None:
    """With fusions into operators of its own, which a file for this runtime alone may have."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = target
    options.log_severity_level = 3
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


OPTIMIZERS: dict[str, Callable[[str, str], None]] = {
    "fuser": by_fuser,
    **{name: getattr(foreign, name) for name in foreign.STEPS},
    "onnxruntime": by_onnxruntime,
}


def optimize(name: str, source: str, target: str) -> tuple[float, int | None]:
    """Run one optimizer; seconds, and the peak memory of this process."""
    started = time.perf_counter()
    OPTIMIZERS[name](source, target)
    return time.perf_counter() - started, peak_memory()


def relative_error(y: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    return float(np.abs(y.astype(np.float64) - truth).max() / np.abs(truth).max())


def run_onnx(path: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The first output, without the runtime's own optimizer."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def is_right(error: float, own: float) -> bool:
    """Whether a result is as near to the truth as can be asked, when the unoptimized model is off by `own`."""
    return error <= max(10 * own, 1e-5)


def verdict(error: float, own: float) -> str:
    return f"right ({error:.0e})" if is_right(error, own) else f"WRONG ({error:.0e})"


def onnx_rows(name: str, folder: Path, time_each: float) -> list[list[Any]]:
    """The raw export and what each optimizer makes of it."""
    model, x = architectures.build(name), architectures.example()
    truth = _float64(model, x)
    raw = str(architectures.export_raw(model, folder / "raw.onnx"))
    own = relative_error(run_onnx(raw, x.numpy()), truth)
    nodes = _nodes(raw)
    arms = ["ort-off", "ort-on"]
    rows: list[list[Any]] = [[name, "(raw)", verdict(own, own), len(nodes), nodes.count("BatchNormalization"), "", ""]]
    rows[0] += ["1"] * len(arms)
    for optimizer in OPTIMIZERS:
        if not importlib.util.find_spec(optimizer):
            continue
        print(f"{name}: {optimizer}", file=sys.stderr)
        target = str(folder / f"{optimizer}.onnx")
        try:
            with Worker() as worker:  # as the module `peers`: there, `__main__` is another one
                took, memory = worker.call("peers:optimize", optimizer, raw, target, timeout=LIMIT)
            with Worker() as worker:
                output = worker.call("peers:run_onnx", target, x.numpy(), timeout=LIMIT)
        except IsolatedFailure as failure:
            rows.append([name, optimizer, f"FAILED: {failure}", *[""] * (4 + len(arms))])
            continue
        nodes = _nodes(target)
        row = [name, optimizer, verdict(relative_error(output, truth), own), len(nodes)]
        row += [nodes.count("BatchNormalization"), seconds(took), byte_count(memory)]
        benchmark = fuser.benchmark(raw, target, seconds=time_each, arms=arms)
        rows.append(row + [_conclusion(benchmark, arm) for arm in arms])
    return rows


def torch_rows(name: str, time_each: float) -> list[list[Any]]:
    """torch.fx's own fusion, and fuser; eager, and under Inductor with frozen weights, which folds by itself."""
    from torch.fx.experimental.optimization import fuse

    model, x = architectures.build(name), architectures.example()
    truth = _float64(model, x)
    with torch.no_grad():
        own = relative_error(model(x).numpy(), truth)
    optimizers: dict[str, Callable[[], Any]] = {
        "fuser": lambda: fuser.optimize(model, example_inputs=(x,)).model,
        "torch.fx fuse": lambda: fuse(model),
    }
    rows: list[list[Any]] = []
    for optimizer, run in optimizers.items():
        print(f"{name}: {optimizer}", file=sys.stderr)
        started = time.perf_counter()
        try:
            fused = run()
        except Exception as error:  # a peer may raise anything
            rows.append([name, optimizer, "", f"FAILED: {type(error).__name__}: {error}", "", "", ""])
            continue
        took = seconds(time.perf_counter() - started)
        with torch.no_grad():
            right = verdict(relative_error(fused(x).numpy(), truth), own)
        arms = ["torch-eager", "torch-freeze"]
        benchmark = fuser.benchmark(model, fused, example_inputs=(x,), seconds=time_each, arms=arms)
        left = sum(count for op, count in benchmark.costs["after"].ops.items() if "batch" in op.lower())
        for result in benchmark.arms:
            rows.append([name, optimizer, result.arm.name, right, left, took, _conclusion(benchmark, result.arm.name)])
    return rows


def _float64(model: torch.nn.Module, x: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        truth = model.double()(x.double()).numpy()
    model.float()
    return np.asarray(truth)


def _nodes(path: str) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def _conclusion(benchmark: Benchmark, arm: str) -> str:
    result = next(r for r in benchmark.arms if r.arm.name == arm)
    return " ".join(results.comparison(result)[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=architectures.names(), help="repeatable; default: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each arm of each result")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    options = parser.parse_args()
    onnx_table, torch_table = [], []
    for name in options.net or architectures.names():
        with tempfile.TemporaryDirectory() as folder:
            onnx_table += onnx_rows(name, Path(folder), options.seconds)
        torch_table += torch_rows(name, options.seconds)
    header = (*ONNX_HEADER, "after / before, ORT's optimizer off", "after / before, ORT's optimizer on")
    versions = ", ".join(f"{n} {_version(n)}" for n in OPTIMIZERS if n != "fuser" and importlib.util.find_spec(n))
    body = "\n\n".join(
        (
            f"{results.machine()}\nPeers: {versions}.",
            results.table(header, onnx_table),
            results.table(TORCH_HEADER, torch_table),
        )
    )
    print(body)
    if options.write:
        results.write("Side by side", body)


def _version(name: str) -> str:
    return getattr(importlib.import_module(name), "__version__", "(no version)")


if __name__ == "__main__":
    main()
