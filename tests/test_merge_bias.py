"""merge-bias: a matrix product and the addition of its bias are one operator, on every host."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from fuser.passes.eliminate_identity import EliminateIdentity
from fuser.passes.fold_constants import FoldConstants
from fuser.passes.merge_bias import MergeBias
from hosts import HOSTS, Onnx
from hosts_torch import Decomposed, Exported, Lifted, Traced
from nets import Net
from onnx_models import body, model, node, op_types
from rewriting import DOUBLE, applied, refused, rewritten
from torch import Tensor, nn

from fuser import pipeline
from fuser.files import ModelFile
from fuser.graphs.onnx.graph import OnnxGraph

MERGE = MergeBias()
RNG = np.random.default_rng(5)


def product(x: tuple[int | str, ...] = (5, 4), bias: tuple[int, ...] = (3,), **options: Any) -> onnx.ModelProto:
    constants = {"w": RNG.standard_normal((4, 3)), "b": RNG.standard_normal(bias)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["b", "p"], ["q"]), node("Relu", ["q"])]
    return model(nodes, x=x, constants=constants, dtype=DOUBLE, **options)


# -- on every host


def matrices(m: Net, x: Tensor) -> Tensor:
    return torch.relu(torch.mm(x, m.w) + m.b) * 2


def batches(m: Net, x: Tensor) -> Tensor:
    return torch.relu(m.b + (x.reshape(3, 2, 4) @ m.w)) * 2


def rows(m: Net, x: Tensor) -> Tensor:
    return torch.relu((x.sin().reshape(3, 2, 4) @ m.w + m.b).reshape(2, 9)) * 2


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@pytest.mark.parametrize("wiring", [matrices, batches, rows])
def test_one_operator(host: Any, wiring: Any) -> None:
    torch.manual_seed(0)
    module, x = Net(wiring), torch.randn(6, 4)
    module.w, module.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    module, x = (module, x) if host is Onnx else (module.double(), x.double())
    truth = module.double()(x.double()).detach().numpy()
    module = module if host is not Onnx else module.float()
    graph = host().build(module, (x,))
    before = sum(graph.summary().ops.values())
    passes = [FoldConstants(), EliminateIdentity(), MERGE]
    outcome = pipeline.run(graph, passes)
    merged = [remark for remark in outcome.applied if remark.pass_name == MERGE.name]
    # The ONNX exporter has written a Gemm for the matrices, and decompositions put a `view` around other products.
    can = wiring is rows if host is Onnx else host is not Decomposed or wiring is matrices
    assert len(merged) == can and outcome.missed == []
    assert sum(graph.summary().ops.values()) <= before - can
    assert not pipeline.run(graph, passes).applied
    after = host().run(host().result(graph), x)
    np.testing.assert_allclose(after, truth, rtol=1e-5 if host is Onnx else 1e-12, atol=1e-6)


# -- ONNX


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 23])
@pytest.mark.parametrize("batch", [5, "N"])
def test_gemm(opset: int, batch: int | str) -> None:
    result = applied(product((batch, 4), opset=opset), MERGE)
    assert op_types(result.graph) == ["Gemm", "Relu"]
    assert result.graph.node[0].output == ["q"]
    assert not rewritten(result, MERGE)[0].applied


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_the_runtime_computes(dtype: type) -> None:
    constants = {"w": RNG.standard_normal((4, 3)).astype(dtype), "b": RNG.standard_normal(3).astype(dtype)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"])]
    element_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    result = rewritten(model(nodes, x=(5, 4), constants=constants, dtype=element_type), MERGE)[1]
    assert op_types(result.graph) == ["Gemm"]
    x = RNG.standard_normal((5, 4)).astype(dtype)
    (y,) = ort.InferenceSession(result.SerializeToString()).run(None, {"x": x})
    truth = x.astype(float) @ constants["w"].astype(float) + constants["b"]
    np.testing.assert_allclose(y, truth, rtol=0, atol=8 * np.finfo(dtype).eps)


def reshaped(
    x: tuple[int | str, ...] = (2, 15, 4), back: tuple[int, ...] = (6, 5, 3), **options: Any
) -> onnx.ModelProto:
    constants = {
        "w": RNG.standard_normal((4, 3)),
        "b": RNG.standard_normal(3),
        "s": np.array([-1, 5, 4]),
        "t": np.array(back),
    }
    nodes = [
        node("Reshape", ["x", "s"], ["f"]),
        node("MatMul", ["f", "w"], ["p"]),
        node("Add", ["p", "b"], ["q"]),
        node("Reshape", ["q", "t"], ["r"]),
        node("Relu", ["r"]),
    ]
    proto = model(nodes, x=x, constants=constants, dtype=DOUBLE, **options)
    shapes = {"f": [None, 5, 4], "q": [None, 5, 3]}
    proto.graph.value_info.extend(onnx.helper.make_tensor_value_info(n, DOUBLE, s) for n, s in shapes.items())
    return proto


@pytest.mark.parametrize("x", [(2, 15, 4), ("N", 15, 4)])
@pytest.mark.parametrize("back", [(2, 45), (-1, 5, 3), (0, 0, 1, 3)])
def test_rows_between_reshapes(x: tuple[int | str, ...], back: tuple[int, ...]) -> None:
    """What is declared of the names in between is no longer true, so the names go."""
    proto = reshaped(x, back)
    result = applied(proto, MERGE)
    assert op_types(result.graph) == ["Reshape", "Gemm", "Reshape", "Relu"]
    assert not {"f", "q"} & {name for n in result.graph.node for name in n.output}
    assert not rewritten(result, MERGE)[0].applied


def test_data_of_more_axes_is_no_candidate() -> None:
    """Reshapes would have to be added, or others read what is between."""
    assert refused(product((2, 5, 4)), MERGE) == {}
    for i in range(2):
        proto = reshaped()
        proto.graph.output.append(proto.graph.value_info.pop(i))
        assert refused(proto, MERGE) == {}


def test_a_bias_that_a_body_reads() -> None:
    nodes = [*product().graph.node][:2]
    branches = {"then_branch": body(nodes, ["q"]), "else_branch": body([node("Neg", ["x"], ["n"])], ["n"])}
    proto = model(
        [node("If", ["yes"], **branches)],
        x=(5, 4),
        constants={"yes": np.array(True), "w": RNG.standard_normal((4, 4)), "b": np.ones(4)},
        dtype=DOUBLE,
    )
    result = applied(proto, MERGE)
    branch = next(a.g for a in result.graph.node[0].attribute if a.name == "then_branch")
    assert op_types(branch) == ["Gemm"] and branch.output[0].name == "q"


def test_a_bias_that_is_made_after_the_product() -> None:
    """It has to be there before the Gemm."""
    constant = onnx.numpy_helper.from_array(RNG.standard_normal(4), "value")
    nodes = [
        node("MatMul", ["a", "w"], ["p"]),
        onnx.helper.make_node("Constant", [], ["b"], value=constant),
        node("Add", ["p", "b"], ["q"]),
    ]
    weight = onnx.numpy_helper.from_array(RNG.standard_normal((4, 4)), "value")
    nodes.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=weight))
    nodes.insert(1, node("Reshape", ["x", "s"], ["a"]))
    proto = model(nodes, x=(5, 4), outputs=["q"], constants={"s": np.array([5, 4])}, dtype=DOUBLE)
    result = applied(proto, MERGE)
    assert "Gemm" in op_types(result.graph)


# -- refused


def test_rank() -> None:
    nodes = [node("Custom", ["x"], ["c"]), *product().graph.node]
    nodes[0].domain, nodes[1].input[0] = "custom", "c"
    proto = product()
    del proto.graph.node[:], proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.node.extend(nodes)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    before = proto.SerializeToString()
    graph = OnnxGraph(ModelFile.from_proto(proto))
    assert [remark.code for remark in pipeline.run(graph, [MERGE]).missed] == ["rank"]
    assert graph.to_model().to_proto().SerializeToString() == before


@pytest.mark.parametrize("bias", [(), (1,)])
def test_broadcasts(bias: tuple[int, ...]) -> None:
    assert refused(product(bias=bias), MERGE) == {"broadcasts": 1}


def test_a_bias_that_makes_the_result_larger() -> None:
    constants = {"w": RNG.standard_normal((4, 1)), "b": RNG.standard_normal(7)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"])]
    assert refused(model(nodes, x=(5, 4), constants=constants, dtype=DOUBLE), MERGE) == {"broadcasts": 1}


def test_type() -> None:
    constants = {"w": np.ones((4, 3), ml_dtypes.bfloat16), "b": np.ones(3, ml_dtypes.bfloat16)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"])]
    proto = model(nodes, x=(5, 4), constants=constants, dtype=onnx.TensorProto.BFLOAT16)
    assert refused(proto, MERGE) == {"type": 1}


def test_integers_are_left_alone() -> None:
    constants = {"w": np.ones((4, 3), np.int64), "b": np.ones(3, np.int64)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"])]
    proto = model(nodes, x=(5, 4), constants=constants, dtype=onnx.TensorProto.INT64)
    assert refused(proto, MERGE) == {"type": 1}


@pytest.mark.parametrize("host", [Traced, Exported, Lifted])
def test_grows(host: Any) -> None:
    """`linear` takes the matrix the other way round."""

    def wiring(m: Net, x: Tensor) -> Tensor:
        return (x @ m.w + m.b) + x.exp() @ m.w

    module, x = Net(wiring), torch.randn(2, 5, 4)
    module.w, module.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    outcome = pipeline.run(host().build(module, (x,)), [MERGE])
    assert [remark.code for remark in (*outcome.applied, *outcome.missed)] == ["grows"]
