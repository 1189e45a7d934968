"""The arms: the ways in which a model is run when it is measured.

What a rewrite gains depends on what the runtime would have done anyway, so one number is never the answer: a
fold that ONNX Runtime makes at load gains nothing with its optimizer on, and much with it off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fuser.errors import InputError

DUPLICATED = (
    "ConvBNFusion",
    "ConvMulFusion",
    "ConvAddFusion",
    "MatMul_BatchNormalization_Fusion",
    "ConstantFolding",
    "EliminateIdentity",
    "EliminateDropout",
    "CommonSubexpressionElimination",
)
"""ONNX Runtime's own optimizers that do what the passes of fuser do."""


@dataclass(frozen=True)
class Arm:
    """A runtime and its settings.  `settings` are what `fuser.bench.host_onnx` and `host_torch` read."""

    name: str
    title: str
    host: str
    device: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, or None.  Does not import torch for an ONNX arm."""
        if self.host == "onnx":
            import onnxruntime

            if self.settings["provider"] in onnxruntime.get_available_providers():
                return None
            wheel = "onnxruntime-gpu" if self.device == "cuda" else "onnxruntime"
            return f"{self.settings['provider']} is not in this ONNX Runtime; install {wheel}"
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                return "torch finds no CUDA device"
        return None


def _ort(name: str, title: str, optimizer: str, disabled: tuple[str, ...] = ()) -> Arm:
    settings = {"provider": "CPUExecutionProvider", "optimizer": optimizer, "disabled": disabled}
    return Arm(name, f"ONNX Runtime, {title}", "onnx", "cpu", settings)


def _torch(name: str, title: str, mode: str, device: str = "cpu") -> Arm:
    return Arm(name, title, "torch", device, {"mode": mode})


ARMS = {
    arm.name: arm
    for arm in (
        _ort("ort-off", "optimizer off", "off"),
        _ort("ort-partial", "without the fusions that fuser makes", "on", DUPLICATED),
        _ort("ort-on", "optimizer on", "on"),
        Arm(
            "ort-cuda",
            "ONNX Runtime, CUDA",
            "onnx",
            "cuda",
            {"provider": "CUDAExecutionProvider", "optimizer": "on"},
        ),
        Arm(
            "ort-tensorrt",
            "ONNX Runtime, TensorRT",
            "onnx",
            "cuda",
            {"provider": "TensorrtExecutionProvider", "optimizer": "on"},
        ),
        _torch("torch-eager", "torch, eager", "eager"),
        _torch("torch-compile", "torch.compile", "compile"),
        _torch("torch-freeze", "torch.compile, weights frozen", "freeze"),
        _torch("torch-cuda", "torch on CUDA, eager", "eager", "cuda"),
        _torch("torch-cuda-compile", "torch.compile on CUDA", "compile", "cuda"),
        _torch("torch-cuda-graph", "torch on CUDA, CUDA graph", "cuda-graph", "cuda"),
    )
}
"""Every arm by name."""

DEFAULTS = {
    ("onnx", "cpu"): ("ort-off", "ort-partial", "ort-on"),
    ("onnx", "cuda"): ("ort-cuda", "ort-tensorrt"),
    ("torch", "cpu"): ("torch-eager", "torch-compile"),
    ("torch", "cuda"): ("torch-cuda", "torch-cuda-compile", "torch-cuda-graph"),
}
"""Which arms are measured unless others are named."""


def select(host: str, device: str, names: Sequence[str] | None = None) -> list[Arm]:
    """The arms for a host ("onnx" or "torch") and a device; raises `InputError` for names that do not fit."""
    if device not in ("cpu", "cuda"):
        raise InputError(f"there is no device {device!r}; the devices are cpu and cuda")
    if names is None:
        return [ARMS[name] for name in DEFAULTS[host, device]]
    fitting = {arm.name: arm for arm in ARMS.values() if (arm.host, arm.device) == (host, device)}
    for name in names:
        if name not in fitting:
            raise InputError(f"there is no arm {name!r} for {host} on {device}; the arms are {', '.join(fitting)}")
    return [fitting[name] for name in names]
