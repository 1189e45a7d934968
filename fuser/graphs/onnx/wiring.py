"""Who defines a value, who reads it, and where: the index under the ONNX graph.

GraphSurgeon gives nodes and tensors their links, but compares tensors by name and nodes by content.  So
everything here is keyed by identity, and GraphSurgeon's own reader lists are brought up to date at `commit`
instead of being searched at each edit.  It also resolves names without regard to shadowing: a subgraph that
defines a name of an outer scope again is `frozen`, that is, left alone.
"""

from __future__ import annotations

import graphlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto

from fuser.errors import InputError
from fuser.graphs.onnx.importing import import_model, names_read


class Scope:
    """A graph with names of its own: the main graph, the body of an If/Loop/Scan, a local function.

    path: a prefix for names in it, empty for the main graph.
    owner: the node whose body it is.
    frozen: its names are not to be trusted, so nothing in it is read or edited.
    """

    def __init__(
        self,
        path: str,
        proto: GraphProto | FunctionProto,
        editor: Any,
        opset: int,
        parent: Scope | None = None,
        owner: gs.Node | None = None,
    ) -> None:
        self.path, self.proto, self.editor, self.opset = path, proto, editor, opset
        self.parent, self.owner = parent, owner
        self.children: list[Scope] = []
        self.names: dict[str, gs.Tensor] = {}
        self.frozen: bool = parent is not None and parent.frozen
        self.changed = False
        self.before: dict[int, list[gs.Node]] = {}  # new nodes, to stand before the node of that id
        self.after: dict[int, list[gs.Node]] = {}
        self.new_constants: list[gs.Constant] = []
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

    def nodes(self) -> Iterator[gs.Node]:
        """The editor's nodes with the new ones in their places."""
        if not self.before and not self.after:
            yield from self.editor.nodes
            return
        for node in self.editor.nodes:
            yield from self._with_new(node)

    def _with_new(self, node: gs.Node) -> Iterator[gs.Node]:
        """The node between the new ones beside it, which may have new ones beside them."""
        for new in self.before.get(id(node), ()):
            yield from self._with_new(new)
        yield node
        for new in self.after.get(id(node), ()):
            yield from self._with_new(new)

    def settle(self) -> None:
        """Let the editor have the new nodes."""
        if self.before or self.after:
            list.__setitem__(self.editor.nodes, slice(None), list(self.nodes()))
            self.before, self.after = {}, {}


class Wiring:
    """The links of a model, by identity, and the small edits that keep them right.

    order: the living nodes of all scopes, each made before it is read.
    unread: the initializers of the main graph that nobody has ever read and no caller can give, by name.

    Raises `InputError` for a model that is not a graph: cyclic, or with a value produced twice or not at all.
    """

    def __init__(self, model: onnx.ModelProto, dropped_inputs: Collection[str] = ()) -> None:
        self.editor = import_model(model)
        self.scopes: list[Scope] = []
        self.erased: dict[int, gs.Node] = {}
        self.touched: dict[int, gs.Node] = {}
        self.new_attributes: dict[int, set[str]] = {}
        self._scope: dict[int, Scope] = {}
        self._proto: dict[int, NodeProto] = {}
        self._home: dict[int, Scope] = {}
        self._uses: dict[int, dict[tuple[int, int], tuple[gs.Node, int]]] = {}
        self._public: dict[int, list[str]] = {}
        self._orphans: dict[int, gs.Tensor] = {}
        self._dirty: dict[int, gs.Tensor] = {}

        main = Scope("", model.graph, self.editor, _opset(model.opset_import))
        self._register(main)
        for output in model.graph.output:
            if main.lookup(output.name) is None and output.name not in initializer_names(model.graph):
                raise InputError(f"not a valid ONNX model: nothing makes the graph output {output.name!r}")
        for proto, function in zip(model.functions, self.editor.functions, strict=True):
            path = f"{proto.domain}:{proto.name}/" if proto.domain else f"{proto.name}/"
            self._register(Scope(path, proto, function, _opset(proto.opset_import) or main.opset))
        self.order = self._ordered()
        self.unread = [gs.Variable(name) for name in _unread_initializers(model, dropped_inputs)]

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
        return list(self._uses.get(id(tensor), {}).values())

    def public(self, tensor: gs.Tensor) -> list[str]:
        """Who needs the tensor under its very name: outputs, and captures where nothing may change."""
        return self._public.get(id(tensor), [])

    def is_read(self, node: gs.Node) -> bool:
        """Whether anybody reads an output of the node."""
        return any(self._uses.get(id(output)) or id(output) in self._public for output in node.outputs)

    def is_erased(self, node: gs.Node) -> bool:
        return id(node) in self.erased

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
            list.append(node.inputs, tensor)
            self._add_use(tensor, node, position)
        for tensor in outputs:
            list.append(node.outputs, tensor)
            list.__setitem__(tensor.inputs, slice(None), [node])

    def set_input(self, node: gs.Node, position: int, tensor: gs.Tensor) -> None:
        """Let the node read `tensor` at `position`, which may lie past its last operand."""
        while len(node.inputs) <= position:
            list.append(node.inputs, gs.Variable.empty())
        self._drop_use(node.inputs[position], node, position)
        list.__setitem__(node.inputs, position, tensor)
        self._add_use(tensor, node, position)
        self.touch(node)

    def set_output(self, node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let the node write `new` where it wrote `old`."""
        position = next(i for i, tensor in enumerate(node.outputs) if tensor is old)
        list.__setitem__(node.outputs, position, new)
        list.__setitem__(new.inputs, slice(None), [node])
        list.clear(old.inputs)
        self.adopt(self.scope(node), new)
        self.touch(node)

    def truncate_inputs(self, node: gs.Node, length: int) -> None:
        """Keep the first `length` operands."""
        for position in range(length, len(node.inputs)):
            self._drop_use(node.inputs[position], node, position)
        list.__delitem__(node.inputs, slice(length, None))
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
        scope.changed = True
        scope.dropped.update(output.name for output in node.outputs if not output.is_empty())
        self._dirty.update((id(output), output) for output in node.outputs)
        for position, tensor in enumerate(node.inputs):
            self._drop_use(tensor, node, position)
        for body in scope.children:
            if body.owner is node:
                for inner in body.nodes():
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
            if self._uses.get(key) or key in self._public or key in keep:
                continue
            if isinstance(tensor, gs.Constant):
                scope = self._home[key]
                scope.dropped.add(tensor.name)
                scope.changed = True
                continue
            node = tensor.inputs[0] if tensor.inputs else None
            if node is not None and not self.is_erased(node) and is_standard(node) and not self.is_read(node):
                self.erase(node)

    def settle(self) -> None:
        """Bring the order and GraphSurgeon's lists up to date; raises ValueError where the graph is broken."""
        for scope in self.scopes:
            scope.settle()
        self.order = [node for node in self._ordered() if not self.is_erased(node)]
        for tensor in self._dirty.values():
            readers = [node for node, _ in self.uses(tensor)]
            if any(self.is_erased(node) for node in readers):
                raise ValueError(f"{tensor.name!r} is read by a node that is gone")
            if readers and tensor.inputs and self.is_erased(tensor.inputs[0]):
                raise ValueError(f"{tensor.name!r} is read, but the node that made it is gone")
            list.__setitem__(tensor.outputs, slice(None), readers)
        self._dirty.clear()

    # -- registering

    def _register(self, scope: Scope) -> None:
        self.scopes.append(scope)
        self._define_names(scope)
        for proto, node in zip(scope.proto.node, scope.editor.nodes, strict=True):
            _reject_bytes(node.name)
            self._scope[id(node)], self._proto[id(node)] = scope, proto
        for proto, node in zip(scope.proto.node, scope.editor.nodes, strict=True):
            for position, tensor in enumerate(node.inputs):
                self._add_use(tensor, node, position)
            for attribute in proto.attribute:
                self._register_bodies(scope, node, attribute)
        self._publish_outputs(scope)
        self._dirty.clear()

    def _define_names(self, scope: Scope) -> None:
        produced = (tensor for node in scope.editor.nodes for tensor in node.outputs)
        for tensor in (*scope.editor.inputs, *_read_initializers(scope), *produced):
            if tensor.is_empty():
                continue
            _reject_bytes(tensor.name)
            if len(tensor.inputs) > 1:
                raise InputError(f"not a valid ONNX model: two nodes produce the value {tensor.name!r}")
            if scope.parent is not None and scope.parent.lookup(tensor.name) is not None:
                scope.frozen = True  # GraphSurgeon takes it for the outer value of that name
            self.adopt(scope, tensor)

    def _register_bodies(self, scope: Scope, node: gs.Node, attribute: AttributeProto) -> None:
        body = node.attrs.get(attribute.name)
        if attribute.type == AttributeProto.GRAPH and isinstance(body, gs.Graph):
            path = f"{scope.path}{node.name or node.outputs[0].name}/{attribute.name}/"
            child = Scope(path, attribute.g, body, scope.opset, scope, node)
            scope.children.append(child)
            self._register(child)
            if child.frozen:
                for name in names_read(child.proto):
                    self._publish(scope.lookup(name), f"captured inside {path[:-1]}")
        for graph in attribute.graphs:  # no standard operator has these; what they capture must stay
            for name in names_read(graph):
                self._publish(scope.lookup(name), f"captured inside {node.name or node.outputs[0].name}")

    def _publish_outputs(self, scope: Scope) -> None:
        for tensor in scope.editor.outputs:
            label = f"output {tensor.name!r} of {scope.path[:-1]}" if scope.path else f"graph output {tensor.name!r}"
            self._publish(scope.lookup(tensor.name), label)

    def _publish(self, tensor: gs.Tensor | None, label: str) -> None:
        if tensor is not None:
            self._public.setdefault(id(tensor), []).append(label)

    def _ordered(self) -> list[gs.Node]:
        captured = self._captured()
        return [node for scope in self.scopes for node in _topological(list(scope.nodes()), captured)]

    def _captured(self) -> dict[int, list[gs.Tensor]]:
        """What the bodies of a node read from outside of it, by the node's id."""
        captured: dict[int, list[gs.Tensor]] = {}
        for scope in self.scopes:
            if scope.owner is None:
                continue
            read = [tensor for node in scope.nodes() for tensor in node.inputs]
            for tensor in (*read, *scope.editor.outputs):
                home, outer = self.home(tensor), scope
                while outer is not home and outer.owner is not None and outer.parent is not None:
                    captured.setdefault(id(outer.owner), []).append(tensor)
                    outer = outer.parent
        return captured

    def _add_use(self, tensor: gs.Tensor, node: gs.Node, position: int) -> None:
        if not tensor.is_empty():
            self._uses.setdefault(id(tensor), {})[id(node), position] = (node, position)
            self._dirty[id(tensor)] = tensor

    def _drop_use(self, tensor: gs.Tensor, node: gs.Node, position: int) -> None:
        if tensor.is_empty():
            return
        uses = self._uses.get(id(tensor), {})
        uses.pop((id(node), position), None)
        self._dirty[id(tensor)] = tensor
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


def _reject_bytes(name: str | bytes) -> None:
    """Protobuf hands out bytes for a name that is not UTF-8; raises `InputError` for one."""
    if isinstance(name, bytes):
        raise InputError(f"not a valid ONNX model: the name {name!r} is not UTF-8")


def initializer_names(graph: GraphProto) -> set[str]:
    return {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}


def _unread_initializers(model: onnx.ModelProto, dropped_inputs: Collection[str]) -> list[str]:
    if model.training_info:  # which names initializers, too
        return []
    graph = model.graph
    annotated = {entry.value for note in graph.quantization_annotation for entry in note.quant_parameter_tensor_names}
    given = {info.name for info in graph.input}.difference(dropped_inputs)
    needed = names_read(graph) | given | annotated
    return [tensor.name for tensor in graph.initializer if tensor.name not in needed]


def _opset(imports: Sequence[onnx.OperatorSetIdProto]) -> int:
    return next((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), 0)


def _read_initializers(scope: Scope) -> Iterator[gs.Constant]:
    """The initializers that anybody reads, as the objects GraphSurgeon made of them."""
    if not isinstance(scope.proto, GraphProto):
        return
    names = initializer_names(scope.proto)
    graphs = [scope.editor, *_bodies(scope.editor.nodes)]
    seen: set[int] = set()
    for tensor in (tensor for graph in graphs for node in graph.nodes for tensor in node.inputs):
        if isinstance(tensor, gs.Constant) and tensor.name in names and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
    yield from (t for t in scope.editor.outputs if isinstance(t, gs.Constant) and id(t) not in seen)


def _bodies(nodes: Sequence[gs.Node]) -> Iterator[gs.Graph]:
    for node in nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield value
                yield from _bodies(value.nodes)


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
