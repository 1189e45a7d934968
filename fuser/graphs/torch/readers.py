"""The torch dialects: what each node means in the vocabulary of `fuser.ops`.

One small reader for each operator, whether it is called as a module, a function, a method or an ATen overload.
Reading and writing share `OPERANDS` and `MODULE_OPERANDS`, so a constant is written where it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from fuser import ops
from fuser.graphs.torch.calls import REQUIRED, WITH_INDICES
from fuser.graphs.torch.purity import has_hooks
from fuser.remarks import Missed

if TYPE_CHECKING:
    from fuser.graphs.torch.graph import TorchGraph


class Unreadable(Exception):
    """The node uses something a reader does not understand; it is left alone."""


@dataclass(frozen=True, eq=False)
class ModuleTensor:
    """A value: the parameter or buffer `name` of the module at `target`."""

    target: str
    name: str

    def __str__(self) -> str:
        return f"{self.target}.{self.name}"


@dataclass(frozen=True, eq=False)
class Literal:
    """A value: a Python number among the arguments of a call, in the dtype it is computed in."""

    number: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return repr(self.number)


class Call:
    """A call_function or call_method node with its arguments by name."""

    def __init__(self, graph: TorchGraph, node: fx.Node, name: str, arguments: Mapping[str, Any]) -> None:
        self.graph, self.node, self.name, self.arguments = graph, node, name, arguments

    @property
    def writes_in_place(self) -> bool:
        return self.name.endswith("_")

    def value(self, name: str) -> fx.Node | None:
        """An operand that is a tensor or absent."""
        value = self.arguments.get(name)
        if value is not None and not isinstance(value, fx.Node):
            raise Unreadable
        return value

    def required(self, name: str) -> fx.Node:
        value = self.value(name)
        if value is None:
            raise Unreadable
        return value

    def static(self, name: str, default: Any = None) -> Any:
        """An argument that is no tensor and no symbolic size."""
        value = self.arguments.get(name, default)
        if value is REQUIRED:
            raise Unreadable
        fx.node.map_arg(value, _refuse)
        return value

    def axis(self, axis: Any, of: fx.Node) -> int:
        if not isinstance(axis, int):
            raise Unreadable
        return axis if axis >= 0 else axis + self.rank(of)

    def rank(self, value: fx.Node) -> int:
        rank = self.graph.rank(value)
        if rank is None:
            raise Unreadable
        return rank

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """An argument with an element for each spatial axis, or one for all of them."""
        value = self.static(name)
        sizes = (value,) if isinstance(value, int) else tuple(value)
        if not all(isinstance(size, int) for size in sizes):
            raise Unreadable
        return sizes * count if len(sizes) == 1 else sizes


def _refuse(node: fx.Node) -> fx.Node:
    raise Unreadable


# -- functions, methods and ATen overloads


def _conv(call: Call) -> ops.Op:
    weight = call.required("weight")
    spatial = int(call.name[-2]) if call.name.endswith("d") else call.rank(weight) - 2
    transposed = "transpose" in call.name or bool(call.static("transposed", False))
    strides, dilations = call.sizes("stride", spatial), call.sizes("dilation", spatial)
    if isinstance(call.arguments["padding"], str):
        padding = _named_padding(call.arguments["padding"], call.graph.shape(weight), dilations)
    else:
        padding = tuple((size, size) for size in call.sizes("padding", spatial))
    return ops.Conv(
        call.node,
        call.node,
        call.required("input"),
        weight,
        call.value("bias"),
        groups=call.static("groups"),
        transposed=transposed,
        strides=strides,
        dilations=dilations,
        padding=padding,
    )


def _named_padding(mode: str, weight: Any, dilations: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """The padding that torch derives from "same" and "valid"; the odd element goes after."""
    if mode == "valid":
        return ((0, 0),) * len(dilations)
    if weight is None or not all(isinstance(size, int) for size in weight[2:]):
        return None
    totals = [dilation * (size - 1) for dilation, size in zip(dilations, weight[2:], strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def _linear(call: Call) -> ops.Op:
    weight = call.required("weight")
    if call.rank(weight) != 2:
        raise Unreadable
    return ops.Linear(call.node, call.node, call.required("input"), weight, call.value("bias"))


def _addmm(call: Call) -> ops.Op:
    return ops.Linear(
        call.node,
        call.node,
        call.required("mat1"),
        call.required("mat2"),
        call.required("self"),
        out_axis=1,
        alpha=float(call.static("alpha")),
        beta=float(call.static("beta")),
    )


def _matmul(call: Call) -> ops.Op:
    data, weight = call.required("self"), call.required("mat2" if call.name == "mm" else "other")
    if call.graph.rank(weight) != 2 or (call.name == "matmul" and not call.graph.is_known(weight)):
        raise Unreadable
    found = call.graph.bias_add(call.node)
    output, bias = (call.node, None) if found is None else (found.add, found.bias)
    return ops.Linear(call.node, output, data, weight, bias, out_axis=1, apart=found is not None)


def _bmm(call: Call) -> ops.Op:
    """What decompositions make of a `linear` on data that is not contiguous: its matrix, repeated for the batch."""
    weight = call.graph.repeated_matrix(call.required("mat2"))
    if weight is None:
        raise Unreadable
    return ops.Linear(call.node, call.node, call.required("self"), weight, None, out_axis=1)


def _expand(call: Call) -> ops.Op:
    """To the size it has."""
    value = call.required("self")
    if not _keeps_size(call, value):
        raise Unreadable
    return ops.Identity(call.node, call.node, value)


def _keeps_size(call: Call, value: fx.Node) -> bool:
    """Whether the result is sure to be as large as the operand."""
    shape = call.graph.shape(value)
    return shape is not None and None not in shape and shape == call.graph.shape(call.node)


def _batch_norm(call: Call) -> ops.Op:
    mean, var = call.value("running_mean"), call.value("running_var")
    training = call.name in _ALWAYS_TRAINING or bool(call.static("training", False)) or mean is None or var is None
    several = call.name in SEVERAL_OUTPUTS
    return ops.BatchNorm(
        call.node,
        call.graph.first_output(call.node, alone=not training) if several else call.node,
        call.required("input"),
        call.value("weight"),
        call.value("bias"),
        mean,
        var,
        epsilon=float(call.static("epsilon" if "epsilon" in call.arguments else "eps")),
        training=training,
    )


def _layer_norm(call: Call) -> ops.Op:
    """Over the last axis.  An RMSNorm promotes, so its scale has to be of the type of its input."""
    value, scale, sizes = call.required("input"), call.value("weight"), call.static("normalized_shape")
    promotes = "rms" in call.name and scale is not None and call.graph.dtype(value) != call.graph.dtype(scale)
    if promotes or (not isinstance(sizes, int) and len(sizes) != 1):
        raise Unreadable
    return ops.Normalization(
        call.node, _only_output(call), value, scale, call.value("bias"), _last_axis(call.graph.rank(value))
    )


def _group_norm(call: Call) -> ops.Op:
    value = call.required("input")
    return ops.Normalization(call.node, _only_output(call), value, call.value("weight"), call.value("bias"), axis=1)


def _only_output(call: Call) -> fx.Node:
    """The normalized values; what may follow are statistics of the input, which no scale and bias change."""
    return call.graph.first_output(call.node, alone=False) if call.name in SEVERAL_OUTPUTS else call.node


def _last_axis(rank: int | None) -> int:
    return -1 if rank is None else rank - 1


def _elementwise(call: Call) -> ops.Op:
    """Type promotion is not part of the vocabulary, so every operand must be of the type of the result."""
    if call.static("alpha", 1) != 1 or call.arguments.get("rounding_mode") not in (None, REQUIRED):
        raise Unreadable
    left, right = call.arguments["self"], call.arguments["other"]
    if linear := call.graph.linear_with_bias(call.node):
        return linear
    dtype = call.graph.common_dtype(left, right)
    if dtype is None:
        raise Unreadable
    operands = [value if isinstance(value, fx.Node) else Literal(value, dtype) for value in (left, right)]
    if call.writes_in_place and not call.graph.is_private(call.required("self"), call.node):
        raise Unreadable
    if call.name == "rsub":
        operands.reverse()
    return ops.Elementwise(call.node, call.node, _FUNCTION_OF[call.name.rstrip("_")], *operands)


_FUNCTION_OF = {"add": "+", "sub": "-", "rsub": "-", "mul": "*", "div": "/"}


def _dropout(call: Call) -> ops.Op:
    if call.static("training" if "training" in call.arguments else "train"):
        raise Unreadable
    return ops.Identity(call.node, call.node, call.required("input"))


def _alias(call: Call) -> ops.Op:
    return ops.Identity(call.node, call.node, call.required("self"))


def _slice(call: Call) -> ops.Op:
    """An Identity where it leaves nothing out."""
    value, axis, step = call.required("self"), call.static("dim"), call.static("step")
    start, end = call.static("start") or 0, call.static("end")
    end = _TO_THE_END if end is None else end
    if (start, step) == (0, 1) and (end == _TO_THE_END or _keeps_size(call, value)):
        return _alias(call)
    if not all(isinstance(number, int) for number in (axis, start, end, step)):
        raise Unreadable
    return ops.Slice(call.node, call.node, value, (ops.Range(axis, start, end, step),))


_TO_THE_END = 2**63 - 1


def _copy(call: Call) -> ops.Op:
    """A copy into the same layout; whether the two may be one is asked when it is replaced."""
    value = call.required("self")
    if not call.graph.is_same_kind(call.node, value):
        raise Unreadable
    return ops.Identity(call.node, call.node, value)


def _reshape(call: Call) -> ops.Op:
    sizes = call.arguments.get("shape", call.arguments.get("size"))
    if call.arguments.get("dtype") is not None or isinstance(sizes, torch.dtype):  # view(dtype) reinterprets the bits
        raise Unreadable
    absolute = call.name in ("view", "reshape", "_unsafe_view") and isinstance(sizes, (list, tuple))
    return ops.Reshape(call.node, call.node, call.required("self"), absolute=absolute)


def _flatten(call: Call) -> ops.Op:
    value = call.required("self")
    front, back = _unflattened(call.static("start_dim"), call.static("end_dim"), call.graph.rank(value))
    return ops.Reshape(call.node, call.node, value, front, back)


def _unflattened(start: Any, end: Any, rank: int | None) -> tuple[int, int]:
    """How many axes are in front of those that are flattened, and behind them, as far as is known."""
    if start < 0:
        start = 0 if rank is None else start + rank
    if end >= 0:
        return start, 0 if rank is None else max(rank - 1 - end, 0)
    return start, -1 - end


def _index(call: Call) -> ops.Op:
    """`x[:, :, None]`: an index that only adds axes."""
    index = call.static("index")
    if not isinstance(index, tuple) or not all(
        item is None or item is Ellipsis or item == slice(None) for item in index
    ):
        raise Unreadable
    return _reshape(call)


def _permute(call: Call) -> ops.Op:
    value = call.required("self")
    axes = tuple(call.axis(axis, value) for axis in call.static("dims"))
    return ops.Transpose(call.node, call.node, value, axes)


def _transpose(call: Call) -> ops.Op:
    value = call.required("self")
    axes = list(range(call.rank(value)))
    if call.name == "transpose":
        i, j = (call.axis(call.static(name), value) for name in ("dim0", "dim1"))
        axes[i], axes[j] = axes[j], axes[i]
    else:  # t: of a matrix, or of less
        axes.reverse()
    return ops.Transpose(call.node, call.node, value, tuple(axes))


def _concat(call: Call) -> ops.Op:
    inputs = call.arguments["tensors"]
    if not isinstance(inputs, (list, tuple)) or not inputs or not all(isinstance(x, fx.Node) for x in inputs):
        raise Unreadable
    if len({call.graph.dtype(value) for value in inputs} - {None}) > 1:  # promotes
        raise Unreadable
    return ops.Concat(call.node, call.node, tuple(inputs), call.axis(call.static("dim"), inputs[0]))


def _average_pool(call: Call) -> ops.Op:
    value = call.required("self")
    spatial = int(call.name[-2])
    if call.rank(value) != spatial + 2 or call.arguments.get("divisor_override") is not None:
        raise Unreadable
    padded = any(call.sizes("padding", spatial)) and bool(call.static("count_include_pad"))
    counted = padded or bool(call.static("ceil_mode"))
    return ops.AveragePool(call.node, call.node, value, counted, _window(call, spatial))


def _max_pool(call: Call) -> ops.Op:
    if call.static("return_indices", False):
        raise Unreadable
    spatial = int(call.name.removesuffix(WITH_INDICES)[-2])
    value, window = call.required("self" if "self" in call.arguments else "input"), _window(call, spatial)
    return ops.MaxPool(call.node, _largest(call), value, spatial, window)


def _adaptive_max_pool(call: Call) -> ops.Op:
    if call.static("return_indices", False):
        raise Unreadable
    value = call.required("self" if "self" in call.arguments else "input")
    return ops.MaxPool(call.node, _largest(call), value, int(call.name.removesuffix(WITH_INDICES)[-2]))


def _largest(call: Call) -> fx.Node:
    """The elements, where nobody asks where they were."""
    return call.graph.first_output(call.node, alone=True) if call.name in SEVERAL_OUTPUTS else call.node


def _window(call: Call, spatial: int) -> ops.Window | None:
    size = call.sizes("kernel_size", spatial)
    strides = call.sizes("stride", spatial) if call.static("stride") not in (None, [], ()) else size
    dilated = "dilation" in call.arguments and any(step != 1 for step in call.sizes("dilation", spatial))
    if dilated or call.static("ceil_mode"):
        return None
    return ops.Window(size, strides, tuple((side, side) for side in call.sizes("padding", spatial)))


def _resize(call: Call) -> ops.Op:
    """Of the spatial axes, whatever the mode and the sizes are."""
    return ops.Resize(call.node, call.node, call.required("self" if "self" in call.arguments else "input"))


def _pad(call: Call) -> ops.Op:
    """(before, after) of the last axis comes first."""
    value = call.required("self" if "self" in call.arguments else "input")
    given = call.arguments["pad"]
    if not isinstance(given, (list, tuple)) or len(given) % 2:
        raise Unreadable
    number = call.static("value", None)
    return ops.Pad(
        call.node,
        call.node,
        value,
        _padding_of(given),
        0.0 if number is None else float(number),
        call.static("mode", "constant"),
        _lowest(call.graph.dtype(value)),
    )


def _padding_of(given: Sequence[Any]) -> ops.Padding | Missed:
    if not all(isinstance(side, int) for side in given):
        return Missed("not-constant", "how much it pads is computed at run time")
    pairs = list(zip(given[0::2], given[1::2], strict=True))
    while pairs and pairs[-1] == (0, 0):
        pairs.pop()
    return tuple(reversed(pairs))


def _lowest(dtype: torch.dtype | None) -> float:
    """The lowest number, -inf left out, of the type."""
    if dtype is None or dtype in (torch.bool, torch.complex64, torch.complex128):
        return float("-inf")
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return float(info.min)


def _at_least_zero(call: Call) -> ops.Op:
    return ops.Bounded(call.node, call.node, 0.0)


def _clamp(call: Call) -> ops.Op:
    names = ("min_val", "max_val") if "min_val" in call.arguments else ("min", "max")
    limits = [call.static(name, None) for name in names]
    if limits[0] is None:
        raise Unreadable
    return ops.Bounded(call.node, call.node, min(float(limit) for limit in limits if limit is not None))


def _adaptive_average_pool(call: Call) -> ops.Op:
    value = call.required("self" if "self" in call.arguments else "input")
    if call.rank(value) != int(call.name[-2]) + 2:
        raise Unreadable
    return ops.AveragePool(call.node, call.node, value)


def _reduction(call: Call) -> ops.Op:
    """Along some axes; without any it is along all of them."""
    value, axes = call.required("self"), call.static("dim")
    axes = [axes] if isinstance(axes, int) else axes
    if not axes or call.arguments.get("dtype") is not None:
        raise Unreadable
    function, along = "mean" if call.name == "mean" else "max", frozenset(call.axis(axis, value) for axis in axes)
    return ops.Reduction(call.node, _largest(call), value, function, along, bool(call.static("keepdim")))


def _dequantize(call: Call) -> ops.Op:
    axis = call.axis(call.static("axis"), call.required("input"))
    return ops.Dequantize(
        call.node, call.node, call.required("input"), call.required("scales"), call.value("zero_points"), axis
    )


Reader = Callable[[Call], ops.Op]

READERS: dict[str, tuple[type[ops.Op], Reader]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), (ops.Conv, _conv)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (ops.Conv, _conv)),
    "linear": (ops.Linear, _linear),
    "addmm": (ops.Linear, _addmm),
    "mm": (ops.Linear, _matmul),
    "matmul": (ops.Linear, _matmul),
    "bmm": (ops.Linear, _bmm),
    **dict.fromkeys(("batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), (ops.BatchNorm, _batch_norm)),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), (ops.BatchNorm, _batch_norm)),
    "_native_batch_norm_legit_no_training": (ops.BatchNorm, _batch_norm),
    "_native_batch_norm_legit_functional": (ops.BatchNorm, _batch_norm),
    "_batch_norm_no_update": (ops.BatchNorm, _batch_norm),
    "_batch_norm_with_update": (ops.BatchNorm, _batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm"), (ops.Normalization, _layer_norm)),
    **dict.fromkeys(("group_norm", "native_group_norm"), (ops.Normalization, _group_norm)),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), (ops.Elementwise, _elementwise)),
    **dict.fromkeys(("add_", "sub_", "mul_", "div_"), (ops.Elementwise, _elementwise)),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), (ops.Identity, _dropout)),
    "alias": (ops.Identity, _alias),
    "slice": (ops.Slice, _slice),
    "expand": (ops.Identity, _expand),
    **dict.fromkeys(("clone", "contiguous", "to", "_to_copy"), (ops.Identity, _copy)),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unflatten"), (ops.Reshape, _reshape)),
    "flatten": (ops.Reshape, _flatten),
    **dict.fromkeys(("squeeze", "unsqueeze", "view_as", "reshape_as"), (ops.Reshape, _reshape)),
    "getitem": (ops.Reshape, _index),
    "permute": (ops.Transpose, _permute),
    "transpose": (ops.Transpose, _transpose),
    "t": (ops.Transpose, _transpose),
    "cat": (ops.Concat, _concat),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), (ops.AveragePool, _average_pool)),
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        (ops.AveragePool, _adaptive_average_pool),
    ),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), (ops.AveragePool, _adaptive_average_pool)),
    **dict.fromkeys(("mean", "amax", f"max{WITH_INDICES}"), (ops.Reduction, _reduction)),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), (ops.MaxPool, _max_pool)),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), (ops.MaxPool, _max_pool)),
    **dict.fromkeys(
        (f"adaptive_max_pool{axes}d{end}" for axes in (1, 2, 3) for end in ("", WITH_INDICES)),
        (ops.MaxPool, _adaptive_max_pool),
    ),
    **dict.fromkeys(("interpolate", "upsample_linear1d", "upsample_trilinear3d"), (ops.Resize, _resize)),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d"), (ops.Resize, _resize)),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"), (ops.Resize, _resize)),
    **dict.fromkeys(
        ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"), (ops.Resize, _resize)
    ),
    **dict.fromkeys(("pad", "constant_pad_nd"), (ops.Pad, _pad)),
    **dict.fromkeys(("relu", "relu_", "relu6", "relu6_", "sigmoid", "softmax"), (ops.Bounded, _at_least_zero)),
    **dict.fromkeys(("hardtanh", "hardtanh_", "clamp", "clamp_"), (ops.Bounded, _clamp)),
    "dequantize_per_channel": (ops.Dequantize, _dequantize),
}
"""ATen operator -> the kind of op it reads as, and its reader."""

SEVERAL_OUTPUTS = frozenset(
    name
    for name, (kind, _) in READERS.items()
    if (kind is ops.BatchNorm and name != "batch_norm") or name.endswith(WITH_INDICES) or name.startswith("native_")
)
"""Operators that return a tuple; the vocabulary's output is its first element."""

_ALWAYS_TRAINING = frozenset({"_batch_norm_with_update"})

_STATISTICS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_AFFINE = {"scale": "weight", "bias": "bias"}
_BINARY = {"left": "self", "right": "other"}
OPERANDS: dict[str, dict[str, str]] = {
    **{name: _STATISTICS for name, (kind, _) in READERS.items() if kind is ops.BatchNorm},
    **{name: _AFFINE for name, (kind, _) in READERS.items() if kind is ops.Normalization},
    **{name: _BINARY for name, (kind, _) in READERS.items() if kind is ops.Elementwise},
    **{name: {"weight": "weight", "bias": "bias"} for name, (kind, _) in READERS.items() if kind is ops.Conv},
    "linear": {"weight": "weight", "bias": "bias"},
    "addmm": {"weight": "mat2", "bias": "self"},
    "mm": {"weight": "mat2"},
    "matmul": {"weight": "other"},
    "rsub": {"left": "other", "right": "self"},
    "dequantize_per_channel": {"scale": "scales"},
}
"""ATen operator -> field of its op -> name of the argument."""


# -- modules


class ModuleCall(NamedTuple):
    """A call_module node and the module it calls, of a class that is exactly known."""

    graph: TorchGraph
    node: fx.Node
    module: Any

    @property
    def input(self) -> fx.Node:
        given = [*self.node.args, *self.node.kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], fx.Node):
            raise Unreadable
        return given[0]

    def tensor(self, name: str) -> ModuleTensor | None:
        if getattr(self.module, name, None) is None:
            return None
        return self.graph.module_tensor(str(self.node.target), name)

    def required(self, name: str) -> ModuleTensor:
        tensor = self.tensor(name)
        if tensor is None:
            raise Unreadable
        return tensor

    @property
    def hooked(self) -> bool:
        return has_hooks(self.module) or module_class(self.module) is not type(self.module)

    def rank(self) -> int:
        rank = self.graph.rank(self.input)
        if rank is None:
            raise Unreadable
        return rank


def _conv_module(call: ModuleCall) -> ops.Op:
    module = call.module
    return ops.Conv(
        call.node,
        call.node,
        call.input,
        call.required("weight"),
        call.tensor("bias"),
        groups=module.groups,
        transposed=module.transposed,
        strides=tuple(module.stride),
        dilations=tuple(module.dilation),
        padding=_module_padding(module),
        pads_zeros=module.padding_mode == "zeros",
        hooked=call.hooked,
    )


def _module_padding(module: Any) -> tuple[tuple[int, int], ...] | None:
    if module.padding_mode != "zeros":
        return None
    if isinstance(module.padding, str):
        return _named_padding(module.padding, (0, 0, *module.kernel_size), module.dilation)
    return tuple((size, size) for size in module.padding)


def _linear_module(call: ModuleCall) -> ops.Op:
    return ops.Linear(
        call.node, call.node, call.input, call.required("weight"), call.tensor("bias"), hooked=call.hooked
    )


def _batch_norm_module(call: ModuleCall) -> ops.Op:
    module = call.module
    mean, var = call.tensor("running_mean"), call.tensor("running_var")
    return ops.BatchNorm(
        call.node,
        call.node,
        call.input,
        call.tensor("weight"),
        call.tensor("bias"),
        mean,
        var,
        epsilon=module.eps,
        training=module.training or mean is None or var is None,
        hooked=call.hooked,
    )


def _layer_norm_module(call: ModuleCall) -> ops.Op:
    """Over the last axis.  An RMSNorm promotes, so its scale has to be of the type of its input."""
    module, scale = call.module, call.tensor("weight")
    promoting = isinstance(module, nn.RMSNorm) and scale is not None
    if (promoting and call.graph.dtype(call.input) != module.weight.dtype) or len(module.normalized_shape) != 1:
        raise Unreadable
    axis = _last_axis(call.graph.rank(call.input))
    return ops.Normalization(call.node, call.node, call.input, scale, call.tensor("bias"), axis, hooked=call.hooked)


def _group_norm_module(call: ModuleCall) -> ops.Op:
    return ops.Normalization(
        call.node, call.node, call.input, call.tensor("weight"), call.tensor("bias"), axis=1, hooked=call.hooked
    )


def _identity_module(call: ModuleCall) -> ops.Op:
    return ops.Identity(call.node, call.node, call.input, hooked=call.hooked)


def _dropout_module(call: ModuleCall) -> ops.Op:
    if call.module.training:
        raise Unreadable
    return _identity_module(call)


def _reshape_module(call: ModuleCall) -> ops.Op:
    return ops.Reshape(call.node, call.node, call.input, hooked=call.hooked)


def _flatten_module(call: ModuleCall) -> ops.Op:
    front, back = _unflattened(call.module.start_dim, call.module.end_dim, call.graph.rank(call.input))
    return ops.Reshape(call.node, call.node, call.input, front, back, hooked=call.hooked)


def _average_pool_module(call: ModuleCall) -> ops.Op:
    module, spatial = call.module, POOLS[type(call.module)]
    if getattr(module, "divisor_override", None) is not None or call.rank() != spatial + 2:
        raise Unreadable
    counted = (any(_tuple(module.padding, spatial)) and module.count_include_pad) or module.ceil_mode
    return ops.AveragePool(
        call.node, call.node, call.input, counted, _module_window(module, spatial), hooked=call.hooked
    )


def _max_pool_module(call: ModuleCall) -> ops.Op:
    module = call.module
    if module.return_indices:
        raise Unreadable
    spatial, adapts = MAX_POOLS[type(module)], not hasattr(module, "kernel_size")
    window = None if adapts else _module_window(module, spatial)
    return ops.MaxPool(call.node, call.node, call.input, spatial, window, hooked=call.hooked)


def _module_window(module: Any, spatial: int) -> ops.Window | None:
    if module.ceil_mode or any(step != 1 for step in _tuple(getattr(module, "dilation", 1), spatial)):
        return None
    size, strides, padding = (_tuple(value, spatial) for value in (module.kernel_size, module.stride, module.padding))
    return ops.Window(size, strides, tuple((side, side) for side in padding))


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _pad_module(call: ModuleCall) -> ops.Op:
    module = call.module
    return ops.Pad(
        call.node,
        call.node,
        call.input,
        _padding_of(module.padding),
        float(getattr(module, "value", 0.0)),
        PADS[type(module)],
        _lowest(call.graph.dtype(call.input)),
        hooked=call.hooked,
    )


def _resize_module(call: ModuleCall) -> ops.Op:
    return ops.Resize(call.node, call.node, call.input, hooked=call.hooked)


def _at_least_zero_module(call: ModuleCall) -> ops.Op:
    return ops.Bounded(call.node, call.node, 0.0, hooked=call.hooked)


def _adaptive_average_pool_module(call: ModuleCall) -> ops.Op:
    if call.rank() != POOLS[type(call.module)] + 2:
        raise Unreadable
    return ops.AveragePool(call.node, call.node, call.input, hooked=call.hooked)


POOLS: dict[type[nn.Module], int] = {
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
}
"""Average pooling module -> number of spatial axes."""

MAX_POOLS: dict[type[nn.Module], int] = {
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
}
"""Max pooling module -> number of spatial axes."""

PADS: dict[type[nn.Module], str] = {
    getattr(nn, f"{kind}Pad{axes}d"): mode
    for kind, mode in (
        ("Zero", "constant"),
        ("Constant", "constant"),
        ("Reflection", "reflect"),
        ("Replication", "replicate"),
        ("Circular", "circular"),
    )
    for axes in (1, 2, 3)
}
"""Padding module -> what `torch.nn.functional.pad` calls its mode."""

CONVS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
"""Convolution module -> number of spatial axes."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

ModuleReader = Callable[[ModuleCall], ops.Op]

MODULE_READERS: dict[type[nn.Module], tuple[type[ops.Op], ModuleReader]] = {
    **dict.fromkeys(CONVS, (ops.Conv, _conv_module)),
    nn.Linear: (ops.Linear, _linear_module),
    **dict.fromkeys(NORMS, (ops.BatchNorm, _batch_norm_module)),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), (ops.Normalization, _layer_norm_module)),
    nn.GroupNorm: (ops.Normalization, _group_norm_module),
    nn.Identity: (ops.Identity, _identity_module),
    **dict.fromkeys(DROPOUTS, (ops.Identity, _dropout_module)),
    nn.Flatten: (ops.Reshape, _flatten_module),
    nn.Unflatten: (ops.Reshape, _reshape_module),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), (ops.AveragePool, _average_pool_module)),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        (ops.AveragePool, _adaptive_average_pool_module),
    ),
    **dict.fromkeys(MAX_POOLS, (ops.MaxPool, _max_pool_module)),
    **dict.fromkeys(PADS, (ops.Pad, _pad_module)),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), (ops.Resize, _resize_module)),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Sigmoid), (ops.Bounded, _at_least_zero_module)),
}
"""Module class, taken exactly (a subclass may do anything), -> the kind of op it reads as, and its reader."""


def module_class(module: nn.Module) -> type[nn.Module]:
    """The class that says what the module computes; a parametrized module has one made for it alone.

    A BatchNorm whose class is the user's counts as torch's, so that something is said of it; it is `hooked`.
    """
    if nn.utils.parametrize.is_parametrized(module):
        return nn.utils.parametrize.type_before_parametrizations(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return next((base for base in type(module).__mro__ if base in NORMS), type(module))
    return type(module)


MODULE_OPERANDS: dict[type[ops.Op], dict[str, str]] = {
    ops.Conv: {"weight": "weight", "bias": "bias"},
    ops.Linear: {"weight": "weight", "bias": "bias"},
    ops.BatchNorm: _STATISTICS,
    ops.Normalization: _AFFINE,
}
"""Kind of op -> field -> attribute of the module."""
