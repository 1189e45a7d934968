"""Passes on small ONNX models in float64: what they said, and that the function is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from fuser import pipeline
from fuser.files import ModelFile
from fuser.graphs.onnx.graph import OnnxGraph
from fuser.rewrite import RewritePass

DOUBLE = onnx.TensorProto.DOUBLE
Pass = RewritePass[Any, Any]


def rewritten(proto: onnx.ModelProto, *passes: Pass, freeze_inputs: bool = False) -> tuple[Any, onnx.ModelProto]:
    """(outcome, model) after the passes, to a fixed point."""
    graph = OnnxGraph(ModelFile.from_proto(proto), freeze_inputs=freeze_inputs)
    outcome = pipeline.run(graph, passes)
    result = graph.to_model().to_proto()
    onnx.checker.check_model(result, full_check=_is_declared_right(proto))
    return outcome, result


def _is_declared_right(proto: onnx.ModelProto) -> bool:
    """Whether the shapes and types that the model declares are those it has."""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.shape_inference.InferenceError:
        return False
    return True


def evaluate(proto: onnx.ModelProto) -> np.ndarray:
    """The first output for seeded inputs of the shapes that are declared, N = 2."""
    rng = np.random.default_rng(8)
    feeds: dict[str, np.ndarray] = {}
    constants = {tensor.name for tensor in proto.graph.initializer}
    for info in proto.graph.input:
        if info.name not in constants:
            shape = [dim.dim_value or 2 for dim in info.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            feeds[str(info.name)] = rng.standard_normal(shape).astype(dtype)
    return np.asarray(ReferenceEvaluator(proto).run(None, feeds)[0])  # type: ignore[index]


def applied(proto: onnx.ModelProto, *passes: Pass, bound: float = 1e-12, **options: bool) -> onnx.ModelProto:
    """The rewritten model; it has to be the same function, nothing may have been missed."""
    outcome, result = rewritten(proto, *passes, **options)
    assert outcome.applied
    assert [str(remark) for remark in outcome.missed] == []
    before, after = evaluate(proto).astype(np.float64), evaluate(result).astype(np.float64)
    assert before.shape == after.shape
    assert np.abs(after - before).max() <= bound * np.abs(before).max()
    return result


def refused(proto: onnx.ModelProto, one: Pass) -> Mapping[str, int]:
    """The codes of what was missed, counted; nothing may have been applied, and no bit changed."""
    before = proto.SerializeToString(deterministic=True)
    outcome, result = rewritten(proto, one)
    assert outcome.applied == []
    assert result.SerializeToString(deterministic=True) == before
    codes = [remark.code for remark in outcome.missed]
    return {code: codes.count(code) for code in codes}
