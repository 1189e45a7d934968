"""Arithmetic on sizes: what an ONNX model computes from shapes of which only some sizes are known.

`Shape(x)` of [N, 196, 192] is no constant, but its second element is, and what exporters make of it with Gather,
Slice, Concat and products is one, too, wherever the batch is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from fuser.graph import Array, Dim
from fuser.graphs.onnx.editor import ABSENT, Node, Tensor
from fuser.graphs.onnx.values import Shape

MAX_SIZES = 64
"""No operand that says a shape, axes or bounds has more elements."""

Sizes = Array
"""Of rank 0 or 1, of objects: integers, and for a size that is not known its name or None."""

_INTEGERS = (TensorProto.INT32, TensorProto.INT64)


class SizeArithmetic:
    """Visits nodes in topological order.

    shape: what is known of the shape of a tensor.
    constant: the value of a small tensor, None where it is not known.
    """

    def __init__(self, shape: Callable[[Tensor], Shape | None], constant: Callable[[Tensor], Array | None]) -> None:
        self._shape, self._constant = shape, constant
        self._found: dict[int, Sizes] = {}

    def visit(self, node: Node) -> Sizes | None:
        """What the node computes, as far as it is known; None where it does not compute with sizes."""
        if not node.inputs or not node.outputs or node.outputs[0] is ABSENT:  # mostly not a legal node
            return None
        if node.op == "Shape":
            found = self._of_shape(node)
        elif node.op in _COMPUTED and any(id(tensor) in self._found for tensor in node.inputs):
            operands = [self._operand(tensor) for tensor in node.inputs]
            try:
                known = all(operand is not None for operand in operands)
                found = _COMPUTED[node.op](node, *operands) if known else None
            except (TypeError, ValueError, IndexError):  # of another rank, another opset, or not a legal node
                found = None
        else:
            return None
        if found is None or found.ndim > 1 or found.size > MAX_SIZES:
            return None
        self._found[id(node.outputs[0])] = found
        return found

    def of(self, tensor: Tensor) -> Sizes | None:
        """What is known of the elements of a tensor that was computed from a shape."""
        return self._found.get(id(tensor))

    def _of_shape(self, node: Node) -> Sizes | None:
        shape = self._shape(node.inputs[0])
        if shape is None:
            return None
        return _sizes(shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))])

    def _operand(self, tensor: Tensor) -> Sizes | None:
        found = self.of(tensor)
        if found is None:
            array = self._constant(tensor)
            found = None if array is None or array.dtype.kind not in "iub" else array.astype(object)
        return found


def _sizes(values: Sequence[Dim]) -> Sizes:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def _numbers(operand: Sizes) -> list[int]:
    """Indices and axes, which have to be known."""
    if not all(isinstance(value, int) for value in operand.flat):
        raise ValueError
    return [int(value) for value in operand.flat]


def _gather(node: Node, data: Sizes, indices: Sizes) -> Sizes:
    if node.attrs.get("axis", 0) != 0:
        raise ValueError
    return np.asarray(data[np.reshape(_numbers(indices), indices.shape)], dtype=object)


def _slice(node: Node, data: Sizes, *operands: Sizes) -> Sizes:
    if operands:
        starts, ends, *rest = map(_numbers, operands)
        axes, steps = rest[0] if rest else [0], rest[1] if len(rest) > 1 else [1]
    else:
        starts, ends, axes, steps = node.attrs["starts"], node.attrs["ends"], node.attrs.get("axes", [0]), [1]
    (start,), (end,), (axis,), (step,) = starts, ends, axes, steps
    if axis not in (0, -1) or step < 1:
        raise ValueError
    return data[start:end:step]


def _concat(node: Node, *operands: Sizes) -> Sizes:
    return np.concatenate(operands)


def _one_axis(node: Node, data: Sizes, *axes: Sizes) -> Sizes:
    if data.ndim != 0:
        raise ValueError
    return data.reshape(1)


def _no_axis(node: Node, data: Sizes, *axes: Sizes) -> Sizes:
    return data.reshape(())


def _same(node: Node, data: Sizes) -> Sizes:
    return data


def _cast(node: Node, data: Sizes) -> Sizes:
    if node.attrs["to"] not in _INTEGERS:
        raise ValueError
    return data


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[..., Sizes]:
    """A function of two elements, which raises ValueError where the result is no size and not known either."""

    def compute(node: Node, left: Sizes, right: Sizes) -> Sizes:
        return np.asarray(np.frompyfunc(function, 2, 1)(left, right), dtype=object)

    return compute


def _is_size(value: Dim) -> bool:
    """Whether the value is not negative, whatever it is."""
    return not isinstance(value, int) or value >= 0


def _add(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if not (_is_size(a) and _is_size(b)):
        raise ValueError
    return a if b == 0 else b if a == 0 else None


def _subtract(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    raise ValueError


def _multiply(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if not (_is_size(a) and _is_size(b)):
        raise ValueError
    return a if b == 1 else b if a == 1 else None


def _divide(a: Dim, b: Dim) -> Dim:
    if not (isinstance(b, int) and b > 0 and _is_size(a)):
        raise ValueError
    return a // b if isinstance(a, int) else a if b == 1 else None


def _equal(a: Dim, b: Dim) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if _is_size(a) and _is_size(b):  # the names of two sizes that are not known may be equal, or not
        raise ValueError
    return False


def _where(node: Node, condition: Sizes, left: Sizes, right: Sizes) -> Sizes:
    return np.asarray(np.where(np.asarray(condition, dtype=bool), left, right), dtype=object)


_COMPUTED: dict[str, Callable[..., Sizes]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _one_axis,
    "Squeeze": _no_axis,
    "Identity": _same,
    "Cast": _cast,
    "Add": _elementwise(_add),
    "Sub": _elementwise(_subtract),
    "Mul": _elementwise(_multiply),
    "Div": _elementwise(_divide),
    "Equal": _elementwise(_equal),
    "Where": _where,
}

SIZE_OPERATORS = frozenset({"Shape", *_COMPUTED})
"""Those that `SizeArithmetic` understands."""
