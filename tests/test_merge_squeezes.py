"""merge-squeezes: a reduction keeps its axes, or drops them, as what follows would have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fuser.passes.merge_squeezes import MergeSqueezes
from onnx.reference import ReferenceEvaluator
from onnx_models import body, model, node, op_types
from rewriting import rewritten

MERGE = MergeSqueezes()


def reduced(
    operator: str,
    axes: list[int],
    keep: int,
    then: list[Any],
    *,
    opset: int = 18,
    x: Any = ("N", 4, 6),
    how: dict[str, Any] | None = None,
    **tensors: Any,
) -> onnx.ModelProto:
    """x -> reduction -> `then`, one node with its operands and, in `how`, its attributes."""
    kind, *operands = then
    as_input = opset >= (13 if operator == "ReduceSum" else 18)
    first = node(operator, ["x", "axes"] if as_input else ["x"], ["r"], keepdims=keep)
    if not as_input:
        first.attribute.append(onnx.helper.make_attribute("axes", axes))
    constants = {name: np.array(values, np.int64) for name, values in tensors.items()}
    if as_input:
        constants["axes"] = np.array(axes, np.int64)
    return model([first, node(kind, ["r", *operands], **(how or {}))], constants=constants, opset=opset, x=x)


def check(proto: onnx.ModelProto) -> onnx.ModelProto:
    """It is one node now, and the same function."""
    outcome, result = rewritten(proto, MERGE)
    assert [str(remark) for remark in outcome.missed] == []
    x = np.random.default_rng(2).uniform(0.5, 2, (2, 4, 6)).astype(np.float32)
    before, after = (ReferenceEvaluator(one).run(None, {"x": x})[0] for one in (proto, result))  # type: ignore[index]
    np.testing.assert_array_equal(before, after)
    assert list(result.graph.output) == list(proto.graph.output)
    return result


OPERATORS = [f"Reduce{kind}" for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("axes", [[1], [-1], [1, 2], [0, 2]])
@pytest.mark.parametrize("keep", [0, 1])
def test_axes_that_come_back_or_go(operator: str, axes: list[int], keep: int) -> None:
    (reduction,) = check(reduced(operator, axes, keep, ["Squeeze" if keep else "Unsqueeze", "axes"])).graph.node
    assert [a.i for a in reduction.attribute if a.name == "keepdims"] == [1 - keep]


def test_where_axes_are_attributes() -> None:
    proto = reduced("ReduceMean", [1], 0, ["Unsqueeze"], opset=11, how={"axes": [1]})
    assert op_types(check(proto).graph) == ["ReduceMean"]


def test_the_default_is_to_keep() -> None:
    proto = reduced("ReduceMax", [2], 1, ["Squeeze", "axes"])
    del proto.graph.node[0].attribute[:]
    assert op_types(check(proto).graph) == ["ReduceMax"]


def test_reshapes_and_what_follows() -> None:
    proto = reduced("ReduceSum", [2], 0, ["Reshape", "shape"], shape=[0, 4, 1])
    proto.graph.node[1].output[0] = "s"
    proto.graph.node.append(node("Div", ["x", "s"]))
    assert op_types(check(proto).graph) == ["ReduceSum", "Div"]


@pytest.mark.parametrize(
    "then",
    [["Unsqueeze", "other"], ["Reshape", "shape"], ["Unsqueeze", "several"]],
    ids=["another axis", "another shape", "more axes"],
)
def test_another_shape_is_no_candidate(then: list[Any]) -> None:
    proto = reduced("ReduceMean", [1], 0, then, other=[0], shape=[0, 3, 2], several=[1, 2])
    outcome, result = rewritten(proto, MERGE)
    assert not outcome.applied and not outcome.missed
    assert result.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)


@pytest.mark.parametrize("reader", ["node", "output", "body"])
def test_who_else_reads_the_reduction_needs_it_as_it_is(reader: str) -> None:
    proto = reduced("ReduceMean", [1], 0, ["Unsqueeze", "axes"])
    if reader == "node":
        proto.graph.node.append(node("Neg", ["r"], ["z"]))
        proto.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["N", 6]))
    elif reader == "output":
        proto.graph.output.append(onnx.helper.make_tensor_value_info("r", 1, ["N", 6]))
    else:
        then = body([node("Unsqueeze", ["r", "axes"], ["u"])], ["u"])
        proto.graph.node[1].CopyFrom(node("If", ["true"], then_branch=then, else_branch=then))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "true"))
    outcome, _ = rewritten(proto, MERGE)
    assert not outcome.applied and not outcome.missed


def test_unknown_sizes_are_not_guessed() -> None:
    outcome, _ = rewritten(
        reduced("ReduceMean", [1], 0, ["Reshape", "shape"], shape=[-1, 1, 6], x=("N", 4, "M")), MERGE
    )
    assert not outcome.applied
    assert len(check(reduced("ReduceMean", [1], 0, ["Unsqueeze", "axes"], x=("N", 4, "M"))).graph.node) == 1
