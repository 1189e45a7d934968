"""eliminate-identity: what hands on what it gets goes, and the names of the signature stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from fuser.passes.eliminate_identity import EliminateIdentity
from hosts_torch import HOSTS as TORCH_HOSTS
from hosts_torch import Exported, Traced
from nets import Net
from onnx_models import model, node, op_types
from rewriting import applied, refused, rewritten
from torch import Tensor

from fuser import pipeline
from fuser.neutral import keeps_shape

ELIMINATE = EliminateIdentity()


def test_identities_dropouts_and_casts_to_the_same_type() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Identity", ["a"], ["b"]),
        node("Dropout", ["b"], ["c"]),
        node("Cast", ["c"], ["d"], to=onnx.TensorProto.FLOAT),
        node("Neg", ["d"]),
    ]
    result = applied(model(nodes), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Relu", "Neg"]


def test_an_output_keeps_its_name() -> None:
    result = applied(model([node("Relu", ["x"], ["a"]), node("Identity", ["a"])]), ELIMINATE, bound=0)
    assert [(n.op_type, n.output[0]) for n in result.graph.node] == [("Relu", "y")]


def test_what_changes_something_is_no_candidate() -> None:
    nodes = [node("Cast", ["x"], ["a"], to=onnx.TensorProto.FLOAT16), node("Cast", ["a"], to=onnx.TensorProto.FLOAT)]
    assert refused(model(nodes), ELIMINATE) == {}
    training = [node("Dropout", ["x", "ratio", "on"])]
    constants = {"ratio": np.array(0.5, np.float32), "on": np.array(True)}
    assert refused(model(training, constants=constants), ELIMINATE) == {}


def test_both_public() -> None:
    assert refused(model([node("Identity", ["x"])]), ELIMINATE) == {"both-public": 1}
    twice = [node("Relu", ["x"], ["a"]), node("Identity", ["a"])]
    assert refused(model(twice, outputs=["y", "a"]), ELIMINATE) == {"both-public": 1}


def test_the_producer_takes_the_name_of_the_output_with_all_its_readers() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Identity", ["a"]), node("Neg", ["a"], ["z"])]
    result = applied(model(nodes, outputs=["y", "z"]), ELIMINATE, bound=0)
    assert [(n.op_type, list(n.input), list(n.output)) for n in result.graph.node] == [
        ("Relu", ["x"], ["y"]),
        ("Neg", ["y"], ["z"]),
    ]


def pair(op: str, value: np.ndarray, *, left: bool = False, dtype: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    operands = ["k", "a"] if left else ["a", "k"]
    nodes = [node("Abs", ["x"], ["a"]), node(op, operands, ["b"]), node("Neg", ["b"])]
    return model(nodes, x=("N", 4, 8, 8), constants={"k": value}, dtype=dtype)


ONE, ZERO, MINUS = np.float32(1), np.float32(0), np.float32(-0.0)


@pytest.mark.parametrize(
    ("op", "value", "left"),
    [
        ("Mul", ONE, False),
        ("Mul", ONE, True),
        ("Mul", np.ones((1, 1, 1), np.float32), True),
        ("Mul", np.ones((4, 1, 1), np.float32), False),
        ("Mul", np.ones((1, 4, 8, 8), np.float32), False),
        ("Div", ONE, False),
        ("Sub", ZERO, False),
        ("Add", MINUS, False),
        ("Add", MINUS, True),
    ],
)
def test_arithmetic_that_gives_back_every_bit(op: str, value: np.ndarray, left: bool) -> None:
    assert op_types(applied(pair(op, value, left=left), ELIMINATE, bound=0).graph) == ["Abs", "Neg"]


@pytest.mark.parametrize(
    ("op", "value", "left"),
    [
        ("Add", ZERO, False),  # makes 0 of -0
        ("Sub", MINUS, False),
        ("Sub", ZERO, True),
        ("Div", ONE, True),
        ("Mul", np.float32([1] * 7 + [2]), False),
        ("Mul", np.ones((1, 1, 1, 1, 1), np.float32), False),  # one axis more
        ("Mul", np.ones((2, 4, 8, 8), np.float32), False),  # the batch may be 1
        ("Mul", np.zeros((0, 1, 1, 1), np.float32), False),
    ],
)
def test_arithmetic_that_does_something(op: str, value: np.ndarray, left: bool) -> None:
    assert refused(pair(op, value, left=left), ELIMINATE) == {}


@pytest.mark.parametrize(("op", "value"), [("Add", 0), ("Sub", 0), ("Mul", 1), ("Div", 1)])
def test_integers_have_one_zero(op: str, value: int) -> None:
    proto = pair(op, np.int64(value), dtype=onnx.TensorProto.INT64)
    assert op_types(applied(proto, ELIMINATE, bound=0).graph) == ["Abs", "Neg"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_signs_of_narrow_zeros(dtype: type) -> None:
    for value, code in ((dtype(-0.0), "applied"), (dtype(0.0), None)):
        proto = pair("Add", np.asarray(value), dtype=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
        outcome, _ = rewritten(proto, ELIMINATE)
        assert [r.code for r in outcome.applied] == ([code] if code else [])


def test_a_factor_that_the_caller_may_replace() -> None:
    proto = pair("Mul", np.ones(1, np.float32))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("k", 1, [1]))
    assert refused(proto, ELIMINATE) == {}


CHANGES_NOTHING: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "reshape": ([node("Reshape", ["a", "k"], ["b"])], {"k": np.array([-1, 4, 8, 8])}),
    "reshape-zeros": ([node("Reshape", ["a", "k"], ["b"])], {"k": np.array([0, 0, 0, 0])}),
    "transpose": ([node("Transpose", ["a"], ["b"], perm=[0, 1, 2, 3])], {}),
    "concat": ([node("Concat", ["a"], ["b"], axis=1)], {}),
    "expand": ([node("Expand", ["a", "k"], ["b"])], {"k": np.array([1, 4, 1, 8])}),
    "expand-fewer": ([node("Expand", ["a", "k"], ["b"])], {"k": np.array([8, 1])}),
    "tile": ([node("Tile", ["a", "k"], ["b"])], {"k": np.array([1, 1, 1, 1])}),
    "slice": (
        [node("Slice", ["a", "s", "e", "i"], ["b"])],
        {"s": np.array([0, 0]), "e": np.array([8, 2**63 - 1]), "i": np.array([-1, 0])},
    ),
    "sum": ([node("Sum", ["a"], ["b"])], {}),
    "squeeze": ([node("Squeeze", ["a", "k"], ["b"])], {"k": np.array([], np.int64)}),
    "cast-there-and-back": ([node("Cast", ["a"], ["w"], to=11), node("Cast", ["w"], ["b"], to=1)], {}),
}


@pytest.mark.parametrize("name", CHANGES_NOTHING)
def test_what_changes_nothing(name: str) -> None:
    nodes, constants = CHANGES_NOTHING[name]
    proto = model([node("Abs", ["x"], ["a"]), *nodes, node("Neg", ["b"])], constants=constants)
    assert op_types(applied(proto, ELIMINATE, bound=0).graph) == ["Abs", "Neg"]


CHANGES_SOMETHING: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "reshape": ([node("Reshape", ["a", "k"], ["b"])], {"k": np.array([-1, 8, 4, 8])}),
    "transpose": ([node("Transpose", ["a"], ["b"], perm=[0, 1, 3, 2])], {}),
    "concat": ([node("Concat", ["a", "a"], ["b"], axis=1)], {}),
    "expand-the-batch": ([node("Expand", ["a", "k"], ["b"])], {"k": np.array([2, 4, 8, 8])}),
    "expand-more": ([node("Expand", ["a", "k"], ["b"])], {"k": np.array([1, 1, 4, 8, 8])}),
    "tile": ([node("Tile", ["a", "k"], ["b"])], {"k": np.array([1, 2, 1, 1])}),
    "slice-start": ([node("Slice", ["a", "s", "e"], ["b"])], {"s": np.array([1]), "e": np.array([9])}),
    "slice-end": (
        [node("Slice", ["a", "s", "e", "i"], ["b"])],
        {"s": np.array([0]), "e": np.array([7]), "i": np.array([3])},
    ),
    "slice-the-batch": ([node("Slice", ["a", "s", "e"], ["b"])], {"s": np.array([0]), "e": np.array([5])}),
    "slice-step": (
        [node("Slice", ["a", "s", "e", "i", "t"], ["b"])],
        {"s": np.array([0]), "e": np.array([8]), "i": np.array([2]), "t": np.array([2])},
    ),
    "sum": ([node("Sum", ["a", "a"], ["b"])], {}),
    "narrow-cast": ([node("Cast", ["a"], ["w"], to=10), node("Cast", ["w"], ["b"], to=1)], {}),
    "cast-to-integer": ([node("Cast", ["a"], ["w"], to=7), node("Cast", ["w"], ["b"], to=1)], {}),
    "cast-bfloat16": ([node("Cast", ["a"], ["w"], to=16), node("Cast", ["w"], ["b"], to=1)], {}),
}


@pytest.mark.parametrize("name", CHANGES_SOMETHING)
def test_what_changes_something(name: str) -> None:
    nodes, constants = CHANGES_SOMETHING[name]
    proto = model([node("Abs", ["x"], ["a"]), *nodes, node("Neg", ["b"])], constants=constants)
    assert refused(proto, ELIMINATE) == {}


def test_shapes_that_agree_but_for_one_size() -> None:
    assert keeps_shape(("N", 3, 4), (None, 3, 4))
    assert keeps_shape(("N", "H", 4), ("N", "H", 4))
    assert keeps_shape((2, None, 4), (2, 3, 4)) and not keeps_shape((2, 5, 4), (2, 3, 4))
    assert not keeps_shape(("N", "H", 4), ("N", "M", 4))  # the names say nothing of their product's factors
    assert not keeps_shape((None, None, 4), (None, None, 4))
    assert not keeps_shape(("N", 0, 4), (None, 0, 4))  # no elements say nothing of the other sizes
    assert not keeps_shape((2, 3), (2, 3, 1))
    assert not keeps_shape(None, (1,))


TORCH: dict[str, tuple[Callable[[Net, Tensor], Tensor], int]] = {
    "times-one": (lambda m, x: (x.exp() * 1).sin(), 1),
    "minus-zero": (lambda m, x: (x.exp() - 0).sin(), 1),
    "plus-zero": (lambda m, x: (x.exp() + 0).sin(), 0),
    "reshape": (lambda m, x: x.exp().reshape(2, 4, 4).sin(), 1),
    "expand": (lambda m, x: x.exp().expand(2, 4, 4).sin(), 1),
    "slice": (lambda m, x: x.exp()[:, :4].sin(), 1),
    "permute": (lambda m, x: x.exp().permute(0, 1, 2).sin(), 1),
    "expand-more": (lambda m, x: x.exp().expand(3, 2, 4, 4).sin(), 0),
}


@pytest.mark.parametrize("host", TORCH_HOSTS, ids=lambda host: host.__name__)
@pytest.mark.parametrize("name", TORCH)
def test_on_torch(host: Any, name: str) -> None:
    wiring, count = TORCH[name]
    x = torch.randn(2, 4, 4)
    graph = host().build(Net(wiring), (x,))
    outcome = pipeline.run(graph, [ELIMINATE])
    if host is not Traced:  # which has no shapes
        slices = sum(remark.site.startswith("slice") for remark in outcome.applied)
        assert len(outcome.applied) - max(slices - 1, 0) == count
    np.testing.assert_array_equal(host().run(host().result(graph), x), Net(wiring)(x).numpy())


def test_torch_promotes() -> None:
    x = torch.randn(3, dtype=torch.float32)
    module = Net(lambda m, x: (x * m.one).sin())
    module.register_buffer("one", torch.ones(1, dtype=torch.float64))
    graph = Exported().build(module, (x,))
    assert pipeline.run(graph, [ELIMINATE]).applied == []


def test_a_cast_to_the_type_of_another_value() -> None:
    nodes = [node("Relu", ["x"], ["r"]), node("Sigmoid", ["x"], ["s"]), node("CastLike", ["r", "s"], ["c"])]
    proto = model([*nodes, node("Add", ["c", "s"])], opset=18)
    assert op_types(rewritten(proto, ELIMINATE)[1].graph) == ["Relu", "Sigmoid", "Add"]
    nodes.insert(2, node("Cast", ["s"], ["d"], to=onnx.TensorProto.DOUBLE))
    nodes[3] = node("CastLike", ["r", "d"], ["c"])
    proto = model([*nodes, node("Add", ["c", "d"])], opset=18)
    assert "CastLike" in op_types(rewritten(proto, ELIMINATE)[1].graph)
