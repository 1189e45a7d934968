"""Tensors and arrays: the same numbers, without a copy where it can be avoided."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from fuser.graph import Array

_BEYOND_NUMPY: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e4m3fnuz: (torch.uint8, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    torch.float8_e5m2fnuz: (torch.uint8, ml_dtypes.float8_e5m2fnuz),
}
"""Types numpy has no name for: the integer type of that width, and the numpy extension type."""
_FROM_EXTENSION = {np.dtype(extension): (carrier, dtype) for dtype, (carrier, extension) in _BEYOND_NUMPY.items()}

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the numbers can be looked at: fake, meta, sparse, quantized and most subclassed tensors hide theirs."""
    return (
        (type(tensor) in _PLAIN or _is_parameter_by_another_name(type(tensor)))
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
    )


def _is_parameter_by_another_name(kind: type[torch.Tensor]) -> bool:
    """Whether torch treats a subclass as it does a parameter, whatever attributes it adds."""
    parameter: Any = torch.nn.Parameter
    hooks = ("__torch_function__", "__torch_dispatch__")
    return issubclass(kind, parameter) and all(getattr(kind, name) is getattr(parameter, name) for name in hooks)


def to_array(tensor: torch.Tensor) -> Array:
    """A read-only array over the tensor's own memory; a copy only where that is not in main memory."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    carrier, extension = _BEYOND_NUMPY.get(tensor.dtype, (tensor.dtype, None))
    array: Array = tensor.view(carrier).numpy()
    if extension is not None:
        array = array.view(extension)
    array.flags.writeable = False
    return array


def to_tensor(array: Array, like: torch.Tensor) -> torch.Tensor:
    """A new tensor with the numbers and the dtype of `array`, on the device and in the memory format of `like`."""
    owned = np.array(array, order="C", copy=True)
    if owned.dtype in _FROM_EXTENSION:
        carrier, dtype = _FROM_EXTENSION[owned.dtype]
        tensor = torch.from_numpy(owned.view(torch.empty(0, dtype=carrier).numpy().dtype)).view(dtype)
    else:
        tensor = torch.from_numpy(owned)
    if like.is_contiguous():
        return tensor.to(like.device)
    if tensor.shape != like.shape:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        kept = formats.get(like.dim(), torch.contiguous_format)
        is_kept = tensor.dim() == like.dim() and like.is_contiguous(memory_format=kept)
        return tensor.to(like.device, memory_format=kept if is_kept else torch.contiguous_format)
    laid_out = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False)  # channels_last, a transposed weight
    return laid_out.copy_(tensor)


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor object over the same memory, so that `.to()` and `requires_grad_()` stay with their owner.

    Subclasses carry a state of their own and are returned as they are.
    """
    if type(tensor) not in _PLAIN:
        return tensor
    twin = tensor.detach()
    if isinstance(tensor, torch.nn.Parameter):
        twin = torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad and tensor.is_leaf:
        twin.requires_grad_()
    twin.__dict__.update(tensor.__dict__)
    return twin
