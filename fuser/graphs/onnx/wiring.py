"""Who defines a value, who reads it, and where: the index under the ONNX graph.

Nodes and tensors are told apart by identity.  A subgraph that defines a name of an outer scope again is `frozen`, that
is, left alone: there, a name would not mean what it means outside.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto

from fuser.errors import InputError
from fuser.graphs.onnx.editor import (
    ABSENT,
    DEFAULT_DOMAIN,
    AttributeRef,
    Constant,
    Node,
    Scope,
    Tensor,
    Variable,
    import_node,
    names_read,
)


class Wiring:
    """The links of a model, by identity, and the small edits that keep them right.

    order: the living nodes of all scopes, each made before it is read.
    unread: the initializers of the main graph that nobody has ever read and no caller can give.
    freeze_inputs: no caller can give those that are also inputs.

    Raises `InputError` for a model that is not a graph: cyclic, or with a value produced twice or not at all.
    """

    def __init__(self, model: onnx.ModelProto, *, freeze_inputs: bool = False) -> None:
        self.scopes: list[Scope] = []
        self._orphans: dict[int, Tensor] = {}
        self._gone: list[Node] = []  # since the graph was settled

        if not model.graph.output:
            raise InputError("not a valid ONNX model: it has no outputs")
        main = Scope("", model.graph, _opset(model.opset_import))
        self._register(main)
        for output in model.graph.output:
            if main.lookup(output.name) is None:
                raise InputError(f"not a valid ONNX model: nothing makes the graph output {output.name!r}")
        for proto in model.functions:
            path = f"{proto.domain}:{proto.name}/" if proto.domain else f"{proto.name}/"
            self._register(Scope(path, proto, _opset(proto.opset_import) or main.opset))
        self.order: list[Node] = []
        self._places: dict[str, list[int]] = {}
        self._put_in_order()
        self.unread = self._unread_initializers(model, freeze_inputs)

    # -- reading

    def is_read(self, node: Node) -> bool:
        """Whether anybody reads an output of the node."""
        return any(output.is_needed for output in node.outputs)

    def of(self, operators: Iterable[str]) -> Iterator[Node]:
        """The living nodes that were of these operators when the graph was last settled, in order.

        Whether one lives is asked when it is reached.
        """
        places = [self._places[operator] for operator in operators if operator in self._places]
        for place in merge(*places):
            if not (node := self.order[place]).erased:
                yield node

    # -- editing

    def adopt(self, scope: Scope, tensor: Tensor) -> None:
        """Make a new tensor known in `scope`."""
        scope.names[tensor.name] = tensor
        tensor.home = scope

    def insert(self, node: Node, *, before: Node | None = None, after: Node | None = None) -> None:
        """Put a new node, linked to its tensors by `link`, beside a node of the same scope."""
        neighbour = before if before is not None else after
        assert neighbour is not None
        scope = neighbour.scope
        places = scope.before if before is not None else scope.after
        places.setdefault(id(neighbour), []).append(node)
        node.scope = scope
        scope.changed = True

    def link(self, node: Node, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Give a new node its operands and results."""
        for position, tensor in enumerate(inputs):
            node.inputs.append(tensor)
            self._add_use(tensor, node, position)
        for tensor in outputs:
            node.outputs.append(tensor)
            tensor.producer = node

    def set_input(self, node: Node, position: int, tensor: Tensor) -> None:
        """Let the node read `tensor` at `position`, which may lie past its last operand."""
        while len(node.inputs) <= position:
            node.inputs.append(ABSENT)
        self._drop_use(node.inputs[position], node, position)
        node.inputs[position] = tensor
        self._add_use(tensor, node, position)
        self.touch(node)

    def set_output(self, node: Node, old: Tensor, new: Tensor) -> None:
        """Let the node write `new` where it wrote `old`."""
        position = next(i for i, tensor in enumerate(node.outputs) if tensor is old)
        node.outputs[position] = new
        new.producer, old.producer = node, None
        self.adopt(node.scope, new)
        self.touch(node)

    def truncate_inputs(self, node: Node, length: int) -> None:
        """Keep the first `length` operands."""
        for position in range(length, len(node.inputs)):
            self._drop_use(node.inputs[position], node, position)
        del node.inputs[length:]
        self.touch(node)

    def set_attribute(self, node: Node, name: str, value: Any) -> None:
        """Give the node an attribute in place of the one it has."""
        node.attrs[name] = value
        node.new_attributes = node.new_attributes | {name}
        self.touch(node)

    def touch(self, node: Node) -> None:
        """Remember that the node in the carrier is out of date."""
        node.touched = True
        node.scope.changed = True

    def erase(self, node: Node) -> None:
        """Take the node, and the bodies it owns, out of the graph."""
        scope = node.scope
        node.erased = True
        self._gone.append(node)
        scope.changed = True
        scope.dropped.update(output.name for output in node.outputs if output is not ABSENT)
        for position, tensor in enumerate(node.inputs):
            self._drop_use(tensor, node, position)
        for body in node.bodies:
            for inner in body.with_new():
                if not inner.erased:
                    self.erase(inner)

    def drop_unread(self, tensor: Tensor) -> None:
        """Drop one of `unread`."""
        main = self.scopes[0]
        main.dropped.add(tensor.name)
        main.changed = True

    def sweep(self, keep: dict[int, Tensor]) -> None:
        """Drop what the edits orphaned: constants without readers, and nodes that only fed what is gone."""
        while self._orphans:
            key, tensor = self._orphans.popitem()
            if key in keep or tensor.is_needed:
                continue
            if isinstance(tensor, Constant):
                scope = tensor.home
                assert scope is not None
                scope.dropped.add(tensor.name)
                scope.changed = True
                continue
            node = tensor.producer
            if node is not None and not node.erased and is_standard(node) and not self.is_read(node):
                self.erase(node)

    def settle(self) -> None:
        """Bring the order up to date; raises ValueError where the graph is broken."""
        for scope in self.scopes:
            scope.settle()
        for node in self._gone:
            for position, tensor in enumerate(node.inputs):
                if (id(node), position) in tensor.slots:
                    raise ValueError(f"{tensor.name!r} is read by a node that is gone")
            for output in node.outputs:
                if output.slots and output.producer is node:
                    raise ValueError(f"{output.name!r} is read, but the node that made it is gone")
        self._gone.clear()
        self._put_in_order()

    def _put_in_order(self) -> None:
        captured = self._captured()
        self.order = [node for scope in self.scopes for node in _topological(scope.nodes, captured) if not node.erased]
        self._places = {}
        for place, node in enumerate(self.order):
            self._places.setdefault(node.op, []).append(place)

    # -- registering

    def _register(self, scope: Scope) -> None:
        self.scopes.append(scope)
        scope.nodes = [import_node(proto, scope) for proto in scope.proto.node]
        self._define_names(scope)
        for proto, node in zip(scope.proto.node, scope.nodes, strict=True):
            for position, name in enumerate(proto.input[:]):
                tensor = self._meant(scope, name, node)
                node.inputs.append(tensor)
                self._add_use(tensor, node, position)
            if len(node.attrs) < len(proto.attribute):  # some hold graphs
                for attribute in proto.attribute:
                    self._register_bodies(scope, node, attribute)
        self._publish_outputs(scope)

    def _define_names(self, scope: Scope) -> None:
        if isinstance(scope.proto, GraphProto):
            for tensor in (*scope.proto.initializer, *scope.proto.sparse_initializer):
                self._define(scope, Constant(tensor))
        for name in _names(scope.proto.input):
            if name not in scope.names:  # before IR 4, and where a caller may replace it, it is an initializer, too
                self._define(scope, Variable(name))
        for proto, node in zip(scope.proto.node, scope.nodes, strict=True):
            for name in proto.output[:]:
                if not name:
                    node.outputs.append(ABSENT)
                    continue
                if name in scope.names:
                    raise InputError(f"not a valid ONNX model: the value {name!r} is made twice")
                self._define(scope, output := Variable(name))
                node.outputs.append(output)
                output.producer = node

    def _define(self, scope: Scope, tensor: Tensor) -> None:
        if scope.parent is not None and scope.parent.lookup(tensor.name) is not None:
            scope.frozen = True  # outside, the name means something else
        self.adopt(scope, tensor)

    def _meant(self, scope: Scope, name: str, reader: Node) -> Tensor:
        """What a node reads under that name."""
        if not name:
            return ABSENT
        tensor = scope.lookup(name)
        if tensor is None:
            raise InputError(f"not a valid ONNX model: nothing makes {name!r}, which {_label(reader)!r} reads")
        return tensor

    def _register_bodies(self, scope: Scope, node: Node, attribute: AttributeProto) -> None:
        if attribute.type == AttributeProto.GRAPH and not attribute.ref_attr_name:
            path = f"{scope.path}{_label(node)}/{attribute.name}/"
            child = Scope(path, attribute.g, scope.opset, scope, node)
            scope.children.append(child)
            node.bodies += (child,)
            self._register(child)
            if child.frozen:
                for name in names_read(child.proto):
                    self._publish(scope.lookup(name), f"captured inside {path[:-1]}")
        for graph in attribute.graphs:  # no standard operator has these; what they capture must stay
            for name in names_read(graph):
                self._publish(scope.lookup(name), f"captured inside {_label(node)}")

    def _publish_outputs(self, scope: Scope) -> None:
        for name in _names(scope.proto.output):
            label = f"output {name!r} of {scope.path[:-1]}" if scope.path else f"graph output {name!r}"
            if (tensor := scope.lookup(name)) is not None:
                scope.outputs.append(tensor)
                self._publish(tensor, label)

    def _publish(self, tensor: Tensor | None, label: str) -> None:
        if tensor is not None:
            tensor.public += (label,)

    def _unread_initializers(self, model: onnx.ModelProto, freeze_inputs: bool) -> list[Tensor]:
        if model.training_info:  # which names initializers, too
            return []
        graph = model.graph
        kept = {entry.value for note in graph.quantization_annotation for entry in note.quant_parameter_tensor_names}
        if not freeze_inputs:
            kept.update(info.name for info in graph.input)
        unread = [tensor for tensor in self.scopes[0].names.values() if not tensor.is_needed]
        return [t for t in unread if isinstance(t, Constant) and t.proto is not None and t.name not in kept]

    def _captured(self) -> dict[int, list[Tensor]]:
        """What the bodies of a node read from outside of it, by the node's id."""
        captured: dict[int, list[Tensor]] = {}
        for scope in self.scopes:
            if scope.owner is None:
                continue
            read = [tensor for node in scope.nodes for tensor in node.inputs]
            for tensor in (*read, *scope.outputs):
                home, outer = tensor.home, scope
                while outer is not home and outer.owner is not None and outer.parent is not None:
                    captured.setdefault(id(outer.owner), []).append(tensor)
                    outer = outer.parent
        return captured

    def _add_use(self, tensor: Tensor, node: Node, position: int) -> None:
        if tensor is not ABSENT:
            tensor.slots[id(node), position] = node

    def _drop_use(self, tensor: Tensor, node: Node, position: int) -> None:
        if tensor is ABSENT:
            return
        tensor.slots.pop((id(node), position), None)
        if not tensor.slots:
            self._orphans[id(tensor)] = tensor


def is_standard(node: Node) -> bool:
    """Whether the node is of the default domain; what a custom operator does is its own affair."""
    return node.domain is None


def operator(node: Node | None) -> str:
    """The operator of the default domain that the node is; empty for one of another domain, and for no node."""
    return str(node.op) if node is not None and is_standard(node) else ""


def has_references(node: Node) -> bool:
    """Whether an attribute is decided by the caller of the function that the node is in."""
    return any(isinstance(value, AttributeRef) for value in node.attrs.values())


def _opset(imports: Sequence[onnx.OperatorSetIdProto]) -> int:
    return next((entry.version for entry in imports if entry.domain in DEFAULT_DOMAIN), 0)


def _names(values: Iterable[onnx.ValueInfoProto | str]) -> Iterator[str]:
    """Of the inputs or outputs of a graph, which have types, or of a function, which have none."""
    return (value if isinstance(value, str) else value.name for value in values)


def _label(node: Node) -> str:
    return str(node.name or (node.outputs[0].name if node.outputs else node.op))


def _topological(nodes: list[Node], captured: Mapping[int, Sequence[Tensor]]) -> list[Node]:
    """The nodes in an order in which each is made before it is read; mostly the one they have.

    captured: what a node reads beside its inputs, by its id.
    """
    if _are_in_order(nodes, captured):
        return nodes
    mine = {id(node): node for node in nodes}
    needs = {
        id(node): [
            id(tensor.producer) for tensor in (*node.inputs, *captured.get(id(node), ())) if id(tensor.producer) in mine
        ]
        for node in nodes
    }
    try:
        return [mine[key] for key in graphlib.TopologicalSorter(needs).static_order()]
    except graphlib.CycleError as error:
        names = ", ".join(repr(mine[key].outputs[0].name) for key in error.args[1][:3])
        raise InputError(f"not a valid ONNX model: these values depend on each other in a circle: {names}") from error


def _are_in_order(nodes: list[Node], captured: Mapping[int, Sequence[Tensor]]) -> bool:
    ahead = set(map(id, nodes))
    for node in nodes:
        for tensor in (*node.inputs, *captured.get(id(node), ())) if captured else node.inputs:
            if tensor.producer is not None and id(tensor.producer) in ahead:
                return False
        ahead.remove(id(node))
    return True
