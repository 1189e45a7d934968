"""Fold an inference-mode BatchNorm into the linear operators around it.

    y = batch_norm(W x + b)       =>   y = (s W) x + (s b + t)       into what produces its input, or
    y = W batch_norm(x) + b       =>   y = (W s) x + (W t + b)       into all that read its output

    s = scale / sqrt(var + epsilon)
    t = bias - mean * s

W is a convolution (transposed, grouped, of any rank) or a matrix product; on the way the map passes through
identities, reshapes and transposes where its axis can be proven, slices, averages, maxima, paddings, sums and
concatenations.

Refusals:
    training-mode     it normalizes with the statistics of the batch
    not-per-channel   BatchNormalization-7 with spatial=0 keeps statistics for each element
    not-constant      a parameter, weight or bias is not known before run time
    overridable       a parameter, weight or bias is an initializer that the caller may replace
    type              the weight is not of real floating point numbers
    quantized         the weight is quantized, and not by a positive factor for each output channel
    no-linear         no linear operator makes its input, and not all readers of its output can take it
    shared-output     what it normalizes is read elsewhere, too
    axis-mismatch     the channels of the linear operator are on another axis
    not-monotone      a pool takes the largest elements, which a negative factor would make the smallest
    rank              whether there is a batch axis is not known, or there is none
    padding           the convolution that follows pads with zeros, which a shift does not commute with; or what is
                      padded in between would be changed
    written           its input is written in place, so that it cannot be read later
    grows             several matrix products that read it would each need a bias that they do not have, or one would
                      need its own copy of a very large weight
    shape-mismatch    the numbers of channels disagree
    not-finite        the new constants would not be finite in the type of the weight
    shared-weights    the weight has other readers, and copies were not wanted
    hooks             user code is attached to the module: a hook, a replaced method, a parametrization, a class of
                      its own
    body              torch: it is in the body of a higher-order operator that is left alone, such as one that runs
                      under autocast or writes into what it is given
    unsound           the new constants failed a test of one window; a defect here
"""

from __future__ import annotations

from dataclasses import dataclass

from fuser.absorb import Absorption, Walker
from fuser.graph import Graph
from fuser.maps import affine_op
from fuser.ops import BatchNorm
from fuser.remarks import Missed
from fuser.rewrite import RewritePass


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass[BatchNorm, tuple[BatchNorm, Absorption]]):
    """shared_weights: "copy" gives a layer its own copy of a weight that others read, "refuse" leaves it alone."""

    shared_weights: str = "copy"

    name, root = "fold-batch-norm", BatchNorm

    def match(self, graph: Graph, op: BatchNorm) -> tuple[BatchNorm, Absorption] | Missed:
        found = affine_op(graph, op)
        if isinstance(found, Missed):
            return found
        absorption = Walker(graph, self.shared_weights).around(op.input, op.output, found.map)
        return absorption if isinstance(absorption, Missed) else (op, absorption)

    def rewrite(self, graph: Graph, match: tuple[BatchNorm, Absorption]) -> str:
        op, absorption = match
        done = absorption.apply(graph)
        graph.replace(op, by=op.input)
        return done
