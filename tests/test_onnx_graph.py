"""The ONNX graph without any pass: what it reads, and what its verbs leave behind."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_models import batch_norm, body, conv, conv_constants, model, node, op_types

import fuser
from fuser import ops
from fuser.errors import InputError
from fuser.files import ModelFile
from fuser.graphs.onnx.graph import OnnxGraph
from fuser.remarks import Missed


def graph_of(proto: onnx.ModelProto, **options: bool) -> OnnxGraph:
    return OnnxGraph(ModelFile.from_proto(proto), **options)


def written(graph: OnnxGraph) -> onnx.ModelProto:
    graph.commit()
    proto = graph.to_model().to_proto()
    onnx.checker.check_model(proto)
    return proto


def the(graph: OnnxGraph, kind: type[ops.Op]) -> ops.Op:
    (op,) = graph.ops(kind)
    return op


# -- nothing touched, nothing changed


def test_a_graph_that_is_only_read_leaves_the_same_bytes() -> None:
    proto = model([conv(), batch_norm()], constants=conv_constants())
    before = proto.SerializeToString(deterministic=True)
    graph = graph_of(proto)
    list(graph.ops(ops.Op))
    graph.summary()
    graph.commit()
    assert graph.to_model().to_proto().SerializeToString(deterministic=True) == before
    assert proto.SerializeToString(deterministic=True) == before


def test_what_an_edit_does_not_touch_keeps_its_bytes_and_metadata() -> None:
    proto = model([conv(), batch_norm("c", "b"), node("Relu", ["b"])], constants=conv_constants(), ir_version=10)
    proto.metadata_props.add(key="owner", value="me")
    proto.graph.doc_string = "a graph"
    proto.graph.input[0].type.denotation = "IMAGE"
    proto.graph.node[2].metadata_props.add(key="namespace", value="head")
    proto.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["N", 4, 6, 6]))
    graph = graph_of(proto)
    bn = the(graph, ops.BatchNorm)
    graph.replace(bn, by=bn.input)
    after = written(graph)
    assert after.graph.node[1].SerializeToString() == proto.graph.node[2].SerializeToString()
    assert [p.key for p in after.metadata_props] == ["owner"]
    assert after.graph.doc_string == "a graph"
    assert after.graph.input[0] == proto.graph.input[0]
    assert [v.name for v in after.graph.value_info] == ["b"]
    assert after.graph.node[0].metadata_props[0].value == "bn_b"
    assert [t.name for t in after.graph.initializer] == ["w"]


@pytest.mark.parametrize("ir_version", [8, 10])
def test_a_folded_node_keeps_its_name_and_records_where_it_came_from(ir_version: int) -> None:
    graph = graph_of(model([conv(), batch_norm()], constants=conv_constants(), ir_version=ir_version))
    bn = the(graph, ops.BatchNorm)
    graph.replace(bn, by=bn.input)
    (only,) = written(graph).graph.node
    assert only.name == "conv_c"
    assert "bn_y" in (only.metadata_props[0].value if ir_version >= 10 else only.doc_string)


# -- constants


def test_set_constants_makes_new_tensors_for_this_call_site_only() -> None:
    constants = conv_constants()
    proto = model([conv("x", "c"), conv("c", "y")], constants={"w": constants["w"]})
    graph = graph_of(proto)
    first, _ = graph.ops(ops.Conv)
    graph.set_constants(first, weight=constants["w"] * 2, bias=np.ones(4, np.float32))
    after = written(graph)
    assert list(after.graph.node[0].input) == ["x", "w_folded", "conv_c.bias_folded"]
    assert list(after.graph.node[1].input) == ["c", "w"]
    tensors = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    np.testing.assert_array_equal(tensors["w"], constants["w"])
    np.testing.assert_array_equal(tensors["w_folded"], constants["w"] * 2)
    np.testing.assert_array_equal(numpy_helper.to_array(proto.graph.initializer[0]), constants["w"])


def test_a_new_name_never_collides() -> None:
    constants = conv_constants()
    proto = model([conv(), node("Mul", ["c", "w_folded"])], constants={"w": constants["w"], "w_folded": np.float32(3)})
    graph = graph_of(proto)
    graph.set_constants(the(graph, ops.Conv), weight=constants["w"])
    after = written(graph)
    assert after.graph.node[0].input[1] == "w_folded_2"


def test_an_orphaned_weight_is_dropped_and_a_shared_one_stays() -> None:
    constants = conv_constants()
    graph = graph_of(model([conv("x", "c"), conv("c", "y")], constants={"w": constants["w"]}))
    for op in list(graph.ops(ops.Conv)):
        graph.set_constants(op, weight=constants["w"])
    assert [t.name for t in written(graph).graph.initializer] == ["w_folded", "w_folded_2"]


def test_gemm_is_left_with_alpha_and_beta_one() -> None:
    constants = {"w": np.ones((4, 3), np.float32)}
    proto = model([node("Gemm", ["x", "w"], alpha=2.0, beta=0.5, transB=0)], x=("N", 4), constants=constants)
    graph = graph_of(proto)
    op = the(graph, ops.Linear)
    assert (op.alpha, op.beta, op.out_axis) == (2.0, 0.5, 1)
    graph.set_constants(op, weight=constants["w"] * 2, bias=np.ones(3, np.float32))
    (gemm,) = written(graph).graph.node
    assert {a.name for a in gemm.attribute} == {"transB"}
    assert len(gemm.input) == 3


def test_a_matmul_without_bias_gets_an_add_and_reads_as_one_linear() -> None:
    proto = model([node("MatMul", ["x", "w"])], x=("N", 4), constants={"w": np.ones((4, 3), np.float32)})
    graph = graph_of(proto)
    graph.set_constants(the(graph, ops.Linear), bias=np.arange(3, dtype=np.float32))
    graph.commit()
    op = the(graph, ops.Linear)
    np.testing.assert_array_equal(graph.constant(op.bias), [0, 1, 2])
    assert not list(graph.ops(ops.Elementwise))
    after = written(graph)
    assert op_types(after.graph) == ["MatMul", "Add"]
    assert after.graph.node[1].output[0] == "y"


@pytest.mark.parametrize("order", [("m", "b"), ("b", "m")])
def test_matmul_and_add_in_either_order_are_one_linear(order: tuple[str, str]) -> None:
    constants = {"w": np.ones((4, 3), np.float32), "b": np.arange(3, dtype=np.float32)}
    graph = graph_of(model([node("MatMul", ["x", "w"], ["m"]), node("Add", order)], x=("N", 4), constants=constants))
    op = the(graph, ops.Linear)
    assert graph.op_producing(op.output).node is op.node
    np.testing.assert_array_equal(graph.constant(op.bias), [0, 1, 2])


KNOWN = {
    "constant-node": [helper.make_node("Constant", [], ["b"], value_floats=[1.0, 2.0, 3.0, 4.0])],
    "constant-tensor": [
        helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32)))
    ],
    "identity": [node("Identity", ["given"], ["b"])],
    "arithmetic": [node("Add", ["given", "zero"], ["z"]), node("Sqrt", ["z"], ["q"]), node("Mul", ["q", "q"], ["b"])],
    "expand-cast-like": [
        node("CastLike", ["given64", "x"], ["l"]),
        node("Shape", ["given"], ["s"]),
        node("Expand", ["l", "s"], ["b"]),
    ],
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_bias_that_follows_from_constants_is_constant(case: str) -> None:
    given = np.array([1, 2, 3, 4], np.float32)
    constants = {
        "w": conv_constants()["w"],
        "given": given,
        "given64": given.astype(np.float64),
        "zero": np.float32(0),
    }
    graph = graph_of(model([*KNOWN[case], conv("x", "y", "w", "b")], constants=constants))
    np.testing.assert_allclose(graph.constant(the(graph, ops.Conv).bias), given, rtol=1e-6)


def test_constant_of_shape_has_no_size_limit_but_memory() -> None:
    nodes = [node("ConstantOfShape", ["s"], ["b"]), conv("x", "y", "w", "b")]
    constants = {"w": conv_constants()["w"], "s": np.array([2**40], np.int64)}
    graph = graph_of(model(nodes, constants=constants))
    refusal = graph.constant(the(graph, ops.Conv).bias)
    assert isinstance(refusal, Missed)
    assert refusal.code == "not-constant"


def test_an_initializer_that_is_an_input_is_overridable_unless_frozen_or_of_ir_3() -> None:
    def weight(ir_version: int, **options: bool) -> object:
        constants = conv_constants()
        proto = model(
            [conv("x", "y")], constants={"w": constants["w"]}, also_inputs=["w"], ir_version=ir_version, opset=8
        )
        graph = graph_of(proto, **options)
        found = graph.constant(the(graph, ops.Conv).weight)
        return found.code if isinstance(found, Missed) else "known"

    assert weight(8) == "overridable"
    assert weight(8, freeze_inputs=True) == "known"
    assert weight(3) == "known"


def test_freezing_drops_the_inputs_and_keeps_the_weights() -> None:
    proto = model([conv("x", "y")], constants={"w": conv_constants()["w"]}, also_inputs=["w"])
    graph = graph_of(proto, freeze_inputs=True)
    assert graph.removable_inputs == ["w"]
    after = written(graph)
    assert [i.name for i in after.graph.input] == ["x"]
    assert [t.name for t in after.graph.initializer] == ["w"]


def test_in_ir_3_every_new_initializer_is_listed_as_an_input() -> None:
    constants = conv_constants()
    proto = model([conv("x", "y")], constants={"w": constants["w"]}, also_inputs=["w"], ir_version=3, opset=8)
    graph = graph_of(proto)
    graph.set_constants(the(graph, ops.Conv), weight=constants["w"] * 2)
    after = written(graph)
    assert [i.name for i in after.graph.input] == ["x", "w_folded"]


def test_what_comes_out_of_a_dequantizer_is_quantized() -> None:
    constants = {"q": np.ones((4, 4, 3, 3), np.int8), "s": np.full(4, 0.1, np.float32), "z": np.zeros(4, np.int8)}
    nodes = [node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0), node("Identity", ["d"], ["w"]), conv("x", "y")]
    graph = graph_of(model(nodes, constants=constants))
    refusal = graph.constant(the(graph, ops.Conv).weight)
    assert isinstance(refusal, Missed)
    assert refusal.code == "quantized"
    (dequantize,) = graph.ops(ops.Dequantize)
    assert dequantize.axis == 0


# -- names and signatures


def test_a_graph_output_keeps_its_name() -> None:
    graph = graph_of(model([conv(), batch_norm()], constants=conv_constants()))
    bn = the(graph, ops.BatchNorm)
    assert graph.can_vanish(bn, bn.input)
    graph.replace(bn, by=bn.input)
    after = written(graph)
    assert op_types(after.graph) == ["Conv"]
    assert list(after.graph.node[0].output) == ["y"]


def test_where_both_names_are_in_the_signature_an_identity_stays() -> None:
    graph = graph_of(model([conv(), batch_norm()], outputs=("c", "y"), constants=conv_constants()))
    bn = the(graph, ops.BatchNorm)
    assert not graph.can_vanish(bn, bn.input)
    assert [reader.name for reader in graph.readers(bn.input)] == ["bn_y", "graph output 'c'"]
    graph.replace(bn, by=bn.input)
    after = written(graph)
    assert op_types(after.graph) == ["Conv", "Identity"]
    assert [o.name for o in after.graph.output] == ["c", "y"]
    assert [t.name for t in after.graph.initializer] == ["w"]


def test_other_readers_are_rewired() -> None:
    nodes = [node("Relu", ["x"], ["r"]), node("Identity", ["r"], ["i"]), node("Add", ["i", "i"], ["a"])]
    graph = graph_of(model([*nodes, node("Mul", ["a", "r"])]))
    identity = the(graph, ops.Identity)
    graph.replace(identity, by=identity.input)
    after = written(graph)
    assert [list(n.input) for n in after.graph.node] == [["x"], ["r", "r"], ["a", "r"]]


def test_one_reader_is_listed_once_for_each_use() -> None:
    graph = graph_of(model([node("Relu", ["x"], ["r"]), node("Add", ["r", "r"])]))
    (add,) = graph.ops(ops.Elementwise)
    assert [reader.name for reader in graph.readers(add.left)] == ["add_y", "add_y"]


# -- bodies and functions


def branch_model(inner: list[onnx.NodeProto], outer: list[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    then = body(inner, [inner[-1].output[0]])
    other = body([node("Neg", ["x"], ["n"])], ["n"])
    choose = helper.make_node("If", ["flag"], ["y"], name="choose", then_branch=then, else_branch=other)
    return model([*outer, choose], constants={"flag": np.array(True), **constants})


def test_ops_inside_a_body_are_found_with_weights_captured_from_outside() -> None:
    proto = branch_model([conv("x", "c"), batch_norm("c", "t")], [], **conv_constants())
    graph = graph_of(proto)
    bn = the(graph, ops.BatchNorm)
    assert graph.describe(bn) == "choose/then_branch/bn_t"
    op = graph.op_producing(bn.input)
    graph.set_constants(op, weight=graph.constant(op.weight) * 2)
    graph.replace(bn, by=bn.input)
    after = written(graph)
    then = next(a.g for a in after.graph.node[0].attribute if a.name == "then_branch")
    assert op_types(then) == ["Conv"]
    assert [t.name for t in then.initializer] == ["w_folded"]
    assert [o.name for o in then.output] == ["t"] == list(then.node[0].output)
    assert [t.name for t in after.graph.initializer] == ["flag"]


def test_a_capture_by_a_body_is_a_reader_without_a_meaning() -> None:
    proto = branch_model([batch_norm("c", "t")], [conv("x", "c")], **conv_constants())
    graph = graph_of(proto)
    (reader,) = graph.readers(the(graph, ops.BatchNorm).input)
    assert reader.name == "choose/then_branch/bn_t"
    assert reader.op is None


def test_a_body_that_defines_an_outer_name_again_is_left_alone() -> None:
    proto = branch_model([conv("x", "c"), batch_norm("c", "t")], [node("Relu", ["x"], ["c"])], **conv_constants())
    graph = graph_of(proto)
    assert not list(graph.ops(ops.BatchNorm))
    assert "captured inside choose/then_branch" in [r.name for r in graph.readers(graph.wiring.scopes[0].names["w"])]


def function_model() -> onnx.ModelProto:
    inner = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32))),
        helper.make_node("Conv", ["a"], ["c"], name="inner"),
    ]
    inner[1].input.append("w")
    function = helper.make_function("custom", "Block", ["a"], ["c"], inner, [helper.make_opsetid("", 17)])
    return model([helper.make_node("Block", ["x"], ["y"], domain="custom")], functions=[function])


def test_in_a_function_a_new_node_may_need_another_one_before_it() -> None:
    """A product gets a bias, which is a new Add, and then another bias for that."""
    inner = [node("Constant", [], ["w"], value=numpy_helper.from_array(np.ones((4, 4), np.float32)))]
    function = helper.make_function(
        "custom", "Block", ["a"], ["c"], [*inner, node("MatMul", ["a", "w"], ["c"])], [helper.make_opsetid("", 17)]
    )
    block = helper.make_node("Block", ["x"], ["y"], domain="custom")
    graph = graph_of(model([block], functions=[function], x=(2, 4)))
    for number in (1, 2):
        graph.set_constants(the(graph, ops.Linear), bias=np.full(4, number, np.float32))
    graph.commit()
    after = graph.to_model().to_proto()
    onnx.checker.check_model(after, full_check=True)
    kinds = [n.op_type for n in after.functions[0].node]
    assert kinds == ["Constant", "MatMul", "Constant", "Add"]
    (y,) = ReferenceEvaluator(after).run(None, {"x": np.zeros((2, 4), np.float32)})  # type: ignore[misc]
    np.testing.assert_array_equal(y, np.full((2, 4), 2))


def test_in_a_function_a_new_constant_is_a_node() -> None:
    graph = graph_of(function_model())
    op = the(graph, ops.Conv)
    assert graph.describe(op) == "custom:Block/inner"
    graph.set_constants(op, weight=np.full((4, 4, 1, 1), 2, np.float32))
    after = written(graph)
    assert [n.op_type for n in after.functions[0].node] == ["Constant", "Conv"]
    assert not after.graph.initializer
    value = numpy_helper.to_array(after.functions[0].node[0].attribute[0].t)
    np.testing.assert_array_equal(value, np.full((4, 4, 1, 1), 2))


def test_an_attribute_that_the_caller_of_a_function_decides_is_not_read() -> None:
    proto = function_model()
    attribute = proto.functions[0].node[1].attribute.add(name="group", type=onnx.AttributeProto.INT)
    attribute.ref_attr_name = "groups"
    proto.functions[0].attribute.append("groups")
    assert not list(graph_of(proto).ops(ops.Conv))


# -- what is left alone


def test_a_custom_operator_is_left_alone_even_when_nobody_reads_it() -> None:
    mine = helper.make_node("Log", ["x"], ["nobody"], domain="custom")
    graph = graph_of(model([mine, node("Relu", ["x"], ["dead"]), node("Relu", ["x"])]))
    assert [graph.describe(op) for op in graph.ops(ops.Dead)] == ["relu_dead"]


def test_dead_chains_are_found_from_their_end() -> None:
    graph = graph_of(model([node("Relu", ["x"], ["a"]), node("Relu", ["a"], ["b"]), node("Neg", ["x"])]))
    for op in graph.ops(ops.Dead):
        graph.erase(op)
    assert op_types(written(graph).graph) == ["Neg"]


@pytest.mark.parametrize("opset", [6, 5])
def test_before_opset_7_nothing_is_read(opset: int) -> None:
    graph = graph_of(model([conv()], outputs=("c",), constants={"w": conv_constants()["w"]}, opset=opset))
    assert not list(graph.ops(ops.Conv))


# -- readers


def test_batch_norm_is_training_by_attribute_or_by_its_outputs() -> None:
    def training(opset: int, *, outputs: tuple[str, ...] = (), **attributes: object) -> bool:
        proto = model([conv(), batch_norm(outputs=outputs, **attributes)], constants=conv_constants(), opset=opset)
        return the(graph_of(proto), ops.BatchNorm).training

    assert not training(17)
    assert training(17, training_mode=1, outputs=("m", "v"))
    assert training(9, outputs=("m", "v", "sm", "sv"))
    assert not training(9, outputs=("", "", "", ""))


def test_batch_norm_7_with_spatial_0_is_not_per_channel() -> None:
    proto = model([conv(), batch_norm(spatial=0)], constants=conv_constants(), opset=8)
    assert not the(graph_of(proto), ops.BatchNorm).per_channel


@pytest.mark.parametrize(
    ("attributes", "size", "expected"),
    [
        ({}, 8, ((0, 0), (0, 0))),
        ({"pads": [1, 2, 3, 4]}, 8, ((1, 3), (2, 4))),
        ({"auto_pad": "VALID"}, 8, ((0, 0), (0, 0))),
        ({"auto_pad": "SAME_UPPER"}, 8, ((1, 1), (1, 1))),
        ({"auto_pad": "SAME_UPPER", "strides": [1, 2]}, 8, ((1, 1), (0, 1))),
        ({"auto_pad": "SAME_LOWER", "strides": [1, 2]}, 8, ((1, 1), (1, 0))),
        ({"auto_pad": "SAME_UPPER"}, "H", ((1, 1), (1, 1))),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 1]}, "H", None),
        ({"auto_pad": "SAME_UPPER", "dilations": [2, 2]}, 8, None),
    ],
)
def test_padding(attributes: dict[str, object], size: int | str, expected: object) -> None:
    nodes = [conv("x", "y", **attributes)]
    graph = graph_of(model(nodes, x=("N", 4, size, 8), constants={"w": conv_constants()["w"]}))
    assert the(graph, ops.Conv).padding == expected


@pytest.mark.parametrize(
    ("opset", "inputs", "attributes", "reads"),
    [
        (11, ["x"], {"ratio": 0.5}, True),
        (13, ["x"], {}, True),
        (13, ["x", "", "on"], {}, False),
        (13, ["x", "", "off"], {}, True),
    ],
)
def test_dropout_is_an_identity_unless_training(
    opset: int, inputs: list[str], attributes: dict[str, object], reads: bool
) -> None:
    constants = {"on": np.array(True), "off": np.array(False)}
    graph = graph_of(model([node("Dropout", inputs, **attributes)], constants=constants, opset=opset))
    assert bool(list(graph.ops(ops.Identity))) is reads


def test_a_dropout_whose_mask_is_read_is_not_an_identity() -> None:
    nodes = [node("Dropout", ["x"], ["d", "mask"]), node("Where", ["mask", "d", "d"])]
    assert not list(graph_of(model(nodes)).ops(ops.Identity))


def test_a_cast_to_the_type_it_has_is_an_identity() -> None:
    def identities(to: int) -> int:
        return len(list(graph_of(model([node("Cast", ["x"], to=to)])).ops(ops.Identity)))

    assert identities(TensorProto.FLOAT) == 1
    assert identities(TensorProto.DOUBLE) == 0


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
def test_reductions(op: str, kept: int, opset: int) -> None:
    constants = {"axes": np.array([-1, 1])}
    if opset < 18:
        proto = model([node(op, ["x"], axes=[-1, 1], keepdims=kept)], opset=opset)
    else:
        proto = model([node(op, ["x", "axes"], keepdims=kept)], constants=constants, opset=opset)
    (found,) = graph_of(proto).ops(ops.Reduction)
    assert (found.function, found.axes, found.keeps_axes) == (op[6:].lower(), {1, 3}, bool(kept))


def test_where_the_axes_of_a_reduction_are() -> None:
    def reduction(*axes: int, kept: bool = False) -> ops.Reduction:
        return ops.Reduction(None, None, None, "max", frozenset(axes), kept)

    for axes in ((2, 3), (1, 2), (0,), (0, 3), (1, 3)):
        gone = np.empty((2, 3, 4, 5)).max(axis=axes).shape
        sizes = dict(enumerate((2, 3, 4, 5)))
        op = reduction(*axes)
        assert [sizes[op.axis_before(axis)] for axis in range(len(gone))] == list(gone)
        for axis, size in sizes.items():
            behind = op.axis_behind(axis)
            assert (behind is None) is (axis in axes) and (behind is None or gone[behind] == size)
            assert reduction(*axes, kept=True).axis_behind(axis) == (None if axis in axes else axis)
            assert reduction(*axes, kept=True).axis_before(axis) == (None if axis in axes else axis)
    assert reduction(1).axis_behind(-1) is None  # how far the last one is from the first is not known


# -- models that are no graphs


def test_a_cycle_is_one_clear_line() -> None:
    proto = model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"])])
    with pytest.raises(InputError, match="depend on each other in a circle"):
        graph_of(proto)


def test_a_value_produced_twice_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="the value 'y' is made twice"):
        graph_of(model([node("Relu", ["x"]), node("Neg", ["x"])]))


@pytest.mark.parametrize("name", ["x", "k"], ids=["input", "initializer"])
def test_a_node_that_makes_what_is_given_is_one_clear_line(name: str) -> None:
    proto = model([node("Neg", ["x"], ["y"])], constants={"k": np.ones(4, np.float32)})
    proto.graph.node.append(node("Relu", ["y"], [name]))
    with pytest.raises(InputError, match=f"the value '{name}' is made twice"):
        graph_of(proto)


def test_nodes_out_of_order_are_read_in_order_and_written_where_they_were() -> None:
    proto = model([node("Relu", ["a"]), node("Identity", ["x"], ["a"])])
    graph = graph_of(proto)
    assert [n.op for n in graph.wiring.order] == ["Identity", "Relu"]
    assert graph.to_model().to_proto() == proto


def test_summary_counts_nodes_parameters_and_bytes() -> None:
    graph = graph_of(model([conv(), batch_norm()], constants=conv_constants()))
    summary = graph.summary()
    assert summary.ops == {"Conv": 1, "BatchNormalization": 1}
    assert summary.parameters == 4 * 4 * 9 + 16
    assert summary.bytes == 4 * summary.parameters


# -- found by the fuzzers


@pytest.mark.parametrize("name", [b"result", b"relu_"], ids=["value", "node"])
def test_a_name_that_is_not_utf_8_is_refused_in_one_line(name: bytes) -> None:
    proto = model([node("Relu", ["x"], ["result"])], outputs=["result"])
    broken = proto.SerializeToString().replace(name, name[:2] + b"\xf4" + name[3:])
    with pytest.raises(InputError, match="not UTF-8"):
        graph_of(onnx.ModelProto.FromString(broken))


def test_the_rank_of_a_reshape_to_a_computed_shape_is_known_before_that_is_folded() -> None:
    """Else a second run, which reads the shape as a constant, would apply more than the first."""
    proto = model(
        [
            node("Add", ["half", "half"], ["target"]),
            node("Reshape", ["x", "target"], ["flat"]),
            node("Gemm", ["flat", "w", "b"]),
        ],
        x=(2, 4),
        constants={
            "half": np.array([1, 2]),
            "w": np.ones((4, 3), np.float32),
            "b": np.ones(3, np.float32),
        },
    )
    graph = graph_of(proto)
    linear = the(graph, ops.Linear)
    assert isinstance(linear, ops.Linear)
    assert graph.shape(linear.input) == (2, 4)
    assert (graph.rank(linear.input), graph.rank(linear.output)) == (2, 2)


def computed_reshape() -> onnx.ModelProto:
    """Behind the first Reshape, whose target inference does not compute, another target is made of a Shape."""
    nodes = [
        node("Add", ["half", "half"], ["target"]),
        node("Reshape", ["x", "target"], ["r"]),
        node("Relu", ["r"], ["q"]),
        node("Shape", ["q"], ["s"]),
        node("Gather", ["s", "order"], ["t"]),
        node("Reshape", ["q", "t"]),
    ]
    constants = {"half": np.array([2, 4, 2]), "order": np.array([2, 0, 1])}
    return model(nodes, x=(4, 4, 8), constants=constants)


def test_what_is_computed_tells_inference_more() -> None:
    graph = graph_of(computed_reshape())
    (first, second) = graph.ops(ops.Reshape)
    assert graph.shape(first.output) == (4, 8, 4)
    assert graph.shape(second.output) == (4, 4, 8)
    assert {graph.describe(op) for op in graph.ops(ops.Constant)} == {"add_target", "gather_t", "shape_s"}


def test_the_shape_of_a_computed_operand_tells_inference_more() -> None:
    nodes = [
        node("Sub", ["one", "one"], ["zero"]),
        node("Unsqueeze", ["v", "zero"], ["u"]),
        node("Mul", ["x", "u"], ["m"]),
        node("Relu", ["m"]),
    ]
    graph = graph_of(model(nodes, constants={"one": np.array([1]), "v": np.full((4, 1, 1), 2, np.float32)}))
    assert graph.shape(the(graph, ops.Elementwise).output) == ("N", 4, 8, 8)


@pytest.mark.parametrize(
    ("target", "made"),
    [(["n", "rest"], ("N", 32)), (["four", "rest", "n"], (4, 8, "N")), (["n", "n", "rest"], ("N", "N", None))],
)
def test_sizes_that_have_names_cancel_out_of_a_reshape(target: list[str], made: tuple[object, ...]) -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "first"], ["n"]),
        node("Concat", target, ["t"], axis=0),
        node("Reshape", ["x", "t"], ["r"]),
        node("Relu", ["r"], ["q"]),
        node("Neg", ["q"]),
    ]
    constants = {"first": np.array([0]), "rest": np.array([-1]), "four": np.array([4])}
    graph = graph_of(model(nodes, x=("N", 4, 8), constants=constants))
    (op,) = graph.ops(ops.Reshape)
    found, behind = graph.shape(op.output), graph.shape(graph.readers(op.output)[0].op.output)
    for shape in (found, behind):
        assert shape is not None and len(shape) == len(made)
        assert all(size == wanted or wanted is None for size, wanted in zip(shape, made, strict=True))
        assert all(not isinstance(size, int) for size, wanted in zip(shape, made, strict=True) if wanted is None)


def test_what_a_body_reads_of_a_later_node_is_that_nodes() -> None:
    """The runtime takes nodes in any order; at two depths here."""
    inner = body([node("Relu", ["late"], ["r"])], ["r"])
    outer = body([node("If", ["c"], ["p"], then_branch=inner, else_branch=inner), node("Neg", ["g"], ["late"])], ["p"])
    nodes = [
        node("Gemm", ["f", "w"], ["g"]),
        node("If", ["c"], then_branch=outer, else_branch=body([node("Abs", ["h"], ["a"])], ["a"])),
        node("Flatten", ["x"], ["f"]),
        node("Exp", ["g"], ["h"]),
    ]
    proto = model(nodes, x=(2, 4, 8), constants={"w": np.ones((32, 3), np.float32), "c": np.array(True)})
    proto.graph.output[0].type.tensor_type.shape.Clear()
    before = proto.SerializeToString(deterministic=True)
    graph = graph_of(proto)
    assert proto.SerializeToString(deterministic=True) == before
    assert [n.op for n in graph.wiring.scopes[0].nodes] == ["Gemm", "If", "Flatten", "Exp"]
    made_by = {n.op: {t.producer.op for t in n.inputs if t.producer} for n in graph.wiring.order}
    assert made_by["Relu"] == {"Neg"} and made_by["Neg"] == {"Gemm"} and made_by["Abs"] == {"Exp"}
    (exp,) = (n for n in graph.wiring.order if n.op == "Exp")
    assert graph.shape(exp.outputs[0]) == (2, 3)
    result = fuser.optimize(proto, verify=False)
    assert op_types(result.model.graph) == ["Gemm", "If", "Flatten", "Exp"]


@pytest.mark.parametrize(
    ("nodes", "rank"),
    [
        (["MatMul w"], 2),
        (["MatMul w", "Relu"], 2),
        (["Add w"], 2),
        (["Add cube"], 3),
        (["Add row"], 2),
        (["Sub row", "MatMul w", "Mul cube", "Softmax"], 3),
        (["MatMul cube"], None),
        (["Add unknown"], None),
        (["Pow row"], None),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_rank_is_known_where_inference_knows_no_shape(nodes: list[str], rank: int | None, turned: bool) -> None:
    built, value = [node("Opaque", ["x"], ["unknown"], domain="custom"), node("Gemm", ["unknown", "w"], ["v0"])], "v0"
    for number, text in enumerate(nodes, 1):
        kind, *operand = text.split()
        operands = [*operand, value] if turned and kind in ("Add", "Sub", "Mul") else [value, *operand]
        built.append(node(kind, operands, [value := f"v{number}"]))
    built.append(node("Identity", [value], ["y"]))
    constants = {"w": np.eye(4, dtype="f"), "cube": np.ones((2, 4, 4), "f"), "row": np.ones(4, "f")}
    graph = OnnxGraph(ModelFile.from_proto(model(built, constants=constants, x=["N", 4])))
    tensor = graph.wiring.scopes[0].names[value]
    graph.known._types = dict.fromkeys(graph.known._inferred(), (0, None))  # as if inference had said nothing
    assert graph.rank(tensor) == rank


def test_of_an_operator_that_gets_wider_the_rank_stays_known() -> None:
    """Else the next pass could not tell on how many axes it works."""
    constants = {"w": np.ones((4, 3), np.float32), "b": np.ones(3, np.float32)}
    proto = model([node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"])], x=("N", 4), constants=constants)
    graph = graph_of(proto)
    linear = the(graph, ops.Linear)
    graph.set_constants(linear, weight=np.ones((4, 5), np.float32), bias=np.ones(5, np.float32))
    assert [graph.shape(value) for value in (linear.node.outputs[0], linear.output)] == [("N", 5)] * 2


def test_what_is_known_of_a_name_stays_known_of_what_takes_its_place() -> None:
    """The type of what a custom operator makes is stated of a copy of it alone."""
    nodes = [
        node("Custom", ["x"], ["u"], domain="custom"),
        node("Identity", ["u"], ["i"]),
        node("CastLike", ["k", "i"], ["c"]),
        node("Mul", ["i", "c"]),
    ]
    proto = model(nodes, constants={"k": np.array(2.0)})
    proto.graph.value_info.append(helper.make_tensor_value_info("i", TensorProto.FLOAT, None))
    result = fuser.optimize(proto, passes=["eliminate-identity", "fold-constants"], verify=False)
    assert not result.report.warnings
    assert op_types(result.model.graph) == ["Custom", "Mul"]


def test_a_constant_that_only_what_goes_reads_is_freed() -> None:
    """A weight that is read for its shape, too, as by the reshape at the end of weight standardization."""
    nodes = [
        node("Neg", ["w"], ["n"]),
        node("Shape", ["w"], ["s"]),
        node("Reshape", ["n", "s"], ["r"]),
        conv("x", "y", "r"),
    ]
    graph = graph_of(model(nodes, constants={"w": np.ones((4, 4, 3, 3), np.float32)}))
    op = next(iter(graph.ops(ops.Constant)))  # behind one that stays small values are found, too
    assert isinstance(op, ops.Constant)
    assert (op.elements_made, op.elements_freed) == (144, 144)


def test_a_constant_that_others_read_is_not_freed() -> None:
    nodes = [node("Neg", ["w"], ["n"]), conv("x", "a", "n"), conv("x", "b", "w"), node("Add", ["a", "b"])]
    op = the(graph_of(model(nodes, constants={"w": np.ones((4, 4, 3, 3), np.float32)})), ops.Constant)
    assert isinstance(op, ops.Constant)
    assert (op.elements_made, op.elements_freed) == (144, 0)


@pytest.mark.parametrize("size", [-1, None])
def test_a_size_that_is_not_stated_has_a_name_of_its_own(size: int | None) -> None:
    proto = model([conv("x", "y")], constants=conv_constants(), x=("N", 4, 8, 8))
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    dims[0].Clear()
    if size is not None:
        dims[0].dim_value = size
    before = proto.SerializeToString(deterministic=True)
    graph = graph_of(proto)
    op = the(graph, ops.Conv)
    assert graph.shape(op.input) == ("axis 0 of x", 4, 8, 8)
    assert graph.shape(op.output) == ("axis 0 of x", 4, 6, 6)
    assert graph.summary().multiply_adds == 4 * 6 * 6 * 4 * 9  # of one sample
    assert graph.to_model().to_proto().SerializeToString(deterministic=True) == before
