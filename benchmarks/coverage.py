"""How many BatchNorms and nodes are left, by fuser and by the peers that are installed, and why.

    python benchmarks/coverage.py [--net resnet] [--net timm/levit_128s] [--limit 120] [--write]

Each network is taken as torch exports it raw, after the optimizer of torch's default export, and as a torch graph.
Optimizers run in processes of their own, with a time limit; their seconds leave out imports, and fuser's the proof.
A result is right where it is no further from the module in float64 than ten times the unoptimized model is, or one
part in a hundred thousand; what is not is marked.  For networks with parallel branches the plain model is also
compared with what timm's own `reparameterize_model` makes of it, after the same optimization: what is left, and how
fast that is.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import architectures
import numpy as np
import onnx
import peers
import results
import torch

import fuser
from fuser.isolate import IsolatedFailure, Worker

Array: TypeAlias = np.ndarray[Any, Any]

FUSER, FX = "fuser", "torch.fx fuse"
ONNX_TOOLS = (FUSER, "onnxsim", "onnxslim", "onnxoptimizer", "onnxscript")
TORCH_TOOLS = (FUSER, FX)
SOURCES = ("raw export", "default export", "torch graph")


@dataclass
class Left:
    """What a tool made of a model.

    codes: why fuser left BatchNorms, counted.
    problem: why there is nothing to tell; empty where there is.
    """

    norms: int = 0
    nodes: int = 0
    parameters: int = 0
    seconds: float = 0.0
    error: float = 0.0
    codes: dict[str, int] = field(default_factory=dict)
    problem: str = ""


@dataclass
class Row:
    """A network from one source: as it was, what each tool left, and the error of the model as it was."""

    net: str
    source: str
    before: Left
    after: dict[str, Left]

    def is_right(self, tool: str) -> bool:
        left = self.after[tool]
        return not left.problem and peers.is_right(left.error, self.before.error)

    def rivals(self) -> list[Left]:
        """What the peers left whose results are right."""
        return [left for tool, left in self.after.items() if tool != FUSER and self.is_right(tool)]

    def cells(self, tools: Sequence[str]) -> list[str]:
        codes = self.after[FUSER].codes
        why = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
        return [self.net, self.source, _counts(self.before), *(self._cell(tool) for tool in tools), why]

    def _cell(self, tool: str) -> str:
        left = self.after[tool]
        if left.problem:
            return left.problem
        wrong = "" if self.is_right(tool) else f" WRONG ({left.error:.0e})"
        return f"{_counts(left)} · {left.seconds:.1f} s{wrong}"


def _counts(left: Left) -> str:
    return f"{left.norms} / {left.nodes}" if left.nodes else f"{left.norms}"


# -- in the worker


def by_tool(tool: str, source: str, target: str) -> tuple[float, dict[str, int]]:
    """Optimize one file; seconds of CPU and waiting, and fuser's codes."""
    started = time.perf_counter()
    codes: Counter[str] = Counter()
    if tool == FUSER:
        codes = _codes(fuser.optimize(source, target, verify=False).report)
    else:
        peers.OPTIMIZERS[tool](source, target)
    return time.perf_counter() - started, dict(codes)


def on_torch(tool: str, program: str, net: str, x: Array) -> tuple[Left, Left]:
    """Optimize an exported program, or the module for torch.fx; before and after."""
    if tool == FUSER:
        given: Any = torch.export.load(program)
        run = given.module()
    else:
        given = run = architectures.build(net)
    image = torch.from_numpy(x)
    started = time.perf_counter()
    codes: Counter[str] = Counter()
    if tool == FUSER:
        result = fuser.optimize(given, verify=False)
        codes, made = _codes(result.report), result.model.module()
        before, after = ((_norms(s.ops), sum(s.ops.values())) for s in (result.report.before, result.report.after))
        parameters = result.report.after.parameters
    else:
        from torch.fx.experimental.optimization import fuse

        made = fuse(given)
        before, after = (0, 0), (_calls(made), 0)
        parameters = sum(p.numel() for p in made.parameters())
    took = time.perf_counter() - started
    with torch.no_grad():
        outputs = run(image).numpy(), made(image).numpy()
    truth = _truth(architectures.build(net), image)
    errors = [peers.relative_error(y, truth) for y in outputs]
    return Left(*before, error=errors[0]), Left(*after, parameters, took, errors[1], dict(codes))


def _codes(report: Any) -> Counter[str]:
    return Counter(remark.code for remark in report.missed if remark.pass_name == "fold-batch-norm")


def _norms(ops: Iterable[str] | dict[str, int]) -> int:
    counted = ops if isinstance(ops, dict) else Counter(ops)
    return sum(count for op, count in counted.items() if "batchnorm" in op.lower().replace("_", ""))


def _calls(module: torch.fx.GraphModule) -> int:
    """The BatchNorms in a traced graph: calls of modules and of the function."""
    called = (module.get_submodule(node.target) for node in module.graph.nodes if node.op == "call_module")
    functions = (node.target for node in module.graph.nodes if node.op == "call_function")
    return sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in called) + sum(
        function is torch.nn.functional.batch_norm for function in functions
    )


def _truth(model: torch.nn.Module, x: torch.Tensor) -> Array:
    with torch.no_grad():
        return np.asarray(model.double()(x.double()).numpy())


# -- here


class Crew:
    """One process for each tool, kept from network to network, and one that runs what they make."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        installed = [tool for tool in ONNX_TOOLS if importlib.util.find_spec(tool)]
        self.tools = installed
        self._workers = {tool: Worker(preload=("coverage", tool)) for tool in (*installed, FX, "runtime")}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def call(self, worker: str, function: str, *args: Any) -> Any:
        return self._workers[worker].call(function, *args, timeout=self._limit)

    def look(self, path: Path, x: Array, truth: Array) -> Left:
        """What an ONNX file holds, and how far its output is from the truth."""
        model = onnx.load(path)
        ops = [node.op_type for node in model.graph.node]
        parameters = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in _FLOATS)
        error = peers.relative_error(self.call("runtime", "peers:run_onnx", str(path), x), truth)
        return Left(_norms(ops), len(ops), parameters, error=error)

    def onnx_row(self, net: str, source: str, path: Path, x: Array, truth: Array) -> Row:
        row = Row(net, source, self.look(path, x, truth), {})
        for tool in self.tools:
            target = optimized(path, tool)
            try:
                seconds, codes = self.call(tool, "coverage:by_tool", tool, str(path), str(target))
                left = self.look(target, x, truth)
                left.seconds, left.codes = seconds, codes
            except IsolatedFailure as failure:
                left = Left(problem=f"FAILED: {str(failure)[:60]}")
            row.after[tool] = left
        return row

    def torch_row(self, net: str, program: Path, x: Array) -> Row:
        row = Row(net, SOURCES[2], Left(), {})
        for tool in TORCH_TOOLS:
            try:
                before, row.after[tool] = self.call(tool, "coverage:on_torch", tool, str(program), net, x)
                row.before = before if tool == FUSER else row.before
            except IsolatedFailure as failure:
                row.after[tool] = Left(problem=f"FAILED: {str(failure)[:60]}")
        return row

    def rows(self, net: str, folder: Path, *, merged: bool = False) -> Iterator[Row]:
        """The network from each source; `merged`: with its branches merged by timm."""
        model = architectures.build(net)
        if merged:
            from timm.utils.model import reparameterize_model

            model = reparameterize_model(model).eval()
        x = architectures.example_for(model)
        exported = torch.export.export(model, (x,))
        program, (raw, default) = folder / "model.pt2", files_in(folder)
        torch.export.save(exported, program)
        architectures.export_raw(model, raw, x, default)
        truth = _truth(model, x)
        yield self.onnx_row(net, SOURCES[0], raw, x.numpy(), truth)
        yield self.onnx_row(net, SOURCES[1], default, x.numpy(), truth)
        yield self.torch_row(net, program, x.numpy())


_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def files_in(folder: Path) -> list[Path]:
    """The raw and the default export, in the order of SOURCES."""
    return [folder / "raw.onnx", folder / "default.onnx"]


def optimized(path: Path, tool: str) -> Path:
    return path.with_name(f"{path.stem}.{tool}.onnx")


def oracle_rows(crew: Crew, net: str, plain: Sequence[Row], folder: Path, seconds: float) -> Iterator[list[str]]:
    """The plain network and the one that timm merged, both optimized by fuser, from each source.

    folder: where the files of the plain one are.
    """
    with tempfile.TemporaryDirectory() as name:
        merged = list(crew.rows(net, Path(name), merged=True))
        pairs = zip(files_in(Path(name)), files_in(folder), strict=True)
        latencies = [ratio(optimized(theirs, FUSER), optimized(ours, FUSER), seconds) for theirs, ours in pairs]
    for a, b, latency in zip(plain, merged, [*latencies, ""], strict=True):
        yield [*oracle_cells(a, b), latency]


def ratio(before: Path, after: Path, seconds: float) -> str:
    """The ratio of the latencies under the runtime's own optimizer."""
    if not (before.exists() and after.exists()):
        return ""
    (result,) = fuser.benchmark(before, after, seconds=seconds, arms=["ort-on"]).arms
    return " ".join(results.comparison(result)[2:])


def oracle_cells(plain: Row, merged: Row) -> list[str]:
    """What is left of the two, and whether the plain one is right."""
    ours, theirs = plain.after[FUSER], merged.after[FUSER]
    if ours.problem or theirs.problem:
        return [plain.net, plain.source, ours.problem, theirs.problem, "", ""]
    verdict = "right" if plain.is_right(FUSER) else f"WRONG ({ours.error:.0e})"
    return [
        plain.net,
        plain.source,
        f"{plain.before.nodes} → {ours.nodes}",
        f"{merged.before.nodes} → {theirs.nodes}",
        f"{ours.parameters:,} / {theirs.parameters:,}",
        verdict,
    ]


def totals(rows: Sequence[Row]) -> Iterator[str]:
    """The lines under the tables."""
    for source in SOURCES:
        found = [row for row in rows if row.source == source and not row.after[FUSER].problem]
        before = sum(row.before.norms for row in found)
        if not before:
            continue
        parts = []
        for tool in dict.fromkeys(tool for row in found for tool in row.after):
            took = sum(row.after[tool].seconds for row in found)
            right = [row for row in found if row.is_right(tool)]
            removed = sum(row.before.norms - row.after[tool].norms for row in right)
            wrong = len(found) - len(right)
            parts.append(
                f"{tool} {removed / before:.1%} in {took:.0f} s{f', {wrong} wrong or failed' if wrong else ''}"
            )
        yield f"- {source}: of {before} BatchNorms in {len(found)} networks removed by {'; '.join(parts)}."
    compared = [row for row in rows if row.source != SOURCES[2] and not row.after[FUSER].problem and row.rivals()]
    more = [row for row in compared if row.after[FUSER].nodes > min(left.nodes for left in row.rivals())]
    if compared:
        names = ", ".join(f"{row.net} ({row.source})" for row in more)
        yield f"- Files in which a peer that is right has fewer nodes: {len(more)} of {len(compared)}. {names}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", help="repeatable, `timm/NAME` for one of timm's; default: all")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a tool is given up")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each latency against timm's merged network")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    options = parser.parse_args()
    has_timm = importlib.util.find_spec("timm") is not None
    default = [*architectures.OURS, *(f"timm/{name}" for name in architectures.BROAD if has_timm)]
    rows: list[Row] = []
    oracle: list[list[str]] = []
    lost: list[str] = []
    with Crew(options.limit) as crew:
        for net in options.net or default:
            print(net, file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    plain = list(crew.rows(net, Path(folder)))
                except Exception as error:  # torch cannot capture or export everything
                    lost.append(f"- {net} is left out: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
                    continue
                rows += plain
                if net.removeprefix("timm/") in architectures.REPARAMETERIZABLE:
                    oracle += oracle_rows(crew, net, plain, Path(folder), options.seconds)
        body = "\n".join([report(rows, oracle, crew.tools), *lost])
    print(body)
    if options.write:
        results.write("Coverage", body)


def report(rows: Sequence[Row], oracle: Sequence[list[str]], tools: Sequence[str]) -> str:
    """The tables as markdown."""
    onnx_rows = [row.cells(tools) for row in rows if row.source != SOURCES[2]]
    torch_rows = [row.cells(TORCH_TOOLS) for row in rows if row.source == SOURCES[2]]
    parts = [
        f"{results.machine()}\nCells: BatchNorms / nodes · seconds.",
        results.table(("network", "source", "before", *tools, "why fuser left some"), onnx_rows),
        results.table(("network", "source", "before", *TORCH_TOOLS, "why fuser left some"), torch_rows),
    ]
    if oracle:
        header = ("network", "source", "plain, nodes", "merged by timm, nodes", "parameters, ours / timm's", "result")
        header = (*header, "latency, ours / timm's, ORT's optimizer on")
        parts.append(results.table(header, oracle))
    return "\n\n".join([*parts, "\n".join(totals(rows))])


if __name__ == "__main__":
    main()
