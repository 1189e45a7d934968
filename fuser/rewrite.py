"""What a pass is: `match` looks, `rewrite` edits.

class EliminateIdentity(RewritePass[Identity, Identity]):
    name, root, contract = "eliminate-identity", Identity, Contract.EXACT

    def match(self, graph, op):
        return op

    def rewrite(self, graph, op):
        graph.replace(op, by=op.input)
        return "reads its input directly"
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import ClassVar, Generic, TypeAlias, TypeVar

from fuser.errors import PassError
from fuser.graph import Graph
from fuser.ops import Op
from fuser.remarks import Missed, Remark

RootT = TypeVar("RootT", bound=Op)
MatchT = TypeVar("MatchT")


class Contract(Enum):
    """What a pass promises of the model's outputs; the equivalence gate holds it to that."""

    EXACT = "exact"
    """Bit-identical outputs."""
    ROUNDING = "rounding"
    """Equal in exact arithmetic; floating point is reassociated."""


Admit: TypeAlias = Callable[[str, str], Missed | None]
"""Asked with (pass name, site) once a match is found; a `Missed` keeps the rewrite from happening."""


def admit_all(pass_name: str, site: str) -> None:
    """The usual case: every match is rewritten."""


class RewritePass(ABC, Generic[RootT, MatchT]):
    """A graph rewrite.  Its options are dataclass fields; it holds no other state."""

    name: ClassVar[str]
    root: ClassVar[type[Op]]
    contract: ClassVar[Contract] = Contract.ROUNDING
    hosts: ClassVar[tuple[str, ...]] = ("onnx", "torch")
    late: ClassVar[bool] = False
    """Whether it waits until the others have nothing left to do: what it makes, such as values that nodes share, is
    harder to rewrite."""

    def concerns(self, graph: Graph, op: RootT) -> bool:
        """Whether `op` is a candidate at all.  What is none gets no remark: nobody expected a rewrite there."""
        return True

    @abstractmethod
    def match(self, graph: Graph, op: RootT) -> MatchT | Missed:
        """Look, never touch.  Guards first, the cheapest first."""

    @abstractmethod
    def rewrite(self, graph: Graph, match: MatchT) -> str:
        """Edit through `graph` only; cannot decline, `match` agreed.  Returns what was done, for a person."""

    def run(self, graph: Graph, admit: Admit = admit_all) -> list[Remark]:
        """Visit every candidate once: exactly one remark for each op of the kind `root` that the pass concerns.

        Raises `PassError` when the pass breaks this contract or fails.
        """
        remarks = []
        for op in graph.ops(self.root):
            site = ""
            try:
                if self.concerns(graph, op):  # type: ignore[arg-type]
                    site = graph.describe(op)
                    remarks.append(self._visit(graph, op, site, admit))
            except PassError:
                raise
            except Exception as error:
                site = site or graph.describe(op)
                raise PassError(f"{self.name} failed at {site}: {type(error).__name__}: {error}", self.name) from error
        return remarks

    def _visit(self, graph: Graph, op: Op, site: str, admit: Admit) -> Remark:
        edits = graph.edits
        why = HOOKED if op.hooked is True else op.hooked
        found: MatchT | Missed = why or self.match(graph, op)  # type: ignore[arg-type]
        if graph.edits != edits:
            raise PassError(
                f"{self.name} edited the graph while matching {site}: match looks, rewrite edits", self.name
            )
        if isinstance(found, Missed):
            return Remark(self.name, site, found.code, found.reason, found.remedy)
        if refused := admit(self.name, site):
            return Remark(self.name, site, refused.code, refused.reason, refused.remedy)
        done = self.rewrite(graph, found)
        if graph.edits == edits:
            raise PassError(f"{self.name} says that it rewrote {site} but changed nothing", self.name)
        return Remark(self.name, site, "applied", done)


HOOKED = Missed(
    "hooks",
    "user code is attached to this module (a hook, a replaced method, a parametrization, a class of its own)",
    "remove the hooks, or give example_inputs so that the exported graph is optimized",
)
