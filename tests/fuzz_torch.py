"""Random torch modules: layers, functional calls, shared modules and weights, hooks, keyword arguments, `cond`.

A module is a list of steps; each makes a value of earlier ones.  A step is kept when it runs, so that every module
is sound by construction; all are in eval mode and float64, where a right rewrite is right to 1e-10.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step: TypeAlias = Callable[["Net", list[Tensor]], Any]

LARGEST = 1e4


class Net(nn.Module):
    """Its layers are numbered, its steps are closures over their names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.constants = nn.ParameterDict()
        self.steps: list[Step] = []
        self.outputs = [-1]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        found = tuple(values[i] for i in self.outputs)
        return found[0] if len(found) == 1 else found


@dataclass
class Sample:
    """A module in eval mode, and an input that it accepts."""

    net: Net
    x: Tensor


class _Builder:
    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.net = Net()
        self.steps: list[Callable[[Tensor, int], Step | None]] = [
            self._conv, self._conv, self._conv, self._linear, self._linear, self._norm, self._norm, self._norm,
            self._norm, self._functional_norm, self._functional_linear, self._arithmetic, self._arithmetic,
            self._sum, self._sum, self._shape, self._pass, self._activation, self._concat, self._pool, self._again,
            self._cond, self._layer_norm, self._layer_norm, self._pair, self._pair, self._pad, self._pad, self._resize,
        ]  # fmt: skip

    def sample(self) -> Sample:
        dice = self.dice
        shape = [
            dice.randint(1, 3),
            dice.choice([2, 4, 4, 6]),
            *(dice.choice([4, 6, 7]) for _ in range(dice.choice([0, 1, 2, 2, 3]))),
        ]
        x = torch.randn(shape, dtype=torch.float64)
        values = [x]
        with torch.no_grad():
            for _ in range(dice.choice([2, 4, 8, 12])):
                at = len(values) - 1 if dice.random() < 0.75 else dice.randrange(len(values))
                step = dice.choice(self.steps)(values[at], at)
                if step is None:
                    continue
                try:
                    made = step(self.net, values)
                except Exception:
                    continue
                if made.isfinite().all() and made.numel() and made.abs().max() < LARGEST and made.numel() < 50_000:
                    values.append(made)
                    self.net.steps.append(step)
        if len(values) > 2 and dice.random() < 0.3:
            self.net.outputs = [len(values) - 1, dice.randrange(1, len(values))]
        self._decorate()
        return Sample(self.net.eval(), x)

    def _decorate(self) -> None:
        """Tied weights, hooks, weight normalization."""
        layers = list(self.net.layers.values())
        dice = self.dice
        if layers and dice.random() < 0.1:
            dice.choice(layers).register_forward_hook(lambda module, args, y: y * 2)
        weighted = [layer for layer in layers if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))]
        if weighted and dice.random() < 0.1:
            nn.utils.parametrizations.weight_norm(dice.choice(weighted))
        elif len(weighted) > 1 and dice.random() < 0.3:
            a, b = dice.sample(weighted, 2)
            if type(a) is type(b) and a.weight.shape == b.weight.shape:
                b.weight = a.weight

    def _layer(self, layer: nn.Module) -> str:
        """Keep a layer, with statistics as after training; its name."""
        name = f"n{len(self.net.layers)}"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_()
            assert layer.running_var is not None
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, -1.5, 1.5)
                nn.init.normal_(layer.bias)
        training = self.dice.random() < 0.02
        self.net.layers[name] = layer.double().train(training)
        return name

    def _constant(self, *shape: int) -> str:
        name = f"c{len(self.net.constants)}"
        sign = torch.where(torch.rand(shape) < 0.3, -1.0, 1.0)
        self.net.constants[name] = nn.Parameter((torch.rand(shape) + 0.5).mul(sign).double(), requires_grad=False)
        return name

    def _call(self, name: str, at: int) -> Step:
        if self.dice.random() < 0.2:
            return lambda net, values: net.layers[name](input=values[at])
        return lambda net, values: net.layers[name](values[at])

    def _conv(self, x: Tensor, at: int) -> Step | None:
        spatial, dice = x.dim() - 2, self.dice
        if not 1 <= spatial <= 3:
            return None
        channels = x.shape[1]
        groups = dice.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
        kinds: Any = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))
        transposed = dice.random() < 0.25
        options: dict[str, Any] = {"bias": dice.random() < 0.6, "groups": groups, "padding": dice.choice([0, 0, 1])}
        if dice.random() < 0.3:
            options["stride"] = 2
        if not transposed and "stride" not in options and dice.random() < 0.2:
            options["padding"] = dice.choice(["same", "valid"])
        if not transposed and dice.random() < 0.1:
            options["padding_mode"] = dice.choice(["circular", "replicate"])
        kernel, out = dice.choice([1, 1, 2, 3]), groups * dice.choice([1, 2, channels // groups])
        return self._call(self._layer(kinds[spatial - 1][transposed](channels, out, kernel, **options)), at)

    def _linear(self, x: Tensor, at: int) -> Step | None:
        out = self.dice.choice([x.shape[-1], 3, 5])
        return self._call(self._layer(nn.Linear(x.shape[-1], out, bias=self.dice.random() < 0.6)), at)

    def _norm(self, x: Tensor, at: int) -> Step | None:
        if not 2 <= x.dim() <= 5:
            return None
        kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
        options: dict[str, Any] = {}
        if self.dice.random() < 0.1:
            options["affine"] = False
        if self.dice.random() < 0.05:
            options["track_running_stats"] = False
        if self.dice.random() < 0.1:
            options["eps"] = 0.3
        return self._call(self._layer(kind(x.shape[1], **options)), at)

    def _layer_norm(self, x: Tensor, at: int) -> Step | None:
        """A normalization, mostly read by a linear operator alone."""
        dice, options = self.dice, {"eps": self.dice.choice([1e-5, 0.1])}
        if dice.random() < 0.2:
            options["elementwise_affine"] = False
        kind = dice.choice(["layer", "layer", "rms", "group", "functional"])
        if kind == "functional":
            scale, shift = self._constant(x.shape[-1]), self._constant(x.shape[-1])
            norm: Any = lambda net, y: F.layer_norm(y, (y.shape[-1],), net.constants[scale], bias=net.constants[shift])  # noqa: E731
        else:
            made: Any = (
                nn.GroupNorm(2, x.shape[1])
                if kind == "group" and x.dim() > 1 and x.shape[1] % 2 == 0
                else (nn.RMSNorm if kind == "rms" else nn.LayerNorm)(x.shape[-1], **options)
            )
            for parameter in made.parameters():
                nn.init.normal_(parameter)
            name = self._layer(made)
            norm = lambda net, y: net.layers[name](y)  # noqa: E731
        if dice.random() < 0.2:
            return lambda net, values: norm(net, values[at])
        out = 2 < x.dim() < 6 and kind == "group"
        bias = dice.random() < 0.7
        reader = self._layer(
            {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[x.dim()](x.shape[1], 3, 1, bias=bias)
            if out
            else nn.Linear(x.shape[-1], 3, bias=bias)
        )
        return lambda net, values: net.layers[reader](norm(net, values[at]))

    def _pair(self, x: Tensor, at: int) -> Step | None:
        """Two linear operators, one after the other."""
        dice = self.dice
        between, out = dice.choice([2, 4, 6]), dice.choice([2, 4])
        biased = [dice.random() < 0.5, dice.random() < 0.5]
        if x.dim() != 4 or dice.random() < 0.3:
            layers: list[nn.Module] = [
                nn.Linear(x.shape[-1], between, bias=biased[0]), nn.Linear(between, out, bias=biased[1])
            ]  # fmt: skip
        else:
            kernels = dice.choice([(1, 1), (1, 3), (3, 1), (3, 3)])
            groups = [dice.choice([1, 1, 2]) if n % 2 == 0 else 1 for n in (x.shape[1], between)]
            layers = [
                nn.Conv2d(n, m, k, padding=dice.choice([0, k // 2]), groups=g, bias=b)
                for n, m, k, g, b in zip((x.shape[1], between), (between, out), kernels, groups, biased, strict=True)
            ]
        first, second = map(self._layer, layers)
        return lambda net, values: net.layers[second](net.layers[first](values[at]))

    def _functional_norm(self, x: Tensor, at: int) -> Step | None:
        if x.dim() < 2:
            return None
        scale, shift, mean, var = (self._constant(x.shape[1]) for _ in range(4))
        self.net.constants[var].data.abs_()
        positional, training = self.dice.random() < 0.5, self.dice.random() < 0.05

        def step(net: Net, values: list[Tensor]) -> Any:
            c = net.constants
            if positional:
                return F.batch_norm(values[at], c[mean], c[var], c[scale], c[shift], False, 0.1, 0.01)
            return F.batch_norm(
                values[at], running_var=c[var].clone() if training else c[var],
                running_mean=c[mean].clone() if training else c[mean], training=training,
            )  # fmt: skip

        return step

    def _functional_linear(self, x: Tensor, at: int) -> Step | None:
        if x.dim() < 2:
            return None
        weight, bias = self._constant(4, x.shape[-1]), self._constant(4)
        product = self.dice.choice(["linear", "matmul", "addmm"])

        def step(net: Net, values: list[Tensor]) -> Any:
            w, b = net.constants[weight], net.constants[bias]
            if product == "addmm":
                return torch.addmm(b, values[at], w.t(), beta=0.5, alpha=2)
            return F.linear(values[at], w, bias=b) if product == "linear" else values[at] @ w.t() + b

        return step

    def _arithmetic(self, x: Tensor, at: int) -> Step | None:
        axis = self.dice.randrange(x.dim()) if self.dice.random() < 0.4 else min(1, x.dim() - 1)
        one = [n if i == axis else 1 for i, n in enumerate(x.shape)]
        name = self._constant(*self.dice.choice([[], [1], one, one, one[axis:], one[axis:], list(x.shape)]))
        number = self.dice.choice([None, None, 2.0, -0.5])
        op: Any = self.dice.choice([torch.add, torch.sub, torch.mul, torch.div])
        swapped = op is not torch.div and self.dice.random() < 0.3
        scaled = op in (torch.add, torch.sub) and self.dice.random() < 0.2

        def step(net: Net, values: list[Tensor]) -> Any:
            c: Any = net.constants[name] if number is None else number
            if scaled:
                return op(values[at], c, alpha=3)
            if number is not None:
                return values[at] * c + 1
            return op(c, values[at]) if swapped else op(values[at], c)

        return step

    def _sum(self, x: Tensor, at: int) -> Step | None:
        other = self.dice.randrange(len(self.net.steps) + 1)
        minus = self.dice.random() < 0.3
        return lambda net, values: values[at] - values[other] if minus else values[at] + values[other]

    def _concat(self, x: Tensor, at: int) -> Step | None:
        other, axis = self.dice.randrange(len(self.net.steps) + 1), self.dice.choice([0, 1, -1])
        return lambda net, values: torch.cat([values[at], values[other]], dim=axis)

    def _shape(self, x: Tensor, at: int) -> Step | None:
        kind = self.dice.choice(["flatten", "transpose", "permute", "reshape", "unsqueeze", "squeeze", "layer"])
        order = self.dice.sample(range(x.dim()), x.dim())
        axes = self.dice.sample(range(x.dim()), 2) if x.dim() > 1 else [0, 0]
        start = self.dice.choice([0, 1])
        if kind == "layer":
            return self._call(self._layer(nn.Flatten()), at)
        if kind == "flatten":
            return lambda net, values: values[at].flatten(start)
        if kind == "transpose":
            return lambda net, values: values[at].transpose(*axes)
        if kind == "permute":
            return lambda net, values: values[at].permute(order)
        if kind == "unsqueeze":
            return lambda net, values: values[at].unsqueeze(start)
        if kind == "squeeze":
            return lambda net, values: values[at].squeeze(-1)
        return lambda net, values: values[at].reshape(values[at].shape[0], -1)

    def _pass(self, x: Tensor, at: int) -> Step | None:
        kind = self.dice.choice(["dropout", "identity", "contiguous", "functional"])
        if kind == "contiguous":
            return lambda net, values: values[at].contiguous()
        if kind == "functional":
            return lambda net, values: F.dropout(values[at], 0.3, training=False)
        return self._call(self._layer(nn.Dropout(0.2).eval() if kind == "dropout" else nn.Identity()), at)

    def _activation(self, x: Tensor, at: int) -> Step | None:
        kind = self.dice.choice([torch.relu, torch.tanh, F.gelu, F.relu])
        return lambda net, values: kind(values[at])

    def _pool(self, x: Tensor, at: int) -> Step | None:
        if x.dim() != 4:
            return None
        kind = self.dice.choice(["avg", "adaptive", "mean", "functional"])
        if kind == "avg":
            counted = self.dice.random() < 0.5
            return self._call(
                self._layer(nn.AvgPool2d(2, padding=self.dice.choice([0, 1]), count_include_pad=counted)), at
            )
        if kind == "adaptive":
            return self._call(self._layer(nn.AdaptiveAvgPool2d(self.dice.choice([1, 2]))), at)
        if kind == "mean":
            return lambda net, values: values[at].mean((2, 3), keepdim=True)
        return lambda net, values: F.avg_pool2d(values[at], 2)

    def _pad(self, x: Tensor, at: int) -> Step | None:
        """A pad, mostly with something behind it that could pad by itself."""
        spatial, dice = x.dim() - 2, self.dice
        if not 1 <= spatial <= 3:
            return None
        axes = dice.randint(1, spatial)
        sides = [dice.choice([0, 1, 1, 2]) for _ in range(axes)]
        pairs = [side for side in sides for _ in range(2)]
        if dice.random() < 0.15:
            pairs[0] -= dice.choice([-1, 1, 3])
        value = dice.choice([0.0, 0.0, 0.0, 0.5, float("-inf")])
        channels, kernel, stride = x.shape[1], dice.choice([2, 3, 4]), dice.choice([1, 2])
        kind: Any = dice.choice(["Conv", "Conv", "Avg", "Max", "Max", None])
        if kind is None:
            return lambda net, values: F.pad(values[at], pairs, value=0.5)
        if kind == "Max":
            after: nn.Module = getattr(nn, f"MaxPool{spatial}d")(kernel, stride, ceil_mode=dice.random() < 0.1)
        elif kind == "Avg":
            after = getattr(nn, f"AvgPool{spatial}d")(kernel, stride, count_include_pad=dice.random() < 0.5)
        else:
            after = getattr(nn, f"Conv{spatial}d")(channels, channels, kernel, stride, padding=dice.choice([0, 1]))
        name, rectified, layer = self._layer(after), dice.random() < 0.3, dice.random() < 0.5
        pad = self._layer(getattr(nn, f"ConstantPad{spatial}d")(pairs + [0] * (2 * spatial - len(pairs)), value))

        def step(net: Net, values: list[Tensor]) -> Any:
            y = torch.relu(values[at]) if rectified else values[at]
            return net.layers[name](net.layers[pad](y) if layer else F.pad(y, pairs, value=value))

        return step

    def _resize(self, x: Tensor, at: int) -> Step | None:
        if not 3 <= x.dim() <= 5:
            return None
        if self.dice.random() < 0.5:
            return self._call(self._layer(nn.Upsample(scale_factor=self.dice.choice([1, 2, 0.5]))), at)
        mode = {3: "linear", 4: "bicubic", 5: "trilinear"}[x.dim()]
        return lambda net, values: F.interpolate(values[at], scale_factor=1.5, mode=mode)

    def _again(self, x: Tensor, at: int) -> Step | None:
        """A layer that was called before."""
        return self._call(self.dice.choice(list(self.net.layers)), at) if self.net.layers else None

    def _cond(self, x: Tensor, at: int) -> Step | None:
        """A choice at run time; what is inside its branches is seen on the exported graph only."""
        if self.dice.random() < 0.5 or x.dim() != 4:
            return None
        weight = self._constant(x.shape[1], x.shape[1], 1, 1)
        scale = self._constant(x.shape[1], 1, 1)

        def step(net: Net, values: list[Tensor]) -> Any:
            w, s = net.constants[weight], net.constants[scale]
            return torch.cond(
                values[0].sum() > 0, lambda v: F.conv2d(v, w) * s, lambda v: v * 2, (values[at],)
            )  # fmt: skip

        return step


def random_module(dice: random.Random) -> Sample:
    """A module that runs on its input."""
    torch.manual_seed(dice.randrange(2**32))
    while True:
        sample = _Builder(dice).sample()
        if not sample.net.steps:
            continue
        try:
            with torch.no_grad():
                y = sample.net(sample.x)
        except Exception:  # what was decorated no longer fits
            continue
        if all(one.isfinite().all() for one in (y if isinstance(y, tuple) else (y,))):
            return sample
