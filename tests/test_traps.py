"""Twelve nets on which public tools fold a BatchNorm wrongly: right, or refused with a code, on every torch dialect
and through the whole pipeline (optimize, export, optimize the file).
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from nets import after, lively, read_twice, shared_conv, tied_weights
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fuser
from fuser import pipeline, registry
from fuser.graphs.torch.graph import TorchGraph


class BatchNormAct(nn.BatchNorm2d):
    """As in timm: a BatchNorm that is also its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


class QuantizedConv(nn.Conv2d):
    """A weight on the grid of eight bits, as in quantization-aware training."""

    def __init__(self, per_channel: bool) -> None:
        super().__init__(4, 6, 3, bias=False)
        self.per_channel = per_channel
        self.register_buffer("scale", torch.full((6,), 0.01))
        self.register_buffer("zero", torch.zeros(6, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        if self.per_channel:
            weight = torch.fake_quantize_per_channel_affine(weight, self.scale.float(), self.zero, 0, -128, 127)
        else:
            weight = torch.fake_quantize_per_tensor_affine(weight, 0.01, 0, -128, 127)
        return nn.functional.conv2d(x, weight.to(self.weight.dtype))


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    net[0].register_forward_hook(lambda module, args, output: output * 3)
    return net


def parametrized() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    return net


def mixed(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3).to(dtype), nn.BatchNorm2d(6))


@dataclass(frozen=True)
class Trap:
    """codes: the remarks of fold-batch-norm; `elsewhere` those on a dialect that sees more or less."""

    build: Callable[[], nn.Module]
    codes: dict[str, int]
    shape: tuple[int, ...] = (2, 4, 8, 8)
    elsewhere: dict[str, dict[str, int]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    training: bool = False


TRAPS = {
    "shared-conv": Trap(shared_conv, {"applied": 2}),
    "two-readers": Trap(read_twice, {"shared-output": 1}),
    "square-transposed": Trap(after(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)), {"applied": 1}),
    "grouped-transposed": Trap(after(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), {"applied": 1}),
    "rank-3-linear": Trap(
        after(nn.Linear(4, 5), nn.BatchNorm1d(5)), {"axis-mismatch": 1}, (2, 5, 4), {"traced": {"rank": 1}}
    ),
    "unbatched-conv": Trap(
        after(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), {"rank": 1}, (4, 8), {"decomposed": {"axis-mismatch": 1}}
    ),
    "training-mode": Trap(after(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), {"training-mode": 1}, training=True),
    "bfloat16": Trap(lambda: mixed(torch.bfloat16), {"applied": 1}, dtype=torch.bfloat16),
    "float16": Trap(lambda: mixed(torch.float16), {"applied": 1}, dtype=torch.float16),
    "tied": Trap(tied_weights, {"applied": 2}),
    "hooks": Trap(hooked, {"applied": 1}, elsewhere={"traced": {"hooks": 1}}),
    "parametrization": Trap(parametrized, {"applied": 1}, elsewhere={"traced": {"hooks": 1}}),
    "subclass": Trap(after(nn.Conv2d(4, 6, 3), BatchNormAct(6)), {"applied": 1}, elsewhere={"traced": {"hooks": 1}}),
    "padded-conv-after": Trap(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), {"padding": 1}
    ),
    "fake-quantized": Trap(after(QuantizedConv(per_channel=False), nn.BatchNorm2d(6)), {"applied": 1}),
    "fake-quantized-channels": Trap(after(QuantizedConv(per_channel=True), nn.BatchNorm2d(6)), {"applied": 1}),
}


def net(trap: Trap) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    module = lively(trap.build()).train(trap.training)
    return module, torch.randn(trap.shape).to(trap.dtype)


@functools.cache
def case(name: str) -> tuple[nn.Module, Tensor, torch.export.ExportedProgram]:
    module, x = net(TRAPS[name])
    return module, x, torch.export.export(module, (x,))


def rewritten(graph: TorchGraph, x: Tensor) -> tuple[list[Any], np.ndarray]:
    outcome = pipeline.run(graph, registry.load().select())
    result = graph.result()
    if isinstance(result, torch.export.ExportedProgram):
        result.validate()
        result = result.module()
    with torch.no_grad():
        return [*outcome.applied, *outcome.missed], double(result(x))


def traced(module: nn.Module, x: Tensor, program: torch.export.ExportedProgram) -> Any:
    return rewritten(TorchGraph.from_module(module), x)


def exported(module: nn.Module, x: Tensor, program: torch.export.ExportedProgram) -> Any:
    return rewritten(TorchGraph.from_graph_module(program.module()), x)


def lifted(module: nn.Module, x: Tensor, program: torch.export.ExportedProgram) -> Any:
    return rewritten(TorchGraph.from_exported_program(program), x)


def decomposed(module: nn.Module, x: Tensor, program: torch.export.ExportedProgram) -> Any:
    return rewritten(TorchGraph.from_exported_program(program.run_decompositions()), x)


def captured(module: nn.Module, x: Tensor, program: torch.export.ExportedProgram) -> Any:
    reports: list[Any] = []
    torch._dynamo.reset()
    options = {"compiler": "eager", "report": reports.append, "verify": False}
    with torch.no_grad():
        y = torch.compile(module, backend="fuser", options=options)(x)
    torch._dynamo.reset()
    return [remark for report in reports for remark in (*report.applied, *report.missed)], double(y)


DIALECTS = (traced, exported, lifted, decomposed, captured)


def double(y: Tensor) -> np.ndarray:
    return y.detach().double().numpy()


def truth(module: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return double(copy.deepcopy(module).double()(x.double()))


def assert_no_further(found: np.ndarray, module: nn.Module, x: Tensor, floor: float = 1e-6) -> None:
    """No further from the float64 truth than the module itself, within a factor."""
    expected = truth(module, x)
    with torch.no_grad():
        own = np.abs(double(copy.deepcopy(module)(x)) - expected).max()
    assert np.abs(found - expected).max() <= max(3 * own, floor * np.abs(expected).max())


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.__name__)
@pytest.mark.parametrize("name", TRAPS)
def test_right_or_refused(name: str, dialect: Any) -> None:
    trap = TRAPS[name]
    if trap.training:
        case.cache_clear()  # running it writes to its statistics
    module, x, program = case(name)
    own = double(copy.deepcopy(module)(x))
    state = {key: (value, value.clone()) for key, value in module.state_dict(keep_vars=True).items()}
    remarks, found = dialect(module, x, program)
    codes = Counter(remark.code for remark in remarks if remark.pass_name == "fold-batch-norm")
    assert codes == trap.elsewhere.get(dialect.__name__, trap.codes)
    if "applied" in codes:
        assert_no_further(found, module, x)
    else:
        np.testing.assert_allclose(found, own, rtol=1e-6, atol=1e-6)
    if trap.training:
        return
    now = module.state_dict(keep_vars=True)
    assert list(now) == list(state)
    for key, (tensor, value) in state.items():
        assert now[key] is tensor and torch.equal(tensor, value), key


# -- the whole pipeline


class Every(nn.Module):
    """All traps side by side: one export for them all."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts.values())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


EXPORTABLE = {name: trap for name, trap in TRAPS.items() if not trap.training and trap.dtype is not torch.bfloat16}
"""ONNX Runtime has no bfloat16 on the CPU."""


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each trap's module, input, and what ONNX Runtime makes of it in the end."""
    nets = {name: net(trap) for name, trap in EXPORTABLE.items()}
    module, inputs = Every({name: part for name, (part, _) in nets.items()}).eval(), tuple(x for _, x in nets.values())
    raw = tmp_path_factory.mktemp("traps") / "raw.onnx"
    early = fuser.optimize(module, example_inputs=inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(early.model, inputs, raw, dynamo=True, optimize=False, verbose=False)
    late = fuser.optimize(raw)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(late.model, options)
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    results = session.run(None, feeds)
    return {"nets": nets, "results": dict(zip(nets, results, strict=True)), "early": early, "late": late, "raw": raw}


@pytest.mark.parametrize("name", EXPORTABLE)
def test_through_the_whole_pipeline(name: str, through: dict[str, Any]) -> None:
    module, x = through["nets"][name]
    assert_no_further(through["results"][name].astype(np.float64), module, x)


def test_both_stages_are_verified_and_the_second_finds_no_more(through: dict[str, Any]) -> None:
    early, late = through["early"].report, through["late"].report
    assert early.verification.passed
    assert "fold-batch-norm" not in {remark.pass_name for remark in late.applied}
    expected = sum(trap.codes.get("applied", 0) for trap in EXPORTABLE.values())
    assert sum(remark.pass_name == "fold-batch-norm" for remark in early.applied) == expected
    left = sum(node.op_type == "BatchNormalization" for node in onnx.load(through["raw"]).graph.node)
    assert left == sum(sum(trap.codes.values()) for trap in EXPORTABLE.values()) - expected
