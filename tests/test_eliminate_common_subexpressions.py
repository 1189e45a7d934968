"""eliminate-common-subexpressions: what is computed twice is computed once, on every host.

torch's quick exporter merges such calls itself, so the ONNX models here are written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fuser.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from fuser.passes.eliminate_duplicate_constants import EliminateDuplicateConstants
from fuser.passes.fold_batch_norm import FoldBatchNorm
from hosts_torch import HOSTS, Exported, Traced
from nets import Net, lively
from onnx import helper
from onnx_models import batch_norm, body, conv, conv_constants, model, node, op_types
from rewriting import applied, refused, rewritten
from torch import Tensor, nn

from fuser import pipeline
from fuser.graphs.torch.graph import TorchGraph

ELIMINATE = EliminateCommonSubexpressions()


# -- on every torch dialect


def twice(m: Net, x: Tensor) -> Tensor:
    a, b = torch.relu(m.conv(x)), torch.relu(m.conv(x))
    return a + b * 2


def split_twice(m: Net, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    c, d = x.chunk(2, 1)
    return (a + d) * (b + c)


NETS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "conv-and-relu": (lambda: Net(twice, conv=nn.Conv2d(4, 6, 3)), 2),
    "views": (lambda: Net(lambda m, x: x.flatten(1) * x.flatten(1).exp()), 1),
    "numbers-of-other-types": (lambda: Net(lambda m, x: (x + 1) * (x + 2) * (x - 1.5)), 0),
    "another-attribute": (lambda: Net(lambda m, x: x.mean(2) + x.mean(3)), 0),
}


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@pytest.mark.parametrize("name", NETS)
def test_the_same_bits_from_fewer_nodes(host: Any, name: str) -> None:
    build, count = NETS[name]
    torch.manual_seed(3)
    module, x = build().eval(), torch.randn(2, 4, 8, 8)
    before = host().run(host().result(host().build(module, (x,))), x)
    graph = host().build(module, (x,))
    outcome = pipeline.run(graph, [ELIMINATE])
    assert (len(outcome.applied), len(outcome.missed)) == (count, 0)
    np.testing.assert_array_equal(host().run(host().result(graph), x), before)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_several_outputs(host: Any) -> None:
    x = torch.randn(2, 4, 8, 8)
    module = Net(split_twice)
    before = host().run(host().result(host().build(module, (x,))), x)
    graph = host().build(module, (x,))
    assert pipeline.run(graph, [ELIMINATE]).applied
    assert not pipeline.run(graph, [ELIMINATE]).applied
    ops = graph.summary().ops
    assert sum(count for name, count in ops.items() if "chunk" in name.lower() or "split" in name.lower()) == 1
    np.testing.assert_array_equal(host().run(host().result(graph), x), before)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@pytest.mark.parametrize("first", [True, False])
def test_a_fold_comes_before_sharing(host: Any, first: bool) -> None:
    """One convolution that two BatchNorms read could not be folded."""
    module = lively(
        Net(
            lambda m, x: m.a(m.conv(x)) * m.b(m.conv(x)),
            conv=nn.Conv2d(4, 6, 3),
            a=nn.BatchNorm2d(6),
            b=nn.BatchNorm2d(6),
        )
    )
    x = torch.randn(2, 4, 8, 8)
    graph = host().build(module, (x,))
    passes = [ELIMINATE, FoldBatchNorm()] if first else [FoldBatchNorm(), ELIMINATE]
    outcome = pipeline.run(graph, passes)
    assert [remark.pass_name for remark in outcome.applied] == ["fold-batch-norm"] * 2
    assert outcome.missed == []


# -- ONNX


def test_an_output_keeps_its_name() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Relu", ["x"]), node("Neg", ["a"], ["z"])]
    result = applied(model(nodes, outputs=["y", "z"]), ELIMINATE, bound=0)
    assert [(n.op_type, list(n.input), list(n.output)) for n in result.graph.node] == [
        ("Relu", ["x"], ["y"]),
        ("Neg", ["y"], ["z"]),
    ]


def test_both_public() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Relu", ["x"])]
    assert refused(model(nodes, outputs=["a", "y"]), ELIMINATE) == {"both-public": 1}


def test_what_was_merged_makes_its_readers_equal() -> None:
    nodes = [
        node(op, [f"{source}{i}" if source != "x" else "x"], [f"{target}{i}"])
        for op, source, target in (("Relu", "x", "a"), ("Neg", "a", "b"), ("Exp", "b", "c"))
        for i in (0, 1)
    ]
    result = applied(model([*nodes, node("Sub", ["c0", "c1"])]), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Relu", "Neg", "Exp", "Sub"]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("RandomNormalLike", ["x"], ["a"]), node("RandomNormalLike", ["x"], ["b"])],
        [node("RandomUniform", [], ["a"], shape=[8]), node("RandomUniform", [], ["b"], shape=[8])],
        [node("Bernoulli", ["x"], ["a"]), node("Bernoulli", ["x"], ["b"])],
        [node("LeakyRelu", ["x"], ["a"], alpha=0.0), node("LeakyRelu", ["x"], ["b"], alpha=-0.0)],
        [node("Softmax", ["x"], ["a"], axis=1), node("Softmax", ["x"], ["b"], axis=2)],
        [node("Sub", ["x", "k"], ["a"]), node("Sub", ["k", "x"], ["b"])],
        [node("Clip", ["x", "", "one"], ["a"]), node("Clip", ["x", "one"], ["b"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_what_is_not_the_same_is_no_candidate(nodes: list[onnx.NodeProto]) -> None:
    constants = {"k": np.ones(8, np.float32), "one": np.float32(1)}
    assert refused(model([*nodes, node("Sub", ["a", "b"])], constants=constants), ELIMINATE) == {}


def test_custom_operators_and_dequantization_are_left_alone() -> None:
    nodes = [node("Log", ["x"], ["a"]), node("Log", ["x"], ["b"]), node("Sub", ["a", "b"])]
    for one in nodes[:2]:
        one.domain = "custom"
    assert refused(model(nodes), ELIMINATE) == {}
    nodes = [node("DequantizeLinear", ["q", "s"], [name]) for name in "ab"]
    nodes += [node("Mul", ["a", "b"], ["c"]), node("Add", ["x", "c"])]
    constants = {"q": np.ones(8, np.int8), "s": np.float32(0.5)}
    assert refused(model(nodes, constants=constants), ELIMINATE) == {}


def test_each_body_is_on_its_own() -> None:
    branches = {
        "then_branch": body([node("Relu", ["x"], ["p"])], ["p"]),
        "else_branch": body(
            [node("Relu", ["x"], ["q"]), node("Relu", ["x"], ["r"]), node("Add", ["q", "r"], ["o"])], ["o"]
        ),
    }
    nodes = [node("Relu", ["x"], ["t"]), node("ReduceSum", ["t"], ["s"], keepdims=0)]
    nodes += [node("Cast", ["s"], ["c"], to=9), node("If", ["c"], **branches)]
    result = applied(model(nodes), ELIMINATE, bound=0)
    other, then = (attribute.g for attribute in result.graph.node[-1].attribute)  # by name
    assert op_types(result.graph) == ["Relu", "ReduceSum", "Cast", "If"]
    assert op_types(then) == ["Relu"] and op_types(other) == ["Relu", "Add"]


def test_readers_inside_a_body_follow() -> None:
    branches = {
        "then_branch": body([node("Neg", ["b"], ["p"])], ["p"]),
        "else_branch": body([node("Exp", ["b"], ["q"])], ["q"]),
    }
    nodes = [node("Relu", ["x"], ["a"]), node("Relu", ["x"], ["b"]), node("ReduceSum", ["a"], ["s"], keepdims=0)]
    nodes += [node("Cast", ["s"], ["c"], to=9), node("If", ["c"], **branches)]
    result = applied(model(nodes), ELIMINATE, bound=0)
    assert [list(attribute.g.node[0].input) for attribute in result.graph.node[-1].attribute] == [["a"], ["a"]]


def test_nodes_with_other_outputs_in_use_are_not_one() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["a"], kernel_shape=[2, 2]),
        helper.make_node("MaxPool", ["x"], ["b", "i"], kernel_shape=[2, 2]),
        node("Add", ["a", "b"]),
        node("Cast", ["i"], ["z"], to=1),
    ]
    assert refused(model(nodes, outputs=["y", "z"]), ELIMINATE) == {}


@pytest.mark.parametrize("first", [True, False])
def test_a_fold_comes_before_sharing_in_onnx(first: bool) -> None:
    constants = conv_constants()
    constants["gamma2"] = constants["gamma"] * 2
    nodes = [
        conv("x", "c", "w"),
        batch_norm("c", "p"),
        conv("x", "d", "w"),
        batch_norm("d", "q"),
        node("Add", ["p", "q"]),
    ]
    nodes[3].input[1] = "gamma2"
    passes = [ELIMINATE, FoldBatchNorm()] if first else [FoldBatchNorm(), ELIMINATE]
    result = applied(model(nodes, constants=constants), *passes, bound=1e-6)
    assert op_types(result.graph) == ["Conv", "Conv", "Add"]


def test_one_convolution_for_two_equal_folds() -> None:
    constants = conv_constants()
    nodes = [
        conv("x", "c", "w"),
        batch_norm("c", "p"),
        conv("x", "d", "w"),
        batch_norm("d", "q"),
        node("Add", ["p", "q"]),
    ]
    outcome, result = rewritten(model(nodes, constants=constants), FoldBatchNorm(), ELIMINATE)
    assert len(outcome.applied) == 2

    _, result = rewritten(model(nodes, constants=constants), FoldBatchNorm(), ELIMINATE, EliminateDuplicateConstants())
    assert op_types(result.graph) == ["Conv", "Add"]
    assert len(result.graph.initializer) == 2


# -- torch


def count(module: nn.Module, x: Tensor, host: Any = Traced) -> int:
    """How often it is applied; the function has to be the same, bit for bit, at every call."""
    inputs = [x, x * 2]
    expected = [module(y.clone()) for y in inputs]
    graph = host().build(module, (x.clone(),))
    outcome = pipeline.run(graph, [ELIMINATE])
    assert outcome.missed == []
    result = host().result(graph)
    for y, truth in zip(inputs, expected, strict=True):
        np.testing.assert_array_equal(host().run(result, y.clone()), truth.detach().numpy())
    return len(outcome.applied)


def between(m: Net, x: Tensor) -> Tensor:
    y = x * 2
    a = y + 1
    y.add_(1)
    return a * (y + 1)


def through_a_view(m: Net, x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(-1)
    a = view + 1
    y.mul_(3)
    return a * (view + 1)


def one_result_is_written(m: Net, x: Tensor) -> Tensor:
    a, b = x + 1, x + 1
    return a.mul_(2) + b


def a_view_of_a_result_is_written(m: Net, x: Tensor) -> Tensor:
    a, b = x + 1, x + 1
    a.view(-1).mul_(2)
    return a + b


def inplace_relu(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x), m.conv(x)
    return m.relu(a) - b


@pytest.mark.parametrize(
    "wiring",
    [between, through_a_view, one_result_is_written, a_view_of_a_result_is_written, inplace_relu],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("host", [Traced, Exported], ids=lambda host: host.__name__)
def test_memory_that_is_written_is_left_alone(host: Any, wiring: Any) -> None:
    torch.manual_seed(4)
    module = Net(wiring, conv=nn.Conv2d(4, 4, 1), relu=nn.ReLU(inplace=True)).eval()
    assert count(module, torch.randn(2, 4, 3, 3), host) == 0


class Counter(nn.Module):
    """A buffer that is written at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        before = x + self.steps
        self.steps.add_(1)
        return before * (x + self.steps)


def test_a_buffer_that_is_written() -> None:
    graph = Traced().build(Counter(), ())
    assert pipeline.run(graph, [ELIMINATE]).applied == []


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(), nn.FractionalMaxPool2d(2, output_size=2), nn.RReLU()],
    ids=lambda layer: type(layer).__name__,
)
def test_random_modules_are_left_alone(layer: nn.Module) -> None:
    module = Net(lambda m, x: m.layer(x) - m.layer(x), layer=layer).train()
    assert pipeline.run(Traced().build(module, ()), [ELIMINATE]).applied == []


def test_fractional_pooling_is_random_in_eval_mode_too() -> None:
    module = Net(lambda m, x: m.layer(x) - m.layer(x), layer=nn.FractionalMaxPool2d(2, output_size=2)).eval()
    assert pipeline.run(Traced().build(module, ()), [ELIMINATE]).applied == []


def test_random_functions_are_left_alone() -> None:
    module = Net(lambda m, x: torch.rand_like(x) - torch.rand_like(x) + torch.bernoulli(x) * torch.bernoulli(x))
    x = torch.rand(2, 3)
    for host in (Traced, Exported):
        assert pipeline.run(host().build(module, (x,)), [ELIMINATE]).applied == []


def test_a_hooked_module_is_called_as_often_as_before() -> None:
    module = Net(twice, conv=nn.Conv2d(4, 6, 3)).eval()
    module.conv.register_forward_hook(lambda *_: None)
    assert count(module, torch.randn(2, 4, 8, 8)) == 0


def a_switch(on: int) -> None:
    """Anybody's code: it could switch autocast on."""


def test_anybodys_code_between_them() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_module("conv", (x,))
    graph.call_function(a_switch, (1,))
    graph.output(graph.call_function(torch.add, (a, graph.call_module("conv", (x,)))))
    root = torch.fx.GraphModule(nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1)}), graph).eval()
    assert pipeline.run(TorchGraph.from_graph_module(root), [ELIMINATE]).applied == []


def test_two_outputs_stay_two_tensors() -> None:
    """A caller that writes into one of them must not see it in the other."""

    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(x), torch.relu(x)

    class View(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(x).view(-1), torch.relu(x)

    for module in (Both(), View()):
        for host in (Traced, Exported):
            outcome = pipeline.run(host().build(module, (torch.ones(2, 2),)), [ELIMINATE])
            assert [remark.code for remark in (*outcome.applied, *outcome.missed)] == ["both-public"]
