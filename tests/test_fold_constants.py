"""fold-constants: what is known before run time is computed once, unless the model would grow by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from fuser.passes.fold_constants import FoldConstants
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_models import conv, conv_constants, model, node, op_types
from rewriting import applied, refused, rewritten

import fuser

FOLD = FoldConstants()


def test_weight_standardization() -> None:
    nodes = [
        node("ReduceMean", ["w"], ["m"], axes=[1, 2, 3]),
        node("Sub", ["w", "m"], ["d"]),
        node("Mul", ["d", "d"], ["q"]),
        node("ReduceMean", ["q"], ["v"], axes=[1, 2, 3]),
        node("Sqrt", ["v"], ["s"]),
        node("Div", ["d", "s"], ["u"]),
        conv("x", "y", "u"),
    ]
    # The runtime that will run the model computes a mean; the reference evaluator sums in another order.
    result = applied(model(nodes, constants={"w": conv_constants()["w"]}), FOLD, bound=1e-6)
    assert op_types(result.graph) == ["Conv"]
    assert len(result.graph.initializer) == 1


def test_the_bias_that_torch_writes() -> None:
    nodes = [
        node("CastLike", ["zero", "x"], ["z"]),
        node("Expand", ["z", "shape"], ["b"]),
        conv("x", "y", "w", "b"),
    ]
    tensors = {"w": conv_constants()["w"], "zero": np.array(0, np.int64), "shape": np.array([4])}
    assert op_types(applied(model(nodes, constants=tensors), FOLD, bound=0).graph) == ["Conv"]


@pytest.mark.parametrize(
    ("values", "to"),
    [
        (np.array([1 + 2**-11 + 2**-40, 65519.999999]), onnx.TensorProto.FLOAT16),  # by way of float32
        (np.array([2.0**24 + 1, 0.1], np.float32), onnx.TensorProto.STRING),
        (np.array([True, False]), onnx.TensorProto.STRING),
        (np.array([0.1, 3.0]), onnx.TensorProto.FLOAT),
        (np.array([-1, 300]), onnx.TensorProto.UINT8),
    ],
)
def test_a_cast_that_loses_something_is_computed_as_the_runtime_does(values: Any, to: int) -> None:
    back = onnx.TensorProto.STRING if to == onnx.TensorProto.STRING else onnx.TensorProto.DOUBLE
    casts = [node("Cast", ["a"], ["b"], to=to), node("Cast", ["b"], ["c"], to=back)]
    x, y = (onnx.helper.make_tensor_value_info(name, back, [size]) for name, size in (("x", 1), ("y", 3)))
    tensors = [onnx.numpy_helper.from_array(values, "a")]
    graph = onnx.helper.make_graph([*casts, node("Concat", ["c", "x"], axis=0)], "g", [x], [y], tensors)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    result = fuser.optimize(proto, verify=False, passes=["fold-constants"])
    assert op_types(result.model.graph) == ["Concat"]
    feeds = {"x": np.array(["" if back == onnx.TensorProto.STRING else 0.0], object if to == back else None)}
    before, after = (ort.InferenceSession(one.SerializeToString()).run(None, feeds)[0] for one in (proto, result.model))
    assert before.dtype == after.dtype and before.tolist() == after.tolist()


def test_the_nonzero_of_a_scalar_stays() -> None:
    """Of which runtimes make different shapes."""
    nodes = [
        node("NonZero", ["a"], ["h"]),
        node("Cast", ["h"], ["c"], to=onnx.TensorProto.FLOAT),
        node("Add", ["x", "c"]),
    ]
    assert refused(model(nodes, constants={"a": np.array(3.0, np.float32)}, x=(1, 1)), FOLD) == {}


def test_what_depends_on_the_input_stays() -> None:
    assert refused(model([node("Shape", ["x"], ["s"]), node("Expand", ["x", "s"])]), FOLD) == {}


def test_grows() -> None:
    nodes = [node("Expand", ["zero", "shape"], ["b"]), node("Add", ["x", "b"])]
    tensors = {"zero": np.zeros(1, np.float32), "shape": np.array([4, 200, 200])}
    proto = model(nodes, constants=tensors, x=("N", 4, 200, 200))
    assert refused(proto, FOLD) == {"grows": 1}
    story = fuser.explain(proto, passes=["fold-constants"])
    assert [remark.remedy for remark in story.missed] == ["--max-growth=159996 allows that"]
    assert len(fuser.explain(proto, passes=["fold-constants"], max_growth=159_996).applied) == 1
    assert len(fuser.explain(proto, passes=["fold-constants"], max_growth=159_995).applied) == 0
    assert op_types(applied(proto, FoldConstants(max_growth=10**6), bound=0).graph) == ["Add"]


def test_what_is_small_beside_the_model_is_folded() -> None:
    """A 32nd of the parameters, unless a number was asked for."""
    nodes = [node("Expand", ["zero", "shape"], ["b"]), node("Add", ["x", "b"], ["s"]), node("Add", ["s", "weight"])]
    tensors = {"zero": np.zeros(1, np.float32), "shape": np.array([4, 200, 200])}
    for rows, size in ((32, 0), (31, 1)):
        weight = np.ones((rows, 4, 200, 200), np.float32)
        proto = model(nodes, constants={**tensors, "weight": weight}, x=(rows, 4, 200, 200))
        outcome, result = rewritten(proto, FOLD)
        assert (len(outcome.applied), len(outcome.missed)) == (1 - size, size)
        assert op_types(result.graph) == ["Expand", "Add", "Add"][1 - size :]
        assert not fuser.explain(proto, passes=["fold-constants"], max_growth=65_536).applied


def test_small_values_behind_a_constant_that_stays_are_folded() -> None:
    nodes = [
        node("Neg", ["two"], ["half"]),
        node("Range", ["zero", "end", "one"], ["many"]),
        node("Add", ["half", "one"], ["rest"]),
        node("Expand", ["rest", "shape"], ["b"]),
        node("Add", ["b", "many"], ["c"]),
        node("Add", ["x", "c"]),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "end": 160_000}
    tensors = {name: np.float32(value) for name, value in numbers.items()} | {"shape": np.array([4, 160_000])}
    outcome, result = rewritten(model(nodes, constants=tensors, x=("N", 4, 160_000)), FOLD)
    assert [remark.site for remark in outcome.applied] == ["add_rest"]
    assert [remark.code for remark in outcome.missed] == ["grows"]
    assert op_types(result.graph) == ["Range", "Expand", "Add", "Add"]

    class Large(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rest = torch.ones(()) * -2 + 1
            return x + rest.expand(4, 160_000) * torch.ones(160_000)

    program = torch.export.export(Large().eval(), (torch.zeros(1, 4, 160_000),))
    report = fuser.optimize(program, passes=["fold-constants"], verify=False).report
    assert [remark.code for remark in report.missed] == ["grows"] and report.applied
    again = fuser.optimize(fuser.optimize(program, verify=False).model, verify=False)
    assert not again.report.applied


def test_a_large_constant_made_of_a_large_constant_is_no_growth() -> None:
    nodes = [node("Neg", ["k"], ["n"]), node("Add", ["x", "n"])]
    proto = model(nodes, constants={"k": np.ones((4, 200, 200), np.float32)}, x=("N", 4, 200, 200))
    outcome, result = rewritten(proto, FOLD)
    assert len(outcome.applied) == 1
    (constant,) = result.graph.initializer
    assert (onnx.numpy_helper.to_array(constant) == -1).all()


def test_a_constant_node_becomes_an_initializer() -> None:
    nodes = [node("Constant", [], ["k"], value_floats=[1.0, 2.0]), node("Constant", [], ["z"], value_float=3.0)]
    result = applied(model([*nodes, node("Mul", ["x", "k"])], outputs=["y", "z"], x=("N", 4, 8, 2)), FOLD, bound=0)
    assert op_types(result.graph) == ["Constant", "Mul"]  # an output keeps its node
    assert onnx.numpy_helper.to_array(result.graph.initializer[0]).tolist() == [1, 2]


def test_a_function_cannot_hold_initializers() -> None:
    one = onnx.numpy_helper.from_array(np.float32([1]))
    add = onnx.helper.make_function(
        "custom",
        "PlusOne",
        ["a"],
        ["b"],
        [node("Constant", [], ["one"], value=one), node("Add", ["a", "one"], ["b"])],
        [onnx.helper.make_opsetid("", 17)],
    )
    call = node("PlusOne", ["x"])
    call.domain = "custom"
    assert refused(model([call], functions=[add]), FOLD) == {}


# -- sizes

FLATTEN = [
    node("Shape", ["x"], ["s"]),
    node("Gather", ["s", "zero"], ["n"]),
    node("Gather", ["s", "one"], ["c"]),
    node("Unsqueeze", ["n", "axes"], ["n1"]),
    node("Unsqueeze", ["c", "axes"], ["c1"]),
]
INDICES = {"zero": np.array(0), "one": np.array(1), "axes": np.array([0]), "k": np.array([64])}


def test_a_target_that_is_known_but_for_the_batch() -> None:
    nodes = [*FLATTEN, node("Concat", ["n1", "c1", "k"], ["t"], axis=0), node("Reshape", ["x", "t"])]
    result = applied(model(nodes, constants=INDICES), FOLD, bound=0)
    assert op_types(result.graph) == ["Reshape"]
    (target,) = result.graph.initializer
    assert onnx.numpy_helper.to_array(target).tolist() == [-1, 4, 64]


@pytest.mark.parametrize(
    ("target", "reader", "x"),
    [
        (["n1", "c1", "k"], node("Expand", ["w", "t"]), ("N", 4, 8, 8)),
        (["n1", "c1", "all"], node("Reshape", ["x", "t"], allowzero=1), ("N", "C", 8, 8)),
        (["n1", "c1", "n1"], node("Reshape", ["x", "t"]), ("N", 4, 8, 8)),
        (["c1", "n1", "k"], node("Reshape", ["x", "t"]), ("N", "C", 8, 8)),
        (["c1", "n1", "all"], node("Reshape", ["x", "t"]), ("N", 4, 8, 8)),
        (["copied", "n1", "k"], node("Reshape", ["x", "t"]), ("N", 4, 8, 8)),
        (["runtime", "c1", "k"], node("Reshape", ["x", "t"]), ("N", 4, 8, 8)),
    ],
    ids=["expand", "zeros-are-zeros", "twice", "two-unknown", "minus-one", "copies-a-size", "not-a-size"],
)
def test_a_target_that_says_more_stays(target: list[str], reader: onnx.NodeProto, x: tuple[int | str, ...]) -> None:
    nodes = [
        *FLATTEN,
        node("Cast", ["x"], ["ints"], to=7),
        node("ReduceMax", ["ints"], ["max"], keepdims=0),
        node("Unsqueeze", ["max", "axes"], ["runtime"]),
        node("Concat", target, ["t"], axis=0),
        reader,
        node("Concat", ["runtime", "n1"], ["z"], axis=0),
    ]
    constants = {**INDICES, "w": np.ones((1, 1, 64), np.float32), "all": np.array([-1]), "copied": np.array([0])}
    proto = model(nodes, constants=constants, x=x)
    del proto.graph.node[-1]
    _, result = rewritten(proto, FOLD)
    assert "t" in [name for one in result.graph.node for name in one.output]


@pytest.mark.parametrize("size", [0, 3])
def test_a_target_without_zeros_where_zeros_are_zeros(size: int) -> None:
    nodes = [*FLATTEN, node("Concat", ["n1", "k"], ["t"], axis=0), node("Reshape", ["x", "t"], allowzero=1)]
    proto = model(nodes, constants={**INDICES, "k": np.array([256])}, x=("N", 4, 8, 8))
    _, result = rewritten(proto, FOLD)
    assert "Concat" not in op_types(result.graph)
    x = np.zeros((size, 4, 8, 8), np.float32)
    shapes = [ReferenceEvaluator(one).run(None, {"x": x})[0].shape for one in (proto, result)]
    assert shapes == [(size, 256)] * 2


def test_sizes_that_the_data_has_at_the_same_place_are_copied() -> None:
    """[N, C, -1], of data whose first two axes are N and C."""
    nodes = [*FLATTEN, node("Concat", ["n1", "c1", "k"], ["t"], axis=0), node("Reshape", ["x", "t"])]
    proto = model(nodes, constants={**INDICES, "k": np.array([-1])}, x=("N", "C", 8, 8))
    result = applied(proto, FOLD, bound=0)
    assert op_types(result.graph) == ["Reshape"]
    assert onnx.numpy_helper.to_array(result.graph.initializer[0]).tolist() == [0, 0, -1]


def test_readers_that_would_need_other_targets_keep_theirs() -> None:
    nodes = [
        *FLATTEN,
        node("Concat", ["n1", "c1", "all"], ["t"], axis=0),
        node("Transpose", ["x"], ["u"], perm=[1, 0, 2, 3]),
        node("Reshape", ["x", "t"]),
        node("Reshape", ["u", "t"], ["z"]),
    ]
    proto = model(nodes, constants={**INDICES, "all": np.array([-1])}, x=("N", "C", 8, 8), outputs=["y", "z"])
    _, result = rewritten(proto, FOLD)
    assert "Concat" in op_types(result.graph)


def test_a_target_that_is_an_output_stays() -> None:
    nodes = [*FLATTEN, node("Concat", ["n1", "c1", "k"], ["t"], axis=0), node("Reshape", ["x", "t"])]
    _, result = rewritten(model(nodes, constants=INDICES, outputs=["y", "t"]), FOLD)
    assert "Concat" in op_types(result.graph)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("Gather"), st.integers(-3, 3)),
        st.tuples(st.just("Slice"), st.integers(-4, 4), st.integers(-4, 5), st.integers(1, 2)),
        st.tuples(st.sampled_from(["Add", "Sub", "Mul", "Div"]), st.integers(-2, 4), st.booleans()),
        st.tuples(st.just("Concat"), st.integers(-1, 3)),
        st.tuples(st.just("Equal"), st.integers(-1, 4)),
        st.tuples(st.sampled_from(["Unsqueeze", "Squeeze", "Identity", "Cast"])),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_what_is_known_of_sizes_is_what_they_are(steps: list[tuple[Any, ...]]) -> None:
    """Whatever is folded gives what the graph gives, for every batch."""
    nodes, constants, last = [node("Shape", ["x"], ["v0"])], {"axis": np.array([0])}, "v0"
    for i, (op, *rest) in enumerate(steps):
        name, k = f"v{i + 1}", f"k{i}"
        constants[k] = np.array(rest[0] if rest else 0)
        if op == "Slice":
            constants.update({k: np.array([rest[0]]), f"e{i}": np.array([rest[1]]), f"s{i}": np.array([rest[2]])})
            nodes.append(node("Slice", [last, k, f"e{i}", "axis", f"s{i}"], [name]))
        elif op == "Concat":
            constants[k] = constants[k].reshape(1)
            nodes.append(node("Concat", [last, k], [name], axis=0))
        elif op == "Equal":
            nodes += [node("Equal", [last, k], [f"q{i}"]), node("Where", [f"q{i}", k, last], [name])]
        elif op in ("Unsqueeze", "Squeeze"):
            nodes.append(node(op, [last, "axis"], [name]))
        elif op in ("Identity", "Cast"):
            nodes.append(node(op, [last], [name], **({"to": 7} if op == "Cast" else {})))
        elif op == "Gather":
            nodes.append(node("Gather", [last, k], [name]))
        else:
            nodes.append(node(op, [k, last] if rest[1] else [last, k], [name]))
        last = name
    nodes.append(node("Cast", [last], ["y"], to=1))
    try:
        proto = model(nodes, constants=constants, x=("N", 4, "H"))
        truths = {n: ReferenceEvaluator(proto).run(None, {"x": np.zeros((n, 4, 3), np.float32)})[0] for n in (0, 1, 3)}
    except Exception:
        assume(False)  # not a legal graph
    _, result = rewritten(proto, FOLD)
    for n, truth in truths.items():
        found = ReferenceEvaluator(result).run(None, {"x": np.zeros((n, 4, 3), np.float32)})[0]
        np.testing.assert_array_equal(found, truth)  # type: ignore[arg-type]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17])
def test_what_an_exporter_makes_of_a_shape(opset: int) -> None:
    """Axes are an attribute before opset 13, which the reference evaluator does not know of all operators."""
    axes = {"axes": [0]} if opset < 13 else {}
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "front"][: 1 if axes else 2], ["m"], **axes),
        node("Concat", ["m", "rest"], ["t"], axis=0),
        node("Reshape", ["x", "t"]),
    ]
    tensors = {"zero": np.array(0), "rest": np.array([-1, 3]), "front": np.array([0])}
    if axes:
        del tensors["front"]
    result = applied(model(nodes, x=(2, 4, 3), constants=tensors, opset=opset), FOLD, bound=0)
    assert op_types(result.graph) == ["Reshape"]


def test_sizes_that_inference_only_names() -> None:
    """A roll by what is computed of the size: where the bounds of a Slice are no constants, it names the sizes."""
    nodes = []
    for source, target in (("x", "a"), ("a", "b"), ("b", "y")):
        nodes += [
            node("Shape", [source], [f"{target}_n"], start=1, end=2),
            node("Mod", ["shift", f"{target}_n"], [f"{target}_k"]),
            node("Slice", [source, f"{target}_k", f"{target}_n", "one"], [f"{target}_back"]),
            node("Slice", [source, "zero", f"{target}_k", "one"], [f"{target}_front"]),
            node("Concat", [f"{target}_back", f"{target}_front"], [target], axis=1),
        ]
    tensors = {"shift": np.array([-3]), "zero": np.array([0]), "one": np.array([1])}
    result = applied(model(nodes, x=(2, 7, 3), constants=tensors), FOLD, bound=0)
    assert op_types(result.graph) == ["Slice", "Slice", "Concat"] * 3


def test_what_is_behind_a_target_that_became_known() -> None:
    """Positions are added whose number inference does not know, so heads are split and joined by sizes of run time."""
    sizes = {"zero": 0, "one": 1}
    constants = {name: np.array(value) for name, value in sizes.items()}
    constants |= {f"{name}s": np.array([value]) for name, value in {**sizes, "two": 2, "four": 4, "eight": 8}.items()}
    nodes = [
        node("Shape", ["x"], ["xs"]),
        node("Gather", ["xs", "one"], ["length"], axis=0),
        node("Range", ["zero", "length", "one"], ["steps"]),
        node("Cast", ["steps"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["floats", "ones"], ["positions"]),
        node("Add", ["x", "positions"], ["a"]),
        node("Shape", ["a"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Gather", ["s", "one"], ["m"], axis=0),
        node("Div", ["m", "one"], ["l"]),
        node("Unsqueeze", ["n", "zeros"], ["batch"]),
        node("Unsqueeze", ["l", "zeros"], ["tokens"]),
        node("Concat", ["batch", "tokens", "twos", "fours"], ["split"], axis=0),
        node("MatMul", ["a", "w"], ["q"]),
        node("Reshape", ["q", "split"], ["heads"]),
        node("Transpose", ["heads"], ["turned"], perm=[0, 2, 1, 3]),
        node("Softmax", ["turned"], ["r"], axis=2),
        node("Transpose", ["r"], ["back"], perm=[0, 2, 1, 3]),
        node("Concat", ["batch", "tokens", "eights"], ["join"], axis=0),
        node("Reshape", ["back", "join"]),
    ]
    proto = model(nodes, constants={**constants, "w": np.eye(8, dtype=np.float32)}, x=("b", "s", 8))
    result = fuser.optimize(proto, verify=False).model
    assert "Concat" not in op_types(result.graph)
    assert not fuser.optimize(result, verify=False).report.applied
    x = np.random.default_rng(3).standard_normal((2, 5, 8)).astype(np.float32)
    before, after = (ReferenceEvaluator(one).run(None, {"x": x})[0] for one in (proto, result))  # type: ignore[index]
    np.testing.assert_array_equal(before, after)
