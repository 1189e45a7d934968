"""How time and memory grow with the model: chains of (Conv, BatchNorm, Relu), wide graphs, large files.

    python benchmarks/scale.py                      # chains up to 33,000 triples (100,000 nodes), and wide graphs
    python benchmarks/scale.py --triples 1000 4000
    python benchmarks/scale.py --peers              # every peer that is installed runs on the same files
    python benchmarks/scale.py --large              # also 0.94 GB in one file, and 4 GB with external data
    python benchmarks/scale.py --write              # put the tables into benchmarks/RESULTS.md

Every run is a fresh process.  Seconds are its wall time without the start of the interpreter and its imports, the
best of three rounds over all files, so that a slow minute of the machine spoils no size more than another; memory is
the highest resident set of any process of that run.  The exponent is the slope of log(seconds) over log(nodes): 1 is
linear, 2 quadratic.  A tool that takes longer than `--timeout` is said so, and not asked for what is larger still.
"fuser" rewrites and checks each rewrite on a window, "fuser, verified" also runs both models and compares them, which
no peer does unless asked.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import results
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 4

ROUNDS = 3

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
peak = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
print(json.dumps([seconds, peak / 1024]))
"""

OURS = "import fuser.api, fuser.files, fuser.graphs.onnx.graph; fuser.list_passes()"
TOOLS = {
    "fuser": (OURS, "fuser.optimize({source!r}, {target!r}, verify=False)"),
    "fuser, verified": (OURS, "fuser.optimize({source!r}, {target!r}, verify={whole})"),
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


def external(folder: Path, layers: int, channels: int = 512) -> Path:
    """A chain of 3x3 convolutions whose weights lie in a data file; written without ever being in memory."""
    rng = np.random.default_rng(0)
    model = chain(layers, channels=1)
    weights = {f"w{i}": rng.standard_normal((channels, channels, 3, 3), np.float32) / 68 for i in range(4)}
    path, offset = folder / "model.onnx", 0
    with open(folder / "model.onnx.data", "wb") as data:
        for tensor in model.graph.initializer:
            array = weights.get(f"w{int(tensor.name[1:]) % 4}") if tensor.name[0] == "w" else None
            if array is None:
                tensor.CopyFrom(
                    numpy_helper.from_array(rng.uniform(0.5, 1.5, channels).astype(np.float32), tensor.name)
                )
                continue
            tensor.ClearField("raw_data")
            tensor.dims[:] = array.shape
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name.split("/")[-1]), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            offset += data.write(array.data)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = channels
    path.write_bytes(model.SerializeToString())
    return path


def measure(tool: str, source: Path, timeout: float, whole: bool) -> tuple[float, float] | str:
    """(seconds, peak MB) of one run, or what went wrong in a few words."""
    target = source.with_name("out.onnx")
    setup, call = TOOLS[tool]
    options = {"source": str(source), "target": str(target), "whole": repr("whole" if whole else True)}
    script = RUN.format(setup=setup, call=call.format(**options))
    os.sync()  # who writes is held up while much is still to be brought to the disk
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
    """The slope of log(seconds) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def compare(title: str, files: list[Path], tools: list[str], timeout: float, whole: bool = False) -> str:
    """A table with a row for each file, largest last, and a column for each tool; then the exponents."""
    best: dict[tuple[str, Path], tuple[float, float] | str] = {}
    for _ in range(ROUNDS):
        for tool in tools:
            for path in files:
                so_far = best.get((tool, path), (math.inf, 0.0))
                found = so_far if isinstance(so_far, str) else measure(tool, path, timeout, whole)
                print(f"{title}: {tool}, {path.name}: {found}", file=sys.stderr)
                if isinstance(found, str):
                    best.setdefault((tool, path), found)  # a slow minute does not undo what was measured before
                    break
                best[tool, path] = min(so_far, found)
    rows: list[list[str]] = []
    times: dict[str, list[tuple[int, float]]] = {tool: [] for tool in tools}
    for path in files:
        nodes = len(onnx.load(path, load_external_data=False).graph.node)
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        row = [f"{nodes:,}", f"{size / 1e6:,.0f}"]
        for tool in tools:
            match best.get((tool, path), "not run"):
                case str(problem):
                    row.append(problem)
                case seconds, megabytes:
                    row.append(f"{seconds:.2f}, {megabytes:,.0f}")
                    times[tool].append((nodes, seconds))
        rows.append(row)
    slopes = [exponent(*map(list, zip(*t, strict=True))) if len(t) > 1 else None for t in times.values()]
    if any(slope is not None for slope in slopes):
        rows.append(["exponent", "", *["" if slope is None else f"{slope:.2f}" for slope in slopes]])
    return f"{title}:\n\n{results.table(['nodes', 'MB', *(f'{tool}: s, MB' for tool in tools)], rows)}"


def saved(folder: Path, models: Iterable[onnx.ModelProto]) -> list[Path]:
    """Each model in a file of its own."""
    paths = []
    for number, model in enumerate(models):
        paths.append(folder / f"model{number}.onnx")
        onnx.save(model, paths[-1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triples", type=int, nargs="+", default=[1000, 4000, 11000, 33000])
    parser.add_argument(
        "--large", action="store_true", help="also 0.94 GB in one file and, ours alone, 4 GB outside it"
    )
    parser.add_argument("--peers", action="store_true", help="also every peer that is installed")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one run")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    options = parser.parse_args()
    ours = [tool for tool in TOOLS if tool.startswith("fuser")]
    tools = ours + [tool for tool in TOOLS if tool not in ours and options.peers and usable(tool)]
    with tempfile.TemporaryDirectory() as name:
        body = "\n\n".join([results.machine(), *tables(Path(name), tools, options)])
    print(body)
    if options.write:
        results.write("Scale", body)


def tables(folder: Path, tools: list[str], options: argparse.Namespace) -> Iterator[str]:
    """Each of the tables that were asked for."""
    chains = saved(folder, (chain(n) for n in options.triples))
    yield compare("Chains of Conv, BatchNorm, Relu", chains, tools, options.timeout)
    branches = saved(folder, (wide(n) for n in options.triples[:-1]))
    yield compare("One value read by thousands, whose results one Concat joins", branches, tools, options.timeout)
    if options.large:
        large = saved(folder, (chain(n, channels=512, kernel=3) for n in (100,)))
        yield compare("100 convolutions of 512x512x3x3 in one file", large, tools, options.timeout, whole=True)
        huge = [external(folder, 430)]
        yield compare("430 of them with external data", huge, tools[:1], 10 * options.timeout)


def usable(tool: str) -> bool:
    """Whether a peer is installed, with all that it needs."""
    return subprocess.run([sys.executable, "-c", TOOLS[tool][0]], capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
