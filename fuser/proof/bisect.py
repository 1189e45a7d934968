"""The first tensor in which two ONNX models differ.

Both are evaluated in float64 with every tensor kept.  A tensor of the original *has a counterpart* when some tensor
of the other model holds the same values, under whatever name: a fold moves values to other names.  From the outputs
that differ, the search goes back through tensors without counterpart; where all inputs of a node have one, the
difference begins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from fuser.errors import InputError
from fuser.isolate import IsolatedFailure, Worker
from fuser.proof.rounding import is_float
from fuser.proof.runners import Float64Runner, OnnxRunner
from fuser.proof.sides import OnnxSide, open_sides

Array = np.ndarray[Any, Any]

SAME = 1e-5
"""Two tensors hold the same values when they differ by less, relative to the larger scale: a rounding of float32
constants is far below, an error that matters far above.  For 16-bit models it is 2e-2."""
SAME_16_BIT = 2e-2


@dataclass
class Difference:
    """Where two models part.

    tensor, node: the first tensor without a counterpart, and the node of the original that makes it.
    last_good: the tensors it is made of, which still agree.
    error: the largest difference from the tensor of the same name, relative to scale; None without such a tensor.
    position: of the node in the original's order, from 1; of `total`.
    """

    tensor: str
    node: str
    op_type: str
    last_good: list[str]
    error: float | None
    position: int
    total: int

    def __str__(self) -> str:
        error = "" if self.error is None else f", off by {self.error:.2g} of its scale"
        return f"{self.tensor!r} ({self.op_type} {self.node!r}, node {self.position} of {self.total}){error}"


def first_difference(
    before: Any,
    after: Any,
    *,
    inputs: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    timeout: float = 300.0,
    removed_inputs: Sequence[str] = (),
) -> Difference | None:
    """Where `after` first differs from `before`; None when all outputs agree.

    before, after: paths or ModelProtos.  The other arguments are those of `verify`.
    Raises `InputError` when a model cannot be evaluated in float64.
    """
    with ExitStack() as stack:
        worker = stack.enter_context(Worker())
        first, second = open_sides(
            stack,
            worker,
            before,
            after,
            example_inputs=None,
            example_kwargs=None,
            input_shapes=input_shapes,
            timeout=timeout,
            removed_inputs=removed_inputs,
        )
        if not isinstance(first, OnnxSide) or not isinstance(second, OnnxSide):
            raise InputError("the first tensor that differs is searched in ONNX models; export the torch model first")
        if mismatch := first.cannot_pair(second):
            raise InputError(f"the two models cannot be compared: {mismatch}")
        if inputs is not None:
            values = first.given(inputs)[0].values
        else:
            values = first.more(first.probe(seed).sizes, seed, 1)[0].values
        try:
            originals = _tensors(first, values)
            others = _tensors(second, values)
        except IsolatedFailure as error:
            raise InputError(f"the models cannot be evaluated in float64: {error}") from error
    return _search(first.model.proto.graph, first.output_names, second.output_names, originals, others)


def _tensors(side: OnnxSide, values: Sequence[Any]) -> dict[str, Array]:
    runner = side.runner.inner if isinstance(side.runner, Float64Runner) else side.runner
    assert isinstance(runner, OnnxRunner)
    names = [name for node in side.model.proto.graph.node for name in node.output if name]
    found = runner.tensors(values, [*names, *side.input_names])
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def _search(
    graph: onnx.GraphProto,
    names: Sequence[str],
    other_names: Sequence[str],
    originals: Mapping[str, Array],
    others: Mapping[str, Array],
) -> Difference | None:
    by_shape: dict[tuple[int, ...], list[Array]] = defaultdict(list)
    for value in others.values():
        by_shape[value.shape].append(value)
    bound = SAME_16_BIT if _is_16_bit(graph) else SAME
    outputs = dict(zip(names, names if set(names) == set(other_names) else other_names, strict=True))
    bad = [
        name
        for name, other in outputs.items()
        if name in originals and (other not in others or _apart(originals[name], others[other]) > bound)
    ]
    if not bad:
        return None
    makers = {name: (index, node) for index, node in enumerate(graph.node) for name in node.output if name}

    def has_counterpart(name: str) -> bool:
        value = originals.get(name)
        if value is None:
            return True  # a constant
        return any(_apart(value, other) <= bound for other in by_shape[value.shape])

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
        _apart(originals[tensor], same_name) if same_name is not None else None,
        index + 1,
        len(graph.node),
    )


def _sources(node: onnx.NodeProto, makers: Mapping[str, Any], originals: Mapping[str, Array]) -> int:
    return sum(source in makers or source in originals for source in node.input)


def _apart(value: Array, other: Array) -> float:
    """The largest difference relative to the larger scale; infinite for other shapes, 0 or infinite for integers."""
    if value.shape != other.shape:
        return float("inf")
    if not is_float(value.dtype) or not is_float(other.dtype):
        return 0.0 if np.array_equal(value, other) else float("inf")
    if not value.size:
        return 0.0
    finite = np.isfinite(value) & np.isfinite(other)
    if not np.array_equal(np.isfinite(value), np.isfinite(other)):
        return float("inf")
    scale = max(float(np.abs(value[finite]).max(initial=0.0)), float(np.abs(other[finite]).max(initial=0.0)))
    error = float(np.abs(value[finite] - other[finite]).max(initial=0.0))
    return error / scale if scale else 0.0


def _is_16_bit(graph: onnx.GraphProto) -> bool:
    kinds = {tensor.data_type for tensor in graph.initializer}
    return bool(kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
