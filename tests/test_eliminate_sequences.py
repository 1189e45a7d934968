"""Sequences that are only made to be taken apart: what becomes a Split, and what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fuser.passes.eliminate_sequences import EliminateSequences
from onnx_models import model, node, op_types
from rewriting import DOUBLE, applied, evaluate, refused, rewritten

PASS = EliminateSequences()


def at(index: int, source: str = "s") -> onnx.NodeProto:
    return node("SequenceAt", [source, f"i{index}"], [f"e{index}".replace("-", "m")])


def indices(*values: int) -> dict[str, np.ndarray]:
    return {f"i{value}": np.array(value) for value in values}


def split(*operands: str, **attributes: object) -> onnx.NodeProto:
    return node("SplitToSequence", ["x", *operands], ["s"], **{"axis": 1, **attributes})


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18])
@pytest.mark.parametrize(
    ("sizes", "axis", "taken"),
    [
        (np.array([1, 2, 3]), 1, (0, 1, 2)),
        (np.array([1, 2, 3]), -3, (2, 0)),  # out of order, one left out
        (np.array(4), 1, (0, 1)),  # the last one is smaller
        (np.array(2), 1, (-1, 1)),
        (np.array([6, 0]), 1, (0,)),
        (None, 1, (5,)),  # one by one, with the axis
    ],
)
def test_a_sequence_becomes_a_split(opset: int, sizes: Any, axis: int, taken: tuple[int, ...]) -> None:
    constants = indices(*taken) | ({} if sizes is None else {"sizes": sizes})
    parts = [at(i) for i in taken]
    joined = node("Concat", [p.output[0] for p in parts], axis=1)
    nodes = [split(*(["sizes"] if sizes is not None else []), axis=axis), *parts, joined]
    proto = model(nodes, x=(2, 6, 3, 3), constants=constants, opset=opset, dtype=DOUBLE, ir_version=7)
    result = applied(proto, PASS, bound=0)
    assert op_types(result.graph) == ["Split", "Concat"]
    np.testing.assert_array_equal(evaluate(result), evaluate(proto))


def test_the_names_of_outputs_survive() -> None:
    nodes = [split("sizes"), node("SequenceAt", ["s", "i1"], ["y"])]
    proto = model(nodes, x=(2, 6, 3, 3), constants={"sizes": np.array([2, 4]), **indices(1)}, dtype=DOUBLE)
    result = applied(proto, PASS, bound=0)
    assert [info.name for info in result.graph.output] == ["y"] and op_types(result.graph) == ["Split"]


def test_not_constant() -> None:
    """How many there are depends on the input."""
    nodes = [split("sizes", axis=0), at(0), node("Relu", ["e0"])]
    proto = model(nodes, constants={"sizes": np.array(1), **indices(0)}, dtype=DOUBLE)
    assert refused(proto, PASS) == {"not-constant": 1}


@pytest.mark.parametrize("reader", ["SequenceLength", "ConcatFromSequence"])
def test_shared_output(reader: str) -> None:
    attributes = {"axis": 0} if reader == "ConcatFromSequence" else {}
    nodes = [
        split("sizes"),
        at(0),
        node(reader, ["s"], ["n"], **attributes),
        node("Shape", ["n"], ["m"]),
        node("Relu", ["e0"]),
    ]
    proto = model(nodes, x=(2, 6, 3, 3), constants={"sizes": np.array(3), **indices(0)}, dtype=DOUBLE)
    assert refused(proto, PASS) == {"shared-output": 1}


def test_an_index_that_is_computed_at_run_time() -> None:
    nodes = [
        split("sizes"),
        node("ArgMax", ["x"], ["a"], axis=0, keepdims=0),
        node("ReduceMin", ["a"], ["i"], keepdims=0),
    ]
    nodes.append(node("SequenceAt", ["s", "i"]))
    proto = model(nodes, x=(2, 6, 3, 3), constants={"sizes": np.array(3)}, dtype=DOUBLE)
    assert refused(proto, PASS) == {"shared-output": 1}


def test_taken_twice() -> None:
    nodes = [split("sizes"), at(0), at(-2), node("Add", ["e0", "em2"])]
    proto = model(nodes, x=(2, 6, 3, 3), constants={"sizes": np.array(3), **indices(0, -2)}, dtype=DOUBLE)
    assert refused(proto, PASS) == {"taken-twice": 1}


def test_elements_without_the_axis_are_no_parts() -> None:
    nodes = [split(keepdims=0), at(0), node("Relu", ["e0"])]
    outcome, _ = rewritten(model(nodes, x=(2, 6, 3, 3), constants=indices(0), dtype=DOUBLE), PASS)
    assert not outcome.applied and not outcome.missed
