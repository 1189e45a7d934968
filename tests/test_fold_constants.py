"""fold-constants: what is known before run time is computed once, unless the model would grow by it."""

from __future__ import annotations

import numpy as np
import onnx
from fuser.passes.fold_constants import FoldConstants
from onnx_models import conv, conv_constants, model, node, op_types
from rewriting import applied, refused, rewritten

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


def test_what_depends_on_the_input_stays() -> None:
    assert refused(model([node("Shape", ["x"], ["s"]), node("Expand", ["x", "s"])]), FOLD) == {}


def test_grows() -> None:
    nodes = [node("Expand", ["zero", "shape"], ["b"]), node("Add", ["x", "b"])]
    tensors = {"zero": np.zeros(1, np.float32), "shape": np.array([4, 200, 200])}
    proto = model(nodes, constants=tensors, x=("N", 4, 200, 200))
    assert refused(proto, FOLD) == {"grows": 1}
    assert op_types(applied(proto, FoldConstants(max_growth=10**6), bound=0).graph) == ["Add"]


def test_a_large_constant_made_of_a_large_constant_is_no_growth() -> None:
    nodes = [node("Neg", ["k"], ["n"]), node("Add", ["x", "n"])]
    proto = model(nodes, constants={"k": np.ones((4, 200, 200), np.float32)}, x=("N", 4, 200, 200))
    outcome, result = rewritten(proto, FOLD)
    assert len(outcome.applied) == 1
    (constant,) = result.graph.initializer
    assert (onnx.numpy_helper.to_array(constant) == -1).all()
