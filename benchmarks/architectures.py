"""The networks that the benchmarks run on: ours, and timm's where it is installed.

Weights are random, BatchNorm statistics are those of a trained network in size: a fold that forgot a term would
show.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

INPUT = (3, 128, 128)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = conv_bn(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class Branches(nn.Module):
    """A block as RepVGG and MobileOne train it: parallel k x k, 1 x 1 and identity branches, each with its
    BatchNorm, added up."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, copies: int) -> None:
        super().__init__()
        wide = [conv_bn(inputs, outputs, kernel, stride, groups) for _ in range(copies)]
        narrow = [conv_bn(inputs, outputs, 1, stride, groups)] if kernel > 1 else []
        skip = [nn.BatchNorm2d(outputs)] if stride == 1 and inputs == outputs else []
        self.branches = nn.ModuleList([*wide, *narrow, *skip])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return torch.relu(total)


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 100)]


def resnet() -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 32, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 32
    for outputs, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers.append(Residual(inputs, outputs, stride))
        inputs = outputs
    return nn.Sequential(*layers, *head(inputs))


def repvgg() -> nn.Module:
    layers, inputs = [], 3
    for outputs, stride in ((32, 2), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1)):
        layers.append(Branches(inputs, outputs, 3, stride, 1, 1))
        inputs = outputs
    return nn.Sequential(*layers, *head(inputs))


def mobileone() -> nn.Module:
    layers: list[nn.Module] = [Branches(3, 48, 3, 2, 1, 2)]
    inputs = 48
    for outputs, stride in ((64, 2), (64, 1), (128, 2), (128, 1), (128, 1)):
        layers += [Branches(inputs, inputs, 3, stride, inputs, 4), Branches(inputs, outputs, 1, 1, 1, 4)]
        inputs = outputs
    return nn.Sequential(*layers, *head(inputs))


def mobilenet() -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for outputs, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1)):
        layers += [conv_bn(inputs, inputs, 3, stride, inputs), nn.ReLU6(), conv_bn(inputs, outputs, 1), nn.ReLU6()]
        inputs = outputs
    return nn.Sequential(*layers, *head(inputs))


OURS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "repvgg": repvgg,
    "mobileone": mobileone,
    "mobilenet": mobilenet,
}
TIMM = ("resnet18", "mobileone_s0", "repvgg_a0", "mobilenetv3_small_100", "efficientnet_b0", "convnext_atto")

REPARAMETERIZABLE = ("mobileone_s0", "repvgg_a0", "repvit_m0_9", "fastvit_t8", "levit_128s")
"""timm's networks with parallel branches that its `reparameterize_model` merges."""

BROAD = (
    *REPARAMETERIZABLE,
    *"""
    botnet26t_256 coatnet_pico_rw_224 convit_tiny convnext_atto cspdarknet53 densenet121 dla34 dpn68 edgenext_xx_small
    efficientformer_l1 efficientnet_b0 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim fasternet_t0 fbnetc_100
    gernet_s ghostnet_100 ghostnetv2_100 ghostnetv3_100 hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_next_atto
    inception_v3 lcnet_035 mixnet_s mnasnet_small mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small
    mobilevit_xxs mobilevitv2_050 nextvit_small nf_resnet26 poolformer_s12 regnety_002 repghostnet_050
    res2net50_14w_8s resnest14d resnet18 resnetv2_50 rexnet_100 selecsls42b shvit_s1 skresnet18 starnet_s1
    swiftformer_xs tiny_vit_5m_224 tinynet_e visformer_tiny xception41
    """.split(),
)
"""A network or two of timm's for each family that has BatchNorms, parallel branches or LayerScale."""


def names() -> list[str]:
    """Ours, then timm's where it is installed."""
    return [*OURS, *(f"timm/{name}" for name in TIMM if importlib.util.find_spec("timm"))]


def build(name: str, seed: int = 0) -> nn.Module:
    """The network, in eval mode, with seeded weights and statistics."""
    torch.manual_seed(seed)
    if name.startswith("timm/"):
        _declare_torchvision_operators()
        import timm

        model = timm.create_model(name.removeprefix("timm/"), pretrained=False)
    else:
        model = OURS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.2)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gamma"):  # a LayerScale begins near zero, and would hide its whole branch
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias") and not parameter.any():  # no trained network adds zeros
                parameter.normal_(0, 0.02)
    return model.eval()


@functools.cache
def _declare_torchvision_operators() -> None:
    """torchvision declares fakes of operators that it has in compiled builds only; timm imports it."""
    if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []
"""A library takes its operators along when it goes."""


def example(batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Images, in the sense of the networks here."""
    return torch.randn(batch, *INPUT, generator=torch.Generator().manual_seed(seed))


def example_for(model: nn.Module) -> torch.Tensor:
    """Images of the smallest usual size that the network takes; raises what it raises where it takes none."""
    for size in (128, 224, 256):
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                model(x)
            return x
        except (RuntimeError, AssertionError, ValueError) as error:
            refused = error
    raise refused


def export_raw(model: nn.Module, path: Path, x: torch.Tensor | None = None, optimized: Path | None = None) -> Path:
    """The ONNX file as torch exports it, without the optimizer that runs inside its exporter.

    It computes the parameters of BatchNorm with Expand nodes, behind which ONNX Runtime 1.32 does not fold them:
    here a fold gains something even with the runtime's own optimizer on.

    optimized: where the default export, after that optimizer, is written, too.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    given = (example() if x is None else x,)
    program = torch.onnx.export(model, given, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    program.save(path)
    if optimized is not None:
        program.optimize()
        program.save(optimized)
    return path
