"""Small modules on which a rewrite, or the check of it, was once wrong: results and state stay as they are."""

from __future__ import annotations

import copy
import operator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.experimental import control_flow
from torch import Tensor, fx, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.testing._internal.two_tensor import TwoTensor

import fuser


def optimized(module: nn.Module, x: Tensor, how: str) -> Any:
    """The optimized module: traced, captured, or an exported program."""
    if how == "traced":
        return fuser.optimize(module, verify=False).model
    if how == "captured":
        return fuser.optimize(module, example_inputs=(x,), verify=False).model
    return fuser.optimize(torch.export.export(module, (x,)), verify=False).model.module()


WAYS = pytest.mark.parametrize("how", ["traced", "captured", "exported"])


def check(module: nn.Module, how: str, calls: int = 3) -> None:
    """Call after call the same results, and the same state behind."""
    module = module.double().eval()
    reference, generator = copy.deepcopy(module), torch.Generator().manual_seed(2)
    found = optimized(module, torch.ones(3, 4).double(), how)
    for _ in range(calls):
        x = torch.randn(3, 4, generator=generator).double()
        torch.testing.assert_close(found(x), reference(x), rtol=1e-12, atol=1e-12)


# -- the check leaves no trace


class Counting(nn.Module):
    """It counts its calls in a buffer, and in a tensor that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y: Tensor = self.norm(self.linear(x)) * self.calls
        return y


@pytest.mark.parametrize("train", [False, True])
def test_the_state_of_the_module_is_not_touched(train: bool) -> None:
    module, x = Counting().eval(), torch.randn(3, 4)
    module.norm.train(train)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = fuser.optimize(module, example_inputs=(x,))
    for state in (module.state_dict(), result.model.state_dict()):
        for name in state.keys() & before.keys():
            torch.testing.assert_close(state[name], before[name], rtol=0, atol=0)
    assert result.report.verification is None or result.report.verification.passed


def test_the_state_is_not_touched_by_an_export(tmp_path: Any) -> None:
    module = Counting().eval()
    fuser.export(module, (torch.randn(3, 4),), tmp_path / "model.onnx")
    assert float(module.calls) == 0


# -- statistics that are updated


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def update(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=True)


class UsedAfterwards(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        y = self.update(x)
        return F.batch_norm(self.linear(x), self.mean, self.var) + y


class UpdatedTwice(Statistics):
    def forward(self, x: Tensor) -> Any:
        return self.update(x) + self.update(x), self.mean * 1


class UpdatedOnly(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        self.update(x)
        return x - self.mean


class OfAModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> OfAModule:
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z: Tensor = (self.linear(x) - self.norm.running_mean) / self.norm.running_var + y
        return z


@WAYS
@pytest.mark.parametrize("kind", [UsedAfterwards, UpdatedTwice, UpdatedOnly, OfAModule])
def test_statistics_that_are_updated_are_no_constants(kind: Any, how: str) -> None:
    torch.manual_seed(0)
    check(kind(), how)


# -- memory that is written


class WrittenZeros(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(4, dtype=x.dtype) if self.kind != "arange" else torch.arange(4, dtype=x.dtype)
        if self.kind == "accumulated":
            t.add_(x.sum(0))
        elif self.kind == "a-row":
            t[1:] = x[0, 1:]
        else:
            t[1] = 3
        y: Tensor = self.linear(x) * 1.5 + t
        return y


@pytest.mark.parametrize("how", ["captured", "exported"])
@pytest.mark.parametrize("kind", ["one", "arange", "a-row", "accumulated"])
def test_constants_that_are_written_are_none(kind: str, how: str) -> None:
    check(WrittenZeros(kind), how)


class TwoNames(nn.Module):
    """A cache, and a view of it under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("a", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("b", self.a[:])

    def forward(self, x: Tensor) -> Tensor:
        self.a.add_(1)
        y: Tensor = self.linear(x) * self.b
        return y


@pytest.mark.parametrize("how", ["captured", "exported"])
def test_one_memory_under_two_names(how: str) -> None:
    torch.manual_seed(0)
    module = TwoNames()
    module.linear.double()
    x = torch.randn(3, 4).double()
    program = torch.export.export(module, (x,))
    given: Any = module if how == "captured" else program
    more = {"example_inputs": (x,)} if how == "captured" else {}
    report = fuser.explain(given, **more)
    assert not [remark for remark in report.applied if remark.pass_name == "fold-affine"]


# -- views


class Bits(nn.Module):
    """`view` of another type shows other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return x.view(torch.int32).view(-1) * 2, self.linear(x).view(torch.int32) + 1


def test_a_view_of_the_bits_is_no_reshape() -> None:
    module, x = Bits().eval(), torch.randn(3, 4)
    result = fuser.optimize(module)
    assert not result.report.applied
    for found, expected in zip(result.model(x), module(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).view(-1) * 2


@WAYS
def test_a_view_of_what_is_given_has_to_fit_any_layout(how: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    y = x.contiguous(memory_format=torch.channels_last)
    module = Flat().eval()
    found = optimized(module, x, how)
    for given in (x, y):
        torch.testing.assert_close(found(given), module(given), rtol=0, atol=0)


# -- random numbers


def test_two_random_pools_are_two() -> None:
    class Pools(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = (F.fractional_max_pool2d(x, 2, output_size=4) for _ in range(2))
            return first - second

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 9, 9)))
    torch.manual_seed(0)
    assert float(fuser.optimize(Pools().eval()).model(x).abs().max()) > 0


# -- user code in torch's own modules


def test_a_replaced_method_is_user_code() -> None:
    """As libraries patch weight standardization into a convolution."""
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    module[0]._conv_forward = lambda x, w, b: F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), b)
    result = fuser.optimize(module)
    assert [remark.code for remark in result.report.missed] == ["hooks"]
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(result.model(x), module(x), rtol=0, atol=0)


def test_a_global_hook_is_a_hook_of_every_module() -> None:
    module, x = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)).eval(), torch.randn(2, 4, 6, 6)
    seen: list[Any] = []

    def doubled(called: nn.Module, args: Any, output: Any) -> Any:
        seen.append(output)
        return output * 2 if isinstance(called, nn.Conv2d) else None

    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        result = fuser.optimize(module, verify=False)
        assert not result.report.applied and not seen
        torch.testing.assert_close(result.model(x), module(x), rtol=0, atol=0)
    finally:
        handle.remove()


class Hooked(nn.Module):
    """An activation with a hook, between two calls of a convolution and before a buffer is read."""

    def __init__(self, hook: Any, before: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.register_buffer("k", torch.ones(4, 1, 1))
        if before:
            self.relu.register_forward_pre_hook(lambda _, args: hook(self, args[0]))
        else:
            self.relu.register_forward_hook(lambda _, args, output: hook(self, args[0]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + self.relu(x) - self.conv(x)
        return self.norm(self.conv(y)) * self.k + y


HOOKS = {
    "writes-into-what-is-given": lambda module, x: (x.mul_(2), None)[1],
    "counts-in-a-buffer": lambda module, x: (module.k.add_(1), None)[1],
    "returns-what-is-given": lambda module, x: x,
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("before", [False, True])
def test_a_hook_may_do_anything(kind: str, before: bool) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(Hooked(HOOKS[kind], before).double().eval())
    found = fuser.optimize(made[0], verify=False).model
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5).double()
        torch.testing.assert_close(found(x.clone()), made[1](x.clone()), rtol=1e-12, atol=1e-12)


def test_the_statistics_of_other_modules_are_trusted_beside_a_hook() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    module[2].register_forward_hook(lambda *_: None)
    assert len(fuser.optimize(module, verify=False).report.applied) == 1


class Counter(nn.Module):
    def __init__(self, buffer: Tensor, held: str) -> None:
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {}
        if held == "buffer":
            self.register_buffer("k", buffer)
        else:
            self.kept["k"] = [buffer]

    def forward(self, x: Tensor) -> Tensor:
        (self.kept["k"][0] if self.kept else self.k).add_(1)
        return x * 1


class AroundACounter(nn.Module):
    def __init__(self, held: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("k", torch.ones(4, 1, 1))
        self.count = Counter(self.k, held)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(self.count(x)) * self.k)
        return y


@pytest.mark.parametrize("held", ["buffer", "attribute"])
def test_what_a_leaf_of_the_users_may_write_is_no_constant(held: str) -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Counter) or super().is_leaf_module(m, module_qualified_name)

    module = AroundACounter(held).eval()
    traced = fx.GraphModule(module, Tracer().trace(module)).eval()
    assert not fuser.explain(traced).applied
    traced.count = nn.Identity()
    assert {"fold-affine", "fold-batch-norm"} <= {remark.pass_name for remark in fuser.explain(traced).applied}


# -- the bodies of higher-order operators


class Block(nn.Module):
    """Some of it in a block that torch.export keeps apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.register_buffer("k", torch.ones(4, 1, 1))


class WritesAConstant(Block):
    def forward(self, x: Tensor) -> Tensor:
        factor = self.k * 2
        with torch.no_grad():
            factor.mul_(0.5)
        y: Tensor = self.conv(x) * factor
        return y


class WritesBetween(Block):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.conv(x), self.conv(x)
        with torch.no_grad():
            y.mul_(0.9)
        w: Tensor = y + z.relu()
        return w


class WritesWhatHasACopy(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y.clone()
        with torch.autocast("cpu", enabled=False):
            y.clamp_(0)
        w: Tensor = y.relu() + z
        return w


class WritesAViewOfAWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        flat = self.conv.weight.view(4, -1)
        with torch.no_grad():
            flat.div_(flat.norm(dim=1, keepdim=True) * 0.7)
        y: Tensor = self.norm(self.conv(x))
        return y


class WritesInAnInnerBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.conv(x), self.conv(x)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y[0].mul_(0.9)
        w: Tensor = self.norm(y) + z
        return w


class ReturnsItsOperand(Block):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.conv(x), self.conv(x)
        with torch.autocast("cpu", enabled=False):
            v = y.view(-1)
        v.mul_(0.9)
        w: Tensor = y + z
        return w


@pytest.mark.parametrize("how", ["captured", "exported"])
@pytest.mark.parametrize(
    "kind",
    [
        WritesAConstant,
        WritesBetween,
        WritesWhatHasACopy,
        WritesAViewOfAWeight,
        WritesInAnInnerBlock,
        ReturnsItsOperand,
    ],
)
def test_what_a_body_writes_is_written(kind: type[Block], how: str) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(kind().double().eval())
    found = optimized(made[0], torch.ones(2, 4, 5, 5).double(), how)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5).double()
        torch.testing.assert_close(found(x), made[1](x), rtol=1e-12, atol=1e-12)


def normalized(module: Block, x: Tensor) -> Tensor:
    y: Tensor = module.norm(module.conv(x))
    return y


class NoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = normalized(self, x[0])
        return y.relu()


class NoAutocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = normalized(self, x[0])
        return y.relu()


class Choice(Block):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return torch.cond(x.sum() > 0, lambda v: normalized(self, v), lambda v: v * 2, (x[0],))


class Mapped(Block):
    def forward(self, x: Tensor) -> Any:
        return control_flow.map(lambda v: normalized(self, v), x)


class Scanned(Block):
    def forward(self, x: Tensor) -> Any:
        return scan(lambda c, v: (normalized(self, v) + c, c * 2), torch.zeros(2, 4, 4, 4), x)


class Looped(Block):
    def forward(self, x: Tensor) -> Any:
        start = torch.tensor(0), x[0]
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, normalized(self, y)), start)


@pytest.mark.parametrize("form", ["exported", "decomposed", "attributes"])
@pytest.mark.parametrize("kind", [NoGrad, NoAutocast, Choice, Mapped, Scanned, Looped])
def test_a_batch_norm_in_a_body_is_folded(kind: type[Block], form: str) -> None:
    module, x = kind().eval(), torch.randn(3, 2, 4, 4, 4)
    program: Any = torch.export.export(module, (x,))
    if form == "decomposed":
        program = program.run_decompositions()
    if form == "attributes":
        program = program.module()
    result = fuser.optimize(program, **({"example_inputs": (x,)} if form == "attributes" else {}))
    (remark,) = (remark for remark in result.report.applied if remark.pass_name == "fold-batch-norm")
    assert "shared" not in remark.reason  # the call that passes it in does not read the weight
    assert result.report.verification.passed and not result.report.warnings
    run = result.model if form == "attributes" else result.model.module()
    torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
    assert not any("norm" in name for name, _ in run.named_parameters())
    if form != "attributes":
        result.model.validate()
        torch.testing.assert_close(result.model.run_decompositions().module()(x), module(x), rtol=1e-4, atol=1e-5)


class UnderAutocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return normalized(self, x)


class WritesItsOperand(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.no_grad():
            y.relu_()
            return normalized(self, y)


@pytest.mark.parametrize(("kind", "why"), [(UnderAutocast, "autocast"), (WritesItsOperand, "writes")])
def test_why_nothing_is_changed_in_a_body(kind: type[Block], why: str) -> None:
    module, x = kind().eval(), torch.randn(2, 4, 5, 5)
    result = fuser.optimize(module, example_inputs=(x,))
    (remark,) = (remark for remark in result.report.missed if remark.pass_name == "fold-batch-norm")
    assert remark.code == "body" and why in remark.reason
    torch.testing.assert_close(result.model(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("names", [("one", "one"), ("one", "two")])
def test_a_body_with_two_callers_is_left_alone(names: tuple[str, str]) -> None:
    """Neither sees what is changed for the other."""
    norm, x = nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 5, 5)
    body, outer = fx.Graph(), fx.Graph()
    data, weight, mean, var = (body.placeholder(name) for name in ("data", "weight", "mean", "var"))
    conv = body.call_function(torch.ops.aten.conv2d.default, (data, weight))
    body.output(
        (body.call_function(torch.ops.aten.batch_norm.default, (conv, None, None, mean, var, False, 0, 0, False)),)
    )
    called = fx.GraphModule({}, body)
    given = outer.placeholder("x")
    for name in names:
        reader, constants = outer.get_attr(name), [outer.get_attr(key) for key in ("weight", "mean", "var")]
        block = torch.ops.higher_order.wrap_with_set_grad_enabled
        call = outer.call_function(block, (False, reader, given, *constants))
        given = outer.call_function(operator.getitem, (call, 0))
    outer.output(given)
    held = {"weight": nn.Parameter(torch.randn(4, 4, 1, 1)), "mean": norm.running_mean, "var": norm.running_var}
    module = fx.GraphModule({**held, **dict.fromkeys(names, called)}, outer).eval()
    result = fuser.optimize(module, verify=False)
    codes = [remark.code for remark in result.report.missed if remark.pass_name == "fold-batch-norm"]
    assert codes == ["body"] and "other callers" in str(result.report.missed[0])
    torch.testing.assert_close(result.model(x), module(x), rtol=0, atol=0)


# -- tensors of other classes


class NamedParameter(nn.Parameter):
    """As frameworks do to attach attributes."""


@WAYS
def test_a_parameter_by_another_name_is_a_parameter(how: str) -> None:
    module, x = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 4, 6, 6)
    module[0].weight = NamedParameter(module[0].weight.data)
    kept = module[0].weight
    found = optimized(module, x, how)
    assert module[0].weight is kept and not list(found.buffers())
    torch.testing.assert_close(found(x), module(x))


@WAYS
def test_a_tensor_that_wraps_others_is_opaque(how: str) -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16)).eval()
    x = torch.randn(3, 4, 2, 2)
    weight = module[3].weight.data
    module[3].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    module.append(nn.BatchNorm1d(16).eval())
    given = {"captured": {"example_inputs": (x,)}}.get(how, {})
    report = fuser.explain(torch.export.export(module, (x,)) if how == "exported" else module, **given)
    assert [remark.code for remark in (*report.applied, *report.missed)] == ["applied", "not-constant"]


# -- what a trace does not show


class Kept(nn.Module):
    """It keeps tensors in attributes, without registering them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.kept, self.listed = torch.ones(4, 1, 1), [torch.ones(4, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "written":
            self.kept.add_(1)
        elif self.how == "assigned":
            self.kept = self.kept + 1
        elif self.how == "in-a-list":
            self.listed[0].add_(1)
        y: Tensor = self.norm(self.conv(x)) * self.kept * self.listed[0]
        return y


@pytest.mark.parametrize("how", ["written", "assigned", "in-a-list"])
def test_a_tensor_that_is_no_buffer_and_changes_is_refused(how: str) -> None:
    module = Kept(how).eval()
    with pytest.raises(fuser.InputError, match=r"changes its tensor '(kept|listed)'"):
        fuser.optimize(module)
    assert float(module.kept.sum()) == float(module.listed[0].sum()) == 4
    assert fuser.optimize(Kept("").eval(), verify=False).report.applied


class Optional(nn.Module):
    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.decides = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), decides

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> Any:
        y: Tensor = self.norm(self.conv(x))
        if mask is not None:
            y = y * mask
        return y * 2 if self.decides and scale is not None else (y, y + torch.arange(4).view(4, 1, 1))


def test_an_argument_that_only_decides_is_refused() -> None:
    with pytest.raises(fuser.InputError, match="something else without 'scale'"):
        fuser.optimize(Optional(True).eval())
    x = torch.randn(2, 4, 5, 5)
    captured = fuser.optimize(Optional(True).eval(), example_inputs=(x,), example_kwargs={"scale": x}, verify=False)
    assert captured.report.applied
    assert fuser.optimize(Optional(False).eval(), verify=False).report.applied


# -- padding


@pytest.mark.parametrize("how", ["traced", "captured"])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_a_shift_commutes_with_padding_by_elements(mode: str, how: str) -> None:
    norm, conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    norm.running_mean.normal_()
    module, x = nn.Sequential(norm, conv).eval(), torch.randn(2, 4, 5, 5)
    result = fuser.optimize(module, verify=False, **({"example_inputs": (x,)} if how == "captured" else {}))
    remarks = (*result.report.applied, *result.report.missed)
    codes = [remark.code for remark in remarks if remark.pass_name == "fold-batch-norm"]
    assert codes == ["padding" if mode == "zeros" else "applied"]
    torch.testing.assert_close(result.model(x), module(x), rtol=1e-4, atol=1e-5)


# -- example inputs of a GraphModule


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.calls.add_(1)
        y: Tensor = self.last(self.norm(self.linear(x * self.calls)))
        return y


def test_example_inputs_tell_a_graph_module_its_ranks() -> None:
    module, x = Stateful().eval(), torch.randn(3, 4)
    module.last.train()
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    traced = fx.GraphModule(module, tracer.trace(module))
    traced.eval().last.train()
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    metas = [dict(node.meta) for node in traced.graph.nodes]
    plain = fuser.explain(traced)
    given = [
        fuser.explain(traced, example_inputs=(x,)),
        fuser.explain(traced, example_inputs=(), example_kwargs={"x": x}),
    ]
    assert "rank" in {remark.code for remark in plain.missed} and not plain.applied
    for report in given:
        assert [remark.site for remark in report.applied] == ["norm"]
        assert [remark.code for remark in report.missed] == ["training-mode"]
    torch.testing.assert_close(dict(traced.state_dict()), before, rtol=0, atol=0)
    assert metas == [dict(node.meta) for node in traced.graph.nodes]


def test_on_example_inputs_no_code_of_the_users_is_run() -> None:
    module, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), []
    module[1].register_forward_hook(lambda *given: seen.append(given))
    report = fuser.explain(fx.symbolic_trace(module), example_inputs=(torch.randn(3, 4),))
    assert not seen and [remark.code for remark in report.missed] == ["rank"]
