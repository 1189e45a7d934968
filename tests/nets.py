"""The specification, as nets: what each holds, and what the pass under test has to say of it.

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
    """A net, an input that it accepts, and the remarks of the pass under test by code.

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
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            for parameter in layer.parameters():
                nn.init.normal_(parameter, generator=generator)
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


def three_readers() -> nn.Module:
    """The projections of attention."""
    return Net(
        lambda m, x: torch.softmax(m.q(y := m.norm(x)) @ m.k(y).transpose(1, 2), -1) @ m.v(y),
        norm=nn.LayerNorm(6),
        q=nn.Linear(6, 4),
        k=nn.Linear(6, 4),
        v=nn.Linear(6, 5),
    )


def normalized_residual() -> nn.Module:
    return Net(lambda m, x: m.linear(y := m.norm(x)) + y, norm=nn.LayerNorm(6), linear=nn.Linear(6, 6))


def channels_last_norm() -> nn.Module:
    """The downsampling of a ConvNeXt: LayerNorm over the channels of [N, C, H, W], and a patch convolution."""
    return Net(
        lambda m, x: m.conv(m.norm(torch.relu(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        norm=nn.LayerNorm(6),
        conv=nn.Conv2d(6, 4, 2, stride=2),
    )


def tied_embedding() -> nn.Module:
    """A language model whose head is its table of embeddings."""
    head = nn.Linear(6, 9, bias=False)
    return Net(
        lambda m, x: m.head(m.norm(nn.functional.embedding(x.argmax(-1), m.head.weight))), norm=nn.RMSNorm(6), head=head
    )


def broadcast_sum() -> nn.Module:
    """A convolution, and one of the mean of the image, which is as large as one element of it."""
    return Net(
        lambda m, x: torch.relu(m.norm(m.conv(x) + m.context(x.mean((2, 3), keepdim=True)))),
        conv=nn.Conv2d(4, 6, 3),
        context=nn.Conv2d(4, 6, 1),
        norm=nn.BatchNorm2d(6),
    )


def pooled_twice() -> nn.Module:
    """The head of fastai: the largest and the mean elements side by side."""
    return Net(
        lambda m, x: m.linear(
            m.norm(torch.cat([F.adaptive_max_pool2d(y := m.conv(x), 1), F.adaptive_avg_pool2d(y, 1)], 1)).flatten(1)
        ),
        conv=nn.Conv2d(4, 3, 3),
        norm=nn.BatchNorm2d(6),
        linear=nn.Linear(6, 2),
    )


def sliced(take: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A BatchNorm of a part of what a convolution makes."""
    return lambda: Net(
        lambda m, x: torch.relu(m.norm(take(m.conv(x)))), conv=nn.Conv2d(4, 9, 3), norm=nn.BatchNorm2d(6)
    )


def focused() -> nn.Module:
    """Every second pixel of the normalized image, four times, side by side: the first layer of YOLOv5."""

    def wiring(m: Net, x: Tensor) -> Tensor:
        y = m.norm(torch.relu(x))
        return m.conv(torch.cat([y[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1))

    return Net(wiring, norm=nn.BatchNorm2d(4), conv=nn.Conv2d(16, 6, 3))


UNSCALED = nn.BatchNorm2d(6, affine=False)
"""All of its factors are positive."""


def points(largest: Callable[[Tensor], Tensor], linear: nn.Module) -> Callable[[], nn.Module]:
    """A PointNet that normalizes what it has found."""
    return lambda: Net(
        lambda m, x: torch.relu(m.norm(largest(m.linear(x)))),
        linear=copy.deepcopy(linear),
        norm=nn.BatchNorm1d(6, affine=False),
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
    "pooled-twice": Case(pooled_twice, (2, 4, 8, 8), {"applied": 1}, {"Traced": {"axis-mismatch": 1}}),
    "sliced-channels": Case(sliced(lambda y: y[:, 2:8]), (2, 4, 8, 8), {"applied": 1}, {"Traced": {"no-linear": 1}}),
    "sliced-image": Case(
        sliced(lambda y: y[:, -6:, 1:-1, ::2]), (2, 4, 8, 8), {"applied": 1}, {"Traced": {"no-linear": 1}}
    ),
    "focused": Case(focused, (2, 4, 8, 8), {"applied": 1}, {"Traced": {"no-linear": 1}}),
    "broadcast-sum": Case(broadcast_sum, (2, 4, 8, 8), {"applied": 1}),
    "max-pooled": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.MaxPool2d(3, 2, 1), copy.deepcopy(UNSCALED), nn.ReLU()),
        (2, 4, 8, 8),
        {"applied": 1},
    ),
    "max-pooled-before-conv": Case(
        lambda: nn.Sequential(nn.ReLU(), copy.deepcopy(UNSCALED), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(6, 4, 2)),
        (2, 6, 7, 7),
        {"applied": 1},
    ),
    "largest-of-all": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.AdaptiveMaxPool2d(1), copy.deepcopy(UNSCALED), nn.Flatten()),
        (2, 4, 8, 8),
        {"applied": 1},
    ),
    "largest-point": Case(points(lambda y: torch.max(y, 2)[0], nn.Conv1d(4, 6, 1)), (2, 4, 9), {"applied": 1}),
    "largest-row": Case(points(lambda y: y.amax(1), nn.Linear(4, 6)), (2, 9, 4), {"applied": 1}, UNKNOWN_RANK),
    "mean-row": Case(points(lambda y: y.mean(1), nn.Linear(4, 6)), (2, 9, 4), {"applied": 1}, UNKNOWN_RANK),
    "reflected": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReflectionPad2d(2), nn.BatchNorm2d(6), nn.ReLU()),
        (2, 4, 8, 8),
        {"applied": 1},
        {"Decomposed": {"no-linear": 1}},  # it is gathered there
    ),
    "cropped": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ZeroPad2d((-1, -2, 0, -1)), nn.BatchNorm2d(6), nn.ReLU()),
        (2, 4, 8, 8),
        {"applied": 1},
    ),
    # -- refused
    "max-pooled-negative": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.BatchNorm2d(6)), (2, 4, 8, 8), {"not-monotone": 1}
    ),
    "largest-channel": Case(
        lambda: Net(
            lambda m, x: m.norm(m.conv(x).amax(1, keepdim=True)), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(1)
        ),
        (2, 4, 8, 8),
        {"axis-mismatch": 1},
    ),
    "pooled-channels": Case(  # [N, C, L] is one image of N channels for a pool over two axes
        lambda: Net(
            lambda m, x: m.norm(m.pool(m.conv(x))),
            conv=nn.Conv1d(4, 6, 1),
            pool=nn.MaxPool2d((1, 2)),
            norm=nn.BatchNorm1d(6, affine=False),
        ),
        (2, 4, 8),
        {"axis-mismatch": 1},
        {"Onnx": None, "Traced": {"rank": 1}},
    ),
    "padded-between": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(6)), (2, 4, 8, 8), {"padding": 1}
    ),
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
    "reshape-as": Case(shaped_like(lambda y, x: y.reshape_as(x)), (2, 3, 5, 5), {"applied": 1}),
    "view-as": Case(shaped_like(lambda y, x: y.view_as(x)), (2, 3, 5, 5), {"applied": 1}),
    "view-size": Case(shaped_like(lambda y, x: y.view(x.size())), (2, 3, 5, 5), {"applied": 1}),
    "view-shape": Case(
        shaped_like(lambda y, x: y.view(x.shape[0], x.size(1), -1)),
        (2, 3, 5, 5),
        {"applied": 1},
    ),
    "channels-last-linear": Case(channels_last_linear, (2, 5, 4), {"applied": 1}),
    "unbatched": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)),
        (3, 10),
        {"rank": 1},
        {"Onnx": None, "Decomposed": {"axis-mismatch": 1}},  # decompositions unsqueeze, as the exporter does
    ),
}

RMS_NORM: dict[str, dict[str, int] | None] = {"Onnx": None, "Decomposed": {}}
"""The exporter has none, and decomposed it is arithmetic: the business of fold-affine."""
GROUP_NORM = {"Onnx": {}, "Traced": {"rank": 1}}

NORMS: dict[str, Case] = {
    "layer-norm": Case(lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 4)), (2, 5, 6), {"applied": 1}),
    "no-shift": Case(  # the exporter writes zeros for the shift
        lambda: nn.Sequential(nn.LayerNorm(6, bias=False), nn.Linear(6, 4, bias=False)), (2, 5, 6), {"applied": 1}
    ),
    "rms-norm": Case(
        lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 4)), (2, 5, 6), {"applied": 1}, RMS_NORM
    ),
    "group-norm": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1)),
        (2, 6, 5, 5),
        {"applied": 1},
        GROUP_NORM,
    ),
    "two-blocks": Case(
        lambda: nn.Sequential(
            nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Dropout(), nn.LayerNorm(8), nn.Dropout(), nn.Linear(8, 4)
        ),
        (2, 5, 6),
        {"applied": 2},
    ),
    "three-readers": Case(three_readers, (2, 5, 6), {"applied": 1}),
    "channels-last": Case(channels_last_norm, (2, 6, 4, 4), {"applied": 1}),
    "no-affine": Case(
        lambda: nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 4)),
        (2, 5, 6),
        {},
        {"Onnx": {"applied": 1}},
    ),
    "rows-flattened": Case(  # the last axis stays the last
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Flatten(0, 1), nn.Linear(6, 4)),
        (2, 5, 6),
        {"applied": 1},
        {"Traced": {"axis-mismatch": 1}},
    ),
    "flattened-into-rows": Case(  # a map of six channels becomes one of thirty, where the sizes are known
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Flatten(1), nn.Linear(30, 4)),
        (2, 5, 6),
        {"applied": 1},
        {"Traced": {"axis-mismatch": 1}},
    ),
    # -- refused
    "residual": Case(normalized_residual, (2, 5, 6), {"no-linear": 1}),
    "nothing-linear": Case(lambda: nn.Sequential(nn.LayerNorm(6), nn.GELU()), (2, 5, 6), {"no-linear": 1}),
    "bare-product": Case(lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False)), (2, 5, 6), {"grows": 1}),
    "tied-embedding": Case(tied_embedding, (2, 5, 9), {"grows": 1}, RMS_NORM | {"Traced": {}}),
    "padded": Case(
        lambda: nn.Sequential(nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3, padding=1)),
        (2, 6, 5, 5),
        {"padding": 1},
        GROUP_NORM,
    ),
    "over-two-axes": Case(lambda: nn.Sequential(nn.LayerNorm((5, 6)), nn.Linear(6, 4)), (2, 5, 6), {}),
}
"""For fold-layer-norm."""


def conv_pair(*convs: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.ReLU(), *map(copy.deepcopy, convs), nn.ReLU())


def read_between() -> nn.Module:
    return Net(lambda m, x: m.b(y := m.a(x)) + y.sum(), a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(6, 3, 1))


PIXELS = (2, 4, 6, 6)
FLATTENED = {"Decomposed": {}}
"""Decompositions put a `view` before and behind each product of more than two axes."""

PAIRS: dict[str, Case] = {
    "linears": Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), (4, 6), {"applied": 1}),
    "linears-no-bias": Case(
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)), (4, 6), {"applied": 1}
    ),
    "linears-of-rows": Case(
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.Dropout(), nn.Linear(8, 3)),
        (2, 4, 6),
        {"applied": 1},
        FLATTENED,
    ),
    "three-linears": Case(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3), nn.ReLU()), (4, 6), {"applied": 2}
    ),
    "pointwise-last": Case(
        conv_pair(nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2), nn.Conv2d(8, 3, 1)), PIXELS, {"applied": 1}
    ),
    "pointwise-first": Case(conv_pair(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 3, stride=2)), PIXELS, {"applied": 1}),
    "pointwise-first-padded": Case(
        conv_pair(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 3, 3, padding=1)), PIXELS, {"applied": 1}
    ),
    "pointwise-both": Case(conv_pair(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 1, bias=False)), PIXELS, {"applied": 1}),
    "normalized-between": Case(
        conv_pair(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3)),
        PIXELS,
        {"applied": 1},
    ),
    "grouped": Case(conv_pair(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 1, groups=4)), PIXELS, {"applied": 1}),
    "transposed": Case(
        conv_pair(nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2), nn.Conv2d(8, 4, 1, groups=2)), PIXELS, {"applied": 1}
    ),
    "transposed-last": Case(
        conv_pair(nn.Conv2d(4, 8, 1, bias=False), nn.ConvTranspose2d(8, 3, 3, stride=2, padding=1)),
        PIXELS,
        {"applied": 1},
    ),
    "circular": Case(
        conv_pair(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 3, 1)),
        PIXELS,
        {"applied": 1},
    ),
    # -- refused
    "low-rank": Case(
        lambda: nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16), nn.ReLU()), (4, 16), {"grows": 1}
    ),
    "separable": Case(conv_pair(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)), PIXELS, {"grows": 1}),
    "inverted": Case(conv_pair(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8)), PIXELS, {"grows": 1}),
    "two-kernels": Case(conv_pair(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), PIXELS, {"geometry": 1}),
    "strided-pointwise": Case(conv_pair(nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(8, 3, 3)), PIXELS, {"geometry": 1}),
    "bias-in-the-padding": Case(conv_pair(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 3, padding=1)), PIXELS, {"padding": 1}),
    "read-between": Case(read_between, PIXELS, {"shared-output": 1}),
    "activation-between": Case(conv_pair(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)), PIXELS, {}),
}
"""For merge-linears."""
