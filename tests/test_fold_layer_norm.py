"""fold-layer-norm: what a normalization multiplies and adds moves into its readers, on ONNX and torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fuser.passes.eliminate_identity import EliminateIdentity
from fuser.passes.fold_affine import FoldAffine
from fuser.passes.fold_layer_norm import FoldLayerNorm
from hosts import HOSTS, Onnx
from hosts_torch import Decomposed, Exported, Lifted, Traced
from nets import NORMS, Case, lively
from onnx_models import model, node, op_types
from rewriting import DOUBLE, applied, refused, rewritten
from torch import nn

import fuser
from fuser import pipeline

FOLD = FoldLayerNorm()
PASSES = (EliminateIdentity(), FOLD)
RNG = np.random.default_rng(14)


# -- the specification


@pytest.fixture(params=HOSTS, ids=lambda host: host.__name__)
def host(request: pytest.FixtureRequest) -> Any:
    return request.param()


def prepared(case: Case, host: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(2)
    module, x = lively(case.build()), torch.randn(case.shape)
    return (module, x) if isinstance(host, Onnx) else (module.double(), x.double())


def expected(case: Case, host: Any) -> dict[str, int]:
    codes = case.elsewhere.get(type(host).__name__, case.codes)
    if codes is None:
        pytest.skip("this host cannot hold such a net")
    return codes


@pytest.mark.parametrize("name", NORMS)
def test_the_remarks_and_the_function(host: Any, name: str) -> None:
    case = NORMS[name]
    codes = expected(case, host)
    module, x = prepared(case, host)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    graph = host.build(module, (x,))
    before = graph.summary()

    outcome = pipeline.run(graph, PASSES)
    remarks = [r for r in (*outcome.applied, *outcome.missed) if r.pass_name == FOLD.name]
    assert Counter(r.code for r in remarks) == codes
    assert not pipeline.run(graph, PASSES).applied, "a second run found something to do"
    after = graph.summary()
    assert sum(after.ops.values()) <= sum(before.ops.values())
    assert (after.parameters < before.parameters) == ("applied" in codes)

    found = host.run(host.result(graph), x)
    truth = module.double()(x.double()).detach().numpy()
    bound = 3e-6 if isinstance(host, Onnx) else 1e-12
    assert np.abs(found - truth).max() <= bound * np.abs(truth).max()
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key].double()), f"{key} of the user's module was changed"


@pytest.mark.parametrize("name", [name for name, case in NORMS.items() if "applied" not in case.codes])
def test_refusing_changes_nothing(host: Any, name: str) -> None:
    if "applied" in expected(NORMS[name], host):
        return
    module, x = prepared(NORMS[name], host)
    before = host.run(host.result(host.build(module, (x,))), x)
    graph = host.build(module, (x,))
    assert not pipeline.run(graph, [FOLD]).applied
    np.testing.assert_array_equal(host.run(host.result(graph), x), before)


# -- torch: what is left of the normalization


class Functional(nn.Module):
    """Every way to call a normalization of the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.linears = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

    def forward(self, x: torch.Tensor) -> Any:
        w, b, f = self.weight, self.bias, self.linears
        x = f[0](nn.functional.layer_norm(x, (6,), w, b))
        x = f[1](nn.functional.layer_norm(x, [6], bias=b, eps=0.1))
        x = f[2](torch.layer_norm(x, (6,), w, b, 0.1))
        x = f[3](nn.functional.rms_norm(x, (6,), weight=w))
        return f[4](torch.native_layer_norm(x, (6,), w, b, 0.1)[0])


@pytest.mark.parametrize("host", [Traced, Exported, Lifted, Decomposed])
def test_functional_calls(host: Any) -> None:
    torch.manual_seed(0)
    module, x = Functional().double().eval(), torch.randn(2, 3, 6).double()
    graph = host().build(module, (x,))
    outcome = pipeline.run(graph, [FOLD, FoldAffine()])
    assert len(outcome.applied) >= 5 - (host is Traced)  # torch.native_layer_norm is nobody's API
    assert not [r for r in outcome.missed if r.pass_name == FOLD.name]
    after = host().run(host().result(graph), x)
    np.testing.assert_allclose(after, module(x).detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6)])
def test_a_module_says_that_it_has_no_parameters(norm: nn.Module) -> None:
    grouped = isinstance(norm, nn.GroupNorm)
    before, after = (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)) if grouped else (nn.Linear(6, 6), nn.Linear(6, 4))
    module = lively(nn.Sequential(before, norm, after))
    graph = Traced().build(module, (torch.zeros(1),))
    pipeline.run(graph, [FOLD])
    (left,) = (m for m in graph.result().modules() if type(m) is type(norm))
    assert left.state_dict() == {}
    assert "affine=False" in str(left)
    assert "affine=True" in str(norm)


def test_a_norm_called_twice_keeps_its_parameters_for_the_call_that_needs_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> Any:
            return torch.tanh(self.norm(self.linear(self.norm(x))))

    module, x = lively(Twice()).double(), torch.randn(2, 6).double()
    for host in (Traced(), Exported(), Lifted()):
        graph = host.build(module, (x,))
        outcome = pipeline.run(graph, [FOLD])
        assert [r.code for r in (*outcome.applied, *outcome.missed)] == ["applied", "no-linear"]
        after = host.run(host.result(graph), x)
        np.testing.assert_allclose(after, module(x).detach(), rtol=1e-12, atol=1e-13)


def test_hooks() -> None:
    for hooked in (0, 1):
        module = lively(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)))
        module[hooked].register_forward_hook(lambda *_: None)
        graph = Traced().build(module, (torch.zeros(2, 6),))
        assert [remark.code for remark in FOLD.run(graph)] == ["hooks"]


def test_an_output_that_is_written_in_place_stays() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.norm(x)
            z = self.linear(y)
            y.narrow(1, 0, 1).mul_(2)
            return z + self.linear(y)

    module, x = lively(Written()).double(), torch.randn(2, 6).double()
    for host in (Traced(), Exported()):
        assert [remark.code for remark in FOLD.run(host.build(module, (x,)))] == ["written"]


def test_an_rms_norm_that_promotes_is_left_alone() -> None:
    """Its scale makes float32 of bfloat16."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(self.norm(x))

    for host in (Exported(), Traced()):
        graph = host.build(Mixed().eval(), (torch.randn(2, 6, dtype=torch.bfloat16),))
        assert FOLD.run(graph) == []


def test_half_precision_is_rounded_once() -> None:
    module = lively(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8))).bfloat16()
    x = torch.randn(16, 64).bfloat16()
    graph = Exported().build(module, (x,))
    assert pipeline.run(graph, [FOLD]).applied
    truth = module.double()(x.double()).detach()
    error = (graph.result()(x).double() - truth).abs().max()
    own = (module.bfloat16()(x).double() - truth).abs().max()
    assert error <= 2 * own


# -- ONNX


def products(norm: list[str], count: int = 2, biased: int = 2, **attributes: Any) -> list[onnx.NodeProto]:
    """A LayerNormalization that products read, the first of them with a bias."""
    nodes = [node("LayerNormalization", norm, ["n"], **attributes)]
    for i in range(count):
        nodes.append(node("MatMul", ["n", f"m{i}"], [f"p{i}"]))
        if i < biased:
            nodes.append(node("Add", [f"p{i}", f"b{i}"], [f"q{i}"]))
    nodes.append(node("Mul", [f"q{i}" if i < biased else f"p{i}" for i in range(count)]))
    return nodes


def double(nodes: list[onnx.NodeProto], x: Any = ("N", 5, 6), outputs: Any = ("y",), **tensors: Any) -> Any:
    constants = {name: RNG.standard_normal((6, 4)) for name in ("m0", "m1")}
    constants |= {"b0": RNG.standard_normal(4), "b1": RNG.standard_normal(4)}
    constants |= {"g": RNG.standard_normal(6), "b": RNG.standard_normal(6)}
    return model(nodes, constants={**constants, **tensors}, dtype=DOUBLE, x=x, outputs=outputs)


def test_only_the_shift_moves() -> None:
    proto = double(products(["x", "g", "b"]))
    result = applied(proto, FOLD)
    assert list(result.graph.node[0].input) == ["x", "g"]
    before, after = ({t.name: t for t in m.graph.initializer} for m in (proto, result))
    for name in ("g", "m0", "m1"):
        assert before[name] == after[name]
    assert "b" not in after


def test_a_shift_of_zero_goes_whoever_reads_it() -> None:
    nodes = [node("LayerNormalization", ["x", "g", "b"], ["n"]), node("Neg", ["n"])]
    result = applied(double(nodes, b=np.zeros(6)), FOLD)
    assert list(result.graph.node[0].input) == ["x", "g"]


def test_shared_constants_count_as_they_are_stored() -> None:
    """The readers' one bias is read elsewhere, so each of them would need a new one."""
    nodes = products(["x", "g", "b"])
    nodes[4].input[1] = "b0"
    assert refused(double(nodes), FOLD) == {"grows": 1}
    assert refused(double(products(["x", "g", "b"], biased=1)), FOLD) == {"grows": 1}


def test_the_refusals_of_the_walk() -> None:
    nodes = products(["x", "g", "b"])
    assert refused(double(nodes, outputs=("y", "n")), FOLD) == {"no-linear": 1}
    proto = double(nodes)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("b", DOUBLE, [6]))
    assert refused(proto, FOLD) == {"overridable": 1}
    proto = double(nodes)
    proto.graph.initializer.remove(next(t for t in proto.graph.initializer if t.name == "b"))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("b", DOUBLE, [6]))
    assert refused(proto, FOLD) == {"not-constant": 1}
    assert refused(double(nodes, b=RNG.standard_normal((5, 6))), FOLD) == {"shape-mismatch": 1}
    turned = [nodes[0], node("Transpose", ["n"], ["t"], perm=[0, 2, 1]), node("MatMul", ["t", "m"], ["p"])]
    turned.append(node("Add", ["p", "b0"]))
    assert refused(double(turned, m=RNG.standard_normal((5, 4))), FOLD) == {"axis-mismatch": 1}


def test_not_finite() -> None:
    nodes = [*products(["x", "g", "b"], count=1, biased=1)[:-1], node("Neg", ["q0"])]
    half = {"m0": np.full((6, 4), 6e4, np.float16), "b0": np.zeros(4, np.float16)}
    half |= {"g": np.ones(6, np.float16), "b": np.full(6, 6e4, np.float16)}
    assert refused(model(nodes, constants=half, dtype=onnx.TensorProto.FLOAT16, x=(2, 6)), FOLD) == {"not-finite": 1}


def test_shared_weights() -> None:
    """A small copy is worth it, unless copies were not wanted."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(self.norm(x)) + self.linear(x)

    module = lively(Heads())
    for shared, code in (("refuse", "shared-weights"), ("copy", "applied")):
        graph = Traced().build(module, (torch.zeros(2, 6),))
        (remark,) = FoldLayerNorm(shared_weights=shared).run(graph)
        assert remark.code == code
    assert "copy" in remark.reason


def test_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the algebra wrong, the fold would refuse."""
    monkeypatch.setattr("fuser.affine.carried", lambda weight, shift, layout: np.ones(4))
    assert refused(double(products(["x", "g", "b"])), FOLD) == {"unsound": 1}


@pytest.mark.parametrize("axis", [-1, 2, -2, 1])
def test_the_axis_of_the_normalization(axis: int) -> None:
    tensors = {} if axis in (-1, 2) else {"g": RNG.standard_normal((5, 6)), "b": RNG.standard_normal((5, 6))}
    _, result = rewritten(double(products(["x", "g", "b"], axis=axis), **tensors), FOLD)
    assert (len(result.graph.node[0].input) == 2) == (axis in (-1, 2))


def test_statistics_that_are_read_stay() -> None:
    nodes = products(["x", "g", "b"])
    nodes[0].output.extend(["mean", "deviation"])
    result = applied(double(nodes, outputs=("y", "mean")), FOLD)
    assert list(result.graph.node[0].output) == ["n", "mean", "deviation"]
    assert list(result.graph.node[0].input) == ["x", "g"]


def test_a_decomposed_norm_loses_its_arithmetic() -> None:
    nodes = [
        node("ReduceMean", ["x"], ["m"], axes=[-1]),
        node("Sub", ["x", "m"], ["d"]),
        node("Mul", ["d", "d"], ["s"]),
        node("ReduceMean", ["s"], ["v"], axes=[-1]),
        node("Add", ["v", "epsilon"], ["w"]),
        node("Sqrt", ["w"], ["r"]),
        node("Div", ["d", "r"], ["n"]),
        node("Mul", ["n", "g"], ["h"]),
        node("Add", ["h", "b"], ["o"]),
        node("MatMul", ["o", "m0"], ["p"]),
        node("Add", ["p", "b0"]),
    ]
    _, result = rewritten(double(nodes, x=(2, 5, 6), epsilon=np.array(1e-5)), FOLD, FoldAffine())
    assert op_types(result.graph)[-3:] == ["Div", "MatMul", "Add"]


# -- a transformer, held to float64 by the gate


class Block(nn.Module):
    """A pre-norm block of a transformer: attention and two layers, each behind a norm."""

    def __init__(self, norm: type[nn.Module], bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(8), norm(8)
        self.qkv, self.out = nn.Linear(8, 24, bias=bias), nn.Linear(8, 8, bias=bias)
        self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        y: torch.Tensor = x + self.down(nn.functional.silu(self.up(self.norm2(x))))
        return y


@pytest.mark.parametrize(("norm", "bias"), [(nn.LayerNorm, True), (nn.RMSNorm, False)])
def test_a_transformer_passes_the_gate(norm: Any, bias: bool) -> None:
    torch.manual_seed(4)
    module, x = lively(nn.Sequential(*(Block(norm, bias) for _ in range(2)))), torch.randn(2, 5, 8)
    result = fuser.optimize(module, example_inputs=(x,))
    folded = [r for r in result.report.applied if r.pass_name == FOLD.name]
    assert len(folded) == 4
    torch.testing.assert_close(result.model(x), module(x))
