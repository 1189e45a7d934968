"""What is said of every candidate: one remark each, applied or missed.

    applied + missed == candidates

`Missed` is the one way for a pass, the algebra or a graph to say no.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GIVE_SHAPES = "give example_inputs, or a model with shapes"
"""The remedy where a size, or a number of axes, is not known."""


@dataclass(frozen=True)
class Missed:
    """Why a candidate is left as it is.

    `code` is stable and kebab-case (scripts and tests key on it), `reason` one sentence that says what was
    found, `remedy` what the user can do about it; empty where nothing can be done.
    """

    code: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Remark:
    """One line of the story: what `pass_name` did at `site`, or why it did not.

    `site` is the name under which a person finds the operator in their model.  `code` is "applied" or the
    code of the `Missed`.
    """

    pass_name: str
    site: str
    code: str
    reason: str
    remedy: str = ""

    @property
    def applied(self) -> bool:
        return self.code == "applied"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "applied": self.applied}

    def __str__(self) -> str:
        verdict = "applied" if self.applied else f"missed [{self.code}]"
        line = f"{verdict} {self.pass_name} @ {self.site}: {self.reason}"
        return f"{line}; {self.remedy}" if self.remedy else line
