"""Ops that change nothing: read once, for every graph.

x * 1, x / 1, x - 0 and x + (-0) give back x bit for bit.  x + 0 does not: it makes 0 of -0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fuser.graph import Array, Dim, Graph
from fuser.ops import Concat, Elementwise, Identity, Op, Pad, Reshape, Slice, Transpose, Value
from fuser.remarks import Missed

MAY_CHANGE_NOTHING = (Elementwise, Reshape, Transpose, Concat, Pad, Slice)
"""Kinds of ops that are also found when identities are asked for, each time they are one."""

MAX_ELEMENTS = 1 << 16
"""No larger constant is looked through for ones and zeros."""


def as_identity(graph: Graph, op: Op) -> Op:
    """The op, or the `Identity` that it amounts to."""
    value = _handed_on(graph, op)
    return op if value is None else Identity(op.node, op.output, value, hooked=op.hooked)


def _handed_on(graph: Graph, op: Op) -> Value | None:
    """The operand that `op` hands on as it is, in its bits, type and shape; None where that is not proven."""
    match op:
        case Elementwise():
            return _neutral_operand(graph, op)
        case Reshape() if keeps_shape(graph.shape(op.input), graph.shape(op.output)):
            return op.input
        case Transpose() if op.permutation == tuple(range(len(op.permutation))):
            return op.input
        case Concat() if len(op.inputs) == 1:
            return op.inputs[0]
        case Pad(padding=()):
            return op.input
    return None


def keeps_shape(old: Sequence[Dim] | None, new: Sequence[Dim] | None) -> bool:
    """Whether two shapes of equally many elements are the same: one size may be unknown, the others tell it."""
    if old is None or new is None or len(old) != len(new):
        return False
    pairs = list(zip(old, new, strict=True))
    rest = [a for a, b in pairs if a is not None and a == b]
    if len(rest) == len(old):
        return True
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        return False  # inference is wrong somewhere
    return len(rest) == len(old) - 1 and all(isinstance(size, int) and size > 0 for size in rest)


def _neutral_operand(graph: Graph, op: Elementwise) -> Value | None:
    pairs = [(op.left, op.right)] if op.function in "-/" else [(op.left, op.right), (op.right, op.left)]
    for operand, other in pairs:
        shape = graph.shape(other)
        if shape is None or not 0 < _elements(shape) <= MAX_ELEMENTS or not _is_as_large(graph, operand, shape):
            continue
        constant = graph.constant(other)
        if not isinstance(constant, Missed) and _is_neutral(op.function, constant):
            return operand
    return None


def _is_neutral(function: str, constant: Array) -> bool:
    """Whether x `function` constant is x."""
    if constant.dtype.kind in "bc":
        return False
    if function in "*/":
        return bool((constant == 1).all())
    if constant.dtype.kind in "iu":
        return not constant.any()
    wide = constant.astype(np.float64)
    return not wide.any() and bool((np.signbit(wide) == (function == "+")).all())


def _is_as_large(graph: Graph, operand: Value, shape: Sequence[Dim]) -> bool:
    """Whether broadcasting against `shape` leaves the operand as large as it is."""
    if not shape:
        return True
    known = graph.shape(operand)
    if known is None:
        rank = graph.rank(operand)
        known = () if rank is None else (None,) * rank
    return len(shape) <= len(known) and all(
        size in (1, there) for size, there in zip(reversed(shape), reversed(known), strict=False)
    )


def _elements(shape: Sequence[Dim]) -> int:
    """How many elements; 0 where a size is not known."""
    return int(np.prod([size if isinstance(size, int) else 0 for size in shape], dtype=np.int64))
