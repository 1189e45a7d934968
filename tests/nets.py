"""The specification of the fold, as nets: what each holds, and what has to be said of each BatchNorm in it.

Every host (ONNX, traced, exported, lifted, decomposed) is held to the same table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A net, an input that it accepts, and the remarks of fold-batch-norm by code.

    elsewhere: remarks on hosts that see more or less than the others; a host that cannot hold the net is
        given as None.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    codes: dict[str, int]
    elsewhere: dict[str, dict[str, int] | None] = field(default_factory=dict)


class Net(nn.Module):
    """Layers by name, and how they are wired."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.wiring = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def lively(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training, in eval mode: some negative, some near zero."""
    generator = torch.Generator().manual_seed(7)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            if layer.weight is not None:
                with torch.no_grad():
                    layer.weight.normal_(generator=generator)
                    layer.bias.normal_(generator=generator)
    return module.eval()


def after(linear: nn.Module, norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(copy.deepcopy(linear), copy.deepcopy(norm), nn.ReLU())


def shared_conv() -> nn.Module:
    """One convolution, called twice, a BatchNorm of its own after each call."""
    return Net(
        lambda m, x: m.second(m.conv(m.first(m.conv(x)))),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        first=nn.BatchNorm2d(4),
        second=nn.BatchNorm2d(4),
    )


def tied_weights() -> nn.Module:
    a, b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    b.weight = a.weight
    return Net(lambda m, x: m.bn_a(m.a(x)) + m.bn_b(m.b(x)), a=a, b=b, bn_a=nn.BatchNorm2d(4), bn_b=nn.BatchNorm2d(4))


def read_twice() -> nn.Module:
    return Net(lambda m, x: m.norm(y := m.conv(x)) + y, conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6))


def residual() -> nn.Module:
    return Net(
        lambda m, x: torch.relu(m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(x))))) + m.down(x)),
        conv1=nn.Conv2d(4, 8, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 8, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(8),
        down=nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)),
    )


def concatenated(shared: bool = False) -> nn.Module:
    def wiring(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        y = m.norm(torch.cat([a, b], 1))
        return y + a.mean() if shared else y

    return Net(wiring, a=nn.Conv2d(4, 3, 3), b=nn.Conv2d(4, 5, 3), norm=nn.BatchNorm2d(8))


def flattened() -> nn.Module:
    """A LeViT block: the linear works on [B, N, C], the norm on [B * N, C]."""
    return Net(
        lambda m, x: m.norm(m.linear(x).flatten(0, 1)).reshape(2, 5, 6),
        linear=nn.Linear(4, 6),
        norm=nn.BatchNorm1d(6),
    )


def shaped_like(shape: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A LeViT block that takes its shape back from the output of the linear, which nobody reads otherwise."""

    def wiring(m: Net, x: Tensor) -> Tensor:
        y = m.linear(m.stem(x).flatten(2).transpose(1, 2))
        return shape(m.norm(y.flatten(0, 1)), y)

    return lambda: Net(wiring, stem=nn.Conv2d(3, 4, 3), linear=nn.Linear(4, 6, bias=False), norm=nn.BatchNorm1d(6))


def channels_last_linear() -> nn.Module:
    return Net(
        lambda m, x: m.norm(m.linear(x).transpose(1, 2)).transpose(1, 2), linear=nn.Linear(4, 6), norm=nn.BatchNorm1d(6)
    )


UNKNOWN_RANK = {"Traced": {"rank": 1}}
"""Without example inputs a traced graph has no shapes, and these layers take input with and without a batch."""

CASES: dict[str, Case] = {
    "conv2d": Case(after(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 8, 8), {"applied": 1}),
    "no-bias": Case(after(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 4, 8, 8), {"applied": 1}),
    "strided": Case(
        after(nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=1), nn.BatchNorm2d(6)), (2, 4, 9, 9), {"applied": 1}
    ),
    "grouped": Case(after(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 8, 8), {"applied": 1}),
    "depthwise": Case(after(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 8, 8), {"applied": 1}),
    "same": Case(after(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), (2, 4, 8, 8), {"applied": 1}),
    "conv1d": Case(after(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 8), {"applied": 1}, UNKNOWN_RANK),
    "conv3d": Case(after(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (2, 4, 5, 5, 5), {"applied": 1}),
    "transposed": Case(after(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 5, 5), {"applied": 1}),
    "transposed-square": Case(
        after(nn.ConvTranspose2d(6, 6, 3, stride=2), nn.BatchNorm2d(6)), (2, 6, 5, 5), {"applied": 1}
    ),
    "transposed-grouped": Case(
        after(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5), {"applied": 1}
    ),
    "transposed-depthwise": Case(
        after(nn.ConvTranspose2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 5, 5), {"applied": 1}
    ),
    "no-affine": Case(after(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 4, 8, 8), {"applied": 1}),
    "large-epsilon": Case(after(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5)), (2, 4, 8, 8), {"applied": 1}),
    "linear": Case(after(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4), {"applied": 1}, UNKNOWN_RANK),
    "linear-no-bias": Case(after(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)), (3, 4), {"applied": 1}, UNKNOWN_RANK),
    "two-norms": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), (2, 4, 8, 8), {"applied": 2}
    ),
    "dropout-between": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout2d(), nn.Identity(), nn.BatchNorm2d(6)),
        (2, 4, 8, 8),
        {"applied": 1},
    ),
    "residual": Case(residual, (2, 4, 8, 8), {"applied": 3}),
    "shared-conv": Case(shared_conv, (2, 4, 8, 8), {"applied": 2}),
    "tied-weights": Case(tied_weights, (2, 4, 8, 8), {"applied": 2}),
    "before-conv": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), (2, 4, 8, 8), {"applied": 1}
    ),
    "before-grouped-conv": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 8, 8), {"applied": 1}
    ),
    "before-linear": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 6)), (3, 4), {"applied": 1}, UNKNOWN_RANK
    ),
    "before-flatten-linear": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 6)),
        (2, 4, 3, 3),
        {"applied": 1},
        {"Traced": {"axis-mismatch": 1}},
    ),
    "concatenated": Case(concatenated, (2, 4, 8, 8), {"applied": 1}, {"Traced": {"applied": 1}}),
    "interpolated": Case(
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.Upsample(scale_factor=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        ),
        (2, 4, 8, 8),
        {"applied": 1},
    ),
    "interpolated-before-conv": Case(
        lambda: Net(
            lambda m, x: m.conv(F.interpolate(m.norm(torch.relu(x)), size=(7, 9), mode="bicubic")),
            norm=nn.BatchNorm2d(4),
            conv=nn.Conv2d(4, 6, 3),
        ),
        (2, 4, 8, 8),
        {"applied": 1},
        {"Decomposed": {"no-linear": 1}},  # it is sums of what it gathers there
    ),
    # -- refused
    "padded-conv-after": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), (2, 4, 8, 8), {"padding": 1}
    ),
    "read-twice": Case(read_twice, (2, 4, 8, 8), {"shared-output": 1}),
    "concatenated-and-read": Case(lambda: concatenated(shared=True), (2, 4, 8, 8), {"shared-output": 1}),
    "between-relus": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()), (2, 4, 8, 8), {"no-linear": 1}
    ),
    "rank-3-linear": Case(
        after(nn.Linear(4, 5), nn.BatchNorm1d(5)), (2, 5, 4), {"axis-mismatch": 1}, {"Traced": {"rank": 1}}
    ),
    "flattened": Case(flattened, (2, 5, 4), {"applied": 1}, {"Traced": {"axis-mismatch": 1}}),
    "reshape-as": Case(
        shaped_like(lambda y, x: y.reshape_as(x)), (2, 3, 5, 5), {"applied": 1}, {"Traced": {"axis-mismatch": 1}}
    ),
    "view-as": Case(
        shaped_like(lambda y, x: y.view_as(x)), (2, 3, 5, 5), {"applied": 1}, {"Traced": {"axis-mismatch": 1}}
    ),
    "view-size": Case(
        shaped_like(lambda y, x: y.view(x.size())), (2, 3, 5, 5), {"applied": 1}, {"Traced": {"axis-mismatch": 1}}
    ),
    "view-shape": Case(
        shaped_like(lambda y, x: y.view(x.shape[0], x.size(1), -1)),
        (2, 3, 5, 5),
        {"applied": 1},
        {"Traced": {"axis-mismatch": 1}},
    ),
    "channels-last-linear": Case(channels_last_linear, (2, 5, 4), {"applied": 1}),
    "unbatched": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)),
        (3, 10),
        {"rank": 1},
        {"Onnx": None, "Decomposed": {"axis-mismatch": 1}},  # decompositions unsqueeze, as the exporter does
    ),
}
