"""`verify` on torch modules, and on torch against ONNX."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fuser
from fuser.errors import InputError
from fuser.proof import verify

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def conv_bn(channels: int = 6) -> nn.Sequential:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels)).eval()
    made[1].running_mean.normal_()
    made[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(made[1].weight)
    return made


def folded(module: nn.Sequential) -> nn.Module:
    return fuse_conv_bn_eval(*copy.deepcopy(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_right_fold_passes_and_a_wrong_one_does_not(dtype: torch.dtype) -> None:
    before = conv_bn()
    after = folded(before.double()).to(dtype)  # in float64, rounded once
    before, x = before.to(dtype), X.to(dtype)
    result = verify(before, after, example_inputs=(x,))
    assert result.passed and result.truth == "float64" and result.outputs[0].dtype == str(dtype)[6:]
    with torch.no_grad():
        after.weight[2] *= 1.05
    result = verify(before, after, example_inputs=(x,))
    assert result.verdict == "different" and "both models in float64" in result.reason


def test_exported_programs_and_graph_modules_bring_their_own_examples() -> None:
    module = conv_bn()
    program = torch.export.export(module, (X,))
    assert verify(program, program).passed
    assert verify(module, program, example_inputs=(X,)).passed
    assert verify(torch.fx.symbolic_trace(module), program.module(), example_inputs=(X,)).passed
    assert verify(program.module(), folded(module)).passed


class Casting(nn.Module):
    """Rounds on its way, as its code says."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, 3, dtype=torch.float16)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, steps: int = 2) -> dict[str, Any]:
        y = self.lstm(x.half().float())[0]
        z = self.out(y.to(torch.float16))
        return {"z": z.float() * scale + torch.ones(3, dtype=torch.float32), "all": [y, (z.argmax(-1), steps)]}


def test_under_the_mode_nothing_is_rounded() -> None:
    from fuser.proof.float64_torch import InFloat64

    wide = X.double() * 1.0001
    with InFloat64():  # type: ignore[no-untyped-call]
        results = wide.half().float(), wide.to(torch.bfloat16), wide + torch.ones(8, dtype=torch.float16) - 1
        made = torch.full((2,), 1 / 3, dtype=torch.float32)
    for result in results:
        torch.testing.assert_close(result, wide, rtol=1e-15, atol=1e-15)
    assert made.dtype == torch.float64 and made[0].item() == 1 / 3


def test_hard_coded_types_keyword_arguments_and_nested_results() -> None:
    torch.manual_seed(0)
    module = Casting().eval()
    arguments: dict[str, Any] = {
        "example_inputs": (torch.randn(2, 7, 4),),
        "example_kwargs": {"scale": torch.rand(3), "steps": 4},
    }
    result = verify(module, copy.deepcopy(module), **arguments)
    assert result.passed and result.truth == "float64"
    assert [figures.dtype for figures in result.outputs] == ["float32", "float32", "int64", "int64"]
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.lstm.weight_hh_l0[1] *= 1.01
    assert verify(module, other, **arguments).verdict == "different"


def test_a_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    state = copy.deepcopy(module.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = verify(module, module, example_inputs=(X,))
    assert torch.equal(torch.rand(3), expected)
    assert module.training and all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert result.passed


def test_what_a_forward_notes_down_is_not_the_users() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.seen, self.last = 0, [], None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last = x * 2
            self.seen.append(self.last)
            return self.last

    module = Noting()
    assert verify(module, nn.Sequential(Noting()), example_inputs=(X,)).passed
    assert (module.calls, module.seen, module.last) == (0, [], None)


class Decaying(nn.Module):
    def __init__(self, decay: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.decay = decay

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.scale
        self.scale.mul_(self.decay)
        return y


def test_what_the_first_call_leaves_behind_shows_in_the_second() -> None:
    assert verify(Decaying(0.5), Decaying(0.5), example_inputs=(X,)).passed
    result = verify(Decaying(1.0), Decaying(0.5), example_inputs=(X,))
    assert result.verdict == "different" and "given twice" in result.reason


def test_complex_numbers_are_two() -> None:
    class Spectrum(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft2(x * self.factor)

    assert verify(Spectrum(1.0), Spectrum(1.0), example_inputs=(X,)).passed
    assert verify(Spectrum(1.0), Spectrum(1.001), example_inputs=(X,)).verdict == "different"


def test_other_results_than_tensors_with_strides() -> None:
    class Kinds(nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: torch.Tensor) -> Any:
            return self.kind(x.flatten(1))

    sparse = Kinds(lambda x: x.relu().to_sparse())
    assert verify(sparse, sparse, example_inputs=(X,)).passed
    assert not verify(sparse, Kinds(lambda x: (2 * x).relu().to_sparse()), example_inputs=(X,)).passed
    assert not verify(Kinds(lambda x: (x, x)), Kinds(lambda x: (x, None)), example_inputs=(X,)).passed


def test_sizes_that_a_program_leaves_open_are_others_too() -> None:
    class Sums(nn.Module):
        def __init__(self, mean: bool) -> None:
            super().__init__()
            self.mean = mean

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x.mean(0) * 2 if self.mean else x.sum(0)) + y.sum()

    shapes = ({0: torch.export.Dim("batch", min=2, max=64)}, {1: torch.export.Dim("length")})
    args = (torch.randn(2, 3), torch.randn(2, 5))
    one, other = (torch.export.export(Sums(mean), args, dynamic_shapes=shapes) for mean in (True, False))
    result = verify(one, one)
    assert result.passed and any("=6" in label or "=7" in label for label in result.sets)
    assert verify(one, other).verdict == "different"
    assert verify(Sums(True), other, example_inputs=args).verdict == "different"


def test_what_is_returned_must_keep_its_structure_and_type() -> None:
    class Wrapped(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.wrap = wrap

        def forward(self, x: torch.Tensor) -> Any:
            return self.wrap(x * 2)

    plain = Wrapped(lambda y: (y,))
    result = verify(plain, Wrapped(lambda y: [y]), example_inputs=(X,))
    assert result.verdict == "incompatible" and "it returns" in result.reason
    result = verify(plain, Wrapped(lambda y: (y, y)), example_inputs=(X,))
    assert result.verdict == "incompatible" and "2 outputs instead of 1" in result.reason
    result = verify(plain, Wrapped(lambda y: (y.double(),)), example_inputs=(X,))
    assert not result.passed and "float64 instead of float32" in result.reason


def test_ids_stay_within_the_range_of_the_examples() -> None:
    table = nn.Embedding(5, 3).eval()
    result = verify(table, copy.deepcopy(table), example_inputs=(torch.tensor([[0, 4, 2]]),))
    assert result.passed and result.discarded == 0 and len(result.sets) > 3


def test_an_exact_contract() -> None:
    before = conv_bn()
    assert verify(before, copy.deepcopy(before), example_inputs=(X,), contract="exact").truth == "bits"
    result = verify(before, folded(before), example_inputs=(X,), contract="exact")
    assert result.verdict == "different" and "not bit-identical" in result.reason


def as_onnx(module: nn.Sequential) -> onnx.ModelProto:
    conv, bn = module
    arrays = {"w": conv.weight, "s": bn.weight, "b": bn.bias, "m": bn.running_mean, "v": bn.running_var}
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *"sbmv"], ["y"], epsilon=bn.eps),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", 1, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_torch_against_onnx_and_back(tmp_path: Path) -> None:
    module = conv_bn()
    onnx.save(as_onnx(module), tmp_path / "model.onnx")
    assert verify(module, tmp_path / "model.onnx", example_inputs=(X,)).passed
    wrong = folded(module)
    with torch.no_grad():
        wrong.bias[0] += 0.01
    result = verify(as_onnx(module), folded(module), example_inputs=(X,))
    assert result.passed and result.outputs[0].name == "y"
    assert verify(as_onnx(module), wrong, example_inputs=(X,)).verdict == "different"


def test_channels_last_examples_stay_so() -> None:
    seen = []

    class Watching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x.relu()

    assert verify(Watching(), Watching(), example_inputs=(X.to(memory_format=torch.channels_last),)).passed
    assert all(seen)


def test_what_is_missing_is_asked_for() -> None:
    module = conv_bn()
    with pytest.raises(InputError, match=r"a Sequential says nothing of its inputs: give example_inputs=\(x, ...\)"):
        verify(module, module)
    with pytest.raises(InputError, match="tuple of positional arguments, not a Tensor"):
        verify(module, module, example_inputs=X)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be run on the example inputs"):
        verify(module, module, example_inputs=(X[:, :2],))


def test_data_of_the_user() -> None:
    module = conv_bn()
    given = np.ones((1, 3, 9, 9), np.float32)
    assert verify(module, folded(module), example_inputs=(X,), inputs=[given]).sets == ["given"]


def test_a_module_that_cannot_be_copied_is_judged_by_its_noise() -> None:
    class Pinned(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.inner, self.factor, self.handle = conv_bn(), factor, io.BytesIO

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("it holds a handle")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.factor

    result = verify(Pinned(1.5), Pinned(1.5), example_inputs=(X,))
    assert result.passed and result.truth == "noise-floor" and "it holds a handle" in result.truth_note
    assert verify(Pinned(1.5), Pinned(1.501), example_inputs=(X,)).verdict == "different"


def test_rounding_that_a_normalization_makes_large_is_no_fault_of_a_fold() -> None:
    """For zeros all that the InstanceNorm sees is the rounding of the convolutions."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=False)
    module = nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True)).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 8, 8)
    report = fuser.optimize(module, example_inputs=(x,), passes=["fold-batch-norm"]).report
    assert report.verification.passed and len(report.applied) == 1


class Product(nn.Module):
    """As most kernels compute it: the bias comes last."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(4, 576, generator=generator) / 24)
        self.bias = nn.Parameter(1 + torch.rand(4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class BiasFirst(Product):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bias.expand(len(x), 4)
        for column, weights in zip(x.T, self.weight.T, strict=True):
            y = torch.addcmul(y, column[:, None], weights)
        return y


def test_a_sum_that_begins_with_its_bias_may_round_at_each_product() -> None:
    x = 1e-3 * torch.randn(64, 576, generator=torch.Generator().manual_seed(3))
    result = verify(Product(), BiasFirst(), example_inputs=(x,), inputs=[x.numpy()])
    assert result.passed and result.outputs[0].max_abs > 4 * result.outputs[0].original
    wrong = BiasFirst()
    with torch.no_grad():
        wrong.bias[1] *= 1 + 2e-6
    assert verify(Product(), wrong, example_inputs=(x,), inputs=[x.numpy()]).verdict == "different"
