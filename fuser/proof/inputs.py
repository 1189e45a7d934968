"""Inputs for a comparison: seeded, of several kinds and sizes, within what the model accepts; or the user's own.

Generated values follow what the graph says of each input (`hints.py`).  Whether the model accepts them is found out
by running the original: what it rejects is never held against the other model.
"""

from __future__ import annotations

import ast
import math
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from fuser.errors import InputError
from fuser.files import ModelFile
from fuser.proof.hints import Hint, hints
from fuser.proof.interface import public_inputs
from fuser.proof.rounding import is_float

Array = np.ndarray[Any, Any]

KINDS = ("normal", "large", "zeros", "negative", "small", "unit")
"""Standard normal; a hundred times that (eight for 16-bit types); zeros; negative normal; a thousandth; [0, 1).

Integers that index nothing are below 4, below 300 where they are large, and down to -4 where they are negative.
"""

SIZES = (32, 64, 128, 224, 256, 512, 8, 16, 4, 2, 1, 12, 24, 48, 96, 384, 640, 768, 1024, 4096)
"""Sizes that are tried, in this order, for dimensions that the model leaves open."""

LARGE = 1 << 22
"""Elements of the inputs together that are not passed to find out which sizes the model accepts."""

_WORDS = ["a", "b", "hello", "world", ""]
_HOW = "give data with --inputs FILE (.npz, .npy or a test_data_set folder), in Python inputs={{{name!r}: array}}"


@dataclass(frozen=True)
class InputSet:
    """One set of inputs.  `values` are in the model's order; None leaves an input to its default."""

    label: str
    values: tuple[Any, ...]


@dataclass
class Spec:
    """What an input must look like.

    dims: a size, or the name of a symbol; None where the rank is not known.
    container: "tensor", "sequence" or "optional".
    """

    name: str
    dtype: np.dtype[Any]
    dims: list[int | str] | None
    container: str = "tensor"
    hint: Hint = field(default_factory=Hint)


Sizes = Mapping[str, int]


def specs_of(model: ModelFile, input_shapes: Mapping[str, Sequence[int]] | None = None) -> list[Spec]:
    """One spec for each input that a caller must give.

    input_shapes: shapes by name of the input, for dimensions that the model leaves open.
    Raises `InputError` for shapes that the model does not have, and for inputs that cannot be generated.
    """
    hint_of = hints(model)
    specs = [_spec(value, hint_of(value.name)) for value in public_inputs(model.proto.graph)]
    by_name = {spec.name: spec for spec in specs}
    for name, shape in (input_shapes or {}).items():
        if name not in by_name:
            raise InputError(f"there is no input {name!r}; the inputs are {', '.join(map(repr, by_name))}")
        by_name[name].dims = _merge(by_name[name], list(shape))
    return specs


def symbols_of(specs: Sequence[Spec]) -> list[str]:
    """The symbols whose sizes are open, in the order in which they appear; expressions are not symbols."""
    found: dict[str, None] = {}
    for spec in specs:
        for dim in spec.dims or []:
            if isinstance(dim, str):
                found |= dict.fromkeys(_names_in(dim))
    return list(found)


def base_sizes(specs: Sequence[Spec]) -> list[Sizes]:
    """Sizes to try for the open symbols, the likeliest first: batches of one, everything else alike.

    What would take more than LARGE elements is left out, where others take fewer.
    """
    different = {tuple(sizes.values()): sizes for sizes in _base_sizes(specs)}.values()
    counts = [sum(_elements(spec, sizes) for spec in specs) for sizes in different]
    most = max(LARGE, min(counts))
    return [sizes for sizes, count in zip(different, counts, strict=True) if count <= most]


def _base_sizes(specs: Sequence[Spec]) -> Iterator[Sizes]:
    symbols = symbols_of(specs)
    batch = _batch_symbols(specs)
    if not symbols:
        yield {}
        return
    if all(symbol in batch for symbol in symbols):
        yield from (dict.fromkeys(symbols, size) for size in (1, 2, 4))
    for size in SIZES:
        yield {symbol: 1 if symbol in batch else size for symbol in symbols}
    for size in (1, 2, 3, 8, 32):
        yield dict.fromkeys(symbols, size)


def more_sizes(specs: Sequence[Spec], base: Sizes) -> Iterator[dict[str, int]]:
    """Other sizes once `base` is known to work: all symbols unequal, a larger batch, sizes that are not round."""
    batch = _batch_symbols(specs)
    rest = [symbol for symbol in base if symbol not in batch]
    if not base:
        return
    larger = len(rest) == 1  # with several, one of them may stay as it is
    yield {
        **{symbol: 2 + index for index, symbol in enumerate(batch)},
        **{symbol: base[symbol] * (1 + larger + index) for index, symbol in enumerate(rest)},
    }
    if batch:
        yield {**base, **dict.fromkeys(batch, 3)}
    if rest:
        yield {**base, **{symbol: base[symbol] + 1 + index for index, symbol in enumerate(rest)}}


def generate(specs: Sequence[Spec], sizes: Sizes, kind: str, seed: int) -> InputSet:
    """A set of inputs of one kind; the same arguments give the same values.

    Raises `InputError` where the sizes that were asked for do not fit into memory.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    try:
        values = tuple(_value(spec, sizes, kind, rng) for spec in specs)
    except MemoryError as error:
        raise InputError(f"inputs of these sizes do not fit into memory: {error}") from error
    where = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
    return InputSet(f"{kind} (seed {seed}{', ' + where if where else ''})", values)


def vary(examples: Sequence[Any], kind: str, seed: int) -> InputSet:
    """Like the examples in type and shape, with other values: integers stay within the range of the example."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    return InputSet(f"{kind} (seed {seed})", tuple(_like(example, kind, rng) for example in examples))


def unknown_rank(specs: Sequence[Spec]) -> list[Spec]:
    """The inputs of which not even the rank is known."""
    return [spec for spec in specs if spec.dims is None]


def with_rank(specs: Sequence[Spec], rank: int) -> list[Spec]:
    """The same specs, where inputs of unknown rank have `rank` axes."""
    return [
        spec
        if spec.dims is not None
        else Spec(spec.name, spec.dtype, _pinned(spec.name, [None] * rank, spec.hint), spec.container, spec.hint)
        for spec in specs
    ]


def refused(specs: Sequence[Spec], message: str) -> InputError:
    """The error for a model that accepts nothing that was generated."""
    names = ", ".join(repr(spec.name) for spec in specs)
    shapes = ", ".join(f"{spec.name!r}: (1, ...)" for spec in specs if spec.dims is None or _is_open(spec))
    remedy = (
        f"give sizes with --input-shape NAME:1,3,224,224, in Python input_shapes={{{shapes}}}, or " if shapes else ""
    )
    empty = ", ".join(f"a size of 0 for {spec.name!r}" for spec in specs if 0 in (spec.dims or []))
    return InputError(
        f"the model rejects every generated input for {names} (the last answer: {message}); "
        f"{f'it declares {empty}; ' if empty else ''}{remedy}{_HOW.format(name=specs[0].name if specs else 'x')}"
    )


# -- reading what the model declares


def _spec(value: onnx.ValueInfoProto, hint: Hint) -> Spec:
    kind, container = value.type, "tensor"
    if (which := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
        container = "sequence" if which == "sequence_type" else "optional"
        kind = getattr(kind, which).elem_type
    if kind.WhichOneof("value") != "tensor_type":
        what = (kind.WhichOneof("value") or "value without a type").replace("_", " ")
        raise InputError(f"input {value.name!r} is a {what}, which cannot be generated; {_HOW.format(name=value.name)}")
    tensor = kind.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        raise InputError(
            f"input {value.name!r} has an element type that ONNX does not know: {tensor.elem_type}"
        ) from None
    dims: list[int | str] | None = None
    if tensor.HasField("shape"):
        dims = _pinned(value.name, [_dim(dim) for dim in tensor.shape.dim], hint)
    elif hint.rank is not None:
        dims = _pinned(value.name, [None] * hint.rank, hint)
    return Spec(value.name, dtype, dims, container, hint)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.WhichOneof("value") == "dim_param" and dim.dim_param:
        return str(dim.dim_param)
    return int(dim.dim_value) if dim.WhichOneof("value") == "dim_value" and dim.dim_value >= 0 else None


def _pinned(name: str, dims: Sequence[int | str | None], hint: Hint) -> list[int | str]:
    """Dimensions with what the readers demand; those of which nothing is known get a symbol of their own."""
    pins = {axis % len(dims): size for axis, size in hint.pins.items() if -len(dims) <= axis < len(dims)}
    return [
        dim if isinstance(dim, int) else pins.get(axis, dim if dim is not None else f"{name}[{axis}]")
        for axis, dim in enumerate(dims)
    ]


def _merge(spec: Spec, shape: list[int]) -> list[int | str]:
    if spec.dims is not None and len(spec.dims) != len(shape):
        raise InputError(f"input {spec.name!r} has {len(spec.dims)} dimensions, not {len(shape)}")
    for axis, (dim, size) in enumerate(zip(spec.dims or shape, shape, strict=True)):
        if dim != size and (size < 1 or isinstance(dim, int)):
            raise InputError(f"dimension {axis} of input {spec.name!r} is {dim}; it cannot be {size}")
    return list(shape)


def _is_open(spec: Spec) -> bool:
    return any(isinstance(dim, str) for dim in spec.dims or [])


def _batch_symbols(specs: Sequence[Spec]) -> list[str]:
    """Symbols of a first axis, unless it is the only axis; and those that are called a batch."""
    found: dict[str, None] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.dims or []):
            if isinstance(dim, str) and ("batch" in dim.lower() or (axis == 0 and len(spec.dims or []) > 1)):
                found |= dict.fromkeys(_names_in(dim))
    return list(found)


# -- symbolic dimensions: torch's exporter writes expressions such as "2*s0 + 1"

_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Pow: operator.pow,
}


def _parsed(dim: str) -> ast.expr | None:
    """The expression a dimension is, or None for a mere name (`unk__132`, `?`, `past-length`)."""
    if "-" in dim and " - " not in dim:
        return None
    try:
        tree = ast.parse(dim, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        return None
    allowed = (ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.expr_context)
    return tree if isinstance(tree, ast.BinOp) and all(isinstance(part, allowed) for part in ast.walk(tree)) else None


def _names_in(dim: str) -> list[str]:
    tree = _parsed(dim)
    return [dim] if tree is None else sorted({part.id for part in ast.walk(tree) if isinstance(part, ast.Name)})


def _size(dim: int | str, sizes: Sizes) -> int:
    if isinstance(dim, int):
        return dim
    tree = _parsed(dim)
    return max(1, _evaluate(tree, sizes)) if tree is not None else sizes[dim]


def _evaluate(tree: ast.AST, sizes: Sizes) -> int:
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        return int(_OPERATORS[type(tree.op)](_evaluate(tree.left, sizes), _evaluate(tree.right, sizes)))
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    return int(tree.value) if isinstance(tree, ast.Constant) else 1  # type: ignore[arg-type]


def _elements(spec: Spec, sizes: Sizes) -> int:
    return math.prod(_size(dim, sizes) for dim in spec.dims or [])


# -- values


def _value(spec: Spec, sizes: Sizes, kind: str, rng: np.random.Generator) -> Any:
    shape = tuple(_size(dim, sizes) for dim in spec.dims or [])
    if math.prod(shape) * np.dtype(np.float64).itemsize > sys.maxsize:  # numpy would raise a ValueError
        raise MemoryError(f"{spec.name!r} has the shape {list(shape)}")
    if spec.container == "sequence":
        return [np.asarray(_tensor(spec, shape, kind, rng)) for _ in range(2)]
    return np.asarray(_tensor(spec, shape, kind, rng))  # without axes numpy gives scalars, which no runtime must take


def _tensor(spec: Spec, shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> Any:
    hint, dtype, name = spec.hint, spec.dtype, spec.name.lower()
    if dtype.kind == "O" or dtype.kind in "SU":
        return np.asarray(rng.choice(hint.words or _WORDS, shape), object)
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    if is_float(dtype):
        if "mask" in name:
            return (rng.random(shape) < 0.8).astype(dtype)
        return _floats(shape, dtype, kind, rng)
    if hint.choices:
        return np.asarray(rng.choice(np.asarray(hint.choices), shape)).astype(dtype)
    if hint.below is not None:
        return rng.integers(0, 1 if kind == "zeros" else hint.below, shape).astype(dtype)
    if hint.is_size or hint.is_length:
        return rng.integers(1, 4, shape).astype(dtype)
    if "mask" in name:
        return (rng.random(shape) < 0.8).astype(dtype)
    if dtype.itemsize == 1:
        limits = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
        return rng.integers(int(limits.min), int(limits.max) + 1, shape).astype(dtype)
    least = -4 if kind == "negative" and dtype.kind == "i" else 0
    return rng.integers(least, {"zeros": 1, "large": 300}.get(kind, 4), shape).astype(dtype)


def _floats(shape: tuple[int, ...], dtype: np.dtype[Any], kind: str, rng: np.random.Generator) -> Array:
    if kind == "zeros":
        return np.zeros(shape, dtype)
    values = np.asarray(rng.random(shape) if kind == "unit" else rng.standard_normal(shape))
    if kind == "negative":
        values = -np.abs(values)
    factor = {"large": 8.0 if dtype.itemsize < 4 else 100.0, "small": 1e-3}.get(kind, 1.0)
    return (values * factor).astype(dtype)


def _like(example: Any, kind: str, rng: np.random.Generator) -> Any:
    if not isinstance(example, np.ndarray):
        return example
    if is_float(example.dtype):
        return _floats(example.shape, example.dtype, kind, rng)
    if example.dtype == np.bool_ or example.ndim == 0 or not example.size:
        return rng.permutation(example.reshape(-1)).reshape(example.shape)
    return rng.integers(int(example.min()), int(example.max()) + 1, example.shape).astype(example.dtype)
