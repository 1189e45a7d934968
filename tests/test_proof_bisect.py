"""The first tensor in which two models differ."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, numpy_helper

from fuser.errors import InputError, VerificationError
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
    assert found.problem.startswith("the largest error is 0.0") and (found.position, found.total) == (3, 6)
    assert str(found) == f"'r' (MatMul 'node_r', node 3 of 6): {found.problem}, for {found.inputs}"


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


RELU6 = """g (float[2,4] x) => (float[2,4] y) {{
    low = Constant <value_float = 0.0> ()  high = Constant <value_float = {high}> ()  y = Clip (x, low, high) }}"""


def test_a_difference_that_only_large_inputs_show() -> None:
    before, after = chain(RELU6.format(high="6.0")), chain(RELU6.format(high="7.0"))
    found = first_difference(before, after)
    assert found is not None and (found.tensor, found.op_type) == ("y", "Clip")
    assert found.inputs.startswith("large") and found.last_good == ["x", "low", "high"]


def test_one_small_channel_of_many_is_seen() -> None:
    scale = np.ones((1, 64), np.float32)
    scale[0, 5] = 1e-6
    text = "g (float[100,64] x) => (float[100,64] y) { p = Neg (x)  y = Mul (p, d) }"
    wrong = scale.copy()
    wrong[0, 5] *= 2
    assert first_difference(chain(text, d=scale), chain(text, d=scale)) is None
    found = first_difference(chain(text, d=scale), chain(text, d=wrong))
    assert found is not None and found.tensor == "y" and found.last_good == ["p"]


def test_not_a_number_is_not_infinity() -> None:
    text = "g (float[2,4] x) => (float[2,4] y, float[2,4] z) { p = Abs (x)  y = Mul (p, d)  z = Add (x, x) }"
    found = first_difference(chain(text, d=np.float32(np.inf)), chain(text, d=np.float32(np.nan)))
    assert found is not None and found.tensor == "y" and "nan at [0, 0]" in found.problem


def test_constants_that_are_folded_are_not_to_blame() -> None:
    text = """g (float[2,4] x) => (float[2,4] y) {
        one = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()  two = Add (one, one)
        p = Mul (x, two)  y = Mul (p, two) }"""
    folded = "g (float[2,4] x) => (float[2,4] y) { y = Mul (x, d) }"
    d = np.array([4, 16, 36, 64], np.float32)
    assert first_difference(chain(text), chain(folded, d=d)) is None
    found = first_difference(chain(text), chain(folded, d=d[::-1].copy()))
    assert found is not None and found.tensor == "p" and found.last_good == ["x", "two"]


def test_a_difference_of_the_runs_alone_is_no_tensor() -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { y = Identity (x) }"
    narrow = "g (float[2,4] x) => (float16[2,4] y) { y = Cast <to = 10> (x) }"
    with pytest.raises(VerificationError, match=r"no tensor of theirs does in float64: .* type is float16"):
        first_difference(chain(text), chain(narrow))


def test_an_output_that_is_a_constant() -> None:
    text = "g (float[2,4] x) => (float[2,4] y, float[4,4] a) { y = Neg (x) }"
    assert first_difference(chain(text), chain(text)) is None
    with pytest.raises(VerificationError, match="output 'a'"):
        first_difference(chain(text), chain(text, a=-WEIGHTS["a"]))
    made = chain("g (float[2,4] x) => (float[2,4] y, float[4,4] e) { y = Neg (x)  e = Neg (a) }")
    folded = chain("g (float[2,4] x) => (float[2,4] y, float[4,4] e) { y = Neg (x) }", e=-WEIGHTS["a"])
    assert first_difference(made, folded) is None
    folded.graph.initializer[-1].CopyFrom(numpy_helper.from_array(WEIGHTS["a"], "e"))
    found = first_difference(made, folded)
    assert found is not None and found.tensor == "e"


def test_models_that_cannot_be_compared_say_why() -> None:
    more = chain(PLAIN.replace("(float[2,4] y)", "(float[2,4] y, float[2,4] s)"))
    with pytest.raises(InputError, match="2 outputs instead of 1"):
        first_difference(chain(PLAIN), more)
    custom = chain(PLAIN)
    custom.graph.node[0].domain = "custom"
    custom.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    with pytest.raises(InputError, match="custom"):
        first_difference(custom, custom)
