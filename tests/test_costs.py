"""Multiply-adds: counted from shapes, on every host, as torch's own counter counts them while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fuser.passes.fold_constants import FoldConstants
from hosts import Onnx
from hosts_torch import Decomposed, Exported, Lifted, Traced
from nets import Net
from onnx_models import body, conv, conv_constants, model, node
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fuser
from fuser import pipeline
from fuser.files import ModelFile
from fuser.graphs.onnx.graph import OnnxGraph
from fuser.graphs.torch.graph import TorchGraph

Wiring = Callable[[Net, Tensor], Tensor]

NETS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    "linear": lambda: nn.Linear(8, 5),
    "matrix": lambda: Net(lambda m, x: m.linear(x.flatten(1)), linear=nn.Linear(256, 3, bias=False)),
    "product": lambda: Net(lambda m, x: x @ x.transpose(-1, -2)),
    "attention": lambda: Net(lambda m, x: nn.functional.scaled_dot_product_attention(x, x + 1, x * 2)),
    "nothing": lambda: nn.ReLU(),
}


def counted(module: nn.Module, x: Tensor) -> int:
    """Attention as the two products that it is: the counter has no formula for every kernel of it."""
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        module(x)
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("host", [Onnx, Exported, Lifted, Decomposed], ids=lambda host: host.__name__)
@pytest.mark.parametrize("name", NETS)
def test_as_many_as_torch_counts(host: Any, name: str) -> None:
    module, x = NETS[name]().eval(), torch.randn(2, 4, 8, 8)
    graph = host().build(module, (x,))
    pipeline.run(graph, [FoldConstants()])
    found = graph.summary().multiply_adds
    if name == "attention" and host is Decomposed:
        assert found in (None, counted(module, x))  # into a kernel that is not counted
    else:
        assert found == counted(module, x)


def test_a_traced_module_has_no_shapes() -> None:
    assert Traced().build(nn.Conv2d(4, 6, 3), ()).summary().multiply_adds is None
    assert Traced().build(nn.ReLU(), ()).summary().multiply_adds == 0
    recurrent = Net(lambda m, x: m.cell(x)[0], cell=nn.LSTM(4, 4))
    assert Traced().build(recurrent, ()).summary().multiply_adds is None


def test_a_dynamic_batch_counts_as_one_sample() -> None:
    module, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("N")},))
    one_sample = 6 * 4 * 9 * 64
    assert TorchGraph.from_exported_program(program).summary().multiply_adds == one_sample
    proto = model([conv("x", "y", pads=[1] * 4)], constants=conv_constants(4, 6))
    assert OnnxGraph(ModelFile.from_proto(proto)).summary().multiply_adds == one_sample


@pytest.mark.parametrize("x", [("N", 4, "H", 8), (1, 4, "H", 8)])
def test_another_dynamic_size_is_not_guessed(x: tuple[int | str, ...]) -> None:
    proto = model([conv("x", "y")], constants=conv_constants(), x=x)
    assert OnnxGraph(ModelFile.from_proto(proto)).summary().multiply_adds is None


def test_what_may_run_many_times_or_never_is_not_known() -> None:
    branches = {
        "then_branch": body([conv("x", "p", "w")], ["p"], {"w": conv_constants()["w"]}),
        "else_branch": body([node("Neg", ["x"], ["q"])], ["q"]),
    }
    nodes = [
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Cast", ["m"], ["c"], to=9),
        node("If", ["c"], **branches),
    ]
    assert OnnxGraph(ModelFile.from_proto(model(nodes))).summary().multiply_adds is None


def test_a_custom_operator_may_do_anything() -> None:
    custom = node("Mystery", ["x"])
    custom.domain = "custom"
    assert OnnxGraph(ModelFile.from_proto(model([custom]))).summary().multiply_adds is None


def test_the_report_tells_before_and_after() -> None:
    """Two parallel convolutions become one: half the work."""
    constants = {**conv_constants(), "v": np.ones((4, 4, 3, 3), np.float32)}
    nodes = [conv("x", "a", "w"), conv("x", "b", "v"), node("Add", ["a", "b"])]
    report = fuser.explain(model(nodes, constants=constants, x=(1, 4, 8, 8)))
    work = 4 * 36 * 36
    assert (report.before.multiply_adds, report.after.multiply_adds) == (2 * work, work)
    assert report.to_dict()["after"]["multiply_adds"] == work
    assert f"multiply-adds       {2 * work:,}" in str(report)
    unknown = fuser.explain(model(nodes, constants=constants, x=(1, 4, "H", 8)))
    assert "not known" in str(unknown) and unknown.to_dict()["before"]["multiply_adds"] is None
