"""ONNX on the wire: take the large tensors out of a model file, and put tensors into one.

A *skeleton* is a model whose large tensors stand as references in ONNX's own form: `data_location` EXTERNAL with the
entries `location`, `offset` and `length`.  Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from fuser.files import tensors, wire
from fuser.files.sources import Blob

# Raw data from this size on is left in the file.  Shapes, axes and the like are far below it, so shape inference
# still sees them; a reference itself takes some 100 bytes.
SMALL = 1024

INITIALIZER, CONSTANT = "initializer", "constant"  # the tensors of a graph; the tensors of a node's attributes

# Where tensors can be: the fields to enter, per kind of message.
SCHEMA: wire.Schema = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: INITIALIZER},
    "node": {5: "attribute"},
    "attribute": {5: CONSTANT, 6: "graph", 10: CONSTANT, 11: "graph"},
}

# Fields of a TensorProto.  Packed floats and doubles are stored like raw data.
DATA_TYPE, FLOATS, STRINGS, RAW, DOUBLES, EXTERNAL_DATA, DATA_LOCATION = 2, 4, 6, 9, 10, 13, 14
_VALUES = {FLOATS, 5, STRINGS, 7, RAW, DOUBLES, 11}
_STORED_LIKE_RAW = {
    FLOATS: {onnx.TensorProto.FLOAT, onnx.TensorProto.COMPLEX64},
    DOUBLES: {onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX128},
}

# Every reference holds this field: a message without these two bytes holds no reference.
EXTERNAL = wire.varint(DATA_LOCATION << 3 | wire.VARINT) + wire.varint(onnx.TensorProto.EXTERNAL)


def slim(source: wire.Readable, size: int, location: str) -> tuple[bytes, dict[int, int]]:
    """The skeleton of the model in `source`; its references say `location` and the offset there.

    Also which field each referenced tensor had its values in, by offset, where that is not `raw_data`.
    Linear in the number of fields; bytes of large tensors are not read.  Raises `wire.Malformed`, and `InputError`
    for a tensor whose values do not fill its shape.
    """
    typed: dict[int, int] = {}

    def leaf(kind: str, start: int, end: int) -> list[bytes] | None:
        kept, values = [], None
        for number, wire_type, at, body, stop in wire.fields(source, start, end):
            if number in (EXTERNAL_DATA, DATA_LOCATION):
                return None
            if number not in _VALUES:
                kept.append((at, stop))
            elif values is None and wire_type == wire.LENGTH:
                values = number, body, stop
            else:
                return None
        if values is None or values[2] - values[1] < SMALL:
            return None
        head = b"".join(source.read(*span) for span in kept)
        number, body, stop = values
        tensor = onnx.TensorProto.FromString(head)
        if number != RAW:
            if tensor.data_type not in _STORED_LIKE_RAW.get(number, ()):
                return None
            typed[body] = number
        tensors.check_filled(tensor, stop - body)
        return [head + reference(location, body, stop - body)]

    pieces = wire.rewrite(source, 0, size, "model", SCHEMA, lambda start, end: end - start >= SMALL, leaf)
    return source.read(0, size) if pieces is None else b"".join(pieces), typed


def reference(location: str, offset: int, length: int, others: Iterable[tuple[str, str]] = ()) -> bytes:
    """The fields that make a TensorProto a reference; `others` are further entries, such as a checksum."""
    entries = [("location", location), ("offset", str(offset)), ("length", str(length)), *others]
    return b"".join(_entry(key, value) for key, value in entries) + EXTERNAL


def _entry(key: str, value: str) -> bytes:
    return wire.delimited(EXTERNAL_DATA, wire.delimited(1, key.encode()) + wire.delimited(2, value.encode()))


def inline(source: wire.Readable, start: int, end: int, blob: Blob, slot: int = RAW) -> list[bytes | Blob]:
    """The TensorProto in [start, end), a reference, as pieces with its values in field `slot` instead."""
    before, after = _around(source, start, end, slot)
    return [before + wire.header(slot, len(blob)), blob, after]


def refer(source: wire.Readable, start: int, end: int, entries: bytes) -> list[bytes | Blob]:
    """The TensorProto in [start, end) as pieces, with the reference `entries` in place of its values."""
    before, after = _around(source, start, end, DATA_LOCATION)
    return [before + entries + after]


def _around(source: wire.Readable, start: int, end: int, slot: int) -> tuple[bytes, bytes]:
    """The fields with lower and with higher numbers than `slot`, without values and reference."""
    before, after = b"", b""
    for number, _, at, _, stop in wire.fields(source, start, end):
        if number in _VALUES or number in (EXTERNAL_DATA, DATA_LOCATION):
            continue
        if number < slot:
            before += source.read(at, stop)
        else:
            after += source.read(at, stop)
    return before, after


def raw_data(source: wire.Readable, start: int, end: int) -> tuple[int, int] | None:
    """Where the raw data of the TensorProto in [start, end) lies; None when it has none."""
    for number, wire_type, _, body, stop in wire.fields(source, start, end):
        if number == RAW and wire_type == wire.LENGTH:
            return body, stop
    return None
