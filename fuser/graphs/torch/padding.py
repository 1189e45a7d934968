"""Give a convolution or a pool padding of its own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from fuser.graphs.torch.calls import Signature, aten, signature, write
from fuser.graphs.torch.copy import shallow
from fuser.graphs.torch.wiring import Wiring
from fuser.ops import AveragePool, Conv, MaxPool, Padding
from fuser.remarks import Missed


def refusal(op: Conv | AveragePool | MaxPool, name: str, padding: Padding) -> Missed | None:
    """Why torch cannot be told to pad like that."""
    if any(before != after for before, after in padding):
        return Missed("asymmetric", f"torch pads both sides of an axis alike, and {name} would need {padding}")
    if isinstance(op, Conv) or op.window is None:
        return None
    if any(2 * before > size for size, (before, _) in zip(op.window.size, padding, strict=True)):
        return Missed("window", f"torch pads by half a window at most, and {name} would need {padding}")
    return None


def set_padding(wiring: Wiring, op: Conv | AveragePool | MaxPool, padding: Padding) -> None:
    """Pad by as much; the zeros of an average count."""
    node: fx.Node = op.node
    sizes = [before for before, _ in padding]
    old = wiring.called(node)
    if old is not None:
        own: Any = shallow(old)
        own.padding = tuple(sizes)
        if isinstance(op, AveragePool):
            own.count_include_pad = True
        wiring.call_own(node, own)
        return
    called = cast(Signature, signature(node))
    if node.target in _BY_NAME:
        node.target = _BY_NAME[node.target]
    write(node, called, "padding", sizes)
    if isinstance(op, AveragePool):
        write(node, called, "count_include_pad", True)


_BY_NAME: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
"""Overloads that take "same" or "valid", and those that take numbers in that place."""


def memory_formats(value: torch.Tensor) -> tuple[bool, ...]:
    """In which formats the elements are: operators lay out their results after that."""
    formats = [torch.contiguous_format]
    if value.dim() in _CHANNELS_LAST:
        formats.append(_CHANNELS_LAST[value.dim()])
    return tuple(value.is_contiguous(memory_format=one) for one in formats)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
