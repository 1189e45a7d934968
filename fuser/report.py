"""What a run did, for a person and for a script: remarks, tables, JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fuser.graph import Summary
from fuser.pipeline import Outcome, PassRun, Rewrite
from fuser.remarks import Remark

NARROW = 64
"""Columns of a terminal, below which tables keep to what matters most."""


@dataclass
class Report:
    """The story of one run.

    model: what was optimized, as a person would call it.
    before, after: node counts, parameters, bytes and multiply-adds.
    applied, missed: one remark for each candidate.
    verification: figures of the equivalence check, None where none was made; `unverified` says why not.
    warnings: what a person should know even if all went well.
    seconds: wall time by stage.
    written: the files that were written.
    """

    model: str
    host: str = ""
    before: Summary = field(default_factory=Summary)
    after: Summary = field(default_factory=Summary)
    passes: list[PassRun] = field(default_factory=list)
    applied: list[Remark] = field(default_factory=list)
    missed: list[Remark] = field(default_factory=list)
    rounds: int = 0
    verification: Any = None
    unverified: str = ""
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)

    def take(self, outcome: Outcome) -> None:
        """Tell of the passes that ran."""
        self.passes, self.rounds = outcome.runs, outcome.rounds
        self.applied, self.missed = outcome.applied, outcome.missed

    @property
    def rewrites(self) -> list[Rewrite]:
        """The applied rewrites, in order, under the names that tell a run to leave them out."""
        return [(remark.pass_name, remark.site) for remark in self.applied]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        return {
            "model": self.model,
            "host": self.host,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "passes": [asdict(run) for run in self.passes],
            "rounds": self.rounds,
            "applied": [remark.to_dict() for remark in self.applied],
            "missed": [remark.to_dict() for remark in self.missed],
            "verification": self.verification.to_dict() if self.verification is not None else None,
            "unverified": self.unverified,
            "warnings": self.warnings,
            "seconds": self.seconds,
            "written": self.written,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)

    def render(self, *, verbose: bool = False, width: int = 110) -> RenderableType:
        """Tables for a terminal of so many columns; `verbose` adds a line for each candidate."""
        parts: list[RenderableType] = [self._passes_table(width), self.change_table(width)]
        if verbose:
            parts += [Text(str(remark)) for remark in (*self.applied, *self.missed)]
        elif width < NARROW:
            parts += [Text(f"{count} {remark}") for count, remark in self._missed_kinds()]
        elif self.missed:
            parts.append(self._missed_table())
        parts += [Text(line) for line in self.conclusion()]
        return Group(*parts)

    def conclusion(self) -> Iterator[str]:
        """The plain lines at the end."""
        yield from (f"warning: {warning}" for warning in self.warnings)
        if not self.applied:
            yield self._nothing()
        overridable = sum(remark.code == "overridable" for remark in self.missed)
        if overridable:
            yield (
                f"{overridable} candidates are held back because their weights are also graph inputs (overridable): "
                f"--freeze-inputs makes those inputs constant, folds them, and removes them from the signature."
            )
        if self.unverified:
            yield f"not verified: {self.unverified}"
        elif self.verification is not None:
            yield f"verified: {self.verification} ({self.verification.cost})"
        yield from (f"wrote {path}" for path in self.written)

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=110, color_system=None)
        console.print(self.render())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]

    def _nothing(self) -> str:
        if not self.missed:
            return "0 rewrites: nothing here is a candidate; an exporter or another tool may have folded it already."
        return f"0 rewrites: {len(self.missed)} candidates were looked at, and each has its reason above."

    def _passes_table(self, width: int) -> Table:
        rows = [
            (run.name, str(run.applied), str(run.missed), f"{run.seconds:.2f}", run.contract)
            for run in self.passes
            if run.applied or run.missed
        ]
        table = _table(("pass", "applied", "missed", "seconds", "contract")[: 3 if width < NARROW else 5], rows)
        table.title, table.title_justify = self.model, "left"
        return table

    def change_table(self, width: int = 110) -> Table:
        """What the model is made of and what it costs, before and after."""
        totals = sum(self.before.ops.values()), sum(self.after.ops.values())
        rows: list[tuple[str, int | None, int | None]] = [("nodes", *totals)]
        for op in sorted({*self.before.ops, *self.after.ops}):
            counts = self.before.ops.get(op, 0), self.after.ops.get(op, 0)
            if counts[0] != counts[1]:
                rows.append((f"  {op}", *counts))
        rows += [
            ("parameters", self.before.parameters, self.after.parameters),
            ("bytes of constants", self.before.bytes, self.after.bytes),
        ]
        rows.append(("multiply-adds", self.before.multiply_adds, self.after.multiply_adds))
        cells = [(name, _count(before), _count(after), _change(before, after)) for name, before, after in rows]
        return _table(("", "before", "after", "change")[: 3 if width < NARROW else 4], cells)

    def _missed_kinds(self) -> Iterator[tuple[int, Remark]]:
        """How many there are of each kind, and the first of them."""
        counts = Counter((remark.pass_name, remark.code) for remark in self.missed)
        first = {(remark.pass_name, remark.code): remark for remark in reversed(self.missed)}
        yield from ((count, first[key]) for key, count in counts.most_common())

    def _missed_table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("missed", "pass", "first of them", "why"):
            table.add_column(name, overflow="fold")
        for count, remark in self._missed_kinds():
            why = f"{remark.reason}; {remark.remedy}" if remark.remedy else remark.reason
            table.add_row(f"{count} {remark.code}", remark.pass_name, remark.site, why)
        return table


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A name, which goes on below where it is long, and figures, which are never cut; cells beyond `head` are left."""
    table = Table(box=None, pad_edge=False)
    table.add_column(head[0], overflow="fold")
    for name in head[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row[: len(head)])
    return table


def _count(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"


def _change(before: int | None, after: int | None) -> str:
    return "" if before is None or after is None or before == after else f"{after - before:+,}"
