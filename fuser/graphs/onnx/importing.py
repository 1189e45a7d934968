"""GraphSurgeon's nodes and tensors for what a model states.

GraphSurgeon's own import goes through the nodes once: what a body reads before it is made, or defines again, it takes
for another value.  It also reads every constant's type and every declared shape, and keeps lists that search each
other at each change.  So its objects are made here, node by node, and `Wiring` resolves the names and keeps the links.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, SparseTensorProto, TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.util.misc import convert_from_onnx_attr_type

from fuser.errors import InputError


class Node(gs.Node):  # type: ignore[misc]
    """A node whose links are plain lists; `Wiring` keeps both ends of each."""

    __setattr__ = object.__setattr__

    def __init__(self, op: str, name: str = "", attrs: dict[str, Any] | None = None, domain: str | None = None) -> None:
        self.op, self.name, self.domain = op, name, domain
        self.attrs: dict[str, Any] = {} if attrs is None else attrs
        self.inputs: list[gs.Tensor] = []
        self.outputs: list[gs.Tensor] = []


class Variable(gs.Variable):  # type: ignore[misc]
    """A value that is computed; what is known of its type and shape is kept by `KnownValues`."""

    __setattr__ = object.__setattr__

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[gs.Node] = []


class Constant(gs.Constant):  # type: ignore[misc]
    """A stored value; it stays in the carrier.

    proto: None for a sparse one, which is not looked into.
    """

    __setattr__ = object.__setattr__

    def __init__(self, proto: TensorProto | SparseTensorProto) -> None:
        is_dense = isinstance(proto, TensorProto)
        self.name: str = proto.name if is_dense else proto.values.name
        self.proto = proto if is_dense else None
        self.sizes = tuple(proto.dims)
        self.inputs: list[gs.Node] = []

    @property
    def _values(self) -> LazyValues:
        """Where GraphSurgeon looks for it when it exports a node that holds the constant."""
        return _InCarrier(self.proto)


class _InCarrier(LazyValues):  # type: ignore[misc]
    def __init__(self, tensor: TensorProto | None) -> None:
        self.tensor = tensor


ABSENT = Variable("")
"""Stands for an optional operand or result that is left out."""


def import_node(proto: NodeProto) -> Node:
    """The node without its links and bodies.  Raises `InputError` for names that are no text."""
    name = proto.name
    if isinstance(name, bytes):
        reject_bytes(name)
    domain = proto.domain if proto.HasField("domain") else None
    attributes = {a.name: _value(a) for a in proto.attribute if a.type in _READ or a.ref_attr_name}
    return Node(proto.op_type, name, attributes, domain)


def reject_bytes(name: str | bytes) -> None:
    """Protobuf hands out bytes for a name that is not UTF-8; raises `InputError` for one."""
    if isinstance(name, bytes):
        raise InputError(f"not a valid ONNX model: the name {name!r} is not UTF-8")


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
        return gs.Node.AttributeRef(attribute.ref_attr_name, convert_from_onnx_attr_type(attribute.type))
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
    AttributeProto.FLOATS: lambda a: list(a.floats),
    AttributeProto.INTS: lambda a: list(a.ints),
    AttributeProto.STRINGS: lambda a: _texts(a.strings),
}

IN_EDITOR = _READ.keys()
"""Kinds of attributes that a node of the editor holds; the others stay in the carrier alone."""
