"""Write a model: one file, or the model and one data file beside it, streamed and atomic.

With external data, the model `OUT` and its data `OUT.data` are replaced one after the other, and yet `OUT` is whole
at every moment.  When the old `OUT` reads its data from `OUT.data`, that is there a second time for a moment, as
`OUT.data.fuser-old`: a small file as a copy, a large one under a second name, which onnx refuses to load while there
are two.  `OUT` is replaced by a version of itself that reads from there.  A kill leaves either this old model or the
new one, and perhaps a file `*.fuser-old` or `.*.fuser`, which the next save of `OUT` removes.  All new bytes are
written before the first of these steps, so that together they take little time.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
from onnx.serialization import registry

from fuser.errors import InputError
from fuser.files import skeleton, wire
from fuser.files.atomic import Replacement
from fuser.files.model import ModelFile, Origin, load, tensors_of
from fuser.files.sources import Blob, File, Inline

Layout = Literal["auto", "single", "external"]

LIMIT = 2**31 - 1  # the most bytes that protobuf reads as one message

# Large tensors start where any system can map them (Windows: 64 KiB), the others at a cache line.
_ALIGN_LARGE, _ALIGN, _LARGE = 64 * 1024, 64, 1 << 20


_MOST_WITH_DATA = 64 << 20
"""Bytes; a larger model is taken to keep its weights itself."""

_SMALL_COPY = 64 << 20
"""Bytes; a larger data file is not copied to have two of it for a moment."""


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    Attributes:
        path: the model file; where a symbolic link was given, the file it leads to.
        data: the data file beside it, or None for a single file.
        size: the bytes of both.
        unchanged: whether nothing was written, as `path` holds the model already.
        note: what a person should know about the files; mostly empty.
    """

    path: Path
    data: Path | None
    size: int
    unchanged: bool = False
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
    target = check_target(path)
    data = target.with_name(target.name + ".data")
    in_place = model.path is not None and target == Path(os.path.realpath(model.path))
    model.check_unchanged()
    changed = model.changed()
    if in_place and layout == "auto" and not changed:
        return Saved(target, None, target.stat().st_size, unchanged=True)
    body = model.serialized()
    content, note = _Content(model, body, layout, threshold, data.name), ""
    if content.size > LIMIT:
        reason = f"one file would take {content.size / 1e9:.1f} GB, and ONNX allows 2 GB"
        if layout == "single":
            raise InputError(f"cannot write {target}: {reason}; use external data")
        note = f"external data: {reason}"
        content = _Content(model, body, "external", threshold, data.name)
    if model.whole and content.as_in_source and not changed:
        content.pieces = [Blob(model.whole, 0, model.whole.size)]
    written = [target, data] if content.data else [target]
    if content.data and data.is_dir():
        raise InputError(f"cannot write {data}: it is a folder")
    if not in_place:
        _spare_the_source(model, written)
    try:
        _replace(target, data, content, keep=set() if in_place else model.files())
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from None
    if in_place:
        note = note or _unread(model, target, written)
    return Saved(target, data if content.data else None, sum(path.stat().st_size for path in written), note=note)


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

    def check_source(self) -> None:
        """Raise `InputError` when what was written may be of two minds."""
        self._model.check_unchanged()

    def _worth(self, start: int, end: int) -> bool:
        if self._layout == "external" and end - start >= self._threshold:
            return True
        return self._body.find(skeleton.EXTERNAL, start, end) >= 0

    def _leaf(self, kind: str, start: int, end: int) -> list[Blob | bytes] | None:
        tensor = onnx.TensorProto.FromString(self._body[start:end])
        others: list[tuple[str, str]] = []
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            origin = self._model.origin(tensor)
            if origin is Origin.EXTERNAL:
                if self._layout == "kept":
                    return None
                self.as_in_source = False  # offsets and names change, if nothing else does
            blob = self._model.blob(tensor)
            if origin is Origin.EXTERNAL:
                others = [(entry.key, entry.value) for entry in tensor.external_data if entry.key not in _PLACE]
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


def check_target(path: str | os.PathLike[str]) -> Path:
    """The file to replace: what `path` leads to.  Raises `InputError` when no model can be there."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; add a file name")
        if os.path.exists(path) and not os.path.isfile(path):  # of a pipe, /dev/stdout leads to no path
            raise InputError(f"cannot write {path}: it is not a regular file")
        if _is_printed_to(target):
            raise InputError(f"cannot write {path}: what is printed goes there; give the model a file of its own")
        if target.is_symlink():
            raise InputError(f"cannot write {path}: it is a link that leads round in a circle")
        if not target.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {target.parent}")
        ending = Path(path).suffix
        if registry.get_format_from_file_extension(ending) not in (None, "protobuf"):
            raise InputError(f"cannot write {path}: onnx reads {ending} as text, and this is binary; call it .onnx")
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    return target


def _is_printed_to(target: Path) -> bool:
    """Whether standard output or error is redirected to the file: a model in its place would lose what is printed."""
    for stream in (1, 2):
        with suppress(OSError):  # there is no such file yet, or the stream is closed
            if os.path.samestat(target.stat(), os.fstat(stream)):
                return True
    return False


def _spare_the_source(model: ModelFile, written: list[Path]) -> None:
    """Raise `InputError` when a file to write is one that the model reads."""
    source = model.files()
    for path in written:
        if _inode(path) in source:
            raise InputError(f"cannot write {path}: the model reads its weights from it; choose another output name")


def _unread(model: ModelFile, target: Path, written: list[Path]) -> str:
    """What to say of data files that a model that was written in place does not read any more."""
    if model.proto.graph.sparse_initializer or model.proto.training_info:  # whose data stays where it is
        return ""
    left = [path for path in model.data_files() if path.exists() and path not in written]
    names = ", ".join(sorted({os.path.relpath(path, target.parent) for path in left}))
    return f"{target.name} does not read {names} any more; remove what no other model reads" if names else ""


def _inode(path: Path) -> tuple[int, int] | None:
    """What tells the file at `path` from others; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _replace(target: Path, data: Path, content: _Content, keep: set[tuple[int, int]]) -> None:
    """Put the content in place, and remove data that only the old model read; what is in `keep` has other readers."""
    aside = data.with_name(data.name + ".fuser-old")
    other = _other_reader(data, target) if data.exists() else None
    if other is not None and (content.data or _reads(target, data)):
        raise InputError(f"cannot write {target}: {other.name} reads {data.name}, too; choose another output name")
    with ExitStack() as stack:
        new = stack.enter_context(Replacement(target))
        content.write(new)
        new.prepare()
        new_data = stack.enter_context(Replacement(data)) if content.data else None
        if new_data:
            content.write_data(new_data)
            new_data.prepare()
        content.check_source()
        moved = _moved(target, data, aside, stack) if _inode(data) not in keep else None
        ours = moved or _inode(aside)  # the latter: of a save that was killed
        # All bytes are on the disk; the rest takes microseconds.
        if moved:
            _second_name(data, aside)
            moved.commit()
        if new_data:
            new_data.commit()
        elif ours and _inode(data) not in {None, *keep}:
            data.unlink()
        new.commit()
        if _inode(aside) not in {None, *keep}:
            aside.unlink()
        new.sync_folder()


def _moved(target: Path, data: Path, aside: Path, stack: ExitStack) -> Replacement | None:
    """The model that is at `target` now, reading from `aside` what it reads from `data`; None if it reads nothing."""
    if not target.exists() or not data.exists():
        return None
    try:
        old = load(target)
    except InputError:
        return None
    places = _places(old, data)
    if not places:
        return None
    for entry in places:
        entry.value = aside.name
    moved = stack.enter_context(Replacement(target))
    _Content(old, old.serialized(), "kept", 0, "").write(moved)
    moved.prepare()
    return moved


def _other_reader(data: Path, target: Path) -> Path | None:
    """Another model beside `target` that reads the data file, and would be spoilt by another one in its place."""
    for path in sorted(target.parent.glob("*.onnx")):
        with suppress(OSError):  # a link that leads nowhere
            is_other = Path(os.path.realpath(path)) != target and path.stat().st_size <= _MOST_WITH_DATA
            if is_other and _reads(path, data):
                return path
    return None


def _reads(path: Path, data: Path) -> bool:
    """Whether the model at `path` reads the data file."""
    with suppress(OSError, InputError):
        return os.fsencode(data.name) in path.read_bytes() and bool(_places(load(path), data))
    return False


def _places(model: ModelFile, data: Path) -> list[onnx.StringStringEntryProto]:
    """The entries of references that are the location of `data`, which lies beside the model."""
    return [
        entry
        for tensor in tensors_of(model.proto)
        for entry in tensor.external_data
        if entry.key == "location" and os.path.normpath(entry.value) == data.name
    ]


def _second_name(data: Path, aside: Path) -> None:
    """Give a file a second name for a moment; a small one by a copy, as onnx refuses data with two hard links."""
    aside.unlink(missing_ok=True)
    if data.stat().st_size > _SMALL_COPY:
        with suppress(OSError):
            os.link(data, aside)
            return
    with Replacement(aside) as copy:
        copy.copy(Blob(file := File(data), 0, file.size))
        copy.prepare()
        copy.commit()
