"""The same kind out as in, for every kind; what went in is not changed."""

from __future__ import annotations

import gc
import json
import os
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


def test_a_trace_would_lose_autocast() -> None:
    class Mixed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self[0](x)
            return self[1](y.float())

    module = Mixed(*net()[:2])
    with pytest.raises(InputError, match=r"under torch\.autocast.*give example_inputs"):
        fuser.optimize(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert fuser.optimize(net()).report.applied  # around all of it, it is the caller's
    result = fuser.optimize(module, example_inputs=(X,))
    assert torch.allclose(result.model(X), module(X), atol=1e-5)


def test_a_capture_may_round_otherwise_than_the_module() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    done = fuser.optimize(layer, example_inputs=(torch.randn(2, 5, 8),))
    assert done.report.applied and done.report.verification is not None and done.report.verification.passed
    only_exact = fuser.optimize(layer, example_inputs=(torch.randn(2, 5, 8),), passes=["eliminate-identity"])
    assert only_exact.report.applied and not only_exact.report.warnings


def test_lazy_parts(tmp_path: Path) -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    for options in ({}, {"example_inputs": (X,)}):
        with pytest.raises(InputError, match="call it once, then optimize it"):
            fuser.optimize(lazy, **options)
        assert isinstance(lazy[0], nn.LazyConv2d)
    with pytest.raises(InputError, match="call it once, then optimize it"):
        fuser.export(lazy, (X,), tmp_path / "net.onnx")
    assert isinstance(lazy[0], nn.LazyConv2d)
    lazy(X)
    assert len(fuser.optimize(lazy, example_inputs=(X,)).report.applied) == 1


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_buffers_without_strides(layout: str) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mix", getattr(torch.eye(6), layout)())
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.mix.to_dense() @ x) * 2

    module, x = Mixing().eval(), torch.randn(6, 6)
    for options in ({}, {"example_inputs": (x,)}):
        result = fuser.optimize(module, **options)
        assert torch.allclose(result.model(x), module(x), atol=1e-5)
        assert [remark.pass_name for remark in result.report.applied] == ["fold-affine"]


def test_arguments_for_the_check_that_are_no_use() -> None:
    with pytest.raises(InputError, match="give example_inputs, too"):
        fuser.optimize(net(), inputs=(X,))
    with pytest.raises(InputError, match="input_shapes is for ONNX models"):
        fuser.optimize(net(), example_inputs=(X,), input_shapes={"x": (1, 4, 8, 8)})
    for growth in ("a", -1, 2.5):
        with pytest.raises(InputError, match="max_growth is a number of elements"):
            fuser.optimize(net_proto(), max_growth=growth)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list open files there")
def test_a_model_in_memory_leaves_no_file_open() -> None:
    proto = model([conv(), batch_norm()], constants=conv_constants(40, 40), x=(1, 40, 8, 8))
    collecting = gc.isenabled()
    gc.disable()  # what is linked in circles would go by it
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert fuser.optimize(proto, verify=False).report.applied
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        if collecting:
            gc.enable()


def test_an_output_is_for_onnx_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torch\.export\.save"):
        fuser.optimize(net(), tmp_path / "out.onnx", example_inputs=(X,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "says"), [("out.json", r"onnx reads \.json as text"), ("no/out.onnx", "there is no folder")]
)
def test_an_output_that_cannot_be_is_told_before_the_work(name: str, says: str, tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(InputError, match=says):
        fuser.optimize(net_proto(), tmp_path / name, progress=stages.append)
    with pytest.raises(InputError, match=says):
        fuser.export(net(), (X,), tmp_path / name, progress=stages.append)
    assert not stages and not list(tmp_path.iterdir())


def test_passes_to_run_and_to_skip() -> None:
    with pytest.raises(InputError, match="the pass 'fold-pad' is both to run and to skip"):
        fuser.explain(net_proto(), passes=["fold-pad"], skip=["fold-pad"])


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
