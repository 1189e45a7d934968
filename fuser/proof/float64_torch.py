"""torch in float64: a mode under which every operator computes in double precision.

A module's float64 copy still rounds where its code says so (`x.half()`, `dtype=torch.float32`); the mode answers
every request for a narrower floating point type with float64, and widens what comes in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fuser.proof.rounding import Nudge

_LOW = {torch.float32, torch.float16, torch.bfloat16}


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators see float64 tensors and float64 as the type to compute in; so do those in a branch of `torch.cond`."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and skipping would import the whole compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it would object to the wider type
        args, kwargs = tree_map(widen, (args, kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            args, kwargs = tree_map(self._within, (args, kwargs))
        return tree_map(_widen_tensor, func(*args, **kwargs))

    def _within(self, value: Any) -> Any:
        """A function that runs under this mode, which is off while it dispatches; anything else as it is."""
        if not callable(value) or isinstance(value, torch.Tensor):
            return value

        def function(*args: Any) -> Any:
            with self:
                return value(*args)

        return function


def widen(value: Any) -> Any:
    """float64 for narrower floating point tensors and types; anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _LOW else value
    return _widen_tensor(value)


def _widen_tensor(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _LOW:
        return value.to(torch.float64)
    return value


def nudge(module: torch.nn.Module, state: dict[str, torch.Tensor], seed: int) -> None:
    """Move the floating point parameters and buffers of a float64 copy by at most one rounding.

    state: the original's, which tells the types.
    """
    moves = Nudge(seed)
    with torch.no_grad():
        for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            source = state.get(name)
            if source is not None and source.is_floating_point():
                moved = moves.constant(to_numpy(source))
                tensor.copy_(torch.from_numpy(moved).reshape(tensor.shape))


def to_numpy(tensor: torch.Tensor) -> Any:
    """A tensor as an array; bfloat16 by way of ml_dtypes."""
    import ml_dtypes

    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: Any, like: torch.Tensor | None = None) -> torch.Tensor:
    """An array as a tensor, on the device and in the memory format of `like`."""
    import numpy as np

    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(np.array(array).view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array))
    if like is None:
        return tensor
    placed = tensor.to(like.device)
    same = like.shape == placed.shape and like.dim() == 4 and not like.is_contiguous()
    return placed.to(memory_format=torch.channels_last) if same else placed
