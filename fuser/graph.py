"""The whole contract between a pass and a graph.

A pass sees a `Graph` and the ops of `fuser.ops`; it never learns which framework is underneath.  Reading never
changes anything.  Each editing verb leaves the graph valid, and none edits a constant in place: a tensor that
two call sites share is safe by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from fuser.affine import Scaled
from fuser.ops import (
    AveragePool,
    Concat,
    Conv,
    Linear,
    MaxPool,
    Movement,
    Op,
    Pad,
    Padding,
    Range,
    Reduction,
    Reshape,
    Slice,
    SplitSequence,
    Sum,
    Transpose,
    Value,
)
from fuser.remarks import Missed

Array: TypeAlias = np.ndarray[Any, Any]
Dim: TypeAlias = int | str | None
"""A size, the name of a dynamic dimension (equal names are equal sizes), or not known."""

O = TypeVar("O", bound=Op)  # noqa: E741


class Reader(NamedTuple):
    """Who reads a value: a name for a person, and the op where the vocabulary has one.

    shape_only: it asks for the shape, the type or the device, and never for the elements.
    """

    name: str
    op: Op | None
    shape_only: bool = False


@dataclass
class Summary:
    """What a graph is made of.  `ops` counts node types under the names its users know; `bytes` counts the
    constants as they are stored, each shared tensor once.

    multiply_adds: of one inference, in convolutions and matrix products; a dynamic first axis of an input counts as
        one sample.  None where another size is not known, and where an operator may run many times or never.
    """

    ops: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0
    multiply_adds: int | None = None


class Graph(Protocol):
    """A torch.fx graph or an ONNX model, seen through the vocabulary."""

    host: str
    """"onnx" or "torch"; a pass may name the hosts it is meant for."""
    rows_only: bool
    """Whether a `Linear` that adds its bias itself takes a matrix, and no data of more axes."""
    edits: int
    """How many edits have been made: the pipeline audits it against what the passes say they did."""

    # -- reading

    def ops(self, kind: type[O]) -> Iterator[O]:
        """The ops of one kind, in topological order, subgraphs and functions included.

        Each is read when it is reached, so a pass may edit between two steps.
        """
        ...

    def op_producing(self, value: Value) -> Op | None:
        """The op that makes `value`; None for inputs, constants and what the vocabulary has no word for."""
        ...

    def readers(self, value: Value) -> Sequence[Reader]:
        """Every reader: outputs of the graph and captures by subgraphs included, one entry for each use."""
        ...

    def constant(self, value: Value) -> Array | Missed:
        """The value as an array, or why it is not known before run time.

        Codes: `not-constant`, `overridable` (an initializer the caller may replace), `quantized` (behind a
        DequantizeLinear).  The array is read-only; bfloat16 and the like come as ml_dtypes.
        """
        ...

    def shape(self, value: Value) -> tuple[Dim, ...] | None:
        """What is known of the shape; never guessed.  None: not even the rank is known."""
        ...

    def rank(self, value: Value) -> int | None:
        """The number of axes where it is proven (a BatchNorm2d proves four), else None."""
        ...

    def can_vanish(self, op: Op, by: Value) -> bool:
        """Whether `replace(op, by)` leaves no node behind; it must where both values are named in a signature."""
        ...

    def is_stable(self, value: Value) -> bool:
        """Whether every reader sees the same elements: nobody writes into the value, or into a view of it."""
        ...

    def freed(self, value: Value) -> int:
        """How many elements of stored constants nobody would read any more if one reader of `value` let go of it."""
        ...

    def refuses_padding(self, op: Conv | AveragePool | MaxPool, pad: Pad, padding: Padding) -> Missed | None:
        """Why `op` cannot read the input of `pad` and add `padding` by itself in this graph; None where it can.

        Codes: `asymmetric` (torch pads both sides alike), `window` (a pool pads by no more than half a window),
        `layout` (the result would be laid out differently in memory).
        """
        ...

    def refuses_uniting(self, op: Linear) -> Missed | None:
        """Why `op` cannot add its bias itself in this graph; None where it can.

        Codes: `type` (there is no such operator), `grows` (the weight would be stored once more).
        """
        ...

    def describe(self, x: Op | Value) -> str:
        """A name under which a person finds it in their model; unique within the model for an op."""
        ...

    def summary(self) -> Summary:
        """Node counts, parameters and bytes."""
        ...

    # -- editing

    def set_constants(self, op: Op, **arrays: Array | Scaled | None) -> None:
        """Give this call site new constants, by the names of the op's fields (`weight`, `bias`, ...).

        A `Scaled` is the constant that is there now, times a factor.

        New names, and nobody else's change.  An absent operand is added, and None takes an optional one away.
        A `Linear` is left with alpha = beta = 1.  Each array has the dtype that is to be stored.
        A weight may make another number of outputs if `replace` then lets them stand for a value of that size.
        """
        ...

    def set_padding(self, op: Conv | AveragePool | MaxPool, padding: Padding) -> None:
        """Let the op add so much around its input; the zeros of an average count."""
        ...

    def replace(self, op: Op, by: Value) -> None:
        """Readers of the op's output read `by` instead; the op is gone.  The signature keeps its names.

        Readers of the further outputs of a `Duplicate` read those of its twin.
        """
        ...

    def set_input(self, op: Op, value: Value) -> None:
        """Let the op read `value`, which may be of another size, as its input."""
        ...

    def set_inputs(self, op: Concat | Sum, values: Sequence[Value]) -> None:
        """Let the op join, or add up, other values, whose result is as large as that of its own."""
        ...

    def set_permutation(self, op: Transpose, permutation: Sequence[int]) -> None:
        """Let the op permute the axes like this."""
        ...

    def set_ranges(self, op: Slice, ranges: Sequence[Range]) -> None:
        """Let the op take these ranges of its input, which may be of another size."""
        ...

    def set_shape(self, op: Movement) -> None:
        """Let an `absolute` op say the shape of its output without that of its input, which may be of another one."""
        ...

    def reduce_in_shape(self, op: Reduction, reshape: Reshape) -> None:
        """Let a reduction, which only `reshape` reads, keep its axes if it does not, and drop them if it does."""
        ...

    def unite(self, op: Linear, around: tuple[Reshape, Reshape] | None) -> None:
        """Let one node multiply and add the bias.

        around: the reshapes in front and behind; the one in front makes rows from now on, the other one takes them.
        """
        ...

    def replace_with_constant(self, op: Op) -> None:
        """Put the value of a `Constant` op in its place; only the graph knows how it was computed."""
        ...

    def split(self, op: SplitSequence) -> None:
        """Make the parts themselves in the place of a sequence of them; each is taken at most once."""
        ...

    def erase(self, op: Op) -> None:
        """Drop an op that nobody reads."""
        ...

    def commit(self) -> None:
        """Drop what the edits orphaned and check that the graph is valid; raises ValueError if it is not."""
        ...
