"""fold-affine: arithmetic with constants, step by step, on ONNX and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fuser.passes.fold_affine import FoldAffine
from hosts_torch import Decomposed, Exported, Lifted, Traced
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net
from onnx_models import conv, conv_constants, model, node, op_types
from rewriting import DOUBLE, applied, evaluate, refused, rewritten
from torch import nn

import fuser
from fuser import pipeline

FOLD = FoldAffine()
RNG = np.random.default_rng(11)
W = RNG.standard_normal((4, 4, 3, 3))


def double(nodes: list[onnx.NodeProto], x: Any = ("N", 4, 8, 8), **tensors: Any) -> onnx.ModelProto:
    return model(nodes, constants={"w": W, **tensors}, dtype=DOUBLE, x=x)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.5, 2, shape)


# -- folded


@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (1, 4, 1, 1), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("order", [("c", "k"), ("k", "c")])
def test_every_operator_order_and_shape_after_a_convolution(
    operator: str, order: tuple[str, str], shape: tuple[int, ...]
) -> None:
    proto = double([conv(), node(operator, list(order))], k=positive(*shape))
    if (operator, order[0]) == ("Div", "k"):
        assert refused(proto, FOLD) == {"not-affine": 1}
    else:
        assert op_types(applied(proto, FOLD).graph) == ["Conv"]


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("order", [("r", "k"), ("k", "r")])
def test_every_operator_before_a_convolution(operator: str, order: tuple[str, str]) -> None:
    nodes = [node("Relu", ["x"], ["r"]), node(operator, list(order), ["a"]), conv("a", "y")]
    proto = double(nodes, k=positive(4, 1, 1))
    if (operator, order[0]) == ("Div", "k"):
        assert refused(proto, FOLD) == {"not-affine": 1}
    else:
        assert op_types(applied(proto, FOLD).graph) == ["Relu", "Conv"]


def test_a_decomposed_batch_norm() -> None:
    tensors = {name: positive(1, 4, 1, 1) for name in ("mean", "std", "gamma", "beta")}
    nodes = [
        conv(),
        node("Sub", ["c", "mean"], ["d"]),
        node("Div", ["d", "std"], ["e"]),
        node("Mul", ["gamma", "e"], ["f"]),
        node("Add", ["f", "beta"]),
    ]
    assert op_types(applied(double(nodes, **tensors), FOLD).graph) == ["Conv"]


def test_the_normalization_of_an_image() -> None:
    nodes = [node("Sub", ["x", "mean"], ["d"]), node("Div", ["d", "std"], ["e"]), conv("e", "y")]
    tensors = {name: positive(4, 1, 1) for name in ("mean", "std")}
    assert op_types(applied(double(nodes, **tensors), FOLD).graph) == ["Conv"]
    nodes[2] = conv("e", "y", pads=[1, 1, 1, 1])  # the division moves, the shift cannot
    outcome, result = rewritten(double(nodes, **tensors), FOLD)
    assert [r.site for r in outcome.applied] == ["div_e"]
    assert [(r.site, r.code) for r in outcome.missed] == [("sub_d", "padding")]
    assert op_types(result.graph) == ["Sub", "Conv"]


def test_the_axis_comes_from_broadcasting_and_not_from_the_size() -> None:
    """With C == H == W a constant along the width looks like one along the channels."""
    for shape, codes in (((4,), "axis-mismatch"), ((4, 1), "axis-mismatch"), ((1, 4), "axis-mismatch")):
        proto = double([conv("x", "c", pads=[1, 1, 1, 1]), node("Mul", ["c", "k"])], ("N", 4, 4, 4), k=positive(*shape))
        assert refused(proto, FOLD) == {codes: 1}


def test_the_scale_of_attention_goes_through_reshape_and_transpose() -> None:
    nodes = [
        node("MatMul", ["x", "m"], ["p"]),
        node("Reshape", ["p", "shape"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3]),
        node("Mul", ["t", "k"]),
    ]
    proto = double(nodes, (2, 5, 6), m=RNG.standard_normal((6, 6)), shape=np.array([2, 5, 2, 3]), k=np.array(0.25))
    assert op_types(applied(proto, FOLD).graph) == ["MatMul", "Reshape", "Transpose"]


# -- refused


def test_not_affine() -> None:
    assert refused(double([conv(), node("Div", ["k", "c"])], k=positive(4, 1, 1)), FOLD) == {"not-affine": 1}


def test_not_per_channel() -> None:
    assert refused(double([conv(), node("Mul", ["c", "k"])], k=positive(4, 6, 6)), FOLD) == {"not-per-channel": 1}


def test_broadcasts() -> None:
    for shape in ((3, 1, 1, 1, 1), (1, 1, 1, 1, 1)):  # another axis in front
        proto = double([conv(), node("Mul", ["c", "k"])], k=positive(*shape))
        assert refused(proto, FOLD) == {"broadcasts": 1}
    nodes = [node("Relu", ["x"], ["r"]), node("Mul", ["r", "k"], ["a"]), conv("a", "y")]
    assert refused(double(nodes, ("N", 1, 8, 8), k=positive(4, 1, 1)), FOLD) == {"broadcasts": 1}  # 1 to 4 channels
    proto = double([conv("x", "c", "narrow"), node("Mul", ["c", "k"])], narrow=W[:1], k=positive(4, 1, 1))
    assert refused(proto, FOLD) == {"broadcasts": 1}


def test_not_finite() -> None:
    proto = double([conv(), node("Div", ["c", "k"])], k=np.array([1.0, 0, 1, 1]).reshape(4, 1, 1))
    assert refused(proto, FOLD) == {"not-finite": 1}


def test_overridable() -> None:
    proto = model(
        [conv(), node("Mul", ["c", "k"])],
        constants={"w": W, "k": positive(4, 1, 1)},
        dtype=DOUBLE,
        also_inputs=["k"],
    )
    assert refused(proto, FOLD) == {"overridable": 1}


def test_shared_output() -> None:
    nodes = [conv(), node("Mul", ["c", "k"], ["m"]), node("Add", ["m", "c"])]
    assert refused(double(nodes, k=positive(4, 1, 1)), FOLD) == {"shared-output": 1}


def test_no_linear() -> None:
    nodes = [node("Relu", ["x"], ["r"]), node("Mul", ["r", "k"], ["m"]), node("Relu", ["m"])]
    assert refused(double(nodes, k=positive(4, 1, 1)), FOLD) == {"no-linear": 1}


def test_a_sum_of_two_variables_is_no_candidate() -> None:
    assert refused(double([conv("x", "a"), conv("x", "b"), node("Add", ["a", "b"])]), FOLD) == {}


# -- into the arithmetic before it

SIDES = st.tuples(st.sampled_from(["Add", "Sub", "Mul", "Div"]), st.integers(0, 1))
SHAPES = st.sampled_from([(), (1,), (4, 1, 1), (1, 4, 1, 1)])


@settings(max_examples=80, deadline=None)
@given(SIDES, SIDES, SHAPES, SHAPES)
def test_factors_and_summands(
    first: tuple[str, int], second: tuple[str, int], a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    def step(source: str, target: str, constant: str, operator: str, side: int) -> onnx.NodeProto:
        return node(operator, [source, constant] if side else [constant, source], [target])

    nodes = [node("Exp", ["x"], ["e"]), step("e", "m", "a", *first), step("m", "n", "b", *second), node("Exp", ["n"])]
    proto = model(nodes, x=(2, 4, 8, 8), constants={"a": positive(*a), "b": positive(*b)}, dtype=DOUBLE)
    _, result = rewritten(proto, FOLD)
    kinds = [{"Add": "+", "Sub": "+", "Mul": "*", "Div": "*"}[operator] for operator, _ in (first, second)]
    can = kinds[0] == kinds[1] and second not in (("Sub", 0), ("Div", 0))
    sizes = np.prod(a, dtype=int), np.prod(b, dtype=int)
    merges = can and np.broadcast(np.empty(a), np.empty(b)).size <= max(sizes)
    assert len(result.graph.node) == (3 if merges else 4)
    before, after = evaluate(proto), evaluate(result)
    assert before.shape == after.shape
    np.testing.assert_allclose(after, before, rtol=1e-12)


@pytest.mark.parametrize(
    ("operators", "a", "b"),
    [
        (("Mul", "Mul"), 1e-30, 1e-30),
        (("Mul", "Mul"), 1e-25, 1e-15),
        (("Mul", "Mul"), 1e30, 1e30),
        (("Div", "Mul"), 1e-30, 1e30),
        (("Mul", "Mul"), 2.0, 0.0),
        (("Add", "Mul"), 2.0, 3.0),
    ],
    ids=["to-zero", "too-small", "too-large", "a-quotient", "zero", "of-two-kinds"],
)
def test_numbers_that_cannot_be_one(operators: tuple[str, str], a: float, b: float) -> None:
    nodes = [node(operators[0], ["x", "a"], ["m"]), node(operators[1], ["m", "b"], ["n"]), node("Relu", ["n"])]
    constants = {"a": np.float32(a), "b": np.float32(b)}
    assert refused(model(nodes, constants=constants), FOLD) == {"no-linear": 2}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("before", [conv("x", "c"), node("Relu", ["x"], ["c"])], ids=["a-convolution", "a-summand"])
def test_rounding_by_a_large_summand_stays(dtype: Any, before: onnx.NodeProto) -> None:
    """x + 1.5 / eps - 1.5 / eps is x rounded to a whole number: in exact arithmetic, nothing at all."""
    large = np.array(1.5 / np.finfo(dtype).eps, dtype)
    nodes = [before, node("Add", ["c", "k"], ["a"]), node("Sub", ["a", "k"], ["s"]), node("Relu", ["s"])]
    proto = model(
        nodes, constants={"w": W.astype(dtype), "k": large}, dtype=onnx.helper.np_dtype_to_tensor_dtype(large.dtype)
    )
    assert refused(proto, FOLD) == {"rounds": 2}


def test_a_bias_that_is_taken_back_is_gone_in_the_same_run() -> None:
    nodes = [node("MatMul", ["x", "m"], ["a"]), node("Add", ["a", "b"], ["s"]), node("Sub", ["s", "b"])]
    tensors = {"m": RNG.standard_normal((4, 4)), "b": RNG.standard_normal((1, 4))}
    assert op_types(applied(model(nodes, constants=tensors, dtype=DOUBLE, x=(3, 4)), FOLD).graph) == ["MatMul"]


def test_a_large_summand_that_rounds_nothing_to_whole_numbers() -> None:
    proto = model(
        [conv("x", "c"), node("Add", ["c", "k"])], constants={"w": W.astype(np.float32), "k": np.float32(8e6)}
    )
    assert op_types(applied(proto, FOLD).graph) == ["Conv"]


def test_a_scalar_becomes_a_vector_where_it_did() -> None:
    """A number times a vector of one element has an axis."""
    nodes = [node("ReduceSum", ["x"], ["r"], keepdims=0), node("Mul", ["r", "a"], ["m"]), node("Mul", ["m", "b"])]
    constants = {"a": np.float32(2), "b": np.float32([3])}
    assert refused(model(nodes, constants=constants), FOLD) == {"no-linear": 1, "broadcasts": 1}


@pytest.mark.parametrize("host", [Traced, Exported, Lifted, Decomposed])
def test_a_factor_of_another_type_stays(host: Any) -> None:
    """A tensor without axes does not promote the type of a product; one with axes does."""
    module = Net(lambda m, x: torch.relu(x.exp() * m.number * m.numbers))
    module.number = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))
    module.numbers = nn.Parameter(torch.tensor([0.5]))
    graph = host().build(module, (torch.randn(2, 4),))
    assert not [r for r in pipeline.run(graph, [FOLD]).history if r.applied]


def test_arithmetic_that_others_read_stays() -> None:
    nodes = [node("Mul", ["x", "a"], ["m"]), node("Mul", ["m", "a"], ["n"]), node("Relu", ["n"])]
    proto = model([*nodes, node("Exp", ["m"], ["z"])], constants={"a": np.float32(2)}, outputs=["y", "z"])
    assert refused(proto, FOLD) == {"no-linear": 1, "shared-output": 1}


@pytest.mark.parametrize("host", [Traced, Exported, Lifted, Decomposed])
def test_numbers_of_a_torch_graph(host: Any) -> None:
    """They stay numbers."""
    module = Net(lambda m, x: torch.relu((x.exp() / 4 * 3 + 1 - m.shift) * 2.5 * 0.5))
    module.shift = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))
    x = torch.randn(2, 4, 6, 6).double()
    graph = host().build(module, (x,))
    pipeline.run(graph, [FOLD])
    counts = graph.summary().ops
    assert sum(counts.values()) == (8 if host is Traced else 5), counts  # a traced number has no type
    after = host().run(host().result(graph), x)
    np.testing.assert_allclose(after, module(x).detach(), rtol=1e-12, atol=1e-14)


def test_a_quantized_product_is_given_no_bias_of_zeros() -> None:
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        node("MatMul", ["x", "w"], ["p"]),
        node("Mul", ["p", "k"], ["m"]),
        node("Relu", ["m"]),
    ]
    tensors = {"q": RNG.integers(-9, 9, (8, 3), np.int8), "s": np.ones(3, np.float32), "k": np.float32(0.5)}
    result = applied(model(nodes, constants=tensors, opset=19), FOLD, bound=0)
    assert op_types(result.graph) == ["DequantizeLinear", "MatMul", "Relu"]


# -- torch


class LayerScale(nn.Module):
    """Frozen normalization after a convolution, and a LayerScale after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 6, 3), nn.Linear(6, 5)
        self.gamma = nn.Parameter(torch.rand(5))
        self.scale, self.shift = nn.Parameter(torch.rand(6, 1, 1)), nn.Parameter(torch.rand(1, 6, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.relu(self.conv(2 * x - 1) * self.scale + self.shift)
        return self.gamma * self.linear(y.mean((2, 3)))


@pytest.mark.parametrize("host", [Exported, Lifted, Decomposed])
def test_torch(host: Any) -> None:
    torch.manual_seed(0)
    module, x = LayerScale().double().eval(), torch.randn(2, 4, 6, 6).double()
    graph = host().build(module, (x,))
    outcome = pipeline.run(graph, [FOLD])
    assert len(outcome.applied) == 5
    assert outcome.missed == []
    after = host().run(host().result(graph), x)
    np.testing.assert_allclose(after, module(x).detach(), rtol=1e-12, atol=1e-14)


def test_a_bias_of_zeros_goes() -> None:
    """As in every network that was not trained: the Add does nothing but round a zero's sign."""
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["q"]), node("Relu", ["q"])]
    constants = {"w": RNG.standard_normal((8, 5)).astype(np.float32), "b": np.zeros(5, np.float32)}
    result = applied(model(nodes, constants=constants), FOLD, bound=0)
    assert op_types(result.graph) == ["MatMul", "Relu"]
    constants["b"][3] = 1
    assert refused(model(nodes, constants=constants), FOLD) == {}  # a bias


def test_behind_an_operator_of_which_inference_says_nothing() -> None:
    nodes = [node("GroupNormalization", ["x", "one", "one"], ["g"], num_groups=2), node("Mul", ["g", "s"], ["c"])]
    arrays = {**conv_constants(4, 4), "one": np.ones(4, np.float32), "s": np.full((4, 1, 1), 2, np.float32)}
    proto = model([*nodes, conv("c", "y")], constants=arrays, opset=21, ir_version=10)
    assert op_types(fuser.optimize(proto, passes=["fold-affine"]).model.graph) == ["GroupNormalization", "Conv"]
