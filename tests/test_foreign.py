"""Optimizers of other people as steps: isolated, verified, reported."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types

import fuser
from fuser import foreign
from fuser.errors import InputError
from fuser.files import load

NODES = [node("Identity", ["x"], ["i"]), conv("i"), batch_norm("c", "b"), node("Relu", ["b"])]
NET = model(NODES, constants=conv_constants(), x=("N", 4, 8, 8), doc_string="what it is", producer_name="me")
NET.metadata_props.add(key="author", value="somebody")


def optimized(*then: str, given: object = NET, **options: object) -> fuser.Result:
    return fuser.optimize(given, passes=["fold-batch-norm"], then=then, **options)


def test_a_right_one_is_kept_and_told_of() -> None:
    result = optimized("foreign_steps:drops_identity")
    assert op_types(result.model.graph) == ["Conv", "Relu"]
    report = result.report
    assert [(r.pass_name, r.code) for r in report.applied] == [
        ("fold-batch-norm", "applied"),
        ("foreign_steps:drops_identity", "applied"),
    ]
    assert report.applied[-1].reason == "3 nodes became 2"
    assert report.after.ops == {"Conv": 1, "Relu": 1}
    assert report.verification.passed
    assert "foreign_steps:drops_identity" in report.seconds
    assert "foreign_steps:drops_identity" in str(report)


def test_what_it_loses_of_the_metadata_is_put_back() -> None:
    done = optimized("foreign_steps:drops_identity").model
    assert done.metadata_props == NET.metadata_props
    assert (done.doc_string, done.producer_name) == ("what it is", "me")
    assert [o.domain for o in done.opset_import] == [o.domain for o in NET.opset_import]


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("drops_relu", "failed-verification"),
        ("renames_the_input", "failed-verification"),
        ("copies", "no-change"),
        ("dies", "crashed"),
        ("hangs", "timed-out"),
        ("raises", "failed"),
        ("writes_nothing", "failed"),
        ("writes_rubbish", "failed"),
        ("is_not_there", "failed"),
    ],
)
def test_a_wrong_one_costs_nothing_but_itself(step: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if code == "timed-out":
        monkeypatch.setattr(foreign.run, "__defaults__", (1.0,))
    result = optimized(f"foreign_steps:{step}")
    (remark,) = result.report.missed
    assert (remark.pass_name, remark.code) == (f"foreign_steps:{step}", code)
    assert len(remark.reason.splitlines()) == 1
    assert op_types(result.model.graph) == ["Identity", "Conv", "Relu"]
    assert result.report.verification.passed
    assert result.report.after.ops == {"Identity": 1, "Conv": 1, "Relu": 1}


def test_the_others_are_kept() -> None:
    result = optimized("foreign_steps:dies", "foreign_steps:drops_relu", "foreign_steps:drops_identity")
    assert op_types(result.model.graph) == ["Conv", "Relu"]
    assert [r.code for r in result.report.missed] == ["crashed", "failed-verification"]


def test_one_that_is_not_installed() -> None:
    (remark,) = optimized("no_such_package:run").report.missed
    assert remark.code == "not-installed"
    assert "pip install no_such_package" in remark.remedy


def external(folder: Path) -> Path:
    path = folder / "net.onnx"
    onnx.save(copy.deepcopy(NET), path, save_as_external_data=True, size_threshold=0, location="net.data")
    return path


@pytest.mark.parametrize(("layout", "is_external"), [("auto", True), ("single", False)])
def test_external_data_stays_external(layout: str, is_external: bool, tmp_path: Path) -> None:
    steps = ["foreign_steps:drops_identity", "foreign_steps:renames_the_initializers"]
    result = optimized(*steps, given=external(tmp_path), layout=layout, threshold=16)
    assert [r.pass_name for r in result.report.applied] == ["fold-batch-norm", *steps]
    done = load(result.model)
    assert done.is_external == is_external
    assert [Path(path).name for path in result.report.written] == ["net.fused.onnx", "net.fused.onnx.data"][
        : 1 + is_external
    ]
    assert op_types(done.proto.graph) == ["Conv", "Relu", "Identity"]
    assert fuser.verify(NET, result.model).passed


def test_a_model_that_no_single_file_can_hold_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "LIMIT", 500)
    result = optimized("onnxruntime", "foreign_steps:drops_identity", given=external(tmp_path))
    (remark,) = result.report.missed
    assert (remark.pass_name, remark.code) == ("onnxruntime", "too-large")
    assert remark.reason.endswith("onnxruntime writes one file, of 2 GB at most")
    assert result.report.applied[-1].pass_name == "foreign_steps:drops_identity"  # what may write as it likes may try


def test_names_that_are_no_step() -> None:
    for bad in (["onnx-sim"], ["foreign_steps:"], [".foreign_steps:copies"], [":copies"], "onnxsim"):
        with pytest.raises(InputError):
            fuser.optimize(NET, then=bad)
    with pytest.raises(InputError, match="for ONNX models"):
        fuser.optimize(torch.nn.ReLU(), then=["onnxsim"])


@pytest.mark.parametrize("name", foreign.STEPS)
def test_those_that_are_known(name: str, tmp_path: Path) -> None:
    step = foreign.STEPS[name]
    if importlib.util.find_spec(step.package) is None:
        pytest.skip(f"{step.package} is not installed")
    result = optimized(name, given=external(tmp_path), threshold=0)
    (remark,) = (r for r in [*result.report.applied, *result.report.missed] if r.pass_name == name)
    assert remark.code == "applied", remark
    done = onnx.load(result.model)
    assert op_types(done.graph) in (["Conv", "Relu"], ["Conv"])
    assert done.metadata_props == NET.metadata_props
    assert fuser.verify(NET, result.model).passed
