"""The graphs inside a graph: the branches of `torch.cond`, and how values get into them.

A branch sees nothing but its operands.  A constant for an operator in a branch is registered outside and passed
in, to every branch of the call alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fuser.graphs.torch.carriers import attribute


class Scope:
    """One graph: the outermost one, or a branch.

    call: the `torch.cond` that a branch belongs to; None for the outermost graph.
    label: how a person calls it; empty for the outermost graph.
    branches: the scopes of each `torch.cond` in it.
    """

    def __init__(self, module: fx.GraphModule, call: fx.Node | None = None, label: str = "") -> None:
        self.module, self.call, self.label = module, call, label
        self.branches: dict[fx.Node, list[Scope]] = {}
        self._position = {node: i for i, node in enumerate(placeholders(module.graph))}

    def operand(self, placeholder: fx.Node) -> fx.Node | None:
        """What is passed in for a placeholder of this branch; None where that is a number."""
        assert self.call is not None
        given = operands(self.call)[self._position[placeholder]]
        return given if isinstance(given, fx.Node) else None

    def append(self, name: str, meta: dict[str, Any]) -> fx.Node:
        """A new placeholder after the others."""
        graph = self.module.graph
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            node = graph.placeholder(name)
        node.meta.update(meta)
        self._position[node] = len(self._position)
        return node

    def remove(self, position: int) -> fx.Node:
        """Take out the placeholder at `position`, which nobody reads, and return it."""
        node = next(node for node, i in self._position.items() if i == position)
        self.module.graph.erase_node(node)
        rest = sorted(self._position.items() - {(node, position)}, key=lambda item: item[1])
        self._position = {node: i for i, (node, _) in enumerate(rest)}
        return node

    def position(self, placeholder: fx.Node) -> int:
        return self._position[placeholder]

    def is_read(self, position: int) -> bool:
        return any(node.users for node, i in self._position.items() if i == position)


def operands(call: fx.Node) -> tuple[Any, ...]:
    """What a `torch.cond` passes to its branches."""
    given = call.args[3]
    assert isinstance(given, (list, tuple))
    return tuple(given)


def pass_in(outside: Scope, call: fx.Node, value: fx.Node) -> dict[fx.Graph, fx.Node]:
    """Make `value` one more operand of the call; what it is in each branch."""
    call.update_arg(3, (*operands(call), value))
    return {branch.module.graph: branch.append(value.name, value.meta) for branch in outside.branches[call]}


def leave_out(outside: Scope, call: fx.Node, position: int) -> tuple[list[fx.Node], fx.Node | None]:
    """Drop the operand at `position` if no branch reads it.

    Returns the placeholders that are gone, and the node that loses a reader.
    """
    given = operands(call)
    if any(branch.is_read(position) for branch in outside.branches[call]):
        return [], None
    gone = [branch.remove(position) for branch in outside.branches[call]]
    call.update_arg(3, given[:position] + given[position + 1 :])
    dropped = given[position]
    return gone, dropped if isinstance(dropped, fx.Node) else None


def scopes(module: fx.GraphModule) -> dict[fx.Graph, Scope]:
    """The graph of the module and those of all branches below it, from the outside in."""
    found: dict[fx.Graph, Scope] = {}
    pending = [Scope(module)]
    while pending:
        scope = pending.pop(0)
        found[scope.module.graph] = scope
        for call in scope.module.graph.nodes:
            if call.target is torch.ops.higher_order.cond:
                scope.branches[call] = list(_branches(scope, call))
                pending += scope.branches[call]
    return found


def _branches(scope: Scope, call: fx.Node) -> Iterator[Scope]:
    """Both branches of a `torch.cond`; none where one of them has other callers too."""
    readers = call.args[1:3]
    if len(call.args) != 4 or not all(
        isinstance(reader, fx.Node) and reader.op == "get_attr" and len(reader.users) == 1 for reader in readers
    ):
        return
    targets = [str(reader.target) for reader in readers if isinstance(reader, fx.Node)]
    uses = [node.target for node in scope.module.graph.find_nodes(op="get_attr") if node.target in targets]
    modules = [attribute(scope.module, target) for target in targets]
    if len(uses) != 2 or len(set(targets)) != 2 or not all(isinstance(module, fx.GraphModule) for module in modules):
        return
    for module, target in zip(modules, targets, strict=True):
        yield Scope(module, call, f"{scope.label}.{target}" if scope.label else target)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]
