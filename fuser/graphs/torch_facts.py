"""Ranks and dtypes in a graph that was traced without shapes: only what the operators themselves prove.

A `BatchNorm2d` checks that its input has four axes, and an activation keeps their number; so everything between
two of them is four-dimensional in every run that does not raise.  A `Conv2d` alone proves nothing: it takes
unbatched input too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from fuser.graphs.torch_calls import bind, signature
from fuser.graphs.torch_purity import is_known_function
from fuser.graphs.torch_readers import CONVS, DROPOUTS, NORMS, POOLS

_RANK_OF_NORM: dict[type, int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_KEEPING_MODULES = frozenset(
    {*CONVS, *NORMS, *POOLS, *DROPOUTS, nn.Linear, nn.Identity, nn.GroupNorm, nn.LayerNorm, nn.Upsample}
    | {
        getattr(nn, name)
        for name in (
            "ReLU ReLU6 LeakyReLU PReLU ELU CELU SELU GELU SiLU Mish Sigmoid Tanh Softplus Softsign Hardswish "
            "Hardsigmoid Hardtanh Threshold MaxPool1d MaxPool2d MaxPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d "
            "AdaptiveMaxPool3d LPPool1d LPPool2d ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d "
            "ReplicationPad1d ReplicationPad2d ConstantPad1d ConstantPad2d"
        ).split()
    }
)
_KEEPING_FUNCTIONS = frozenset(
    "relu relu_ relu6 leaky_relu elu selu gelu silu mish sigmoid tanh softplus hardswish hardsigmoid hardtanh clamp "
    "max_pool1d max_pool2d max_pool3d boolean_dispatch avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d dropout dropout2d batch_norm conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d linear clone contiguous pad interpolate softmax".split()
)
"""Modules and functions whose output has the rank and the dtype of their first operand."""


class Facts:
    """What is proven about every node; values do not change their rank or dtype, so it holds through edits.

    module: the module that a call_module calls.
    leaf: the tensor that a get_attr stands for.
    """

    def __init__(
        self,
        nodes: Iterable[fx.Node],
        module: Callable[[fx.Node], nn.Module | None],
        leaf: Callable[[fx.Node], torch.Tensor | None],
    ) -> None:
        self.rank: dict[fx.Node, int] = {}
        self.dtype: dict[fx.Node, torch.dtype] = {}
        self._module, self._leaf = module, leaf
        nodes = list(nodes)
        for node in nodes:
            self._forward(node)
        for node in reversed(nodes):
            self._backward(node)
        for node in nodes:
            self._forward(node)

    def _forward(self, node: fx.Node) -> None:
        leaf = self._leaf(node)
        if leaf is not None:
            self._learn(node, leaf.dim(), leaf.dtype)
        elif node.op == "call_module":
            self._module_forward(node)
        elif node.op in ("call_function", "call_method"):
            self._function_forward(node)

    def _module_forward(self, node: fx.Node) -> None:
        module, data = self._module(node), _first(node)
        if data is None:
            return
        if type(module) in _KEEPING_MODULES:
            weight = getattr(module, "weight", None) if type(module) in {*CONVS, nn.Linear} else None
            rank = _RANK_OF_NORM.get(type(module), self.rank.get(data))
            self._learn(node, rank, weight.dtype if weight is not None else self.dtype.get(data))
        elif isinstance(module, nn.Flatten):
            self._learn(node, self._flattened(data, module.start_dim, module.end_dim), self.dtype.get(data))

    def _function_forward(self, node: fx.Node) -> None:
        data, found = _first(node), signature(node)
        name = _operator_name(node)
        arguments = (bind(node, found) if found else None) or {}
        if name in ("mm", "addmm"):
            self._learn(node, 2, self._dtype_of(arguments.get("mat2")))
        elif name == "matmul" and self.rank.get(arguments["other"]) == 2:
            self._learn(node, self.rank.get(arguments["self"]), self._dtype_of(arguments["other"]))
        elif name.rstrip("_") in ("add", "sub", "mul", "div", "rsub"):
            self._binary_forward(node, arguments.get("self"), arguments.get("other"))
        elif name == "cat" and isinstance(arguments["tensors"], (list, tuple)):
            tensors = arguments["tensors"]
            dtypes = {self._dtype_of(tensor) for tensor in tensors}
            ranks = [self.rank[tensor] for tensor in tensors if self.rank.get(tensor)]
            self._learn(node, ranks[0] if ranks else None, dtypes.pop() if len(dtypes) == 1 else None)
        elif data is None:
            return
        elif name in _KEEPING_FUNCTIONS:
            self._learn(node, self.rank.get(data), self._dtype_of(arguments.get("weight")) or self.dtype.get(data))
        else:
            self._learn(node, self._reshaped(name, arguments, data), self.dtype.get(data) if found else None)

    def _binary_forward(self, node: fx.Node, left: Any, right: Any) -> None:
        ranks = [0 if isinstance(value, (int, float)) else self.rank.get(value) for value in (left, right)]
        known = [rank for rank in ranks if rank is not None]
        self._learn(node, max(known) if len(known) == 2 and max(known) else None, self.common_dtype(left, right))

    def common_dtype(self, left: Any, right: Any) -> torch.dtype | None:
        """The floating type of `left` and `right`, where arithmetic on them is proven not to promote."""
        return common_dtype(left, right, self._dtype_of, self.rank.get)

    def _dtype_of(self, value: Any) -> torch.dtype | None:
        return self.dtype.get(value) if isinstance(value, fx.Node) else None

    def _reshaped(self, name: str, arguments: dict[str, Any], data: fx.Node) -> int | None:
        rank = self.rank.get(data)
        if name == "flatten":
            return self._flattened(data, arguments["start_dim"], arguments["end_dim"])
        if name in ("view", "reshape"):
            sizes = arguments.get("size", arguments.get("shape"))
            return len(sizes) if isinstance(sizes, (list, tuple)) else None
        if name == "permute":
            return len(arguments["dims"])
        if rank is None:
            return None
        if name == "transpose":
            return rank
        if name == "unsqueeze":
            return rank + 1
        if name == "mean" and isinstance(arguments["dim"], (int, list, tuple)):
            axes = 1 if isinstance(arguments["dim"], int) else len(arguments["dim"])
            return rank if arguments["keepdim"] else rank - axes
        return None

    def _flattened(self, data: fx.Node, start: Any, end: Any) -> int | None:
        if start == 1 and end == -1:
            return 2  # of one axis it would raise
        rank = self.rank.get(data)
        if rank is None or not isinstance(start, int) or not isinstance(end, int):
            return None
        return rank - (end % rank - start % rank)

    def _backward(self, node: fx.Node) -> None:
        """What a node proves about its operand."""
        data = _first(node)
        if data is None or data in self.rank:
            return
        if node.op == "call_module":
            module = self._module(node)
            if type(module) in _KEEPING_MODULES:
                self._learn(data, _RANK_OF_NORM.get(type(module), self.rank.get(node)), None)
        elif node.op in ("call_function", "call_method"):
            found = signature(node)
            name = found.name if found else getattr(node.target, "__name__", node.target)
            if name in _KEEPING_FUNCTIONS or name in ("mm", "permute"):
                self._learn(data, self.rank.get(node), None)

    def _learn(self, node: fx.Node, rank: int | None, dtype: torch.dtype | None) -> None:
        if rank is not None:
            self.rank.setdefault(node, rank)
        if dtype is not None:
            self.dtype.setdefault(node, dtype)


def common_dtype(
    left: Any, right: Any, dtype: Callable[[Any], torch.dtype | None], rank: Callable[[Any], int | None]
) -> torch.dtype | None:
    """The floating type of two operands of arithmetic, one of which may be a number, if torch does not promote."""
    tensors = [value for value in (left, right) if isinstance(value, fx.Node)]
    if not all(isinstance(value, (fx.Node, int, float)) for value in (left, right)) or not tensors:
        return None
    dtypes = [dtype(value) for value in tensors]
    if len(tensors) == 2 and dtypes[0] != dtypes[1]:
        scalars = [rank(value) == 0 for value in tensors]  # a scalar tensor yields to any other
        if not any(scalars) or all(scalars):
            return None
        scalar = dtypes[scalars.index(True)]
        result = dtypes[scalars.index(False)]
        return result if result and scalar and result.is_floating_point and not scalar.is_complex else None
    result = dtypes[0]
    return result if result is not None and result.is_floating_point else None


def _operator_name(node: fx.Node) -> str:
    """What the operator is called; empty for a function of the user's."""
    found = signature(node)
    if found is not None:
        return found.name
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if is_known_function(node.target) else ""


def _first(node: fx.Node) -> fx.Node | None:
    given = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    return given if isinstance(given, fx.Node) else None
