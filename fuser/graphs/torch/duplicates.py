"""What an fx graph computes more than once.

Two calls of one operator on the same operands make the same value only if nobody writes into an operand between
them, and may be one only if nobody writes into a result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fuser.graphs.torch.purity import (
    Called,
    can_be_dropped,
    is_deterministic,
    is_fresh,
    is_guard,
    is_known_function,
    is_known_module,
    moving,
)

_ATOMS = (
    type(None),
    type(Ellipsis),
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
"""Types of arguments that their text tells apart: 1 from True and from 1.0, 0.0 from -0.0."""


class _Unknown(Exception):
    """An argument of a type that is not known to be a value."""


def duplicate_nodes(
    nodes: Callable[[], Iterable[fx.Node]], called: Called, stored: Callable[[fx.Node], torch.Tensor | None]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(node, an earlier one of its graph that computes the same); each node is looked at when it is reached.

    nodes: the living nodes, in topological order.
    called: the module that a call_module node calls.
    stored: the tensor that a leaf stands for, if nothing writes into it.
    """
    seen: dict[Hashable, fx.Node] = {}
    moved = moving(nodes(), called)
    for node in nodes():
        if _may_change_state(node, called):
            seen.clear()
        if node in moved or not _is_repeatable(node, called) or any(x in moved for x in node.all_input_nodes):
            continue
        try:
            key = node.graph, node.op, called(node) or node.target, _form((node.args, node.kwargs), stored)
        except _Unknown:
            continue
        twin = seen.setdefault(key, node)
        if twin is not node:
            yield node, twin


def _may_change_state(node: fx.Node, called: Called) -> bool:
    """Whether it is anybody's code, which may switch autocast on, draw random numbers, or count its calls."""
    if node.op == "call_module":
        module = called(node)
        return module is None or not (is_known_module(module) or is_guard(module))
    if node.op != "call_function" or isinstance(node.target, (OpOverload, HigherOrderOperator)):
        return False
    return not is_known_function(node.target)


def _is_repeatable(node: fx.Node, called: Called) -> bool:
    """Whether a second call makes the same once more, and does nothing else."""
    if node.op == "call_module":
        module = called(node)
        draws = type(module).__name__.startswith("FractionalMaxPool")  # in eval mode, too
        return not draws and is_fresh(node, module) and can_be_dropped(node, module)
    if getattr(node.target, "__module__", None) == "builtins" and node.target is not getattr:
        return False  # print, next, ...
    return node.op in ("call_function", "call_method") and is_deterministic(node)


def _form(argument: Any, stored: Callable[[fx.Node], torch.Tensor | None]) -> Hashable:
    """What is equal for equal arguments; leaves that stand for one tensor are one."""
    if isinstance(argument, fx.Node):
        tensor = stored(argument) if argument.op in ("get_attr", "placeholder") else None
        return argument if tensor is None else id(tensor)
    if isinstance(argument, (list, tuple)):
        return tuple(_form(item, stored) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _form(argument[name], stored)) for name in sorted(argument))
    if isinstance(argument, slice):
        return "slice", *(_form(item, stored) for item in (argument.start, argument.stop, argument.step))
    if isinstance(argument, _ATOMS):
        return type(argument), repr(argument)
    raise _Unknown
