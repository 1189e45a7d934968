"""fuser as a pass of Microsoft Olive, where that is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import onnx
import pytest
from onnx_models import op_types
from test_api import net_proto

import fuser
from fuser.errors import InputError


def test_without_olive_it_is_one_line() -> None:
    with mock.patch.dict(sys.modules, {"olive": None, "olive.model": None}):
        sys.modules.pop("fuser.integrations.olive", None)
        with pytest.raises(InputError, match="pip install olive-ai"):
            import fuser.integrations.olive  # noqa: F401


def test_olive_loads_it_by_its_module_path(tmp_path: Path) -> None:
    if importlib.util.find_spec("olive") is None:
        pytest.skip("olive-ai is not installed")
    try:
        import olive.passes.olive_pass  # noqa: F401
    except ImportError as error:  # it is, without all that it needs
        pytest.skip(f"olive-ai cannot be imported: {error}")
    from olive.hardware import DEFAULT_CPU_ACCELERATOR
    from olive.model import ONNXModelHandler
    from olive.package_config import OlivePackageConfig

    config = OlivePackageConfig.model_validate(
        {"passes": {"FuserOptimize": {"module_path": "fuser.integrations.olive.FuserOptimize"}}}
    )
    cls = config.import_pass_module("FuserOptimize")
    made = cls(DEFAULT_CPU_ACCELERATOR, cls.generate_config(DEFAULT_CPU_ACCELERATOR, {"then": ["onnxruntime"]}))
    onnx.save(net_proto(), tmp_path / "net.onnx")
    result = made.run(ONNXModelHandler(model_path=str(tmp_path / "net.onnx")), str(tmp_path / "cache" / "out"))
    assert isinstance(result, ONNXModelHandler)
    assert "BatchNormalization" not in op_types(onnx.load(result.model_path).graph)
    assert fuser.verify(tmp_path / "net.onnx", result.model_path).passed
