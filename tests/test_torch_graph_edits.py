"""The torch graph without any pass: what its verbs leave behind, in each dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts_torch import HOSTS, Decomposed, Exported, Lifted, Traced
from test_torch_graph import Fn, build, image, the
from torch import Tensor, nn

from fuser import ops
from fuser.graphs.torch.graph import TorchGraph
from fuser.remarks import Missed

every_host = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
both_forms = pytest.mark.parametrize("host", [Traced, Lifted], ids=lambda host: host.__name__)


def finish(host: type, graph: TorchGraph, *inputs: Tensor) -> Tensor:
    """Commit, and run the result."""
    graph.commit()
    return torch.from_numpy(host().run(host().result(graph), *inputs))


def names(graph: TorchGraph) -> set[str]:
    """The names under which the result stores its constants."""
    result = graph.result()
    return set(result.state_dict if isinstance(result, torch.export.ExportedProgram) else result.state_dict())


def doubled(graph: TorchGraph, op: Any) -> None:
    """Give the op twice its weight and its bias, plus one where it has none."""
    weight = graph.constant(op.weight)
    bias = np.ones(weight.shape[0], weight.dtype) if op.bias is None else graph.constant(op.bias) * 2
    graph.set_constants(op, weight=weight * 2, bias=bias)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- set_constants


@every_host
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_gets_constants_under_new_names(host: type, bias: bool) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=bias))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    graph = build(host, net, x := image())
    doubled(graph, the(graph, ops.Conv))
    assert graph.edits == 1
    same(finish(host, graph, x), net(x) * 2 + (0 if bias else 1))
    assert not names(graph) & set(before) and len(names(graph)) == 2
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    op = the(graph, ops.Conv)  # read anew, it has what it was given
    same(torch.from_numpy(graph.constant(op.weight).copy()), before["0.weight"] * 2)


@every_host
def test_a_module_that_is_called_twice_changes_at_one_call(host: type) -> None:
    conv = nn.Conv2d(4, 4, 1)
    net = Fn(lambda m, x: torch.relu(m.conv(m.conv(x))), conv=conv)
    graph = build(host, net, x := image())
    first, second = graph.ops(ops.Conv)
    doubled(graph, first)
    same(finish(host, graph, x), torch.relu(conv(conv(x) * 2)))
    doubled(graph, next(graph.ops(ops.Conv)))  # what was new is replaced, what was old stays
    same(finish(host, graph, x), torch.relu(conv(conv(x) * 4)))
    assert graph.describe(first) == graph.describe(next(graph.ops(ops.Conv))) != graph.describe(second)
    assert len(names(graph)) == 4


@both_forms
def test_tied_parameters_are_untied_by_an_edit(host: type) -> None:
    a, b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
    b.weight = a.weight
    graph = build(host, nn.Sequential(a, b), x := image())
    doubled(graph, next(graph.ops(ops.Conv)))
    same(finish(host, graph, x), F.conv2d(a(x) * 2 + 1, a.weight))
    assert a.weight is b.weight


PRODUCTS = {
    "mm": lambda m, x: torch.mm(x, m.w),
    "method": lambda m, x: x.mm(m.w),
    "operator": lambda m, x: x @ m.w,
    "bias": lambda m, x: x @ m.w + m.b,
    "bias-first": lambda m, x: torch.add(m.b, torch.matmul(x, m.w)),
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w, beta=3, alpha=0.5),
    "linear": lambda m, x: F.linear(x, m.w.t(), bias=m.b),
    "linear-no-bias": lambda m, x: F.linear(x, m.w.t()),
}


@pytest.mark.parametrize(
    ("host", "product"),
    [
        *((host, product) for host in (Traced, Lifted) for product in PRODUCTS),
        (Decomposed, "operator"),
        (Exported, "mm"),
    ],
)
def test_every_kind_of_linear_takes_a_weight_and_a_bias(host: type, product: str) -> None:
    net = Fn(PRODUCTS[product], w=nn.Parameter(torch.randn(4, 6)), b=nn.Parameter(torch.randn(6)))
    graph = build(host, net, x := torch.randn(3, 4))
    op = the(graph, ops.Linear)
    weight, bias = np.random.rand(4, 6).astype(np.float32), np.random.rand(6).astype(np.float32)
    graph.set_constants(op, weight=weight if op.out_axis == 1 else weight.T, bias=bias)
    output = op.output
    assert graph.op_producing(output) is not None and graph.readers(output)[0].name == "graph output 0"
    same(finish(host, graph, x), x @ torch.from_numpy(weight) + torch.from_numpy(bias))
    op = the(graph, ops.Linear)
    assert (op.alpha, op.beta) == (1.0, 1.0) and graph.constant(op.bias).shape == (6,)
    assert "w" not in names(graph) and len(names(graph) - {"b"}) == 2


@both_forms
def test_a_product_over_batch_axes_gets_a_bias_alone(host: type) -> None:
    net = Fn(lambda m, x: torch.relu(x @ m.w), w=nn.Parameter(torch.randn(4, 4)))
    graph = build(host, net, x := torch.randn(2, 3, 4))
    graph.set_constants(the(graph, ops.Linear), bias=np.ones(4, np.float32))
    same(finish(host, graph, x), torch.relu(x @ net.w + 1))


@every_host
def test_a_batch_norm_gets_statistics(host: type) -> None:
    net = nn.Sequential(nn.BatchNorm2d(4))
    graph = build(host, net, x := image())
    ones = np.ones(4, np.float32)
    graph.set_constants(the(graph, ops.BatchNorm), scale=2 * ones, bias=ones, mean=ones, var=4 * ones)
    same(finish(host, graph, x), 2 * (x - 1) / (4 + 1e-5) ** 0.5 + 1)
    if issubclass(host, Lifted):
        kinds = [spec.kind.name for spec in graph.result().graph_signature.input_specs]
        assert kinds == ["PARAMETER"] * 2 + ["BUFFER"] * 3 + ["USER_INPUT"]
    assert float(net[0].running_mean[0]) == 0


@both_forms
def test_a_number_gives_way_to_a_constant(host: type) -> None:
    net = Fn(lambda m, x: torch.relu(2 * m.c(x)), c=nn.Conv2d(4, 4, 1))
    graph = build(host, net, x := image())
    op = the(graph, ops.Elementwise)
    field = "left" if isinstance(graph.constant(op.left), np.ndarray) else "right"
    graph.set_constants(op, **{field: np.full((4, 1, 1), 3, np.float32)})
    same(finish(host, graph, x), torch.relu(3 * net.c(x)))


@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types_survive(host: type, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1)).to(dtype)
    graph = build(host, net, x := image().to(dtype))
    op = the(graph, ops.Conv)
    weight = graph.constant(op.weight)
    graph.set_constants(op, weight=weight, bias=np.zeros(4, weight.dtype))
    graph.commit()
    result = graph.result()
    run = result.module() if host is Lifted else result
    assert run(x).dtype == dtype and {p.dtype for p in run.parameters()} == {dtype}
    assert torch.equal(next(iter(run.parameters())).flatten(), net[0].weight.flatten())


@both_forms
def test_memory_format_and_training_of_parameters_survive(host: type) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3)).to(memory_format=torch.channels_last)
    net[0].requires_grad_(False)
    graph = build(host, net, image().to(memory_format=torch.channels_last))
    for op in graph.ops(ops.Conv):
        doubled(graph, op)
    graph.commit()
    result = graph.result()
    tensors = list(result.state_dict.values()) if host is Lifted else list(result.parameters())
    weights = [tensor for tensor in tensors if tensor.dim() == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert sorted(tensor.requires_grad for tensor in tensors) == [False, False, True, True]
    assert all(isinstance(tensor, nn.Parameter) for tensor in tensors)


@every_host
def test_a_computed_weight_is_replaced_with_all_that_computed_it(host: type) -> None:
    net = Fn(lambda m, x: F.conv2d(x, m.v / m.v.norm() * m.g), v=nn.Parameter(torch.randn(4, 4, 1, 1)), g=torch.ones(1))
    graph = build(host, net, x := image())
    op = the(graph, ops.Conv)
    graph.set_constants(op, weight=graph.constant(op.weight) * 2)
    same(finish(host, graph, x), net(x) * 2)
    assert len(names(graph)) == 1 and sum(graph.summary().ops.values()) == 1


# -- replace, erase, replace_with_constant


@every_host
def test_replacing_an_op_drops_it_with_its_constants(host: type) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    graph = build(host, net, x := image())
    norm = the(graph, ops.BatchNorm)
    assert graph.can_vanish(norm, norm.input)
    graph.replace(norm, by=norm.input)
    same(finish(host, graph, x), torch.relu(net[0](x)))
    assert names(graph) == {"0.weight", "0.bias"}  # num_batches_tracked is gone, too
    assert list(graph.ops(ops.BatchNorm)) == [] and sum(graph.summary().ops.values()) == 2


@both_forms
def test_replacing_walks_on_over_what_was_read(host: type) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), *(nn.BatchNorm2d(4) for _ in range(3)))
    graph = build(host, net, x := image())
    seen = 0
    for norm in graph.ops(ops.BatchNorm):  # each is read when it is reached
        graph.replace(norm, by=norm.input)
        seen += 1
    assert seen == 3
    same(finish(host, graph, x), net[0](x))


@both_forms
def test_an_op_that_nobody_reads_is_dead_and_erased(host: type) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch.sigmoid(m.a(x))
        return m.b(x)

    graph = build(host, Fn(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)), x := image())
    for op in graph.ops(ops.Dead):
        graph.erase(op)
    assert graph.edits == 2
    finish(host, graph, x)
    assert names(graph) == {"b.weight", "b.bias"}


def test_what_has_side_effects_is_never_dead() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.hooked(x)
        m.norm(x)
        m.count.add_(1)
        torch.rand(2)
        m.drop(x)
        y = x + 1
        y.mul_(2)
        return y

    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *args: None)
    net = Fn(forward, hooked=hooked, norm=nn.BatchNorm2d(4), count=torch.zeros(()), drop=nn.Dropout())
    assert list(TorchGraph.from_module(net.train()).ops(ops.Dead)) == []
    graph = TorchGraph.from_exported_program(torch.export.export(net.eval(), (image(),)))
    for op in graph.ops(ops.Dead):
        graph.erase(op)
    graph.commit()
    targets = " ".join(str(node.target) for node in graph.result().graph.nodes)
    assert "aten.add_" in targets and "aten.mul_" in targets and "batch_norm" not in targets


@every_host
def test_a_known_value_is_put_in_place(host: type) -> None:
    net = Fn(lambda m, x: torch.relu(F.conv2d(x, m.w.exp() * 0.5)), w=nn.Parameter(torch.randn(4, 4, 1, 1)))
    graph = build(host, net, x := image())
    constant = next(iter(graph.ops(ops.Constant)))
    expected = graph.constant(constant.output)
    graph.replace_with_constant(constant)
    assert graph.edits == 1
    same(finish(host, graph, x), net(x))
    np.testing.assert_array_equal(graph.constant(the(graph, ops.Conv).weight), expected)
    assert len(names(graph)) == 1 and list(graph.ops(ops.Constant)) == []
    tensor = next(
        iter(graph.result().state_dict.values() if isinstance(host(), Lifted) else graph.result().parameters())
    )
    assert isinstance(tensor, nn.Parameter) and tensor.requires_grad


def test_a_transposed_weight_shares_its_memory_and_a_slice_does_not() -> None:
    net = Fn(lambda m, x: x @ m.w.t() + m.big[:, :6].sum(), w=nn.Parameter(torch.randn(6, 4)), big=torch.randn(3, 600))
    graph = build(Exported, net, image(3, 4))
    for op in graph.ops(ops.Constant):
        graph.replace_with_constant(op)
    graph.commit()
    result = graph.result()
    (weight,) = result.parameters()
    assert weight.data_ptr() == net.w.data_ptr() and weight.shape == (4, 6)
    assert sum(buffer.untyped_storage().nbytes() for buffer in result.buffers()) < 100


@both_forms
def test_what_becomes_constant_by_an_edit_is_known(host: type) -> None:
    net = Fn(
        lambda m, x: torch.relu(F.conv2d(x, (m.drop(m.w) * 2).exp())),
        w=nn.Parameter(torch.randn(4, 4, 1, 1)),
        drop=nn.Dropout(),
    )
    graph = build(host, net, x := image())
    for op in graph.ops(ops.Identity):
        graph.replace(op, by=op.input)
    assert not isinstance(graph.constant(the(graph, ops.Conv).weight), Missed)
    same(finish(host, graph, x), net(x))


def test_an_invalid_graph_is_found_at_commit() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    graph = build(Exported, net, image())
    norm, conv = the(graph, ops.BatchNorm), the(graph, ops.Conv)
    (relu,) = [node for node in graph._wiring.order if "relu" in node.name]
    conv.node.replace_input_with(conv.input, relu)
    with pytest.raises(ValueError, match="used before it has been defined"):
        graph.commit()
    assert norm is not None


# -- values that an output or another layout needs


@every_host
def test_an_input_does_not_become_an_output(host: type) -> None:
    net = nn.Sequential(nn.Identity() if host is Traced else nn.Dropout())
    graph = build(host, net, x := image())
    op = the(graph, ops.Identity) if list(graph.ops(ops.Identity)) else None
    if op is None:  # the decomposition copies, which is no identity between an input and an output
        assert host is Decomposed
        return
    assert not graph.can_vanish(op, op.input)
    graph.replace(op, by=op.input)
    same(finish(host, graph, x), x)
    assert sum(graph.summary().ops.values()) == 1


@every_host
def test_what_normalizes_an_input_can_vanish(host: type) -> None:
    """The checks of the inputs that torch.export adds only look at them."""
    net = nn.Sequential(nn.BatchNorm2d(4, affine=False, eps=0), nn.Conv2d(4, 4, 1))
    graph = build(host, net, x := image())
    norm = the(graph, ops.BatchNorm)
    assert graph.can_vanish(norm, norm.input)
    assert [type(reader.op) for reader in graph.readers(norm.input)] == [ops.BatchNorm]
    graph.replace(norm, by=norm.input)
    same(finish(host, graph, x), net(x))
    assert sum(graph.summary().ops.values()) == 1


def write_to_input(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x).view(2, 4, 8, 8))
    x = x * 1
    z = m.norm(x)
    x.add_(1)  # after the norm, before its reader
    return m.conv(z) + x + y


def write_to_copy(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.norm(y)
    z.mul_(2)
    return y + z


def write_to_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.norm(y)
    z.permute(0, 2, 3, 1)[..., 0].zero_()
    return y * z


@both_forms
@pytest.mark.parametrize("forward", [write_to_input, write_to_copy, write_to_view], ids=lambda f: f.__name__)
def test_values_that_are_written_in_place_stay_apart(host: type, forward: Any) -> None:
    net = Fn(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4, affine=False, eps=0))  # eval: the identity
    graph = build(host, net, x := image())
    expected = net(x.clone())
    norms = list(graph.ops(ops.BatchNorm))
    assert not graph.can_vanish(norms[-1], norms[-1].input)
    for norm in graph.ops(ops.BatchNorm):
        graph.replace(norm, by=norm.input)
    same(finish(host, graph, x), expected)
    assert not any("norm" in name.lower() for name in graph.summary().ops)


@both_forms
def test_a_sum_in_place_is_its_left_operand_and_not_its_right_one(host: type) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x, y = m.a(x), m.b(x)
        y += x
        return torch.relu_(y) * x

    net = Fn(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    graph = build(host, net, x := image())
    total = next(graph.ops(ops.Elementwise))
    assert graph.can_vanish(total, total.left) and not graph.can_vanish(total, total.right)
    graph.replace(total, by=total.right)
    same(finish(host, graph, x), torch.relu(net.a(x)) * net.a(x))


@pytest.mark.parametrize("host", [Traced, Exported, Lifted], ids=lambda host: host.__name__)
@pytest.mark.parametrize("view", [True, False])
def test_a_view_gets_the_layout_that_it_needs(host: type, view: bool) -> None:
    """A sum is dense where its first operand is; a `view` of it may not be one of the second."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.conv(x) + m.linear(x.transpose(1, 2)).transpose(1, 2))
        return y.view(2, -1) if view else y.sum(2)

    net = Fn(forward, conv=nn.Conv1d(4, 6, 1), linear=nn.Linear(4, 6))
    graph = build(host, net, x := image(2, 4, 5))
    addition = next(graph.ops(ops.Elementwise))
    transposed = addition.right
    assert graph.can_vanish(addition, transposed) is not view
    graph.replace(addition, by=transposed)
    y = torch.relu(net.linear(x.transpose(1, 2)).transpose(1, 2))
    same(finish(host, graph, x), y.reshape(2, -1) if view else y.sum(2))
    assert_recorded_values_are_right(graph)


def assert_recorded_values_are_right(graph: TorchGraph) -> None:
    """Run the graph on fake tensors and compare what each node gives with its meta."""
    for node in graph._wiring.alive():
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with value.fake_mode:  # type: ignore[attr-defined]
            found = node.target(*args, **kwargs)  # type: ignore[operator]
        assert (found.shape, found.stride(), found.dtype) == (value.shape, value.stride(), value.dtype), node


@pytest.mark.parametrize("host", [Exported, Lifted, Decomposed], ids=lambda host: host.__name__)
def test_new_nodes_have_meta_and_old_ones_keep_theirs(host: type) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5, bias=False))
    graph = build(host, net, image())
    norm, conv = the(graph, ops.BatchNorm), the(graph, ops.Conv)
    kept = {key: conv.node.meta[key] for key in ("stack_trace", "nn_module_stack", "val")}
    doubled(graph, conv)
    graph.replace(norm, by=conv.output)
    linear = the(graph, ops.Linear)
    graph.set_constants(linear, bias=np.ones(5, np.float32))
    graph.commit()
    assert all(conv.node.meta[key] is value for key, value in kept.items())
    for node in graph.result().graph.nodes:
        if node.op in ("get_attr", "placeholder") and "graph" not in node.name:
            assert isinstance(node.meta["val"], Tensor), node
    assert_recorded_values_are_right(graph)
