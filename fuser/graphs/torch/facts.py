"""Ranks and dtypes in a graph that was traced without shapes: only what the operators themselves prove.

A `BatchNorm2d` checks that its input has four axes, and an activation keeps their number; so everything between
two of them is four-dimensional in every run that does not raise.  A `Conv2d` alone proves less: it takes
unbatched input too.  What is known is kept as bounds: a `BatchNorm1d` takes two or three axes, and
`transpose(1, 2)` needs three.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fuser.graphs.torch.calls import WITH_INDICES, bind, signature
from fuser.graphs.torch.purity import is_known_function, is_known_module
from fuser.graphs.torch.readers import CONVS, DROPOUTS, NORMS, POOLS

_KEEPING_MODULES = frozenset(
    {*CONVS, *NORMS, *POOLS, *DROPOUTS, nn.Linear, nn.Identity, nn.GroupNorm, nn.LayerNorm, nn.Upsample}
    | {
        getattr(nn, name)
        for name in (
            "ReLU ReLU6 LeakyReLU PReLU ELU CELU SELU GELU SiLU Mish Sigmoid Tanh Softplus Softsign Hardswish "
            "Hardsigmoid Hardtanh Threshold MaxPool1d MaxPool2d MaxPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d "
            "AdaptiveMaxPool3d LPPool1d LPPool2d ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d "
            "ReplicationPad1d ReplicationPad2d ConstantPad1d ConstantPad2d ConstantPad3d"
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


_TYPED_BY_WEIGHT = frozenset({*CONVS, nn.Linear})
"""Modules that take input of the dtype of their weight, and nothing else."""


class Bounds(NamedTuple):
    """How many axes a value can have."""

    low: int = 0
    high: int = 64

    def meet(self, other: Bounds) -> Bounds:
        return Bounds(max(self.low, other.low), min(self.high, other.high))

    def plus(self, axes: int) -> Bounds:
        return Bounds(max(self.low + axes, 0), self.high + axes)


MAX_SWEEPS = 10
"""There and back over the nodes, until nothing new is learned: two or three sweeps, but for contrived graphs."""

TAKES: dict[type[nn.Module], Bounds] = {
    **{conv: Bounds(axes + 1, axes + 2) for conv, axes in CONVS.items()},
    **{pool: Bounds(axes + 1, axes + 2) for pool, axes in POOLS.items()},
    nn.BatchNorm1d: Bounds(2, 3),
    nn.BatchNorm2d: Bounds(4, 4),
    nn.BatchNorm3d: Bounds(5, 5),
    nn.Linear: Bounds(low=1),
}
"""Module -> how many axes its input must have; it raises for others."""


class Facts:
    """What is proven about every node; values do not change their rank or dtype, so it holds through edits.

    module: the module that a call_module calls.
    known: tensors with the shape and type of what is known before run time.
    """

    def __init__(
        self,
        nodes: Iterable[fx.Node],
        module: Callable[[fx.Node], nn.Module | None],
        known: Mapping[fx.Node, torch.Tensor],
    ) -> None:
        self.dtype: dict[fx.Node, torch.dtype] = {}
        self._bounds: dict[fx.Node, Bounds] = {}
        self._module, self._known = module, known
        self._has_learned = True
        order = list(nodes)
        for _ in range(MAX_SWEEPS):
            if not self._has_learned:
                break
            self._has_learned = False
            for node in order:
                self._visit(node)
            order.reverse()

    def rank(self, node: fx.Node) -> int | None:
        low, high = self._bounds.get(node, Bounds())
        return low if low == high else None

    def _visit(self, node: fx.Node) -> None:
        """What a node proves of its operands and of its output."""
        known = self._known.get(node)
        if known is not None:
            self._learn(node, Bounds(known.dim(), known.dim()), known.dtype)
        elif node.op == "call_module":
            self._visit_module(node, self._module(node))
        elif node.op in ("call_function", "call_method"):
            self._visit_function(node)

    def _visit_module(self, node: fx.Node, module: Any) -> None:
        data = _first(node)
        if data is None or not is_known_module(module):
            return
        if type(module) in _KEEPING_MODULES:
            if type(module) in TAKES:
                self._learn(data, TAKES[type(module)])
            weight = module.weight if type(module) in _TYPED_BY_WEIGHT else None
            self._relate(node, data, 0, self.dtype.get(data) if weight is None else weight.dtype)
        elif type(module) is nn.Flatten:
            self._flatten(node, data, module.start_dim, module.end_dim)

    def _visit_function(self, node: fx.Node) -> None:
        name, data, found = _operator_name(node), _first(node), signature(node)
        given = (bind(node, found) if found else None) or {}
        if name in ("mm", "addmm"):
            for matrix in (node, *node.all_input_nodes[-2:]):
                self._learn(matrix, Bounds(2, 2))
            self._learn(node, Bounds(), self._dtype_of(given.get("mat2")))
        elif name.rstrip("_") in ("add", "sub", "mul", "div", "rsub"):
            self._broadcast(node, given.get("self"), given.get("other"))
        elif name == "cat" and isinstance(given.get("tensors"), (list, tuple)):
            dtypes = {self._dtype_of(tensor) for tensor in given["tensors"]}
            dtype = dtypes.pop() if len(dtypes) == 1 else None
            for tensor in node.all_input_nodes:
                self._relate(node, tensor, 0, dtype)
        elif data is None:
            return
        elif name == "_assert":
            self._asserted(data)
        elif name == "matmul":
            if self.rank(given["other"]) == 2:
                self._relate(node, data, 0, self._dtype_of(given["other"]))
        elif name in _KEEPING_FUNCTIONS:
            self._relate(node, data, 0, self._dtype_of(given.get("weight")) or self.dtype.get(data))
        elif found is not None:
            self._reshape(node, data, name, given)

    def _asserted(self, condition: fx.Node) -> None:
        """`torch._assert(x.ndim == 4, ...)`, as in layers that work on functions instead of modules."""
        if condition.target is not operator.eq or len(condition.args) != 2:
            return
        for counted, axes in (condition.args, condition.args[::-1]):
            if isinstance(counted, fx.Node) and isinstance(axes, int) and _counts_axes(counted):
                self._learn(counted.all_input_nodes[0], Bounds(axes, axes))

    def _reshape(self, node: fx.Node, data: fx.Node, name: str, given: dict[str, Any]) -> None:
        dtype = self.dtype.get(data)
        if name == "flatten":
            self._flatten(node, data, given["start_dim"], given["end_dim"])
        elif name in ("view", "reshape"):
            sizes = given.get("size", given.get("shape"))
            dtype = sizes if isinstance(sizes, torch.dtype) else dtype
            self._learn(node, Bounds(len(sizes), len(sizes)) if isinstance(sizes, (list, tuple)) else Bounds(), dtype)
        elif name in ("view_as", "reshape_as") and isinstance(given["other"], fx.Node):
            self._relate(node, given["other"], 0, dtype)
        elif name == "permute":
            self._learn(data, Bounds(len(given["dims"]), len(given["dims"])))
            self._relate(node, data, 0, dtype)
        elif name == "transpose":
            axes = [axis for axis in (given["dim0"], given["dim1"]) if isinstance(axis, int)]
            self._learn(data, Bounds(low=max((axis + 1 if axis >= 0 else -axis for axis in axes), default=0)))
            self._relate(node, data, 0, dtype)
        elif name == "unsqueeze":
            self._relate(node, data, 1, dtype)
        elif name in ("mean", "amax", f"max{WITH_INDICES}"):
            self._reduce(node, data, name, given, dtype)

    def _reduce(
        self, node: fx.Node, data: fx.Node, name: str, given: dict[str, Any], dtype: torch.dtype | None
    ) -> None:
        """Along some axes; without any it is along all of them."""
        axes = [given["dim"]] if isinstance(given["dim"], int) else given["dim"]
        if not isinstance(axes, (list, tuple)) or not axes or not all(isinstance(axis, int) for axis in axes):
            return
        self._learn(data, Bounds(low=max(axis + 1 if axis >= 0 else -axis for axis in axes)))
        first = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        for output in first if name.endswith(WITH_INDICES) else [node]:
            self._relate(output, data, 0 if given["keepdim"] else -len(axes), dtype)

    def _flatten(self, node: fx.Node, data: fx.Node, start: Any, end: Any) -> None:
        if isinstance(start, int) and start >= 0 and end == -1:
            self._learn(data, Bounds(low=start + 1))
            self._learn(node, Bounds(start + 1, start + 1), self.dtype.get(data))
        elif isinstance(start, int) and isinstance(end, int) and 0 <= start <= end:
            self._learn(data, Bounds(low=end + 1))
            self._relate(node, data, start - end, self.dtype.get(data))

    def _broadcast(self, node: fx.Node, left: Any, right: Any) -> None:
        """The result has as many axes as the wider operand; a number has none."""
        if all(isinstance(value, (fx.Node, int, float)) for value in (left, right)):
            a, b = (self._bounds.get(x, Bounds()) if isinstance(x, fx.Node) else Bounds(0, 0) for x in (left, right))
            self._learn(node, Bounds(max(a.low, b.low), max(a.high, b.high)))
            result = self._bounds[node]
            for value, other in ((left, b), (right, a)):
                if isinstance(value, fx.Node):  # the wider one, where the other cannot be it
                    self._learn(value, Bounds(result.low if other.high < result.low else 0, result.high))
        self._learn(node, Bounds(), common_dtype(left, right, self._dtype_of, self.rank))

    def _dtype_of(self, value: Any) -> torch.dtype | None:
        return self.dtype.get(value) if isinstance(value, fx.Node) else None

    def _relate(self, node: fx.Node, operand: fx.Node, axes: int, dtype: torch.dtype | None) -> None:
        """The output has `axes` more axes than the operand."""
        self._learn(node, self._bounds.get(operand, Bounds()).plus(axes), dtype)
        self._learn(operand, self._bounds[node].plus(-axes))

    def _learn(self, node: fx.Node, bounds: Bounds, dtype: torch.dtype | None = None) -> None:
        old = self._bounds.get(node)
        new = (old or Bounds()).meet(bounds)
        is_news = new != old or (dtype is not None and node not in self.dtype)
        self._has_learned = self._has_learned or is_news
        self._bounds[node] = new
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


def _counts_axes(node: fx.Node) -> bool:
    """Whether the node is `x.ndim` or `x.dim()`."""
    if node.op == "call_method":
        return node.target in ("dim", "ndimension")
    return node.target is getattr and node.args[1] == "ndim"


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
