"""Passes of somebody else: a good one, one that is wrong, and one that fails."""

from dataclasses import dataclass

import numpy as np

from fuser.ops import BatchNorm, Conv, Identity
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


class EraseNeutral(RewritePass):
    """x * 1  =>  x"""

    name, root, contract = "toy-erase-neutral", Identity, Contract.EXACT

    def match(self, graph, op):
        if not graph.can_vanish(op, op.input):
            return Missed("both-public", "both names are in the signature")
        return op

    def rewrite(self, graph, op):
        graph.replace(op, by=op.input)
        return "it multiplied by 1"


class StaleWeight(RewritePass):
    """Claims that a BatchNorm changes nothing; it does."""

    name, root = "toy-stale-weight", BatchNorm

    def match(self, graph, op):
        return op if isinstance(graph.op_producing(op.input), Conv) else Missed("no-conv", "no convolution feeds it")

    def rewrite(self, graph, op):
        graph.replace(op, by=op.input)
        return "removed"


@dataclass(frozen=True)
class NeedsMore(StaleWeight):
    """Cannot be made without an argument."""

    level: int

    name = "toy-needs-more"


@dataclass(frozen=True)
class Raises(RewritePass):
    """Fails at the first candidate."""

    shared_weights: str = "copy"

    name, root = "toy-raises", Conv

    def match(self, graph, op):
        return np.linalg.inv(np.zeros((2, 2)))

    def rewrite(self, graph, op):
        return ""
