"""Following a map through changes of shape, and the readers that decide whether it may move."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fuser.passes.fold_affine import FoldAffine
from fuser.passes.fold_batch_norm import FoldBatchNorm
from fuzz_onnx import evaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types
from rewriting import DOUBLE, applied, refused, rewritten

from fuser import pipeline
from fuser.absorb import moved_axis
from fuser.affine import ChannelAffine
from fuser.files import ModelFile
from fuser.graph import Dim
from fuser.graphs.onnx.graph import OnnxGraph
from fuser.maps import Map

FOLD = FoldBatchNorm()


def random_map(channels: int, axis: int, seed: int = 0) -> Map:
    rng = np.random.default_rng(seed)
    return Map(ChannelAffine(rng.standard_normal(channels), rng.standard_normal(channels)), axis)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_map_that_moves_is_the_same_map(data: st.DataObject) -> None:
    """Whatever it answers is right: reshape, then map, is map, then reshape."""
    factors = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))
    here, there = (_grouped(data, factors) for _ in range(2))
    axis = data.draw(st.integers(0, len(here) - 1))
    m = random_map(here[axis], axis)
    moved = moved_axis(here, there, m)
    if moved is None:
        return
    assert moved.axis is not None
    x = np.random.default_rng(1).standard_normal(here)
    expected = m.affine(x, axis).reshape(there)
    np.testing.assert_array_equal(moved.affine(x.reshape(there), moved.axis), expected)


def _grouped(data: st.DataObject, factors: Sequence[int]) -> tuple[int, ...]:
    """A shape whose sizes are products of neighbouring factors."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(factors) - 1))) if len(factors) > 1 else [])
    ends = [0, *cuts, len(factors)]
    return tuple(math.prod(factors[a:b]) for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize(
    ("here", "there", "axis", "to"),
    [
        (("N", 4, "H", "W"), ("N", 4, "HW"), 1, 1),  # in front, sizes unknown behind
        ((None, 4, 3, 3), (None, 36), 1, 1),  # merged: one number for each element of the row
        ((None, 36), (None, 4, 9), 1, None),  # split: varies along two axes
        ((2, 5, 6), (10, 6), 2, 1),  # at the back
        ((None, None, 6), (None, 6), 2, 1),
        ((2, 5, 6), (10, 6), 1, 0),  # repeated for each row in front
        ((None, 4, 3), (None, 3, 4), 1, None),
        (("N", 4, "H"), ("N", "H", 4), 1, None),  # sizes unknown where it matters
        ((2, 1, 4), (2, 4), 2, 1),
        ((2, 4), (2, 4, 1, 1), 1, 1),
    ],
)
def test_known_changes_of_shape(here: tuple[Dim, ...], there: tuple[Dim, ...], axis: int, to: int | None) -> None:
    size = here[axis]
    assert isinstance(size, int)
    moved = moved_axis(here, there, random_map(size, axis))
    assert (None if moved is None else moved.axis) == to


def test_a_map_of_the_wrong_size_does_not_move() -> None:
    assert moved_axis((2, 4, 3), (2, 12), random_map(3, 1)) is None


def test_maps_compose_along_one_axis_only() -> None:
    scalar = Map(ChannelAffine(np.array([2.0]), np.array([1.0])), None)
    inner = random_map(4, 1)
    for first, second in ((inner, scalar), (scalar, inner)):
        both = first.then(second)
        assert both is not None
        assert both.axis == 1
        x = np.random.default_rng(2).standard_normal((2, 4, 4))
        np.testing.assert_allclose(both.affine(x, 1), second.affine(first.affine(x, 1), 1), rtol=1e-12, atol=1e-12)
    assert inner.then(random_map(4, 2)) is None
    assert inner.then(random_map(3, 1)) is None


def test_an_unreasonable_shape_is_not_followed() -> None:
    assert moved_axis((2, 1 << 13, 1 << 13), (2, 1 << 26), random_map(1 << 13, 1)) is None


def constants() -> dict[str, Any]:
    return conv_constants(dtype=np.float64)


@pytest.mark.parametrize(
    ("asks", "kept"),
    [
        ([node("Shape", ["c"], ["s"]), node("Reshape", ["n", "s"])], ["Conv", "Shape", "Reshape"]),
        ([node("Size", ["c"], ["s"]), node("Expand", ["n", "s"])], ["Conv", "Size", "Expand"]),
        ([node("CastLike", ["n", "c"])], ["Conv", "CastLike"]),
    ],
    ids=["shape", "size", "type"],
)
def test_a_reader_of_the_shape_alone_is_in_nobodys_way(asks: list[Any], kept: list[str]) -> None:
    proto = model([conv(), batch_norm("c", "n"), *asks], x=("N", 4, "H", 3), constants=constants(), dtype=DOUBLE)
    graph = OnnxGraph(ModelFile.from_proto(proto))
    outcome = pipeline.run(graph, [FOLD])
    assert [r.code for r in (*outcome.applied, *outcome.missed)] == ["applied"]
    assert op_types(graph.to_model().to_proto().graph) == kept


def test_a_reader_of_the_elements_is_in_the_way() -> None:
    nodes = [conv(), batch_norm("c", "n"), node("CastLike", ["c", "n"])]
    assert refused(model(nodes, constants=constants(), dtype=DOUBLE), FOLD) == {"shared-output": 1}


def test_every_reader_has_to_take_it() -> None:
    taken = [node("Relu", ["x"], ["r"]), batch_norm("r", "n"), conv("n", "a"), conv("n", "b"), node("Add", ["a", "b"])]
    result = applied(model(taken, constants=constants(), dtype=DOUBLE), FOLD)
    assert op_types(result.graph) == ["Relu", "Conv", "Conv", "Add"]
    half = [*taken[:3], node("Neg", ["n"], ["m"]), node("Concat", ["a", "m"], axis=2)]
    assert refused(model(half, constants=constants(), dtype=DOUBLE), FOLD) == {"no-linear": 1}
    public = model([*taken[:3], node("Neg", ["a"])], constants=constants(), dtype=DOUBLE, outputs=["y", "n"])
    assert refused(public, FOLD) == {"no-linear": 1}


def test_grows() -> None:
    """A shift would put an Add behind each product; a scale, or one product, costs nothing."""
    products = [node("MatMul", ["n", "a"], ["p"]), node("MatMul", ["n", "b"], ["q"]), node("Mul", ["p", "q"])]
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "n"), *products]
    matrices = {"a": np.eye(4), "b": np.eye(4)}
    proto = model(nodes, constants={**constants(), **matrices}, dtype=DOUBLE, x=(3, 4))
    assert refused(proto, FOLD) == {"grows": 1}
    unshifted = {**constants(), **matrices, "beta": np.zeros(4), "mean": np.zeros(4)}
    result = applied(model(nodes, constants=unshifted, dtype=DOUBLE, x=(3, 4)), FOLD)
    assert op_types(result.graph) == ["Relu", "MatMul", "MatMul", "Mul"]


@pytest.mark.parametrize("turned", [False, True])
def test_a_table_of_embeddings_is_not_copied(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a language model reads its table, as it is or turned."""
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Mul", ["r", "gamma"], ["n"]),
        *([node("Transpose", ["table"], ["head"])] if turned else []),
        node("MatMul", ["n", "head" if turned else "table"], ["p"]),
        node("Gather", ["table", "token"], ["t"]),
        node("Max", ["p", "t"]),
    ]
    tensors = {**constants(), "table": np.eye(4), "token": np.array(2)}
    proto = model(nodes, constants=tensors, dtype=DOUBLE, x=(3, 4))
    outcome, _ = rewritten(proto, FoldAffine())
    assert "its own copy of a shared weight: 128 bytes" in outcome.applied[0].reason
    assert refused(proto, FoldAffine(shared_weights="refuse")) == {"shared-weights": 1}
    monkeypatch.setattr("fuser.absorb.MAX_COPY", 15)
    assert refused(proto, FoldAffine()) == {"grows": 1}


JOINED = {
    "twice": [node("Concat", ["n", "n"], ["j"], axis=1)],
    "by-two-ways": [node("Identity", ["n"], ["i"]), node("Concat", ["n", "i"], ["j"], axis=1)],
    "nested": [node("Concat", ["n", "q"], ["i"], axis=1), node("Concat", ["i", "n"], ["j"], axis=1)],
}


@pytest.mark.parametrize("name", JOINED)
def test_a_reader_that_takes_it_more_than_once(name: str) -> None:
    joined = [node("Relu", ["x"], ["r"]), batch_norm("r", "n"), node("Tanh", ["x"], ["q"]), *JOINED[name]]
    channels = 12 if name == "nested" else 8
    wide = np.random.default_rng(3).standard_normal((2, channels, 3, 3))
    kept = joined if name == "nested" else [one for one in joined if one.op_type != "Tanh"]
    proto = model([*kept, conv("j", "y", "wide")], constants={**constants(), "wide": wide}, dtype=DOUBLE)
    assert "BatchNormalization" not in op_types(applied(proto, FOLD, bound=1e-11).graph)


RANGES = [
    (1, 1, 3, 1),
    (1, 0, 9, 2),
    (-3, -3, -1, 1),
    (1, 3, -9, -1),
    (1, 3, 0, -2),
    (2, 1, 5, 2),
    (-1, 2, 2**63 - 1, 1),
]
"""(axis, start, end, step)"""


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("taken", RANGES)
def test_through_a_slice(taken: tuple[int, ...], behind: bool) -> None:
    axis, start, end, step = taken
    bounds = {
        name: np.array([value]) for name, value in zip(("s", "e", "a", "t"), (start, end, axis, step), strict=True)
    }
    size = len(range(4)[start:end:step]) if axis in (1, -3) else 4
    cut = ["s", "e", "a", "t"]
    tensors = {**constants(), **bounds}
    if behind:
        tensors["v"] = np.random.default_rng(5).standard_normal((3, size, 1, 1))
        nodes = [
            node("Relu", ["x"], ["r"]),
            batch_norm("r", "n"),
            node("Slice", ["n", *cut], ["c"]),
            conv("c", "y", "v"),
        ]
    else:
        tensors |= {name: tensors[name][:size] for name in ("gamma", "beta", "mean", "var")}
        nodes = [conv("x", "d"), node("Slice", ["d", *cut], ["c"]), batch_norm()]
    result = applied(model(nodes, constants=tensors, dtype=DOUBLE), FOLD, bound=1e-11)
    assert "BatchNormalization" not in op_types(result.graph)


def test_two_slices_that_are_read_by_one() -> None:
    """Each takes its half of the map; what is left out of a half is left alone."""
    halves = {"zero": np.array([0]), "two": np.array([2]), "four": np.array([4]), "one": np.array([1])}
    nodes = [
        node("Relu", ["x"], ["r"]),
        batch_norm("r", "n"),
        node("Slice", ["n", "zero", "two", "one"], ["a"]),
        node("Slice", ["n", "two", "four", "one"], ["b"]),
        node("Concat", ["b", "a"], ["j"], axis=1),
        conv("j", "y"),
    ]
    result = applied(model(nodes, constants={**constants(), **halves}, dtype=DOUBLE), FOLD, bound=1e-11)
    assert op_types(result.graph) == ["Relu", "Slice", "Slice", "Concat", "Conv"]


def test_a_slice_of_an_unknown_size_is_not_followed() -> None:
    nodes = [
        node("Relu", ["x"], ["r"]),
        batch_norm("r", "n"),
        node("Slice", ["n", "s", "e", "a"], ["c"]),
        conv("c", "y"),
    ]
    bounds = {"s": np.array([0]), "e": np.array([4]), "a": np.array([1])}
    proto = model(nodes, x=("N", "C", 8, 8), constants={**constants(), **bounds}, dtype=DOUBLE)
    assert refused(proto, FOLD) == {"axis-mismatch": 1}


def test_looking_changes_nothing() -> None:
    proto = model([conv(), batch_norm()], constants=constants(), dtype=DOUBLE)
    before = proto.SerializeToString(deterministic=True)
    graph = OnnxGraph(ModelFile.from_proto(proto))
    (op,) = graph.ops(FOLD.root)
    FOLD.match(graph, op)
    assert graph.edits == 0
    assert graph.to_model().to_proto().SerializeToString(deterministic=True) == before


RESIZES: dict[str, tuple[int, Any, dict[str, Any], bool]] = {
    "scales": (11, ["", "scales"], {}, True),
    "linear": (13, ["", "scales"], {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, True),
    "cubic": (13, ["", "scales"], {"mode": "cubic", "exclude_outside": 1}, True),
    "sizes": (13, ["", "", "sizes"], {"mode": "linear"}, True),
    "both-given": (11, ["", "empty", "sizes"], {"mode": "linear"}, True),
    "axes": (18, ["", "two"], {"axes": [2, 3]}, True),
    "all-axes": (18, ["", "scales"], {"axes": [0, 1, 2, 3]}, True),
    "opset-10": (10, ["scales"], {"mode": "linear"}, True),
    "upsample-9": (9, ["scales"], {"mode": "linear"}, True),
    "channels": (13, ["", "more"], {"mode": "linear"}, False),
    "channels-kept-in-number": (13, ["", "slightly"], {"mode": "linear"}, False),
    "channels-9": (9, ["more"], {"mode": "linear"}, False),
    "channels-by-axes": (18, ["", "two"], {"axes": [1, 2]}, False),
    "channels-from-behind": (18, ["", "two"], {"axes": [-3, -2]}, False),
    "ratio": (18, ["", "", "sizes"], {"keep_aspect_ratio_policy": "not_larger"}, False),
    "crop": (13, ["roi", "scales"], {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}, False),
}


@pytest.mark.parametrize("name", RESIZES)
def test_interpolation_hands_a_map_of_the_channels_on(name: str) -> None:
    opset, inputs, attributes, folds = RESIZES[name]
    numbers = {
        "scales": np.array([1, 1, 2, 1.5], np.float32),
        "more": np.array([1, 2, 2, 1], np.float32),
        "slightly": np.array([1, 1.1, 2, 1], np.float32),
        "two": np.array([2, 1.5], np.float32),
        "empty": np.array([], np.float32),
        "sizes": np.array([2, 4, 9, 5], np.int64),
        "roi": np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32),
    }
    used = {key: value for key, value in numbers.items() if key in inputs}
    if opset == 11 and "" in inputs[:1]:
        used["none"] = np.array([], np.float32)
        inputs = ["none", *inputs[1:]]
    resize = node("Upsample" if opset < 10 else "Resize", ["c", *inputs], ["r"], **attributes)
    proto = model(
        [conv(), resize, batch_norm("r")], x=(2, 4, 8, 8), constants={**constants(), **used}, dtype=DOUBLE, opset=opset
    )
    graph = OnnxGraph(ModelFile.from_proto(proto))
    outcome = pipeline.run(graph, [FOLD])
    assert [remark.code for remark in (*outcome.applied, *outcome.missed)] == (["applied"] if folds else ["no-linear"])
    if folds and opset >= 11:  # the evaluator knows no older one
        result = graph.to_model().to_proto()
        x = {"x": np.random.default_rng(3).standard_normal((2, 4, 8, 8))}
        (found,), (wanted,) = (evaluator(one).run(None, x) for one in (result, proto))
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_interpolation_between_channels_of_a_number() -> None:
    scales = {"scales": np.array([1, 1, 2, 2], np.float32), "f": np.array(3.0)}
    nodes = [conv(), node("Resize", ["c", "", "scales"], ["r"]), node("Mul", ["r", "f"])]
    proto = model(nodes, constants={**constants(), **scales}, dtype=DOUBLE)
    assert op_types(applied(proto, FoldAffine()).graph) == ["Conv", "Resize"]
