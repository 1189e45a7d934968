"""What one run of a model gave: its outputs, or a named failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["refused", "unsupported", "crashed", "timed out", "too-large"]


@dataclass(frozen=True)
class Failure:
    """Why there are no outputs.

    kind: "refused" (the model rejects this input), "unsupported" (the model cannot be loaded), "crashed",
        "timed out", or "too-large" (memory).
    message: one line.
    """

    kind: Kind
    message: str

    def __str__(self) -> str:
        return self.message if self.kind in ("refused", "unsupported") else f"{self.kind}: {self.message}"


Outputs = list[Any]
"""Arrays in the model's order; a list of arrays for a sequence, None for an empty optional."""

Outcome = Outputs | Failure


def first_line(error: BaseException) -> str:
    """An exception in one line of sensible length, with its cause where it wraps one."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = f"{type(error).__name__}: {text}"[:300]
    return f"{line} ({first_line(error.__cause__)})"[:400] if error.__cause__ else line
