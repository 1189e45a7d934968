"""Real trained models; they are not part of the project, and the tests that need one skip where it is absent."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import onnx
import pytest

import fuser

MODELS = Path(os.environ.get("FUSER_MODELS", Path(__file__).parents[2] / "shared" / "models"))


def real(name: str) -> Path:
    if not (MODELS / name).is_file():
        pytest.skip(f"{name} is not in {MODELS}; set FUSER_MODELS to the folder that has it")
    return MODELS / name


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def fold_codes(report: fuser.Report) -> Counter[str]:
    return Counter(r.code for r in (*report.applied, *report.missed) if r.pass_name == "fold-batch-norm")


def test_residual_block(tmp_path: Path) -> None:
    result = fuser.optimize(real("residual_block.onnx"), tmp_path / "out.onnx")
    assert fold_codes(result.report) == {"applied": 5}
    assert ops(result.model)["BatchNormalization"] == 0
    assert result.report.verification.passed


def test_ultraface_by_default_keeps_its_overridable_weights(tmp_path: Path) -> None:
    path = real("ultraface_rfb_320.onnx")
    result = fuser.optimize(path, tmp_path / "out.onnx", passes=["fold-batch-norm"])
    assert fold_codes(result.report) == {"overridable": 35}
    assert result.model.read_bytes() == path.read_bytes()
    assert sum("--freeze-inputs" in line for line in result.report.conclusion()) == 1


def test_ultraface_frozen(tmp_path: Path) -> None:
    path = real("ultraface_rfb_320.onnx")
    result = fuser.optimize(path, tmp_path / "out.onnx", freeze_inputs=True)
    assert fold_codes(result.report) == {"applied": 35}
    assert result.report.verification.passed
    after = onnx.load(result.model).graph
    assert [value.name for value in after.input] == ["input"]
    assert [value.name for value in after.output] == [value.name for value in onnx.load(path).graph.output]


def test_magika_says_why_its_norm_stays(tmp_path: Path) -> None:
    result = fuser.optimize(real("magika_standard_v2_1.onnx"), tmp_path / "out.onnx")
    assert fold_codes(result.report) == {"not-constant": 1}


def test_silero_is_unharmed(tmp_path: Path) -> None:
    result = fuser.optimize(real("silero_vad_16k_op15.onnx"), tmp_path / "out.onnx")
    assert result.report.verification.passed
    assert ops(result.model)["If"] == ops(real("silero_vad_16k_op15.onnx"))["If"]
