"""How a node calls its operator: one set of names for every way to write a call.

`torch.conv2d(x, w, bias=b)`, `aten.conv2d.default(x, w, b)` and `x.add(y)` bind to the same dictionaries, with
the names of the ATen schema and its defaults filled in.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import OpOverload

aten = torch.ops.aten

REQUIRED: Any = inspect.Parameter.empty


class Parameter(NamedTuple):
    """One parameter of an operator."""

    name: str
    default: Any
    keyword_only: bool


class Signature(NamedTuple):
    """An operator: the name under which `readers` knows it, and its parameters."""

    name: str
    parameters: tuple[Parameter, ...]


_FUNCTIONS: dict[Any, OpOverload] = {
    F.conv1d: aten.conv1d.default,
    F.conv2d: aten.conv2d.default,
    F.conv3d: aten.conv3d.default,
    F.conv_transpose1d: aten.conv_transpose1d.default,
    F.conv_transpose2d: aten.conv_transpose2d.input,
    F.conv_transpose3d: aten.conv_transpose3d.input,
    F.linear: aten.linear.default,
    torch.addmm: aten.addmm.default,
    torch.mm: aten.mm.default,
    torch.matmul: aten.matmul.default,
    operator.matmul: aten.matmul.default,
    torch.batch_norm: aten.batch_norm.default,
    torch.layer_norm: aten.layer_norm.default,
    torch.rms_norm: aten.rms_norm.default,
    torch.group_norm: aten.group_norm.default,
    torch.add: aten.add.Tensor,
    operator.add: aten.add.Tensor,
    operator.iadd: aten.add_.Tensor,
    torch.sub: aten.sub.Tensor,
    torch.subtract: aten.sub.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.isub: aten.sub_.Tensor,
    torch.mul: aten.mul.Tensor,
    torch.multiply: aten.mul.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.imul: aten.mul_.Tensor,
    torch.div: aten.div.Tensor_mode,
    torch.divide: aten.div.Tensor_mode,
    torch.true_divide: aten.div.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.itruediv: aten.div_.Tensor,
    torch.rsub: aten.rsub.Tensor,
    torch.clone: aten.clone.default,
    torch.dropout: aten.dropout.default,
    torch.flatten: aten.flatten.using_ints,
    torch.reshape: aten.reshape.default,
    torch.squeeze: aten.squeeze.dim,
    torch.unsqueeze: aten.unsqueeze.default,
    torch.unflatten: aten.unflatten.int,
    torch.permute: aten.permute.default,
    torch.transpose: aten.transpose.int,
    torch.t: aten.t.default,
    torch.cat: aten.cat.default,
    torch.concat: aten.cat.default,
    torch.concatenate: aten.cat.default,
    torch.mean: aten.mean.dim,
    torch.amax: aten.amax.default,
    torch.max: aten.max.dim,
    torch.adaptive_max_pool1d: aten.adaptive_max_pool1d.default,
    F.avg_pool1d: aten.avg_pool1d.default,
    F.avg_pool2d: aten.avg_pool2d.default,
    F.avg_pool3d: aten.avg_pool3d.default,
    torch.adaptive_avg_pool1d: aten.adaptive_avg_pool1d.default,
    torch.constant_pad_nd: aten.constant_pad_nd.default,
    torch.max_pool1d: aten.max_pool1d.default,
    torch.max_pool2d: aten.max_pool2d.default,
    torch.max_pool3d: aten.max_pool3d.default,
    torch.relu: aten.relu.default,
    torch.relu_: aten.relu_.default,
    torch.clamp: aten.clamp.default,
    torch.sigmoid: aten.sigmoid.default,
}
"""Functions without a signature that Python can see, and the overload whose schema they follow."""

_METHODS: dict[str, OpOverload] = {
    "add": aten.add.Tensor,
    "add_": aten.add_.Tensor,
    "sub": aten.sub.Tensor,
    "sub_": aten.sub_.Tensor,
    "mul": aten.mul.Tensor,
    "mul_": aten.mul_.Tensor,
    "div": aten.div.Tensor_mode,
    "div_": aten.div_.Tensor_mode,
    "matmul": aten.matmul.default,
    "mm": aten.mm.default,
    "addmm": aten.addmm.default,
    "clone": aten.clone.default,
    "contiguous": aten.contiguous.default,
    "flatten": aten.flatten.using_ints,
    "view": aten.view.default,
    "view_as": aten.view_as.default,
    "reshape": aten.reshape.default,
    "reshape_as": aten.reshape_as.default,
    "squeeze": aten.squeeze.dim,
    "unsqueeze": aten.unsqueeze.default,
    "unflatten": aten.unflatten.int,
    "permute": aten.permute.default,
    "transpose": aten.transpose.int,
    "t": aten.t.default,
    "mean": aten.mean.dim,
    "amax": aten.amax.default,
    "max": aten.max.dim,
    "relu": aten.relu.default,
    "relu_": aten.relu_.default,
    "clamp": aten.clamp.default,
    "clamp_": aten.clamp_.default,
    "sigmoid": aten.sigmoid.default,
}
_PYTHON_FUNCTIONS: dict[Any, str] = {
    F.batch_norm: "batch_norm",
    F.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
    F.group_norm: "group_norm",
    F.dropout: "dropout",
    F.dropout1d: "dropout",
    F.dropout2d: "dropout",
    F.dropout3d: "dropout",
    F.alpha_dropout: "dropout",
    F.feature_alpha_dropout: "dropout",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d",
    F.adaptive_avg_pool3d: "adaptive_avg_pool3d",
    F.interpolate: "interpolate",
    F.pad: "pad",
    F.relu: "relu",
    F.relu6: "relu6",
    F.hardtanh: "hardtanh",
}
"""Functions whose own parameters are those a reader asks for."""

_DISPATCHED: dict[Any, tuple[str, Any]] = {
    F.max_pool1d: ("max_pool1d", F.max_pool1d_with_indices),
    F.max_pool2d: ("max_pool2d", F.max_pool2d_with_indices),
    F.max_pool3d: ("max_pool3d", F.max_pool3d_with_indices),
    F.adaptive_max_pool1d: ("adaptive_max_pool1d", F.adaptive_max_pool1d_with_indices),
    F.adaptive_max_pool2d: ("adaptive_max_pool2d", F.adaptive_max_pool2d_with_indices),
    F.adaptive_max_pool3d: ("adaptive_max_pool3d", F.adaptive_max_pool3d_with_indices),
}
"""Functions that choose between two by an argument, and one whose parameters they share."""

WITH_INDICES = "_with_indices"
"""How the names end of operators that return the largest elements, and where they were."""

_UNNAMED = frozenset(
    {
        aten.max.dim,
        aten.adaptive_max_pool1d.default,
        aten.adaptive_max_pool2d.default,
        aten.adaptive_max_pool3d.default,
    }
)
"""Those whose names do not say so."""

_VARIADIC = frozenset({"view", "reshape", "permute"})
"""Methods that take a tuple or its elements."""

_SYNONYMS = {"input": "self", "axis": "dim"}


def signature(node: fx.Node) -> Signature | None:
    """The operator a call_function or call_method node calls; None where it is not one of ATen's."""
    if node.op == "call_method":
        overload = _METHODS.get(str(node.target))
        return None if overload is None else _of_overload(overload)
    return _of_function(node.target) if node.op == "call_function" else None


@cache
def _of_function(target: Callable[..., Any]) -> Signature | None:
    if isinstance(target, OpOverload):
        if target.namespace not in ("aten", "quantized_decomposed") or "out" in target._overloadname.split("_"):
            return None
        return _of_overload(target)
    if target is operator.getitem:
        return Signature("getitem", (Parameter("self", REQUIRED, False), Parameter("index", REQUIRED, False)))
    if target in _FUNCTIONS:
        return _of_overload(_FUNCTIONS[target])
    if target in _PYTHON_FUNCTIONS:
        return _of_python(_PYTHON_FUNCTIONS[target], target)
    return _of_python(*_DISPATCHED[target]) if target in _DISPATCHED else None


def _of_python(name: str, function: Callable[..., Any]) -> Signature:
    parameters = inspect.signature(function).parameters.values()
    return Signature(name, tuple(Parameter(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in parameters))


@cache
def _of_overload(overload: OpOverload) -> Signature:
    return Signature(
        f"{overload._opname}{WITH_INDICES}" if overload in _UNNAMED else overload._opname,
        tuple(
            Parameter(a.name, a.default_value if a.has_default_value() else REQUIRED, a.kwarg_only)
            for a in overload._schema.arguments
        ),
    )


def bind(node: fx.Node, of: Signature) -> dict[str, Any] | None:
    """The arguments of the call by name, defaults filled in; None where the call does not fit."""
    args = tuple(node.args)
    is_spread = node.op == "call_method" and node.target in _VARIADIC and len(args) > 1
    if is_spread and not isinstance(args[1], (list, tuple, torch.dtype)):
        args = (args[0], list(args[1:]))
    if len(args) > len(of.parameters):
        return None
    bound = {parameter.name: parameter.default for parameter in of.parameters}
    bound.update(zip((parameter.name for parameter in of.parameters), args, strict=False))
    for name, value in node.kwargs.items():
        name = name if name in bound else _SYNONYMS.get(name, name)
        if name not in bound:
            return None
        bound[name] = value
    return bound


def write(node: fx.Node, of: Signature, name: str, value: Any) -> None:
    """Set one argument of the call, in the form in which it is given."""
    for given in node.kwargs:
        if name in (given, _SYNONYMS.get(given)):
            node.update_kwarg(given, value)
            return
    position = next(i for i, parameter in enumerate(of.parameters) if parameter.name == name)
    if of.parameters[position].keyword_only:
        node.update_kwarg(name, value)
        return
    bound = bind(node, of) or {}
    before = [parameter.name for parameter in of.parameters[:position]]
    args = [*node.args[:position], *(bound[before[i]] for i in range(len(node.args), position)), value]
    node.args = (*args, *node.args[position + 1 :])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in before and _SYNONYMS.get(k) not in before}
