"""merge-branches: blocks that their authors forgot to reparameterize, on ONNX and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fuser.passes.fold_affine import FoldAffine
from fuser.passes.fold_batch_norm import FoldBatchNorm
from fuser.passes.merge_branches import MergeBranches
from hosts import Onnx
from hosts_torch import HOSTS, Decomposed, Exported, Lifted, Traced
from nets import lively
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types
from rewriting import DOUBLE, applied, evaluate, refused, rewritten
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

from fuser import pipeline
from fuser.graphs.torch.graph import TorchGraph

MERGE = MergeBranches()
RNG = np.random.default_rng(12)
SAME: dict[str, Any] = {"pads": [1, 1, 1, 1]}


def double(nodes: list[onnx.NodeProto], **tensors: Any) -> onnx.ModelProto:
    constants = {**conv_constants(dtype=np.float64), "p": RNG.standard_normal((4, 4, 1, 1)), **tensors}
    return model(nodes, constants=constants, dtype=DOUBLE)


# -- merged


@pytest.mark.parametrize("operator", ["Add", "Sub"])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_smaller_kernel(operator: str, order: tuple[str, str]) -> None:
    nodes = [conv("x", "a", **SAME), conv("x", "b", "p"), node(operator, list(order))]
    result = applied(double(nodes), MERGE)
    assert op_types(result.graph) == ["Conv"]


@pytest.mark.parametrize("operator", ["Add", "Sub"])
@pytest.mark.parametrize("order", [("a", "x"), ("x", "a")])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_input_itself(operator: str, order: tuple[str, str], groups: int) -> None:
    nodes = [conv("x", "a", "g", group=groups, **SAME), node(operator, list(order))]
    result = applied(double(nodes, g=RNG.standard_normal((4, 4 // groups, 3, 3))), MERGE)
    assert op_types(result.graph) == ["Conv"]


def test_a_chain_of_maps() -> None:
    nodes = [
        conv("x", "a", **SAME),
        batch_norm("x", "n"),
        node("Mul", ["k", "n"], ["m"]),
        node("Sub", ["one", "m"], ["o"]),
        node("Add", ["a", "o"]),
    ]
    proto = double(nodes, k=RNG.standard_normal((4, 1, 1)), one=np.array(1.0))
    assert op_types(applied(proto, MERGE).graph) == ["Conv"]


def test_strided_branches_and_a_depthwise_one() -> None:
    nodes = [
        conv("x", "a", strides=[2, 2], **SAME),
        conv("x", "b", "d", strides=[2, 2], group=4),
        node("Add", ["a", "b"]),
    ]
    assert op_types(applied(double(nodes, d=RNG.standard_normal((4, 1, 1, 1))), MERGE).graph) == ["Conv"]


COUNTED: dict[str, Any] = {"kernel_shape": [3, 3], "count_include_pad": 1, **SAME}


@pytest.mark.parametrize("operator", ["Add", "Sub"])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_an_average(operator: str, order: tuple[str, str], groups: int, stride: int, kernel: int) -> None:
    ends = [1, 1] if kernel == 3 else [0, 0]
    how = {**COUNTED, "kernel_shape": [kernel] * 2, "pads": [1, 1, *ends], "strides": [stride] * 2}
    nodes = [
        conv("x", "a", "g", group=groups, strides=[stride] * 2, **SAME),
        node("AveragePool", ["x"], ["b"], **how),
        node(operator, list(order)),
    ]
    result = applied(double(nodes, g=RNG.standard_normal((4, 4 // groups, 3, 3))), MERGE)
    assert op_types(result.graph) == ["Conv"]


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("residual", [False, True])
def test_matrix_products(turned: int, residual: bool) -> None:
    nodes = [
        node("Gemm", ["x", "m", "c"], ["a"], alpha=0.5, beta=2.0, transB=turned),
        node("MatMul", ["x", "n"], ["b"]),
        node("Add", ["a", "b"], ["s" if residual else "y"]),
    ]
    if residual:
        nodes.append(node("Add", ["s", "x"]))
    tensors = {"m": RNG.standard_normal((4, 4)), "n": RNG.standard_normal((4, 4)), "c": RNG.standard_normal(4)}
    proto = model(nodes, constants=tensors, dtype=DOUBLE, x=(3, 4))
    assert op_types(applied(proto, MERGE).graph) == ["Gemm"]


def test_a_guest_that_others_read_stays_for_them() -> None:
    nodes = [
        conv("x", "a", **SAME),
        conv("x", "b", "p"),
        node("Add", ["a", "b"], ["s"]),
        node("Mul", ["s", "b"]),
    ]
    result = applied(double(nodes), MERGE)
    assert sorted(op_types(result.graph)) == ["Conv", "Conv", "Mul"]


ADAPTERS = {
    "matrices": [
        node("MatMul", ["x", "m"], ["a"]),
        node("MatMul", ["x", "down"], ["d"]),
        node("MatMul", ["d", "up"], ["u"]),
        node("Mul", ["u", "two"], ["s"]),
        node("Add", ["s", "a"]),
    ],
    "with-biases": [
        node("Gemm", ["x", "m", "k"], ["a"]),
        node("Gemm", ["x", "down", "e"], ["d"]),
        node("Gemm", ["d", "up", "k"], ["u"]),
        node("Sub", ["a", "u"]),
    ],
    "scaled-in-between": [
        node("MatMul", ["x", "m"], ["a"]),
        node("Mul", ["x", "k"], ["p"]),
        node("MatMul", ["p", "down"], ["d"]),
        node("Add", ["d", "e"], ["f"]),
        node("MatMul", ["f", "up"], ["u"]),
        node("Add", ["a", "u"]),
    ],
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_low_rank(name: str) -> None:
    shapes = {"m": (8, 8), "down": (8, 2), "up": (2, 8), "k": 8, "e": 2}
    tensors = {name: RNG.standard_normal(shape) for name, shape in shapes.items()} | {"two": np.array(2.0)}
    proto = model(ADAPTERS[name], constants=tensors, dtype=DOUBLE, x=(3, 8))
    _, result = rewritten(proto, MERGE)
    assert [kind for kind in op_types(result.graph) if kind in ("MatMul", "Gemm")] == [op_types(proto.graph)[0]]
    assert "Sub" not in op_types(result.graph) and len(result.graph.node) <= 2
    np.testing.assert_allclose(evaluate(result), evaluate(proto), rtol=1e-11, atol=1e-12)


STEPS = {
    "narrow-and-wide": [conv("x", "b", "down"), conv("b", "c", "up", **SAME)],
    "wide-and-narrow": [conv("x", "b", "l", **SAME), conv("b", "c", "r")],
    "strided": [conv("x", "b", "down"), conv("b", "c", "up", **SAME)],
    "grouped": [conv("x", "b", "g1", group=2), conv("b", "c", "g2", group=4, **SAME)],
    "an-average": [conv("x", "b", "p"), node("AveragePool", ["b"], ["c"], **COUNTED)],
    "average-first": [node("AveragePool", ["x"], ["b"], **COUNTED), batch_norm("b", "n"), conv("n", "c", "p")],
}


@pytest.mark.parametrize("name", STEPS)
def test_a_branch_of_several_convolutions(name: str) -> None:
    steps = [onnx.NodeProto.FromString(step.SerializeToString()) for step in STEPS[name]]
    stride = 2 if name == "strided" else 1
    if stride == 2:
        steps[-1].attribute.append(onnx.helper.make_attribute("strides", [2, 2]))
    nodes = [conv("x", "a", strides=[stride] * 2, **SAME), *steps, node("Add", ["c", "a"])]
    shapes = {"down": (2, 4, 1, 1), "up": (4, 2, 3, 3), "l": (2, 4, 3, 3), "r": (4, 2, 1, 1)}
    shapes |= {"g1": (4, 2, 1, 1), "g2": (4, 1, 3, 3)}
    proto = double(nodes, **{key: RNG.standard_normal(shape) for key, shape in shapes.items()})
    assert op_types(applied(proto, MERGE).graph) == ["Conv"]


def test_what_a_branch_makes_for_others_stays() -> None:
    nodes = [conv("x", "a", **SAME), conv("x", "b", "p"), conv("b", "c", **SAME), node("Add", ["a", "c"], ["s"])]
    result = applied(double([*nodes, node("Mul", ["s", "b"])]), MERGE)
    assert sorted(op_types(result.graph)) == ["Conv", "Conv", "Mul"]


@pytest.mark.parametrize("order", ["abx", "xab", "bax", "axb", "xxa", "ax?", "?ab"])
def test_sums_of_several(order: str) -> None:
    """What merges goes; `?` is of another kind, and stays."""
    made = [conv("x", "a", **SAME), conv("x", "b", "p"), node("Tanh", ["x"], ["?"])]
    nodes = [one for one in made if one.output[0] in order]
    result = applied(double([*nodes, node("Sum", list(order))]), MERGE)
    kept = ["Sum"] if "?" in order else []
    assert sorted(op_types(result.graph)) == sorted(["Conv", *kept, *["Tanh"][: len(kept)]])


def test_many_operands_of_several_inputs_merge_in_one_visit() -> None:
    count = 40
    nodes, constants = [node("Tanh", ["x"], ["z"]), node("Abs", ["x"], ["kept"])], {}
    for i in range(count):
        nodes.append(node("MatMul", ["xz"[i % 2], f"w{i}"], [f"m{i}"]))
        constants[f"w{i}"] = RNG.standard_normal((8, 8))
    nodes.append(node("Sum", ["kept", *[f"m{i}" for i in range(count)], "z"]))
    proto = model(nodes, constants=constants, dtype=DOUBLE, x=(3, 8))
    outcome, result = rewritten(proto, MERGE)
    assert sorted(op_types(result.graph)) == ["Abs", "MatMul", "MatMul", "Sum", "Tanh"]
    assert [remark.reason.count("is part of") for remark in outcome.applied] == [count - 2 + 1]  # and z itself
    wanted, found = evaluate(proto), evaluate(result)
    assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()


def test_an_operand_with_two_readings_merges_once() -> None:
    """Of `a` and `b`, the input may be `h`, or what that is made of."""
    nodes = [conv("x", "h", "p"), conv("h", "a", "q"), conv("h", "b", "r"), conv("x", "d", **SAME)]
    small = {name: RNG.standard_normal((4, 4, 1, 1)) for name in "qr"}
    for order in (["a", "b", "d"], ["d", "b", "a"]):
        result = applied(double([*nodes, node("Sum", order)], **small), MERGE)
        assert op_types(result.graph) == ["Conv"]


def test_several_kernels_are_rounded_once() -> None:
    kernels = [RNG.standard_normal((4, 4, 1, 1)).astype(np.float32) * 3.0**i for i in range(6)]
    nodes = [conv("x", f"c{i}", f"w{i}") for i in range(6)]
    proto = model(
        [*nodes, node("Sum", [f"c{i}" for i in range(6)])], constants={f"w{i}": w for i, w in enumerate(kernels)}
    )
    _, result = rewritten(proto, MERGE)
    (merged,) = (onnx.numpy_helper.to_array(tensor) for tensor in result.graph.initializer)
    assert np.array_equal(merged, np.sum(kernels, axis=0, dtype=np.float64).astype(np.float32))


def test_one_branch_that_cannot_be_merged_does_not_keep_the_others() -> None:
    nodes = [conv("x", "a", **SAME), conv("x", "b", "bad", **SAME), conv("x", "d", "p"), node("Sum", ["a", "b", "d"])]
    bad = np.full((4, 4, 3, 3), np.inf)
    _, result = rewritten(double(nodes, bad=bad), MERGE)
    assert sorted(op_types(result.graph)) == ["Conv", "Conv", "Sum"]


def test_of_many_readers_a_remark_names_the_first() -> None:
    nodes = [conv("x", "a", **SAME), conv("x", "b", "p"), node("Add", ["a", "b"])]
    extra = [node("Abs", [source], [f"{source}{i}"]) for i in range(20) for source in "ab"]
    constants = {"w": RNG.standard_normal((4, 4, 3, 3)), "p": RNG.standard_normal((4, 4, 1, 1))}
    outputs = ["y", *(one.output[0] for one in extra)]
    proto = model([*nodes, *extra], constants=constants, dtype=DOUBLE, outputs=outputs)
    (reason,) = (remark.reason for remark in rewritten(proto, MERGE)[0].missed)
    assert reason.endswith("and others") and reason.count(",") == 7


def test_a_norm_goes_through_a_sum_of_several() -> None:
    nodes = [conv("x", "a", **SAME), conv("x", "b", "p"), conv("x", "d", "p"), node("Sum", ["a", "b", "d"], ["c"])]
    result = applied(double([*nodes, batch_norm()]), FoldBatchNorm())
    assert op_types(result.graph) == ["Conv", "Conv", "Conv", "Sum"]


class Adapted(nn.Module):
    """A layer with an adapter of low rank that nobody merged."""

    def __init__(self, layer: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x) + 0.5 * self.up(self.down(x)))


@pytest.mark.parametrize("host", [Onnx, *HOSTS])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_adapters_on_every_host(host: Any, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        module: nn.Module = Adapted(nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False))
        x = torch.randn(3, 6)
    else:
        thin, wide = nn.Conv2d(4, 2, 3, padding=1, bias=False), nn.Conv2d(2, 4, 1, bias=False)
        module, x = Adapted(nn.Conv2d(4, 4, 3, padding=1), thin, wide), torch.randn(2, 4, 5, 6)
    module.eval()
    if host is not Onnx:
        module, x = module.double(), x.double()
    expected = module(x).detach().numpy()
    graph = host().build(module, (x,))
    outcome = pipeline.run(graph, [FoldAffine(), MERGE])
    assert {remark.pass_name for remark in outcome.applied} >= {MERGE.name}
    left = {op for op in graph.summary().ops if "relu" not in op.lower() and "transpose" not in op and op != "aten.t"}
    assert len(left) == 1 and sum(graph.summary().ops[op] for op in left) == 1, graph.summary().ops
    found = host().run(host().result(graph), x)
    assert np.abs(found - expected).max() <= (1e-6 if host is Onnx else 1e-13) * np.abs(expected).max()


class Block(nn.Module):
    """A RepVGG block, and a RepMixer with LayerScale; both convolutions of the mixer are one module."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.large = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False)
        self.small = nn.Conv2d(4, 4, 1, groups=groups, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.gamma = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.large(x)) + self.norms[1](self.small(x)) + self.norms[2](x))
        y: torch.Tensor = x + self.gamma * (self.large(x) - self.norms[3](x))
        return torch.relu(y)


@pytest.mark.parametrize("host", [Onnx, Exported, Lifted, Decomposed])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_block_becomes_one_convolution_on_every_host(host: Any, groups: int) -> None:
    torch.manual_seed(0)
    module, x = lively(Block(groups)), torch.randn(2, 4, 7, 7)
    if host is not Onnx:  # ONNX Runtime has no float64 convolution
        module, x = module.double(), x.double()
    expected = module(x).detach().numpy()
    graph = host().build(module, (x,))
    pipeline.run(graph, [FoldBatchNorm(), FoldAffine(), MERGE])
    counts = sorted(graph.summary().ops.values())
    assert counts == [2, 2]  # two convolutions, two activations
    found = host().run(host().result(graph), x)
    assert np.abs(found - expected).max() <= (1e-6 if host is Onnx else 1e-13) * np.abs(expected).max()


# -- refused


GEOMETRY = {
    "window": [conv("x", "a"), conv("x", "b", "p", pads=[0, 0, 0, 0]), node("Add", ["a", "b"])],
    "strides": [conv("x", "a", strides=[2, 2], **SAME), conv("x", "b", "p"), node("Add", ["a", "b"])],
    "shrinks": [conv("x", "a"), node("Add", ["a", "x"])],
    "uneven-average": [
        conv("x", "a", **SAME),
        node("AveragePool", ["x"], ["b"], **(COUNTED | {"count_include_pad": 0})),
        node("Add", ["a", "b"]),
    ],
    "wide-average": [conv("x", "a", "p"), node("AveragePool", ["x"], ["b"], **COUNTED), node("Add", ["a", "b"])],
    "global-average": [conv("x", "a", **SAME), node("GlobalAveragePool", ["x"], ["b"]), node("Add", ["a", "b"])],
    "automatic": [conv("x", "a", auto_pad="SAME_UPPER", dilations=[2, 2]), node("Add", ["a", "x"])],
    "two-windows": [
        conv("x", "a", pads=[2, 2, 2, 2]),
        conv("x", "b", **SAME),
        conv("b", "c", pads=[2, 2, 2, 2]),
        node("Add", ["a", "c"]),
    ],
    "too-large": [conv("x", "a", "p"), conv("x", "b", "p"), conv("b", "c", **SAME), node("Add", ["a", "c"])],
    "transposed": [node("ConvTranspose", ["x", "w"], ["a"], pads=[1, 1, 1, 1]), node("Add", ["a", "x"])],
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name: str) -> None:
    proto = double([])
    del proto.graph.node[:]
    proto.graph.node.extend(GEOMETRY[name])
    graph_codes = _codes(proto)
    assert graph_codes == ["geometry"]


def _codes(proto: onnx.ModelProto) -> list[str]:
    from fuser.files import ModelFile
    from fuser.graphs.onnx.graph import OnnxGraph

    before = proto.SerializeToString(deterministic=True)
    graph = OnnxGraph(ModelFile.from_proto(proto))
    remarks = MERGE.run(graph)
    assert graph.to_model().to_proto().SerializeToString(deterministic=True) == before
    return [remark.code for remark in remarks]


def test_padding() -> None:
    nodes = [conv("x", "a", **SAME), batch_norm("x", "b"), conv("b", "c", **SAME), node("Add", ["a", "c"])]
    assert refused(double(nodes), MERGE) == {"padding": 1}


def test_shared_output() -> None:
    nodes = [conv("x", "a", **SAME), node("Add", ["a", "x"], ["s"]), node("Mul", ["s", "a"])]
    assert refused(double(nodes), MERGE) == {"shared-output": 1}


def test_not_constant() -> None:
    proto = double([conv("x", "a", "v", **SAME), node("Add", ["a", "x"])])
    proto.graph.input.append(onnx.helper.make_tensor_value_info("v", DOUBLE, [4, 4, 3, 3]))
    assert refused(proto, MERGE) == {"not-constant": 1}


def test_not_finite() -> None:
    half = {"w": np.full((4, 4, 3, 3), 6e4, np.float16), "v": np.full((4, 4, 3, 3), 6e4, np.float16)}
    nodes = [conv("x", "a"), conv("x", "b", "v"), node("Add", ["a", "b"])]
    proto = model(nodes, constants=half, dtype=onnx.TensorProto.FLOAT16)
    assert refused(proto, MERGE) == {"not-finite": 1}


def test_axis_mismatch() -> None:
    tensors = {"w": RNG.standard_normal((4, 4, 1, 1)), "k": RNG.standard_normal(4)}
    nodes = [conv("x", "a"), node("Mul", ["x", "k"], ["m"]), node("Add", ["a", "m"])]  # k lies along the width
    assert refused(model(nodes, constants=tensors, dtype=DOUBLE, x=("N", 4, 4, 4)), MERGE) == {"axis-mismatch": 1}


def test_shape_mismatch() -> None:
    gemm = node("Gemm", ["x", "m", "c"], ["a"])
    tensors = {"m": RNG.standard_normal((4, 4)), "c": RNG.standard_normal((3, 4))}  # a bias for each row
    proto = model([gemm, node("Add", ["a", "x"])], constants=tensors, dtype=DOUBLE, x=(3, 4))
    assert refused(proto, MERGE) == {"shape-mismatch": 1}


def test_shared_weights() -> None:
    nodes = [conv("x", "a", **SAME), node("Add", ["a", "x"], ["s"]), conv("s", "y", **SAME)]
    proto = double(nodes)
    assert refused(proto, MergeBranches(shared_weights="refuse")) == {"shared-weights": 1}
    _, result = rewritten(proto, MERGE)
    assert op_types(result.graph) == ["Conv", "Conv"]
    np.testing.assert_allclose(evaluate(result), evaluate(proto), rtol=1e-9, atol=1e-12)


def test_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the algebra wrong, the merge would refuse."""
    monkeypatch.setattr("fuser.kernels.Kernel.regrouped", lambda self, groups: self.weight * 2)
    nodes = [conv("x", "a", **SAME), conv("x", "b", "p"), node("Add", ["a", "b"])]
    assert refused(double(nodes), MERGE) == {"unsound": 1}


def test_hooks() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x) - self.conv(x)

    module = Watched().eval()
    module.conv.register_forward_hook(lambda *_: None)
    traced = torch.fx.symbolic_trace(module)
    ShapeProp(traced).propagate(torch.zeros(1, 4, 8, 8))  # a hook may return anything; here it is known
    graph = TorchGraph.from_graph_module(traced)
    assert [remark.code for remark in MERGE.run(graph)] == ["hooks"]


class InPlace(nn.Module):
    """Two branches of one input, and something written in place between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.kind = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), kind

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.sigmoid(x)
        y = self.one(x)
        if self.kind == "sum":
            y += self.two(x)
            return y
        if self.kind == "input":
            x.sub_(0.5).relu_()
        elif self.kind == "branch":
            y.relu_()
        elif self.kind == "slice":
            x.narrow(1, 0, 1).mul_(5)
        return y + self.two(x)


@pytest.mark.parametrize("kind", ["nothing", "sum", "input", "branch", "slice"])
@pytest.mark.parametrize("host", [Traced, Exported])
def test_written(host: Any, kind: str) -> None:
    module, x = InPlace(kind).double().eval(), torch.randn(1, 4, 5, 5).double()
    graph = host().build(module, (x.clone(),))
    outcome = pipeline.run(graph, [MERGE])
    assert len(outcome.applied) == (kind in ("nothing", "sum"))
    assert {remark.code for remark in outcome.missed} <= {"written"}
    np.testing.assert_allclose(
        host().run(host().result(graph), x.clone()), module(x.clone()).detach(), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("host", [Onnx, *HOSTS])
def test_a_residual_sum_of_unlike_things_is_no_candidate(host: Any) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.two(torch.relu(self.one(x)))

    graph = host().build(Residual().eval(), (torch.zeros(1, 4, 8, 8),))
    assert MERGE.run(graph) == []
