"""eliminate-duplicate-constants: equal bit for bit is one; what a caller may replace or sees by name stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from fuser.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from fuser.passes.eliminate_duplicate_constants import EliminateDuplicateConstants
from onnx import helper, numpy_helper
from onnx_models import body, conv, model, node, op_types
from rewriting import applied, refused, rewritten

from fuser import files, pipeline
from fuser.graphs.onnx.graph import OnnxGraph

ELIMINATE = EliminateDuplicateConstants()


def two(a: np.ndarray, b: np.ndarray) -> onnx.ModelProto:
    return model([node("Add", ["x", "a"], ["t"]), node("Mul", ["t", "b"])], constants={"a": a, "b": b})


def names(proto: onnx.ModelProto) -> list[str]:
    return [tensor.name for tensor in proto.graph.initializer]


def test_equal_constants_become_one() -> None:
    k = np.arange(8, dtype=np.float32)
    result = applied(two(k, k), ELIMINATE, bound=0)
    assert names(result) == ["a"]
    assert [list(n.input) for n in result.graph.node] == [["x", "a"], ["t", "a"]]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros(8, np.float32), -np.zeros(8, np.float32)),
        (np.float32([np.nan] * 8), np.float32([np.nan] * 8).view(np.uint32).__xor__(1).view(np.float32)),
        (np.ones(8, np.float32), np.ones((1, 8), np.float32)),
        (np.ones(8, np.float32), np.float32([1, 1, 1, 1, 1, 1, 1, 2])),
    ],
    ids=["minus-zero", "another-nan", "shape", "last-element"],
)
def test_what_differs_in_a_bit_or_in_shape_is_no_candidate(a: np.ndarray, b: np.ndarray) -> None:
    assert refused(two(a, b), ELIMINATE) == {}


def test_another_type_is_no_candidate() -> None:
    nodes = [node("Cast", ["a"], ["f"], to=1), node("Add", ["x", "f"], ["t"]), node("Mul", ["t", "b"])]
    zeros = {"a": np.zeros(8, np.int32), "b": np.zeros(8, np.float32)}
    assert refused(model(nodes, constants=zeros), ELIMINATE) == {}


def test_equal_nans_are_one() -> None:
    k = np.float32([np.nan] * 8)
    assert names(rewritten(two(k, k), ELIMINATE)[1]) == ["a"]


def test_values_that_are_stored_in_different_fields() -> None:
    proto = two(np.ones(8, np.float32), np.ones(8, np.float32))
    proto.graph.initializer[1].CopyFrom(helper.make_tensor("b", onnx.TensorProto.FLOAT, [8], [1.0] * 8))
    assert names(applied(proto, ELIMINATE, bound=0)) == ["a"]


def test_what_the_caller_may_replace_is_no_candidate() -> None:
    k = np.ones(8, np.float32)
    nodes = [node("Add", ["x", "a"], ["t"]), node("Mul", ["t", "b"])]
    for overridable in (["a"], ["b"]):
        assert refused(model(nodes, constants={"a": k, "b": k}, also_inputs=overridable), ELIMINATE) == {}
    frozen = applied(model(nodes, constants={"a": k, "b": k}, also_inputs=["b"]), ELIMINATE, freeze_inputs=True)
    assert names(frozen) == ["a"] and [value.name for value in frozen.graph.input] == ["x"]


def test_an_output_keeps_its_constant() -> None:
    k = np.ones(8, np.float32)
    nodes = [node("Add", ["x", "a"]), node("Add", ["x", "b"], ["z"])]
    proto = model(nodes, constants={"a": k, "b": k}, outputs=["y", "b"])
    result = applied(proto, ELIMINATE, bound=0)
    assert names(result) == ["b"]
    assert [list(n.input) for n in result.graph.node] == [["x", "b"], ["x", "b"]]


def test_both_public() -> None:
    k = np.ones(8, np.float32)
    nodes = [node("Add", ["x", "a"])]
    assert refused(model(nodes, constants={"a": k, "b": k}, outputs=["y", "a", "b"]), ELIMINATE) == {"both-public": 1}


def test_a_body_reads_the_initializer_outside_but_not_that_of_its_sibling() -> None:
    k, j = np.ones(8, np.float32), np.full(8, 2, np.float32)
    branches = {
        "then_branch": body([node("Add", ["t", "k1"], ["p"])], ["p"], {"k1": k}),
        "else_branch": body([node("Sub", ["t", "k2"], ["q"])], ["q"], {"k2": j}),
    }
    nodes = [
        node("Add", ["x", "k"], ["t"]),
        node("ReduceSum", ["t"], ["s"], keepdims=0),
        node("Cast", ["s"], ["c"], to=9),
        node("If", ["c"], **branches),
    ]
    result = applied(model(nodes, constants={"k": k}), ELIMINATE, bound=0)
    other, then = (attribute.g for attribute in result.graph.node[-1].attribute)  # by name
    assert names(result) == ["k"] and len(then.initializer) == 0 and list(then.node[0].input) == ["t", "k"]
    assert len(other.initializer) == 1
    branches["else_branch"] = body([node("Sub", ["t", "k2"], ["q"])], ["q"], {"k2": k})
    nodes = [node("Neg", ["x"], ["t"]), *nodes[1:-1], node("If", ["c"], **branches)]
    assert refused(model(nodes), ELIMINATE) == {}


def test_a_constant_node_yields_to_an_initializer_and_to_an_earlier_node() -> None:
    value = numpy_helper.from_array(np.ones(8, np.float32))
    nodes = [
        node("Constant", [], ["a"], value=value),
        node("Add", ["x", "a"], ["t"]),
        node("Constant", [], ["b"], value=value),
        node("Mul", ["t", "b"]),
    ]
    result = applied(model(nodes), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Constant", "Add", "Mul"]
    nodes[3] = node("Mul", ["t", "c"])
    result = applied(model([*nodes[:2], nodes[3]], constants={"c": np.ones(8, np.float32)}), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Add", "Mul"] and names(result) == ["c"]


def test_large_weights_are_compared_to_the_end(tmp_path: Path) -> None:
    """The first pieces are equal; the model stays on disk."""
    a = np.zeros((64, 4, 33, 33), np.float32)
    b, c = a.copy(), a.copy()
    b[-1, -1, -1, -1] = 1
    weights = {"a": a, "b": b, "c": c}
    nodes = [conv("x", f"y{name}", name, pads=[16] * 4) for name in weights]
    proto = model(nodes, constants=weights, outputs=["ya", "yb", "yc"])
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    graph = OnnxGraph(files.load(tmp_path / "m.onnx"))
    assert len(pipeline.run(graph, [ELIMINATE]).applied) == 1
    assert names(graph.to_model().proto) == ["a", "b"]


def test_then_operators_become_common() -> None:
    w = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32)
    nodes = [conv("x", "p", "w1"), conv("x", "q", "w2"), node("Add", ["p", "q"])]
    proto = model(nodes, constants={"w1": w, "w2": w})
    result = applied(proto, EliminateCommonSubexpressions(), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Conv", "Add"]
