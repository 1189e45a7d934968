"""What a model promises its callers: an optimized model keeps all of it.

Names, order, types, ranks, dimensions and denotations of inputs and outputs, model metadata and opset imports for
ONNX; the structure, types and shapes of what is returned for torch.  Each difference is one sentence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import onnx

_OVERRIDING_SINCE_IR = 4
"""Before, every initializer had to be listed as an input, and was a constant all the same."""


def compare_onnx(before: onnx.ModelProto, after: onnx.ModelProto, removed_inputs: Collection[str] = ()) -> list[str]:
    """What the interface of `before` has and that of `after` has not; empty when nothing is lost.

    removed_inputs: inputs that are allowed to be missing.
    """
    unasked = (_formal_inputs(before) | _formal_inputs(after)) - {value.name for value in public_inputs(before.graph)}
    optional = inputs_with_default(before.graph)
    problems = list(_values("input", before.graph.input, after.graph.input, {*removed_inputs, *unasked}, optional))
    problems += _values("output", before.graph.output, after.graph.output)
    problems += _defaults(before.graph, after.graph)
    problems += _model(before, after)
    return problems


def public_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller must give: those without a default value."""
    known = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    return [value for value in graph.input if value.name not in known]


def inputs_with_default(graph: onnx.GraphProto) -> set[str]:
    """The names of the inputs that a caller may leave out."""
    return {value.name for value in graph.input} - {value.name for value in public_inputs(graph)}


def _formal_inputs(model: onnx.ModelProto) -> set[str]:
    """Initializers that are listed as inputs only because the format wants it: no caller can give them."""
    if model.ir_version >= _OVERRIDING_SINCE_IR:
        return set()
    return inputs_with_default(model.graph)


def _values(
    what: str,
    before: Sequence[onnx.ValueInfoProto],
    after: Sequence[onnx.ValueInfoProto],
    removed: Collection[str] = (),
    optional: Collection[str] = (),
) -> Iterator[str]:
    old = [value for value in before if value.name not in removed]
    kept = {value.name: value for value in after}
    names, now = [value.name for value in old], [value.name for value in after if value.name not in removed]
    missing = [name for name in names if name not in kept]
    if needed := [name for name in missing if name not in optional]:
        yield f"{_are(what, needed)} missing"
    if dropped := [name for name in missing if name in optional]:
        yield (
            f"{_are(what, dropped)} missing, with a default value in the original: "
            "--freeze-inputs, in Python removed_inputs, allows that"
        )
    if added := [name for name in now if name not in set(names)]:
        yield f"{_are(what, added)} new"
    if not missing and not added and names != now:
        yield f"the {what}s are in another order: {_list(now)} instead of {_list(names)}"
    for value in old:
        if value.name in kept:
            yield from (f"{what} {value.name!r}: {problem}" for problem in _type(value.type, kept[value.name].type))


def _type(before: onnx.TypeProto, after: onnx.TypeProto) -> Iterator[str]:
    kind = before.WhichOneof("value")
    if kind is None:
        return  # nothing was promised
    if after.WhichOneof("value") != kind:
        yield f"it was a {_kind(kind)} and is a {_kind(after.WhichOneof('value'))}"
        return
    if before.denotation and before.denotation != after.denotation:
        yield f"its denotation {before.denotation!r} is lost"
    old, new = getattr(before, kind), getattr(after, kind)
    if kind in ("sequence_type", "optional_type"):
        yield from _type(old.elem_type, new.elem_type)
        return
    if kind == "map_type":
        if old.key_type != new.key_type:
            yield "it has another key type"
        yield from _type(old.value_type, new.value_type)
        return
    if old.elem_type != new.elem_type:
        yield f"its type was {_element(old.elem_type)} and is {_element(new.elem_type)}"
    if not old.HasField("shape"):
        return
    if not new.HasField("shape"):
        yield "its shape is lost"
    elif len(old.shape.dim) != len(new.shape.dim):
        yield f"its rank was {len(old.shape.dim)} and is {len(new.shape.dim)}"
    else:
        for axis, (was, now) in enumerate(zip(old.shape.dim, new.shape.dim, strict=True)):
            if _dim(was) != _dim(now):
                yield f"dimension {axis} was {_dim(was)} and is {_dim(now)}"
            if was.denotation and was.denotation != now.denotation:
                yield f"the denotation {was.denotation!r} of dimension {axis} is lost"


def _defaults(before: onnx.GraphProto, after: onnx.GraphProto) -> Iterator[str]:
    """An input with a default that has become one without: callers who left it out now fail."""
    optional = inputs_with_default(before)
    now_required = [value.name for value in public_inputs(after) if value.name in optional]
    if now_required:
        yield f"{_are('input', now_required)} without a default value now, and had one"


def _model(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    properties = {entry.key: entry.value for entry in after.metadata_props}
    for entry in before.metadata_props:
        if entry.key not in properties:
            yield f"the metadata property {entry.key!r} is lost"
        elif properties[entry.key] != entry.value:
            yield f"the metadata property {entry.key!r} has changed"
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if getattr(before, field) and getattr(before, field) != getattr(after, field):
            yield f"the model's {field} was {_short(getattr(before, field))} and is {_short(getattr(after, field))}"
    versions = {opset.domain: opset.version for opset in after.opset_import}
    for opset in before.opset_import:
        domain = opset.domain or "ai.onnx"
        now = versions.get(opset.domain, versions.get("ai.onnx") if not opset.domain else None)
        if now is None:
            yield f"the opset import {domain} is lost"
        elif now != opset.version:
            yield f"the opset import {domain} was {opset.version} and is {now}"


def _dim(dim: onnx.TensorShapeProto.Dimension) -> str:
    which = dim.WhichOneof("value")
    if which == "dim_param" and dim.dim_param:
        return f"dynamic ({dim.dim_param})"
    return str(dim.dim_value) if which == "dim_value" and dim.dim_value >= 0 else "dynamic"


def _kind(kind: str | None) -> str:
    return (kind or "value without a type").removesuffix("_type").replace("_", " ")


def _element(elem_type: int) -> str:
    return str(onnx.TensorProto.DataType.Name(elem_type)).lower()


def _are(what: str, names: Sequence[str]) -> str:
    return f"{what} {_list(names)} is" if len(names) == 1 else f"{what}s {_list(names)} are"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
