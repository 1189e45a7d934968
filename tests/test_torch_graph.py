"""The torch graph without any pass: what each dialect reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts_torch import HOSTS, Decomposed, Exported, Lifted, Traced
from torch import Tensor, fx, nn

import fuser
from fuser import ops
from fuser.graphs.torch.graph import TorchGraph
from fuser.remarks import Missed


class Fn(nn.Module):
    """A function of the input and of layers by name."""

    def __init__(self, function: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Fn2(Fn):
    """A function of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(self, x, y)


def build(host: type, net: nn.Module, *inputs: Tensor, train: bool = False) -> TorchGraph:
    return host().build(net.train(train), inputs)


def the(graph: TorchGraph, kind: type[ops.Op]) -> Any:
    (op,) = graph.ops(kind)
    return op


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 8, 8)))


both_forms = pytest.mark.parametrize("host", [Traced, Lifted], ids=lambda host: host.__name__)
every_host = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)


# -- convolutions


@every_host
def test_a_convolution_is_read_the_same_in_every_dialect(host: type) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, dilation=(1, 2), padding=(1, 0), groups=2)
    op = the(graph := build(host, nn.Sequential(conv), image()), ops.Conv)
    assert (op.groups, op.transposed, op.strides, op.dilations) == (2, False, (2, 2), (1, 2))
    assert op.padding == ((1, 1), (0, 0))
    np.testing.assert_array_equal(graph.constant(op.weight), conv.weight.detach().numpy())
    np.testing.assert_array_equal(graph.constant(op.bias), conv.bias.detach().numpy())
    assert not op.hooked and op.node is op.output


@both_forms
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_of_every_rank(host: type, dims: int) -> None:
    conv = getattr(nn, f"ConvTranspose{dims}d")(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    graph = build(host, nn.Sequential(conv), image(2, 4, *[5] * dims))
    op = the(graph, ops.Conv)
    assert op.transposed and op.bias is None and op.groups == 2 and op.padding == ((1, 1),) * dims
    assert graph.shape(op.weight) == (4, 3, *[3] * dims)


@every_host
def test_named_padding_is_spelled_out_with_the_odd_zero_after(host: type) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, (2, 3), padding="same", dilation=(1, 2)), nn.Conv2d(4, 4, 3, padding="valid"))
    same, valid = build(host, net, image()).ops(ops.Conv)
    # The decomposition pads asymmetric operands by an operator of its own.
    assert same.padding == (((0, 0), (2, 2)) if host is Decomposed else ((0, 1), (2, 2)))
    assert valid.padding == ((0, 0), (0, 0))


def test_padding_that_is_not_zeros_is_not_told() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    assert the(build(Traced, net), ops.Conv).padding is None
    assert the(build(Exported, net, image()), ops.Conv).padding == ((0, 0), (0, 0))  # a pad of its own precedes it


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: F.conv2d(x, m.w, m.b, 1, 1),
        lambda m, x: torch.conv2d(x, weight=m.w, bias=m.b, padding=1),
        lambda m, x: F.conv2d(input=x, weight=m.w, bias=m.b, padding=(1, 1)),
    ],
    ids=["positional", "keywords", "all-keywords"],
)
def test_functional_convolutions_however_they_are_called(call: Callable[..., Tensor]) -> None:
    net = Fn(call, w=nn.Parameter(torch.randn(6, 4, 3, 3)), b=nn.Parameter(torch.randn(6)))
    for host in (Traced, Exported):
        op = the(graph := build(host, net, image()), ops.Conv)
        assert op.padding == ((1, 1), (1, 1)) and op.strides == (1, 1)
        assert graph.constant(op.bias).shape == (6,)


# -- linear


@every_host
def test_a_linear_layer(host: type) -> None:
    layer = nn.Linear(4, 6)
    op = the(graph := build(host, nn.Sequential(layer), image(3, 4)), ops.Linear)
    weight = graph.constant(op.weight)
    np.testing.assert_array_equal(weight if op.out_axis == 0 else weight.T, layer.weight.detach().numpy())
    assert op.in_axis == -1 and (op.alpha, op.beta) == (1.0, 1.0)
    assert op.out_axis == (1 if host is Decomposed else 0)
    assert graph.describe(op) == "0"


@every_host
def test_a_product_and_the_addition_of_a_constant_vector_are_one_linear(host: type) -> None:
    net = Fn(lambda m, x: torch.relu(m.b + x @ m.w), w=nn.Parameter(torch.randn(4, 6)), b=nn.Parameter(torch.randn(6)))
    graph = build(host, net, image(3, 4))
    op = the(graph, ops.Linear)
    assert op.out_axis == 1 and graph.constant(op.bias).shape == (6,)
    assert list(graph.ops(ops.Elementwise)) == []
    assert graph.op_producing(op.output).node is op.node and op.output is not op.node
    assert [reader.op.node for reader in graph.readers(op.input)] == [op.node]


@both_forms
@pytest.mark.parametrize("bias", [(3, 1), (1, 6), (1,), ()], ids=str)
def test_only_a_vector_or_a_number_is_the_bias_of_a_product(host: type, bias: tuple[int, ...]) -> None:
    net = Fn(lambda m, x: x @ m.w + m.b, w=nn.Parameter(torch.randn(4, 6)), b=nn.Parameter(torch.randn(bias)))
    graph = build(host, net, image(3, 4))
    assert (the(graph, ops.Linear).bias is not None) == (len(bias) <= 1)
    assert len(list(graph.ops(ops.Elementwise))) == (len(bias) > 1)


def test_a_bias_that_broadcasts_the_product_is_none() -> None:
    """[3, 1] + [5] is [3, 5]: not a bias of one feature."""
    net = Fn(lambda m, x: x @ m.w + m.b, w=nn.Parameter(torch.randn(4, 1)), b=nn.Parameter(torch.randn(5)))
    for host in (Traced, Exported):
        assert the(build(host, net, image(3, 4)), ops.Linear).bias is None


@both_forms
def test_a_bias_of_another_type_promotes_the_product(host: type) -> None:
    net = Fn(lambda m, x: x @ m.w + m.b, w=nn.Parameter(torch.randn(4, 6)), b=torch.randn(6, dtype=torch.float64))
    assert the(build(host, net, image(3, 4)), ops.Linear).bias is None


@both_forms
def test_a_product_that_is_read_twice_keeps_its_bias_apart(host: type) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x @ m.w
        return (y + m.b) * y

    net = Fn(forward, w=nn.Parameter(torch.randn(4, 6)), b=nn.Parameter(torch.randn(6)))
    assert the(build(host, net, image(3, 4)), ops.Linear).bias is None


@both_forms
def test_products_of_two_activations_are_no_linear(host: type) -> None:
    net = Fn(lambda m, x: x @ x.transpose(-1, -2))
    assert list(build(host, net, image(2, 3, 4)).ops(ops.Linear)) == []


def test_addmm_keeps_its_factors() -> None:
    net = Fn(
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2),
        w=nn.Parameter(torch.randn(4, 6)),
        b=nn.Parameter(torch.randn(6)),
    )
    for host in (Traced, Exported, Lifted):
        op = the(build(host, net, image(3, 4)), ops.Linear)
        assert (op.alpha, op.beta, op.out_axis) == (2.0, 0.5, 1)


# -- BatchNorm


@every_host
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm(host: type, affine: bool) -> None:
    norm = nn.BatchNorm2d(4, eps=0.25, affine=affine)
    norm.running_mean.normal_()
    op = the(graph := build(host, nn.Sequential(norm), image()), ops.BatchNorm)
    assert op.epsilon == 0.25 and not op.training and op.per_channel
    np.testing.assert_array_equal(graph.constant(op.mean), norm.running_mean.numpy())
    assert graph.constant(op.var).shape == (4,)
    if affine:
        np.testing.assert_array_equal(graph.constant(op.scale), norm.weight.detach().numpy())
    elif host is not Decomposed:  # where the exporter makes the missing ones up
        assert op.scale is None and op.bias is None


@every_host
def test_a_batch_norm_in_training_mode_says_so(host: type) -> None:
    graph = build(host, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), image(), train=True)
    assert the(graph, ops.BatchNorm).training


@every_host
def test_a_batch_norm_without_running_statistics_normalizes_by_the_batch(host: type) -> None:
    graph = build(host, nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), image())
    op = the(graph, ops.BatchNorm)
    assert op.training and (host is Decomposed or op.mean is None)


def test_training_is_decided_by_the_argument_not_by_the_module() -> None:
    module = torch.export.export(nn.Sequential(nn.BatchNorm2d(4)).eval(), (image(),)).module()
    assert module.training  # torch.export says so of every module
    assert not the(TorchGraph.from_graph_module(module), ops.BatchNorm).training


@pytest.mark.parametrize("training", [True, False])
def test_functional_batch_norm_with_keywords(training: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, m.n.running_mean, m.n.running_var, bias=m.n.bias, training=training, eps=0.5)

    op = the(build(Traced, Fn(forward, n=nn.BatchNorm2d(4))), ops.BatchNorm)
    assert op.training == training and op.epsilon == 0.5 and op.scale is None and op.bias is not None


def test_sync_batch_norm_in_eval_mode() -> None:
    assert the(build(Traced, nn.Sequential(nn.SyncBatchNorm(4))), ops.BatchNorm).epsilon == 1e-5


def test_a_subclass_may_do_anything() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x))

    class Opaque(nn.Conv2d):
        __module__ = "torch.nn.modules.custom"  # a leaf of the tracer

    assert the(build(Traced, nn.Sequential(Activated(4))), ops.BatchNorm).hooked
    assert the(build(Exported, nn.Sequential(Activated(4)), image()), ops.BatchNorm)
    assert list(build(Traced, nn.Sequential(Opaque(4, 4, 1))).ops(ops.Conv)) == []


def test_lazy_modules_once_they_know_their_sizes() -> None:
    net = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d())
    net(image())
    graph = build(Traced, net)
    assert the(graph, ops.Conv) and the(graph, ops.BatchNorm)


@pytest.mark.parametrize("operator", ["cudnn_batch_norm", "native_batch_norm", "_batch_norm_no_update"])
def test_other_operators_with_the_same_meaning(operator: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    parameters = [graph.get_attr(name) for name in ("weight", "bias", "running_mean", "running_var")]
    flags = () if operator.startswith("_") else (False,)
    overload = getattr(torch.ops.aten, operator).default
    node = graph.call_function(overload, (x, *parameters, *flags, 0.1, 0.25))
    first = graph.call_function(_getitem, (node, 0))
    graph.output(first)
    op = the(TorchGraph.from_graph_module(fx.GraphModule(nn.BatchNorm2d(4), graph)), ops.BatchNorm)
    assert op.epsilon == 0.25 and op.output.name == first.name and op.node.name == node.name


_getitem = __import__("operator").getitem


def test_statistics_that_somebody_reads_keep_the_op_from_being_read() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    parameters = [graph.get_attr(name) for name in ("weight", "bias", "running_mean", "running_var")]
    node = graph.call_function(torch.ops.aten.native_batch_norm.default, (x, *parameters, False, 0.1, 0.25))
    graph.output(tuple(graph.call_function(_getitem, (node, i)) for i in range(2)))
    read = TorchGraph.from_graph_module(fx.GraphModule(nn.BatchNorm2d(4), graph))
    assert list(read.ops(ops.BatchNorm)) == []


# -- arithmetic


@every_host
def test_arithmetic_with_constants_and_numbers(host: type) -> None:
    net = Fn(lambda m, x: torch.sigmoid((2 - m.conv(x)) * m.c / 3.0), conv=nn.Conv2d(4, 6, 1), c=torch.randn(6, 1, 1))
    graph = build(host, net, image())
    rsub, mul, div = graph.ops(ops.Elementwise)
    assert [op.function for op in (rsub, mul, div)] == ["-", "*", "/"]
    assert graph.constant(rsub.left) == 2 and graph.constant(rsub.left).dtype == np.float32
    assert graph.op_producing(rsub.right).node is the(graph, ops.Conv).node
    assert graph.constant(mul.right).shape == (6, 1, 1)
    assert graph.constant(div.right) == 3 and graph.shape(div.right) == () and graph.rank(div.right) == 0


@both_forms
def test_arithmetic_that_promotes_is_not_read(host: type) -> None:
    """A float32 buffer turns a half activation into float32; and uint8 images become floats."""
    net = Fn(lambda m, x: x * m.c, c=torch.randn(4, 1, 1))
    assert list(build(host, net, image().half()).ops(ops.Elementwise)) == []
    assert list(build(host, net, torch.ones(2, 4, 8, 8, dtype=torch.uint8)).ops(ops.Elementwise)) == []


def test_a_type_that_is_not_proven_is_not_guessed() -> None:
    net = Fn(lambda m, x: m.conv((x - m.c) / 2), conv=nn.Conv2d(4, 6, 1), c=torch.randn(4, 1, 1))
    assert list(build(Traced, net).ops(ops.Elementwise)) == []
    assert len(list(build(Exported, net, image()).ops(ops.Elementwise))) == 2


@both_forms
def test_scaled_and_rounded_arithmetic_is_not_read(host: type) -> None:
    net = Fn(lambda m, x: torch.div(torch.add(m.c(x), 1, alpha=2), 2, rounding_mode="floor"), c=nn.Conv2d(4, 4, 1))
    assert list(build(host, net, image()).ops(ops.Elementwise)) == []


def test_writing_in_place_is_read_where_nobody_else_can_see_it() -> None:
    def residual(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y += x
        return torch.relu_(y)

    def seen(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y + 1
        z += y
        y += 1
        return y * z

    graph = build(Exported, Fn(residual, a=nn.Conv2d(4, 4, 1)), image())
    assert the(graph, ops.Elementwise).function == "+"
    graph = build(Exported, Fn(seen, a=nn.Conv2d(4, 4, 1)), image())
    assert [graph.describe(op) for op in graph.ops(ops.Elementwise)] == ["add", "add_", "mul"]


# -- views, copies, pools


@every_host
def test_identities(host: type) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.Identity(), nn.Dropout2d(), nn.ReLU())
    graph = build(host, net, image())
    assert len(list(graph.ops(ops.Identity))) == {Traced: 3, Decomposed: 1}.get(host, 2)


@both_forms
def test_dropout_in_training_mode_is_none(host: type) -> None:
    graph = build(host, nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)), image(), train=True)
    assert list(graph.ops(ops.Identity)) == []


def test_a_copy_is_an_identity_where_it_keeps_the_layout() -> None:
    def relaid(m: Any, x: Tensor) -> Tensor:
        return m.conv(x).permute(0, 2, 3, 1).contiguous().view(2, 64, 4)

    def plain(m: Any, x: Tensor) -> Tensor:
        return torch.relu(m.conv(x).clone().to(torch.float32))

    for forward, count in ((relaid, 0), (plain, 2)):
        graph = build(Exported, Fn(forward, conv=nn.Conv2d(4, 4, 1)), image())
        assert len(list(graph.ops(ops.Identity))) == count, forward


@every_host
def test_views_that_keep_the_order(host: type) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv(x).flatten(2).unsqueeze(1).squeeze(1).reshape(2, 4, 64)[:, :, None].view(2, -1)

    graph = build(host, Fn(forward, conv=nn.Conv2d(4, 4, 1)), image())
    assert len(list(graph.ops(ops.Reshape))) == 6


@both_forms
def test_transposes(host: type) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)).permute(0, 2, 3, -3).transpose(-1, 1).transpose(2, 3)

    graph = build(host, Fn(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), image())
    assert [op.permutation for op in graph.ops(ops.Transpose)] == [(0, 2, 3, 1), (0, 3, 2, 1), (0, 1, 3, 2)]


@both_forms
def test_concatenation(host: type) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.n(m.a(x)), m.b(x), x], dim=-3)

    graph = build(host, Fn(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 2, 1), n=nn.BatchNorm2d(4)), image())
    op = the(graph, ops.Concat)
    assert op.axis == 1 and len(op.inputs) == 3 and graph.op_producing(op.inputs[1]) is not None


@every_host
def test_average_pools(host: type) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.conv(x))
        x = m.padded(m.plain(F.avg_pool2d(x, 2)))
        return torch.relu(m.head(x)).mean((2, 3))

    net = Fn(
        forward,
        conv=nn.Conv2d(4, 4, 1),
        norm=nn.BatchNorm2d(4),
        plain=nn.AvgPool2d(2, padding=1, count_include_pad=False),
        padded=nn.AvgPool2d(2, padding=1),
        head=nn.AdaptiveAvgPool2d(1),
    )
    graph = build(host, net, image(2, 4, 16, 16))
    pools = [op.pads_counted for op in graph.ops(ops.AveragePool)]
    means = [(op.axes, op.keeps_axes) for op in graph.ops(ops.Reduction)]
    assert pools[:3] == [False, False, True]
    assert len(pools) + len(means) == 5 and means[-1] == ({2, 3}, False)


@both_forms
@pytest.mark.parametrize(
    ("largest", "axes", "rank"),
    [
        (lambda x: x.amax((1, -1)), {1, 3}, 2),
        (lambda x: x.amax(0, keepdim=True), {0}, 4),
        (lambda x: torch.max(x, 2)[0], {2}, 3),
        (lambda x: x.max(dim=-1, keepdim=True)[0], {3}, 4),
        (lambda x: x.amax(), None, 0),
        (lambda x: torch.amax(x, ()), None, 0),
        (lambda x: torch.max(x), None, 0),
        (lambda x: torch.max(x, x), None, 4),
        (lambda x: torch.max(x, 2)[1], None, 3),
        (lambda x: (y := torch.max(x, 2))[0] + y[1], None, 3),
    ],
)
def test_maxima(host: type, largest: Callable[[Tensor], Tensor], axes: set[int] | None, rank: int) -> None:
    net = Fn(lambda m, x: largest(m.norm(m.conv(x))), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    graph = build(host, net, image())
    assert [op.axes for op in graph.ops(ops.Reduction)] == ([] if axes is None else [axes])
    for op in graph.ops(ops.Reduction):
        assert graph.rank(op.output) == rank


@both_forms
def test_unbatched_pools_are_none(host: type) -> None:
    graph = build(host, Fn(lambda m, x: F.avg_pool2d(m.conv(x), 2), conv=nn.Conv2d(4, 4, 1)), image(4, 8, 8))
    assert list(graph.ops(ops.AveragePool)) == []


def test_an_axis_that_was_declared_dynamic_and_is_not_has_a_number() -> None:
    net = Fn(lambda m, x: torch.relu(m.norm(m.conv(x).view(2, 4, -1))), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm1d(4))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(net.eval(), (image(),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    graph = TorchGraph.from_exported_program(program)
    (op,) = graph.ops(ops.Conv)
    shape = graph.shape(op.output)
    assert shape is not None and shape[:2] == (2, 4) and isinstance(shape[2], str)
    (norm,) = fuser.explain(program, passes=["fold-batch-norm"]).applied
    assert norm.site == "norm"


# -- constants


@every_host
def test_expressions_of_parameters_are_constants_and_no_candidates(host: type) -> None:
    """Weight standardization, as in NFNet."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w - m.w.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w * 0.5)

    net = Fn(forward, w=nn.Parameter(torch.randn(6, 4, 3, 3)))
    op = the(graph := build(host, net, image()), ops.Conv)
    w = net.w.detach()
    np.testing.assert_array_equal(graph.constant(op.weight), ((w - w.mean((1, 2, 3), keepdim=True)) * 0.5).numpy())
    assert list(graph.ops(ops.Elementwise)) == []
    constant = next(iter(graph.ops(ops.Constant)))
    assert constant.output is op.weight and constant.elements_made == constant.elements_freed == 216


@both_forms
def test_what_is_computed_from_an_input_is_not_constant(host: type) -> None:
    graph = build(host, Fn2(lambda m, x, w: F.conv2d(x, w)), image(), torch.randn(6, 4, 3, 3))
    found = graph.constant(the(graph, ops.Conv).weight)
    assert isinstance(found, Missed) and found.code == "not-constant" and "'y'" in found.reason


@both_forms
def test_random_numbers_are_not_constant(host: type) -> None:
    graph = build(host, Fn(lambda m, x: x + torch.rand_like(m.w), w=nn.Parameter(torch.randn(4, 8, 8))), image())
    assert list(graph.ops(ops.Constant)) == [] and list(graph.ops(ops.Dead)) == []


def test_a_buffer_that_the_model_writes_is_not_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.seen.add_(1)
        return x * m.seen.view(1) + m.kept

    net = Fn(forward, seen=torch.zeros(()), kept=torch.ones(4, 8, 8))
    for host in HOSTS:
        graph = build(host, net, image())
        leaves = {n.name: n for n in graph._wiring.order if graph._wiring.origin(n) is not None}
        kept = next(node for name, node in leaves.items() if "kept" in name)
        assert not isinstance(graph.constant(kept), Missed)
        for node in graph._wiring.order:
            if "seen" in node.name or node.name == "view":
                assert isinstance(graph.constant(node), Missed), (host, node)
    assert net.seen == 0


def test_tensors_without_numbers_are_not_constant() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1))
    graph = build(Traced, net.to("meta"))
    missed = graph.constant(the(graph, ops.Conv).weight)
    assert isinstance(missed, Missed) and missed.code == "not-constant" and "meta device" in missed.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_numbers_are_read_without_a_copy_in_every_type(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3)).to(dtype if dtype.itemsize > 1 else torch.float32)
    if dtype.itemsize == 1:
        net[0].weight = nn.Parameter(net[0].weight.to(dtype), requires_grad=False)
    weight = net[0].weight
    array = (graph := build(Traced, net)).constant(the(graph, ops.Conv).weight)
    assert array.dtype == getattr(ml_dtypes, str(dtype)[6:], None) or array.dtype == np.dtype(str(dtype)[6:])
    np.testing.assert_array_equal(array.astype(np.float64), weight.detach().double().numpy())
    assert array.ctypes.data == weight.data_ptr() and not array.flags.writeable


def test_a_weight_behind_dequantize_is_quantized() -> None:
    import torch.ao.quantization.fx._decomposed  # registers the operators

    def forward(m: Any, x: Tensor) -> Tensor:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        return F.conv2d(x, dequantize(m.w, m.s, m.z, 0, -127, 127, torch.int8))

    w = torch.randint(-127, 127, (6, 4, 3, 3), dtype=torch.int8)
    net = Fn(forward, w=w, s=torch.rand(6) + 0.5, z=torch.zeros(6, dtype=torch.int64))
    for host in (Exported, Lifted):
        graph = build(host, net, image())
        missed = graph.constant(the(graph, ops.Conv).weight)
        assert isinstance(missed, Missed) and missed.code == "quantized"
        op = the(graph, ops.Dequantize)
        assert op.axis == 0 and graph.constant(op.scale).shape == (6,)


# -- shapes and ranks


def test_shapes_come_with_the_names_of_dynamic_dimensions() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten())
    program = torch.export.export(net, (image(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for graph in (TorchGraph.from_exported_program(program), TorchGraph.from_graph_module(program.module())):
        op = the(graph, ops.Conv)
        batch = graph.shape(op.input)[0]
        assert isinstance(batch, str) and graph.shape(op.output) == (batch, 6, 6, 6) and graph.rank(op.output) == 4


def test_without_shapes_a_rank_is_proven_or_unknown() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.conv(x))
        x = m.norm(F.max_pool2d(x, 2))
        x = m.linear(torch.flatten(x, 1))
        return m.other(x)

    net = Fn(
        forward,
        conv=nn.Conv2d(4, 4, 3),
        norm=nn.BatchNorm2d(4),
        linear=nn.Linear(36, 5),
        other=nn.BatchNorm1d(5),
    )
    graph = build(Traced, net)
    conv, linear = the(graph, ops.Conv), the(graph, ops.Linear)
    assert graph.rank(conv.input) == graph.rank(conv.output) == 4 and graph.shape(conv.output) is None
    assert graph.rank(linear.output) == 2
    unproven = build(Traced, nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)))
    assert unproven.rank(the(unproven, ops.Conv).output) is None
    unproven = build(Traced, nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    assert unproven.rank(the(unproven, ops.Conv).output) is None


@pytest.mark.parametrize("host", [Exported, Lifted], ids=lambda host: host.__name__)
def test_unbatched_input_is_seen(host: type) -> None:
    graph = build(host, nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), image(3, 10))
    assert graph.rank(the(graph, ops.BatchNorm).input) == 2


# -- readers and names


@both_forms
def test_every_use_is_a_reader(host: type) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return m.norm(y), y * y, y

    graph = build(host, Fn(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), image())
    readers = graph.readers(the(graph, ops.Conv).output)
    assert [type(reader.op).__name__ for reader in readers] == ["BatchNorm", "Elementwise", "Elementwise", "NoneType"]
    assert readers[0].name == "norm" and readers[-1].name == "graph output 2"


@both_forms
def test_the_readers_of_a_tied_weight_are_all_who_share_it(host: type) -> None:
    a, b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    b.weight = a.weight
    graph = build(host, nn.Sequential(a, b), image())
    for op in graph.ops(ops.Conv):
        assert [reader.name for reader in graph.readers(op.weight)] == ["0", "1"]
        assert len(graph.readers(op.bias)) == 1


@both_forms
def test_names_are_module_paths_and_unique(host: type) -> None:
    conv = nn.Conv2d(4, 4, 1)
    net = nn.Sequential(conv, nn.Sequential(nn.BatchNorm2d(4), conv), nn.ReLU())
    graph = build(host, net, image())
    assert graph.describe(the(graph, ops.BatchNorm)) == "1.0"
    names = [graph.describe(op) for op in graph.ops(ops.Conv)]
    assert len(set(names)) == 2 and names[0].startswith("0")
    assert graph.describe(the(graph, ops.BatchNorm).output).startswith("'")


@every_host
def test_the_summary_counts_operators_and_each_shared_tensor_once(host: type) -> None:
    a, b = nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
    b.weight = a.weight
    graph = build(host, nn.Sequential(a, b, nn.BatchNorm2d(4)), image())
    summary = graph.summary()
    assert sorted(summary.ops.values()) == [1, 2]
    assert summary.parameters == 144 + 4 * 4 and summary.bytes == summary.parameters * 4 + 8  # a counter of int64


# -- modules that user code watches


def hooked(how: str) -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    if how == "forward":
        conv.register_forward_hook(lambda module, args, output: output * 2)
    elif how == "pre":
        conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif how == "backward":
        conv.register_full_backward_hook(lambda module, grads, outputs: None)
    elif how == "patched":
        conv.forward = lambda x: F.conv2d(x, conv.weight)  # type: ignore[method-assign]
    elif how == "parametrized":
        nn.utils.parametrizations.weight_norm(conv)
    elif how == "weight_norm":
        nn.utils.weight_norm(conv)
    else:
        nn.utils.spectral_norm(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(4)).eval()


WAYS = ["forward", "pre", "backward", "patched", "parametrized", "weight_norm", "spectral_norm"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", WAYS)
def test_a_module_with_hooks_is_read_as_hooked(how: str) -> None:
    net = hooked(how)
    expected = net(x := image())
    graph = TorchGraph.from_module(net)
    assert the(graph, ops.Conv).hooked and not the(graph, ops.BatchNorm).hooked
    torch.testing.assert_close(graph.result()(x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["forward", "parametrized"])
def test_on_an_exported_graph_hooks_are_plain_operators(how: str) -> None:
    graph = TorchGraph.from_graph_module(torch.export.export(hooked(how), (image(),)).module())
    op = the(graph, ops.Conv)
    assert not op.hooked and not isinstance(graph.constant(op.weight), Missed)


def test_hooks_on_a_container_keep_it_whole_and_keep_running() -> None:
    seen: list[Tensor] = []
    net = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1)).eval()
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    graph = TorchGraph.from_module(net)
    assert seen == [] and len(list(graph.ops(ops.Conv))) == 1
    graph.result()(image())
    assert len(seen) == 1 and isinstance(seen[0], Tensor)


def test_the_rank_behind_a_number_and_behind_a_transposed_weight_is_known_at_once() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w.t() + self.b) * 2.0 + 1

    first = fuser.optimize(Product().eval(), verify=False)
    assert [r.site for r in first.report.applied] == ["t", "mul", "add_1", "matmul"]
    conv, norm = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
    behind = Fn(lambda m, x: m.norm(m.conv(x) * -0.5 + 1), conv=conv, norm=norm).eval()
    second = fuser.optimize(behind, verify=False)
    assert [r.site for r in second.report.applied] == ["mul", "add", "norm"]


def asks(question: Callable[[Tensor], Any]) -> list[bool]:
    """shape_only of the readers of a convolution's output that `question` makes."""
    net = Fn(lambda m, x: question(m.conv(x)), conv=nn.Conv2d(2, 2, 3)).eval()
    graph = TorchGraph.from_module(net)
    (conv,) = graph.ops(ops.Conv)
    return [reader.shape_only for reader in graph.readers(conv.output)]


def test_who_looks_at_the_shape_only() -> None:
    assert asks(lambda y: (y.shape, y.size(0), y.dim(), torch.zeros_like(y), y.new_zeros(3))) == [True] * 5
    assert asks(lambda y: torch.zeros(2, 3).reshape_as(y)) == [True]
    assert asks(lambda y: y.reshape_as(torch.zeros(2, 3))) == [False]
    assert asks(lambda y: y.reshape_as(y)) == [True, False]
    assert asks(lambda y: (y.T, y.data, y.sum(), torch.full((2,), 1.0).mul(y))) == [False] * 4


@pytest.mark.parametrize(
    "check",
    [
        lambda x: torch._assert(x.ndim == 4, "images"),
        lambda x: torch._assert(x.dim() == 4, "images"),
        lambda x: torch._assert(x.ndimension() == 4, "images"),
    ],
)
def test_an_assertion_proves_the_rank(check: Callable[[Any], None]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x) * 2
        check(y)
        return y

    graph = build(Traced, Fn(forward, conv=nn.Conv2d(4, 4, 1)), image())
    assert graph.rank(the(graph, ops.Conv).output) == 4


def test_an_assertion_of_something_else_proves_nothing() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        torch._assert(y.size(1) == 4, "channels")
        return y

    graph = build(Traced, Fn(forward, conv=nn.Conv2d(4, 4, 1)), image())
    assert graph.rank(the(graph, ops.Conv).output) is None


@pytest.mark.parametrize(
    ("flatten", "kept"),
    [
        (lambda x: x.flatten(0, 1), (0, 2)),
        (lambda x: x.flatten(2), (2, 0)),
        (lambda x: x.flatten(-2), (2, 0)),
        (lambda x: x.flatten(1, -2), (1, 1)),
        (lambda x: torch.flatten(x, 1, 2), (1, 1)),
        (nn.Flatten(1, 2), (1, 1)),
        (nn.Flatten(), (1, 0)),
    ],
)
def test_a_flatten_keeps_the_axes_around_it(flatten: Any, kept: tuple[int, int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.flatten(m.norm(x))

    layers = {"norm": nn.BatchNorm2d(4)} | ({"flatten": flatten} if isinstance(flatten, nn.Module) else {})
    net = Fn(forward, **layers)
    if not isinstance(flatten, nn.Module):
        net.flatten = flatten
    graph = build(Traced, net, image())
    op = the(graph, ops.Reshape)
    assert (op.front, op.back) == kept


def bmm_net() -> nn.Module:
    return Fn(lambda m, x: m.linear(x.flatten(2).transpose(1, 2)), linear=nn.Linear(4, 6))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_linear_that_was_decomposed_into_a_batch_of_products(batch: int) -> None:
    net, x = bmm_net().double(), image(batch, 4, 3, 3).double()
    host = Decomposed()
    graph = host.build(net, (x,))
    op = the(graph, ops.Linear)
    assert op.out_axis == 1 and graph.shape(op.weight) == (4, 6) and op.bias is None
    assert not list(graph.ops(ops.Constant))  # the repeated matrix stays a view
    weight, bias = np.random.rand(4, 6), np.random.rand(6)
    graph.set_constants(op, weight=weight, bias=bias)
    graph.commit()
    result = host.run(host.result(graph), x)
    wanted = x.flatten(2).transpose(1, 2).numpy() @ weight + bias + net.linear.bias.detach().numpy()
    np.testing.assert_allclose(result, wanted, rtol=1e-12)


def test_a_batch_of_different_matrices_is_no_linear() -> None:
    net = Fn(lambda m, x: torch.bmm(x, m.w), w=nn.Parameter(torch.randn(2, 4, 6)))
    graph = build(Lifted, net, image(2, 3, 4))
    assert not list(graph.ops(ops.Linear))


def test_an_expand_to_the_size_it_has_is_an_identity() -> None:
    net = Fn(lambda m, x: x.expand(2, 4, 8, 8) + x[:, :1].expand(2, 4, 8, 8))
    graph = build(Lifted, net, image())
    assert the(graph, ops.Identity).input.name == "x"
