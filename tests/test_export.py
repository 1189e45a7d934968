"""`fuser.export`: from a module to a verified file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_models import op_types
from test_api import X, net
from torch import nn

import fuser
from fuser import exporting, registry
from fuser.errors import InputError, VerificationError
from fuser.files import load
from fuser.graph import Graph
from fuser.ops import BatchNorm
from fuser.rewrite import Contract, RewritePass

pytest.importorskip("onnxscript")

PLAIN = {"optimize": False}
"""For the exporter: leave the folding to us."""

ONE = {"inputs": [X.numpy()]}
"""For the check: one set of inputs is enough to tell right from wrong."""


def test_a_module_in_eval_mode_becomes_a_verified_file(tmp_path: Path) -> None:
    module = net()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    shapes = ({0: torch.export.Dim("batch")},)
    result = fuser.export(module, (X,), tmp_path / "net.onnx", dynamic_shapes=shapes, output_names=["scores"])
    assert result.model == tmp_path / "net.onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    proto = onnx.load(result.model)
    assert op_types(proto.graph) == ["Conv", "Relu"]
    assert [value.name for value in proto.graph.output] == ["scores"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    report = result.report
    assert [(r.pass_name, r.code) for r in report.applied] == [("fold-batch-norm", "applied")]
    assert report.verification.passed
    assert report.verification.truth == "float64"
    assert report.torch.verification.passed
    assert report.written == [str(result.model)]
    assert "the file against the module: equivalent" in str(report)
    assert json.loads(report.to_json())["verification"]["passed"]
    assert fuser.verify(module, result.model, example_inputs=(X,)).passed
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def in_training(name: str) -> nn.Module:
    module = net()
    (module.get_submodule(name) if name else module).train()
    return module


@pytest.mark.parametrize(("name", "shown"), [("", "Sequential, 0, 1 and 1 more"), ("1", "1")])
def test_a_module_in_training_mode_is_refused(name: str, shown: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        fuser.export(in_training(name), (X,), tmp_path / "net.onnx")
    assert str(error.value) == (f"the module is in training mode ({shown}); call module.eval() before the export")
    assert not list(tmp_path.iterdir())


def constants(path: Path) -> list[np.ndarray]:
    graph = onnx.load(path).graph
    return sorted((numpy_helper.to_array(tensor) for tensor in graph.initializer), key=lambda a: (a.size, a.ndim))


def test_the_fold_in_torch_and_the_fold_in_onnx_are_the_same(tmp_path: Path) -> None:
    module = nn.Sequential(*net(), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)).eval()
    module[4].running_var.uniform_(0.5, 2)
    fuser.export(module, (X,), tmp_path / "first.onnx", verify=False, **PLAIN)
    raw = tmp_path / "raw.onnx"
    result = fuser.export(module, (X,), raw, passes=[], verify=False, **PLAIN)
    assert not result.report.applied
    assert op_types(onnx.load(raw).graph).count("BatchNormalization") == 2
    fuser.optimize(raw, tmp_path / "second.onnx", verify=False)
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    assert op_types(onnx.load(first).graph) == op_types(onnx.load(second).graph)
    wanted = copy.deepcopy(module).double()
    with torch.no_grad():
        scale = wanted[1].weight / torch.sqrt(wanted[1].running_var + wanted[1].eps)
        truth = (wanted[0].weight * scale[:, None, None, None]).numpy()
    for path in (first, second):
        found = [a for a in constants(path) if a.shape == truth.shape]
        assert min(np.abs(a - truth).max() for a in found) <= np.abs(truth).max() * 2**-23
    for one, other in zip(constants(first), constants(second), strict=True):
        assert np.allclose(one, other, rtol=2**-22, atol=1e-9)


def test_keyword_arguments_hooks_and_integers(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.net = nn.Embedding(7, 4), net()

        def forward(self, x: torch.Tensor, *, ids: torch.Tensor) -> torch.Tensor:
            return self.net(x + self.table(ids)[:, :, None, None])

    module = Model().eval()
    module.net[0].register_forward_hook(lambda mod, args, out: out * 3)
    ids = torch.tensor([6, 2])
    result = fuser.export(
        module, (X,), tmp_path / "net.onnx", example_kwargs={"ids": ids}, inputs=[X.numpy(), ids.numpy()]
    )
    assert result.report.verification.passed  # what the hook does is in the file
    assert "BatchNormalization" not in op_types(onnx.load(result.model).graph)


def test_branches(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = net(), net()
            self.other[0].weight.data *= 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.other(x), (x,))

    result = fuser.export(Model().eval(), (X,), tmp_path / "net.onnx", **ONE)
    assert [(r.pass_name, r.code) for r in result.report.applied] == [("fold-batch-norm", "applied")] * 2
    for found in (result.report.torch.verification, result.report.verification):
        assert found.passed
        assert found.truth == "float64"  # torch compiles a branch of its own accord; in float64 it is run as it stands
    (branching,) = (n for n in onnx.load(result.model).graph.node if n.op_type == "If")
    assert [op_types(attribute.g) for attribute in branching.attribute] == [["Conv", "Relu"]] * 2


class Wrong(RewritePass[BatchNorm, BatchNorm]):
    """Loses every BatchNorm."""

    name, root, contract = "wrong", BatchNorm, Contract.ROUNDING

    def match(self, graph: Graph, op: BatchNorm) -> BatchNorm:
        return op

    def rewrite(self, graph: Graph, op: BatchNorm) -> str:
        graph.replace(op, by=op.input)
        return "gone"


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    info = registry.PassInfo("wrong", "somebody", Wrong)
    monkeypatch.setattr(registry, "load", lambda: registry.Registry((info,), ()))


def test_a_wrong_rewrite_is_left_out_of_both_stages_and_named(tmp_path: Path, wrong: None) -> None:
    result = fuser.export(net(), (X,), tmp_path / "net.onnx", **PLAIN, **ONE)
    assert "BatchNormalization" in op_types(onnx.load(result.model).graph)
    assert [warning.split(" was ")[0].split(" @ ")[0] for warning in result.report.warnings] == ["wrong", "wrong"]
    assert {remark.code for remark in result.report.missed} == {"rolled-back"}
    assert result.report.verification.passed


def test_or_nothing_is_written(tmp_path: Path, wrong: None) -> None:
    (tmp_path / "net.onnx").write_text("as it was")
    with pytest.raises(VerificationError):
        fuser.export(net(), (X,), tmp_path / "net.onnx", on_failure="abort", **PLAIN)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.onnx", "as it was")]


def test_a_wrong_exporter_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting._to_onnx

    def spoiled(program: Any, path: Path, options: Any) -> Path:
        real(program, path, options)
        proto = onnx.load(path)
        weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), weight.name))
        onnx.save(proto, path)
        return path

    monkeypatch.setattr(exporting, "_to_onnx", spoiled)
    with pytest.raises(VerificationError, match=r"torch\.onnx\.export's own file is not"):
        fuser.export(net(), (X,), tmp_path / "net.onnx", **ONE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"f": "x.onnx"}, "third argument"),
        ({"dynamic_axes": {}}, "dynamic_shapes"),
        ({"external_data": True}, "layout"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"layout": "odd"}, "layout is one of"),
        ({"opset_version": "odd"}, r"torch\.onnx\.export"),
        ({"opset_version": 99}, "cannot make opset 99"),
    ],
)
def test_options_that_are_no_use(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as error:
        fuser.export(net(), (X,), tmp_path / "net.onnx", **options)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_module() -> None:
    with pytest.raises(InputError, match="takes a torch"):
        fuser.export({}, (X,), "net.onnx")
    with pytest.raises(InputError, match="tuple of positional"):
        fuser.export(net(), X, "net.onnx")


def test_external_data_on_request(tmp_path: Path) -> None:
    options = {"layout": "external", "threshold": 0, "opset_version": 18}
    result = fuser.export(net(), (X,), tmp_path / "net.onnx", verify=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    model = load(result.model)
    assert model.is_external
    assert model.proto.opset_import[0].version == 18
