"""merge-linears: one linear operator after another becomes one, on ONNX and torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fuser.passes.eliminate_identity import EliminateIdentity
from fuser.passes.fold_batch_norm import FoldBatchNorm
from fuser.passes.merge_linears import MergeLinears
from hosts import HOSTS, Onnx
from hosts_torch import Exported, Lifted, Traced
from nets import PAIRS, Case, lively
from onnx_models import body, conv, model, node, op_types
from rewriting import DOUBLE, applied, evaluate, refused, rewritten
from torch import nn

import fuser
from fuser import pipeline
from fuser.graphs.torch.graph import TorchGraph

MERGE = MergeLinears()
PASSES = (EliminateIdentity(), FoldBatchNorm(), MERGE)
RNG = np.random.default_rng(15)


# -- the specification


@pytest.fixture(params=HOSTS, ids=lambda host: host.__name__)
def host(request: pytest.FixtureRequest) -> Any:
    return request.param()


def prepared(case: Case, host: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    module, x = lively(case.build()), torch.randn(case.shape)
    return (module, x) if isinstance(host, Onnx) else (module.double(), x.double())


def expected(case: Case, host: Any) -> dict[str, int]:
    codes = case.elsewhere.get(type(host).__name__, case.codes)
    assert codes is not None
    return codes


@pytest.mark.parametrize("name", PAIRS)
def test_the_remarks_and_the_function(host: Any, name: str) -> None:
    case = PAIRS[name]
    module, x = prepared(case, host)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    graph = host.build(module, (x,))
    before = graph.summary()
    outcome = pipeline.run(graph, PASSES)
    remarks = [r for r in (*outcome.applied, *outcome.missed) if r.pass_name == MERGE.name]
    assert Counter(r.code for r in remarks) == expected(case, host)
    assert not pipeline.run(graph, PASSES).applied, "a second run found something to do"
    merges = sum(r.applied for r in remarks)
    after = graph.summary()
    assert sum(after.ops.values()) <= sum(before.ops.values()) - merges
    assert after.parameters < before.parameters if merges else True

    found = host.run(host.result(graph), x)
    truth = module.double()(x.double()).detach().numpy()
    bound = 3e-6 if isinstance(host, Onnx) else 1e-12
    assert found.shape == truth.shape
    assert np.abs(found - truth).max() <= bound * np.abs(truth).max()
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key].to(value)), f"{key} of the user's module was changed"


@pytest.mark.parametrize("name", [name for name, case in PAIRS.items() if "applied" not in case.codes])
def test_refusing_changes_nothing(host: Any, name: str) -> None:
    module, x = prepared(PAIRS[name], host)
    before = host.run(host.result(host.build(module, (x,))), x)
    graph = host.build(module, (x,))
    assert not pipeline.run(graph, [MERGE]).applied
    np.testing.assert_array_equal(host.run(host.result(graph), x), before)


# -- what is said of sizes stays true


@pytest.mark.parametrize("name", [name for name, case in PAIRS.items() if "applied" in case.codes])
@pytest.mark.parametrize("host", [Exported, Lifted])
def test_what_nodes_say_of_their_values_is_true(host: Any, name: str) -> None:
    """Recorded shapes and layouts are those of a new export of the result."""
    module, x = prepared(PAIRS[name], host())
    graph = host().build(module, (x,))
    pipeline.run(graph, PASSES)
    result = host().result(graph)
    program = result if host is Lifted else torch.export.export(result, (x,))
    nodes = (result.graph_module if host is Lifted else result).graph.nodes
    interpreted = torch.fx.Interpreter(result.graph_module if host is Lifted else result)
    seen: dict[str, Any] = {}
    run_node = interpreted.run_node
    interpreted.run_node = lambda n: seen.setdefault(n.name, run_node(n))  # type: ignore[method-assign]
    flat = [*program.state_dict.values(), x] if host is Lifted else [x]
    interpreted.run(*flat)
    for n in nodes:
        value = n.meta.get("val")
        if n.op == "call_function" and isinstance(value, torch.Tensor):
            assert (value.shape, value.stride()) == (seen[n.name].shape, seen[n.name].stride()), n


def test_a_module_says_its_new_sizes() -> None:
    module = nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 6, 3, groups=2, padding=1), nn.ReLU(), nn.Flatten(2),
        nn.Linear(36, 20), nn.Linear(20, 5),
    ).eval()  # fmt: skip
    graph = Traced().build(module, (torch.zeros(1),))
    pipeline.run(graph, [MERGE])
    layers = [m for m in graph.result().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [str(layer)[:24] for layer in layers if isinstance(layer, nn.Linear)] == ["Linear(in_features=36, o"]
    assert next(m for m in layers if isinstance(m, nn.Linear)).out_features == 5
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape == (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def test_shape_propagation_is_forgotten_where_it_is_no_longer_true() -> None:
    from torch.fx.passes.shape_prop import ShapeProp

    x = torch.randn(3, 6)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval())
    ShapeProp(traced).propagate(x)
    graph = TorchGraph.from_graph_module(traced)
    assert pipeline.run(graph, [MERGE]).applied
    for n in graph.result().graph.nodes:
        recorded = n.meta.get("tensor_meta")
        assert n.op != "call_module" or recorded is None or recorded.shape == (3, 3)


def test_channels_last_weights_stay_so() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 3, 1)).to(memory_format=torch.channels_last).eval()
    graph = Traced().build(module, (torch.zeros(1),))
    pipeline.run(graph, [MERGE])
    (weight,) = (m.weight for m in graph.result().modules() if isinstance(m, nn.Conv2d))
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


# -- ONNX


def tensors(**shapes: Any) -> dict[str, np.ndarray]:
    return {name: RNG.standard_normal(shape) for name, shape in shapes.items()}


CONSTANTS = tensors(m=(6, 8), n=(8, 3), mt=(8, 6), nt=(3, 8), a=8, b=3)


def gemm_pair(x: Any = (5, 6), **attributes: Any) -> Any:
    nodes = [
        node("Gemm", ["x", "mt" if attributes.get("transB") else "m", "a"], ["h"], **attributes),
        node("Gemm", ["h", "nt", "b"], transB=1, alpha=2.0, beta=0.25),
    ]
    return model(nodes, constants=CONSTANTS, dtype=DOUBLE, x=x)


@pytest.mark.parametrize(
    ("x", "attributes"),
    [((5, 6), {}), ((5, 6), {"transB": 1, "alpha": -3.0, "beta": 0.5}), ((6, 5), {"transA": 1})],
)
def test_gemms_of_every_kind(x: Any, attributes: Any) -> None:
    result = applied(gemm_pair(x, **attributes), MERGE)
    assert op_types(result.graph) == ["Gemm"]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("stated", [False, True])
def test_products_with_and_without_a_bias(first: int, second: int, stated: bool) -> None:
    """Of a MatMul with an Add, either may carry names and shapes that are no longer true."""
    nodes = [node("MatMul", ["x", "m"], ["p"])]
    if first:
        nodes.append(node("Add", ["p", "a"], ["h"]))
    nodes.append(node("MatMul", ["h" if first else "p", "n"], ["q"]))
    if second:
        nodes.append(node("Add", ["b", "q"], ["r"]))
    nodes.append(node("Relu", ["r" if second else "q"]))
    proto = model(nodes, constants=CONSTANTS, dtype=DOUBLE, x=("N", 5, 6))
    if stated:
        proto.graph.value_info.extend(onnx.shape_inference.infer_shapes(proto).graph.value_info)
    result = applied(proto, MERGE)
    assert op_types(result.graph) == ["MatMul", *["Add"] * (first or second), "Relu"]
    onnx.checker.check_model(result, full_check=True)
    shapes = onnx.shape_inference.infer_shapes(result, strict_mode=True, data_prop=True)
    sizes = {info.name: info.type.tensor_type.shape.dim[-1].dim_value for info in shapes.graph.value_info}
    assert set(sizes.values()) == {3}


def convs(first: Any, second: Any, **constants: Any) -> Any:
    nodes = [node("Relu", ["x"], ["r"]), conv("r", "h", *first[0], **first[1]), conv("h", "y", *second[0], **second[1])]
    proto = model(nodes, constants=constants, dtype=DOUBLE)
    proto.graph.value_info.extend(onnx.shape_inference.infer_shapes(proto).graph.value_info)
    return proto


def test_the_names_and_shapes_around_a_convolution_that_goes() -> None:
    """What made its input must not take over its name, which may be of another size."""
    weights = tensors(p=(8, 4, 1, 1), w=(3, 8, 3, 3), c=8)
    result = applied(convs((["p", "c"], {}), (["w"], {}), **weights), MERGE)
    assert op_types(result.graph) == ["Relu", "Conv"]
    onnx.checker.check_model(result, full_check=True)
    assert list(result.graph.node[0].output) == ["r"]
    assert result.graph.node[1].name == "conv_y"
    assert "conv_h" in result.graph.node[1].doc_string  # where it came from


def test_automatic_padding_of_the_one_that_stays() -> None:
    same = {"auto_pad": "SAME_UPPER", "strides": [2, 2]}
    weights = tensors(p=(3, 8, 1, 1), w=(8, 4, 3, 3), c=8)
    applied(convs((["w", "c"], same), (["p"], {}), **weights), MERGE)
    weights = tensors(p=(8, 4, 1, 1), w=(8, 8, 3, 3))
    applied(convs((["p"], {}), (["w"], same), **weights), MERGE)
    biased = tensors(p=(8, 4, 1, 1), w=(8, 8, 3, 3), c=8)
    assert refused(convs((["p", "c"], {}), (["w"], same), **biased), MERGE) == {"padding": 1}


def test_multiplications_are_counted_by_position() -> None:
    """A padding that enlarges makes the second one work on more positions than the first one has."""
    weights = tensors(p=(5, 6, 1, 1), w=(4, 5, 2, 2))
    nodes = [conv("x", "h", "p"), conv("h", "y", "w", pads=[2, 2, 2, 2])]
    proto = model(nodes, constants=weights, dtype=DOUBLE, x=("N", 6, 5, 5))
    assert refused(proto, MERGE) == {"grows": 1}
    nodes[1] = conv("h", "y", "w", pads=[0, 1, 1, 0])
    applied(model(nodes, constants=weights, dtype=DOUBLE, x=("N", 6, 5, 5)), MERGE)


def test_a_shared_weight_is_not_freed() -> None:
    nodes = [
        node("MatMul", ["x", "m"], ["h"]),
        node("MatMul", ["h", "n"], ["p"]),
        node("MatMul", ["x", "m"], ["o"]),
        node("Relu", ["o"], ["k"]),
        node("MatMul", ["k", "n"], ["q"]),
        node("Max", ["p", "q"]),
    ]
    assert refused(model(nodes, constants=CONSTANTS, dtype=DOUBLE, x=(5, 6)), MERGE) == {"grows": 1}


def test_numbers_that_stay_for_others_are_not_counted() -> None:
    """18 numbers are fewer than 24 and 12, and more than the 12 that would go."""
    nodes = [
        node("MatMul", ["x", "k"], ["h"]),
        node("MatMul", ["h", "l"], ["p"]),
        node("Relu", ["x"], ["r"]),
        node("MatMul", ["r", "k"], ["q"]),
        node("Concat", ["p", "q"], axis=1),
    ]
    proto = model(nodes, constants=tensors(k=(6, 4), l=(4, 3)), dtype=DOUBLE, x=(5, 6))
    assert refused(proto, MERGE) == {"grows": 1}


def test_what_is_not_constant() -> None:
    for name in ("m", "n"):
        proto = model(
            [node("MatMul", ["x", "m"], ["h"]), node("MatMul", ["h", "n"])],
            constants={k: v for k, v in CONSTANTS.items() if k != name},
            dtype=DOUBLE,
            x=(5, 6),
        )
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, DOUBLE, CONSTANTS[name].shape))
        assert refused(proto, MERGE) in ({"not-constant": 1}, {})
        proto = model(
            [node("MatMul", ["x", "m"], ["h"]), node("MatMul", ["h", "n"])],
            constants=CONSTANTS,
            dtype=DOUBLE,
            x=(5, 6),
            also_inputs=[name],
        )
        assert refused(proto, MERGE) == {"overridable": 1}


def test_shape_mismatch() -> None:
    proto = gemm_pair()
    rows = next(t for t in proto.graph.initializer if t.name == "a")
    rows.CopyFrom(onnx.numpy_helper.from_array(RNG.standard_normal((5, 8)), "a"))
    assert refused(proto, MERGE) == {"shape-mismatch": 1}


def test_type() -> None:
    """Of integers, and of complex numbers, whose imaginary parts float64 would drop."""
    whole = {name: RNG.integers(0, 9, (6, 6)) for name in ("m", "n")}
    nodes = [node("MatMul", ["x", "m"], ["h"]), node("MatMul", ["h", "n"])]
    assert refused(model(nodes, constants=whole, dtype=onnx.TensorProto.INT64, x=(5, 6)), MERGE) == {"type": 1}
    net = nn.Sequential(nn.Linear(6, 6, dtype=torch.complex64), nn.Linear(6, 6, dtype=torch.complex64))
    x = torch.randn(3, 6, dtype=torch.complex64)
    for options in ({}, {"example_inputs": (x,)}):
        result = fuser.optimize(net, verify=False, **options)
        assert [(r.pass_name, r.code) for r in result.report.missed] == [("merge-linears", "type")]
        assert torch.equal(result.model(x), net(x))


def test_axis_mismatch() -> None:
    nodes = [node("Gemm", ["x", "m"], ["h"]), node("Gemm", ["h", "k"], transA=1)]
    proto = model(nodes, constants={**CONSTANTS, **tensors(k=(8, 3))}, dtype=DOUBLE, x=(8, 6))
    assert refused(proto, MERGE) == {"axis-mismatch": 1}


def test_not_finite() -> None:
    half = {name: np.full(CONSTANTS[name].shape, 6e4, np.float16) for name in ("m", "n")}
    nodes = [node("MatMul", ["x", "m"], ["h"]), node("MatMul", ["h", "n"])]
    assert refused(model(nodes, constants=half, dtype=onnx.TensorProto.FLOAT16, x=(5, 6)), MERGE) == {"not-finite": 1}


def test_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the algebra wrong, the merge would refuse."""
    right = fuser.products._turned
    monkeypatch.setattr("fuser.products._turned", lambda weight, groups: right(weight, groups) * 1.001)
    assert refused(gemm_pair(), MERGE) == {"unsound": 1}


def test_an_operator_in_a_body_runs_at_another_time() -> None:
    branch = body([node("MatMul", ["h", "n"], ["then"])], ["then"])
    other = body([node("MatMul", ["x", "o"], ["else"])], ["else"])
    nodes = [
        node("MatMul", ["x", "m"], ["h"]),
        node("If", ["condition"], then_branch=branch, else_branch=other),
    ]
    constants = {**CONSTANTS, **tensors(o=(6, 3)), "condition": np.array(True)}
    assert refused(model(nodes, constants=constants, dtype=DOUBLE, x=(5, 6)), MERGE) == {}


def test_inside_a_body() -> None:
    inner = [node("MatMul", ["x", "m"], ["h"]), node("MatMul", ["h", "n"], ["then"])]
    other = body([node("MatMul", ["x", "o"], ["else"])], ["else"])
    nodes = [node("If", ["condition"], then_branch=body(inner, ["then"]), else_branch=other)]
    constants = {**CONSTANTS, **tensors(o=(6, 3)), "condition": np.array(True)}
    proto = model(nodes, constants=constants, dtype=DOUBLE, x=(5, 6))
    outcome, result = rewritten(proto, MERGE)
    assert len(outcome.applied) == 1
    np.testing.assert_allclose(evaluate(result), evaluate(proto), rtol=1e-12, atol=1e-12)


# -- torch


def test_hooks() -> None:
    for hooked in (0, 1):
        module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval()
        module[hooked].register_forward_hook(lambda *_: None)
        graph = Traced().build(module, (torch.zeros(2, 6),))
        assert [remark.code for remark in MERGE.run(graph)] == ["hooks"]


@pytest.mark.parametrize("host", [Traced, Exported])
def test_written(host: Any) -> None:
    """The convolution that stays would read its input later than the one that goes."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            x = torch.sigmoid(x)
            y = self.one(x)
            x.sub_(0.5)
            return self.two(y) + x.sum()

    module, x = Written().double().eval(), torch.randn(1, 4, 5, 5).double()
    graph = host().build(module, (x,))
    assert [remark.code for remark in MERGE.run(graph)] == ["written"]
    np.testing.assert_allclose(host().run(host().result(graph), x), module(x).detach(), rtol=1e-12)


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).bfloat16().eval(), torch.randn(16, 64).bfloat16()
    graph = Exported().build(module, (x,))
    assert pipeline.run(graph, [MERGE]).applied
    found = graph.result()(x).double()
    own = module(x).double()
    truth = module.double()(x.double()).detach()
    assert (found - truth).abs().max() <= 2 * (own - truth).abs().max()


def test_a_head_of_several_layers_passes_the_gate() -> None:
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 16), nn.Dropout(), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    result = fuser.optimize(module, example_inputs=(x,))
    assert [r.pass_name for r in result.report.applied].count(MERGE.name) == 3
    torch.testing.assert_close(result.model(x), module(x))
