"""The vocabulary: one frozen dataclass for each *meaning*, whatever graph or dialect it was read from.

`Conv` is an `nn.Conv2d` of a traced module, a functional call, an aten operator or an ONNX node.  An op is a
reading: it says what a node means, and holds until the next edit of the graph.  Values are the graph's own
handles, compared with `is`; only the graph can look inside.  A `None` value is an operand that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from fuser.remarks import Missed

Value: TypeAlias = Any
Padding: TypeAlias = tuple[tuple[int, int], ...]
"""How much is added (before, after) each axis."""


@dataclass(frozen=True, eq=False)
class Op:
    """A node and the value it produces.

    node: the graph's own handle, for its editing verbs; passes do not look inside.
    output: the value produced.
    hooked: user code watches or reparametrizes this very call (forward hooks, parametrizations), or whatever else
        the `Missed` says, so it may not be changed.
    """

    node: Any = field(repr=False)
    output: Value
    hooked: bool | Missed = field(default=False, kw_only=True, repr=False)


@dataclass(frozen=True, eq=False)
class LinearOperator(Op):
    """y = W input + b: a `Conv` or a `Linear`."""

    input: Value
    weight: Value
    bias: Value | None


@dataclass(frozen=True, eq=False)
class Conv(LinearOperator):
    """y = conv(input, weight) + bias over axis 1 of [N, Cin, *spatial]; transposed convolutions included.

    weight: [Cout, Cin/groups, *kernel], or [Cin, Cout/groups, *kernel] when transposed.
    padding: zeros added (before, after) each spatial axis; None when it depends on the input's size or is
        not made of zeros.
    pads_zeros: whether it would pad with zeros, and not with elements of the input.
    """

    groups: int = 1
    transposed: bool = False
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    padding: Padding | None = None
    pads_zeros: bool = True

    @property
    def out_axis(self) -> int:
        """The axis of the weight along which the outputs are (those of one group, when transposed)."""
        return 1 if self.transposed else 0


@dataclass(frozen=True, eq=False)
class Linear(LinearOperator):
    """y = alpha * (input @ weight) + beta * bias, where the weight is a matrix.

    weight: [out, in] when `out_axis` is 0, [in, out] when it is 1.
    bias: broadcast against the output; [out] in most models.
    in_axis: the axis of the input that is summed over; -1, or 0 for a Gemm with transA.
    apart: the bias is added by a node of its own.
    The features come out on the last axis.
    """

    out_axis: int = 0
    in_axis: int = -1
    alpha: float = 1.0
    beta: float = 1.0
    apart: bool = False


@dataclass(frozen=True, eq=False)
class BatchNorm(Op):
    """y = (input - mean) / sqrt(var + epsilon) * scale + bias along axis 1; parameters are [C].

    scale and bias are None where the layer has no affine part; mean and var are None where it has no running
    statistics.  per_channel is False for the BatchNormalization-7 with `spatial=0`, which keeps statistics for
    each element.  epsilon is None where the caller of an ONNX function decides it.
    """

    input: Value
    scale: Value | None
    bias: Value | None
    mean: Value | None
    var: Value | None
    epsilon: float | None
    training: bool = False
    per_channel: bool = True


@dataclass(frozen=True, eq=False)
class Normalization(Op):
    """y = n(input) * scale + bias, where n uses the statistics of the input itself: LayerNorm, RMSNorm, GroupNorm.

    scale and bias are [C] along `axis`, or None where the layer has none.
    axis: never negative, except for -1 where the number of axes is not known.
    keeps_scale: the operator cannot be called without a scale.
    """

    input: Value
    scale: Value | None
    bias: Value | None
    axis: int
    keeps_scale: bool = False


@dataclass(frozen=True, eq=False)
class Arithmetic(Op):
    """y = arithmetic of the operands, element by element, with the broadcasting of numpy."""

    @property
    def terms(self) -> tuple[tuple[int, Value], ...]:
        """(sign, operand) of each summand; empty for what is no sum."""
        return ()


@dataclass(frozen=True, eq=False)
class Elementwise(Arithmetic):
    """y = left `function` right; function is one of + - * /."""

    function: str
    left: Value
    right: Value

    @property
    def terms(self) -> tuple[tuple[int, Value], ...]:
        return {"+": ((1, self.left), (1, self.right)), "-": ((1, self.left), (-1, self.right))}.get(self.function, ())


@dataclass(frozen=True, eq=False)
class Sum(Arithmetic):
    """y = the sum of three inputs or more."""

    inputs: tuple[Value, ...]

    @property
    def terms(self) -> tuple[tuple[int, Value], ...]:
        return tuple((1, value) for value in self.inputs)


@dataclass(frozen=True, eq=False)
class Identity(Op):
    """y = input: Identity, Dropout in eval mode, a Cast to the type it has.

    `Graph.ops(Identity)` finds ops of other kinds, too, where they change nothing: x * 1, a Reshape to the same shape.
    """

    input: Value


@dataclass(frozen=True, eq=False)
class Movement(Op):
    """y has each element of `input` once; nothing is computed.

    absolute: y has the elements in the same order, and its shape does not depend on that of `input`, but for its number
        of elements, or `Graph.set_shape` can say it like that.
    """

    input: Value
    absolute: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, eq=False)
class Reshape(Movement):
    """y has the elements of `input` in the same order in another shape: Flatten, Squeeze, Unsqueeze too.

    front, back: so many axes in front, and at the back, are sure to be those of the input, whatever the sizes are.
    """

    front: int = 0
    back: int = 0


@dataclass(frozen=True, eq=False)
class Transpose(Movement):
    """Axis i of y is axis permutation[i] of `input`."""

    permutation: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Concat(Op):
    """y = the inputs, one after another along `axis` (never negative)."""

    inputs: tuple[Value, ...]
    axis: int


class Range(NamedTuple):
    """x[start:end:step] along `axis`, with the meaning that Python gives it; a negative axis counts from the last."""

    axis: int
    start: int
    end: int
    step: int = 1


@dataclass(frozen=True, eq=False)
class Slice(Op):
    """y = the elements of `input` in a range along each of some axes, all of which are different."""

    input: Value
    ranges: tuple[Range, ...]


@dataclass(frozen=True, eq=False)
class Pad(Op):
    """y = `input` with elements around it; where a number of them is negative, elements are taken away.

    padding: for the last axes of the input, as many as are padded; or why that is not known.
    value: what the elements are.
    mode: "constant", or the name of the rule by which they repeat elements of the input.
    lowest: no number of its type is below that.
    """

    input: Value
    padding: Padding | Missed
    value: float | Missed = 0.0
    mode: str = "constant"
    lowest: float = float("-inf")


@dataclass(frozen=True)
class Window:
    """Which elements a pool looks at: for each spatial axis `size` neighbours, every `stride` elements.

    padding: what the pool itself adds around its input; no window reaches beyond it.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding


@dataclass(frozen=True, eq=False)
class AveragePool(Op):
    """y = the mean over windows of the spatial axes (2 and up) of [N, C, *spatial]; global pooling too.

    pads_counted: some windows average over padding zeros, so y of a constant is not that constant.
    window: None where it depends on the size of the input.
    hollow: some windows may have no element of the input, only padding; what y is there depends on no element.
    """

    input: Value
    pads_counted: bool = False
    window: Window | None = None
    hollow: bool = False


@dataclass(frozen=True, eq=False)
class Resize(Op):
    """y = interpolation of [N, C, *spatial] between elements along any axis but 1, with weights that sum to one."""

    input: Value


@dataclass(frozen=True, eq=False)
class MaxPool(Op):
    """y = the largest element of each window of the spatial axes; padding is below every element.

    spatial: how many axes that are, the last ones.
    window: None where it depends on the size of the input, or leaves gaps.
    hollow: some windows may have no element of the input, and y is then the lowest number, but for infinity.
    """

    input: Value
    spatial: int
    window: Window | None = None
    hollow: bool = False


@dataclass(frozen=True, eq=False)
class Reduction(Op):
    """y = the mean, the largest, the sum, ... of the elements along `axes`.

    function: "mean", "max", "sum" and so on, as ONNX names them.
    axes: never negative.
    keeps_axes: whether they stay, of size 1.
    """

    input: Value
    function: str
    axes: frozenset[int]
    keeps_axes: bool

    def axis_before(self, axis: int) -> int | None:
        """The axis of the input that is `axis` of y; None where there is none."""
        if self.keeps_axes:
            return None if axis in self.axes else axis
        for gone in sorted(self.axes):
            axis += gone <= axis
        return axis

    def axis_behind(self, axis: int) -> int | None:
        """The axis of y that is `axis` of the input; None where it is gone, or counted from behind."""
        if axis < 0 or axis in self.axes:
            return None
        return axis if self.keeps_axes else axis - sum(gone < axis for gone in self.axes)


@dataclass(frozen=True, eq=False)
class Bounded(Op):
    """No element of y is below `low`: ReLU, ReLU6, a clip, a sigmoid."""

    low: float


@dataclass(frozen=True, eq=False)
class Dequantize(Op):
    """y = (input - zero_point) * scale; per channel along `axis`, or with one scale where `axis` is None."""

    input: Value
    scale: Value
    zero_point: Value | None
    axis: int | None


@dataclass(frozen=True, eq=False)
class Constant(Op):
    """A node whose inputs are all known before run time, so that its output is too.

    elements_made: how many elements its outputs have.
    elements_freed: how many elements of constants nobody would read any more without it.
    """

    elements_made: int
    elements_freed: int


SMALL_CONSTANT = 1024
"""Elements of a `Constant` that may be stored although what it feeds is too large to be."""


@dataclass(frozen=True, eq=False)
class Dead(Op):
    """A node without side effects whose outputs nobody reads; no node for a constant that the model only stores."""


@dataclass(frozen=True, eq=False)
class Duplicate(Op):
    """A node that computes again what an earlier one has computed: one operator, attributes and operands.

    twin: the earlier one's output; of several outputs the one that stands where `output` does.
    """

    twin: Value


@dataclass(frozen=True, eq=False)
class DuplicateConstant(Op):
    """A constant of the same type, shape and bits as another; it has no node where the model only stores it.

    twin: the other one, which is there wherever this one is.
    """

    twin: Value


@dataclass(frozen=True, eq=False)
class SplitSequence(Op):
    """A sequence of consecutive parts of `input` along `axis`, made only to be taken apart again.

    sizes: of the parts; None where they are not known before run time.
    taken: (index, value) of each element that is taken by an index that is known.
    others: how many readers want the sequence itself, or an element by an index that is not known.
    """

    input: Value
    axis: int
    sizes: tuple[int, ...] | None
    taken: tuple[tuple[int, Value], ...]
    others: int
