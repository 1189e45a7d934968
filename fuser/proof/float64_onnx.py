"""The float64 evaluation of an ONNX model: every constant, input and result is widened.

What remains of the model is the function it was meant to compute: rounding is gone, so two models that agree here
to 1e-12 are the same function, and two that do not are not.  A `Nudge` moves every constant by at most one rounding
of its stored type; how far the outputs follow says how much rounding a right rewrite may show.

This module is imported in a worker process: see `runners.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fuser.proof.float64_ops import OPS, ROUNDING_CASTS, Cast, is_float, is_low
from fuser.proof.outcome import Failure, Outcome, first_line
from fuser.proof.rounding import Nudge

_SHARE = 0.4
"""Of the memory that is free, how much constants may take: results and temporaries need room as well."""


def evaluate(
    path: str, sets: Sequence[Mapping[str, Any]], nudges: Sequence[int | None], scale: float = 1.0
) -> list[list[Outcome]]:
    """The model's outputs in float64: one list for each nudge (None: the truth itself), one outcome for each set.

    nudges: seeds; `scale` is the size of a nudge in roundings of the stored type.
    """
    proto = onnx.load(path)  # with its external data
    if (needed := 8 * _parameters(proto)) > _SHARE * available_memory():
        failure = Failure("too-large", f"the constants alone need {needed / 1e9:.1f} GB in float64")
        return [[failure] * len(sets) for _ in nudges]
    return [_evaluate(proto, sets, None if seed is None else Nudge(seed, scale)) for seed in nudges]


def intermediates(path: str, feeds: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The float64 values of the named tensors of the main graph, those that exist."""
    evaluator = _evaluator(onnx.load(path), None)
    return evaluator.run_some(names, _widen_all(feeds))


def _evaluate(proto: onnx.ModelProto, sets: Sequence[Mapping[str, Any]], nudge: Nudge | None) -> list[Outcome]:
    try:
        evaluator = _evaluator(proto, nudge)
    except Exception as error:
        return [Failure("unsupported", first_line(error))] * len(sets)
    outcomes: list[Outcome] = []
    for feeds in sets:
        try:
            with np.errstate(all="ignore"):
                outcomes.append(evaluator.run(None, _widen_all(feeds)))
        except MemoryError:
            outcomes.append(Failure("too-large", "not enough memory for the float64 evaluation"))
        except Exception as error:
            outcomes.append(Failure("refused", first_line(error)))
    return outcomes


def _evaluator(proto: onnx.ModelProto, nudge: Nudge | None) -> Float64Evaluator:
    # Subgraphs and functions are run by instances of the same class, so that is where the nudge must be.
    kind = type("Nudged", (Float64Evaluator,), {"nudge": nudge})
    evaluator: Float64Evaluator = kind(proto)
    return evaluator


def available_memory() -> int:
    """Bytes that can be had without swapping; a large number where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return sys.maxsize


def _parameters(proto: onnx.ModelProto) -> int:
    return sum(math.prod(tensor.dims) for tensor in proto.graph.initializer)


class Float64Evaluator(ReferenceEvaluator):
    """The reference evaluator with wide constants and results, better operators, and values freed after use."""

    nudge: Nudge | None = None

    def __init__(self, proto: Any, **options: Any) -> None:
        # The bodies of functions are made without the operators that their callers were given.
        super().__init__(proto, **{**options, "new_ops": options.get("new_ops") or list(OPS)})
        fixed = _shape_constants(self.nodes_)
        for name, value in self.rt_inits_.items():
            self.rt_inits_[name] = self._wide(value, nudge=name not in fixed)
        self._last_use: dict[str, int] = {}
        for index, node in enumerate(self.rt_nodes_):
            for name in node.input:
                self._last_use[name] = index
        # What a subgraph captures may be read by any node with one; such models are small enough to keep all.
        self._keeps = any(node.need_context() for node in self.rt_nodes_)

    def run(  # type: ignore[override]
        self,
        output_names: Sequence[str] | None,
        feed_inputs: Mapping[str, Any],
        attributes: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> list[Any]:
        """The named outputs; all of them by default."""
        names = list(self.output_names if output_names is None else output_names)
        results = self.run_some(names, feed_inputs, attributes)
        if missing := [name for name in names if name not in results]:
            raise RuntimeError(f"nothing computes the output {missing[0]!r}")
        return [results[name] for name in names]

    def run_some(
        self, names: Sequence[str], feeds: Mapping[str, Any], attributes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Those of the named values that exist."""
        results: dict[str, Any] = {"": None, **self.rt_inits_, **feeds}
        wanted = set(names)
        for index, node in enumerate(self.rt_nodes_):
            linked = {"linked_attributes": attributes} if node.has_linked_attribute and attributes else {}
            if node.need_context():
                linked["context"] = results
            outputs = node.run(*(results[name] for name in node.input), **linked)
            for name, value in zip(node.output, outputs, strict=False):
                if name:
                    results[name] = self._result(node, value)
            if not self._keeps:
                for name in node.input:
                    if self._last_use[name] == index and name not in wanted and name:
                        results.pop(name, None)
        return {name: results[name] for name in names if name in results}

    def _result(self, node: OpRun, value: Any) -> Any:
        if node.op_type == "Constant":
            return self._wide(value, nudge=True)
        if isinstance(node, Cast) and self.nudge:
            to = next(attribute.i for attribute in node.onnx_node.attribute if attribute.name == "to")
            if to in ROUNDING_CASTS:  # 0 where a function's caller decides
                return self.nudge.cast(value, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to)))
        return self._wide(value, nudge=False)

    def _wide(self, value: Any, *, nudge: bool) -> Any:
        if isinstance(value, list):
            return [self._wide(item, nudge=nudge) for item in value]
        if nudge and self.nudge and isinstance(value, np.ndarray) and is_float(value.dtype):
            return self.nudge.constant(value)
        return value.astype(np.float64) if is_low(value) else value


def _shape_constants(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """Constants whose value decides a shape or a place, where moving them would mean another model."""
    return {
        name
        for node in nodes
        if node.op_type in ("Resize", "Upsample", "Range", "RoiAlign", "NonMaxSuppression", "OneHot")
        for name in node.input[1:]
    }


def _widen_all(feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _widen(value) for name, value in feeds.items()}


def _widen(value: Any) -> Any:
    if isinstance(value, list):
        return [_widen(item) for item in value]
    return value.astype(np.float64) if is_low(value) else value
