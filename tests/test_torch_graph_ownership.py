"""What belongs to the user stays as it was, and what they get back is whole: modules, programs, branches."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from test_torch_graph import Fn, image, the
from test_torch_graph_edits import assert_recorded_values_are_right, doubled, same
from torch import Tensor, nn

import fuser
from fuser import ops
from fuser.errors import InputError
from fuser.graphs.torch.copy import Copier
from fuser.graphs.torch.graph import TorchGraph


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def without_norm(graph: TorchGraph) -> Any:
    """The result after an edit of each kind."""
    norm = the(graph, ops.BatchNorm)
    doubled(graph, graph.op_producing(norm.input))
    graph.replace(norm, by=norm.input)
    graph.commit()
    return graph.result()


# -- modules


def test_the_user_s_module_is_not_touched() -> None:
    net = small()
    before = copy.deepcopy(net)
    modules, tensors = list(net.modules()), dict(net.state_dict(keep_vars=True))
    result = without_norm(TorchGraph.from_module(net))
    result.half().train()
    result.get_parameter(next(name for name, _ in result.named_parameters())).requires_grad_(False)
    for module, other in zip(net.modules(), before.modules(), strict=True):
        assert module in modules and module.training == other.training and vars(module).keys() == vars(other).keys()
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert tensor is tensors[name] and torch.equal(tensor, before.state_dict()[name])
        assert tensor.dtype == before.state_dict()[name].dtype
        assert tensor.requires_grad == dict(before.state_dict(keep_vars=True))[name].requires_grad


def test_weights_are_shared_until_they_are_replaced() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    for result in (
        TorchGraph.from_module(net).result(),
        TorchGraph.from_graph_module(torch.fx.symbolic_trace(net)).result(),
        TorchGraph.from_exported_program(torch.export.export(net, (image(),))).result().module(),
    ):
        state = result.state_dict()
        assert {t.data_ptr() for t in state.values()} == {t.data_ptr() for t in net.state_dict().values()}


def test_the_result_of_tracing_is_a_whole_module() -> None:
    net = nn.Sequential(small(), nn.Sequential(nn.Flatten(1), nn.Linear(144, 3))).eval()
    net[1].train()
    result = without_norm(TorchGraph.from_module(net))
    expected = result(x := image())
    assert type(result).__name__ == "Sequential" and not result.training
    assert result.get_submodule("1").training and not result.get_submodule("0").training
    same(pickle.loads(pickle.dumps(result))(x), expected)
    same(copy.deepcopy(result)(x), expected)
    torch.save(result, buffer := io.BytesIO())
    buffer.seek(0)
    same(torch.load(buffer, weights_only=False)(x), expected)
    same(torch.jit.script(result)(x), expected)
    same(result.to(torch.float64)(x.double()).float(), expected)
    assert b"fuser" not in pickle.dumps(result)


def test_hooks_of_the_outermost_module_are_kept() -> None:
    net = small()
    net.register_forward_hook(lambda module, args, output: output + 1)
    result = without_norm(TorchGraph.from_module(net))
    assert float(result(image()).detach().min()) >= 1


def test_tracing_does_not_write_to_the_module() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            self.calls += 1
            return x + torch.ones(4, 8, 8) + self.count

    net = Stateful()
    keys = set(vars(net))
    result = TorchGraph.from_module(net).result()
    assert (net.count, net.calls) == (0, 0) and set(vars(net)) == keys
    x = torch.zeros(1, 4, 8, 8)
    assert float(result(x).max()) == 2 and float(result(x).max()) == 3  # it still counts


def test_a_module_that_cannot_be_traced_gets_a_way_out() -> None:
    net = Fn(lambda m, x: x if x.sum() > 0 else -x)
    with pytest.raises(InputError, match="example_inputs") as error:
        TorchGraph.from_module(net)
    assert "\n" not in str(error.value)


def test_an_assignment_to_a_buffer_is_not_lost_silently() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return x * self.count

    with pytest.raises(InputError, match=r"'count'.*example_inputs"):
        TorchGraph.from_module(net := Counting())
    assert net.count == 0


def test_copies_keep_what_hangs_together() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn, self.lock = nn.Linear(4, 4), nn.GRU(4, 4), threading.Lock()
            self.blocks = [self.a]  # not registered
            self.by_name = {"a": self.a}
            self.call = self.a.forward

        def forward(self, x: Tensor) -> Tensor:
            return self.call(self.blocks[0](self.by_name["a"](x)))

    net = Odd()
    made = Copier().module(net)
    assert made.a is not net.a and made.blocks[0] is made.a and made.by_name["a"] is made.a
    assert made.call.__self__ is made.a and made.lock is net.lock
    assert made.a.weight is not net.a.weight and made.a.weight.data_ptr() == net.a.weight.data_ptr()
    assert made.rnn._flat_weights[0] is made.rnn.weight_ih_l0
    same(TorchGraph.from_module(net).result()(x := torch.randn(2, 4)), net(x))


def test_a_graph_module_keeps_what_its_graph_does_not_use() -> None:
    traced = torch.fx.symbolic_trace(small())
    traced.extra, traced.note = nn.Linear(2, 2), {"author": "me"}
    traced.meta["key"] = "value"
    code = traced.code
    result = without_norm(TorchGraph.from_graph_module(traced))
    assert result.note == {"author": "me"} and result.meta["key"] == "value" and "extra.weight" in names_of(result)
    assert traced.code == code and result.code != code and "1.weight" not in names_of(result)


def names_of(module: nn.Module) -> set[str]:
    return set(module.state_dict())


def test_an_old_state_dict_does_not_undo_an_edit() -> None:
    net = small()
    result = without_norm(TorchGraph.from_module(net))
    expected = result(x := image())
    result.load_state_dict(net.state_dict(), strict=False)
    same(result(x), expected)


# -- exported programs


class Exportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = small(), nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("offset", torch.ones(3), persistent=False)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        self.count.add_(1)
        y = self.body(x)
        return {
            "features": y,
            "scores": self.head(y.mean((2, 3))) * scale + torch.tensor([1.0, 2.0, 3.0]) + self.offset,
        }


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"x": {0: batch}, "scale": None}
    inputs, keywords = (image(),), {"scale": torch.randn(3)}
    return torch.export.export(Exportable().eval(), inputs, keywords, dynamic_shapes=shapes)


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_stays_legal(program: torch.export.ExportedProgram, decomposed: bool) -> None:
    program = program.run_decompositions() if decomposed else program
    state = {name: (tensor, tensor.clone()) for name, tensor in program.state_dict.items()}
    text = str(program)
    graph = TorchGraph.from_exported_program(program)
    graph.set_constants(the(graph, ops.Linear), bias=np.zeros(3, np.float32))
    result = without_norm(graph)

    result.validate()
    assert str(program) == text and list(program.state_dict) == list(state)
    for name, (tensor, before) in state.items():
        assert program.state_dict[name] is tensor and torch.equal(tensor, before)
    signature, before = result.graph_signature, program.graph_signature
    assert signature.user_inputs == before.user_inputs and signature.user_outputs == before.user_outputs
    assert signature.buffers_to_mutate.keys() == before.buffers_to_mutate.keys()
    assert list(signature.buffers_to_mutate.values()) == list(before.buffers_to_mutate.values())
    assert result.range_constraints == program.range_constraints
    assert not any("body.1" in name for name in (*result.state_dict, *signature.parameters, *signature.buffers))
    kinds = [spec.kind.name for spec in signature.input_specs]
    assert kinds == sorted(kinds, key=["PARAMETER", "BUFFER", "CONSTANT_TENSOR", "USER_INPUT"].index)
    assert set(result.state_dict) == {*signature.parameters, *(set(signature.buffers) - {"offset"})}
    assert_recorded_values_are_right(graph)

    x, scale = image(5, 4, 8, 8), torch.randn(3)
    expected = result.module()(x, scale=scale)
    y = torch.relu(result_of_body(program, x))
    same(expected["features"], y)
    torch.export.save(result, buffer := io.BytesIO())
    buffer.seek(0)
    for again in (
        torch.export.load(buffer),
        result.run_decompositions(),
        TorchGraph.from_exported_program(result).result(),
    ):
        same(again.module()(x, scale=scale)["scores"], expected["scores"])


def result_of_body(program: torch.export.ExportedProgram, x: Tensor) -> Tensor:
    state = program.state_dict
    return torch.conv2d(x, state["body.0.weight"], state["body.0.bias"]) * 2


def test_an_edited_program_goes_through_the_onnx_exporter() -> None:
    result = without_norm(TorchGraph.from_exported_program(torch.export.export(small(), (x := image(),))))
    onnx_program = torch.onnx.export(result, dynamo=True, optimize=False, verbose=False)
    assert "BatchNormalization" not in {node.op_type for node in onnx_program.model.graph}
    same(onnx_program(x)[0], result.module()(x))


def test_outputs_keep_their_names() -> None:
    program = torch.export.export(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval(), (image(),))
    result = without_norm(TorchGraph.from_exported_program(program))
    assert result.graph_signature.user_outputs == program.graph_signature.user_outputs == ("batch_norm",)


def test_the_signatures_of_preserved_modules_are_kept() -> None:
    norm = Fn(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(4))
    body = Fn(lambda m, x: m.inner(m.conv(x)), conv=nn.Conv2d(4, 4, 1), inner=norm)
    net = Fn(lambda m, x: m.last(m.body(x)), body=body, last=nn.ReLU()).eval()
    program = torch.export.export(net, (x := image(),), preserve_module_call_signature=("body", "body.inner"))
    result = without_norm(TorchGraph.from_exported_program(program))
    result.validate()
    expected = result.module()(x)
    unflattened = torch.export.unflatten(result)
    same(unflattened(x), expected)
    same(torch.relu(unflattened.body(x)), expected)


# -- torch.cond


class Branching(nn.Module):
    """The convolution is shared by both branches; the norm belongs to one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        def folded(y: Tensor) -> Tensor:
            return self.norm(self.conv(y)).relu()

        def plain(y: Tensor) -> Tensor:
            return self.conv(y) * 3

        return torch.cond(x.sum() > 0, folded, plain, (x,))


@pytest.mark.parametrize("form", ["lifted", "attributes", "decomposed"])
def test_operators_in_branches_are_edited_where_they_are(form: str) -> None:
    net = Branching().eval()
    program = torch.export.export(net, (x := image(),))
    if form == "decomposed":
        program = program.run_decompositions()
    if form == "attributes":
        graph = TorchGraph.from_graph_module(program.module())
    else:
        graph = TorchGraph.from_exported_program(program)
    norm = the(graph, ops.BatchNorm)
    assert graph.describe(norm).startswith("true_graph_0.") and graph.rank(norm.input) == 4
    conv = graph.op_producing(norm.input)
    readers = [reader.name for reader in graph.readers(conv.weight)]
    assert sorted(name.split(".")[0] for name in readers) == ["false_graph_0", "true_graph_0"]
    scale = graph.constant(norm.scale) / np.sqrt(graph.constant(norm.var) + norm.epsilon)
    weight = graph.constant(conv.weight) * scale.reshape(-1, 1, 1, 1)
    graph.set_constants(conv, weight=weight, bias=graph.constant(norm.bias) - graph.constant(norm.mean) * scale)
    graph.replace(norm, by=conv.output)
    graph.commit()
    result = graph.result()
    run = result if form == "attributes" else result.module()
    for inputs in (x.abs(), -x.abs()):
        same(run(inputs), net(inputs))
    stored = names_of(run)
    assert not any("norm" in name for name in stored) and "conv.weight" in stored and len(stored) == 3
    (cond,) = [node for node in result.graph.nodes if "cond" in str(node.target)]
    assert len(cond.args[3]) == 4  # x, both weights, the bias
    if form != "attributes":
        result.validate()
        same(result.run_decompositions().module()(x), net(x))
    assert str(program).count("batch_norm") >= 1


def test_a_branch_does_not_return_its_operand() -> None:
    net = Fn(lambda m, x: torch.cond(x.sum() > 0, m.yes, m.no, (x,)))
    net.yes, net.no = (lambda y: torch.dropout(y.clone(), 0.5, False)), (lambda y: y * 2)
    graph = TorchGraph.from_exported_program(torch.export.export(net, (x := image(),)))
    vanished = []
    for op in graph.ops(ops.Identity):
        vanished.append(graph.can_vanish(op, op.input))
        graph.replace(op, by=op.input)
    graph.commit()
    assert vanished == [False, True]  # the copy stays, whatever becomes of what is between it and the output
    same(graph.result().run_decompositions().module()(x.abs()), x.abs())


# -- size


def test_time_grows_with_the_number_of_nodes() -> None:
    """Twice the nodes take about twice the time; a rescan of the graph for each edit would take four times."""
    net = nn.Sequential(*(layer for _ in range(600) for layer in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))).eval()

    def seconds(pairs: int) -> float:
        graph = TorchGraph.from_graph_module(torch.fx.symbolic_trace(net[: 2 * pairs]))
        gc.collect()
        started = time.process_time()
        for norm in graph.ops(ops.BatchNorm):
            conv = graph.op_producing(norm.input)
            assert len(graph.readers(conv.output)) == 1 and len(graph.readers(conv.weight)) == 1
            doubled(graph, conv)
            graph.replace(norm, by=conv.output)
        graph.commit()
        return time.process_time() - started

    assert min(seconds(600) for _ in range(2)) < 3 * max(seconds(300) for _ in range(2)) + 0.05


def test_a_constant_that_no_branch_reads_any_more_is_gone_from_every_later_look() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, scale = self.weight, self.scale
            return torch.cond(x.sum() > 0, lambda v: nn.functional.conv2d(v, weight) * scale, lambda v: v * 2, (x,))

    x = torch.randn(1, 4, 5, 5)
    result = fuser.optimize(Choice().eval(), example_inputs=(x,))
    assert [remark.pass_name for remark in result.report.applied] == ["fold-affine"]
    assert result.report.verification.passed
