"""Which values of an fx graph are known before run time, and what they are.

Known are the parameters and buffers that nothing writes into, and every deterministic expression of known
values: `aten.t(weight)`, the arithmetic of weight_norm, `aten.full`.  torch itself computes them, so the bits
are those of run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fuser.graphs.torch.purity import (
    has_hooks,
    is_deterministic,
    is_fresh,
    is_guard,
    is_known_module,
    is_watched,
    updated_buffers,
    written_operands,
)
from fuser.graphs.torch.values import is_readable

MAX_ELEMENTS = 2**28
"""No expression of more elements is computed ahead: an `expand` can ask for more memory than there is."""


class Constants:
    """What is known; kept up to date while the graph is edited.

    origin: the tensor that a leaf stands for; for an operand of a body the node outside; None for everything else.
    module: the module that a call_module calls.
    seen: the parameters and buffers whose numbers somebody has asked for, by identity.
    """

    def __init__(
        self,
        nodes: Iterable[fx.Node],
        origin: Callable[[fx.Node], torch.Tensor | fx.Node | None],
        module: Callable[[fx.Node], torch.nn.Module | None],
    ) -> None:
        self._origin = origin
        self._known: dict[fx.Node, bool] = {}
        self._written: set[int] = set()
        self._dirty: set[fx.Node] = set()
        self.seen: dict[int, torch.Tensor] = {}
        nodes = list(nodes)
        for node in nodes:
            self._known[node] = self._is_known(node)
        written = [operand for node in nodes for operand in written_operands(node, module(node))]
        written = [operand for operand in written if self._known[operand]]
        leaves = {leaf for operand in written for leaf in self.leaves(operand)}
        self._written = {memory(self._tensor(leaf)) for leaf in leaves}
        self._written.update(self._updated(nodes, module))
        self._dirty = self._sharing(written)
        if self._written or self._dirty:
            for node in nodes:
                self._known[node] = self._is_known(node)

    def is_known(self, node: fx.Node) -> bool:
        return self._known.get(node, False)

    def is_leaf(self, node: fx.Node) -> bool:
        """A parameter or a buffer, as opposed to an expression of them."""
        return self.is_known(node) and self._origin(node) is not None

    def is_written(self, tensor: torch.Tensor) -> bool:
        """Whether the graph writes into the tensor, so that it changes from run to run."""
        return memory(tensor) in self._written

    def _updated(self, nodes: Sequence[fx.Node], module: Callable[[fx.Node], torch.nn.Module | None]) -> set[int]:
        """The memory that called modules write by themselves.

        A hook may be a method of the whole model: every buffer that the graph reads is taken to be written, but for
        those of torch's own modules, which have a hook of their own if they are.
        """
        called = [part for node in nodes if (part := module(node)) is not None and not is_guard(part)]
        updated = {memory(buffer) for part in called for buffer in updated_buffers(part)}
        hooked = is_watched(nodes[-1].graph.owning_module)  # the outermost graph is the last
        if hooked or any(has_hooks(part) for top in called for part in top.modules()):
            torchs_own = {memory(buffer) for part in called if is_known_module(part) for buffer in part.buffers()}
            read = (self._origin(node) for node in nodes if node.op == "get_attr")
            buffers = (x for x in read if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter))
            updated |= set(map(memory, buffers)) - torchs_own
        return updated

    def _sharing(self, written: Iterable[fx.Node]) -> set[fx.Node]:
        """Known expressions that may be, or show, memory that is written: what was made on the way, and its views."""
        pending = [node for node in written if self._origin(node) is None]
        found = set(pending)
        while pending:
            node = pending.pop()
            sources = [] if is_fresh(node, None) else node.all_input_nodes
            views = [user for user in node.users if not is_fresh(user, None)]
            near = [other for other in (*sources, *views) if self._known.get(other) and self._origin(other) is None]
            pending += [other for other in near if other not in found]
            found.update(near)
        return found

    def learn(self, node: fx.Node) -> None:
        """Look again at a node whose operands have changed, and at what depends on it."""
        pending = [node]
        while pending:
            node = pending.pop()
            if not self._known.get(node, False) and self._is_known(node):
                self._known[node] = True
                pending += node.users

    def leaves(self, node: fx.Node) -> list[fx.Node]:
        """The parameters and buffers that a known value is made of."""
        found: dict[fx.Node, None] = {}
        pending, seen = [node], {node}
        while pending:
            node = pending.pop()
            origin = self._origin(node)
            if isinstance(origin, torch.Tensor):
                found[node] = None
            inputs = [origin] if isinstance(origin, fx.Node) else node.all_input_nodes
            pending += [operand for operand in inputs if operand not in seen]
            seen.update(inputs)
        return list(found)

    def tensors(self, node: fx.Node) -> list[torch.Tensor]:
        """The tensors of the leaves."""
        return [self._tensor(leaf) for leaf in self.leaves(node)]

    def value(self, node: fx.Node) -> Any:
        """The value of a known node, computed by torch where it is an expression."""
        values: dict[fx.Node, Any] = {}
        pending = [node]
        with torch.no_grad():
            while pending:
                top = pending[-1]
                origin = self._origin(top)
                inputs = [origin] if isinstance(origin, fx.Node) else [] if origin is not None else top.all_input_nodes
                missing = [operand for operand in inputs if operand not in values]
                if missing:
                    pending += missing
                    continue
                pending.pop()
                if isinstance(origin, fx.Node):
                    values[top] = values[origin]
                elif origin is None:
                    values[top] = _computed(top, values)
                else:
                    values[top] = self.look_at(origin)
        return values[node]

    def look_at(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor; from here on its numbers count as used."""
        self.seen[id(tensor)] = tensor
        return tensor

    def described(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, torch.Tensor]:
        """Shapes and types, as meta tensors, of what is known; `nodes` in topological order.  Computes no numbers."""
        found: dict[fx.Node, Any] = {}
        with torch.device("meta"), torch.no_grad():
            for node in filter(self.is_known, nodes):
                origin = self._origin(node)
                try:
                    if isinstance(origin, torch.Tensor):
                        found[node] = torch.empty_like(origin, device="meta")
                    else:
                        found[node] = found[origin] if isinstance(origin, fx.Node) else _computed(node, found)
                except Exception:  # of whatever needs numbers; it is computed when it is asked for
                    continue
        return {node: value for node, value in found.items() if isinstance(value, torch.Tensor)}

    def _tensor(self, leaf: fx.Node) -> torch.Tensor:
        tensor = self._origin(leaf)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _is_known(self, node: fx.Node) -> bool:
        origin = self._origin(node)
        if isinstance(origin, torch.Tensor):
            return is_readable(origin) and memory(origin) not in self._written
        if isinstance(origin, fx.Node):
            return self._known.get(origin, False)
        return (
            node not in self._dirty
            and all(self._known.get(operand, False) for operand in node.all_input_nodes)
            and is_deterministic(node)
            and _is_affordable(node)
        )


def memory(tensor: torch.Tensor) -> int:
    """Where its elements are; equal for views of one another."""
    try:
        place = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    except RuntimeError:  # of a tensor that only wraps others
        place = 0
    return place or id(tensor)


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _is_affordable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or _static(value.numel()) <= MAX_ELEMENTS


def _static(size: Any) -> int:
    """The size; a symbolic one never belongs to a known value."""
    return size if isinstance(size, int) else 0
