"""merge-slices: a slice of a slice is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fuser.passes.eliminate_identity import EliminateIdentity
from fuser.passes.merge_slices import MergeSlices
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_models import body, model, node, op_types
from rewriting import refused, rewritten

MERGE = MergeSlices()
LAST = 2**63 - 1

Ranges = list[tuple[int, int, int, int]]
"""(axis, start, end, step)"""


def sliced(steps: list[Ranges], *, opset: int = 17, x: Any = (5, 4, 6), named: bool = True) -> onnx.ModelProto:
    nodes, constants, source = [], {}, "x"
    for i, ranges in enumerate(steps):
        axes, starts, ends, sizes = (list(numbers) for numbers in zip(*ranges, strict=True))
        if opset < 10:
            one = node("Slice", [source], [f"s{i}"], starts=starts, ends=ends, **({"axes": axes} if named else {}))
        else:
            given_ = {"starts": starts, "ends": ends, "axes": axes, "steps": sizes}
            kept = list(given_) if any(size != 1 for size in sizes) else ["starts", "ends", "axes"][: 3 if named else 2]
            constants |= {f"{name}{i}": np.array(given_[name], np.int64) for name in kept}
            one = node("Slice", [source, *(f"{name}{i}" for name in kept)], [f"s{i}"])
        nodes.append(one)
        source = f"s{i}"
    return model([*nodes, node("Neg", [source])], x=x, constants=constants, opset=opset)


def run(proto: onnx.ModelProto, shape: tuple[int, ...] = (5, 4, 6)) -> np.ndarray:
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return np.asarray(ReferenceEvaluator(proto).run(None, {"x": x})[0])  # type: ignore[index]


BOUNDS = st.one_of(st.integers(-8, 8), st.sampled_from([LAST, 2**31 - 1, -LAST]))
RANGES = st.lists(
    st.tuples(st.integers(-3, 2), BOUNDS, BOUNDS, st.sampled_from([1, 1, 1, 2, -1])),
    min_size=1,
    max_size=3,
    unique_by=lambda one: one[0] % 3,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(RANGES, min_size=2, max_size=3), st.booleans())
def test_the_same_elements(steps: list[Ranges], dynamic: bool) -> None:
    proto = sliced(steps, x=("N", 4, "M") if dynamic else (5, 4, 6))
    _, result = rewritten(proto, EliminateIdentity(), MERGE)
    np.testing.assert_array_equal(run(result), run(proto))
    axes = [axis % 3 for ranges in steps for axis, *_ in ranges]
    if len({*axes}) == len(axes):
        assert op_types(result.graph).count("Slice") <= 1
    assert not rewritten(result, EliminateIdentity(), MERGE)[0].applied


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 23])
@pytest.mark.parametrize("named", [True, False])
def test_bounds_are_attributes_or_inputs(opset: int, named: bool) -> None:
    first: Ranges = [(0, 1, LAST, 1), (1, 0, -1, 1)]
    proto = sliced([first, [(2, -3, 5, 1)], [(0, 1, 3, 1)]], opset=opset)
    if not named:
        proto = sliced([first, [(0, 0, 3, 1)]], opset=opset, named=False)
    outcome, result = rewritten(proto, MERGE)
    assert outcome.applied and op_types(result.graph) == ["Slice", "Neg"]
    np.testing.assert_array_equal(run(result), run(proto))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, -4, LAST, 1), (0, 1, 2, 1)),
        ((0, 0, -1, 1), (0, 1, LAST, 1)),
        ((0, 1, 4, 1), (0, -2, LAST, 1)),
        ((0, 1, 4, 1), (0, 0, -1, 1)),
        ((0, 0, LAST, 2), (0, 1, 2, 1)),
        ((0, 0, 4, 1), (0, 0, LAST, 2)),
        ((0, 4, 0, -1), (0, 0, 2, 1)),
    ],
)
def test_ranges_along_one_axis_that_do_not_add_up(first: Any, second: Any) -> None:
    assert refused(sliced([[first], [second]]), MERGE) == {}


def test_axes_from_both_ends_are_the_same_only_where_their_number_is_known() -> None:
    nodes = [node("Custom", ["x"], ["c"])]
    nodes[0].domain = "custom"
    proto = sliced([[(0, 1, 2, 1)], [(-3, 0, 1, 1)]])
    proto.graph.node[0].input[0] = "c"
    nodes += proto.graph.node
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    before = proto.SerializeToString(deterministic=True)
    outcome, result = rewritten(proto, MERGE)
    assert not outcome.applied and result.SerializeToString(deterministic=True) == before


def test_what_others_read_stays() -> None:
    proto = sliced([[(0, 1, 4, 1)], [(1, 0, 2, 1)]])
    proto.graph.output.add().CopyFrom(onnx.helper.make_tensor_value_info("s0", 1, [3, 4, 6]))
    assert refused(proto, MERGE) == {}
    nodes = list(sliced([[(0, 1, 4, 1)], [(1, 0, 2, 1)]]).graph.node)
    branches = {
        "then_branch": body([nodes[1]], ["s1"]),
        "else_branch": body([node("Neg", ["s0"], ["n"])], ["n"]),
    }
    tensors = {"yes": np.array(True)} | {
        f"{name}{i}": np.array([1]) for name in ("starts", "ends", "axes") for i in (0, 1)
    }
    assert refused(model([nodes[0], node("If", ["yes"], **branches)], x=(5, 4, 6), constants=tensors), MERGE) == {}


def test_bounds_that_are_not_known() -> None:
    nodes = [
        node("Shape", ["x"], ["n"], end=1),
        node("Slice", ["x", "zero", "n", "zero"], ["a"]),
        node("Slice", ["a", "zero", "two", "one"], ["b"]),
        node("Neg", ["b"]),
    ]
    constants = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    assert refused(model(nodes, x=("N", 4, 6), constants=constants), MERGE) == {}
