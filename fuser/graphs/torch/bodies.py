"""How a higher-order operator, such as `torch.cond`, calls the graphs among its arguments, and what it passes in."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from fuser.graphs.torch.carriers import attribute


class _Layout(NamedTuple):
    """Where the operands of the bodies are among the arguments of an operator.

    fixed: the position of the list of those, or, `spread`, of the first of those that every run of a body is given
        as they are.
    varying: the positions of the lists that give each run another value, such as those that a loop carries; they
        come first.
    """

    fixed: int
    varying: tuple[int, ...] = ()
    spread: bool = False


_LAYOUTS = {
    "cond": _Layout(3),
    "map_impl": _Layout(2, (1,)),
    "scan": _Layout(3, (1, 2)),
    "while_loop": _Layout(3, (2,)),
    "wrap_with_set_grad_enabled": _Layout(2, spread=True),
    "wrap_with_autocast": _Layout(5, spread=True),
}


class Operands(NamedTuple):
    """What a call passes to each of its bodies, in the order of their placeholders."""

    varying: tuple[Any, ...]
    fixed: tuple[Any, ...]


def operands(call: fx.Node) -> Operands | None:
    """None where it is not known what is passed in."""
    layout = _LAYOUTS.get(str(call.target))
    if layout is None or len(call.args) < layout.fixed + (not layout.spread):
        return None
    lists = [call.args[position] for position in layout.varying]
    lists.append(call.args[layout.fixed :] if layout.spread else call.args[layout.fixed])
    *varying, fixed = (tuple(given) if isinstance(given, (list, tuple)) else (given,) for given in lists)
    return Operands(tuple(operand for given in varying for operand in given), fixed)


def set_fixed(call: fx.Node, given: tuple[Any, ...]) -> None:
    """Pass in others."""
    layout = _LAYOUTS[str(call.target)]
    if layout.spread:
        call.args = (*call.args[: layout.fixed], *given)
    else:
        call.update_arg(layout.fixed, list(given) if isinstance(call.args[layout.fixed], list) else given)


def bodies(call: fx.Node) -> dict[fx.Node, fx.GraphModule]:
    """The graphs among the arguments, by the node that reads each."""
    owner = call.graph.owning_module
    found: dict[fx.Node, fx.GraphModule] = {}
    if owner is not None:
        for node in call.all_input_nodes:
            body = attribute(owner, str(node.target)) if node.op == "get_attr" else None
            if isinstance(body, fx.GraphModule):
                found[node] = body
    return found


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]
