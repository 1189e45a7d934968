"""Merge two parallel linear branches of one input into one operator.

    y = conv(x, W1) + conv(x, W2)     =>   y = conv(x, W1 + W2)      the smaller kernel inside the larger one
    y = conv(x, W) + s x + t          =>   y = conv(x, W + s)        s on the tap that meets x, t in the bias
    y = conv(x, W) + avg_pool(x)      =>   y = conv(x, W + 1/n)      n elements in each window, inside the kernel
    y = W1 x + W2 x                   =>   y = (W1 + W2) x

A branch is a convolution or matrix product, an average, a BatchNorm or arithmetic with constants, or x itself; the
sum may be a difference.  Blocks of many branches (RepVGG, MobileOne, RepViT, FastViT) collapse pair by pair, together
with fold-batch-norm and fold-affine.  The operator with the larger kernel stays, so nothing grows.

Refusals:
    geometry       strides, groups, windows or channels do not allow for one kernel
    written        the input is written in place, so that it is not the same for both branches
    shared-output  the branch that stays is read elsewhere, too
    not-constant, overridable, quantized, training-mode, rank, axis-mismatch, shape-mismatch, not-finite, hooks,
    shared-weights, unsound: as for fold-batch-norm
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fuser import affine as algebra
from fuser.absorb import constants_of, element_readers, shared_weights, written
from fuser.affine import Constants
from fuser.graph import Array, Graph
from fuser.kernels import Kernel, agree
from fuser.maps import IDENTITY, AffineOp, Map, affine_op
from fuser.ops import AveragePool, BatchNorm, Conv, Elementwise, Linear, Value
from fuser.remarks import Missed
from fuser.rewrite import HOOKED, RewritePass


@dataclass(frozen=True, eq=False)
class Branch:
    """One reading of an operand: `op` applied to `source`, or the map of a chain of arithmetic and BatchNorms.

    name: what a person knows it by.
    hooked: user code watches one of its ops.
    """

    source: Value
    name: str
    op: Conv | Linear | AveragePool | None = None
    map: Map = IDENTITY
    hooked: bool = False


@dataclass(frozen=True, eq=False)
class Merge:
    """`host` takes new constants, and its output stands for the sum."""

    sum: Elementwise
    host: Conv | Linear
    arrays: dict[str, Array]
    guest: str


@dataclass(frozen=True)
class MergeBranches(RewritePass[Elementwise, Merge]):
    """shared_weights: "copy" gives a layer its own copy of a weight that others read, "refuse" leaves it alone."""

    shared_weights: str = "copy"

    name, root = "merge-branches", Elementwise

    def concerns(self, graph: Graph, op: Elementwise) -> bool:
        """Whether two readings of the operands share an input, and one of them is a linear operator."""
        return op.function in ("+", "-") and next(_pairs(graph, op), None) is not None

    def match(self, graph: Graph, op: Elementwise) -> Merge | Missed:
        refused: Missed | None = None
        for left, right in _pairs(graph, op):
            found = _merge(graph, op, left, right)
            if isinstance(found, Merge):
                return self._unshared(graph, found)
            refused = refused or found
        assert refused is not None  # otherwise it is no candidate
        return refused

    def _unshared(self, graph: Graph, found: Merge) -> Merge | Missed:
        if self.shared_weights == "refuse" and len(graph.readers(found.host.weight)) > 1:
            return shared_weights(graph, found.host)
        return found

    def rewrite(self, graph: Graph, match: Merge) -> str:
        graph.set_constants(match.host, **match.arrays)
        graph.replace(match.sum, by=match.host.output)
        return f"{match.guest} is part of {graph.describe(match.host)}"


def _pairs(graph: Graph, total: Elementwise) -> Iterator[tuple[Branch, Branch]]:
    """Readings of the two operands that share their source."""
    for left in _branches(graph, total.left):
        for right in _branches(graph, total.right):
            if left.source is right.source and any(isinstance(one.op, Conv | Linear) for one in (left, right)):
                yield left, right


def _branches(graph: Graph, value: Value) -> Iterator[Branch]:
    op = graph.op_producing(value)
    if isinstance(op, Conv | Linear | AveragePool):
        yield Branch(op.input, graph.describe(op), op, hooked=op.hooked)
    branch: Branch | None = Branch(value, f"{graph.describe(value)} itself")
    while branch is not None:
        yield branch
        branch = _longer(graph, branch)


def _longer(graph: Graph, branch: Branch) -> Branch | None:
    """The reading that starts one op earlier."""
    op = graph.op_producing(branch.source)
    found = affine_op(graph, op) if isinstance(op, BatchNorm | Elementwise) else None
    if op is None or not isinstance(found, AffineOp) or not _is_as_made(graph, branch.source):
        return None
    m = found.map.then(branch.map)
    return None if m is None else Branch(found.operand, graph.describe(op), None, m, branch.hooked or op.hooked)


def _merge(graph: Graph, total: Elementwise, left: Branch, right: Branch) -> Merge | Missed:
    """The branch with the larger kernel takes the other one."""
    if left.hooked or right.hooked:
        return HOOKED
    if not graph.is_stable(left.source):
        return written(graph, left.source)
    for operand in (total.left, total.right):
        if not _is_as_made(graph, operand):
            return written(graph, operand)
    refused: Missed | None = None
    for host, guest, signs in ((left, right, (1, _sign(total))), (right, left, (_sign(total), 1))):
        if not isinstance(host.op, Conv | Linear):
            continue
        found = _take_in(graph, total, host.op, guest, *signs)
        if isinstance(found, Merge):
            return found
        refused = refused or found
    assert refused is not None
    return refused


def _is_as_made(graph: Graph, value: Value) -> bool:
    """Whether whoever reads the value sees what its op made: the only reader may even write into it."""
    return graph.is_stable(value) or len(element_readers(graph, value)) == 1


def _sign(total: Elementwise) -> int:
    return 1 if total.function == "+" else -1


def _take_in(
    graph: Graph, total: Elementwise, op: Conv | Linear, guest: Branch, sign: int, guest_sign: int
) -> Merge | Missed:
    readers = element_readers(graph, op.output)
    if len(readers) > 1:
        names = ", ".join(dict.fromkeys(reader.name for reader in readers))
        return Missed("shared-output", f"{graph.describe(op.output)} is read by more than this: {names}")
    host = _kernel(graph, op)
    if isinstance(host, Missed):
        return host
    other = _guest_kernel(graph, guest, op, host)
    if isinstance(other, Missed):
        return other
    if why := other.misfit(host):
        return Missed("geometry", f"the branches cannot share one kernel: {why}")
    host, other = host.times(sign), other.times(guest_sign)
    dtype = host.weight.dtype
    new = host.plus(other, dtype)
    if not (algebra.is_finite(new.weight) and algebra.is_finite(new.bias)):
        return Missed("not-finite", f"the sum of the kernels is not finite in {dtype}")
    merged = Kernel(new.weight, new.bias, host.groups, host.strides, host.taps, host.growth)
    if not agree([host, other], merged, dtype):
        return Missed("unsound", "the merged kernel does not do what the branches did, on a test input")
    arrays = {"weight": new.weight.T if _is_turned(op) else new.weight}
    if op.bias is not None or new.bias.any():
        arrays["bias"] = new.bias
    return Merge(total, op, arrays, guest.name)


def _kernel(graph: Graph, op: Conv | Linear) -> Kernel | Missed:
    constants = constants_of(graph, op)
    if isinstance(constants, Missed):
        return constants
    weight, bias, alpha = constants
    name = graph.describe(op)
    if bias.ndim != 1:
        return Missed("shape-mismatch", f"the bias of {name} differs from row to row")
    if isinstance(op, Linear):
        if op.in_axis != -1:
            return Missed("axis-mismatch", f"{name} sums over the first axis")
        turned = weight.T if _is_turned(op) else weight
        return Kernel(turned if alpha == 1 else algebra.scaled(turned, np.array(alpha), weight.dtype), bias)
    if op.transposed or op.padding is None:
        return Missed("geometry", f"{name} is transposed, or pads by the size of its input")
    return Kernel.conv(Constants(weight, bias), op.groups, op.strides, op.dilations, op.padding)


def _is_turned(op: Conv | Linear) -> bool:
    return isinstance(op, Linear) and op.out_axis == 1


def _guest_kernel(graph: Graph, guest: Branch, host_op: Conv | Linear, host: Kernel) -> Kernel | Missed:
    if guest.op is not None:
        if isinstance(guest.op, Linear) != isinstance(host_op, Linear):
            return Missed("geometry", "a convolution and a matrix product work along different axes")
        return _mean(graph, guest.op, host) if isinstance(guest.op, AveragePool) else _kernel(graph, guest.op)
    m = guest.map
    if m.axis is not None:
        rank = graph.rank(host_op.output)
        expected = rank - 1 if rank is not None and isinstance(host_op, Linear) else 1
        if rank is None or (isinstance(host_op, Conv) and rank != host.weight.ndim):
            return Missed("rank", f"how many axes {graph.describe(host_op)} works on is not known, or no batch is one")
        if m.axis != expected:
            return Missed("axis-mismatch", f"one branch works along axis {m.axis}, the other along axis {expected}")
    if m.affine.channels not in (1, host.inputs):
        return Missed("shape-mismatch", f"{m.affine.channels} channels in one branch, {host.inputs} in the other")
    return Kernel.pointwise(m.affine.sized(host.inputs), len(host.taps))


def _mean(graph: Graph, op: AveragePool, host: Kernel) -> Kernel | Missed:
    """The mean over a window as a depthwise kernel, where every window has as many elements."""
    window = op.window
    if window is None or len(window.size) != len(host.taps):
        return Missed("geometry", f"the windows of {graph.describe(op)} depend on the size of its input")
    if not op.pads_counted and any(any(pair) for pair in window.padding):
        return Missed("geometry", f"{graph.describe(op)} averages over fewer elements at the border")
    count = math.prod(window.size)
    weight = np.full((host.inputs, 1, *window.size), 1 / count)
    ones = (1,) * len(window.size)
    return Kernel.conv(Constants(weight, np.zeros(host.inputs)), host.inputs, window.strides, ones, window.padding)
