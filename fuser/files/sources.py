"""Where the bytes of large tensors lie: in a file, in a temporary file without a name, in the caller's memory."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import onnx

from fuser.errors import InputError
from fuser.files.tensors import Bytes
from fuser.files.wire import HEADER

WINDOW = 64 * 1024  # what one look into a file reads
ROWS_AT_A_TIME = 1 << 20  # bytes


class Source(Protocol):
    """Bytes that can be read in part."""

    @property
    def fd(self) -> int | None:
        """The file they are in, so that the kernel can copy them; None for memory."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def step(self) -> int:
        """How many of them are best read at a time."""

    def readinto(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.  Raises `InputError` when they cannot be had."""


class Blob:
    """`length` bytes of `source` from `offset` on."""

    __slots__ = ("length", "offset", "source")

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self.source, self.offset, self.length = source, offset, length

    def __len__(self) -> int:
        return self.length

    @property
    def key(self) -> tuple[int, int, int]:
        """Equal for blobs that are the same bytes of the same source."""
        return id(self.source), self.offset, self.length

    def array(self) -> Bytes:
        """The bytes, read afresh."""
        out = np.empty(self.length, np.uint8)
        if self.length:
            self.source.readinto(out.data, self.offset)
        return out

    def pieces(self) -> Iterator[memoryview]:
        """The bytes, a piece at a time; each is only good until the next."""
        step = self.source.step
        buffer = memoryview(bytearray(min(self.length, step)))
        for start in range(0, self.length, step):
            piece = buffer[: min(self.length - start, step)]
            self.source.readinto(piece, self.offset + start)
            yield piece


class Identity(NamedTuple):
    """What tells a file on disk from another, and from itself after a change."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def changed(path: Path) -> InputError:
    """Said of a file that is no longer what it was when it was opened."""
    return InputError(f"{path} was changed by somebody else while it was in use; run again")


class File:
    """An open file, read by position; it stays readable when its name is given to another file.

    Positioned reads, not a memory map: mapped pages count as resident, and a file that shrinks under a map kills
    the process.
    """

    fd: int | None
    step = WINDOW

    def __init__(self, path: Path) -> None:
        self.fd = None
        self.path = path
        try:
            # O_NONBLOCK: opening a pipe must not wait for its writer.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
            status = os.fstat(self.fd)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} is a folder; name the model file in it")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file")
        self.identity = Identity.of(status)
        self.size = status.st_size
        self._window, self._base = b"", 0

    def close(self) -> None:
        """It is not to be read after that."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    __del__ = close

    def check_unchanged(self) -> None:
        """Raise `InputError` when somebody wrote into the file since it was opened."""
        assert self.fd is not None
        if Identity.of(os.fstat(self.fd)) != self.identity:
            raise changed(self.path)

    def readinto(self, view: memoryview, offset: int) -> None:
        assert self.fd is not None
        try:
            while view:
                count = os.preadv(self.fd, [view], offset)
                if not count:
                    raise InputError(f"{self.path} became shorter while it was in use; run again")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from None

    def window(self, position: int) -> tuple[bytes, int]:
        if not self._base <= position <= self._base + len(self._window) - HEADER:
            self._window = self._pread(position, min(position + WINDOW, self.size))
            self._base = position
        return self._window, self._base

    def read(self, start: int, end: int) -> bytes:
        first, last = start - self._base, end - self._base
        if first >= 0 and last <= len(self._window):
            return self._window[first:last]
        return self._pread(start, end)

    def _pread(self, start: int, end: int) -> bytes:
        data = bytearray(end - start)
        self.readinto(memoryview(data), start)
        return bytes(data)


class Spool:
    """A temporary file without a name: nothing is left of it when the process ends, however it ends.

    It lies in $TMPDIR, else in /var/tmp (for large temporary files; /tmp is memory on many systems).
    """

    fd: int | None
    step = WINDOW

    def __init__(self) -> None:
        folder = os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else None)
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as we do
        except OSError as error:
            raise InputError(
                f"cannot make a temporary file for new weights: {error.strerror}; set TMPDIR to a writable folder"
            ) from None
        self.fd = self._file.fileno()
        self.size = 0

    def close(self) -> None:
        """It is not to be read after that."""
        self._file.close()
        self.fd = None

    def append(self, data: Bytes) -> int:
        """Add bytes at the end; where they start."""
        assert self.fd is not None
        start, view = self.size, data.data
        try:
            while view:
                count = os.pwrite(self.fd, view, self.size)
                view, self.size = view[count:], self.size + count
        except OSError as error:
            raise InputError(
                f"cannot keep new weights in a temporary file: {error.strerror}; set TMPDIR to a folder with space"
            ) from None
        return start

    def readinto(self, view: memoryview, offset: int) -> None:
        assert self.fd is not None
        while view:
            count = os.preadv(self.fd, [view], offset)
            view, offset = view[count:], offset + count


class Computed:
    """Rows that are computed from those of another tensor whenever they are read: they are not stored.

    base: rows of `row` bytes.
    compute: given rows of the base and the number of the first, the new ones, as bytes.
    """

    fd = None

    def __init__(self, base: Blob, row: int, compute: Callable[[Bytes, int], Bytes]) -> None:
        self.size, self.step = len(base), max(1, ROWS_AT_A_TIME // row) * row
        self._base, self._row, self._compute = base, row, compute

    def readinto(self, view: memoryview, offset: int) -> None:
        row, end = self._row, offset + len(view)
        step = self.step // row
        for first in range(offset // row, -(-end // row), step):
            start, stop = first * row, min((first + step) * row, -(-end // row) * row)
            raw = Blob(self._base.source, self._base.offset + start, stop - start).array()
            new = self._compute(raw, first)
            here = slice(max(offset, start), min(end, stop))
            view[here.start - offset : here.stop - offset] = new[here.start - start : here.stop - start].data


class Borrowed:
    """The raw data of a tensor that belongs to the caller; it is read, never changed."""

    fd = None
    step = WINDOW

    def __init__(self, tensor: onnx.TensorProto) -> None:
        self._tensor = tensor
        self.size = len(tensor.raw_data)

    def readinto(self, view: memoryview, offset: int) -> None:
        view[:] = self._tensor.raw_data[offset : offset + len(view)]


class Inline:
    """Bytes of a serialized message."""

    fd = None
    step = WINDOW

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def readinto(self, view: memoryview, offset: int) -> None:
        view[:] = self._data[offset : offset + len(view)]
