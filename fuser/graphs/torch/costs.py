"""The multiply-adds of an fx graph, by the shapes that its capture recorded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fuser import costs
from fuser.graphs.torch.calls import bind, signature
from fuser.graphs.torch.wiring import Wiring
from fuser.ops import Conv, Linear

if TYPE_CHECKING:
    from fuser.graphs.torch.graph import TorchGraph

_PRODUCTS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "matmul": ("self", "other"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "scaled_dot_product_attention": ("query", "key"),
}
"""Operator -> its two factors."""

_NOT_COUNTED = re.compile("einsum|lstm|gru|rnn.*|.*conv.*|.*multi_?head_?attention.*|linear|.*_mm|lstmcell|grucell")
"""What multiplies and adds in ways that are not counted here, by the names of operators and modules."""


def multiply_adds(graph: TorchGraph, wiring: Wiring) -> int | None:
    """See `fuser.graph.Summary`."""
    nodes = wiring.carrier.module.graph.nodes
    batch = frozenset(name for node in nodes if (name := _dynamic_batch(node)) is not None)
    total = 0
    for node in wiring.alive():
        found = _operands(graph, node)
        if found is None:
            continue
        kind, *values = found
        shapes = [None if value is None else costs.per_sample(graph.shape(value), batch) for value in values]
        if None in shapes or wiring.scope(node).call is not None:
            return None
        x, w, y = (shape for shape in shapes if shape is not None)
        if kind == "attention":
            total += costs.attention(x, w, y)
        elif kind == "product":
            total += costs.product(x, y)
        else:
            total += costs.conv(x, w, y, transposed=kind == "transposed")
    return total


def _dynamic_batch(node: fx.Node) -> str | None:
    """The name of the first size of an input, where that is left open."""
    value = node.meta.get("val") if node.op == "placeholder" else None
    if not isinstance(value, torch.Tensor) or not value.dim() or isinstance(value.shape[0], int):
        return None
    return str(value.shape[0])


def _operands(graph: TorchGraph, node: fx.Node) -> tuple[Any, ...] | None:
    """(kind, x, w, y) of an operator that multiplies and adds; values of None where it is not understood."""
    op = graph.read(node)
    if isinstance(op, Conv) and op.node is node:
        return "transposed" if op.transposed else "conv", op.input, op.weight, op.output
    if isinstance(op, Linear) and op.node is node:
        return "product", op.input, op.weight, op.output
    found, module = signature(node), graph.called(node)
    name = found.name if found is not None else str(getattr(node.target, "__name__", node.target))
    if found is not None and name in _PRODUCTS:
        given = bind(node, found) or {}
        x, w = (given.get(factor) for factor in _PRODUCTS[name])
        return "attention" if name.startswith("scaled") else "product", x, w, node
    name = name if module is None else type(module).__name__
    calls = node.op.startswith("call_") and _NOT_COUNTED.fullmatch(name.lower())
    return ("unknown", None, None, None) if calls else None
