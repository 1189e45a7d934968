"""fuser as a pass of Microsoft Olive, which loads it by its module path.

In an Olive package configuration (`olive run --config workflow.json --package-config packages.json`):

    {"passes": {"FuserOptimize": {"module_path": "fuser.integrations.olive.FuserOptimize"}}}

and in the workflow: {"passes": {"fuse": {"type": "FuserOptimize"}}}
"""

from __future__ import annotations

from typing import Any

from fuser.errors import InputError

try:
    from olive.model import ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
except ImportError as error:
    raise InputError(f"fuser.integrations.olive needs olive-ai: pip install olive-ai ({error})") from error

import fuser


class FuserOptimize(Pass):  # type: ignore[misc]
    """`fuser.optimize` on the ONNX model that Olive hands over; the result is verified before Olive sees it."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        """The parameters: those of `fuser.optimize`; `only` is its `passes`, a name that Olive keeps for itself."""
        return {
            "only": PassConfigParam(type_=list[str], default_value=None, description="Passes to run; default: all."),
            "skip": PassConfigParam(type_=list[str], default_value=[], description="Passes that are not run."),
            "then": PassConfigParam(type_=list[str], default_value=[], description="Other optimizers afterwards."),
            "freeze_inputs": PassConfigParam(
                type_=bool, default_value=False, description="Make weights that are also graph inputs constant."
            ),
            "verify": PassConfigParam(
                type_=bool, default_value=True, description="Check the result before it is kept."
            ),
        }

    def _run_for_config(self, model: ONNXModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        """The optimized model, written below `output_model_path`; raises what `fuser.optimize` raises."""
        if not isinstance(model, ONNXModelHandler):
            raise InputError(f"FuserOptimize takes ONNX models, not a {type(model).__name__}; convert it first")
        result = fuser.optimize(
            model.model_path,
            resolve_onnx_path(output_model_path),
            passes=config.only,
            skip=config.skip,
            then=config.then,
            freeze_inputs=config.freeze_inputs,
            verify=config.verify,
        )
        return ONNXModelHandler(model_path=str(result.model))
