"""The graphs inside a graph: the bodies of higher-order operators, and how values get into them.

A body sees nothing but its operands.  A constant for an operator in a body is registered outside and passed in, to
every body of the call alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

from fuser.graphs.torch.bodies import bodies, operands, placeholders, set_fixed
from fuser.graphs.torch.purity import written_operands
from fuser.remarks import Missed


class Scope:
    """One graph: the outermost one, or a body.

    call: the operator that a body belongs to; None for the outermost graph.
    label: how a person calls it; empty for the outermost graph.
    sealed: why nothing in it is changed, if so.
    bodies: the scopes of each higher-order operator in it.
    """

    def __init__(
        self, module: fx.GraphModule, call: fx.Node | None = None, label: str = "", sealed: Missed | None = None
    ) -> None:
        self.module, self.call, self.label, self.sealed = module, call, label, sealed
        self.bodies: dict[fx.Node, list[Scope]] = {}
        self._inputs = placeholders(module.graph)
        self._position = {node: i for i, node in enumerate(self._inputs)}

    def operand(self, placeholder: fx.Node) -> fx.Node | None:
        """What is passed in for a placeholder of this body; None where that is a number, or not always the same."""
        assert self.call is not None
        given = None if self.sealed else operands(self.call)
        if given is None:
            return None
        position = self._position[placeholder] - len(given.varying)
        passed = given.fixed[position] if position >= 0 else None
        return passed if isinstance(passed, fx.Node) else None

    def append(self, name: str, meta: dict[str, Any]) -> fx.Node:
        """A new placeholder after the others."""
        graph = self.module.graph
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            node = graph.placeholder(name)
        node.meta.update(meta)
        self._position[node] = len(self._inputs)
        self._inputs.append(node)
        return node

    def remove(self, position: int) -> fx.Node:
        """Take out the placeholder at `position`, which nobody reads, and return it."""
        node = self._inputs.pop(position)
        self.module.graph.erase_node(node)
        del self._position[node]
        for behind in self._inputs[position:]:
            self._position[behind] -= 1
        return node

    def position(self, placeholder: fx.Node) -> int:
        return self._position[placeholder]

    def is_read(self, position: int) -> bool:
        return bool(self._inputs[position].users)


def pass_in(outside: Scope, call: fx.Node, value: fx.Node) -> dict[fx.Graph, fx.Node]:
    """Make `value` one more operand of the call; what it is in each body."""
    given = operands(call)
    assert given is not None  # otherwise they are sealed
    set_fixed(call, (*given.fixed, value))
    return {body.module.graph: body.append(value.name, value.meta) for body in outside.bodies[call]}


def leave_out(outside: Scope, call: fx.Node, position: int) -> tuple[list[fx.Node], fx.Node | None]:
    """Drop the operand at `position` if no body reads it, and it is always the same.

    Returns the placeholders that are gone, and the node that loses a reader.
    """
    given = operands(call)
    assert given is not None  # otherwise they are sealed
    varying, fixed = given
    at = position - len(varying)
    if at < 0 or any(body.is_read(position) for body in outside.bodies[call]):
        return [], None
    gone = [body.remove(position) for body in outside.bodies[call]]
    set_fixed(call, fixed[:at] + fixed[at + 1 :])
    return gone, fixed[at] if isinstance(fixed[at], fx.Node) else None


def scopes(module: fx.GraphModule) -> dict[fx.Graph, Scope]:
    """The graph of the module and those of all bodies below it, from the outside in."""
    names = Counter(part for _, part in module.named_modules(remove_duplicate=False))
    found = {module.graph: Scope(module)}
    pending = list(found.values())
    while pending:
        scope = pending.pop(0)
        for call in scope.module.graph.nodes:
            called = bodies(call) if isinstance(call.target, HigherOrderOperator) else {}
            is_shared = any(names[body] != 1 for body in called.values())
            sealed = scope.sealed or (_sealed(scope, call, called, is_shared) if called else None)
            for reader, body in called.items():
                if body.graph not in found:
                    label = f"{scope.label}.{reader.target}" if scope.label else str(reader.target)
                    found[body.graph] = Scope(body, call, label, sealed)
                    scope.bodies.setdefault(call, []).append(found[body.graph])
        pending += [body for inside in scope.bodies.values() for body in inside]
    return found


def _sealed(scope: Scope, call: fx.Node, called: Mapping[fx.Node, fx.GraphModule], is_shared: bool) -> Missed | None:
    """Why the bodies of the call, by the node that reads each, are to stay as they are.

    is_shared: whether a body has more than one name.
    """
    given = operands(call)
    targets = {reader.target for reader in called}
    uses = [node for node in scope.module.graph.find_nodes(op="get_attr") if node.target in targets]
    if str(call.target) == "wrap_with_autocast" and call.args[2]:
        reason = "it runs under torch.autocast, which decides in what type to compute"
        return Missed("body", reason, "optimize the model without autocast, in the type that it is to run in")
    count = -1 if given is None or call.kwargs else len(given.varying) + len(given.fixed)
    if any(len(placeholders(body.graph)) != count for body in called.values()):
        return Missed("body", f"it is in a body of {call.target}, and what is passed into that is not understood")
    if is_shared or len(uses) != len(called) or any(len(reader.users) != 1 for reader in called):
        return Missed("body", f"the body of {call.target} that it is in has other callers, too")
    if written_operands(call, None):
        return Missed("body", f"the body of {call.target} that it is in writes into what it is given")
    return None
