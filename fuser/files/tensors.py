"""The data types of ONNX tensors: stored bytes to numpy arrays and back.

Types that numpy lacks come from ml_dtypes.  Types of fewer than eight bits are packed, the first element in the
lowest bits.  Source: https://onnx.ai/onnx/technical/
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx

from fuser.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Format(NamedTuple):
    """How the elements of one ONNX data type are stored, little-endian."""

    dtype: np.dtype[Any]
    bits: int


_NUMPY = {
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "FLOAT8E4M3FN": "float8_e4m3fn",
    "FLOAT8E4M3FNUZ": "float8_e4m3fnuz",
    "FLOAT8E5M2": "float8_e5m2",
    "FLOAT8E5M2FNUZ": "float8_e5m2fnuz",
    "FLOAT8E8M0": "float8_e8m0fnu",
    "FLOAT4E2M1": "float4_e2m1fn",
    "BOOL": "bool",
    "INT2": "int2",
    "INT4": "int4",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT2": "uint2",
    "UINT4": "uint4",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "COMPLEX64": "complex64",
    "COMPLEX128": "complex128",
}
_PACKED_BITS = {"FLOAT4E2M1": 4, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}


_MAX_RANK = 64  # numpy's; also bounds the product of hostile dimensions


def _formats() -> dict[int, Format]:
    """Every type that the installed onnx and ml_dtypes both know."""
    known = {}
    for name, numpy_name in _NUMPY.items():
        scalar = getattr(ml_dtypes, numpy_name, None) or getattr(np, numpy_name.replace("bool", "bool_"), None)
        if scalar is not None and name in onnx.TensorProto.DataType.keys():  # noqa: SIM118 - an enum, not a dict
            dtype = np.dtype(scalar)
            known[onnx.TensorProto.DataType.Value(name)] = Format(dtype, _PACKED_BITS.get(name, dtype.itemsize * 8))
    return known


FORMATS = _formats()
DATA_TYPES = {format.dtype: data_type for data_type, format in FORMATS.items()}


def stored_size(tensor: onnx.TensorProto) -> int:
    """The bytes of a tensor's raw data.  Raises `InputError` for a negative dimension or a type without such."""
    dims = tuple(tensor.dims[:])
    size = _stored_size(tensor.data_type, dims)
    if size is not None:
        return size
    if tensor.data_type in FORMATS:
        found = shown(list(dims))
        raise InputError(f"tensor {shown(tensor.name)} has an impossible shape, {found}; the file is corrupt")
    found = _type_name(tensor.data_type)
    raise InputError(f"tensor {shown(tensor.name)} has raw data of a type that this version cannot read: {found}")


@lru_cache(maxsize=1 << 12)
def _stored_size(data_type: int, dims: tuple[int, ...]) -> int | None:
    """None for what cannot be stored."""
    format = FORMATS.get(data_type)
    if format is None or len(dims) > _MAX_RANK or (dims and min(dims) < 0):
        return None
    count: int = math.prod(dims)
    return (count * format.bits + 7) // 8


def check_filled(tensor: onnx.TensorProto, length: int) -> tuple[int, ...]:
    """The shape of a tensor; raises `InputError` unless `length` bytes are what it takes in the tensor's type."""
    dims = tuple(tensor.dims[:])
    if _stored_size(tensor.data_type, dims) == length:
        return dims
    needed = stored_size(tensor)
    wanted = f"{needed:,}" if needed < 1 << 63 else "more than 2^63"
    raise InputError(
        f"tensor {shown(tensor.name)} of shape {shown(list(dims))} needs {wanted} bytes and has {length:,}; "
        "the file is corrupt"
    )


def shown(value: object) -> str:
    """A value from a file, for one line of an error message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _type_name(data_type: int) -> str:
    names = onnx.TensorProto.DataType
    return str(names.Name(data_type)) if data_type in names.values() else f"number {data_type}"


def raw_data(tensor: onnx.TensorProto) -> bytes | None:
    """The bytes of the values; None where they are stored otherwise."""
    raw: bytes = tensor.raw_data
    return raw if raw or tensor.HasField("raw_data") else None


def decode(raw: bytes | Bytes, data_type: int, dims: Sequence[int]) -> Array:
    """Stored bytes as an array; a view of them unless the type is packed."""
    dtype, bits = FORMATS[data_type]
    if bits == 8 * dtype.itemsize:
        array: Array = np.ndarray(tuple(dims), dtype, raw)
        return array
    codes = _unpack(np.frombuffer(raw, np.uint8), bits)[: math.prod(dims)]
    if dtype.name.startswith("int"):  # two's complement of `bits` bits, widened to eight
        signed: Array = (codes << (8 - bits)).view(np.int8) >> (8 - bits)
        return signed.astype(dtype).reshape(dims)
    if dtype.name.startswith("uint"):
        return codes.astype(dtype).reshape(dims)
    return codes.view(dtype).reshape(dims)


def inline_array(tensor: onnx.TensorProto) -> Array:
    """The values of a tensor that holds them itself.  Raises `InputError` when they do not fill its shape."""
    if (raw := raw_data(tensor)) is not None:
        return decode(raw, tensor.data_type, check_filled(tensor, len(raw)))
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise InputError(f"tensor {shown(tensor.name)} cannot be read: {error}") from None
    format = FORMATS.get(tensor.data_type)
    return array.astype(format.dtype, copy=False) if format else array


def encode(array: Array) -> tuple[int, Bytes]:
    """The ONNX data type of an array and its stored bytes.  Raises `InputError` for a type ONNX lacks."""
    array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    data_type = DATA_TYPES.get(array.dtype)
    if data_type is None:
        raise InputError(f"ONNX has no data type for an array of {array.dtype}")
    bits = FORMATS[data_type].bits
    if bits < 8 and "int" in array.dtype.name:
        return data_type, _pack(array.astype(np.int8).reshape(-1).view(np.uint8), bits)
    raw = array.reshape(-1).view(np.uint8)
    return data_type, _pack(raw, bits) if bits < 8 else raw


def _unpack(raw: Bytes, bits: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: Bytes = (raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(-1)


def _pack(codes: Bytes, bits: int) -> Bytes:
    per_byte = 8 // bits
    codes = np.pad(codes & np.uint8((1 << bits) - 1), (0, -len(codes) % per_byte)).reshape(-1, per_byte)
    packed: Bytes = np.bitwise_or.reduce(codes << np.arange(0, 8, bits, dtype=np.uint8), axis=1)
    return packed
