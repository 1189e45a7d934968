"""The ONNX dialect: what each node means in the vocabulary of `fuser.ops`.

One small reader for each operator; `None` means that the node is not exactly understood, and is left alone.
Reading and writing share `OPERANDS`, so a constant is written where it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from fuser import ops
from fuser.graph import Array, Dim
from fuser.graphs.onnx.editor import ABSENT, AttributeRef, Node, Tensor
from fuser.graphs.onnx.values import numpy_dtype
from fuser.graphs.onnx.wiring import operator
from fuser.remarks import Missed

if TYPE_CHECKING:
    from fuser.graphs.onnx.graph import OnnxGraph

OPERANDS: dict[str, dict[str, int]] = {
    "Conv": {"weight": 1, "bias": 2},
    "ConvTranspose": {"weight": 1, "bias": 2},
    "Gemm": {"weight": 1, "bias": 2},
    "MatMul": {"weight": 1},
    "BatchNormalization": {"scale": 1, "bias": 2, "mean": 3, "var": 4},
    "LayerNormalization": {"bias": 2},
    "DequantizeLinear": {"scale": 1},
    "Add": {"left": 0, "right": 1},
    "Sub": {"left": 0, "right": 1},
    "Mul": {"left": 0, "right": 1},
    "Div": {"left": 0, "right": 1},
    "Sum": {"left": 0, "right": 1},
}
"""Operator -> field of its op -> position among the node's inputs."""

REDUCTIONS = tuple(f"Reduce{name}" for name in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split())

MEASURED = frozenset(
    {("Shape", 0), ("Size", 0), ("CastLike", 1), ("EyeLike", 0), ("RandomNormalLike", 0), ("RandomUniformLike", 0)}
)
"""(operator, position) of the operands of which only the shape or the type is asked."""


class Unreadable(Exception):
    """The node uses something a reader does not understand; it is left alone."""


class NodeReader:
    """A node, the graph around it, and the opset that gives its attributes their meaning."""

    def __init__(self, graph: OnnxGraph, node: Node, opset: int) -> None:
        self.graph, self.node, self.opset = graph, node, opset

    def input(self, position: int) -> Tensor | None:
        """The operand at `position`; None when it is absent, which ONNX also writes as an empty name."""
        inputs = self.node.inputs
        return None if position >= len(inputs) or inputs[position] is ABSENT else inputs[position]

    def required(self, position: int) -> Tensor:
        value = self.node.inputs[position]
        if value is ABSENT:
            raise Unreadable
        return value

    @property
    def output(self) -> Tensor:
        if not self.node.outputs or self.node.outputs[0] is ABSENT:
            raise Unreadable
        return self.node.outputs[0]

    @property
    def extra_outputs(self) -> list[Tensor]:
        return [output for output in self.node.outputs[1:] if output is not ABSENT]

    def attribute(self, name: str, default: Any = None) -> Any:
        value = self.node.attrs.get(name, default)
        if isinstance(value, AttributeRef):
            raise Unreadable
        return value

    def rank(self, value: Tensor) -> int:
        rank = self.graph.rank(value)
        if rank is None:
            raise Unreadable
        return rank

    def axis(self, axis: int, rank_of: Tensor) -> int:
        return axis if axis >= 0 else axis + self.rank(rank_of)

    def known(self, position: int) -> Any:
        """The operand as an array; the node is unreadable where it is decided at run time."""
        array = self.graph.constant(self.required(position))
        if isinstance(array, Missed):
            raise Unreadable
        return array


def _conv(n: NodeReader) -> ops.Op:
    weight, groups = n.required(1), n.attribute("group", 1)
    shape = n.graph.shape(weight)
    if shape is None:
        shape = (None,) * n.rank(weight)
    kernel, spatial = shape[2:], len(shape) - 2
    transposed = n.node.op == "ConvTranspose"
    if groups < 1 or (isinstance(shape[0], int) and shape[0] % groups):
        raise Unreadable
    strides, dilations = _per_axis(n, "strides", spatial), _per_axis(n, "dilations", spatial)
    return ops.Conv(
        n.node,
        n.output,
        n.required(0),
        weight,
        n.input(2),
        groups=groups,
        transposed=transposed,
        strides=strides,
        dilations=dilations,
        padding=None if transposed and n.attribute("output_shape") else _padding(n, kernel, strides, dilations),
    )


def _per_axis(n: NodeReader, name: str, spatial: int) -> tuple[int, ...]:
    return tuple(n.attribute(name) or [1] * spatial)


def _padding(
    n: NodeReader, kernel: Sequence[Dim], strides: Sequence[int], dilations: Sequence[int]
) -> ops.Padding | None:
    """What a window operator adds around its input; None where that depends on a size that is not known."""
    mode, spatial = n.attribute("auto_pad", "NOTSET"), len(strides)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return None if n.node.op == "ConvTranspose" else _same_padding(n, mode, kernel, strides, dilations)
    pads = list(n.attribute("pads") or []) if mode == "NOTSET" else []
    pads = pads or [0] * (2 * spatial)
    if len(pads) != 2 * spatial:
        raise Unreadable
    return tuple(zip(pads[:spatial], pads[spatial:], strict=True))


def _same_padding(
    n: NodeReader, mode: str, kernel: Sequence[Dim], strides: Sequence[int], dilations: Sequence[int]
) -> ops.Padding | None:
    """So much that there are ceil(size / stride) windows; the odd element goes after, or before."""
    sizes = (n.graph.shape(n.required(0)) or (None,) * (2 + len(strides)))[2:]
    if len(sizes) != len(strides) or any(dilation != 1 for dilation in dilations):  # where runtimes disagree
        return None
    pairs = []
    for size, width, stride in zip(sizes, kernel, strides, strict=True):
        if stride == 1:
            size = 1  # as for any other size
        if not isinstance(size, int) or not isinstance(width, int):
            return None
        total = max(0, (-(-size // stride) - 1) * stride + width - size)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if mode == "SAME_UPPER" else (more, less))
    return tuple(pairs)


def _gemm(n: NodeReader) -> ops.Op:
    return ops.Linear(
        n.node,
        n.output,
        n.required(0),
        n.required(1),
        n.input(2),
        out_axis=0 if n.attribute("transB", 0) else 1,
        in_axis=0 if n.attribute("transA", 0) else -1,
        alpha=n.attribute("alpha", 1.0),
        beta=n.attribute("beta", 1.0),
    )


def _matmul(n: NodeReader) -> ops.Op:
    weight = n.required(1)
    if n.rank(weight) != 2:
        raise Unreadable
    add = bias_add(n.graph, n.node)
    output, bias = (n.output, None) if add is None else (add.outputs[0], add.inputs[bias_position(n.graph, add)])
    return ops.Linear(n.node, output, n.required(0), weight, bias, out_axis=1, apart=add is not None)


def bias_add(graph: OnnxGraph, matmul: Node) -> Node | None:
    """The Add that gives a MatMul its bias: the only reader of its output, with a constant of rank 1 or less.

    MatMul and Add read as one `Linear`; as two ops, each would offer the other's constant again for ever.  An Add of
    zeros is none: it is left to whoever folds arithmetic.
    """
    readers = matmul.outputs[0].uses()
    if len(readers) != 1 or matmul.outputs[0].public:
        return None
    add, position = readers[0]
    if operator(add) != "Add" or len(add.inputs) != 2 or add.scope is not matmul.scope:
        return None
    bias = add.inputs[1 - position]
    rank = graph.rank(bias) if bias.known else None
    return add if rank is not None and rank <= 1 and not graph.is_zero(bias) else None


def bias_position(graph: OnnxGraph, add: Node) -> int:
    """Which input of `bias_add` is the bias."""
    return 0 if add.inputs[0].known else 1


def _elementwise(n: NodeReader) -> ops.Op:
    left, right = n.required(0), n.required(1)
    if n.node.op == "Add":
        for value in (left, right):
            producer = value.producer
            if producer is None or operator(producer) != "MatMul":
                continue
            if bias_add(n.graph, producer) is n.node:
                linear = n.graph.read(producer)
                if linear is not None:
                    return linear
    return ops.Elementwise(n.node, n.output, {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}[n.node.op], left, right)


def _batch_norm(n: NodeReader) -> ops.Op:
    training = bool(n.attribute("training_mode", 0)) if n.opset >= 14 else bool(n.extra_outputs)
    epsilon = n.node.attrs.get("epsilon", 1e-5)
    return ops.BatchNorm(
        n.node,
        n.output,
        n.required(0),
        scale=n.required(1),
        bias=n.required(2),
        mean=n.required(3),
        var=n.required(4),
        epsilon=None if isinstance(epsilon, AttributeRef) else epsilon,
        training=training,
        per_channel=bool(n.attribute("spatial", 1)),
    )


def _layer_norm(n: NodeReader) -> ops.Op:
    """Over the last axis; the outputs that follow are statistics of the input, which no scale and bias change."""
    value, axis = n.required(0), n.attribute("axis", -1)
    rank = n.graph.rank(value)
    if axis not in (-1, None if rank is None else rank - 1):
        raise Unreadable
    axis = -1 if rank is None else rank - 1
    return ops.Normalization(n.node, n.output, value, n.required(1), n.input(2), axis, keeps_scale=True)


def _dropout(n: NodeReader) -> ops.Op:
    if n.extra_outputs and any(mask.is_needed for mask in n.extra_outputs):
        raise Unreadable
    if n.opset >= 12 and n.input(2) is not None and bool(n.known(2)):
        raise Unreadable
    return ops.Identity(n.node, n.output, n.required(0))


def _identity(n: NodeReader) -> ops.Op:
    return ops.Identity(n.node, n.output, n.required(0))


def _cast(n: NodeReader) -> ops.Op:
    """A Cast to the type it has, or back to the type that a wider one was made of."""
    value, to = n.required(0), n.attribute("to")
    if n.graph.element_type(value) == to:
        return ops.Identity(n.node, n.output, value)
    inner = value.producer
    if inner is None or operator(inner) != "Cast":
        raise Unreadable
    if n.graph.element_type(inner.inputs[0]) != to or not _is_lossless(to, n.graph.element_type(value)):
        raise Unreadable
    return ops.Identity(n.node, n.output, inner.inputs[0])


def _cast_like(n: NodeReader) -> ops.Op:
    types = {n.graph.element_type(n.required(position)) for position in (0, 1)}
    if len(types) > 1 or None in types:
        raise Unreadable
    return ops.Identity(n.node, n.output, n.required(0))


def _is_lossless(narrow: int, wide: int | None) -> bool:
    """Whether every number of one type is one of the other, too."""
    if wide is None or TensorProto.BFLOAT16 in (narrow, wide):
        return narrow == TensorProto.BFLOAT16 and wide in (TensorProto.FLOAT, TensorProto.DOUBLE)
    a, b = numpy_dtype(narrow), numpy_dtype(wide)
    if a is None or b is None or (a.kind == "f") != (b.kind == "f") or not {a.kind, b.kind} <= set("fiu"):
        return False
    return bool(np.can_cast(a, b))


def _reshape(n: NodeReader) -> ops.Op:
    absolute = (n.node.op == "Reshape" and says_all(n.graph, n.node)) or target_shape(n.graph, n.output) is not None
    return ops.Reshape(n.node, n.output, n.required(0), absolute=absolute)


def says_all(graph: OnnxGraph, reshape: Node) -> bool:
    """Whether the target of a Reshape copies no size from its input, as a 0 does."""
    target = graph.constant(reshape.inputs[1])
    return not isinstance(target, Missed) and bool((target != 0).all() or reshape.attrs.get("allowzero", 0))


def target_shape(graph: OnnxGraph, value: Tensor) -> list[int] | None:
    """What a Reshape may be given to make the shape that `value` has; one size may be left to it."""
    shape = graph.shape(value)
    if shape is None or 0 in shape or sum(not isinstance(size, int) for size in shape) > 1:
        return None
    return [size if isinstance(size, int) else -1 for size in shape]


def _expand(n: NodeReader) -> ops.Op:
    """To sizes that are 1 or those it has."""
    value, target = n.required(0), n.known(1).tolist()
    shape = n.graph.shape(value)
    if shape is None or len(target) > len(shape):
        raise Unreadable
    if any(size not in (1, there) for size, there in zip(reversed(target), reversed(shape), strict=False)):
        raise Unreadable
    return ops.Identity(n.node, n.output, value)


def _tile(n: NodeReader) -> ops.Op:
    if (n.known(1) != 1).any():
        raise Unreadable
    return ops.Identity(n.node, n.output, n.required(0))


def _slice(n: NodeReader) -> ops.Op:
    """An Identity where it takes every axis from the first element to the last."""
    value = n.required(0)
    if n.opset < 10:
        starts, ends, axes, steps = n.attribute("starts"), n.attribute("ends"), n.attribute("axes"), None
    else:
        starts, ends = n.known(1).tolist(), n.known(2).tolist()
        axes, steps = (n.known(i).tolist() if n.input(i) is not None else None for i in (3, 4))
    axes = range(len(starts)) if axes is None else axes
    shape, rank = n.graph.shape(value), n.graph.rank(value)
    axes = [axis if rank is None or axis >= 0 else axis + rank for axis in axes]
    ranges = tuple(map(ops.Range, axes, starts, ends, steps or [1] * len(starts)))
    if len({*axes}) != len(starts) or len(ends) != len(starts) or len(ranges) != len(starts):
        raise Unreadable
    if all(_is_whole(one, None if shape is None else shape[one.axis]) for one in ranges):
        return ops.Identity(n.node, n.output, value)
    return ops.Slice(n.node, n.output, value, ranges)


def _is_whole(one: ops.Range, size: Dim) -> bool:
    return one.start == 0 and one.step == 1 and one.end >= (size if isinstance(size, int) else _TO_THE_END)


_TO_THE_END = 2**31 - 1
"""What exporters write for a slice without an end."""


def _of_one(n: NodeReader) -> ops.Op:
    """The mean, maximum, ... of a single operand."""
    if len(n.node.inputs) != 1:
        raise Unreadable
    return ops.Identity(n.node, n.output, n.required(0))


def _sum(n: NodeReader) -> ops.Op:
    values = [n.required(position) for position in range(len(n.node.inputs))]
    match values:
        case [value]:
            return ops.Identity(n.node, n.output, value)
        case [left, right]:
            return ops.Elementwise(n.node, n.output, "+", left, right)
    return ops.Sum(n.node, n.output, tuple(values))


def _transpose(n: NodeReader) -> ops.Op:
    permutation = n.attribute("perm") or range(n.rank(n.required(0)) - 1, -1, -1)
    value = n.required(0)
    absolute = _keeps_order(n.graph.shape(value), permutation) and target_shape(n.graph, n.output) is not None
    return ops.Transpose(n.node, n.output, value, tuple(permutation), absolute=absolute)


def _keeps_order(shape: Sequence[Dim] | None, permutation: Sequence[int]) -> bool:
    """Whether only axes of one element move."""
    wide = [axis for axis in permutation if shape is None or shape[axis] != 1]
    return shape is not None and wide == sorted(wide)


def _concat(n: NodeReader) -> ops.Op:
    inputs = tuple(n.required(position) for position in range(len(n.node.inputs)))
    return ops.Concat(n.node, n.output, inputs, n.axis(n.attribute("axis"), inputs[0]))


def _pad(n: NodeReader) -> ops.Op:
    mode = n.attribute("mode", "constant")
    return ops.Pad(n.node, n.output, n.required(0), _pads(n), _pad_value(n), mode, _lowest(n))


def _pads(n: NodeReader) -> ops.Padding | Missed:
    """An attribute before opset 11; an input since then, and of the axes that another input names since opset 18."""
    pads = n.attribute("pads") if n.opset < 11 else n.graph.constant(n.required(1))
    if isinstance(pads, Missed):
        return pads
    count = len(pads) // 2
    axes = n.graph.constant(n.required(3)) if n.opset >= 18 and n.input(3) is not None else np.arange(-count, 0)
    if isinstance(axes, Missed):
        return axes
    rank = n.graph.rank(n.required(0))
    if rank is None and (axes >= 0).any():
        return Missed("rank", f"how many axes {n.graph.describe(n.required(0))} has is not known")
    from_behind = [int(axis) if axis < 0 else int(axis) - (rank or 0) for axis in axes]
    pairs = dict(zip(from_behind, zip(map(int, pads[:count]), map(int, pads[count:]), strict=True), strict=True))
    if len(pairs) != count:  # an axis is named twice
        raise Unreadable
    padded = [axis for axis, pair in pairs.items() if pair != (0, 0)]
    return tuple(pairs.get(axis, (0, 0)) for axis in range(min(padded, default=0), 0))


def _pad_value(n: NodeReader) -> float | Missed:
    if n.opset >= 11 and n.input(2) is None:
        return 0.0
    if n.opset < 11:
        element_type = n.graph.element_type(n.required(0))
        dtype = None if element_type is None else numpy_dtype(element_type)
        return _number(np.asarray(n.attribute("value", 0.0), dtype or np.float64))
    value = n.graph.constant(n.required(2))
    return value if isinstance(value, Missed) else _number(value)


def _number(value: Array) -> float:
    """The only element."""
    if value.size != 1 or value.dtype.kind not in "fiuV":
        raise Unreadable
    return float(value.reshape(-1)[0])


def _lowest(n: NodeReader) -> float:
    """The lowest number, -inf left out, of the type that is padded."""
    given = n.input(2)
    element_type = n.graph.element_type(n.required(0) if given is None else given)
    dtype = None if element_type is None else numpy_dtype(element_type)
    if dtype is None or dtype.kind not in "fiuV":
        return -np.inf
    info: Any = np.iinfo(dtype) if dtype.kind in "iu" else ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(info.min)


def _average_pool(n: NodeReader) -> ops.Op:
    counted = bool(n.attribute("count_include_pad", 0)) and _is_padded(n)
    return ops.AveragePool(
        n.node, n.output, n.required(0), counted or bool(n.attribute("ceil_mode", 0)), _window(n), _is_hollow(n)
    )


def _max_pool(n: NodeReader) -> ops.Op:
    if n.extra_outputs:  # indices into the input, padding included
        raise Unreadable
    return ops.MaxPool(n.node, n.output, n.required(0), len(n.attribute("kernel_shape")), _window(n), _is_hollow(n))


def _is_padded(n: NodeReader) -> bool:
    return any(n.attribute("pads") or []) or n.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")


def _is_hollow(n: NodeReader) -> bool:
    """Whether elements of a window are further apart than a padded input may be long."""
    dilations = n.attribute("dilations") or []
    if max(dilations, default=1) == 1 or not _is_padded(n):
        return False
    sizes = (n.graph.shape(n.required(0)) or (None,) * (2 + len(dilations)))[2:]
    return any(d > 1 and not (isinstance(size, int) and size >= d) for size, d in zip(sizes, dilations, strict=True))


def _global_max_pool(n: NodeReader) -> ops.Op:
    return ops.MaxPool(n.node, n.output, n.required(0), n.rank(n.required(0)) - 2)


def _window(n: NodeReader) -> ops.Window | None:
    kernel = tuple(n.attribute("kernel_shape"))
    strides, dilations = (_per_axis(n, name, len(kernel)) for name in ("strides", "dilations"))
    padding = _padding(n, kernel, strides, dilations)
    if padding is None or n.attribute("ceil_mode", 0) or any(dilation != 1 for dilation in dilations):
        return None
    return ops.Window(kernel, strides, padding)


def _resize(n: NodeReader) -> ops.Op:
    """Opset 7 and 9 say Upsample; a factor for each axis, or sizes, and since opset 18 for the axes that are named."""
    if n.node.op == "Upsample":
        keeps_channels = _is_one(np.asarray(n.attribute("scales")) if n.opset < 9 else n.known(1), 1)
    elif n.attribute("coordinate_transformation_mode", "half_pixel") not in _KEEPS_EQUAL_SIZES:
        raise Unreadable
    elif n.opset < 11:
        keeps_channels = _is_one(n.known(1), 1)
    else:
        keeps_channels = _keeps_channels(n)
    if not keeps_channels or n.attribute("antialias", 0):
        raise Unreadable
    return ops.Resize(n.node, n.output, n.required(0))


_KEEPS_EQUAL_SIZES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
"""Where an axis that keeps its size keeps its elements, and no element comes from outside."""


def _keeps_channels(n: NodeReader) -> bool:
    value = n.required(0)
    axes = n.attribute("axes")
    axes = None if axes is None else [n.axis(axis, value) for axis in axes]
    if axes is not None and 1 not in axes:
        return True
    place = 1 if axes is None else axes.index(1)
    if n.input(3) is None or (n.input(2) is not None and n.graph.shape(n.required(2)) != (0,)):
        return _is_one(n.known(2), place)
    if n.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unreadable
    before, after = n.graph.shape(value), n.graph.shape(n.output)
    if before is None or len(before) < 2 or not isinstance(before[1], int):
        return False
    sizes = n.graph.constant(n.required(3))
    if isinstance(sizes, Missed):
        return after is not None and after[1] == before[1]
    return bool(sizes[place] == before[1])


def _is_one(scales: Array, place: int) -> bool:
    return place < scales.size and bool(scales[place] == 1)


def _at_least_zero(n: NodeReader) -> ops.Op:
    return ops.Bounded(n.node, n.output, 0.0)


def _clip(n: NodeReader) -> ops.Op:
    limits = [n.attribute("min"), n.attribute("max")]
    if n.opset >= 11:
        limits = [n.known(i) if n.input(i) is not None else None for i in (1, 2)]
    if limits[0] is None:
        raise Unreadable
    return ops.Bounded(n.node, n.output, min(float(limit) for limit in limits if limit is not None))


def _global_average_pool(n: NodeReader) -> ops.Op:
    return ops.AveragePool(n.node, n.output, n.required(0))


def _reduction(n: NodeReader) -> ops.Op:
    """Over the axes of an attribute, or of an input since opset 18."""
    value = n.required(0)
    axes = n.known(1).tolist() if n.input(1) is not None else n.attribute("axes")
    if not axes:
        raise Unreadable
    function = n.node.op.removeprefix("Reduce").lower()
    along = frozenset(n.axis(axis, value) for axis in axes)
    return ops.Reduction(n.node, n.output, value, function, along, bool(n.attribute("keepdims", 1)))


def _dequantize(n: NodeReader) -> ops.Op:
    scale = n.required(1)
    if (scale_rank := n.rank(scale)) > 1:  # blocked quantization
        raise Unreadable
    axis = n.axis(n.attribute("axis", 1), n.required(0)) if scale_rank else None
    shape = n.graph.shape(n.required(0))
    if axis is not None and n.graph.shape(scale) == (1,) and (shape is None or shape[axis] != 1):
        axis = None  # one for all of them, however it is written
    return ops.Dequantize(n.node, n.output, n.required(0), scale, n.input(2), axis)


READERS: dict[str, tuple[type[ops.Op], Callable[[NodeReader], ops.Op]]] = {
    "Conv": (ops.Conv, _conv),
    "ConvTranspose": (ops.Conv, _conv),
    "Gemm": (ops.Linear, _gemm),
    "MatMul": (ops.Linear, _matmul),
    "BatchNormalization": (ops.BatchNorm, _batch_norm),
    "LayerNormalization": (ops.Normalization, _layer_norm),
    "Add": (ops.Elementwise, _elementwise),
    "Sub": (ops.Elementwise, _elementwise),
    "Mul": (ops.Elementwise, _elementwise),
    "Div": (ops.Elementwise, _elementwise),
    "Identity": (ops.Identity, _identity),
    "Dropout": (ops.Identity, _dropout),
    "Cast": (ops.Identity, _cast),
    "CastLike": (ops.Identity, _cast_like),
    "Expand": (ops.Identity, _expand),
    "Tile": (ops.Identity, _tile),
    "Slice": (ops.Slice, _slice),
    "Sum": (ops.Op, _sum),
    **dict.fromkeys(("Mean", "Max", "Min"), (ops.Identity, _of_one)),
    "Reshape": (ops.Reshape, _reshape),
    "Flatten": (ops.Reshape, _reshape),
    "Squeeze": (ops.Reshape, _reshape),
    "Unsqueeze": (ops.Reshape, _reshape),
    "Transpose": (ops.Transpose, _transpose),
    "Concat": (ops.Concat, _concat),
    "Pad": (ops.Pad, _pad),
    "AveragePool": (ops.AveragePool, _average_pool),
    "GlobalAveragePool": (ops.AveragePool, _global_average_pool),
    **dict.fromkeys(REDUCTIONS, (ops.Reduction, _reduction)),
    "MaxPool": (ops.MaxPool, _max_pool),
    "GlobalMaxPool": (ops.MaxPool, _global_max_pool),
    "Resize": (ops.Resize, _resize),
    "Upsample": (ops.Resize, _resize),
    **dict.fromkeys(("Relu", "Sigmoid", "HardSigmoid", "Softmax"), (ops.Bounded, _at_least_zero)),
    "Clip": (ops.Bounded, _clip),
    "DequantizeLinear": (ops.Dequantize, _dequantize),
}
"""Operator of the default domain -> the kind of op it reads as, and its reader; `Op` where that depends on the node."""
