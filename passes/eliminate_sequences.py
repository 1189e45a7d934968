"""Eliminate sequences that are only made to be taken apart again.

    y_i = sequence_at(split_to_sequence(x, sizes), i)   =>   y_0, y_1, ... = split(x, sizes)

torch's exporter writes every `split` and `chunk` like this.  What may be folded through tensors is not folded through
sequences, and few runtimes but ONNX Runtime know them at all.

Refusals:
    not-constant    the sizes of the parts are not known before run time
    shared-output   the sequence itself is read, or an element by an index that is not known
    taken-twice     two nodes take the same element; eliminate-common-subexpressions makes one of them
"""

from __future__ import annotations

from fuser.graph import Graph
from fuser.ops import SplitSequence
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass


class EliminateSequences(RewritePass[SplitSequence, SplitSequence]):
    """sequence_at(split_to_sequence(x)) => split(x)"""

    name, root, contract = "eliminate-sequences", SplitSequence, Contract.EXACT
    hosts = ("onnx",)

    def match(self, graph: Graph, op: SplitSequence) -> SplitSequence | Missed:
        if op.sizes is None:
            return Missed("not-constant", "the sizes of the parts are not known before run time")
        if op.others:
            return Missed("shared-output", f"{graph.describe(op.output)} is read as a sequence, too")
        indices = [index for index, _ in op.taken]
        if len(set(indices)) < len(indices):
            return Missed("taken-twice", "an element is taken by two nodes")
        return op

    def rewrite(self, graph: Graph, match: SplitSequence) -> str:
        graph.split(match)
        return f"{len(match.taken)} elements come out of one Split"
