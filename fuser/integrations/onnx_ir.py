"""fuser as a pass in pipelines of onnx_ir, and so of onnxscript.

import onnx_ir
from fuser.integrations.onnx_ir import FuserPass

pipeline = onnx_ir.passes.Sequential(FuserPass(), onnx_ir.passes.common.ClearMetadataAndDocStringPass())
model = pipeline(model).model
"""

from __future__ import annotations

from typing import Any

from fuser.errors import InputError

try:
    import onnx_ir
except ImportError as error:
    raise InputError("fuser.integrations.onnx_ir needs onnx-ir: pip install onnx-ir") from error

import fuser


class FuserPass(onnx_ir.passes.FunctionalPass):
    """`fuser.optimize` as a pass: another model comes out, and the one that went in is not changed.

    report: the `fuser.Report` of the last run; None before the first.
    """

    def __init__(self, **options: Any) -> None:
        """options: as for `fuser.optimize`, such as `passes`, `skip` or `verify`."""
        super().__init__()
        self._options = options
        self.report: fuser.Report | None = None

    def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
        """Raises what `fuser.optimize` raises.  `modified` says whether any rewrite was applied."""
        result = fuser.optimize(model, **self._options)
        self.report = result.report
        return onnx_ir.passes.PassResult(result.model, modified=bool(result.report.applied))
