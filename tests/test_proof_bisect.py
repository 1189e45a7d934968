"""The first tensor in which two models differ."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, numpy_helper

from fuser.errors import InputError
from fuser.proof.bisect import first_difference

RNG = np.random.default_rng(2)
WEIGHTS = {name: RNG.standard_normal((4, 4)).astype(np.float32) for name in "abc"}


def chain(text: str, **changed: np.ndarray) -> ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    weights = {**WEIGHTS, **changed}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    return model


PLAIN = """g (float[2,4] x) => (float[2,4] y) {
    p = MatMul (x, a)  q = Relu (p)  r = MatMul (q, b)  s = Add (r, p)  t = MatMul (s, c)  y = Tanh (t) }"""


def test_equivalent_models_have_no_difference() -> None:
    assert first_difference(chain(PLAIN), chain(PLAIN)) is None


def test_the_node_with_the_wrong_constant_is_named() -> None:
    found = first_difference(chain(PLAIN), chain(PLAIN, b=WEIGHTS["b"] * np.float32(1.01)))
    assert found is not None
    assert (found.tensor, found.node, found.op_type, found.last_good) == ("r", "node_r", "MatMul", ["q"])
    assert found.error == pytest.approx(0.0099, rel=0.02) and (found.position, found.total) == (3, 6)
    assert str(found) == "'r' (MatMul 'node_r', node 3 of 6), off by 0.0099 of its scale"


FOLDED = """g (float[2,4] x) => (float[2,4] y) {{
    p = MatMul (x, a)  q = Relu (p)  r = MatMul (q, b)  s = Add (r, p)  t = MatMul (s, {weight})  y = Tanh (t) }}"""
SCALED = """g (float[2,4] x) => (float[2,4] y) {
    p = MatMul (x, a)  q = Relu (p)  r = MatMul (q, b)  s = Add (r, p)
    u = MatMul (s, c)  t = Mul (u, d)  y = Tanh (t) }"""


def test_a_fold_moves_values_to_other_names_and_is_looked_through() -> None:
    factor = RNG.uniform(0.5, 2, 4).astype(np.float32)
    before = chain(SCALED, d=factor)
    right = chain(FOLDED.format(weight="e"), e=WEIGHTS["c"] * factor)
    assert first_difference(before, right) is None
    wrong = chain(FOLDED.format(weight="e"), e=WEIGHTS["c"] * factor[::-1].copy())
    found = first_difference(before, wrong)
    assert found is not None and found.tensor == "u" and found.last_good == ["s"]
    both = chain(FOLDED.format(weight="e"), e=WEIGHTS["c"] * factor, a=WEIGHTS["a"] + np.float32(0.01))
    found = first_difference(before, both)
    assert found is not None and found.tensor == "p"


def test_the_earliest_of_two_is_named() -> None:
    wrong = chain(PLAIN, a=-WEIGHTS["a"], c=-WEIGHTS["c"])
    found = first_difference(chain(PLAIN), wrong)
    assert found is not None and found.tensor == "p" and found.last_good == ["x"]


def test_another_kind_of_node() -> None:
    found = first_difference(chain(PLAIN), chain(PLAIN.replace("Relu", "Abs")))
    assert found is not None and found.op_type == "Relu"


def test_models_that_cannot_be_compared_say_why() -> None:
    more = chain(PLAIN.replace("(float[2,4] y)", "(float[2,4] y, float[2,4] s)"))
    with pytest.raises(InputError, match="2 outputs instead of 1"):
        first_difference(chain(PLAIN), more)
    custom = chain(PLAIN)
    custom.graph.node[0].domain = "custom"
    custom.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    with pytest.raises(InputError, match="custom"):
        first_difference(custom, custom)
