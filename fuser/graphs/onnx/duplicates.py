"""What an ONNX model computes or stores more than once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from onnx import TensorProto

from fuser.files import ModelFile
from fuser.graphs.onnx.editor import ABSENT, IN_EDITOR, Constant, Node, Tensor, export_node
from fuser.graphs.onnx.wiring import Wiring, is_standard, operator

T = TypeVar("T")

_NEVER_TWINS = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli Dropout "
    # A runtime fuses it into its reader, so each reader wants its own.
    "DequantizeLinear "
    # Compared by what they hold.
    "Constant".split()
)


def duplicate_nodes(wiring: Wiring) -> Iterator[tuple[Node, Node]]:
    """(node, an earlier one in its scope that computes the same); each node is looked at when it is reached."""
    first: dict[Hashable, Node] = {}
    alike: dict[Hashable, dict[Hashable, Node]] = {}  # where a call is made more than once: by the attributes
    for node in wiring.order:
        if node.erased or node.op in _NEVER_TWINS or not is_standard(node) or node.scope.frozen:
            continue
        if any(tensor.known and tensor.producer is None and len(tensor.slots) == 1 for tensor in node.inputs):
            continue  # a twin would read the same initializers
        call = _call(node)
        if (other := first.setdefault(call, node)) is node:
            continue
        if call not in alike:
            alike[call] = {_attributes(other): other}
        attributes = _attributes(node)
        if attributes is not None and (twin := alike[call].setdefault(attributes, node)) is not node:
            yield node, twin


def _call(node: Node) -> Hashable:
    """What is called on which operands, for which outputs."""
    operands = [0 if tensor is ABSENT else id(tensor) for tensor in node.inputs]
    while operands and not operands[-1]:
        operands.pop()
    return node.op, id(node.scope), tuple(operands), tuple(output is ABSENT for output in node.outputs)


def _attributes(node: Node) -> Hashable:
    """The attributes by name, as bytes: a float equals another by its bits.  None for a node with a body."""
    if node.proto is not None and any(attribute.type not in IN_EDITOR for attribute in node.proto.attribute):
        return None
    found = export_node(node).attribute
    return frozenset((attribute.name, attribute.SerializeToString(deterministic=True)) for attribute in found)


SHORT = 64
"""Bytes that are no more than a hash of them."""


class DuplicateConstants:
    """Finds constants of one type, shape and content; what was hashed once is not read again, but for short ones.

    A tensor is only read where another has its type and shape, and only as a whole where another begins as it does.
    """

    def __init__(self, model: ModelFile, wiring: Wiring) -> None:
        self._model, self._wiring = model, wiring
        self._hashes: dict[tuple[int, bool], bytes] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(constant, an equal one that is there wherever it is)."""
        keys: Sequence[Callable[[Tensor], Hashable]] = (self._form, self._beginning, self._content)
        groups: list[list[Tensor]] = [list(self._stored())]
        for key in keys:
            groups = [part for group in groups for part in _parts(group, key) if len(part) > 1]
        for group in groups:
            kept: dict[int, Tensor] = {}
            for tensor in group:
                twin = self._visible(kept, tensor)
                if twin is None:
                    kept[id(tensor.home)] = tensor
                else:
                    yield tensor, twin

    def _stored(self) -> Iterator[Tensor]:
        """Initializers, those that are outputs first as their names have to stay, and what Constant nodes make."""
        defined = (tensor for scope in self._wiring.scopes for tensor in scope.names.values())
        initializers = [tensor for tensor in defined if tensor.producer is None]
        nodes = [node for node in self._wiring.order if operator(node) == "Constant" and not node.erased]
        yield from filter(self._is_candidate, sorted(initializers, key=lambda t: not t.public))
        yield from filter(self._is_candidate, (node.outputs[0] for node in nodes))

    def _is_candidate(self, tensor: Tensor) -> bool:
        home = tensor.home
        return tensor.known and tensor.is_needed and home is not None and not home.frozen

    def _visible(self, kept: Mapping[int, Tensor], tensor: Tensor) -> Tensor | None:
        """What of `kept`, by scope, can be read where `tensor` is: initializers are there in bodies, too."""
        scope = tensor.home
        twin = kept.get(id(scope))
        while twin is None and scope is not None:
            scope = scope.parent
            outer = kept.get(id(scope))
            twin = outer if outer is not None and outer.producer is None else None
        return twin

    def _holder(self, tensor: Tensor) -> Constant | None:
        """What holds the values; a Constant node may also state them as numbers."""
        stored = tensor if tensor.producer is None else tensor.producer.attrs.get("value")
        return stored if isinstance(stored, Constant) else None

    def _form(self, tensor: Tensor) -> Hashable:
        stored = self._holder(tensor)
        if stored is None or stored.proto is None or stored.proto.data_type == TensorProto.STRING:
            return id(tensor)
        return stored.proto.data_type, stored.sizes

    def _beginning(self, tensor: Tensor) -> bytes:
        return self._hash(tensor, whole=False)

    def _content(self, tensor: Tensor) -> bytes:
        return self._hash(tensor, whole=True)

    def _hash(self, tensor: Tensor, whole: bool) -> bytes:
        key, holder = (id(tensor), whole), self._holder(tensor)
        if key not in self._hashes:
            assert holder is not None and holder.proto is not None  # otherwise no other has its form
            pieces = self._model.pieces(holder.proto)
            first = next(pieces, b"")
            if len(first) <= SHORT:
                return bytes(first)
            digest = hashlib.blake2b(first, digest_size=32)
            for piece in pieces if whole else ():
                digest.update(piece)
            self._hashes[key] = digest.digest()
        return self._hashes[key]


def _parts(items: Iterable[T], key: Callable[[T], Hashable]) -> Iterable[list[T]]:
    """The items with equal keys, in their order."""
    parts: dict[Hashable, list[T]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return parts.values()
