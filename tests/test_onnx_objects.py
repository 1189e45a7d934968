"""Models in memory of other libraries: the same kind out as in, with all that it carries."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx_models import batch_norm, conv, conv_constants, model, node
from test_api import X, net

import fuser
from fuser.errors import InputError

ir = pytest.importorskip("onnx_ir")


@pytest.fixture(scope="module")
def program() -> torch.onnx.ONNXProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            net(), (X,), dynamo=True, optimize=False, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    assert exported is not None
    return exported


def net_proto() -> onnx.ModelProto:
    nodes = [conv(), batch_norm("c", "b"), node("Relu", ["b"])]
    proto = model(nodes, constants=conv_constants(), x=("N", 4, 8, 8), doc_string="what it is", producer_name="me")
    proto.metadata_props.add(key="author", value="somebody")
    return proto


def kinds(graph: ir.Graph) -> list[str]:
    return [n.op_type for n in graph]


def test_an_ir_model() -> None:
    given = ir.from_proto(net_proto())
    before = ir.to_proto(given).SerializeToString(deterministic=True)
    result = fuser.optimize(given)
    assert type(result.model) is ir.Model
    assert kinds(result.model.graph) == ["Conv", "Relu"]
    assert result.report.verification.passed
    assert ir.to_proto(given).SerializeToString(deterministic=True) == before
    assert result.model.metadata_props == {"author": "somebody"}
    assert (result.model.doc_string, result.model.producer_name) == ("what it is", "me")
    assert result.model.opset_imports == given.opset_imports
    assert str(result.model.graph.inputs[0].shape) == str(given.graph.inputs[0].shape)


def test_an_ir_model_with_external_data(tmp_path: Path) -> None:
    onnx.save(net_proto(), tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0, location="net.data")
    given = ir.load(tmp_path / "net.onnx")
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in given.graph.initializers.values())
    result = fuser.optimize(given)
    assert kinds(result.model.graph) == ["Conv", "Relu"]
    assert result.report.verification.passed
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in given.graph.initializers.values())


def test_an_onnx_program(program: torch.onnx.ONNXProgram) -> None:
    before = ir.to_proto(program.model).SerializeToString(deterministic=True)
    result = fuser.optimize(program)
    assert type(result.model) is torch.onnx.ONNXProgram
    assert type(result.model.model) is ir.Model
    assert "BatchNormalization" in kinds(program.model.graph)
    assert kinds(result.model.model.graph) == ["Conv", "Relu"]
    assert result.report.verification.passed
    assert ir.to_proto(program.model).SerializeToString(deterministic=True) == before
    x = torch.randn(5, 4, 8, 8)  # the batch is still dynamic
    torch.testing.assert_close(result.model(x)[0], net()(x), rtol=1e-4, atol=1e-5)
    assert result.model.exported_program is program.exported_program


def test_what_torch_notes_on_a_program_is_kept(program: torch.onnx.ONNXProgram) -> None:
    result = fuser.optimize(program).model.model
    assert result.opset_imports == program.model.opset_imports
    assert result.producer_name == program.model.producer_name == "pytorch"
    assert result.metadata_props == program.model.metadata_props
    by_name = {n.name: n for n in program.model.graph}
    assert all(by_name[n.name].metadata_props.items() <= n.metadata_props.items() for n in result.graph)


def test_old_weights_cannot_undo_a_fold(program: torch.onnx.ONNXProgram) -> None:
    optimized = fuser.optimize(program).model
    wanted = optimized(X)[0]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimized.apply_weights(net().state_dict())
    assert any("0.weight" in str(w.message) for w in told)  # it says that there is no such weight any more
    again = torch.onnx.ONNXProgram(optimized.model, None)
    assert torch.equal(again(X)[0], wanted)


def test_a_program_is_saved_and_read_again(program: torch.onnx.ONNXProgram, tmp_path: Path) -> None:
    fuser.optimize(program).model.save(tmp_path / "net.onnx", external_data=True)
    assert fuser.verify(program, tmp_path / "net.onnx").passed


def test_an_output_is_written_too(program: torch.onnx.ONNXProgram, tmp_path: Path) -> None:
    result = fuser.optimize(program, tmp_path / "net.onnx")
    assert result.report.written == [str(tmp_path / "net.onnx")]
    assert fuser.verify(result.model, tmp_path / "net.onnx").passed


def test_every_kind_is_explained_and_compared(program: torch.onnx.ONNXProgram) -> None:
    proto = ir.to_proto(program.model)
    models = [program, program.model, proto, gs.import_onnx(proto)]
    sites = [[remark.site for remark in fuser.explain(model).applied] for model in models]
    assert sites == [sites[0]] * 4
    assert sites[0]
    assert all(fuser.verify(proto, model).passed for model in models)
    assert fuser.verify(net(), program, example_inputs=(X,)).passed
    assert fuser.bisect(program) is None


def test_it_is_measured(program: torch.onnx.ONNXProgram) -> None:
    measured = fuser.benchmark(program, fuser.optimize(program).model, seconds=0.1, arms=["ort-on"])
    assert measured.measured


def test_weights_that_are_not_there_are_one_line() -> None:
    proto = copy.deepcopy(net_proto())
    given = ir.from_proto(proto)
    given.graph.initializers["w"].const_value = None
    with pytest.raises(InputError) as error:
        fuser.optimize(given)
    assert len(str(error.value).splitlines()) == 1
