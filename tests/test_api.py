"""The same kind out as in, for every kind; what went in is not changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types
from torch import nn

import fuser
from fuser.errors import InputError


def net_proto() -> onnx.ModelProto:
    nodes = [conv(), batch_norm("c", "b"), node("Relu", ["b"])]
    return model(nodes, constants=conv_constants(), x=(1, 4, 8, 8))


def net() -> nn.Module:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).eval()
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.5, 2)
    return module


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_path(tmp_path: Path) -> None:
    onnx.save(net_proto(), tmp_path / "net.onnx")
    result = fuser.optimize(str(tmp_path / "net.onnx"))
    assert result.model == tmp_path / "net.fused.onnx"
    assert op_types(onnx.load(result.model).graph) == ["Conv", "Relu"]
    assert result.report.verification.passed
    assert "fold-batch-norm" in str(result)


def test_a_model_proto() -> None:
    proto = net_proto()
    before = proto.SerializeToString()
    result = fuser.optimize(proto)
    assert isinstance(result.model, onnx.ModelProto)
    assert op_types(result.model.graph) == ["Conv", "Relu"]
    assert proto.SerializeToString() == before
    assert result.report.written == []


def test_a_model_proto_with_an_output(tmp_path: Path) -> None:
    result = fuser.optimize(net_proto(), tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == result.model


def test_a_graphsurgeon_graph() -> None:
    graph = gs.import_onnx(net_proto())
    result = fuser.optimize(graph)
    assert isinstance(result.model, gs.Graph)
    assert [n.op for n in result.model.nodes] == ["Conv", "Relu"]
    assert [n.op for n in graph.nodes] == ["Conv", "BatchNormalization", "Relu"]


def batch_norms(module: nn.Module) -> int:
    if isinstance(module, torch.fx.GraphModule):
        return sum("batch_norm" in str(n.target) for n in module.graph.nodes) + sum(
            isinstance(m, nn.BatchNorm2d) for m in module.modules()
        )
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


@pytest.mark.parametrize("kind", ["traced", "exported", "graph-module"])
def test_a_module(kind: str) -> None:
    module = net()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    given = torch.fx.symbolic_trace(module) if kind == "graph-module" else module
    result = fuser.optimize(given, example_inputs=(X,) if kind == "exported" else None)
    assert isinstance(result.model, nn.Module)
    assert batch_norms(result.model) == 0
    torch.testing.assert_close(result.model(X), module(X), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    if kind == "exported":
        assert result.report.verification.passed
    else:
        assert "example_inputs" in result.report.unverified


def test_an_exported_program() -> None:
    program = torch.export.export(net(), (X,))
    result = fuser.optimize(program)
    assert isinstance(result.model, torch.export.ExportedProgram)
    assert batch_norms(result.model.graph_module) == 0
    assert batch_norms(program.graph_module) == 1
    torch.testing.assert_close(result.model.module()(X), net()(X), rtol=1e-4, atol=1e-5)


def test_a_dynamic_batch_stays_dynamic() -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    result = fuser.optimize(net(), example_inputs=(X,), dynamic_shapes=shapes)
    assert result.model(torch.randn(5, 4, 8, 8)).shape == (5, 6, 6, 6)


def test_a_training_module_is_refused_with_the_remedy() -> None:
    for options in ({}, {"example_inputs": (X,)}):
        result = fuser.optimize(net().train(), verify=False, **options)
        (remark,) = (r for r in result.report.missed if r.pass_name == "fold-batch-norm")
        assert remark.code == "training-mode"
        assert "eval" in remark.remedy


def test_explain_tells_without_writing(tmp_path: Path) -> None:
    onnx.save(net_proto(), tmp_path / "net.onnx")
    report = fuser.explain(tmp_path / "net.onnx")
    assert [(r.pass_name, r.site) for r in report.applied] == [("fold-batch-norm", "bn_b")]
    assert list(tmp_path.iterdir()) == [tmp_path / "net.onnx"]


def test_the_report_as_json() -> None:
    story = json.loads(fuser.optimize(net_proto()).report.to_json())
    assert story["host"] == "onnx"
    assert story["before"]["parameters"] - story["after"]["parameters"] == 16 - 4  # four statistics for one bias
    assert [p["name"] for p in story["passes"] if p["applied"]] == ["fold-batch-norm"]
    assert set(story["seconds"]) == {"read", "passes", "verify", "write"}


def test_bisect_finds_nothing_wrong() -> None:
    assert fuser.bisect(net_proto()) is None


def test_list_passes() -> None:
    names = [info.name for info in fuser.list_passes()]
    assert "fold-batch-norm" in names
    assert len(names) == len(set(names))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot optimize a builtins\.dict"):
        fuser.optimize({})
    with pytest.raises(InputError, match=r"cannot optimize a numpy\.ndarray"):
        fuser.optimize(np.zeros(3))


def test_what_cannot_be_captured_is_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    for options in ({}, {"example_inputs": (X,)}):
        with pytest.raises(InputError) as error:
            fuser.optimize(Branching(), **options)
        assert len(str(error.value).splitlines()) == 1


def test_an_output_is_for_onnx_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torch\.export\.save"):
        fuser.optimize(net(), tmp_path / "out.onnx", example_inputs=(X,))
    assert not list(tmp_path.iterdir())


def test_a_model_whose_weights_must_be_listed_as_inputs_is_folded() -> None:
    constants = conv_constants()
    old = model([conv(), batch_norm()], constants=constants, also_inputs=list(constants), opset=7, ir_version=3)
    result = fuser.optimize(old)
    assert op_types(result.model.graph) == ["Conv"]
    assert fuser.verify(old, result.model).passed


def test_verify_takes_the_words_of_the_command_line() -> None:
    proto = model([conv(), batch_norm("c")], constants=conv_constants())
    assert fuser.optimize(proto, verify="none").report.verification is None
    assert fuser.optimize(proto, verify="auto").report.verification.passed
    with pytest.raises(InputError, match="verify is True, False or 'whole'; not 'never'"):
        fuser.optimize(proto, verify="never")
