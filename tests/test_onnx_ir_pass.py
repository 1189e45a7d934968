"""fuser as a pass of onnx_ir."""

from __future__ import annotations

import pytest
from test_onnx_objects import kinds, net_proto

import fuser
from fuser.errors import InputError

ir = pytest.importorskip("onnx_ir")

from fuser.integrations.onnx_ir import FuserPass  # noqa: E402 - only where onnx_ir is


def test_it_says_honestly_whether_the_model_changed() -> None:
    given = ir.from_proto(net_proto())
    before = ir.to_proto(given).SerializeToString(deterministic=True)
    one = FuserPass(skip=["fold-constants"])
    first = one(given)
    assert first.modified
    assert kinds(first.model.graph) == ["Conv", "Relu"]
    assert one.report is not None
    assert one.report.verification.passed
    second = one(first)
    assert not second.modified
    assert second.model is not first.model
    assert ir.to_proto(second.model) == ir.to_proto(first.model)
    assert ir.to_proto(given).SerializeToString(deterministic=True) == before


def test_in_a_pipeline_with_others() -> None:
    pytest.importorskip("onnxscript")
    from onnx_ir.passes import common

    given = ir.from_proto(net_proto())
    first = common.LiftConstantsToInitializersPass()
    pipeline = ir.passes.PassManager([first, FuserPass(), common.RemoveUnusedNodesPass()], steps=3, early_stop=True)
    result = pipeline(given)
    assert result.modified
    assert kinds(result.model.graph) == ["Conv", "Relu"]
    assert fuser.verify(given, result.model).passed
    assert not pipeline(result.model).modified


def test_a_bad_option_is_told() -> None:
    with pytest.raises(ir.passes.PassError) as error:
        ir.passes.Sequential(FuserPass(passes=["no-such-pass"]))(ir.from_proto(net_proto()))
    assert isinstance(error.value.__cause__, InputError)
