"""The nodes of an fx graph and of the bodies in it: which are alive, what they stand for, and what an edit
leaves without readers.  It knows nothing of what a node means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, count
from typing import Any

import torch
from torch import fx, nn

from fuser.graphs.torch.bodies import operands
from fuser.graphs.torch.carriers import Carrier, attribute
from fuser.graphs.torch.meta import Meta
from fuser.graphs.torch.purity import uses
from fuser.graphs.torch.scopes import Scope, leave_out, pass_in, scopes


class Wiring:
    """order: all nodes in topological order, those of a body before the call that runs it."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.scopes = scopes(carrier.module)
        self.order = list(self._walk(carrier.module.graph))
        self._erased: set[fx.Node] = set()
        self._loose: list[fx.Node] = []  # nodes that have lost a reader
        self._left: set[str] = set()  # targets of modules that have lost a call
        self.meta = Meta(self.order)
        self._taken: set[str] | None = None
        self._sharers: dict[int, list[fx.Node]] | None = None

    def _walk(self, graph: fx.Graph) -> Iterator[fx.Node]:
        scope = self.scopes[graph]
        for node in graph.nodes:
            for body in scope.bodies.get(node, ()):
                yield from self._walk(body.module.graph)
            yield node

    # -- reading

    def is_erased(self, node: fx.Node) -> bool:
        return node in self._erased

    def alive(self) -> Iterator[fx.Node]:
        return (node for node in self.order if node not in self._erased)

    def scope(self, node: fx.Node) -> Scope:
        return self.scopes[node.graph]

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a call_module calls."""
        if node.op != "call_module":
            return None
        module = attribute(self.scope(node).module, str(node.target))
        assert isinstance(module, nn.Module)
        return module

    def origin(self, node: fx.Node) -> torch.Tensor | fx.Node | None:
        """The tensor that a leaf stands for, or the node outside that a placeholder of a body stands for."""
        if node.op not in ("placeholder", "get_attr"):
            return None
        scope = self.scope(node)
        if scope.call is None:
            return self.carrier.tensor(node)
        if node.op == "placeholder":
            return scope.operand(node)
        value = attribute(scope.module, str(node.target))
        return value if isinstance(value, torch.Tensor) else None

    def passes_in(self, call: fx.Node, value: fx.Node) -> bool:
        """Whether the call does nothing with the value but give it to bodies, for which a placeholder stands there."""
        bodies = self.scope(call).bodies.get(call, ())
        given = operands(call) if bodies and not any(body.sealed for body in bodies) else None
        return given is not None and given.fixed.count(value) == uses(call).count(value)

    def sharers(self, tensor: torch.Tensor) -> list[fx.Node]:
        """The nodes that stand for the tensor, and the calls of modules that hold it."""
        if self._sharers is None:
            self._sharers = {}
            for node in self.alive():
                self._note_sharer(node)
        found = self._sharers.get(id(tensor), ())
        return [node for node in found if node not in self._erased and any(t is tensor for t in self._held(node))]

    def _note_sharer(self, node: fx.Node) -> None:
        if self._sharers is not None:
            for tensor in self._held(node):
                self._sharers.setdefault(id(tensor), []).append(node)

    def _held(self, node: fx.Node) -> list[torch.Tensor]:
        module = self.called(node)
        if module is not None:
            return [
                tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None
            ]
        origin = self.origin(node)
        while isinstance(origin, fx.Node):
            origin = self.origin(origin)
        return [] if origin is None else [origin]

    # -- editing

    def call_own(self, node: fx.Node, module: nn.Module) -> None:
        """Let a call_module node call `module`, under a new name."""
        target = self.fresh(str(node.target))
        self.scope(node).module.add_submodule(target, module)
        self._left.add(str(node.target))
        node.target = target
        self._note_sharer(node)

    def new_constant(self, user: fx.Node, base: str, tensor: torch.Tensor) -> dict[fx.Graph, fx.Node]:
        """Nodes for `tensor`, by graph; `user` can read that of its own.  Into a body it is passed as operand."""
        call = self.scope(user).call
        if call is not None:
            outside = self.new_constant(call, base, tensor)
            made = {**outside, **pass_in(self.scope(call), call, outside[call.graph])}
        else:
            made = {user.graph: self.carrier.add(self.fresh(base), tensor, before=user)}
            self.meta.describe(made[user.graph], tensor)
        for node in made.values():
            self._note_sharer(node)
        return made

    def fresh(self, name: str) -> str:
        """A name that nothing has, so that an old state dict does not load over it."""
        if self._taken is None:
            self._taken = set(self.carrier.names())
        base = re.sub(r"_fused(_\d+)?$", "", name) + "_fused"
        fresh = next(x for x in chain([base], (f"{base}_{i}" for i in count(2))) if x not in self._taken)
        self._taken.add(fresh)
        return fresh

    def loosen(self, *nodes: fx.Node) -> None:
        """Note that the nodes may have lost a reader; `sweep` looks."""
        self._loose += nodes

    def erase(self, node: fx.Node) -> None:
        """Take a node that nobody reads out of the graph."""
        self._loose += node.all_input_nodes
        if node.op == "call_module":
            self._left.add(str(node.target))
        node.graph.erase_node(node)
        self._erased.add(node)

    def become(self, node: fx.Node, target: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Let the node call another function; its readers stay."""
        self._loose += node.all_input_nodes
        if node.op == "call_module":
            self._left.add(str(node.target))
        node.op, node.target, node.args, node.kwargs = "call_function", target, args, kwargs
        for key in ("original_aten", "torch_fn", "source_fn_stack"):
            node.meta.pop(key, None)

    def sweep(self, is_droppable: Callable[[fx.Node], bool]) -> None:
        """Drop what the edits have left without readers: operators that may be dropped, constants, modules."""
        orphans: dict[fx.Node, str] = {}
        while self._loose:
            node = self._loose.pop()
            if node in self._erased or node in orphans or node.users:
                continue
            scope = self.scope(node)
            if is_droppable(node):
                self.erase(node)
            elif scope.call is None and (target := self.carrier.target(node)) is not None:
                orphans[node] = target
            elif scope.call is not None and node.op == "placeholder":
                gone, outside = leave_out(self.scope(scope.call), scope.call, scope.position(node))
                self._erased.update(gone)
                self._loose += [outside] if outside is not None else []
        if orphans:
            orphans.update(self._siblings(orphans))
        for node in orphans:
            node.graph.erase_node(node)
            self._erased.add(node)
        if orphans or self._left:
            self.carrier.drop(orphans, self._left)
        self._left.clear()

    def _siblings(self, orphans: dict[fx.Node, str]) -> dict[fx.Node, str]:
        """Constants without readers in modules that have lost all others, such as `num_batches_tracked`."""
        paths = {target.rpartition(".")[0] for target in orphans.values()} - {""}
        rest: dict[str, dict[fx.Node, str]] = {}
        for node in self.carrier.module.graph.nodes:
            if node not in orphans and (target := self.carrier.target(node)) is not None:
                path = target.rpartition(".")[0]
                if path in paths:
                    rest.setdefault(path, {})[node] = target
        unread = (nodes for nodes in rest.values() if not any(node.users for node in nodes))
        return {node: target for nodes in unread for node, target in nodes.items()}

    def lint(self) -> None:
        """Raises ValueError, with one line, if a graph is not valid."""
        for scope in self.scopes.values():
            if scope.sealed:
                continue
            try:
                scope.module.graph.lint()
            except (RuntimeError, ValueError) as error:
                raise ValueError(str(error).split("\n", 1)[0]) from error
