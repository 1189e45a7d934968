"""Write the edits back into the ModelProto that was loaded: what was not touched keeps its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from google.protobuf.message import Message
from onnx import GraphProto, NodeProto

from fuser.graphs.onnx.editor import Scope, export_node
from fuser.graphs.onnx.wiring import Wiring

ORIGIN = "fuser.folded"
"""The metadata key under which a node names what was folded into it."""

_NODE_METADATA_SINCE_IR = 10
_INITIALIZERS_NEED_NO_INPUT_SINCE_IR = 4


def patch(
    model: onnx.ModelProto, wiring: Wiring, origins: Mapping[int, Sequence[str]], removed_inputs: set[str]
) -> None:
    """Bring `model` up to date with the edits.

    origins: for a node (by id), the names of what was folded into it.
    removed_inputs: inputs of the main graph that go, though their initializers stay.
    """
    for scope in reversed(wiring.scopes):  # bodies before the nodes that hold them, which are copied then
        if scope.changed:
            _patch_nodes(scope, origins, model.ir_version)
            if isinstance(scope.proto, GraphProto):
                is_main = scope is wiring.scopes[0]
                _patch_tensors(scope, scope.proto, removed_inputs if is_main else set(), model.ir_version)


def _patch_nodes(scope: Scope, origins: Mapping[int, Sequence[str]], ir_version: int) -> None:
    kept = []
    for node in scope.nodes:
        if node.erased:
            continue
        proto = export_node(node, in_place=True)
        if id(node) in origins:
            _record_origins(proto, origins[id(node)], ir_version)
        kept.append(proto)
    _refill(scope.proto, "node", kept)


def _record_origins(proto: NodeProto, origins: Sequence[str], ir_version: int) -> None:
    text = ", ".join(dict.fromkeys(origins))
    if ir_version < _NODE_METADATA_SINCE_IR:
        proto.doc_string = "\n".join(filter(None, [proto.doc_string, f"{ORIGIN}: {text}"]))
        return
    entry = next((m for m in proto.metadata_props if m.key == ORIGIN), None) or proto.metadata_props.add(key=ORIGIN)
    entry.value = f"{entry.value}, {text}" if entry.value else text


def _patch_tensors(scope: Scope, graph: GraphProto, removed_inputs: set[str], ir_version: int) -> None:
    new = [tensor for tensor in scope.new_constants if tensor.name not in scope.dropped]
    made = {tensor.name for node in scope.nodes if not node.erased for tensor in node.outputs}
    dropped = scope.dropped - made
    unwanted = removed_inputs | dropped  # of the inputs, those whose initializer is gone
    if dropped:
        _refill(graph, "initializer", [t for t in graph.initializer if t.name not in dropped])
        _refill(graph, "value_info", [v for v in graph.value_info if v.name not in dropped])
        annotations = [q for q in graph.quantization_annotation if q.tensor_name not in dropped]
        _refill(graph, "quantization_annotation", annotations)
    if unwanted:
        _refill(graph, "input", [info for info in graph.input if info.name not in unwanted])
    for tensor in new:
        proto = tensor.proto
        assert proto is not None
        graph.initializer.append(proto)
        if ir_version < _INITIALIZERS_NEED_NO_INPUT_SINCE_IR:
            graph.input.append(onnx.helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims)))


def _refill(message: Message, field: str, items: list[Any]) -> None:
    """Replace the content of a repeated field; in linear time, where deleting one by one is not."""
    old = getattr(message, field)
    if len(items) == len(old) and all(a is b for a, b in zip(items, old, strict=True)):
        return
    new = getattr(type(message)(), field)
    new.extend(items)
    del old[:]
    old.MergeFrom(new)
