"""`torch.compile(model, backend="fuser")`: right at every call, whatever happens to the model in between."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import lively
from torch import Tensor, nn

from fuser.ops import BatchNorm
from fuser.report import Report
from fuser.rewrite import RewritePass

COMPILERS = (
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU"),
    ),
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small() -> nn.Sequential:
    """Two folds; the convolution at the end stays as it is."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Conv2d(4, 2, 1),
    )
    return lively(net)  # type: ignore[return-value]


def image(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size)


class Compiled:
    """A compiled model beside the original, and the reports that came."""

    def __init__(self, model: nn.Module, *, dynamic: bool | None = None, **options: Any) -> None:
        self.reports: list[Report] = []
        self.model = model
        given = {"compiler": "eager", "report": self.reports.append, "verify": False, **options}
        self.compiled = torch.compile(model, backend="fuser", dynamic=dynamic, options=given)

    def check(self, *args: Any, mode: Callable[[], Any] = torch.no_grad) -> list[str]:
        """Hold a call against the original in float64; the warnings that came."""
        with warnings.catch_warnings(record=True) as caught, mode():
            warnings.simplefilter("always")
            found, expected = self.compiled(*args), self.model(*args)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return [str(warning.message) for warning in caught if "fuser" in str(warning.message)]

    @property
    def applied(self) -> list[int]:
        return [len(report.applied) for report in self.reports]


def test_torch_finds_the_backend() -> None:
    assert "fuser" in torch.compiler.list_backends()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_optimized_graph_is_handed_over(compiler: str) -> None:
    """With sizes that vary, and constants that follow."""
    one = Compiled(small(), dynamic=True, compiler=compiler)
    for batch, size in ((2, 8), (3, 9), (5, 12)):
        assert not one.check(image(batch, size))
    one.model[0].weight.data.mul_(3)
    assert not one.check(image(batch, size))
    assert one.applied == [2]


def test_it_is_verified_and_reported() -> None:
    one = Compiled(small(), verify=True)
    assert not one.check(image(1, 6), mode=torch.inference_mode)
    verification = one.reports[0].verification
    assert verification.passed and len(verification.sets) > 1
    assert "fold-batch-norm" in str(one.reports[0])


def test_an_epsilon_that_dynamo_passes_as_an_input_is_known_and_watched() -> None:
    one = Compiled(small(), dynamic=True)
    one.check(image())
    one.model[1].eps = 0.5
    one.check(image())
    assert set(one.applied) == {2}


def test_shapes_that_become_dynamic() -> None:
    one = Compiled(small())
    for batch in (2, 3, 4, 7):
        assert not one.check(image(batch))
    assert one.applied == [2, 2]


UPDATES: dict[str, Callable[[Any], object]] = {
    "in place": lambda net: net[0].weight.mul_(2),
    "one element": lambda net: net[0].weight.view(-1)[5].fill_(9),
    "of a buffer": lambda net: net[1].running_mean.add_(1),
    "of a buffer to new memory": lambda net: setattr(net[1], "running_var", torch.full((4,), 3.0)),
    "a new parameter": lambda net: setattr(net[3], "bias", nn.Parameter(torch.randn(4))),
    "load_state_dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "load_state_dict by assignment": lambda net: net.load_state_dict(
        {k: v + 1 for k, v in net.state_dict().items()}, assign=True
    ),
    "what was not folded": lambda net: net[6].weight.add_(1),
    "to new memory": lambda net: setattr(net[0].weight, "data", torch.randn(4, 3, 3, 3)),
    "through .data": lambda net: net[0].weight.data.copy_(torch.randn(4, 3, 3, 3)),
    "one element through .data": lambda net: net[0].weight.data.view(-1)[5].fill_(9),
    "through NumPy": lambda net: net[0].weight.detach().numpy().fill(0.5),
}


@pytest.mark.parametrize("updates", ["values", "versions"])
def test_the_constants_follow_an_update(updates: str) -> None:
    one = Compiled(small(), updates=updates)
    one.check(image())
    for name, update in UPDATES.items():
        if updates == "versions" and "through" in name:
            continue  # what comparing versions cannot see
        with torch.no_grad():
            update(one.model)
        for _ in range(2):
            assert not one.check(image()), name
    assert one.applied == [2]


def test_an_optimizer_step_in_between() -> None:
    one = Compiled(small())
    optimizer = torch.optim.SGD(one.model.parameters(), lr=0.1)
    for _ in range(3):
        assert not one.check(image())
        assert not one.check(image())
        one.model(image()).square().mean().backward()
        optimizer.step()
    assert one.applied == [2]


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = small()
    one = Compiled(net, updates="versions")
    one.check(image(), mode=torch.inference_mode)
    with torch.inference_mode():
        net[0].weight.mul_(2)
    assert not one.check(image(), mode=torch.inference_mode)
    assert one.applied == [2]


def test_not_a_number_is_no_update() -> None:
    net = small()
    net[0].weight.data[0, 0, 0, 0] = float("nan")
    one = Compiled(net)
    with torch.no_grad():
        for _ in range(5):
            assert one.compiled(x := image()).isnan().equal(net(x).isnan())
    assert [remark.code for report in one.reports for remark in report.missed] == ["not-finite"]


def test_updates_at_every_call_end_in_eager_mode() -> None:
    one = Compiled(small())
    said = []
    for _ in range(6):
        said += one.check(image())
        one.model[0].weight.data.mul_(1.1)
    assert len(said) == 1 and "last 3 calls" in said[0] and "eager mode" in said[0]


def test_a_value_to_which_other_rewrites_apply() -> None:
    one = Compiled(small())
    one.check(image())
    one.model[1].running_var.fill_(-1)  # the root of a negative number
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        assert one.compiled(image()).isnan().any()
    assert "other rewrites apply" in str(caught[-1].message)
    one.model[1].running_var.fill_(1)
    assert not one.check(image())


def test_a_compiler_that_may_keep_the_constants() -> None:
    def keeps(module: torch.fx.GraphModule, inputs: Any) -> Any:
        return module.forward

    one = Compiled(small(), compiler=keeps)
    one.check(image())
    one.model[0].weight.data.mul_(2)
    assert "may hold the old value" in one.check(image())[0]
    assert not one.check(image())


def test_freezing_inductor_keeps_the_constants() -> None:
    import torch._inductor.config as config

    one = Compiled(small())
    one.check(image())
    one.model[0].weight.data.mul_(2)
    with config.patch(freezing=True):
        assert "may hold the old value" in one.check(image())[0]


# -- what is left alone


def test_training_is_left_to_the_compiler_and_learns_the_same() -> None:
    one = Compiled(small().train())
    twin = copy.deepcopy(one.model)
    with pytest.warns(UserWarning, match="gradients may be asked for.*inference_mode"):
        one.compiled(x := image()).sum().backward()
    twin(x).sum().backward()
    for mine, other in zip(one.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for mine, other in zip(one.model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    assert not one.reports
    assert not (one.model.eval(), one.check(image()))[1]
    assert one.applied == [2]


def test_an_input_that_wants_gradients() -> None:
    one = Compiled(small().requires_grad_(False))
    assert not one.check(image(), mode=torch.enable_grad)
    with pytest.warns(UserWarning, match="gradients"):
        one.compiled(x := image().requires_grad_()).sum().backward()
    assert x.grad is not None and one.applied == [2]


def test_statistics_that_the_graph_keeps_are_no_constants() -> None:
    one = Compiled(small().train())
    twin = copy.deepcopy(one.model)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(one.compiled(x := image()), twin(x))
    for mine, other in zip(one.model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    assert {remark.code for remark in one.reports[0].missed} == {"training-mode"}


class Unfit(nn.Module):
    def __init__(self, body: Callable[[nn.Sequential, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.body = small(), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.net, x)


def in_autocast(net: nn.Sequential, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net(x)


def in_enabled_grad(net: nn.Sequential, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return net(x)


def transformed(net: nn.Sequential, x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: net(y).sum())(x)


@pytest.mark.parametrize(
    "body, why",
    [(in_autocast, "autocast"), (in_enabled_grad, "computes gradients"), (transformed, r"torch\.func")],
)
def test_what_a_graph_does_with_types_and_gradients_is_left_alone(body: Any, why: str) -> None:
    net = Unfit(body).eval()
    x = image()
    with torch.no_grad(), pytest.warns(UserWarning, match=why):
        found = torch.compile(net, backend="fuser", options={"compiler": "eager"})(x)
        assert torch.equal(found, net(x))


def test_under_autocast_nothing_is_done() -> None:
    one = Compiled(small())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        assert one.compiled(image()).dtype == torch.bfloat16
    assert not one.reports


# -- graphs of all kinds


def test_each_graph_of_a_broken_function_is_optimized() -> None:
    def body(net: nn.Sequential, x: Tensor) -> Tensor:
        y = net[:3](x)
        torch._dynamo.graph_break()
        return net[3:](y)

    one = Compiled(Unfit(body).eval())
    assert not one.check(image())
    assert one.applied == [1, 1]


def test_branches_of_cond() -> None:
    def body(net: nn.Sequential, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: net[1](net[0](y)), lambda y: net[0](y) * 2, (x,))

    one = Compiled(Unfit(body).eval())
    assert not one.check(image().abs())
    assert not one.check(-image().abs())
    assert sum(one.applied) == 2
    one.model.net[0].weight.data.mul_(2)
    assert not one.check(image().abs()) and not one.check(-image().abs())


def test_what_the_body_of_another_operator_writes_is_no_constant() -> None:
    def body(net: nn.Sequential, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(net[1], net[0](x), use_reentrant=False)

    net = Unfit(body).eval()
    net.net[1].train()
    one, twin = Compiled(net), copy.deepcopy(net)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(one.compiled(x := image()), twin(x))


def test_shared_and_tied_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.b.weight = self.a.weight
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.norm(self.a(x))))

    one = Compiled(lively(Tied()))
    x = torch.randn(2, 4, 12, 12)
    assert not one.check(x)
    assert one.applied == [1]
    one.model.a.weight.data.mul_(2)
    assert not one.check(x)


def test_a_parameter_under_another_name_that_the_graph_writes() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.register_buffer("head", self.conv.weight.data[0])

        def forward(self, x: Tensor) -> Tensor:
            self.head.add_(1)
            return self.norm(self.conv(x))

    net, twin = lively(Aliased()), lively(Aliased())
    twin.load_state_dict(net.state_dict())
    one = Compiled(net)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(one.compiled(x := image()), twin(x))


def test_an_argument_that_is_memory_of_a_parameter_and_is_written() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y.add_(1)
            return self.norm(self.conv(x))

    net, twin = lively(Writes()), lively(Writes())
    twin.load_state_dict(net.state_dict())
    one = Compiled(net)
    with torch.no_grad():
        torch.testing.assert_close(one.compiled(x := image(), torch.zeros(3, 3, 3)), twin(x, torch.zeros(3, 3, 3)))
        torch.testing.assert_close(one.compiled(x, net.conv.weight.data[0]), twin(x, twin.conv.weight.data[0]))


def test_functional_calls_and_tensors_from_outside() -> None:
    weight, scale = torch.randn(4, 3, 3, 3), torch.randn(4, 1, 1)
    compiled = torch.compile(lambda x: F.conv2d(x, weight) * scale, backend="fuser", options={"compiler": "eager"})
    for _ in range(3):
        x = image()
        torch.testing.assert_close(compiled(x), F.conv2d(x, weight) * scale)
        weight.mul_(2)


# -- options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pases": []}, "no option 'pases'; it takes compiler, passes"),
        ({"updates": "never"}, "updates is one of values, versions; not 'never'"),
        ({"shared_weights": "steal"}, "shared_weights is one of copy, refuse"),
        ({"compiler": "gcc"}, "there is no compiler 'gcc'"),
        ({"compiler": "fuser"}, "cannot be fuser"),
        ({"passes": ["fold-everything"]}, "no pass 'fold-everything'|fold-everything"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=message) as raised:
        torch.compile(small(), backend="fuser", options=options)(image())
    assert "InputError" in str(raised.value)


def test_the_passes_can_be_chosen() -> None:
    one = Compiled(small(), skip=["fold-batch-norm"])
    assert not one.check(image())
    assert one.applied == [0]
    two = Compiled(small(), passes=["fold-batch-norm"])
    two.check(image())
    assert [run.name for run in two.reports[0].passes] == ["fold-batch-norm"]


def test_a_mode_is_for_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def compile_fx(module: Any, inputs: Any, **options: Any) -> Any:
        given.update(options)
        return module.forward

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "inductor", compile_fx)
    with torch.no_grad():
        torch.compile(small(), backend="fuser", mode="max-autotune-no-cudagraphs")(image())
    assert given["config_patches"]["max_autotune"]


class Wrong(RewritePass[Any, Any]):
    """Claims that a BatchNorm changes nothing."""

    name, root = "wrong", BatchNorm

    def match(self, graph: Any, op: Any) -> Any:
        return op

    def rewrite(self, graph: Any, op: Any) -> str:
        graph.replace(op, by=op.input)
        return "removed"


class Broken(Wrong):
    """Edits while it matches."""

    name = "broken"

    def match(self, graph: Any, op: Any) -> Any:
        graph.replace(op, by=op.input)
        return op


@pytest.mark.parametrize("bad", [Wrong, Broken])
def test_a_bad_pass_does_no_harm(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuser import registry

    good = registry.load().select(["fold-batch-norm"])
    monkeypatch.setattr(registry.Registry, "select", lambda *_, **__: [bad(), *good])
    one = Compiled(small()[:2], verify=True)
    one.check(image(1, 4))
    assert any(bad.name in warning for warning in one.reports[0].warnings)
