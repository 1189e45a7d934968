"""A benchmark as tables for a person."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fuser.bench import statistics
from fuser.bench.instance import OpTime
from fuser.bench.result import ArmResult, Benchmark
from fuser.bench.sampling import AFTER
from fuser.bench.statistics import Interval

_STYLES = {
    statistics.FASTER: "green",
    statistics.SLOWER: "red",
    statistics.NO_CHANGE: "",
    statistics.INCONCLUSIVE: "yellow",
}
_TOP = 8


def render(benchmark: Benchmark) -> RenderableType:
    """The models, the latencies, what they cost, and what to hold against the numbers."""
    return Group(*_parts(benchmark))


def as_text(benchmark: Benchmark) -> str:
    """The same without colours."""
    console = Console(file=io.StringIO(), width=120)
    console.print(render(benchmark))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _parts(benchmark: Benchmark) -> Iterator[RenderableType]:
    yield _models(benchmark)
    if benchmark.measured:
        yield _latency(benchmark)
        yield _details(benchmark)
    yield from (_profile(arm) for arm in benchmark.arms if arm.profile)
    for arm in benchmark.arms:
        name = f"{arm.arm.name} ({arm.arm.title})"
        if arm.comparison:
            verdict = arm.comparison.verdict
            yield Text(f"{name}: {verdict.word}: {verdict.reason}", style=_STYLES[verdict.word])
        if arm.problem:
            outcome = "cut short" if arm.summaries else "not measured"
            yield Text(f"{name}: {outcome}: {arm.problem}", style="yellow")
        for warning in arm.warnings:
            yield Text(f"{arm.arm.name}: warning: {warning}", style="yellow")
    if benchmark.interrupted:
        yield Text("interrupted: this is what was measured until then", style="yellow")
    yield Text(_machine(benchmark), style="dim")


def _models(benchmark: Benchmark) -> Table:
    names = [escape(f"{_label(benchmark, role)}: {name}") for role, name in benchmark.names.items()]
    table = Table(title="Models", box=None, pad_edge=False)
    for name in ("", *names):
        table.add_column(name, overflow="fold")
    costs = benchmark.costs.values()
    if any(c.file_bytes is not None for c in costs):
        table.add_row("file", *(byte_count(c.file_bytes) for c in costs))
    table.add_row("nodes", *(str(c.nodes) for c in costs))
    table.add_row("parameters", *(count(c.parameters) for c in costs))
    table.add_row("multiply-adds", *(count(c.multiply_adds) for c in costs))
    for op in dict.fromkeys(op for c in costs for op in c.ops):
        numbers = [c.ops.get(op, 0) for c in costs]
        if len(set(numbers)) > 1:
            table.add_row(escape(f"  {op}"), *map(str, numbers))
    inputs = ", ".join(f"{name} {text}" for name, text in benchmark.inputs.items())
    table.caption = escape(f"inputs: {inputs}")
    return table


def _latency(benchmark: Benchmark) -> Table:
    table = Table(title="Latency", box=None, pad_edge=False)
    roles = list(benchmark.names)
    table.add_column("arm", no_wrap=True)
    for role in roles:
        table.add_column(f"{_label(benchmark, role)}\nmedian\n(IQR)", justify="right", no_wrap=True)
    if AFTER in roles:
        table.add_column(f"after / before\n{statistics.LEVEL:.0%} interval", justify="right", no_wrap=True)
        table.add_column("A/A control\nbefore / before", justify="right", no_wrap=True)
        table.add_column("verdict")
    for result in benchmark.measured:
        summaries = [result.summaries[role] for role in roles]
        cells: list[RenderableType] = [f"{seconds(s.median)}\n({seconds(s.iqr)})" for s in summaries]
        if comparison := result.comparison:
            word = comparison.verdict.word
            ratios = [interval(x).replace(" ", "\n", 1) for x in (comparison.change, comparison.same)]
            cells += [*ratios, Text(word, style=_STYLES[word])]
        table.add_row(result.arm.name, *cells)
    return table


def _details(benchmark: Benchmark) -> Table:
    columns = ("arm", "model", "n", "p5", "p95", "p99", "load", "first run", "peak memory")
    table = Table(title="Details", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column.replace(" ", "\n"), justify="left" if i < 2 else "right", no_wrap=True)
    for result in benchmark.measured:
        for i, role in enumerate(benchmark.names):
            s = result.summaries[role]
            table.add_row(
                result.arm.name if i == 0 else "",
                _label(benchmark, role),
                str(s.n),
                *(seconds(x) for x in (s.p5, s.p95, s.p99)),
                seconds(result.load_seconds(role)),
                seconds(result.first_seconds(role)),
                byte_count(result.peak_bytes(role)),
            )
    return table


def _profile(result: ArmResult) -> Table:
    table = Table(title=f"Where the time goes: {result.arm.name}", box=None, pad_edge=False)
    table.add_column("operator", overflow="fold")
    times: dict[str, dict[str, OpTime]] = {}
    for role, ops in result.profile.items():
        table.add_column(role if len(result.profile) > 1 else "model", justify="right")
        for op in ops:
            times.setdefault(op.op, {})[role] = op
    slowest = sorted(times, key=lambda name: -max(x.seconds for x in times[name].values()))
    for name in slowest[:_TOP]:
        found = [times[name].get(role) for role in result.profile]
        table.add_row(escape(name), *(f"{seconds(x.seconds)} in {x.count}" if x else "-" for x in found))
    return table


def _label(benchmark: Benchmark, role: str) -> str:
    """A model that is measured alone is before nothing."""
    return role if len(benchmark.names) > 1 else "model"


def _machine(benchmark: Benchmark) -> str:
    e = benchmark.environment
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    gpu = f"{e['gpu']['name']}, " if e["gpu"] else ""
    return f"{gpu}{e['cpu']}, {e['cores']} cores, threads: {e['threads']}, seed {e['seed']}; {versions}"


def interval(x: Interval) -> str:
    """A ratio and its interval: 0.812 [0.801, 0.824]."""
    return f"{x.ratio:.3f} [{x.low:.3f}, {x.high:.3f}]"


def seconds(x: float | None) -> str:
    """Three significant digits and a unit: 1.23 ms."""
    if x is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if x >= scale:
            return f"{_three(x / scale)} {unit}"
    return f"{_three(x / 1e-9)} ns"


def byte_count(x: int | None) -> str:
    """In binary units: 1.23 MiB."""
    if x is None:
        return "-"
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if x >= scale:
            return f"{_three(x / scale)} {unit}"
    return f"{x} B"


def count(x: int | None) -> str:
    """In thousands, millions, billions: 1.23 M."""
    if x is None:
        return "unknown"
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if x >= scale:
            return f"{_three(x / scale)} {unit}"
    return str(x)


def _three(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
