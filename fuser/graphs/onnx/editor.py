"""The objects of an ONNX graph that is edited: GraphSurgeon's nodes and tensors, and the scopes that they live in.

GraphSurgeon's own import goes through the nodes once: what a body reads before it is made, or defines again, it takes
for another value.  It also reads every constant's type and every declared shape, and keeps lists that search each
other at each change, comparing tensors by name and nodes by content.  So its objects are made here, node by node;
`Wiring` resolves the names and keeps the links, by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, SparseTensorProto, TensorProto
from onnx.helper import make_attribute
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.util.misc import convert_from_onnx_attr_type

DEFAULT_DOMAIN = ("", "ai.onnx")
"""The names under which the domain of the standard operators goes."""

OLDEST_OPSET = 7
"""Before opset 7 broadcasting and BatchNormalization meant something else."""


class Scope:
    """A graph with names of its own: the main graph, the body of an If/Loop/Scan, a local function.

    path: a prefix for names in it, empty for the main graph.
    owner: the node whose body it is.
    nodes: as they stood when the graph was last settled, and those that were erased.
    frozen: its names are not to be trusted, so nothing in it is read or edited.
    """

    def __init__(
        self,
        path: str,
        proto: GraphProto | FunctionProto,
        opset: int,
        parent: Scope | None = None,
        owner: Node | None = None,
    ) -> None:
        self.path, self.proto, self.opset = path, proto, opset
        self.parent, self.owner = parent, owner
        self.children: list[Scope] = []
        self.nodes: list[Node] = []
        self.outputs: list[Tensor] = []
        self.names: dict[str, Tensor] = {}
        self.frozen: bool = parent is not None and parent.frozen
        self.changed = False
        self.before: dict[int, list[Node]] = {}  # new nodes, to stand before the node of that id
        self.after: dict[int, list[Node]] = {}
        self.new_constants: list[Constant] = []
        self.dropped: set[str] = set()

    def lookup(self, name: str) -> Tensor | None:
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

    def with_new(self) -> Iterator[Node]:
        """The nodes with the new ones in their places."""
        for node in self.nodes:
            yield from self._with_new(node)

    def _with_new(self, node: Node) -> Iterator[Node]:
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


class Node(gs.Node):  # type: ignore[misc]
    """A node, and where it is.

    domain: None for the default one, however it is written.
    proto: the node in the carrier; None for a new one.
    touched: whether that is out of date, and `new_attributes` what of it is new.
    erased: whether the node is gone.
    bodies: of an If, a Loop or a Scan.
    """

    __setattr__ = object.__setattr__
    scope: Scope
    touched = False
    erased = False
    new_attributes: frozenset[str] = frozenset()
    bodies: tuple[Scope, ...] = ()

    def __init__(
        self,
        op: str,
        name: str = "",
        attrs: dict[str, Any] | None = None,
        domain: str | None = None,
        proto: NodeProto | None = None,
    ) -> None:
        self.op, self.name, self.domain, self.proto = op, name, domain, proto
        self.attrs: dict[str, Any] = {} if attrs is None else attrs
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []


class Tensor:
    """A value: who makes it, who reads it, and where.

    producer: the node that makes it, if one does.
    slots: the node of each input slot that reads it, by (id of the node, position), those in bodies included.
    public: who needs it under its very name: outputs, and captures where nothing may change.
    home: the scope that defines it; None where nobody makes it.
    known: whether its value is known before run time; see `KnownValues`.
    """

    __setattr__ = object.__setattr__
    producer: Node | None = None
    public: tuple[str, ...] = ()
    home: Scope | None = None
    known = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.slots: dict[tuple[int, int], Node] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def uses(self) -> list[tuple[Node, int]]:
        """(node, position) of each input slot that reads it."""
        return [(node, position) for (_, position), node in self.slots.items()]

    @property
    def is_needed(self) -> bool:
        """Whether anybody reads it."""
        return bool(self.slots or self.public)


class Variable(Tensor, gs.Variable):  # type: ignore[misc]
    """A value that is computed."""


class Constant(Tensor, gs.Constant):  # type: ignore[misc]
    """A stored value; it stays in the carrier.

    proto: None for a sparse one, which is not looked into.
    sizes: its shape.
    """

    def __init__(self, proto: TensorProto | SparseTensorProto) -> None:
        is_dense = isinstance(proto, TensorProto)
        super().__init__(proto.name if is_dense else proto.values.name)
        self.proto = proto if is_dense else None
        self.sizes = tuple(proto.dims[:])

    @property
    def _values(self) -> LazyValues:
        """Where GraphSurgeon looks for it when it exports a node that holds the constant."""
        return _InCarrier(self.proto)


class _InCarrier(LazyValues):  # type: ignore[misc]
    def __init__(self, tensor: TensorProto | None) -> None:
        self.tensor = tensor


AttributeRef = gs.Node.AttributeRef
"""The value of an attribute that the caller of a function decides."""

ABSENT = Variable("")
"""Stands for an optional operand or result that is left out."""


def import_node(proto: NodeProto, scope: Scope) -> Node:
    """The node of a scope, without its links and bodies."""
    domain = None if proto.domain in DEFAULT_DOMAIN else proto.domain
    attributes = {a.name: _value(a) for a in proto.attribute if a.type in _READ or a.ref_attr_name}
    node = Node(proto.op_type, proto.name, attributes, domain, proto)
    node.scope = scope
    return node


def export_node(node: Node, *, in_place: bool = False) -> NodeProto:
    """The node as it is to be written.

    in_place: bring the one in the carrier up to date, if there is one.
    """
    if node.proto is None:
        return OnnxExporter.export_node(node)  # type: ignore[no-any-return]
    if not node.touched:
        return node.proto
    proto = node.proto
    if not in_place:
        proto = NodeProto()
        proto.CopyFrom(node.proto)
    proto.op_type = node.op
    del proto.input[:], proto.output[:]
    proto.input.extend([tensor.name for tensor in node.inputs])
    proto.output.extend([tensor.name for tensor in node.outputs])
    if not node.new_attributes and len(proto.attribute) == len(node.attrs):
        return proto
    for attribute in [a for a in proto.attribute if a.name not in node.attrs and a.type in IN_EDITOR]:
        proto.attribute.remove(attribute)
    new = sorted(node.new_attributes & node.attrs.keys())  # another edit may have taken one away again
    for attribute in [a for a in proto.attribute if a.name in new]:
        proto.attribute.remove(attribute)
    proto.attribute.extend([make_attribute(name, node.attrs[name]) for name in new])
    return proto


def names_read(graph: GraphProto | FunctionProto) -> set[str]:
    """Every name that the graph or a body inside it reads, its own included."""
    names = {name for node in graph.node for name in node.input}
    if isinstance(graph, GraphProto):
        names |= {info.name for info in graph.output}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                for body in (attribute.g, *attribute.graphs):
                    names |= names_read(body)
    return names


def _value(attribute: AttributeProto) -> Any:
    if attribute.ref_attr_name:
        return AttributeRef(attribute.ref_attr_name, convert_from_onnx_attr_type(attribute.type))
    return _READ[attribute.type](attribute)


def _text(value: bytes) -> str | bytes:
    """Custom operators keep what they like in strings."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _texts(values: Iterable[bytes]) -> list[str | bytes]:
    return [_text(value) for value in values]


_READ: dict[int, Callable[[AttributeProto], Any]] = {
    AttributeProto.FLOAT: lambda a: a.f,
    AttributeProto.INT: lambda a: a.i,
    AttributeProto.STRING: lambda a: _text(a.s),
    AttributeProto.TENSOR: lambda a: Constant(a.t),
    AttributeProto.FLOATS: lambda a: a.floats[:],
    AttributeProto.INTS: lambda a: a.ints[:],
    AttributeProto.STRINGS: lambda a: _texts(a.strings),
}

IN_EDITOR = _READ.keys()
"""Kinds of attributes that a node of the editor holds; the others stay in the carrier alone."""
