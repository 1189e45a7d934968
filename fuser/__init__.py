"""fuser: graph-rewrite passes for torch.fx and ONNX, each rewrite explained and verified.

    result = fuser.optimize("model.onnx")
    print(result.report)

Names are loaded when first used: an ONNX job never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuser.api import Result, bisect, explain, list_passes, optimize
    from fuser.bench import benchmark
    from fuser.errors import FuserError, InputError, PassError, VerificationError
    from fuser.exporting import ExportReport, ExportResult, export
    from fuser.many import Outcome, optimize_many
    from fuser.proof import Verification, verify
    from fuser.report import Report

__version__ = "0.1.0"

_HOMES = {
    "bisect": "fuser.api",
    "optimize": "fuser.api",
    "optimize_many": "fuser.many",
    "Outcome": "fuser.many",
    "explain": "fuser.api",
    "export": "fuser.exporting",
    "ExportReport": "fuser.exporting",
    "ExportResult": "fuser.exporting",
    "list_passes": "fuser.api",
    "Result": "fuser.api",
    "Report": "fuser.report",
    "verify": "fuser.proof",
    "Verification": "fuser.proof",
    "benchmark": "fuser.bench",
    "FuserError": "fuser.errors",
    "InputError": "fuser.errors",
    "PassError": "fuser.errors",
    "VerificationError": "fuser.errors",
}

__all__ = [
    "ExportReport",
    "ExportResult",
    "FuserError",
    "InputError",
    "Outcome",
    "PassError",
    "Report",
    "Result",
    "Verification",
    "VerificationError",
    "benchmark",
    "bisect",
    "explain",
    "export",
    "list_passes",
    "optimize",
    "optimize_many",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fuser' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
