"""Write a model: one file, or the model and one data file beside it, streamed and atomic.

With external data, the model `OUT` and its data `OUT.data` are replaced one after the other, and yet `OUT` is whole
at every moment.  When the old `OUT` reads its data from `OUT.data`, that is first set aside: it gets the second name
`OUT.data.fuser-old`, and `OUT` is replaced by a version of itself that reads from there.  A kill leaves either this
old model with `OUT.data.fuser-old`, or the new one; the next save of `OUT` removes what is no longer read.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from fuser.errors import InputError
from fuser.files import skeleton, wire
from fuser.files.atomic import Replacement
from fuser.files.model import ModelFile, Origin, load, tensors_of
from fuser.files.sources import Blob, File, Inline

Layout = Literal["auto", "single", "external"]

LIMIT = 2**31 - 1  # the most bytes that protobuf reads as one message

# Large tensors start where any system can map them (Windows: 64 KiB), the others at a cache line.
_ALIGN_LARGE, _ALIGN, _LARGE = 64 * 1024, 64, 1 << 20


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    Attributes:
        path: the model file; where a symbolic link was given, the file it leads to.
        data: the data file beside it, or None for a single file.
        size: the bytes of both.
        note: what a person should know about the layout; mostly empty.
    """

    path: Path
    data: Path | None
    size: int
    note: str = ""


def save(
    model: ModelFile, path: str | os.PathLike[str], *, layout: Layout = "auto", threshold: int = skeleton.SMALL
) -> Saved:
    """Write `model` to `path`, which may be the file it was loaded from.

    Args:
        layout: "single" puts all into one file; "external" the initializers of `threshold` bytes and more into
            `PATH.data`; "auto" follows the source, so that what was inline stays inline, and turns to "external"
            when the file would pass protobuf's limit of 2 GiB.
        threshold: in bytes; in "auto", for new tensors of a model with external data.

    A model that was not changed is copied byte for byte, unless it has external data or another layout is asked
    for.  Bytes are the same at every run.  At every moment `path` is the whole old or the whole new model, and
    nothing stays of a failed save.  Raises `InputError` when the target cannot be written.
    """
    target = _target(path)
    data = target.with_name(target.name + ".data")
    in_place = model.path is not None and target == Path(os.path.realpath(model.path))
    if model.whole:
        model.whole.check_unchanged()
    body = model.serialized()
    content, note = _Content(model, body, layout, threshold, data.name), ""
    if content.size > LIMIT:
        reason = f"one file would take {content.size / 1e9:.1f} GB, and ONNX allows 2 GB"
        if layout == "single":
            raise InputError(f"cannot write {target}: {reason}; use external data")
        note = f"external data: {reason}"
        content = _Content(model, body, "external", threshold, data.name)
    if model.whole and content.as_in_source and not model.changed():
        if in_place:
            return Saved(target, None, model.whole.size, "nothing to write: the model is as it was")
        content.pieces = [Blob(model.whole, 0, model.whole.size)]
    written = [target, data] if content.data else [target]
    if not in_place:
        _spare_the_source(model, written)
    try:
        _replace(target, data, content, keep=set() if in_place else model.files())
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from None
    return Saved(target, data if content.data else None, sum(path.stat().st_size for path in written), note)


class _Content:
    """What goes into the files of a save: `pieces` of the model, and `data`, blobs and where they start.

    The layout "kept" leaves external data where it is.
    """

    def __init__(
        self, model: ModelFile, body: bytes, layout: Layout | Literal["kept"], threshold: int, data_name: str
    ) -> None:
        self.data: dict[tuple[int, int, int], tuple[int, Blob]] = {}
        self.as_in_source = layout != "external"
        self._model, self._layout, self._threshold, self._data_name = model, layout, threshold, data_name
        self._body, self._buffer, self._inline = body, wire.Buffer(body), Inline(body)
        self._end = 0
        try:
            pieces = wire.rewrite(self._buffer, 0, len(body), "model", skeleton.SCHEMA, self._worth, self._leaf)
        except UnicodeEncodeError:
            raise InputError(f"external data needs a name in UTF-8, not {data_name!r}") from None
        self.pieces: list[Blob | bytes] = [body] if pieces is None else pieces
        self.size = wire.size(self.pieces)

    def write(self, file: Replacement) -> None:
        """Write the model."""
        for piece in self.pieces:
            if isinstance(piece, Blob):
                file.copy(piece)
            else:
                file.write(piece)

    def write_data(self, file: Replacement) -> None:
        """Write the data file."""
        for start, blob in self.data.values():
            file.pad(start)
            file.copy(blob)

    def _worth(self, start: int, end: int) -> bool:
        if self._layout == "external" and end - start >= self._threshold:
            return True
        return self._body.find(skeleton.EXTERNAL, start, end) >= 0

    def _leaf(self, kind: str, start: int, end: int) -> list[Blob | bytes] | None:
        tensor = onnx.TensorProto.FromString(self._body[start:end])
        others: list[tuple[str, str]] = []
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            origin, blob = self._model.origin(tensor), self._model.blob(tensor)
            if origin is Origin.EXTERNAL:
                self.as_in_source = False  # offsets and names change, if nothing else does
                if self._layout == "kept":
                    return None
                others = [(e.key, e.value) for e in tensor.external_data if e.key not in _PLACE]
        else:
            values = skeleton.raw_data(self._buffer, start, end)
            if values is None or kind != skeleton.INITIALIZER:
                return None
            origin, blob = Origin.INLINE, Blob(self._inline, values[0], values[1] - values[0])
        if self._goes_out(kind, origin, len(blob)):
            entries = skeleton.reference(self._data_name, self._place(blob), len(blob), others)
            return skeleton.refer(self._buffer, start, end, entries)
        if blob.source is self._inline:
            return None
        return skeleton.inline(self._buffer, start, end, blob, self._model.field(blob))

    def _goes_out(self, kind: str, origin: Origin, length: int) -> bool:
        if self._layout == "single":
            return False
        if self._layout == "external":
            return kind == skeleton.INITIALIZER and length >= self._threshold
        if origin is Origin.NEW:
            return self._model.is_external and kind == skeleton.INITIALIZER and length >= self._threshold
        return origin is Origin.EXTERNAL

    def _place(self, blob: Blob) -> int:
        """Where the blob starts in the data file; bytes that several tensors share are written once."""
        if blob.key not in self.data:
            step = _ALIGN_LARGE if len(blob) >= _LARGE else _ALIGN
            start = -(-self._end // step) * step
            self.data[blob.key] = start, blob
            self._end = start + len(blob)
        return self.data[blob.key][0]


_PLACE = ("location", "offset", "length")


def _target(path: str | os.PathLike[str]) -> Path:
    """The file to replace: what `path` leads to.  Raises `InputError` when no file can be there."""
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; add a file name")
        if target.exists() and not target.is_file():
            raise InputError(f"cannot write {path}: it is not a regular file")
        if not target.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {target.parent}")
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    return target


def _spare_the_source(model: ModelFile, written: list[Path]) -> None:
    """Raise `InputError` when a file to write is one that the model reads."""
    source = model.files()
    for path in written:
        if _inode(path) in source:
            raise InputError(f"cannot write {path}: the model reads its weights from it; choose another output name")


def _inode(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _replace(target: Path, data: Path, content: _Content, keep: set[tuple[int, int]]) -> None:
    """Write the content and put it in place; remove what the old model alone has read, but for `keep`."""
    aside = data.with_name(data.name + ".fuser-old")
    with ExitStack() as stack:
        new = stack.enter_context(Replacement(target))
        content.write(new)
        new.prepare()
        old = _reader_of(target, data)
        if content.data:
            new_data = stack.enter_context(Replacement(data))
            content.write_data(new_data)
            new_data.prepare()
            if old:
                _set_aside(old, target, data, aside)
            new_data.commit()
        new.commit()
    for path, unread in (aside, True), (data, old is not None and not content.data):
        if unread and _inode(path) not in keep:
            path.unlink(missing_ok=True)


def _reader_of(target: Path, data: Path) -> ModelFile | None:
    """The model that is at `target` now, if it reads from `data`."""
    if not target.exists() or not data.exists():
        return None
    try:
        old = load(target)
    except InputError:
        return None
    return old if any(_reads(tensor, data) for tensor in tensors_of(old.proto)) else None


def _reads(tensor: onnx.TensorProto, data: Path) -> bool:
    """Whether the tensor's values are in `data`, which lies beside the model."""
    return any(entry.key == "location" and Path(entry.value) == Path(data.name) for entry in tensor.external_data)


def _set_aside(old: ModelFile, target: Path, data: Path, aside: Path) -> None:
    """Let the old model read its data under the name `aside`, so that `data` can be replaced."""
    aside.unlink(missing_ok=True)
    try:
        os.link(data, aside)
    except OSError:  # no hard links on this file system
        with Replacement(aside) as copy:
            copy.copy(Blob(file := File(data), 0, file.size))
            copy.commit()
    for tensor in tensors_of(old.proto):
        for entry in tensor.external_data if _reads(tensor, data) else ():
            if entry.key == "location":
                entry.value = aside.name
    with Replacement(target) as same:
        _Content(old, old.serialized(), "kept", 0, "").write(same)
        same.commit()
