"""Small models on which a rewrite was once wrong: whatever is done to them now, the function and the shapes stay."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_models
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_models import node
from torch import nn

import fuser
from fuser.errors import InputError
from fuser.graphs.onnx.editor import ABSENT

DOUBLE = onnx.TensorProto.DOUBLE
RNG = np.random.default_rng(41)
Shapes = Mapping[str, Sequence[Any]]


def model(
    nodes: Sequence[onnx.NodeProto],
    x: Sequence[Any],
    y: Sequence[Any],
    constants: Mapping[str, Any],
    declared: Shapes | None = None,
    custom: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """x -> nodes -> y in float64, with what is `declared` of the values between."""

    def infos(shapes: Shapes) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, DOUBLE, shape) for name, shape in shapes.items()]

    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    graph = helper.make_graph(
        list(nodes), "g", infos({"x": x}), infos({"y": y}), tensors, value_info=infos(declared or {})
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(custom))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape)


def check(proto: onnx.ModelProto, *inputs: Any) -> onnx.ModelProto:
    """The optimized model, which is the same function."""
    result: onnx.ModelProto = fuser.optimize(proto, verify=False).model
    onnx.checker.check_model(result, full_check=True)
    for x in inputs:
        before, after = (ReferenceEvaluator(one).run(None, {"x": x})[0] for one in (proto, result))  # type: ignore[index]
        assert before.shape == after.shape
        np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-10 * np.abs(before).max())
    return result


# -- a file that was exported for one batch, whose input was given a name for its size later


def test_a_batch_that_is_no_longer_one() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Shape", ["c"], ["s"]),
        node("Gather", ["s", "zero"], ["d"]),
        node("Concat", ["d", "rest"], ["t"], axis=0),
        node("Reshape", ["c", "t"], ["q"]),
        node("Gemm", ["q", "v"]),
    ]
    constants = {"w": normal(4, 3, 3, 3), "v": normal(144, 5), "zero": np.array([0]), "rest": np.array([-1])}
    for declared in ({"c": [1, 4, 6, 6]}, {"c": [1, 4, 6, 6], "q": [1, 144]}, {}):
        proto = model(nodes, ["N", 3, 8, 8], ["N", 5], constants, declared)
        before = proto.SerializeToString(deterministic=True)
        check(proto, normal(1, 3, 8, 8), normal(2, 3, 8, 8))
        assert proto.SerializeToString(deterministic=True) == before
        assert fuser.optimize(proto).report.verification.passed
    nameless = model(nodes, [None, 3, 8, 8], [None, 5], constants, {"c": [1, 4, 6, 6]})
    check(nameless, normal(2, 3, 8, 8))


def test_an_automatic_padding_of_another_size() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Conv", ["a", "w"], ["b"], auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Conv", ["a", "v"], ["c"], strides=[2, 2]),
        node("Add", ["b", "c"]),
    ]
    constants = {"w": normal(4, 3, 3, 3), "v": normal(4, 3, 1, 1)}
    proto = model(nodes, [1, 3, "h", "w_"], [1, 4, "i", "j"], constants, {"a": [1, 3, 7, 7]})
    check(proto, normal(1, 3, 8, 8), normal(1, 3, 7, 7))


def test_a_reshape_to_a_batch_of_one() -> None:
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Flatten", ["r"], ["a"]),
        node("Unsqueeze", ["a", "one"], ["b"]),
        node("Mul", ["b", "k"]),
    ]
    constants = {"one": np.array([1]), "k": normal(12)}
    check(model(nodes, ["N", 3, 4], ["N", 1, 12], constants, {"a": [1, 12], "b": [1, 1, 12]}), normal(2, 3, 4))


def test_what_only_the_file_knows_is_believed() -> None:
    """A custom operator's result has the shape that is declared, as long as that contradicts nothing."""
    nodes = [
        helper.make_node("Twice", ["x"], ["t"], domain="my"),
        node("Reshape", ["t", "s"], ["r"]),
        node("Relu", ["r"]),
    ]
    proto = model(nodes, [2, 3], [2, 3], {"s": np.array([2, 3])}, {"t": [2, 3]}, [_function("Twice", ["a"])])
    del proto.functions[:]  # nobody can look inside
    assert [one.op_type for one in fuser.optimize(proto, verify=False).model.graph.node] == ["Twice", "Relu"]


# -- operators of other domains that are called like standard ones


def _function(name: str, inputs: list[str]) -> onnx.FunctionProto:
    """a + 2 b, or 2 a."""
    nodes = [node("Add", [inputs[-1], inputs[-1]], ["d"]), node("Add", [inputs[0], "d"], ["o"])]
    if len(inputs) == 1:
        nodes = [node("Add", [inputs[0], inputs[0]], ["o"])]
    return helper.make_function("my", name, inputs, ["o"], nodes, [helper.make_opsetid("", 18)])


def test_an_add_that_is_none() -> None:
    add = helper.make_node("Add", ["a", "k"], ["y"], domain="my")
    custom = [_function("Add", ["a", "b"])]
    in_front = [node("Add", ["x", "t"], ["z"]), node("MatMul", ["z", "w"], ["a"]), add]
    check(
        model(in_front, [2, 3, 4], [2, 3, 5], {"w": normal(4, 5), "k": normal(5), "t": normal(4)}, None, custom),
        normal(2, 3, 4),
    )
    twice = [node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["z", "v"], ["a"]), add]
    check(
        model(twice, [2, 3, 4], [2, 3, 5], {"w": normal(4, 4), "v": normal(4, 5), "k": normal(5)}, None, custom),
        normal(2, 3, 4),
    )
    alone = [node("MatMul", ["x", "w"], ["a"]), add]
    check(model(alone, [3, 4], [3, 5], {"w": normal(4, 5), "k": normal(5)}, None, custom), normal(3, 4))


@pytest.mark.parametrize("name", ["Gemm", "Conv", "ConvTranspose"])
def test_an_operator_that_has_another_rank(name: str) -> None:
    nodes = [
        helper.make_node(name, ["x", "u"], ["a"], domain="my"),
        node("Conv", ["a", "v"], ["c"]),
        node("Mul", ["a", "k"], ["b"]),
        node("Add", ["b", "c"]),
    ]
    constants = {"u": normal(5, 5), "v": normal(5, 5, 1, 1), "k": normal(5)}  # k lies along the width
    check(model(nodes, [2, 5, 5, 5], [2, 5, 5, 5], constants, None, [_function(name, ["a", "b"])]), normal(2, 5, 5, 5))


def test_a_constant_that_is_none() -> None:
    nodes = [
        helper.make_node("Constant", ["x"], ["a"], domain="my"),
        helper.make_node("Constant", ["x"], ["b"], domain="my"),
        node("Add", ["a", "b"]),
    ]
    check(model(nodes, [2, 3], [2, 3], {}, None, [_function("Constant", ["a"])]), normal(2, 3))


# -- the lowest number is a number


LOWEST = float(np.finfo(np.float64).min)
AROUND = np.array([0, 0, 1, 1, 0, 0, 1, 1])


def test_half_of_the_lowest_number_is_another() -> None:
    behind = [node("Conv", ["x", "w"], ["a"]), node("Pad", ["a", "p", "low"], ["b"]), node("Mul", ["b", "half"])]
    constants = {"w": normal(4, 4, 3, 3), "half": np.array(0.5), "p": AROUND, "low": np.array(LOWEST)}
    check(model(behind, [2, 4, 6, 6], [2, 4, 6, 6], constants), normal(2, 4, 6, 6))
    before = [node("Mul", ["x", "half"], ["a"]), node("Pad", ["a", "p", "low"], ["b"]), node("MaxPool", ["b"], ["c"])]
    before[-1].attribute.append(helper.make_attribute("kernel_shape", [1, 1]))
    check(model([*before, node("Conv", ["c", "w"])], [2, 4, 6, 6], [2, 4, 6, 6], constants), normal(2, 4, 6, 6))


def test_nothing_of_an_unsigned_type_is_below_zero() -> None:
    nodes = [node("Pad", ["x", "p"], ["a"]), node("MaxPool", ["a"], kernel_shape=[3, 3])]
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [1, 2, 6, 6]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], [numpy_helper.from_array(AROUND, "p")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert [one.op_type for one in fuser.optimize(proto).model.graph.node] == ["MaxPool"]


@pytest.mark.parametrize("traced", [False, True])
def test_half_of_the_lowest_number_on_torch(traced: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = torch.finfo(torch.float64).min
            return nn.functional.pad(self.conv(x), (1, 1, 1, 1), value=low) * 0.5

    module, x = Padded().double().eval(), torch.randn(2, 4, 6, 6).double()
    result = fuser.optimize(module, example_inputs=None if traced else (x,), verify=False).model
    torch.testing.assert_close(result(x), module(x), rtol=1e-12, atol=0)


# -- a constant with one axis makes one of a scalar


SCALARS = {
    "squeezed": (
        [node("Gemm", ["x", "w"], ["c"]), node("Squeeze", ["c"], ["p"]), node("Add", ["p", "k"])],
        [1, 3],
        [1],
    ),
    "added": ([node("Add", ["x", "k"], ["s"]), node("MatMul", ["s", "v"])], [], [4]),
    "multiplied": ([node("Mul", ["x", "k"], ["s"]), node("MatMul", ["s", "v"])], [], [4]),
    "reduced": (
        [
            node("Gemm", ["x", "w"], ["c"]),
            node("ReduceMean", ["c", "axes"], ["p"], keepdims=0),
            node("Mul", ["p", "k"]),
        ],
        [1, 3],
        [1],
    ),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_that_get_an_axis(name: str) -> None:
    nodes, x, y = SCALARS[name]
    constants = {"w": normal(3, 1), "v": normal(1, 4), "k": np.array([2.0]), "axes": np.array([0, 1])}
    proto = model(nodes, x, y, constants)
    check(proto, np.asarray(normal(*x)))
    assert fuser.optimize(proto).report.verification is None or fuser.optimize(proto).report.verification.passed


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_scalars_that_get_an_axis_on_torch(traced: bool, first: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 3) if first else nn.Linear(3, 1)
            self.register_buffer("k", torch.tensor([2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x * self.k) if first else self.linear(x).squeeze() * self.k
            return y

    module, x = Scaled().eval(), torch.tensor(3.0) if first else torch.randn(1, 3)
    result = fuser.optimize(module, example_inputs=None if traced else (x,), verify=False).model
    torch.testing.assert_close(result(x), module(x))


@pytest.mark.parametrize("k", [np.float64(2), np.array([2.0])])
def test_a_factor_beside_a_convolution_is_no_scalar_case(k: Any) -> None:
    """Where the rank is not known, what makes the operand, or reads the result, may tell that there are axes."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
            self.register_buffer("k", torch.as_tensor(k))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.other(torch.relu(self.conv(x) * self.k) * self.k))

    module = Scaled().double().eval()
    assert len(fuser.optimize(module).report.applied) == 2


# -- illegal models


def test_a_sequence_of_a_scalar() -> None:
    nodes = [node("SplitToSequence", ["x"], ["s"]), node("SequenceAt", ["s", "i"])]
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(np.array(0), "i")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    assert not fuser.optimize(proto, verify=False).report.applied


def test_an_output_that_nothing_makes() -> None:
    proto = model([node("Relu", ["x"])], [2], [2], {})
    proto.graph.output[0].name = "z"
    with pytest.raises(fuser.InputError, match="nothing makes the graph output 'z'"):
        fuser.explain(proto)


@pytest.mark.parametrize("group", [0, 3])
def test_groups_that_do_not_divide(group: int) -> None:
    proto = model(
        [node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "x"])], ["N", 4, 5], ["N", 4, 5], {"w": normal(4, 4, 1)}
    )
    proto.graph.node[0].attribute.append(helper.make_attribute("group", group))
    report = fuser.explain(proto)
    assert not report.applied and not report.missed


@pytest.mark.parametrize("opset", [6, None])
def test_an_old_model_is_told(opset: int | None) -> None:
    proto = model([node("Relu", ["x"])], [2], [2], {})
    del proto.opset_import[:]
    if opset:
        proto.opset_import.append(helper.make_opsetid("", opset))
    (warning,) = fuser.explain(proto).warnings
    assert ("opset 6" if opset else "no opset") in warning and "version_converter" in warning


# -- other


def test_a_range_has_the_bits_of_the_runtime() -> None:
    import onnxruntime as ort

    nodes = [node("Range", ["from", "to", "step"], ["r"]), node("Add", ["x", "r"])]
    numbers = {"from": np.float32(0), "to": np.float32(1), "step": np.float32(0.1)}
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [10]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    result = fuser.optimize(proto).model
    assert [one.op_type for one in result.graph.node] == ["Add"]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    zeros = {"x": np.zeros(10, np.float32)}
    found = [ort.InferenceSession(one.SerializeToString(), options).run(None, zeros)[0] for one in (proto, result)]
    np.testing.assert_array_equal(*found)


def test_strided_branches_with_automatic_padding_of_one_size() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["b"], auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Conv", ["x", "v"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Add", ["b", "c"]),
    ]
    constants = {"w": normal(4, 3, 3, 3), "v": normal(4, 3, 1, 1)}
    for size in (7, 8):
        half = -(-size // 2)
        result = check(model(nodes, [2, 3, size, size], [2, 4, half, half], constants), normal(2, 3, size, size))
        assert [one.op_type for one in result.graph.node] == ["Conv"]
    check(model(nodes, [2, 3, "h", "w"], [2, 4, "i", "j"], constants), normal(2, 3, 7, 8))


def test_what_training_updates_is_no_constant() -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "k"])]
    proto = model(nodes, ["N", 3, 5], ["N", 4, 5], {"w": normal(4, 3, 1), "k": np.array(2.0)})
    training = proto.training_info.add()
    training.update_binding.add(key="w", value="w_new")
    step = node("Mul", ["w", "k"], ["w_new"])
    training.algorithm.CopyFrom(helper.make_graph([step], "step", [], [onnx.ValueInfoProto(name="w_new")]))
    before = proto.SerializeToString(deterministic=True)
    for freeze in (False, True):
        result = fuser.optimize(proto, freeze_inputs=freeze, verify=False)
        assert {remark.code for remark in result.report.missed} == {"overridable"}
        assert "training_info" in result.report.missed[0].reason
        assert result.model.SerializeToString(deterministic=True) == before


# -- operands and results that are left out


def test_what_a_node_makes_for_nobody_is_no_operand_of_another() -> None:
    nodes = [
        node("Split", ["pair", "halves"], ["a", ""], axis=0),
        node("Slice", ["grid", "start", "end", "", "step"], ["c"]),
        node("Cast", ["a"], ["af"], to=DOUBLE),
        node("Mul", ["c", "af"], ["k"]),
        node("Add", ["x", "k"]),
    ]
    constants = {
        "pair": np.array([1, 1]),
        "halves": np.array([1, 1]),
        "grid": normal(4, 6),
        "start": np.array([0]),
        "end": np.array([4]),
        "step": np.array([2]),
    }
    proto = model(nodes, [2, 6], [2, 6], constants)
    result = check(proto)
    assert [one.op_type for one in result.graph.node] == ["Add"]
    (k,) = (numpy_helper.to_array(t) for t in result.graph.initializer)
    np.testing.assert_array_equal(k, constants["grid"][:4:2])
    assert not ABSENT.known and not ABSENT.slots and not ABSENT.producer and not ABSENT.public


@pytest.mark.parametrize("read", ["y", "inv"])
def test_a_result_behind_one_that_is_left_out(read: str) -> None:
    float_ = onnx.TensorProto.FLOAT
    nodes = [node("LayerNormalization", ["c", "one"], ["y", "", "inv"]), node("Add", ["x", read], ["z"])]
    values = np.array([[1, 2, 3, 4], [5, 6, 7, 9]], np.float32)
    tensors = [numpy_helper.from_array(values, "c"), numpy_helper.from_array(np.ones(4, np.float32), "one")]
    infos = [helper.make_tensor_value_info(name, float_, [2, 4]) for name in ("x", "z")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    result = fuser.optimize(proto, verify=False).model
    assert [one.op_type for one in result.graph.node] == ["Add"]
    spread = 1 / np.sqrt(values.var(axis=1, keepdims=True) + 1e-5)
    expected = spread if read == "inv" else (values - values.mean(axis=1, keepdims=True)) * spread
    (found,) = (numpy_helper.to_array(t) for t in result.graph.initializer)
    np.testing.assert_allclose(np.broadcast_to(found, (2, 4)), np.broadcast_to(expected, (2, 4)), rtol=1e-5)


def test_an_empty_list_of_axes_beside_an_edit() -> None:
    reduce = node("ReduceMean", ["c2"], ["r"], keepdims=1)
    reduce.attribute.append(helper.make_attribute("axes", [], attr_type=onnx.AttributeProto.INTS))
    nodes = [node("Add", ["x", "c1"], ["p"]), reduce, node("Add", ["p", "r"], ["y"])]
    values = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    tensors = [numpy_helper.from_array(values, name) for name in ("c1", "c2")]
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.BFLOAT16, [2, 3]) for name in ("x", "y")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    result = fuser.optimize(proto, passes=["fold-constants", "eliminate-duplicate-constants"], verify=False)
    (kept,) = (one for one in result.model.graph.node if one.op_type == "ReduceMean")
    assert list(kept.input) == ["c1"]
    assert [attribute.name for attribute in kept.attribute] == ["keepdims", "axes"]


# -- nodes that are not legal, and names that are no text, are for the runtime, or refused in one line

NOTHING = helper.make_graph([], "nothing", [], [])
RELU = node("Relu", ["x"], ["y"])
ILLEGAL = {
    "Relu without operands": [node("Relu", [], ["r"]), node("Mul", ["r", "k"])],
    "Shape without results": [helper.make_node("Shape", ["x"], []), RELU],
    "Shape without operands": [node("Shape", [], ["q"]), RELU],
    "Reshape without results": [helper.make_node("Reshape", ["x"], []), RELU],
    "Constant without results": [helper.make_node("Constant", [], [], value_int=1), RELU],
    "Constant with two results": [
        helper.make_node("Constant", [], ["c", "d"], value_float=1.0),
        node("Mul", ["x", "d"]),
    ],
    "If without results": [helper.make_node("If", ["k"], [], then_branch=NOTHING, else_branch=NOTHING), RELU],
}


@pytest.mark.parametrize("nodes", ILLEGAL.values(), ids=ILLEGAL)
def test_nodes_that_lack_something(nodes: list[onnx.NodeProto]) -> None:
    info = [helper.make_tensor_value_info(name, DOUBLE, [2, 3]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(np.ones((1, 1)), "k")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], tensors), opset_imports=[helper.make_opsetid("", 17)]
    )
    assert fuser.optimize(proto, verify=False).model.graph.output[0].name == "y"


@pytest.mark.parametrize("name", [b"QQop", b"QQin", b"QQout", b"QQname", b"QQdomain"])
@pytest.mark.parametrize("where", ["main", "body", "bodies", "function"])
def test_a_name_that_is_no_text(where: str, name: bytes) -> None:
    odd = helper.make_node("QQop", ["x", "QQin"], ["QQout"], name="QQname", domain="QQdomain")
    info = [helper.make_tensor_value_info(one, DOUBLE, [2, 3]) for one in ("x", "y")]
    nodes, functions = [odd, node("Relu", ["x"], ["y"])], []
    if where == "body":
        branch = helper.make_graph([odd], "b", [], [helper.make_tensor_value_info("QQout", DOUBLE, [2, 3])])
        nodes = [node("If", ["k"], ["y"], then_branch=branch, else_branch=branch)]
    elif where == "bodies":
        custom = node("Custom", ["x"], ["z"], domain="my", graphs=[helper.make_graph([odd], "b", [], [])])
        nodes = [custom, node("Relu", ["x"], ["y"])]
    elif where == "function":
        functions = [helper.make_function("my", "F", ["x"], ["QQout"], [odd], [helper.make_opsetid("", 17)])]
        nodes = [node("Relu", ["x"], ["y"])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    tensors = [numpy_helper.from_array(np.array(True), "k")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], tensors), opset_imports=opsets, functions=functions
    )
    spoilt = onnx.ModelProto.FromString(proto.SerializeToString().replace(name, b"\xff\xfe" + name[2:]))
    with pytest.raises(InputError, match="UTF-8") as error:
        fuser.optimize(spoilt, verify=False)
    assert "\n" not in str(error.value) and name.decode()[2:] in str(error.value)


def test_a_sparse_initializer_whose_name_is_no_text() -> None:
    proto = model([node("Relu", ["x"], ["y"])], [2, 3], [2, 3], {})
    values, indices = numpy_helper.from_array(np.ones(1), "QQname"), numpy_helper.from_array(np.zeros(1, np.int64))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
    spoilt = onnx.ModelProto.FromString(proto.SerializeToString().replace(b"QQname", b"\xff\xfename"))
    with pytest.raises(InputError, match="UTF-8"):
        fuser.optimize(spoilt, verify=False)


def test_reshapes_in_a_row() -> None:
    """More than what can be looked through, and than calls may nest; of a batch that only has a name."""
    count = 1200
    nodes = [node("Reshape", [f"v{i}", f"s{i % 2}"], [f"v{i + 1}"]) for i in range(count)]
    info = [helper.make_tensor_value_info(name, DOUBLE, ["N", 4]) for name in ("v0", f"v{count}")]
    tensors = [numpy_helper.from_array(np.array(s), f"s{i}") for i, s in enumerate(([-1, 2, 2], [-1, 4]))]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert len(fuser.optimize(proto, verify=False).model.graph.node) <= 1


def test_an_input_of_which_not_even_the_rank_is_declared() -> None:
    """Sizes are tried for it, and four equal ones of 224 would take ten gigabytes."""
    proto = model([node("Identity", ["x"], ["a"]), node("Transpose", ["a"], ["y"], perm=[1, 0])], [2, 3], [3, 2], {})
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    started = time.monotonic()
    assert fuser.optimize(proto).report.verification.passed
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("fault", ["type", "functions"])
def test_what_cannot_be_run_is_one_line(fault: str) -> None:
    proto = model([node("Identity", ["x"], ["a"]), node("Relu", ["a"], ["y"])], [2, 3], [2, 3], {})
    if fault == "type":
        proto.graph.input[0].type.tensor_type.elem_type = 82
    else:  # deeper than may be inlined
        proto.opset_import.append(helper.make_opsetid("my", 1))
        for i in reversed(range(150)):
            inner = node(f"F{i + 1}", ["x"], ["z"], domain="my") if i < 149 else node("Relu", ["x"], ["z"])
            opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
            proto.functions.append(helper.make_function("my", f"F{i}", ["x"], ["z"], [inner], opsets))
        proto.graph.node[1].CopyFrom(node("F0", ["a"], ["y"], domain="my"))
    with pytest.raises(InputError) as error:
        fuser.optimize(proto)
    assert "\n" not in str(error.value)


def test_a_reshape_that_says_better_than_inference_stays() -> None:
    """onnx adds the output padding to a size that SAME tells already; what declares the right one hides that."""
    same: dict[str, Any] = {"auto_pad": "SAME_LOWER", "strides": [2, 1], "output_padding": [1, 0]}
    nodes = [node("ConvTranspose", ["x", "w"], ["a"], **same), node("Reshape", ["a", "s"], ["b"]), node("Relu", ["b"])]
    proto = model(nodes, [2, 1, 2, 8], [2, 1, 4, 8], {"w": normal(1, 1, 2, 3), "s": np.array([2, 1, 4, 8])})
    result = fuser.optimize(proto, verify=False).model
    onnx.checker.check_model(result, full_check=True)


def test_one_name_for_two_sizes() -> None:
    """Some exporters call every size that is dynamic "N"."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "order"], ["t"]),
        node("Reshape", ["x", "t"], ["q"]),
        node("Relu", ["q"]),
    ]
    turned = {"order": np.array([0, 1, 3, 2])}
    check(model(nodes, ["N", 3, "N", "N"], [None] * 4, turned), normal(1, 3, 4, 6), normal(2, 3, 2, 5))
    declared = {"q": ["N", 3, "N", "N"]}
    check(model(nodes, ["N", 3, "N", "N"], ["N", 3, "N", "N"], turned, declared), normal(1, 3, 4, 6))


def test_the_names_of_the_sizes_of_an_output_may_be_wrong() -> None:
    """A runtime only warns of them."""
    nodes = [
        node("Slice", ["x", "first", "last", "axis", "step"], ["y"]),
        node("Concat", ["y", "y"], ["c"], axis=2),
        node("Shape", ["x"], ["s"]),
        node("Reshape", ["c", "s"], ["z"]),
    ]
    constants = {"first": np.array([0]), "last": np.array([2**31 - 1]), "axis": np.array([1]), "step": np.array([2])}
    proto = model(nodes, ["N", "T", 8], ["N", "T", 8], constants)
    proto.graph.output.append(helper.make_tensor_value_info("z", DOUBLE, ["N", "T", 8]))
    result = fuser.optimize(proto, verify=False).model
    for shape in ((1, 6, 8), (2, 4, 8)):
        (_, z), (_, w) = (ReferenceEvaluator(one).run(None, {"x": np.ones(shape)}) for one in (proto, result))  # type: ignore[misc]
        np.testing.assert_array_equal(z, w)


def test_a_sum_of_more_branches_than_there_are_rounds() -> None:
    count = 130
    nodes = [node("Conv", ["x", f"w{i}"], [f"c{i}"]) for i in range(count)]
    nodes.append(node("Sum", [f"c{i}" for i in range(count)], ["y"]))
    constants = {f"w{i}": normal(2, 2, 1) for i in range(count)}
    proto = model(nodes, [2, 2, 5], [2, 2, 5], constants)
    assert [one.op_type for one in check(proto, normal(2, 2, 5)).graph.node] == ["Conv"]
    assert fuser.optimize(proto, verify=False).report.rounds < 5  # not one for each


@pytest.mark.parametrize("pool", ["AveragePool", "MaxPool"])
@pytest.mark.parametrize("order", ["conv bn", "bn conv"])
def test_a_window_of_padding_alone_is_no_affine_map_of_anything(pool: str, order: str) -> None:
    """A runtime makes 0 of it, or the lowest number."""
    parts = {
        "conv": lambda x, y: node("Conv", [x, "w"], [y]),
        "bn": lambda x, y: node("BatchNormalization", [x, "gamma", "beta", "mean", "var"], [y]),
    }
    first, last = (parts[name] for name in order.split())

    def pooled(size: int | str, dilation: int) -> onnx.ModelProto:
        options = {"kernel_shape": [2, 2], "dilations": [dilation] * 2, "pads": [1] * 4}
        constants = {"w": np.eye(2)[..., None, None], "gamma": [0.5, 2.0], "beta": [1.0, 1.0]}
        return onnx_models.model(
            [first("x", "a"), node(pool, ["a"], ["b"], **options), last("b", "y")],
            x=["N", 2, size, size],
            constants={k: np.asarray(v, np.float32) for k, v in {**constants, "mean": [0, 0], "var": [1, 1]}.items()},
            opset=19,
        )

    for size in (2, "S"):
        done = fuser.optimize(pooled(size, 3), verify=False, passes=["fold-batch-norm"])
        assert [remark.code for remark in done.report.missed] == ["padding"] and not done.report.applied
    for size, dilation in ((3, 3), (2, 1), ("S", 1)):
        assert fuser.optimize(pooled(size, dilation), passes=["fold-batch-norm"]).report.applied
