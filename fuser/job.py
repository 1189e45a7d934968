"""One run over one model: rewrite it, prove it, and start over without whatever broke its contract."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from fuser import pipeline
from fuser.errors import InputError, PassError, VerificationError
from fuser.foreign import Step
from fuser.pipeline import NOTHING, PassRun, Rewrite
from fuser.remarks import Missed, Remark
from fuser.report import Report
from fuser.rewrite import Contract, RewritePass
from fuser.sources import Candidate, OnnxSource, Source

if TYPE_CHECKING:
    from fuser.proof import Verification

Passes: TypeAlias = list[RewritePass[Any, Any]]
Progress: TypeAlias = Callable[[str], None]


class Check(Protocol):
    """How a rewritten model compares with the original or, where it is given, with the model `before`."""

    def __call__(self, candidate: Any, contract: Contract, before: Any = None) -> Verification: ...


LARGE = 512 * 2**20
"""From how many bytes of constants on the whole model is not run unless asked for."""

UNVERIFIABLE = "unverifiable"
"""The verdict on a model that cannot be run here; it says nothing against the rewrites."""


class Job:
    """What is done to one source, and the report of it.

    progress: called with a few words when a stage or a pass begins.
    """

    def __init__(self, source: Source, passes: Passes, progress: Progress | None) -> None:
        self.source, self._passes = source, passes
        self._progress = progress or (lambda stage: None)
        self.report = Report(source.name)
        self._candidate: Candidate | None = None
        self._attempts = 0

    def rewrite(self) -> None:
        """Run the passes; one that fails is set aside, with a warning, and the others start over.

        Raises `PassError` when no single pass is at fault.
        """
        while True:
            try:
                self._keep(*self._attempt(self._passes, NOTHING))
                self.report.warnings += self.source.notes
                return
            except PassError as error:
                if not error.pass_name:
                    raise
                self._passes = [p for p in self._passes if p.name != error.pass_name]
                self.report.warnings.append(f"{error}; the pass was set aside")

    def prove(self, check: Check, *, abort: bool, whole: bool) -> None:
        """Hold each pass to its contract, leave out the rewrites that break it, and keep the rest.

        All together are judged against the truth; the exact passes alone have to be equal bit for bit.  A model
        with more than LARGE bytes of constants is only run when `whole` is set: a runtime takes more memory than its
        size, and in float64 it takes long; each rewrite was checked on a window before it was accepted.

        Raises `VerificationError` when a check fails and `abort` is set, or no rewrite is to blame.
        """
        applied = {run.contract for run in self.report.passes if run.applied}
        if not applied and not self.source.removable_inputs:
            self.report.unverified = "nothing was changed, so there is nothing to check"
            return
        if self.report.before.bytes > LARGE and not whole:
            self.report.unverified = (
                f"the constants take {self.report.before.bytes / 1e9:.1f} GB, and running the whole model takes more "
                "memory than that, and long; each rewrite was checked on a window of its own (--verify=whole runs it)"
            )
            return
        contract = Contract.EXACT if applied == {Contract.EXACT.value} else Contract.ROUNDING
        check = self._fair(check)
        with self.stage("verify"):
            try:
                verification = check(self.candidate.model, contract)
            except InputError as error:
                if not self.source.may_lack_inputs:
                    raise
                self.report.unverified = str(error)
                return
            guilty = dict(self._guilty(self._passes, contract, check, verification, abort=abort))
            if len(applied) > 1:
                guilty |= self._guilty_of_exact(check, abort=abort)
            if guilty:
                self._leave_out(guilty, contract, check)
            else:
                self._conclude(verification)

    def follow(self, steps: Iterable[Step], check: Check | None, *, whole: bool) -> None:
        """Let foreign optimizers have the result, one after the other; keep what each makes of it where it passes.

        check: compares with the original; None keeps everything unseen.  Nothing of theirs was checked on windows,
            so what cannot be compared is not kept, and a model over LARGE is left alone unless `whole` is set.
        """
        for step in steps:
            with self.stage(step.name):
                started = time.perf_counter()
                remark = self._weigh(step, check, whole)
            spent = time.perf_counter() - started
            told = self.report.applied if remark.applied else self.report.missed
            told.append(remark)
            run = PassRun(step.name, Contract.ROUNDING.value, rounds=1, seconds=spent)
            run.applied, run.missed = int(remark.applied), int(not remark.applied)
            self.report.passes.append(run)

    def _weigh(self, step: Step, check: Check | None, whole: bool) -> Remark:
        """Take over what the step made, if it is right; the one remark of the step."""

        def missed(code: str, reason: str, remedy: str = "") -> Remark:
            return Remark(step.name, self.source.name, code, reason, remedy)

        if check is not None and self.report.before.bytes > LARGE and not whole:
            return missed("too-large", "the whole model would have to be run to check it", "--verify=whole runs it")
        source = self.source
        assert isinstance(source, OnnxSource)
        made = source.after(step, self.candidate)
        if isinstance(made, Missed):
            return missed(made.code, made.reason, made.remedy)
        before = self.report.after
        try:
            after = source.summary(made)
            if after == before:
                return missed("no-change", "its result has the same operators and as many parameters")
            if check is not None:
                verification = check(made.model, Contract.ROUNDING)
                if not verification.passed:
                    return missed("failed-verification", str(verification))
                self.report.verification, self.report.unverified = verification, ""
        except InputError as error:
            return missed("failed", str(error))
        self._candidate, self.report.after = made, after
        counts = sum(before.ops.values()), sum(after.ops.values())
        return Remark(step.name, self.source.name, "applied", f"{counts[0]} nodes became {counts[1]}")

    def first_wrong(self, check: Check) -> Remark | None:
        """The first rewrite after which the model is no longer equivalent; None where it is to the end.

        Found by bisection over the number of rewrites that are admitted.
        """
        from fuser.proof.gate import first_bad

        def fine_after(count: int) -> bool:
            _, candidate = self._attempt(self._passes, NOTHING, stop_after=count)
            verification = check(candidate.model, Contract.ROUNDING)
            return not _speaks_against(verification)

        rewrites = self.report.applied
        count = first_bad(len(rewrites), fine_after)
        return None if count is None else rewrites[count - 1]

    def finish(self) -> Any:
        """Write what is to be written; the result as the user gets it."""
        with self.stage("write"):
            model, written = self.candidate.finish()
        self.report.written = written.files
        if written.note:
            self.report.warnings.append(written.note)
        return model

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and tell of it."""
        self._progress(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = self.report.seconds
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    # -- attempts

    def _attempt(
        self,
        passes: Passes,
        left_out: Mapping[Rewrite, str],
        *,
        only: Collection[Rewrite] | None = None,
        stop_after: int | None = None,
    ) -> tuple[Report, Candidate]:
        story = Report(self.source.name)
        if self._attempts:
            gc.collect()  # the graph of the last attempt
        self._attempts += 1
        with _no_collector():
            with self.stage("read"):
                graph = self.source.graph()
            story.host, story.before = graph.host, graph.summary()
            with self.stage("passes"):
                outcome = pipeline.run(
                    graph, passes, leave_out=left_out, only=only, stop_after=stop_after, progress=self._progress
                )
            story.after = graph.summary()
        story.take(outcome)
        return story, self.source.candidate(graph)

    def _keep(self, story: Report, candidate: Candidate) -> None:
        for name in ("host", "before", "after", "passes", "rounds", "applied", "missed"):
            setattr(self.report, name, getattr(story, name))
        self._candidate = candidate

    @property
    def candidate(self) -> Candidate:
        """The rewritten model as it stands."""
        assert self._candidate is not None
        return self._candidate

    # -- blame

    def _fair(self, check: Check) -> Check:
        """The check, where exact passes are not blamed for other bits that the graph has before any rewrite.

        torch computes attention otherwise in a module than in what was captured of it.
        """
        untouched: list[Any] = []  # the graph without rewrites, where its bits are others; else None

        def fair(candidate: Any, contract: Contract, before: Any = None) -> Verification:
            found = check(candidate, contract)
            if contract is not Contract.EXACT or not _speaks_against(found):
                return found
            if not untouched:
                model = self._attempt([], NOTHING)[1].model
                untouched.append(None if check(model, contract).passed else model)
            if untouched[0] is None:
                return found
            bits = check(candidate, contract, untouched[0])
            return check(candidate, Contract.ROUNDING) if bits.passed else bits

        return fair

    def _guilty(
        self, passes: Passes, contract: Contract, check: Check, verification: Verification, *, abort: bool
    ) -> Mapping[Rewrite, str]:
        """The rewrites without which `passes` keep `contract`, and what is wrong with them; none when they keep it."""
        if not _speaks_against(verification):
            return NOTHING
        if abort:
            raise VerificationError(f"the result is not equivalent to the original: {verification.reason}")
        from fuser.proof.gate import find_guilty

        story, _ = self._attempt(passes, NOTHING)

        def fine_without(left_out: Iterable[Rewrite]) -> bool:
            # Others that become possible may be as wrong, and are not among the suspects.
            _, candidate = self._attempt(passes, dict.fromkeys(left_out, ""), only=frozenset(story.rewrites))
            return not _speaks_against(check(candidate.model, contract))

        return dict.fromkeys(find_guilty(story.rewrites, fine_without), verification.reason)

    def _guilty_of_exact(self, check: Check, *, abort: bool) -> Mapping[Rewrite, str]:
        exact = [p for p in self._passes if p.contract is Contract.EXACT]
        _, candidate = self._attempt(exact, NOTHING)
        verification = check(candidate.model, Contract.EXACT)
        return self._guilty(exact, Contract.EXACT, check, verification, abort=abort)

    def _leave_out(self, guilty: Mapping[Rewrite, str], contract: Contract, check: Check) -> None:
        tried = frozenset(self.report.rewrites)
        for only in (None, tried):
            self._keep(*self._attempt(self._passes, guilty, only=only))
            verification = check(self.candidate.model, contract)
            if not _speaks_against(verification):
                break
        else:
            raise VerificationError(f"the result is not equivalent to the original: {verification.reason}")
        for (pass_name, site), why in sorted(guilty.items()):
            self.report.warnings.append(
                f"{pass_name} @ {site} was left out: with it the model is not equivalent to the original ({why})"
            )
        self._conclude(verification)

    def _conclude(self, verification: Verification) -> None:
        self.report.verification = verification
        if verification.verdict == UNVERIFIABLE:
            self.report.unverified = verification.reason


def _speaks_against(verification: Verification) -> bool:
    """Whether the check found something wrong; where it could not be made, it did not."""
    return not verification.passed and verification.verdict != UNVERIFIABLE


@contextmanager
def _no_collector() -> Iterator[None]:
    """A graph is many linked objects, none of them garbage; the cyclic collector would visit them again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if not gc.get_freeze_count():  # not among what is new, where the next collection would go through it
                gc.freeze()
                gc.unfreeze()
            gc.enable()
