"""Operators for the float64 evaluation of ONNX models, in numpy.

They stand in for those of `onnx.reference` that are wrong (BatchNormalization before opset 14), that round to a
type on purpose (Cast), or that are slow on models of real size (convolution, pooling).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from fuser.proof.rounding import is_float

Array = np.ndarray[Any, Any]

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_GATHERED = 1 << 22
"""Bytes of windows that a convolution gathers at a time before it multiplies: few enough for a cache."""
ROUNDING_CASTS = _FLOATS - {onnx.TensorProto.DOUBLE}
"""Types to which a Cast would round, and does not in float64."""
_EVERY = (slice(None), slice(None))


class Operator(OpRun):
    """An operator of ours, called as it is: the reference evaluator checks its own at every call."""

    def run(self, *args: Any, linked_attributes: Any = None, **options: Any) -> Any:
        """The results for these operands, as a tuple."""
        if self.has_linked_attribute:
            return super().run(*args, linked_attributes=linked_attributes, **options)  # type: ignore[no-untyped-call]
        return self._run(*args, **self._attributes)  # type: ignore[no-untyped-call]

    @cached_property
    def _attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.attributes_names_}


class Cast(Operator):
    """To a floating point type: float64 stays; to anything else: as the operator says."""

    def _run(self, x: Array, to: int, **attributes: Any) -> tuple[Array]:
        if to in _FLOATS:
            return (_to_float64(x),)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(to)
        if to == onnx.TensorProto.STRING:
            return (x.astype(np.str_).astype(object),)
        if is_float(np.dtype(dtype)) and attributes.get("saturate", 1):
            return (onnx.numpy_helper.saturate_cast(x, dtype),)
        with np.errstate(invalid="ignore"):  # NaN to an integer: any value will do
            return (x.astype(dtype),)


class CastLike(Operator):
    """Cast to the type of another value; every float counts as float64."""

    def _run(self, x: Array, like: Array, **_: Any) -> tuple[Array]:
        if is_float(like.dtype):
            return (_to_float64(x),)
        return (x.astype(like.dtype),)


class BatchNormalization(Operator):
    """Every opset: before 14 further outputs mean training, in opset 7 `spatial=0` means one statistic per element."""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, *, epsilon: float = 1e-5, **attributes: Any
    ) -> tuple[Array, ...]:
        opset = self.run_params["opsets"].get("", 1)
        named = [name for name in self.onnx_node.output[1:] if name]
        training = bool(attributes.get("training_mode", 0)) if opset >= 14 else bool(named)
        running: tuple[Array, ...] = ()
        if training:
            axes = tuple(axis for axis in range(x.ndim) if axis != 1)
            momentum = float(attributes.get("momentum", 0.9))
            batch_mean, batch_var = x.mean(axes), x.var(axes)
            running = (
                mean * momentum + batch_mean * (1 - momentum),
                var * momentum + batch_var * (1 - momentum),
            )
            mean, var = batch_mean, batch_var
        factor = scale / np.sqrt(var + np.float64(epsilon))
        y = x - _per_channel(mean, x)
        y *= _per_channel(factor, x)
        y += _per_channel(bias, x)
        return (y, *running)


class Conv(Operator):
    """y = x * w + b, as one matrix product for each position of the kernel."""

    def _run(self, x: Array, w: Array, b: Array | None = None, *, group: int = 1, **attributes: Any) -> tuple[Array]:
        window = _Window(x.shape[2:], w.shape[2:], attributes)
        groups = group or 1
        y = _convolve(window.pad(x), w, window, groups)
        if b is not None:
            y += _per_channel(b, y)
        return (y,)


class ConvTranspose(Operator):
    """The transpose of a convolution: every input element spreads its kernel over the output."""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        *,
        group: int = 1,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        **attributes: Any,
    ) -> tuple[Array]:
        rank = x.ndim - 2
        strides = list(attributes.get("strides") or [1] * rank)
        dilations = list(attributes.get("dilations") or [1] * rank)
        extra = list(output_padding or [0] * rank)
        full = [
            (n - 1) * s + (k - 1) * d + 1 + e
            for n, s, k, d, e in zip(x.shape[2:], strides, w.shape[2:], dilations, extra, strict=True)
        ]
        heads, sizes = _crop(x.shape[2:], full, strides, output_shape, attributes)
        groups, per_group = group or 1, w.shape[1]
        y = np.zeros(
            (x.shape[0], groups * per_group, *(max(f, h + n) for f, h, n in zip(full, heads, sizes, strict=True)))
        )
        split = x.reshape(x.shape[0], groups, -1, math.prod(x.shape[2:]))
        taps = w.reshape(groups, -1, per_group, *w.shape[2:])
        for offset in itertools.product(*(range(k) for k in w.shape[2:])):
            tap = np.ascontiguousarray(taps[(slice(None),) * 3 + offset].swapaxes(1, 2))
            spread = np.matmul(tap, split)
            place = tuple(
                slice(o * d, o * d + (n - 1) * s + 1, s)
                for o, d, n, s in zip(offset, dilations, x.shape[2:], strides, strict=True)
            )
            y[_EVERY + place] += spread.reshape(*y.shape[:2], *x.shape[2:])
        crop = tuple(slice(h, h + n) for h, n in zip(heads, sizes, strict=True))
        y = y[_EVERY + crop]
        return (y if b is None else y + _per_channel(b, y),)


class MaxPool(Operator):
    """The largest element of each window, and its index in the input where that is asked for."""

    def _run(self, x: Array, *, storage_order: int = 0, **attributes: Any) -> tuple[Array, ...]:
        window = _Window(x.shape[2:], attributes["kernel_shape"], attributes)
        lowest = -np.inf if x.dtype == np.float64 else np.iinfo(x.dtype).min
        padded = window.pad(x, lowest)
        if len(self.onnx_node.output) < 2 or not self.onnx_node.output[1]:
            return (np.maximum.reduce(list(window.views(padded))),)
        views = np.stack(list(window.views(padded)))
        order = "F" if storage_order else "C"
        plane = np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:], order=order)  # type: ignore[call-overload]
        planes = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * (x.ndim - 2)) * plane.size
        places = np.stack(list(window.views(window.pad(planes + plane, -1))))
        best = views.argmax(0)[None]
        return np.take_along_axis(views, best, 0)[0], np.take_along_axis(places, best, 0)[0]


class AveragePool(Operator):
    """The mean of each window, over the elements that `count_include_pad` counts."""

    def _run(self, x: Array, *, count_include_pad: int = 0, **attributes: Any) -> tuple[Array]:
        window = _Window(x.shape[2:], attributes["kernel_shape"], attributes)
        total = _sum(window.views(window.pad(x)))
        # Elements beyond the declared padding, which ceil_mode may reach, never count.
        counted = np.ones((1, 1, *x.shape[2:]))
        if count_include_pad:
            declared = [(0, 0), (0, 0), *zip(window.heads, window.tails, strict=True)]
            counted = np.pad(counted, declared, constant_values=1.0)
            number = _sum(window.views(_extend(counted, window.padded)))
        else:
            number = _sum(window.views(window.pad(counted)))
        return (total / number,)


class DequantizeLinear(Operator):
    """y = (x - zero_point) * scale, per tensor, per axis or per block."""

    def _run(
        self,
        x: Array,
        scale: Array,
        zero_point: Array | None = None,
        *,
        axis: int = 1,
        block_size: int = 0,
        **_: Any,
    ) -> tuple[Array]:
        offset = 0.0 if zero_point is None else _along(zero_point.astype(np.float64), x, axis, block_size)
        return ((x.astype(np.float64) - offset) * _along(scale, x, axis, block_size),)


class OneHot(Operator):
    """One at each index, zero elsewhere; `depth` may be a scalar or have one element."""

    def _run(self, indices: Array, depth: Array, values: Array, *, axis: int = -1) -> tuple[Array]:
        number = int(np.asarray(depth).reshape(-1)[0])
        places = np.expand_dims(np.where(indices < 0, indices + number, indices), axis)
        shape = [1] * places.ndim
        shape[axis] = number
        return (np.where(places == np.arange(number).reshape(shape), values[1], values[0]),)


class Relu(Operator):
    """y = max(x, 0); NaN stays."""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.maximum(x, 0),)


OPS: list[type[OpRun]] = [
    AveragePool,
    BatchNormalization,
    Cast,
    CastLike,
    Conv,
    ConvTranspose,
    DequantizeLinear,
    MaxPool,
    OneHot,
    Relu,
]
"""For the float64 evaluation."""


def _stored(kind: type[OpRun]) -> type[OpRun]:
    """The operator with results in the type of its first operand."""

    def _run(self: Any, x: Array, *operands: Any, **attributes: Any) -> tuple[Array, ...]:
        return tuple(y.astype(x.dtype) for y in kind._run(self, x, *operands, **attributes))  # type: ignore[no-untyped-call]

    return type(kind.__name__, (kind,), {"_run": _run})


STORED_OPS = [_stored(kind) for kind in (AveragePool, BatchNormalization, Conv, ConvTranspose, Relu)]
"""For the evaluation in the types that are stored."""


class _Window:
    """Where a kernel is laid on its input: pads, strides, dilations and the output's size, by the ONNX rules."""

    def __init__(self, size: Sequence[int], kernel: Sequence[int], attributes: dict[str, Any]) -> None:
        rank = len(size)
        self.size, self.kernel = list(size), list(kernel)
        self.strides = list(attributes.get("strides") or [1] * rank)
        self.dilations = list(attributes.get("dilations") or [1] * rank)
        self.reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        auto = attributes.get("auto_pad") or "NOTSET"
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            self.output = [-(-n // s) for n, s in zip(size, self.strides, strict=True)]
            needed = [
                max((o - 1) * s + r - n, 0)
                for o, s, r, n in zip(self.output, self.strides, self.reach, size, strict=True)
            ]
            small, large = [n // 2 for n in needed], [n - n // 2 for n in needed]
            self.heads, self.tails = (small, large) if auto == "SAME_UPPER" else (large, small)
        else:
            pads = list(attributes.get("pads") or [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
            self.heads, self.tails = pads[:rank], pads[rank:]
            ceil = bool(attributes.get("ceil_mode", 0))
            self.output = [self._steps(axis, ceil) for axis in range(rank)]
        self.padded = [
            max(h + n + t, (o - 1) * s + r)
            for h, n, t, o, s, r in zip(
                self.heads, self.size, self.tails, self.output, self.strides, self.reach, strict=True
            )
        ]

    def _steps(self, axis: int, ceil: bool) -> int:
        room: int = self.size[axis] + self.heads[axis] + self.tails[axis] - self.reach[axis]
        stride: int = self.strides[axis]
        steps = (-(-room // stride) if ceil else room // stride) + 1
        # A window that would begin in the padding at the end is left out.
        if ceil and (steps - 1) * stride >= self.size[axis] + self.heads[axis]:
            steps -= 1
        return steps

    def pad(self, x: Array, value: float = 0.0) -> Array:
        """`x` with its padding, as far as the last window reaches; negative pads crop."""
        inner = tuple(
            slice(max(-h, 0), n - max(-t, 0)) for h, t, n in zip(self.heads, self.tails, self.size, strict=True)
        )
        x = x[_EVERY + inner]
        widths = [
            (max(h, 0), max(p - n - max(h, 0), 0)) for h, p, n in zip(self.heads, self.padded, x.shape[2:], strict=True)
        ]
        if not any(any(pair) for pair in widths):
            return x
        return np.pad(x, [(0, 0), (0, 0), *widths], constant_values=value)

    def views(self, padded: Array) -> Iterator[Array]:
        """For each position of the kernel, what it sees under every step of the window: [N, C, *output]."""
        for offset in itertools.product(*(range(k) for k in self.kernel)):
            place = tuple(
                slice(o * d, o * d + (n - 1) * s + 1, s)
                for o, d, n, s in zip(offset, self.dilations, self.output, self.strides, strict=True)
            )
            yield padded[_EVERY + place]


def _convolve(x: Array, w: Array, window: _Window, groups: int) -> Array:
    """The convolution of an input that is padded already: matrix products over rows of windows."""
    batch, outputs, inner = x.shape[0], w.shape[0] // groups, w.shape[1]
    views = [view.reshape(batch, groups, inner, *window.output) for view in window.views(x)]
    taps = w.reshape(groups, outputs, inner, len(views))
    if inner == 1:  # depthwise: a matrix product of so little is slower than its parts
        factors = np.moveaxis(taps, -1, 0).reshape(-1, groups, outputs, *[1] * len(window.output))
        y = factors[0] * views[0]
        for factor, view in zip(factors[1:], views[1:], strict=True):
            y += factor * view
        return np.asarray(y.reshape(batch, groups * outputs, *window.output))
    matrix = taps.reshape(groups, outputs, inner * len(views))
    length, rest = window.output[0], math.prod(window.output[1:])
    row = 8 * batch * groups * inner * len(views) * rest
    step = length if len(views) == 1 else min(length, max(1, _GATHERED // max(row, 1)))
    y = np.empty((batch, groups, outputs, length, rest))
    for start in range(0, length, max(step, 1)):
        rows = slice(start, start + step)
        columns = np.stack([view[:, :, :, rows] for view in views], axis=3) if len(views) > 1 else views[0]
        product = np.matmul(matrix, columns.reshape(batch, groups, inner * len(views), -1))
        y[:, :, :, rows] = product.reshape(batch, groups, outputs, -1, rest)
    return y.reshape(batch, groups * outputs, *window.output)


def _crop(
    size: Sequence[int],
    full: Sequence[int],
    strides: Sequence[int],
    output_shape: Sequence[int] | None,
    attributes: dict[str, Any],
) -> tuple[list[int], list[int]]:
    """Where the output of a transposed convolution begins in the full one, and its size."""
    rank = len(size)
    auto = attributes.get("auto_pad") or "NOTSET"
    if output_shape or auto in ("SAME_UPPER", "SAME_LOWER"):
        sizes = list(output_shape)[-rank:] if output_shape else [n * s for n, s in zip(size, strides, strict=True)]
        total = [f - n for f, n in zip(full, sizes, strict=True)]
        # The odd one of the crop goes to the end for SAME_UPPER, else to the start.
        heads = [max(t, 0) // 2 if auto == "SAME_UPPER" else max(t, 0) - max(t, 0) // 2 for t in total]
        return heads, sizes
    pads = list(attributes.get("pads") or [0] * 2 * rank)
    return pads[:rank], [f - h - t for f, h, t in zip(full, pads[:rank], pads[rank:], strict=True)]


def _per_channel(parameter: Array, x: Array) -> Array:
    """`parameter` so that it broadcasts over axis 1; one with a value per element keeps its own axes."""
    if parameter.ndim > 1:
        return parameter[None]
    if parameter.size != x.shape[1]:  # numpy would repeat one channel, which no runtime does
        raise ValueError(f"{parameter.size} values for {x.shape[1]} channels")
    return parameter.reshape(1, -1, *[1] * (x.ndim - 2))


def _along(parameter: Array, x: Array, axis: int, block_size: int) -> Array:
    """A quantization parameter so that it broadcasts over `x`."""
    if parameter.size == 1:
        return parameter.reshape(())
    if block_size:
        repeated = np.repeat(parameter, block_size, axis)
        return repeated[tuple(slice(0, n) for n in x.shape)]
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def _sum(arrays: Iterator[Array]) -> Array:
    total: Array = next(arrays).copy()
    for array in arrays:
        total += array
    return total


def _extend(x: Array, sizes: Sequence[int]) -> Array:
    return np.pad(x, [(0, 0), (0, 0), *((0, n - have) for n, have in zip(sizes, x.shape[2:], strict=True))])


def _to_float64(x: Array) -> Array:
    wide: Array = np.asarray(x.astype(np.str_) if x.dtype.kind in "OSU" else x, np.float64)
    return wide
