"""The user's own inputs: `.npz`, `.npy`, ONNX test data folders, or arrays in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fuser.errors import InputError
from fuser.proof.inputs import InputSet, Spec
from fuser.proof.outcome import first_line
from fuser.proof.rounding import is_float


def given(inputs: Any, specs: Sequence[Spec]) -> list[InputSet]:
    """The sets in `inputs`: a path, arrays by name, arrays in order, or a list of any of these.

    Raises `InputError` for a missing or unreadable file, for inputs that are missing, unknown or of another type.
    """
    if isinstance(inputs, (str, os.PathLike)):
        return _from_path(Path(inputs), specs)
    if isinstance(inputs, Mapping):
        return [InputSet("given", _by_name(inputs, specs, "the given data"))]
    if isinstance(inputs, (list, tuple)):
        if inputs and all(isinstance(item, (Mapping, list, tuple, str, os.PathLike)) for item in inputs):
            return [one for item in inputs for one in given(item, specs)]
        return [InputSet("given", _in_order(list(inputs), specs, "the given data"))]
    return [InputSet("given", _in_order([inputs], specs, "the given data"))]


def check_path(inputs: Any) -> None:
    """Raise `InputError` where the `inputs` are a path at which nothing is."""
    if isinstance(inputs, (str, os.PathLike)) and not Path(inputs).exists():
        raise InputError(f"there is no {inputs}; give inputs as .npz, .npy or a test_data_set folder")


def _from_path(path: Path, specs: Sequence[Spec]) -> list[InputSet]:
    check_path(path)
    if path.is_dir():
        folders = sorted(path.glob("test_data_set_*"), key=_number) or [path]
        return [InputSet(folder.name, _in_order(_folder(folder), specs, str(folder))) for folder in folders]
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.ndarray):
            with arrays as content:
                arrays = {name: content[name] for name in content.files}
    except Exception as error:  # a damaged file has numpy, zipfile and zlib raise what they like
        raise InputError(f"{path} is not readable as .npz or .npy: {first_line(error)}") from None
    if isinstance(arrays, np.ndarray):
        return [InputSet(path.name, _in_order([arrays], specs, str(path)))]
    if not {spec.name for spec in specs} & set(arrays) and all(re.fullmatch(r"arr_\d+", name) for name in arrays):
        return [InputSet(path.name, _in_order(list(arrays.values()), specs, str(path)))]
    return [InputSet(path.name, _by_name(arrays, specs, str(path)))]


def _folder(folder: Path) -> list[Any]:
    files = sorted(folder.glob("input_*.pb"), key=_number)
    if not files:
        raise InputError(f"{folder} holds no input_0.pb; a test data folder has input_N.pb files")
    return [_read_pb(file) for file in files]


def _read_pb(file: Path) -> Any:
    data = file.read_bytes()
    for kind, read in (
        (onnx.TensorProto, onnx.numpy_helper.to_array),
        (onnx.SequenceProto, onnx.numpy_helper.to_list),
        (onnx.OptionalProto, onnx.numpy_helper.to_optional),
    ):
        try:
            proto = kind.FromString(data)
            if kind is not onnx.TensorProto or proto.data_type:
                return read(proto)
        except Exception:  # protobuf raises its own kinds; the next one may fit
            continue
    raise InputError(f"{file} is not a TensorProto, a SequenceProto or an OptionalProto")


def _by_name(arrays: Mapping[str, Any], specs: Sequence[Spec], source: str) -> tuple[Any, ...]:
    names = [spec.name for spec in specs]
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f"{source} has nothing for the input {missing[0]!r}; it has {', '.join(map(repr, arrays))}")
    if unknown := [name for name in arrays if name not in names]:
        raise InputError(
            f"{source} has {unknown[0]!r}, which is no input; the inputs are {', '.join(map(repr, names))}"
        )
    return tuple(_fit(arrays[spec.name], spec) for spec in specs)


def _in_order(arrays: Sequence[Any], specs: Sequence[Spec], source: str) -> tuple[Any, ...]:
    if len(arrays) != len(specs):
        names = ", ".join(repr(spec.name) for spec in specs)
        raise InputError(f"{source} has {len(arrays)} arrays for {len(specs)} inputs ({names})")
    return tuple(_fit(array, spec) for array, spec in zip(arrays, specs, strict=True))


def _fit(value: Any, spec: Spec) -> Any:
    """`value` as an array of the input's type; float to float and integer to integer are converted."""
    if value is None and spec.container == "optional":
        return None
    if spec.container == "sequence" and isinstance(value, (list, tuple)):
        inner = Spec(spec.name, spec.dtype, spec.dims)
        return [_fit(item, inner) for item in value]
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind in "SU":
        array = array.astype(object)
    if array.dtype != spec.dtype:
        floats = is_float(array.dtype) and is_float(spec.dtype)
        integers = array.dtype.kind in "iu" and spec.dtype.kind in "iu"
        converted = array.astype(spec.dtype) if floats or integers else None
        if converted is None or (integers and not np.array_equal(converted, array)):
            raise InputError(f"input {spec.name!r} takes {spec.dtype}, not {array.dtype}")
        array = converted
    if spec.dims is not None and len(spec.dims) != array.ndim:
        raise InputError(f"input {spec.name!r} has {len(spec.dims)} dimensions, not {array.ndim} ({list(array.shape)})")
    for axis, (dim, size) in enumerate(zip(spec.dims or array.shape, array.shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise InputError(f"dimension {axis} of input {spec.name!r} is {dim}, not {size}")
    return array


def _number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits else -1, path.name)
