"""Who defines a value, who reads it, and where: the index under the ONNX graph.

GraphSurgeon compares tensors by name and nodes by content, so everything here is keyed by identity.  A subgraph that
defines a name of an outer scope again is `frozen`, that is, left alone: there, a name would not mean what it means
outside.
"""

from __future__ import annotations

import graphlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from heapq import merge
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto

from fuser.errors import InputError
from fuser.graphs.onnx.importing import ABSENT, Constant, Variable, import_node, names_read, reject_bytes


class Scope:
    """A graph with names of its own: the main graph, the body of an If/Loop/Scan, a local function.

    path: a prefix for names in it, empty for the main graph.
    owner: the node whose body it is.
    nodes: as they stood when the graph was last settled.
    frozen: its names are not to be trusted, so nothing in it is read or edited.
    """

    def __init__(
        self,
        path: str,
        proto: GraphProto | FunctionProto,
        opset: int,
        parent: Scope | None = None,
        owner: gs.Node | None = None,
    ) -> None:
        self.path, self.proto, self.opset = path, proto, opset
        self.parent, self.owner = parent, owner
        self.children: list[Scope] = []
        self.nodes: list[gs.Node] = []
        self.outputs: list[gs.Tensor] = []
        self.names: dict[str, gs.Tensor] = {}
        self.frozen: bool = parent is not None and parent.frozen
        self.changed = False
        self.before: dict[int, list[gs.Node]] = {}  # new nodes, to stand before the node of that id
        self.after: dict[int, list[gs.Node]] = {}
        self.new_constants: list[Constant] = []
        self.dropped: set[str] = set()

    def lookup(self, name: str) -> gs.Tensor | None:
        """The tensor that `name` means here."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None

    @property
    def in_function(self) -> bool:
        return isinstance(self.proto, FunctionProto) or (self.parent is not None and self.parent.in_function)

    def with_new(self) -> Iterator[gs.Node]:
        """The nodes with the new ones in their places."""
        for node in self.nodes:
            yield from self._with_new(node)

    def _with_new(self, node: gs.Node) -> Iterator[gs.Node]:
        """The node between the new ones beside it, which may have new ones beside them."""
        for new in self.before.get(id(node), ()):
            yield from self._with_new(new)
        yield node
        for new in self.after.get(id(node), ()):
            yield from self._with_new(new)

    def settle(self) -> None:
        """Put the new nodes in their places."""
        if self.before or self.after:
            self.nodes = list(self.with_new())
            self.before, self.after = {}, {}


class Wiring:
    """The links of a model, by identity, and the small edits that keep them right.

    order: the living nodes of all scopes, each made before it is read.
    unread: the initializers of the main graph that nobody has ever read and no caller can give, by name.

    Raises `InputError` for a model that is not a graph: cyclic, or with a value produced twice or not at all.
    """

    def __init__(self, model: onnx.ModelProto, dropped_inputs: Collection[str] = ()) -> None:
        self.scopes: list[Scope] = []
        self.erased: dict[int, gs.Node] = {}
        self.touched: dict[int, gs.Node] = {}
        self.new_attributes: dict[int, set[str]] = {}
        self._scope: dict[int, Scope] = {}
        self._proto: dict[int, NodeProto] = {}
        self._home: dict[int, Scope] = {}
        self._uses: dict[int, dict[tuple[int, int], gs.Node]] = {}
        self._public: dict[int, list[str]] = {}
        self._orphans: dict[int, gs.Tensor] = {}
        self._gone: list[gs.Node] = []  # since the graph was settled
        self._unmade: dict[str, gs.Tensor] = {}

        main = Scope("", model.graph, _opset(model.opset_import))
        self._register(main)
        for output in model.graph.output:
            if main.lookup(output.name) is None:
                raise InputError(f"not a valid ONNX model: nothing makes the graph output {output.name!r}")
        for proto in model.functions:
            path = f"{proto.domain}:{proto.name}/" if proto.domain else f"{proto.name}/"
            self._register(Scope(path, proto, _opset(proto.opset_import) or main.opset))
        self.order: list[gs.Node] = []
        self._places: dict[str, list[int]] = {}
        self._put_in_order()
        self.unread = self._unread_initializers(model, dropped_inputs)

    # -- reading

    def scope(self, node: gs.Node) -> Scope:
        return self._scope[id(node)]

    def proto(self, node: gs.Node) -> NodeProto | None:
        """The node in the carrier; None for a new one."""
        return self._proto.get(id(node))

    def home(self, tensor: gs.Tensor) -> Scope | None:
        """The scope that defines the tensor."""
        return self._home.get(id(tensor))

    def uses(self, tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
        """(node, position) of each input slot that reads the tensor, those in bodies included."""
        return [(node, position) for (_, position), node in self._uses.get(id(tensor), {}).items()]

    def public(self, tensor: gs.Tensor) -> list[str]:
        """Who needs the tensor under its very name: outputs, and captures where nothing may change."""
        return self._public.get(id(tensor), [])

    def is_needed(self, tensor: gs.Tensor) -> bool:
        """Whether anybody reads the tensor."""
        return bool(self._uses.get(id(tensor))) or id(tensor) in self._public

    def is_read(self, node: gs.Node) -> bool:
        """Whether anybody reads an output of the node."""
        return any(map(self.is_needed, node.outputs))

    def is_erased(self, node: gs.Node) -> bool:
        return id(node) in self.erased

    def of(self, operators: Iterable[str]) -> Iterator[gs.Node]:
        """The living nodes of these operators, in order; each is looked at when it is reached."""
        places = [self._places[operator] for operator in operators if operator in self._places]
        for place in merge(*places):
            if not self.is_erased(node := self.order[place]):
                yield node

    # -- editing

    def adopt(self, scope: Scope, tensor: gs.Tensor) -> None:
        """Make a new tensor known in `scope`."""
        scope.names[tensor.name] = tensor
        self._home[id(tensor)] = scope

    def insert(self, node: gs.Node, *, before: gs.Node | None = None, after: gs.Node | None = None) -> None:
        """Put a new node, linked to its tensors by `link`, beside a node of the same scope."""
        neighbour = before if before is not None else after
        assert neighbour is not None
        scope = self.scope(neighbour)
        places = scope.before if before is not None else scope.after
        places.setdefault(id(neighbour), []).append(node)
        self._scope[id(node)] = scope
        scope.changed = True

    def link(self, node: gs.Node, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor]) -> None:
        """Give a new node its operands and results."""
        for position, tensor in enumerate(inputs):
            node.inputs.append(tensor)
            self._add_use(tensor, node, position)
        for tensor in outputs:
            node.outputs.append(tensor)
            tensor.inputs[:] = [node]

    def set_input(self, node: gs.Node, position: int, tensor: gs.Tensor) -> None:
        """Let the node read `tensor` at `position`, which may lie past its last operand."""
        while len(node.inputs) <= position:
            node.inputs.append(ABSENT)
        self._drop_use(node.inputs[position], node, position)
        node.inputs[position] = tensor
        self._add_use(tensor, node, position)
        self.touch(node)

    def set_output(self, node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let the node write `new` where it wrote `old`."""
        position = next(i for i, tensor in enumerate(node.outputs) if tensor is old)
        node.outputs[position] = new
        new.inputs[:] = [node]
        old.inputs.clear()
        self.adopt(self.scope(node), new)
        self.touch(node)

    def truncate_inputs(self, node: gs.Node, length: int) -> None:
        """Keep the first `length` operands."""
        for position in range(length, len(node.inputs)):
            self._drop_use(node.inputs[position], node, position)
        del node.inputs[length:]
        self.touch(node)

    def set_attribute(self, node: gs.Node, name: str, value: Any) -> None:
        """Give the node an attribute in place of the one it has."""
        node.attrs[name] = value
        self.new_attributes.setdefault(id(node), set()).add(name)
        self.touch(node)

    def touch(self, node: gs.Node) -> None:
        """Remember that the node in the carrier is out of date."""
        self.touched[id(node)] = node
        self.scope(node).changed = True

    def erase(self, node: gs.Node) -> None:
        """Take the node, and the bodies it owns, out of the graph."""
        scope = self.scope(node)
        self.erased[id(node)] = node
        self._gone.append(node)
        scope.changed = True
        scope.dropped.update(output.name for output in node.outputs if not output.is_empty())
        for position, tensor in enumerate(node.inputs):
            self._drop_use(tensor, node, position)
        for body in scope.children:
            if body.owner is node:
                for inner in body.with_new():
                    if not self.is_erased(inner):
                        self.erase(inner)

    def drop_unread(self, tensor: gs.Tensor) -> None:
        """Drop one of `unread`."""
        main = self.scopes[0]
        main.dropped.add(tensor.name)
        main.changed = True

    def sweep(self, keep: dict[int, gs.Tensor]) -> None:
        """Drop what the edits orphaned: constants without readers, and nodes that only fed what is gone."""
        while self._orphans:
            key, tensor = self._orphans.popitem()
            if key in keep or self.is_needed(tensor):
                continue
            if isinstance(tensor, Constant):
                scope = self._home[key]
                scope.dropped.add(tensor.name)
                scope.changed = True
                continue
            node = tensor.inputs[0] if tensor.inputs else None
            if node is not None and not self.is_erased(node) and is_standard(node) and not self.is_read(node):
                self.erase(node)

    def settle(self) -> None:
        """Bring the order up to date; raises ValueError where the graph is broken."""
        for scope in self.scopes:
            scope.settle()
        for node in self._gone:
            for position, tensor in enumerate(node.inputs):
                if (id(node), position) in self._uses.get(id(tensor), ()):
                    raise ValueError(f"{tensor.name!r} is read by a node that is gone")
            for output in node.outputs:
                if output.inputs and output.inputs[0] is node and self._uses.get(id(output)):
                    raise ValueError(f"{output.name!r} is read, but the node that made it is gone")
        self._gone.clear()
        self._put_in_order()

    def _put_in_order(self) -> None:
        captured = self._captured()
        self.order = [
            node for scope in self.scopes for node in _topological(scope.nodes, captured) if not self.is_erased(node)
        ]
        self._places = {}
        for place, node in enumerate(self.order):
            self._places.setdefault(node.op, []).append(place)

    # -- registering

    def _register(self, scope: Scope) -> None:
        self.scopes.append(scope)
        scope.nodes = [import_node(proto) for proto in scope.proto.node]
        self._define_names(scope)
        for proto, node in zip(scope.proto.node, scope.nodes, strict=True):
            self._scope[id(node)], self._proto[id(node)] = scope, proto
            for position, name in enumerate(proto.input):
                tensor = self._meant(scope, name)
                node.inputs.append(tensor)
                self._add_use(tensor, node, position)
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
            for name in proto.output:
                output = scope.names.get(name) if name else ABSENT
                if output is None:
                    self._define(scope, output := Variable(name))
                node.outputs.append(output)
                if output is ABSENT:
                    continue
                if output.inputs:
                    raise InputError(f"not a valid ONNX model: two nodes produce the value {name!r}")
                output.inputs.append(node)

    def _define(self, scope: Scope, tensor: gs.Tensor) -> None:
        reject_bytes(tensor.name)
        if scope.parent is not None and scope.parent.lookup(tensor.name) is not None:
            scope.frozen = True  # outside, the name means something else
        self.adopt(scope, tensor)

    def _meant(self, scope: Scope, name: str) -> gs.Tensor:
        """What a node reads under that name; what nobody makes is for the runtime to refuse."""
        if not name:
            return ABSENT
        tensor = scope.lookup(name)
        return self._unmade.setdefault(name, Variable(name)) if tensor is None else tensor

    def _register_bodies(self, scope: Scope, node: gs.Node, attribute: AttributeProto) -> None:
        if attribute.type == AttributeProto.GRAPH and not attribute.ref_attr_name:
            path = f"{scope.path}{_label(node)}/{attribute.name}/"
            child = Scope(path, attribute.g, scope.opset, scope, node)
            scope.children.append(child)
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

    def _publish(self, tensor: gs.Tensor | None, label: str) -> None:
        if tensor is not None:
            self._public.setdefault(id(tensor), []).append(label)

    def _unread_initializers(self, model: onnx.ModelProto, dropped_inputs: Collection[str]) -> list[gs.Tensor]:
        if model.training_info:  # which names initializers, too
            return []
        graph, main = model.graph, self.scopes[0]
        kept = {entry.value for note in graph.quantization_annotation for entry in note.quant_parameter_tensor_names}
        kept |= {info.name for info in graph.input}.difference(dropped_inputs)
        stored = (main.names[tensor.name] for tensor in graph.initializer if tensor.name not in kept)
        return [tensor for tensor in stored if not self.is_needed(tensor)]

    def _captured(self) -> dict[int, list[gs.Tensor]]:
        """What the bodies of a node read from outside of it, by the node's id."""
        captured: dict[int, list[gs.Tensor]] = {}
        for scope in self.scopes:
            if scope.owner is None:
                continue
            read = [tensor for node in scope.nodes for tensor in node.inputs]
            for tensor in (*read, *scope.outputs):
                home, outer = self.home(tensor), scope
                while outer is not home and outer.owner is not None and outer.parent is not None:
                    captured.setdefault(id(outer.owner), []).append(tensor)
                    outer = outer.parent
        return captured

    def _add_use(self, tensor: gs.Tensor, node: gs.Node, position: int) -> None:
        if tensor is not ABSENT:
            self._uses.setdefault(id(tensor), {})[id(node), position] = node

    def _drop_use(self, tensor: gs.Tensor, node: gs.Node, position: int) -> None:
        if tensor is ABSENT:
            return
        uses = self._uses.get(id(tensor), {})
        uses.pop((id(node), position), None)
        if not uses:
            self._orphans[id(tensor)] = tensor


def is_standard(node: gs.Node) -> bool:
    """Whether the node is of the default domain; what a custom operator does is its own affair."""
    return node.domain in (None, "", "ai.onnx")


def operator(node: gs.Node | None) -> str:
    """The operator of the default domain that the node is; empty for one of another domain, and for no node."""
    return str(node.op) if node is not None and is_standard(node) else ""


def has_references(node: gs.Node) -> bool:
    """Whether an attribute is decided by the caller of the function that the node is in."""
    return any(isinstance(value, gs.Node.AttributeRef) for value in node.attrs.values())


def initializer_names(graph: GraphProto) -> set[str]:
    return {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}


def _opset(imports: Sequence[onnx.OperatorSetIdProto]) -> int:
    return next((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), 0)


def _names(values: Iterable[onnx.ValueInfoProto | str]) -> Iterator[str]:
    """Of the inputs or outputs of a graph, which have types, or of a function, which have none."""
    return (value if isinstance(value, str) else value.name for value in values)


def _label(node: gs.Node) -> str:
    return str(node.name or (node.outputs[0].name if node.outputs else node.op))


def _topological(nodes: list[gs.Node], captured: Mapping[int, Sequence[gs.Tensor]]) -> list[gs.Node]:
    """The nodes in an order in which each is made before it is read; mostly the one they have.

    captured: what a node reads beside its inputs, by its id.
    """
    mine = {id(node): node for node in nodes}
    ahead = set(mine)  # what is not made yet
    for node in nodes:
        for tensor in (*node.inputs, *captured.get(id(node), ())):
            if tensor.inputs and not ahead.isdisjoint(map(id, tensor.inputs)):
                break
        else:
            ahead.remove(id(node))
            continue
        break
    else:
        return nodes
    needs = {
        id(node): [
            id(producer)
            for tensor in (*node.inputs, *captured.get(id(node), ()))
            for producer in tensor.inputs
            if id(producer) in mine
        ]
        for node in nodes
    }
    try:
        return [mine[key] for key in graphlib.TopologicalSorter(needs).static_order()]
    except graphlib.CycleError as error:
        names = ", ".join(repr(mine[key].outputs[0].name) for key in error.args[1][:3])
        raise InputError(f"not a valid ONNX model: these values depend on each other in a circle: {names}") from error
