"""`Verification`: the verdict on two models, with the figures behind it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fuser.proof.compare import Figures

Verdict = Literal["equivalent", "different", "incompatible", "unverifiable"]
Truth = Literal["float64", "noise-floor", "bits", "none"]


@dataclass
class Verification:
    """What came of comparing two models.

    verdict: "equivalent": the same function to within rounding, and the same interface;
        "different": the outputs differ by more than rounding explains, or one of the models fails where the
        other runs; "incompatible": the outputs agree but the interface has lost something; "unverifiable": the
        comparison could not be made.
    reason: why, in one line; empty where the models are equivalent and there was something to compare.
    truth: what the outputs were judged against: "float64" (the float64 result of the original), "noise-floor"
        (the original's own variation, where float64 could not be had), "bits" (an exact contract), "none".
    truth_note: why float64 could not be had; for "bits", why the runs need not have equal ones.
    outputs: figures, one entry for each output.
    interface: what the interface has lost, one sentence each.
    sets: the input sets that were compared, in words.
    discarded: input sets that the original itself rejects.
    seconds: wall time of the whole comparison, the start of processes included.
    cost_ratio: `seconds` over what it takes to load the original once and run it once on each set.
    """

    verdict: Verdict
    reason: str = ""
    contract: str = "rounding"
    truth: Truth = "none"
    truth_note: str = ""
    outputs: list[Figures] = field(default_factory=list)
    interface: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    discarded: int = 0
    seconds: float = 0.0
    cost_ratio: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the models are equivalent."""
        return self.verdict == "equivalent"

    @property
    def cost(self) -> str:
        """What the comparison cost, for a person."""
        if not self.cost_ratio:
            return f"{self.seconds:.1f} s"
        return f"{self.seconds:.1f} s, {self.cost_ratio:.1f} times loading the original and running it on these inputs"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        plain = {key: value for key, value in asdict(self).items() if key != "outputs"}
        return {**plain, "passed": self.passed, "outputs": [output.to_dict() for output in self.outputs]}

    def __str__(self) -> str:
        """One line: the verdict, the worst figure, what it was judged against."""
        if self.reason:
            return f"{self.verdict}: {self.reason}"
        sets = f"{len(self.sets)} input set{'s' if len(self.sets) != 1 else ''}"
        floats = [output for output in self.outputs if output.snr_db or output.max_abs]
        if self.truth == "bits" or not floats:
            equal = "the same bits, operator by operator," if self.truth_note else "bit-identical outputs"
            return f"equivalent: {equal} for {sets}"
        worst = max(floats, key=lambda output: output.relative)
        against = "the float64 truth" if self.truth == "float64" else "the original (noise floor measured)"
        return (
            f"equivalent: the largest error against {against} is {worst.max_abs:.2g} "
            f"(the original's own: {worst.original:.2g}) for {sets}"
        )

    def render(self, width: int = 80) -> RenderableType:
        """A table of the figures and the lines that explain them, for a terminal of so many columns."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        table.add_column("output", overflow="fold")
        columns = _columns(self.outputs, width)
        for column in columns:
            table.add_column(column, justify="left" if column == "type" else "right", no_wrap=True)
        for output in self.outputs:
            cells = _cells(output)
            table.add_row(output.name, *(cells[column] for column in columns))
        lines = [str(self)]
        if self.truth_note:
            lines.append(
                self.truth_note if self.truth == "bits" else f"judged against the noise floor: {self.truth_note}"
            )
        lines += [f"interface: {problem}" for problem in self.interface if problem != self.reason]
        lines.append(f"the check took {self.cost}")
        return Group(*([table] if self.outputs else []), *(Text(line) for line in lines))


_WIDE = 72
"""Columns of a terminal, below which there is only room for what decides."""


def _columns(outputs: list[Figures], width: int) -> list[str]:
    """The figures to show: cosine, which says what the ratio to the noise does, is left to JSON."""
    if width < _WIDE:
        return ["max abs", "original", "excess"]
    ranked = ["top-1"] if any(output.top1 is not None for output in outputs) else []
    return ["type", "max abs", "original", "relative", "ulp", "SNR dB", *ranked, "excess"]


def _cells(output: Figures) -> dict[str, str]:
    """The figures by column."""
    if output.mismatches:
        return defaultdict(str, {"type": output.dtype, "max abs": f"{output.mismatches} differ"})
    return {
        "type": output.dtype,
        "max abs": f"{output.max_abs:.2g}",
        "original": f"{output.original:.2g}",
        "relative": f"{output.relative:.2g}",
        "ulp": f"{output.ulp:.2g}",
        "SNR dB": f"{output.snr_db:.0f}",
        "top-1": "" if output.top1 is None else f"{output.top1:.3f}",
        "excess": f"{output.excess:.2g}",
    }
