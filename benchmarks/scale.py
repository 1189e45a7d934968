"""How time and memory grow with the model: chains of (Conv, BatchNorm, Relu), one wide graph, one large file.

    python benchmarks/scale.py                      # chains up to 33,000 triples (100,000 nodes), and a wide graph
    python benchmarks/scale.py --triples 1000 4000
    python benchmarks/scale.py --large              # also a 0.94 GB file

Every run is a fresh process; seconds are its wall time without the start of the interpreter and its imports, memory
is its highest resident set.  Installed peers run on the same files (`--peers`); one that takes longer than
`--timeout` is said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

CHANNELS = 4

RUN = """
import json, resource, time
from pathlib import Path
{setup}
started = time.perf_counter()
{call}
seconds = time.perf_counter() - started
status = Path("/proc/self/status")  # ru_maxrss would count what this process was before its exec
if status.exists():
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak / 1024]))
"""

TOOLS = {
    "fuser": (
        "import fuser.api, fuser.files, fuser.graphs.onnx",
        "fuser.optimize({source!r}, {target!r}, verify=False)",
    ),
    "onnxslim": ("import onnxslim", "onnxslim.slim({source!r}, {target!r})"),
    "onnxsim": ("import onnx, onnxsim", "onnx.save(onnxsim.simplify(onnx.load({source!r}))[0], {target!r})"),
    "onnxscript": (
        "import onnx, onnxscript.optimizer",
        "onnx.save(onnxscript.optimizer.optimize(onnx.load({source!r})), {target!r})",
    ),
    "onnxoptimizer": (
        "import onnx, onnxoptimizer",
        "onnx.save(onnxoptimizer.optimize(onnx.load({source!r})), {target!r})",
    ),
    "onnxruntime": (
        "import onnxruntime as ort\n"
        "options = ort.SessionOptions()\n"
        "options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED",
        "options.optimized_model_filepath = {target!r}\nort.InferenceSession({source!r}, options)",
    ),
}


def batch_norm(source: str, target: str, number: int) -> onnx.NodeProto:
    parameters = [f"{kind}{number}" for kind in ("gamma", "beta", "mean", "var")]
    return helper.make_node("BatchNormalization", [source, *parameters], [target], name=f"bn{number}")


def constants(number: int, channels: int, kernel: int, rng: np.random.Generator) -> list[TensorProto]:
    scale = 1 / np.sqrt(channels * kernel * kernel)
    weight = (rng.standard_normal((channels, channels, kernel, kernel)) * scale).astype(np.float32)
    tensors = [numpy_helper.from_array(weight, f"w{number}")]
    for kind in ("gamma", "beta", "mean", "var"):
        values = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        tensors.append(numpy_helper.from_array(values, f"{kind}{number}"))
    return tensors


def chain(triples: int, channels: int = CHANNELS, kernel: int = 1) -> onnx.ModelProto:
    """x -> (Conv, BatchNorm, Relu) times `triples` -> y."""
    rng = np.random.default_rng(0)
    nodes, tensors, value = [], [], "x"
    pads = [kernel // 2] * 4
    for i in range(triples):
        tensors += constants(i, channels, kernel, rng)
        nodes.append(helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=pads))
        nodes.append(batch_norm(f"c{i}", f"b{i}", i))
        value = f"r{i}"
        nodes.append(helper.make_node("Relu", [f"b{i}"], [value], name=f"relu{i}"))
    return finished(nodes, tensors, value, channels, channels)


def wide(branches: int) -> onnx.ModelProto:
    """One value with `branches` readers, whose results one Concat gathers."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for i in range(branches):
        tensors += constants(i, CHANNELS, 1, rng)
        nodes.append(helper.make_node("Conv", ["x", f"w{i}"], [f"c{i}"], name=f"conv{i}"))
        nodes.append(batch_norm(f"c{i}", f"b{i}", i))
    nodes.append(helper.make_node("Concat", [f"b{i}" for i in range(branches)], ["y"], name="gather", axis=1))
    return finished(nodes, tensors, "y", CHANNELS, branches * CHANNELS)


def finished(
    nodes: list[onnx.NodeProto], tensors: list[TensorProto], output: str, inputs: int, outputs: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", inputs, 8, 8])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", outputs, 8, 8])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure(tool: str, source: Path, timeout: float) -> tuple[float, float] | str:
    """(seconds, peak MB), or what went wrong in a few words."""
    target = source.with_name(f"out-{tool}.onnx")
    setup, call = TOOLS[tool]
    script = RUN.format(setup=setup, call=call.format(source=str(source), target=str(target)))
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"over {timeout:g} s"
    finally:
        for path in source.parent.glob(f"{target.name}*"):
            path.unlink()
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:40]
    seconds, megabytes = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, megabytes


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(size): 1 is linear growth, 2 quadratic."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def compare(kind: str, models: dict[int, onnx.ModelProto], tools: list[str], timeout: float, folder: Path) -> Table:
    table = Table("nodes", *[f"{tool}: s, MB" for tool in tools], title=f"{kind}", box=None, title_justify="left")
    times: dict[str, list[tuple[int, float]]] = {tool: [] for tool in tools}
    for model in models.values():
        path = folder / "model.onnx"
        onnx.save(model, path)
        row = [f"{len(model.graph.node):,}"]
        for tool in tools:
            found = measure(tool, path, timeout)
            row.append(found if isinstance(found, str) else f"{found[0]:.2f}, {found[1]:.0f}")
            if not isinstance(found, str):
                times[tool].append((len(model.graph.node), found[0]))
        table.add_row(*row)
    exponents = [exponent(*map(list, zip(*t, strict=True))) if len(t) > 1 else None for t in times.values()]
    table.add_row("exponent", *["" if e is None else f"{e:.2f}" for e in exponents])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triples", type=int, nargs="+", default=[1000, 4000, 11000, 33000])
    parser.add_argument("--large", action="store_true", help="also a file of 0.94 GB")
    parser.add_argument("--peers", action="store_true", help="also every peer that is installed")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one run")
    options = parser.parse_args()
    tools = [t for t in TOOLS if t in ("fuser",) or (options.peers and importlib.util.find_spec(t))]
    console = Console(width=160)
    console.print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, onnx {onnx.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chains = {n: chain(n) for n in options.triples}
        console.print(compare("chains of Conv, BatchNorm, Relu", chains, tools, options.timeout, folder))
        console.print(compare("wide", {n: wide(n) for n in options.triples[:-1]}, tools, options.timeout, folder))
        if options.large:
            large = {100: chain(100, channels=512, kernel=3)}
            console.print(compare("100 convolutions of 512x512x3x3: 0.94 GB", large, tools, options.timeout, folder))


if __name__ == "__main__":
    main()
