"""eliminate-dead-code: what nobody reads goes; what has effects or a name in the signature stays."""

from __future__ import annotations

import numpy as np
import onnx
from fuser.passes.eliminate_dead_code import EliminateDeadCode
from onnx_models import body, model, node, op_types
from rewriting import applied, refused, rewritten

ELIMINATE = EliminateDeadCode()


def test_a_chain_that_nobody_reads() -> None:
    nodes = [node("Neg", ["x"], ["a"]), node("Mul", ["a", "k"], ["b"]), node("Relu", ["x"])]
    result = applied(model(nodes, constants={"k": np.ones(8, np.float32)}), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Relu"]
    assert len(result.graph.initializer) == 0  # what only it read


def test_what_is_read_stays() -> None:
    nodes = [node("Neg", ["x"], ["a"]), node("Add", ["a", "x"])]
    assert refused(model(nodes, outputs=["y", "a"]), ELIMINATE) == {}


def test_a_custom_operator_may_have_effects() -> None:
    log = node("Log", ["x"], ["a"])
    log.domain = "custom"
    assert refused(model([log, node("Relu", ["x"])]), ELIMINATE) == {}


def test_initializers_that_nobody_reads_go_and_inputs_stay() -> None:
    branches = {
        "then_branch": body([node("Mul", ["x", "k"], ["p"])], ["p"]),
        "else_branch": body([node("Neg", ["x"], ["q"])], ["q"]),
    }
    nodes = [node("ReduceMax", ["x"], ["m"], keepdims=0), node("Cast", ["m"], ["c"], to=9)]
    nodes.append(node("If", ["c"], **branches))
    constants = {name: np.ones(8, np.float32) for name in ("k", "unread", "replaceable", "noted")}
    proto = model(nodes, constants=constants, also_inputs=["replaceable"])
    note = proto.graph.quantization_annotation.add(tensor_name="m")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="noted")
    proto.graph.input.append(onnx.helper.make_tensor_value_info("unused", 1, [1]))
    outcome, result = rewritten(proto, ELIMINATE)
    assert [remark.site for remark in outcome.applied] == ["unread"]
    assert [tensor.name for tensor in result.graph.initializer] == ["k", "replaceable", "noted"]
    assert [value.name for value in result.graph.input] == ["x", "replaceable", "unused"]
    assert rewritten(result, ELIMINATE)[0].applied == []


def test_a_sparse_initializer_is_left_alone() -> None:
    proto = model([node("Relu", ["x"])])
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "unread")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64))
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [8]))
    assert refused(proto, ELIMINATE) == {}
