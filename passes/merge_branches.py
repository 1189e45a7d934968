"""Merge two parallel linear branches of one input into one operator.

    y = conv(x, W1) + conv(x, W2)     =>   y = conv(x, W1 + W2)      the smaller kernel inside the larger one
    y = conv(x, W) + s x + t          =>   y = conv(x, W + s)        s on the tap that meets x, t in the bias
    y = conv(x, W) + avg_pool(x)      =>   y = conv(x, W + 1/n)      n elements in each window, inside the kernel
    y = W1 x + W2 x                   =>   y = (W1 + W2) x
    y = W x + s B (A x)               =>   y = (W + s B A) x         a branch of several steps, such as a LoRA adapter

The steps of a branch are convolutions or matrix products, averages, BatchNorms and arithmetic with constants; it may
be x itself.  The sum may be a difference, or have more operands.  Blocks of many branches (RepVGG, MobileOne, RepViT,
FastViT) collapse step by step, together with fold-batch-norm and fold-affine.  A branch of one operator, which has the
larger kernel, takes the other one, so nothing grows.

Refusals:
    geometry       strides, groups, windows or channels do not allow for one kernel
    padding        a step pads with zeros, where the one before it would have made something else of them
    written        the input is written in place, so that it is not the same for both branches
    shared-output  the branch that stays is read elsewhere, too
    type, not-constant, overridable, quantized, training-mode, rank, axis-mismatch, shape-mismatch, not-finite,
    hooks, body, shared-weights, unsound: as for fold-batch-norm
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from fuser import affine as algebra
from fuser.absorb import constants_of, element_readers, shared_output, shared_weights, written
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

MAX_HOSTS = 16
"""Of how many operators with one input it is tried whether they can take in others."""


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
    hooked: bool | Missed = False

    @property
    def operator(self) -> Conv | Linear | None:
        """The one operator that the branch is, if it is nothing else."""
        only = self.steps[0] if len(self.steps) == 1 else None
        return only if isinstance(only, Conv | Linear) else None


@dataclass(frozen=True, eq=False)
class Part:
    """`op`, which is `host`, takes new constants; then its output stands for those of the guests, too."""

    op: Conv | Linear
    host: Branch
    arrays: dict[str, Array]
    guests: tuple[Branch, ...]


@dataclass(frozen=True, eq=False)
class Merge:
    """What several operators of one sum take in.

    rest: the operands that are left, the outputs of these operators among them.
    """

    sum: Arithmetic
    parts: tuple[Part, ...]
    rest: tuple[Value, ...]


@dataclass(frozen=True)
class MergeBranches(RewritePass[Arithmetic, Merge]):
    """shared_weights: "copy" gives a layer its own copy of a weight that others read, "refuse" leaves it alone."""

    shared_weights: str = "copy"

    name, root = "merge-branches", Arithmetic

    def concerns(self, graph: Graph, op: Arithmetic) -> bool:
        """Whether it is a sum, two readings of its operands share an input, and one of them is a linear operator."""
        return any(_groups(graph, op))

    def match(self, graph: Graph, op: Arithmetic) -> Merge | Missed:
        for _, operand in op.terms:
            if not _is_as_made(graph, operand):
                return written(graph, operand)
        parts: list[Part] = []
        used: set[int] = set()
        refused: Missed | None = None
        for branches in _groups(graph, op):
            found = self._part(graph, op, [branch for branch in branches if branch.term not in used])
            if isinstance(found, Part):
                parts.append(found)
                used.update(branch.term for branch in (found.host, *found.guests))
            refused = found if refused is None and isinstance(found, Missed) else refused
        if not parts:
            assert refused is not None  # otherwise it is no candidate
            return refused
        gone = {guest.term for part in parts for guest in part.guests}
        return Merge(op, tuple(parts), tuple(value for term, (_, value) in enumerate(op.terms) if term not in gone))

    def _part(self, graph: Graph, total: Arithmetic, branches: list[Branch]) -> Part | Missed | None:
        """The branch with the largest kernel takes the others, as many as it can."""
        hosts = [(branch, branch.operator) for branch in branches if branch.operator is not None]
        refused: Missed | None = None
        for host, op in sorted(hosts, key=lambda pair: -_size(graph, pair[1]))[:MAX_HOSTS]:
            guests = [branch for branch in branches if branch.term != host.term]
            found = _take_in(graph, total, host, op, guests) if guests else None
            if isinstance(found, Part) and self.shared_weights == "refuse" and len(graph.readers(op.weight)) > 1:
                found = shared_weights(graph, op)
            if isinstance(found, Part):
                return found
            refused = refused or found
        return refused

    def rewrite(self, graph: Graph, match: Merge) -> str:
        done: list[str] = []
        found: Merge | Missed | None = match
        while isinstance(found, Merge):
            for part in found.parts:
                graph.set_constants(part.op, **part.arrays)
                done += [f"{guest.name} is part of {part.host.name}" for guest in part.guests]
            if not isinstance(found.sum, Sum) or len(found.rest) == 1:
                graph.replace(found.sum, by=found.parts[0].op.output)
                break
            graph.set_inputs(found.sum, found.rest)
            left = graph.op_producing(found.sum.output)
            found = self.match(graph, left) if isinstance(left, Arithmetic) and self.concerns(graph, left) else None
        return "; ".join(done)


def _groups(graph: Graph, total: Arithmetic) -> Iterator[list[Branch]]:
    """Readings of several operands that share their source, one of which is an operator."""
    by_source: dict[int, list[Branch]] = {}
    for term, (sign, value) in enumerate(total.terms):
        for branch in _branches(graph, term, sign, value):
            by_source.setdefault(id(branch.source), []).append(branch)
    for branches in by_source.values():
        if len(branches) > 1 and any(branch.operator is not None for branch in branches):
            yield branches


def _size(graph: Graph, op: Conv | Linear) -> int:
    """How many numbers the weight has, as far as it is known."""
    return math.prod(size for size in graph.shape(op.weight) or () if isinstance(size, int))


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


def _is_as_made(graph: Graph, value: Value) -> bool:
    """Whether whoever reads the value sees what its op made: the only reader may even write into it."""
    return graph.is_stable(value) or len(element_readers(graph, value)) == 1


def _take_in(
    graph: Graph, total: Arithmetic, host: Branch, op: Conv | Linear, guests: Sequence[Branch]
) -> Part | Missed:
    """One kernel for the host and for as many of the guests as fit; else why not for the first of them."""
    if host.hooked:
        return HOOKED
    if not graph.is_stable(host.source):
        return written(graph, host.source)
    if (shared := shared_output(graph, op.output)) is not None:
        return shared
    own = _kernel(graph, op)
    if isinstance(own, Missed):
        return own
    alike = _are_alike(graph, total)
    kernels, taken = [own.times(host.sign)], list[Branch]()
    refused: Missed | None = None
    for guest in guests:
        found = _fitting(graph, guest, op, own, alike)
        if isinstance(found, Missed):
            refused = refused or found
            continue
        kernels.append(found.times(guest.sign))
        taken.append(guest)
    if not taken:
        assert refused is not None
        return refused
    dtype = own.weight.dtype
    merged = kernels[0]
    for number, kernel in enumerate(kernels[1:], 2):  # rounded at the end, once
        new = merged.plus(kernel, dtype if number == len(kernels) else np.dtype(np.float64))
        merged = replace(merged, weight=new.weight, bias=new.bias)
    if not (algebra.is_finite(merged.weight) and algebra.is_finite(merged.bias)):
        return Missed("not-finite", f"the sum of the kernels is not finite in {dtype}")
    if not agree(kernels, merged, dtype):
        return Missed("unsound", "the merged kernel does not do what the branches did, on a test input")
    arrays = {"weight": merged.weight.T if _is_turned(op) else merged.weight}
    if op.bias is not None or merged.bias.any():
        arrays["bias"] = merged.bias
    return Part(op, host, arrays, tuple(taken))


def _fitting(graph: Graph, guest: Branch, op: Conv | Linear, host: Kernel, alike: bool) -> Kernel | Missed:
    """The kernel of a branch, where that of the host has room for it."""
    if guest.hooked:
        return HOOKED
    kernel = _guest_kernel(graph, guest, op, host)
    if isinstance(kernel, Missed):
        return kernel
    if why := kernel.misfit(host, same_size=alike):
        return Missed("geometry", f"the branches cannot share one kernel: {why}")
    if not (algebra.is_finite(kernel.weight) and algebra.is_finite(kernel.bias)):
        return Missed("not-finite", f"the kernel of {guest.name} is not finite")
    return kernel


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
