"""Merge two parallel linear branches of one input into one operator.

    y = conv(x, W1) + conv(x, W2)     =>   y = conv(x, W1 + W2)      the smaller kernel inside the larger one
    y = conv(x, W) + s x + t          =>   y = conv(x, W + s)        s on the tap that meets x, t in the bias
    y = conv(x, W) + avg_pool(x)      =>   y = conv(x, W + 1/n)      n elements in each window, inside the kernel
    y = W1 x + W2 x                   =>   y = (W1 + W2) x
    y = W x + s B (A x)               =>   y = (W + s B A) x         a branch of several steps, such as a LoRA adapter

The steps of a branch are convolutions or matrix products, averages, BatchNorms and arithmetic with constants; it may
be x itself.  The sum may be a difference, or have more operands.  Blocks of many branches (RepVGG, MobileOne, RepViT,
FastViT) collapse pair by pair, together with fold-batch-norm and fold-affine.  A branch of one operator, which has the
larger kernel, takes the other one, so nothing grows.

Refusals:
    geometry       strides, groups, windows or channels do not allow for one kernel
    padding        a step pads with zeros, where the one before it would have made something else of them
    written        the input is written in place, so that it is not the same for both branches
    shared-output  the branch that stays is read elsewhere, too
    not-constant, overridable, quantized, training-mode, rank, axis-mismatch, shape-mismatch, not-finite, hooks,
    shared-weights, unsound: as for fold-batch-norm
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from fuser import affine as algebra
from fuser.absorb import constants_of, element_readers, shared_weights, written
from fuser.affine import ChannelAffine, Constants
from fuser.graph import Array, Graph
from fuser.kernels import Kernel, agree
from fuser.maps import AffineOp, Map, affine_op
from fuser.ops import Arithmetic, AveragePool, BatchNorm, Conv, Elementwise, Linear, Op, Sum, Value
from fuser.remarks import Missed
from fuser.rewrite import HOOKED, RewritePass

Step: TypeAlias = Conv | Linear | AveragePool | Map

MAX_STEPS = 8
"""How many steps a branch is followed back."""


@dataclass(frozen=True, eq=False)
class Branch:
    """One reading of an operand: `steps`, the first one first, applied to `source`.

    term: which of the summands it is; sign: 1 or -1.
    name: what a person knows it by.
    hooked: user code watches one of its ops.
    """

    term: int
    sign: int
    source: Value
    name: str
    steps: tuple[Step, ...] = ()
    hooked: bool = False

    @property
    def operator(self) -> Conv | Linear | None:
        """The one operator that the branch is, if it is nothing else."""
        only = self.steps[0] if len(self.steps) == 1 else None
        return only if isinstance(only, Conv | Linear) else None


@dataclass(frozen=True, eq=False)
class Merge:
    """`host` takes new constants; its output stands for the sum, or for two of its operands.

    rest: the other operands, and the output of the host.
    """

    sum: Arithmetic
    host: Conv | Linear
    arrays: dict[str, Array]
    guest: str
    rest: tuple[Value, ...]


@dataclass(frozen=True)
class MergeBranches(RewritePass[Arithmetic, Merge]):
    """shared_weights: "copy" gives a layer its own copy of a weight that others read, "refuse" leaves it alone."""

    shared_weights: str = "copy"

    name, root = "merge-branches", Arithmetic

    def concerns(self, graph: Graph, op: Arithmetic) -> bool:
        """Whether it is a sum, two readings of its operands share an input, and one of them is a linear operator."""
        return next(_pairs(graph, op), None) is not None

    def match(self, graph: Graph, op: Arithmetic) -> Merge | Missed:
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
        done: list[str] = []
        found: Merge | Missed | None = match
        while isinstance(found, Merge):
            graph.set_constants(found.host, **found.arrays)
            done.append(f"{found.guest} is part of {graph.describe(found.host)}")
            if not isinstance(found.sum, Sum):
                graph.replace(found.sum, by=found.host.output)
                break
            graph.set_inputs(found.sum, found.rest)
            left = graph.op_producing(found.sum.output)  # at once: a round for each of many would take long
            found = self.match(graph, left) if isinstance(left, Arithmetic) and self.concerns(graph, left) else None
        return "; ".join(done)


def _pairs(graph: Graph, total: Arithmetic) -> Iterator[tuple[Branch, Branch]]:
    """Readings of two operands that share their source, one of which is an operator."""
    by_source: dict[int, list[Branch]] = {}
    for term, (sign, value) in enumerate(total.terms):
        for branch in _branches(graph, term, sign, value):
            by_source.setdefault(id(branch.source), []).append(branch)
    for branches in by_source.values():
        for left, right in itertools.combinations(branches, 2):
            if left.operator is not None or right.operator is not None:
                yield left, right


def _branches(graph: Graph, term: int, sign: int, value: Value) -> Iterator[Branch]:
    branch: Branch | None = Branch(term, sign, value, f"{graph.describe(value)} itself")
    while branch is not None:
        yield branch
        branch = _longer(graph, branch) if len(branch.steps) < MAX_STEPS else None


def _longer(graph: Graph, branch: Branch) -> Branch | None:
    """The reading that starts one op earlier."""
    op = graph.op_producing(branch.source)
    if branch.steps and not _is_as_made(graph, branch.source):
        return None
    source, step = _step(graph, op)
    if op is None or step is None:
        return None
    steps = branch.steps
    if isinstance(step, Map) and steps and isinstance(steps[0], Map):
        both = step.then(steps[0])
        step, steps = (step, steps) if both is None else (both, steps[1:])
    return replace(
        branch,
        source=source,
        name=graph.describe(op),
        steps=(step, *steps),
        hooked=branch.hooked or op.hooked,
    )


def _step(graph: Graph, op: Op | None) -> tuple[Value, Step | None]:
    """(what the op works on, what it does to that); None for what is not linear."""
    if isinstance(op, Conv | Linear | AveragePool):
        return op.input, op
    found = affine_op(graph, op) if isinstance(op, BatchNorm | Elementwise) else None
    return (found.operand, found.map) if isinstance(found, AffineOp) else (None, None)


def _merge(graph: Graph, total: Arithmetic, left: Branch, right: Branch) -> Merge | Missed:
    """The branch with the larger kernel takes the other one."""
    if left.hooked or right.hooked:
        return HOOKED
    if not graph.is_stable(left.source):
        return written(graph, left.source)
    for _, operand in total.terms:
        if not _is_as_made(graph, operand):
            return written(graph, operand)
    refused: Missed | None = None
    for host, guest in ((left, right), (right, left)):
        if host.operator is None:
            continue
        found = _take_in(graph, total, host.operator, host.sign, guest)
        if isinstance(found, Merge):
            return found
        refused = refused or found
    assert refused is not None
    return refused


def _is_as_made(graph: Graph, value: Value) -> bool:
    """Whether whoever reads the value sees what its op made: the only reader may even write into it."""
    return graph.is_stable(value) or len(element_readers(graph, value)) == 1


def _take_in(graph: Graph, total: Arithmetic, op: Conv | Linear, sign: int, guest: Branch) -> Merge | Missed:
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
    if why := other.misfit(host, same_size=_are_alike(graph, total)):
        return Missed("geometry", f"the branches cannot share one kernel: {why}")
    host, other = host.times(sign), other.times(guest.sign)
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
    rest = tuple(value for term, (_, value) in enumerate(total.terms) if term != guest.term)
    return Merge(total, op, arrays, guest.name, rest)


def _are_alike(graph: Graph, total: Arithmetic) -> bool:
    """Whether the operands are known to be of one size."""
    shapes = {graph.shape(value) for _, value in total.terms}
    only = shapes.pop()
    return not shapes and only is not None and all(isinstance(size, int) for size in only[2:])


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
    """What the steps of the branch do to its source, as long as that can be part of the host."""
    total: Kernel | None = None
    for step in guest.steps:
        kernel = _step_kernel(graph, step, host.inputs if total is None else total.outputs, host_op, host)
        found = kernel if total is None or isinstance(kernel, Missed) else _composed(kernel, total, host)
        if isinstance(found, Missed):
            return found
        total = found
    return total or Kernel.pointwise(ChannelAffine.identity(host.inputs), len(host.taps))


def _step_kernel(graph: Graph, step: Step, channels: int, host_op: Conv | Linear, host: Kernel) -> Kernel | Missed:
    if isinstance(step, Map):
        return _map_kernel(graph, step, channels, host_op, host)
    if isinstance(step, Linear) != isinstance(host_op, Linear):
        return Missed("geometry", "a convolution and a matrix product work along different axes")
    return _mean(graph, step, channels, host) if isinstance(step, AveragePool) else _kernel(graph, step)


def _map_kernel(graph: Graph, m: Map, channels: int, host_op: Conv | Linear, host: Kernel) -> Kernel | Missed:
    if m.axis is not None:
        rank = graph.rank(host_op.output)
        expected = rank - 1 if rank is not None and isinstance(host_op, Linear) else 1
        if rank is None or (isinstance(host_op, Conv) and rank != host.weight.ndim):
            return Missed("rank", f"how many axes {graph.describe(host_op)} works on is not known, or no batch is one")
        if m.axis != expected:
            return Missed("axis-mismatch", f"one branch works along axis {m.axis}, the other along axis {expected}")
    if m.affine.channels not in (1, channels):
        return Missed("shape-mismatch", f"{m.affine.channels} channels in one branch, {channels} in the other")
    return Kernel.pointwise(m.affine.sized(channels), len(host.taps))


def _composed(second: Kernel, first: Kernel, host: Kernel) -> Kernel | Missed:
    if second.inputs != first.outputs:
        return Missed("shape-mismatch", f"a branch makes {first.outputs} channels of which {second.inputs} are read")
    if second.pads and first.bias.any():
        return Missed("padding", "a step of one branch pads with zeros, of which the one before would make its bias")
    groups = math.gcd(second.groups, first.groups)
    taps = math.prod(map(len, first.taps)) * math.prod(map(len, second.taps))
    if second.outputs * first.inputs // groups * taps > host.weight.size:
        return Missed("geometry", "the steps of one branch make more of one kernel than the other has room for")
    return second.after(first) or Missed("geometry", "two steps of one branch have windows")


def _mean(graph: Graph, op: AveragePool, channels: int, host: Kernel) -> Kernel | Missed:
    """The mean over a window as a depthwise kernel, where every window has as many elements."""
    window = op.window
    if window is None or len(window.size) != len(host.taps):
        return Missed("geometry", f"the windows of {graph.describe(op)} depend on the size of its input")
    if not op.pads_counted and any(any(pair) for pair in window.padding):
        return Missed("geometry", f"{graph.describe(op)} averages over fewer elements at the border")
    count = math.prod(window.size)
    weight = np.full((channels, 1, *window.size), 1 / count)
    ones = (1,) * len(window.size)
    return Kernel.conv(Constants(weight, np.zeros(channels)), channels, window.strides, ones, window.padding)
