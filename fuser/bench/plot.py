"""A benchmark as a picture: the distributions of both models, and the ratio with its interval, for each arm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fuser.bench import statistics
from fuser.bench.result import Benchmark
from fuser.errors import InputError

_COLOURS = {"before": "#7f7f7f", "after": "#1f77b4"}
_WORDS = {
    statistics.FASTER: "#2ca02c",
    statistics.SLOWER: "#d62728",
    statistics.NO_CHANGE: "#7f7f7f",
    statistics.INCONCLUSIVE: "#ff7f0e",
}


def check(path: str | os.PathLike[str]) -> None:
    """Whether a plot can be written there: worth knowing before minutes of measuring.

    Raises `InputError` without matplotlib, and for another kind of file.
    """
    if Path(path).suffix not in (".png", ".svg"):
        raise InputError(f"cannot plot to {Path(path).name}: give a name that ends in .png or .svg")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("plots need matplotlib; install graph-fuser[plot]") from None


def plot(benchmark: Benchmark, path: str | os.PathLike[str]) -> None:
    """Write a .png or .svg file; raises `InputError` as `check` does, and when nothing was measured."""
    check(path)
    if not benchmark.measured:
        raise InputError("there is nothing to plot: no arm was measured")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = benchmark.measured
    compared = [arm for arm in arms if arm.comparison]
    figure = Figure(figsize=(7, 2.2 * len(arms) + (1.2 + 0.4 * len(compared) if compared else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [2.2] * len(arms) + ([1.2 + 0.4 * len(compared)] if compared else [])
    axes = np.atleast_1d(figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights}))
    for axis, arm in zip(axes, arms, strict=False):
        _distributions(axis, {role: np.array(arm.samples.of(role)) for role in benchmark.names})
        axis.set_title(arm.arm.title, loc="left", fontsize=9)
    axes[0].legend([f"{role}: {name}" for role, name in benchmark.names.items()], fontsize=8)
    if compared:
        _ratios(axes[-1], compared)
    figure.savefig(path, dpi=150)


def _distributions(axis: Any, samples: dict[str, Any]) -> None:
    """Histograms up to the 98th percentile: the tail of interruptions would flatten everything else."""
    low = min(x.min() for x in samples.values()) * 1e3
    high = max(np.percentile(x, 98) for x in samples.values()) * 1e3
    bins = np.linspace(low, max(high, low * 1.001), 60)
    for role, x in samples.items():
        axis.hist(x * 1e3, bins=bins, alpha=0.55, color=_COLOURS[role], density=True)
    for role, x in samples.items():
        axis.axvline(float(np.median(x)) * 1e3, color=_COLOURS[role], linewidth=1.2)
    axis.set_xlabel("ms", fontsize=8)
    axis.set_yticks([])
    axis.tick_params(labelsize=8)


def _ratios(axis: Any, arms: list[Any]) -> None:
    """One row an arm: the ratio, and below it, in grey, the same model against itself."""
    for y, arm in enumerate(arms):
        comparison = arm.comparison
        for offset, x, colour in (
            (0.0, comparison.change, _WORDS[comparison.verdict.word]),
            (0.25, comparison.same, "#c7c7c7"),
        ):
            if np.isfinite(x.high):
                axis.plot([x.low, x.high], [y + offset] * 2, color=colour, linewidth=2)
            axis.plot(x.ratio, y + offset, "o", color=colour, markersize=4)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(arms)), [f"{a.arm.name}\n{a.comparison.verdict.word}" for a in arms])
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.set_xlabel(f"after / before, {statistics.LEVEL:.0%} interval (grey: the A/A control)", fontsize=8)
    axis.tick_params(labelsize=8)
