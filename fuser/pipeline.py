"""Run passes over a graph, in order, in rounds, until a round changes nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fuser.errors import PassError
from fuser.graph import Graph
from fuser.remarks import Missed, Remark
from fuser.rewrite import RewritePass

MAX_ROUNDS = 100
"""A pipeline that still changes the graph after this many rounds undoes its own work somewhere, unless there are ever
fewer nodes."""

PATIENCE = 10
"""Rounds after those in which the nodes need not become fewer."""

Rewrite = tuple[str, str]
"""What identifies a rewrite from one run to the next: (pass name, site)."""

NOTHING: Mapping[Rewrite, str] = MappingProxyType({})


@dataclass
class PassRun:
    """What one pass did over all rounds; `missed` counts the candidates it leaves in the end."""

    name: str
    contract: str
    applied: int = 0
    missed: int = 0
    rounds: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """What the pipeline did.

    applied: in the order in which the rewrites happened.
    missed: of the last visit of each pass: an earlier "no" may have been cured since.
    history: every remark of every round.
    """

    runs: list[PassRun]
    applied: list[Remark] = field(default_factory=list)
    missed: list[Remark] = field(default_factory=list)
    history: list[Remark] = field(default_factory=list)
    rounds: int = 0


def run(
    graph: Graph,
    passes: Sequence[RewritePass[Any, Any]],
    *,
    stop_after: int | None = None,
    leave_out: Mapping[Rewrite, str] = NOTHING,
    only: Collection[Rewrite] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Run `passes` over `graph` to a fixed point; late ones whenever the others have reached theirs.

    stop_after: how many rewrites are admitted; the rest is missed as `stopped` (for bisecting).
    leave_out: rewrites that are missed as `rolled-back`, and what was found of the model with each.
    only: the rewrites that are admitted, where not all are.
    progress: called with the name of each pass before it runs.

    Raises `PassError`, naming the pass, when one fails, breaks the graph or the contract, or when the
    pipeline does not converge.
    """
    passes = sorted((p for p in passes if graph.host in p.hosts), key=lambda p: p.late)
    outcome = Outcome([PassRun(p.name, p.contract.value) for p in passes])
    missed: dict[str, list[Remark]] = {}
    seen: dict[str, int] = {}  # pass -> graph.edits when it last found nothing to do
    admitted = 0

    def admit(pass_name: str, site: str) -> Missed | None:
        nonlocal admitted
        if (pass_name, site) in leave_out:
            return rolled_back(leave_out[pass_name, site])
        if only is not None and (pass_name, site) not in only:
            return INSTEAD
        if stop_after is not None and admitted >= stop_after:
            return STOPPED
        admitted += 1
        return None

    fewest, idle = math.inf, 0
    while outcome.rounds < MAX_ROUNDS or idle <= PATIENCE:
        outcome.rounds += 1
        before = settled = graph.edits
        for rewrite_pass, record in zip(passes, outcome.runs, strict=True):
            if seen.get(record.name) == graph.edits or (rewrite_pass.late and graph.edits != settled):
                continue
            if progress:
                progress(record.name)
            started = time.perf_counter()
            remarks = _run_once(graph, rewrite_pass, admit)
            record.seconds += time.perf_counter() - started
            record.rounds += 1
            applied = [remark for remark in remarks if remark.applied]
            if not applied:
                seen[record.name] = graph.edits
            record.applied += len(applied)
            missed[record.name] = [remark for remark in remarks if not remark.applied]
            record.missed = len(missed[record.name])
            outcome.applied += applied
            outcome.history += remarks
            if rewrite_pass.late:
                settled = graph.edits  # late passes do not wait for each other
        if graph.edits == before:
            outcome.missed = [remark for remarks in missed.values() for remark in remarks]
            return outcome
        if outcome.rounds >= MAX_ROUNDS:
            nodes = sum(graph.summary().ops.values())
            idle = 0 if nodes < fewest else idle + 1
            fewest = min(fewest, nodes)
    busy = ", ".join(sorted({remark.pass_name for remark in outcome.applied[-10:]}))
    raise PassError(f"the passes still change the graph after {outcome.rounds} rounds, so they undo each other: {busy}")


def _run_once(graph: Graph, rewrite_pass: RewritePass[Any, Any], admit: Any) -> list[Remark]:
    edits = graph.edits
    remarks = rewrite_pass.run(graph, admit)
    if graph.edits != edits and not any(remark.applied for remark in remarks):
        raise PassError(f"{rewrite_pass.name} changed the graph without saying so", rewrite_pass.name)
    if graph.edits != edits:
        try:
            graph.commit()
        except ValueError as error:
            raise PassError(
                f"the graph is not valid after pass {rewrite_pass.name}: {error}", rewrite_pass.name
            ) from error
    return remarks


def rolled_back(why: str) -> Missed:
    """Said of a rewrite without which the model is right."""
    return Missed("rolled-back", f"with this rewrite the model is not equivalent to the original: {why}")


INSTEAD = Missed(
    "rolled-back", "it would stand in for a rewrite that was left out, and the model is not equivalent with it either"
)
"""What is said of what becomes possible only where others are left out."""

STOPPED = Missed("stopped", "the run was told to stop before this rewrite")
