"""A module or a program that was optimized before its export is used as the one it was made of."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx_models import op_types
from torch import nn
from torch._export.verifier import Verifier

import fuser


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4))
        self.head, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.register_buffer("offset", torch.randn(4, 1, 1))
        self.register_buffer("factor", torch.rand(4, 1, 1) + 1, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.stem(x) * self.factor + self.offset)
        return self.norm(self.head(y.mean((2, 3))))


class Branching(Net):
    """torch.fx cannot trace it, torch.export can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.shape[1] == 3 else x[:, :3])


def made(kind: type[Net]) -> Net:
    torch.manual_seed(5)
    module = kind().eval()
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module


NET = made(Net)
STATE = copy.deepcopy(NET.state_dict())
X, OTHER = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)
DYNAMIC: Any = ({0: torch.export.Dim("batch")},)


def agrees(module: Any) -> bool:
    """At a batch size that is not the example's."""
    return bool(torch.allclose(module(OTHER), NET(OTHER), rtol=1e-4, atol=1e-5))


def optimized() -> Any:
    return fuser.optimize(NET, example_inputs=(X,), dynamic_shapes=DYNAMIC, verify=False).model


@pytest.fixture(scope="module", params=["captured", "traced"])
def module(request: pytest.FixtureRequest) -> Any:
    return optimized() if request.param == "captured" else fuser.optimize(NET, verify=False).model


@pytest.fixture(scope="module")
def program() -> Any:
    return fuser.optimize(torch.export.export(NET, (X,), dynamic_shapes=DYNAMIC)).model


# -- a module


def test_it_is_folded_and_right_at_every_batch_size(module: Any) -> None:
    assert not any("batch_norm" in str(n.target) for n in module.graph.nodes)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    assert agrees(module)


def test_it_is_exported_again(module: Any) -> None:
    assert agrees(torch.export.export(module, (X,), dynamic_shapes=DYNAMIC).module())


def test_it_is_traced_by_jit(module: Any) -> None:
    assert agrees(torch.jit.trace(module, (X,)))


def test_a_traced_one_is_scripted() -> None:
    assert agrees(torch.jit.script(fuser.optimize(NET, verify=False).model))


def stored(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_its_state_is_saved_and_loaded(module: Any) -> None:
    other = stored(module)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert not agrees(other)
    other.load_state_dict(stored(module.state_dict()))
    assert agrees(other)


def test_it_is_saved_and_loaded_whole(module: Any) -> None:
    again = stored(module)
    assert agrees(again)
    assert again.state_dict().keys() == module.state_dict().keys()
    assert agrees(stored(again))


def test_it_is_saved_as_it_stands() -> None:
    module = optimized().double()
    again = stored(module)
    assert {tensor.dtype for tensor in (*again.parameters(), *again.buffers())} == {torch.float64}
    assert torch.equal(again(OTHER.double()), module(OTHER.double()))
    assert all(isinstance(tensor, nn.Parameter) for tensor in again.parameters())


def test_it_moves_and_is_copied(module: Any) -> None:
    copied = copy.deepcopy(module)
    assert agrees(copied)
    wide = copied.to(torch.float64)(OTHER.double())
    assert wide.dtype is torch.float64
    assert torch.allclose(wide, copy.deepcopy(NET).double()(OTHER.double()), rtol=1e-5, atol=1e-6)
    nowhere = copied.to("meta")
    assert {tensor.device.type for tensor in (*nowhere.parameters(), *nowhere.buffers())} == {"meta"}
    assert nowhere(OTHER.double().to("meta")).shape == (5, 5)
    assert agrees(module)  # a copy shares nothing


def test_its_mode_is_the_one_it_was_captured_in() -> None:
    captured = optimized()
    assert captured.eval() is captured
    assert captured.train(False) is captured
    assert not any(part.training for part in captured.modules())
    with pytest.raises(NotImplementedError, match="captured in eval mode; optimize the module in training mode"):
        captured.train()


def test_a_module_that_only_torch_export_can_capture() -> None:
    given = made(Branching)
    with pytest.raises(fuser.errors.InputError, match="example_inputs"):
        fuser.optimize(given)
    result = fuser.optimize(given, example_inputs=(X,), dynamic_shapes=DYNAMIC)
    assert result.report.verification.passed
    assert len(result.report.applied) == 3
    assert agrees(result.model)


# -- a program


def test_a_program_passes_the_verifier_of_torch(program: Any) -> None:
    program.validate()
    Verifier().check(program)
    assert not any("batch_norm" in str(n.target) for n in program.graph.nodes)
    assert all("val" in n.meta for n in program.graph.nodes if n.op != "output")
    assert set(program.state_dict) == {
        spec.target for spec in program.graph_signature.input_specs if spec.target in program.state_dict
    }


def test_its_batch_stays_dynamic(program: Any) -> None:
    assert agrees(program.module())
    assert len(program.range_constraints) == 1
    (batch,) = program.range_constraints
    assert [n.meta["val"].shape[0] for n in program.graph.nodes if "aten.linear" in str(n.target)] == [batch]


def test_it_is_saved_and_loaded_as_programs_are(program: Any) -> None:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    assert agrees(again.module())
    assert len(again.range_constraints) == 1


def test_it_is_decomposed(program: Any) -> None:
    assert agrees(program.run_decompositions().module())


def test_it_is_exported_to_onnx(program: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "net.onnx")
    assert "BatchNormalization" not in op_types(onnx.load(tmp_path / "net.onnx").graph)
    assert fuser.verify(NET, tmp_path / "net.onnx", example_inputs=(X,)).passed


@pytest.mark.fuzz  # no fuzzing, but as long: it calls a C++ compiler
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler was found")
def test_it_is_compiled_ahead_of_time(program: Any, tmp_path: Path) -> None:
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    assert agrees(torch._inductor.aoti_load_package(path))


def test_the_users_state_is_never_touched(module: Any, program: Any) -> None:
    assert NET.state_dict().keys() == STATE.keys()
    assert all(torch.equal(value, STATE[name]) for name, value in NET.state_dict().items())
