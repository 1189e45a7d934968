"""ModelFile: an ONNX model whose large tensors stay where they are until one is asked for.

`ModelFile.proto` is a skeleton (see `skeleton.py`).  Its references point to
- the model file itself, under its own base name, for tensors that were inline in it;
- files beside it, for external data;
- `<fuser>/new`, a temporary file without a name, for tensors made by `ModelFile.tensor`;
- `<fuser>/computed/N`, nothing but a function of another tensor, for those made by `ModelFile.computed`;
- `<fuser>/caller/N`, memory of the ModelProto that was given to `ModelFile.from_proto`.
`ModelFile.array` reads any of them; `save` writes each where it belongs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message

from fuser.errors import InputError
from fuser.files import skeleton, tensors, wire
from fuser.files.external import DataFile, DataFiles
from fuser.files.sources import ROWS_AT_A_TIME, Blob, Borrowed, Computed, File, Source, Spool
from fuser.files.tensors import Array, Bytes, shown

_RESERVED = "<fuser>/"  # begins the locations that are no files
_NEW = _RESERVED + "new"
_COMPUTED = _RESERVED + "computed/"
_MODEL = _RESERVED + "model"  # the model file, should its name not be UTF-8, which a proto demands


class Origin(Enum):
    """Where the values of a referenced tensor come from."""

    INLINE = "the model itself"
    EXTERNAL = "a data file"
    NEW = "ModelFile.tensor or ModelFile.computed"


def load(path: str | os.PathLike[str]) -> ModelFile:
    """Open the ONNX model at `path` without reading its large tensors.

    Raises `InputError`, one line, for whatever is not a sound ONNX model: a missing, truncated or corrupt file,
    another format, a tensor that does not fill its shape, external data that is missing, too short or outside the
    model's folder.
    """
    path = Path(path)
    file = File(path)
    location = path.name if _is_utf8(path.name) else _MODEL
    try:
        data, typed = skeleton.slim(file, file.size, location)
        proto = onnx.ModelProto.FromString(data)
        if name := _not_text(proto):
            raise wire.Malformed(f"the name {name} is not UTF-8 text")
        if location != _MODEL and _RESERVED.encode() in data:
            _check_locations(tensors_of(proto))
    except (wire.Malformed, DecodeError) as error:
        raise InputError(f"{path} {_other_format(file) or f'is truncated or corrupt: {error}'}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not proto.HasField("graph") or not proto.ir_version:
        raise InputError(f"{path} {_other_format(file) or 'is not an ONNX model: it has no graph or no IR version'}")
    # Data lies beside the name that was given or, when that is a link, beside the file it leads to.
    folders = DataFiles([Path(os.path.abspath(path)).parent, Path(os.path.realpath(path)).parent])
    model = ModelFile(proto, data, path=path, whole=file, sources={location: file}, typed=typed, data=folders)
    try:
        _check_tensors(model)
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    return model


class ModelFile:
    """An ONNX model in memory without its large tensors.  Made by `load` and `ModelFile.from_proto`.

    Attributes:
        proto: the model, to be edited freely.  Tensors with 1 KiB or more of raw data are references.
        path: the file it was loaded from, or None.
        whole: that file, open; it stays readable when its name is given to another file.
        is_external: whether any initializer had its values in a data file.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        original: bytes,
        *,
        sources: dict[str, Source],
        data: DataFiles,
        path: Path | None = None,
        whole: File | None = None,
        typed: dict[int, int] | None = None,
        is_external: bool = False,
    ) -> None:
        self.proto = proto
        self.path = path
        self.whole = whole
        self._original = original
        self._sources = sources
        self._data = data
        self._typed = typed or {}
        self._spool: Spool | None = None
        self._computed: dict[str, Computed] = {}
        self.is_external = is_external

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto, base_dir: str | os.PathLike[str] | None = None) -> ModelFile:
        """Wrap a model in memory.  Neither it nor its large tensors are copied or changed.

        Its external data, if it has any, is looked for in `base_dir`.  Raises `InputError` for a tensor that does
        not fill its shape, and for text that is not UTF-8.
        """
        if name := _not_text(proto):
            raise InputError(f"not a valid ONNX model: the name {name} is not UTF-8 text")
        _check_locations(proto.graph.initializer)
        slim = onnx.ModelProto()
        sources: dict[str, Source] = {}
        _copy(proto, slim, "graph")
        _copy(proto.graph, slim.graph, "initializer")
        for tensor in proto.graph.initializer:
            source = Borrowed(tensor)
            if source.size < skeleton.SMALL:
                slim.graph.initializer.append(tensor)
                continue
            tensors.check_filled(tensor, source.size)
            location = f"{_RESERVED}caller/{len(sources)}"
            sources[location] = source
            new = slim.graph.initializer.add()
            _copy(tensor, new, "raw_data")
            _refer(new, location, 0, source.size)
        data = DataFiles([] if base_dir is None else [Path(os.path.abspath(base_dir))])
        is_external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)
        model = cls(slim, b"", sources=sources, data=data, is_external=is_external)
        model._original = model.serialized()
        return model

    def to_proto(self) -> onnx.ModelProto:
        """The model as one object again, with everything inline but what was external in the source."""
        out = onnx.ModelProto()
        out.CopyFrom(self.proto)
        for tensor in tensors_of(out):
            if tensor.data_location == onnx.TensorProto.EXTERNAL and self.origin(tensor) is not Origin.EXTERNAL:
                raw = self.blob(tensor).array()
                del tensor.external_data[:]
                tensor.ClearField("data_location")
                tensor.raw_data = raw.tobytes()
        return out

    def array(self, tensor: onnx.TensorProto) -> Array:
        """The values of any tensor of the model, read afresh at each call.

        Types that numpy lacks come as ml_dtypes' (bfloat16, float8, int4, ...), strings as objects.  Raises
        `InputError` when the data is missing or does not fill the shape.
        """
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return tensors.decode(self.blob(tensor).array(), tensor.data_type, tensor.dims[:])
        return tensors.inline_array(tensor)

    def pieces(self, tensor: onnx.TensorProto) -> Iterator[bytes | memoryview]:
        """The bytes of the values, a piece at a time: a large tensor is never in memory as a whole.

        Raises `InputError` when the data is missing or does not fill the shape.
        """
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield from self.blob(tensor).pieces()
        elif (raw := tensors.raw_data(tensor)) is not None:
            yield raw
        else:
            yield tensors.inline_array(tensor).tobytes()

    def tensor(self, name: str, array: Array) -> onnx.TensorProto:
        """A new tensor for this model: small ones inline, large ones as a reference to a temporary file.

        Raises `InputError` for a type that ONNX lacks, and when no space is left for temporary files.
        """
        if array.dtype.kind in "OSU":
            return onnx.numpy_helper.from_array(array.astype(object), name)
        data_type, raw = tensors.encode(array)
        tensor = onnx.TensorProto(name=name, data_type=data_type, dims=array.shape)
        if raw.size < skeleton.SMALL:
            tensor.raw_data = raw.tobytes()
        else:
            self._spool = self._spool or Spool()
            _refer(tensor, _NEW, self._spool.append(raw), raw.size)
        return tensor

    def computed(
        self, name: str, base: onnx.TensorProto, rows: Callable[[Array, slice], Array]
    ) -> onnx.TensorProto | None:
        """A new tensor like `base`, whose rows are computed from those of `base` whenever they are read.

        rows: makes of some rows of `base`, given which those are, the new ones, of the same type and shape.
        None where it has to be stored, as the base is not left in a file, or was computed itself, or has long rows.
        """
        format = tensors.FORMATS.get(base.data_type)
        if base.data_location != onnx.TensorProto.EXTERNAL or format is None or format.bits < 8 or not base.dims:
            return None
        blob, shape = self.blob(base), base.dims[1:]
        row = len(blob) // max(1, base.dims[0])
        if not isinstance(blob.source, File | DataFile) or not 0 < row <= ROWS_AT_A_TIME:
            return None

        def compute(raw: Bytes, first: int) -> Bytes:
            count = len(raw) // row
            array = tensors.decode(raw, base.data_type, (count, *shape))
            return tensors.encode(rows(array, slice(first, first + count)))[1]

        location = f"{_COMPUTED}{len(self._computed)}"
        self._computed[location] = Computed(blob, row, compute)
        tensor = onnx.TensorProto(name=name, data_type=base.data_type, dims=base.dims)
        _refer(tensor, location, 0, len(blob))
        return tensor

    def blob(self, tensor: onnx.TensorProto) -> Blob:
        """Where the values of a referenced tensor lie.  Raises `InputError` when they cannot be there."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        # protobuf hands out strings that are not UTF-8 as bytes.
        if not all(isinstance(text, str) for entry in entries.items() for text in entry):
            raise InputError(
                f"the external data of tensor {shown(tensor.name)} is given by names that are not UTF-8 text"
            )
        location = entries.get("location", "")
        needed = tensors.stored_size(tensor)
        offset = _number(tensor, "offset", entries.get("offset", "0"))
        length = _number(tensor, "length", entries.get("length", str(needed)))
        tensors.check_filled(tensor, length)
        source = self._source(location) or self._data.find(location, tensor.name)
        if offset + length > source.size:
            raise InputError(
                f"the data of tensor {shown(tensor.name)} ends at byte {offset + length:,} of {shown(location)}, "
                f"which has {source.size:,}; the file is truncated or belongs to another model"
            )
        return Blob(source, offset, length)

    def origin(self, tensor: onnx.TensorProto) -> Origin:
        """Where the values of a referenced tensor come from."""
        for entry in tensor.external_data:
            if entry.key == "location":
                if entry.value == _NEW or entry.value in self._computed:
                    return Origin.NEW
                if entry.value in self._sources:
                    return Origin.INLINE
        return Origin.EXTERNAL

    def field(self, blob: Blob) -> int:
        """The field of a TensorProto that held these values in the source: `raw_data` but for typed values."""
        return self._typed.get(blob.offset, skeleton.RAW) if blob.source is self.whole else skeleton.RAW

    def changed(self) -> bool:
        """Whether `proto` differs from what was loaded or wrapped."""
        now = self.serialized()
        return now != self._original and now != _serialize(onnx.ModelProto.FromString(self._original))

    def serialized(self) -> bytes:
        """`proto` as bytes, references and all."""
        return _serialize(self.proto)

    def check_unchanged(self) -> None:
        """Raise `InputError` when somebody wrote into a file that tensors are read from."""
        if self.whole:
            self.whole.check_unchanged()
        self._data.check_unchanged()

    def close(self) -> None:
        """Give up its files, which the garbage collector might do late; its large tensors are not to be read after."""
        for source in (self.whole, self._spool, self._data):
            if source is not None:
                source.close()

    def data_files(self) -> list[Path]:
        """The files of external data that tensors have been read from."""
        return self._data.paths()

    def files(self) -> set[tuple[int, int]]:
        """(device, inode) of every file that tensors have been read from."""
        own = {(self.whole.identity.device, self.whole.identity.inode)} if self.whole else set()
        return own | self._data.identities()

    def _source(self, location: str) -> Source | None:
        return self._spool if location == _NEW else self._computed.get(location) or self._sources.get(location)


def tensors_of(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model or graph: initializers and attributes, subgraphs and functions included."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type and field.message_type.name in _HOLDERS:
            for item in [value] if isinstance(value, Message) else value:
                yield from tensors_of(item)


_HOLDERS = {"GraphProto", "NodeProto", "AttributeProto", "FunctionProto", "TensorProto"}


def _copy(source: Message, target: Message, but: str) -> None:
    """Copy every field but one; raises `InputError` for text that is none."""
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif hasattr(value, "append"):
            getattr(target, field.name).extend(value)
        elif isinstance(value, bytes) and field.type == field.TYPE_STRING:
            raise InputError(f"the field {field.name} of the model is not UTF-8 text: {shown(value)}")
        else:
            setattr(target, field.name, value)


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make `tensor` a reference."""
    tensor.MergeFromString(skeleton.reference(location, offset, length))


def _serialize(proto: onnx.ModelProto) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except EncodeError:
        raise InputError(
            "the model holds more than 2 GB in tensors without raw data, which protobuf cannot write; "
            "store them as raw data (onnx.numpy_helper.from_array)"
        ) from None


def _number(tensor: onnx.TensorProto, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InputError(
            f"the external data of tensor {shown(tensor.name)} has {key} {shown(text)}, which is no number"
        )
    return int(text)


def _not_text(proto: onnx.ModelProto) -> str:
    """A name that is not UTF-8, which protobuf hands out as bytes, or not at all; empty where there is none."""
    names: list[str | bytes] = []
    try:
        for graph in (proto.graph, *proto.functions):
            names += _names(graph)
        "".join(names)  # type: ignore[arg-type]  # it fails for bytes
    except UnicodeDecodeError as error:
        return shown(error.object)
    except TypeError:
        return next(shown(name) for name in names if isinstance(name, bytes))
    return ""


def _names(graph: onnx.GraphProto | onnx.FunctionProto) -> list[str]:
    """Every name in a graph, its bodies included."""
    names: list[str] = []
    for node in graph.node:
        names += (node.name, node.op_type, node.domain, *node.input[:], *node.output[:])
        for attribute in node.attribute:
            names.append(attribute.name)
            if attribute.type in _BODIES:
                for body in (attribute.g, *attribute.graphs):
                    names += _names(body)
    if isinstance(graph, onnx.FunctionProto):
        return [*names, graph.name, graph.domain, *graph.input, *graph.output]
    for values in (graph.initializer, graph.input, graph.output, graph.value_info):
        names += [tensor.name for tensor in values]
    return [*names, *(tensor.values.name for tensor in graph.sparse_initializer)]


_BODIES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _check_locations(tensors: Iterable[onnx.TensorProto]) -> None:
    """Raise `InputError` for a reference that only a `ModelFile` can hold, and only its own."""
    for tensor in tensors:
        for entry in tensor.external_data:
            if entry.key == "location" and str(entry.value).startswith(_RESERVED):
                raise InputError(
                    f"the data of tensor {shown(tensor.name)} is in the memory of another ModelFile; save that first"
                )


def _check_tensors(model: ModelFile) -> None:
    """Raise `InputError` for initializers that cannot be read; those in the model file were checked in passing.

    Also notes whether there is external data.
    """
    for tensor in model.proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if model.origin(tensor) is Origin.EXTERNAL:
                model.is_external = True
                model.blob(tensor)
        elif (raw := tensors.raw_data(tensor)) is not None:
            tensors.check_filled(tensor, len(raw))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the surrogates by which Python carries other bytes
        return False
    return True


def _other_format(file: File) -> str:
    """What the file is instead of an ONNX model, when its first bytes tell."""
    head = file.read(0, min(file.size, 512))
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself: run `git lfs pull`"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip archive, perhaps a PyTorch checkpoint: export the model with torch.onnx.export first"
    text = head.decode("utf-8", "ignore")  # the last character may be cut off
    if len(text.encode()) > len(head) - 4 and all(c.isprintable() or c in "\t\r\n" for c in text):
        return "is a text file, not an ONNX model"
    return ""
