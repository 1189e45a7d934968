"""The float64 evaluation of an ONNX model: every constant, input and result is widened.

What remains of the model is the function it was meant to compute: rounding is gone, so two models that agree here
to 1e-12 are the same function, and two that do not are not.  A `Nudge` moves every constant by at most one rounding
of its stored type; how far the outputs follow says how much rounding a right rewrite may show.

This module is imported in a worker process: see `runners.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fuser import files
from fuser.files import ModelFile
from fuser.files.model import tensors_of
from fuser.proof.float64_ops import OPS, ROUNDING_CASTS, STORED_OPS, Cast
from fuser.proof.outcome import Failure, Outcome, first_line
from fuser.proof.rounding import Nudge, is_float, is_low
from fuser.proof.runners import release

_SHARE = 0.4
"""Of the memory that is free, how much one constant may take: results and temporaries need room as well."""

_LARGE_ATTRIBUTES = {onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH}
"""Attributes that are not worth comparing: nodes with one share no operator."""


def evaluate(
    path: str, sets: Sequence[Mapping[str, Any]], nudges: Sequence[int | None], scale: float = 1.0
) -> list[list[Outcome]]:
    """The model's outputs in float64: one list for each nudge (None: the truth itself), one outcome for each set.

    nudges: seeds; `scale` is the size of a nudge in roundings of the stored type.
    """
    release()
    model = files.load(path)
    largest = max((math.prod(tensor.dims) for tensor in model.proto.graph.initializer), default=0)
    if 8 * largest > _SHARE * available_memory():
        failure = Failure("too-large", f"one constant alone needs {8 * largest / 1e9:.1f} GB in float64")
        return [[failure] * len(sets) for _ in nudges]
    _read_inner_tensors(model)
    return [_evaluate(model, sets, None if seed is None else Nudge(seed, scale)) for seed in nudges]


def evaluate_stored(path: str, sets: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """The model's outputs in the types that are stored, operator by operator: an outcome for each set.

    A runtime picks another kernel, which rounds otherwise, where an operand is a constant.  Here an operator
    computes the same bits wherever its operands come from.
    """
    release()
    model = files.load(path)
    _read_inner_tensors(model)
    return _evaluate(model, sets, None, StoredEvaluator)


def intermediates(
    path: str, feeds: Mapping[str, Any], names: Sequence[str], nudge: int | None = None
) -> dict[str, Any]:
    """The float64 values of the named tensors of the main graph, those that exist.

    nudge: as for `evaluate`.
    """
    model = files.load(path)
    _read_inner_tensors(model)
    evaluator = _evaluator(model, None if nudge is None else Nudge(nudge), Float64Evaluator)
    with np.errstate(all="ignore"):
        return evaluator.run_some(names, evaluator.fed(feeds))


def _evaluate(
    model: ModelFile,
    sets: Sequence[Mapping[str, Any]],
    nudge: Nudge | None,
    kind: type[Float64Evaluator] | None = None,
) -> list[Outcome]:
    try:
        evaluator = _evaluator(model, nudge, kind or Float64Evaluator)
    except Exception as error:
        return [Failure("unsupported", first_line(error))] * len(sets)
    with np.errstate(all="ignore"):
        found = evaluator.run_sets(evaluator.output_names, [evaluator.fed(feeds) for feeds in sets])
    return [_outcome(one, evaluator.output_names) for one in found]


def _outcome(found: dict[str, Any] | Exception, names: Sequence[str]) -> Outcome:
    if isinstance(found, MemoryError):
        return Failure("too-large", "not enough memory for the float64 evaluation")
    if isinstance(found, Exception):
        return Failure("refused", first_line(found))
    if missing := [name for name in names if name not in found]:
        return Failure("refused", f"nothing computes the output {missing[0]!r}")
    return [found[name] for name in names]


def _evaluator(model: ModelFile, nudge: Nudge | None, kind: type[Float64Evaluator]) -> Float64Evaluator:
    # Subgraphs and functions are run by instances of the same class, so that is where the nudge must be.
    own = type("Nudged", (kind,), {"nudge": nudge, "stored": staticmethod(model.array)})
    evaluator: Float64Evaluator = own(model.proto)
    return evaluator


def _read_inner_tensors(model: ModelFile) -> None:
    """Put the tensors of attributes and bodies back into the model: only initializers can be read one at a time."""
    for holder in (*model.proto.graph.node, *model.proto.functions):
        for tensor in tensors_of(holder):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raw = model.blob(tensor).array().tobytes()
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                tensor.raw_data = raw


def available_memory() -> int:
    """Bytes that can be had without swapping; a large number where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return sys.maxsize


@dataclass(frozen=True)
class _Stored:
    """A constant that is still where the model keeps it."""

    tensor: onnx.TensorProto


class _Step(NamedTuple):
    """One node: what computes it, what it reads and writes, and which values nobody reads after it."""

    op: OpRun
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: list[str]


class Float64Evaluator(ReferenceEvaluator):
    """The reference evaluator with wide constants and results, better operators, and values freed after use.

    Several sets of inputs are run together, node by node.  So a large constant is read and widened once, when the
    first node needs it, and is gone after the last: a model needs little more memory than its results.
    """

    operators: Sequence[type[OpRun]] = OPS
    nudge: Nudge | None = None
    stored: Callable[[onnx.TensorProto], Any] = staticmethod(onnx.numpy_helper.to_array)

    def __init__(self, proto: Any, **options: Any) -> None:
        self._instances: dict[Any, OpRun] = {}
        # The bodies of functions are made without the operators that their callers were given.
        super().__init__(proto, **{**options, "new_ops": options.get("new_ops") or list(self.operators)})
        self._fixed = _shape_constants(self.nodes_)
        # What a subgraph captures may be read by any node with one; such models are small enough to keep all.
        self._keeps = any(op.need_context() for op in self.rt_nodes_)
        for name, value in self.rt_inits_.items():
            if not isinstance(value, _Stored):
                self.rt_inits_[name] = self._constant(name, value)
            elif self._keeps:
                self.rt_inits_[name] = self._read(name, value)
        self._steps = self._plan()

    def fed(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs as this evaluation takes them."""
        return {name: self._wide(value, nudge=False) for name, value in feeds.items()}

    def _plan(self) -> list[_Step]:
        names = [(tuple(node.input), tuple(node.output)) for node in self.nodes_]
        last_use = {name: index for index, (inputs, _) in enumerate(names) for name in inputs if name}
        done: list[list[str]] = [[] for _ in names]
        if not self._keeps:
            for name, index in last_use.items():
                done[index].append(name)
        return [_Step(op, *pair, free) for op, pair, free in zip(self.rt_nodes_, names, done, strict=True)]

    def retrieve_external_data(self, initializer: onnx.TensorProto) -> Any:
        """It is read when it is needed."""
        return _Stored(initializer)

    def _load_impl(self, node: onnx.NodeProto, input_types: Any = None) -> Any:
        """Nodes that differ in nothing but names share an operator: to make one takes longer than to run it."""
        make = super()._load_impl(node, input_types)
        kinds = {attribute.type for attribute in node.attribute}
        if node.domain or kinds & _LARGE_ATTRIBUTES:
            return make
        attributes = tuple(attribute.SerializeToString() for attribute in node.attribute)
        key = make, node.op_type, attributes, tuple(map(bool, node.output))

        def shared(node: onnx.NodeProto, run_params: dict[str, Any]) -> OpRun:
            if key not in self._instances:
                self._instances[key] = make(node, run_params)
            return self._instances[key]

        return shared

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
        (found,) = self.run_sets(names, [feeds], attributes)
        if isinstance(found, Exception):
            raise found
        return found

    def run_sets(
        self,
        names: Sequence[str],
        sets: Sequence[Mapping[str, Any]],
        attributes: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any] | Exception]:
        """Those of the named values that exist, for each set of inputs; or what went wrong with it."""
        constants: dict[str, Any] = {"": None, **self.rt_inits_}
        running: dict[int, dict[str, Any]] = {number: dict(feeds) for number, feeds in enumerate(sets)}
        failed: dict[int, Exception] = {}
        wanted = set(names)
        for step in self._steps:
            for name in step.inputs:
                if name in constants:
                    constants[name] = self._read(name, constants[name])
            for number, values in list(running.items()):
                try:
                    self._run_step(step, values, constants, attributes)
                except Exception as error:
                    failed[number] = error
                    del running[number]
            for name in step.done:
                if name not in wanted:
                    for values in (constants, *running.values()):
                        values.pop(name, None)
        found: list[dict[str, Any] | Exception] = []
        for number in range(len(sets)):
            if number in failed:
                found.append(failed[number])
            else:
                known = {**constants, **running[number]}
                found.append({name: self._read(name, known[name]) for name in names if name in known})
        return found

    def _run_step(
        self,
        step: _Step,
        values: dict[str, Any],
        constants: Mapping[str, Any],
        attributes: Mapping[str, Any] | None,
    ) -> None:
        linked: dict[str, Any] = {}
        if step.op.has_linked_attribute and attributes:
            linked["linked_attributes"] = attributes
        if step.op.need_context():
            linked["context"] = {**constants, **values}
        inputs = [values[name] if name in values else constants[name] for name in step.inputs]
        outputs = step.op.run(*inputs, **linked)  # type: ignore[no-untyped-call]
        for name, value in zip(step.outputs, outputs, strict=False):
            if name:
                values[name] = self._result(step.op, value)

    def _read(self, name: str, value: Any) -> Any:
        return self._constant(name, self.stored(value.tensor)) if isinstance(value, _Stored) else value

    def _constant(self, name: str, value: Any) -> Any:
        return self._wide(value, nudge=name not in self._fixed)

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


class StoredEvaluator(Float64Evaluator):
    """The same without widening."""

    operators = STORED_OPS

    def _wide(self, value: Any, *, nudge: bool) -> Any:
        """A product of a transposed view may be summed in another order than that of a copy."""
        return np.ascontiguousarray(value) if isinstance(value, np.ndarray) and value.ndim else value


def _shape_constants(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """Constants whose value decides a shape or a place, where moving them would mean another model."""
    return {
        name
        for node in nodes
        if node.op_type in ("Resize", "Upsample", "Range", "RoiAlign", "NonMaxSuppression", "OneHot")
        for name in node.input[1:]
    }
