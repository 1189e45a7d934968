"""Protocol buffers on the wire: walk a message, and swap parts of it, without parsing the rest.

A message is a run of fields; each is a tag (field number and wire type) and a value.  Strings, bytes and nested
messages state their length, so whatever is of no interest is stepped over in one go.
Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

HEADER = 20  # the most bytes a tag and a length can take: two varints of ten
MAX_DEPTH = 100  # protobuf's own limit

T = TypeVar("T")


class Malformed(Exception):
    """The bytes are no protobuf message; says where and why."""


class Readable(Protocol):
    """Bytes that are read in part: a file or a buffer."""

    def window(self, position: int) -> tuple[bytes, int]:
        """Some bytes around `position` and the position of the first of them.

        At least `HEADER` bytes follow `position`, or all that there are.
        """

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`."""


# Where one field lies: (number, wire type, start, body, end), its tag and length in [start, body), its value in
# [body, end).  A plain tuple: a file has some for every node, and a named one takes twice the time.
Field = tuple[int, int, int, int, int]


def fields(source: Readable, start: int, end: int) -> Iterator[Field]:
    """The fields of the message that lies in [start, end), in order.  Raises `Malformed`."""
    buffer, base, position = b"", start, start
    while position < end:
        at = position - base
        if at + HEADER > len(buffer):
            buffer, base = source.window(position)
            at = position - base
        try:
            tag = buffer[at]
            at += 1
            if tag > 127:
                tag, at = _varint(buffer, at - 1)
            wire_type = tag & 7
            body = base + at
            if wire_type == LENGTH:
                stop = buffer[at]
                at += 1
                if stop > 127:
                    stop, at = _varint(buffer, at - 1)
                body = base + at
                stop += body
            elif wire_type == VARINT:
                stop = base + _varint(buffer, at)[1]
            elif wire_type == FIXED32:
                stop = body + 4
            elif wire_type == FIXED64:
                stop = body + 8
            else:
                raise Malformed(f"wire type {wire_type} at byte {position}")
        except IndexError:
            raise Malformed(f"it ends inside the field at byte {position}") from None
        if stop > end:
            raise Malformed(
                f"the field at byte {position} claims {stop - body:,} bytes, {max(end - body, 0):,} are left"
            )
        if tag < 8:
            raise Malformed(f"field number 0 at byte {position}")
        yield tag >> 3, wire_type, position, body, stop
        position = stop


def _varint(buffer: bytes, at: int) -> tuple[int, int]:
    """The base-128 number at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise Malformed("a number of more than ten bytes")


_ONE_BYTE = [bytes([value]) for value in range(128)]


def varint(value: int) -> bytes:
    """`value` >= 0 as a base-128 number."""
    if value < 128:
        return _ONE_BYTE[value]
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def delimited(number: int, value: bytes) -> bytes:
    """A whole length-delimited field."""
    return header(number, len(value)) + value


def header(number: int, length: int) -> bytes:
    """The tag and length in front of a value of `length` bytes."""
    return varint(number << 3 | LENGTH) + varint(length)


class Buffer:
    """A `Readable` over bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def window(self, position: int) -> tuple[bytes, int]:
        return self.data, 0

    def read(self, start: int, end: int) -> bytes:
        return self.data[start:end]


# Which fields of a message to enter: a nested message by the name of its kind.
Schema = Mapping[str, Mapping[int, str]]


def rewrite(
    source: Readable,
    start: int,
    end: int,
    kind: str,
    schema: Schema,
    worth: Callable[[int, int], bool],
    leaf: Callable[[str, int, int], list[T | bytes] | None],
    depth: int = 0,
) -> list[T | bytes] | None:
    """The message in [start, end) with its leaves replaced, as pieces; None when none was.

    `kind` names the message in `schema`; a kind without an entry there is a leaf.  `worth(start, end)` says
    whether a nested message can hold something to replace.  `leaf(kind, start, end)` returns the leaf's new pieces
    (anything with a length), or None to keep it.  Everything else comes out as the bytes that were read.
    """
    if depth > MAX_DEPTH:
        raise Malformed(f"messages nested more than {MAX_DEPTH} deep")
    enter = schema[kind]
    pieces: list[T | bytes] = []
    copied = start
    for number, wire_type, at, body, stop in fields(source, start, end):
        child = enter.get(number)
        if child is None or wire_type != LENGTH or not worth(body, stop):
            continue
        if child in schema:
            new = rewrite(source, body, stop, child, schema, worth, leaf, depth + 1)
        else:
            new = leaf(child, body, stop)
        if new is None:
            continue
        pieces.append(source.read(copied, at) + header(number, size(new)))
        pieces += new
        copied = stop
    if copied == start:
        return None
    pieces.append(source.read(copied, end))
    return pieces


def size(pieces: list[T | bytes]) -> int:
    """The bytes that the pieces take together."""
    return sum(map(len, pieces))  # type: ignore[arg-type]  # T has a length: see `rewrite`
