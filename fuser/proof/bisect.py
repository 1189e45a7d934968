"""The first tensor in which two ONNX models differ.

On the first input set for which `verify` tells the models apart, both are evaluated in float64 with every tensor
kept.  A tensor of the original *has a counterpart* when some tensor of the other model holds the same values, under
whatever name: a fold moves values to other names.  What is the same is what `compare` says of outputs, the noise being
that of the original with constants moved by a rounding.  From the outputs that differ, the search goes back through
tensors without counterpart; where all inputs of a node have one, the difference begins.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from fuser.errors import InputError, VerificationError
from fuser.files.tensors import FORMATS
from fuser.isolate import IsolatedFailure
from fuser.proof.check import verify
from fuser.proof.compare import Array, Judge, Judgement
from fuser.proof.inputs import InputSet
from fuser.proof.rounding import is_float, roundoff
from fuser.proof.runners import Float64Runner, OnnxRunner, Workers
from fuser.proof.sides import OnnxSide, open_sides
from fuser.proof.trial import FIRST_NUDGES
from fuser.proof.verification import Verification


@dataclass
class Difference:
    """Where two models part.

    tensor, node: the first tensor without a counterpart, and the node of the original that makes it.
    last_good: the tensors it is made of, which still agree.
    problem: how it differs from the tensor of the same name; empty without such a tensor.
    position: of the node in the original's order, from 1; of `total`.
    inputs: the input set for which it does, in words.
    """

    tensor: str
    node: str
    op_type: str
    last_good: list[str]
    problem: str
    position: int
    total: int
    inputs: str

    def __str__(self) -> str:
        where = f"{self.tensor!r} ({self.op_type} {self.node!r}, node {self.position} of {self.total})"
        return f"{where}{': ' if self.problem else ''}{self.problem}, for {self.inputs}"


def first_difference(
    before: Any,
    after: Any,
    *,
    inputs: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    timeout: float = 300.0,
    removed_inputs: Collection[str] = (),
) -> Difference | None:
    """Where `after` first differs from `before`; None when `verify` tells no output apart.

    before, after: paths or ModelProtos.  The arguments are those of `verify`.

    Raises:
        InputError: the models cannot be compared, or not be evaluated in float64.
        VerificationError: they differ, but no tensor does in float64.
    """
    options: dict[str, Any] = {"input_shapes": input_shapes, "timeout": timeout, "removed_inputs": removed_inputs}
    with ExitStack() as stack:
        workers = stack.enter_context(Workers())
        first, second = open_sides(
            stack, workers.first, before, after, example_inputs=None, example_kwargs=None, **options
        )
        if not isinstance(first, OnnxSide) or not isinstance(second, OnnxSide):
            raise InputError("the first tensor that differs is searched in ONNX models; export the torch model first")
        if mismatch := first.cannot_pair(second):
            raise InputError(f"the two models cannot be compared: {mismatch}")
        verdict = verify(first.path, second.path, inputs=inputs, seed=seed, workers=workers, **options)
        if verdict.verdict == "unverifiable":
            raise InputError(f"the two models cannot be compared: {verdict.reason}")
        if verdict.verdict != "different":
            return None
        try:
            for one in _sets(first, inputs, seed, verdict):
                if found := _search(first, second, one):
                    return found
        except IsolatedFailure as error:
            raise InputError(f"the models cannot be evaluated in float64: {error}") from error
    raise VerificationError(f"the models differ, but no tensor of theirs does in float64: {verdict.reason}")


def _sets(side: OnnxSide, inputs: Any, seed: int, verdict: Verification) -> list[InputSet]:
    """The sets that `verify` has compared."""
    if inputs is not None:
        return side.given(inputs)
    sets = side.more(side.probe(seed).sizes, seed, len(verdict.sets) + verdict.discarded)
    return [one for one in sets if one.label in verdict.sets]


class _Tensors:
    """All tensors of the original, and what is as good as them.

    values: by name.
    """

    def __init__(self, side: OnnxSide, one: InputSet) -> None:
        self.values = _evaluate(side, one)
        self._nudged = [_evaluate(side, one, seed) for seed in FIRST_NUDGES]
        graph = side.model.proto.graph
        self._stored = _roundoff(tensor.data_type for tensor in graph.initializer)
        self._outputs = {value.name: _roundoff([value.type.tensor_type.elem_type]) for value in graph.output}

    def judge(self, name: str, other: Array) -> Judgement:
        """How `other` differs from the tensor."""
        value = self.values[name]
        if is_float(value.dtype) != is_float(other.dtype):
            return Judgement(math.inf, f"its type is {other.dtype} instead of {value.dtype}")
        right = [nudged[name] for nudged in self._nudged if name in nudged]
        return Judge(value, right, self._outputs.get(name, self._stored)).judge(other)


def _evaluate(side: OnnxSide, one: InputSet, nudge: int | None = None) -> dict[str, Array]:
    runner = side.runner.inner if isinstance(side.runner, Float64Runner) else side.runner
    assert isinstance(runner, OnnxRunner)
    names = [name for node in side.model.proto.graph.node for name in node.output if name]
    found = runner.tensors(one.values, [*names, *side.input_names, *side.output_names], nudge)
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def _search(first: OnnxSide, second: OnnxSide, one: InputSet) -> Difference | None:
    graph = first.model.proto.graph
    tensors, others = _Tensors(first, one), _evaluate(second, one)
    originals = tensors.values
    by_shape: dict[tuple[int, ...], list[Array]] = defaultdict(list)
    for value in others.values():
        by_shape[value.shape].append(value)
    makers = {name: (index, node) for index, node in enumerate(graph.node) for name in node.output if name}
    outputs = zip(first.output_names, first.paired(second, second.output_names), strict=True)
    bad = [
        name
        for name, other in outputs
        if name in originals and name in makers and (other not in others or not tensors.judge(name, others[other]).fine)
    ]
    if not bad:
        return None
    live = _live(graph)

    def has_counterpart(name: str) -> bool:
        if name not in live or name not in originals:
            return True  # a constant, which may be folded into others; or a sequence
        return any(tensors.judge(name, other).fine for other in by_shape[originals[name].shape])

    seen: dict[str, list[str]] = {}
    waiting = list(bad)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in makers:
            continue
        sources = [source for source in makers[name][1].input if source in makers or source in originals]
        wrong = [source for source in sources if source in makers and not has_counterpart(source)]
        seen[name] = [source for source in sources if source not in wrong]
        waiting += wrong
    beginnings = [name for name, good in seen.items() if len(good) == _sources(makers[name][1], makers, originals)]
    tensor = min(beginnings or seen, key=lambda name: makers[name][0])
    index, node = makers[tensor]
    same_name = others.get(tensor)
    return Difference(
        tensor,
        node.name or node.output[0],
        node.op_type,
        seen[tensor],
        tensors.judge(tensor, same_name).problem if same_name is not None else "",
        index + 1,
        len(graph.node),
        one.label,
    )


def _sources(node: onnx.NodeProto, makers: Mapping[str, Any], originals: Mapping[str, Array]) -> int:
    return sum(source in makers or source in originals for source in node.input)


def _live(graph: onnx.GraphProto) -> set[str]:
    """What depends on the inputs."""
    live = {value.name for value in graph.input}
    for node in graph.node:
        if live.intersection(node.input) or any(attribute.HasField("g") for attribute in node.attribute):
            live.update(node.output)
    return live


def _roundoff(kinds: Iterable[int]) -> float:
    """Of the narrowest floating point type among these element types."""
    dtypes = (FORMATS[kind].dtype for kind in kinds if kind in FORMATS)
    return max((roundoff(dtype) for dtype in dtypes if is_float(dtype)), default=roundoff(np.dtype(np.float32)))
