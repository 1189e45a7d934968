"""`verify` on ONNX models, end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from rich.console import Console

from fuser.errors import InputError
from fuser.isolate import Worker
from fuser.proof import Verification
from fuser.proof import verify as run_verify
from fuser.proof.float64_onnx import evaluate_stored
from fuser.proof.runners import Workers, release, run_onnx
from fuser.proof.sides import Original

RNG = np.random.default_rng(11)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as one:
        yield one


@pytest.fixture
def verify(workers: Workers) -> Any:
    def call(before: Any, after: Any, **options: Any) -> Verification:
        return run_verify(before, after, workers=workers, **options)

    return call


def parse(text: str, opset: int = 17, **constants: np.ndarray) -> ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "custom" : 1]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def linear(factor: float = 1.0, dtype: Any = np.float32) -> ModelProto:
    weight = (np.random.default_rng(0).standard_normal((6, 5)) * factor).astype(dtype)
    return parse("g (float[N,6] x) => (float[N,5] y) { y = MatMul (x, w) }", w=weight)


def test_a_model_is_equivalent_to_itself(verify: Any) -> None:
    result = verify(linear(), linear())
    assert result.passed and result.verdict == "equivalent" and result.truth == "float64" and result.interface == []
    (y,) = result.outputs
    assert (y.name, y.dtype) == ("y", "float32") and 0 < y.max_abs == y.original and y.excess < 1
    assert {label.split()[0] for label in result.sets} >= {"normal", "large", "zeros", "negative"}
    assert any("N=3" in label for label in result.sets)
    assert result.seconds > 0 and result.cost_ratio > 0


def test_a_thousandth_is_a_difference_and_the_report_says_where(verify: Any) -> None:
    result = verify(linear(), linear(1.001))
    assert not result.passed and result.verdict == "different"
    assert "output 'y'" in result.reason and "times what is allowed" in result.reason and "normal" in result.reason
    assert str(result).startswith("different: output 'y'")


def test_models_by_path_and_in_memory_are_not_changed(verify: Any, tmp_path: Path) -> None:
    model = linear()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    content = path.read_bytes()
    assert verify(str(path), model).passed and verify(model, path).passed
    assert path.read_bytes() == content and model == linear() and list(tmp_path.iterdir()) == [path]


def test_the_result_in_json_and_as_a_table(verify: Any) -> None:
    result = verify(linear(), linear())
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["passed"] is True and told["truth"] == "float64" and told["outputs"][0]["name"] == "y"
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.render())
    text = console.export_text()
    assert "excess" in text and "equivalent: the largest error against the float64 truth" in text
    assert "times loading the original and running it" in text


SUM = "g (float[N,40] x) => (float[N] y) {{ {body} }}"


def test_an_exact_contract_asks_for_the_same_bits(verify: Any) -> None:
    once = parse(SUM.format(body="y = ReduceSum <keepdims = 0> (x, a)"), a=np.array([1]))
    again = parse(SUM.format(body="i = Identity (x)  y = ReduceSum <keepdims = 0> (i, a)"), a=np.array([1]))
    assert verify(once, again, contract="exact").truth == "bits"
    assert verify(once, again, contract="exact").passed
    halves = np.zeros((2, 40), np.float32)
    halves[0, ::3] = 1
    halves[1] = 1 - halves[0]
    regrouped = parse(
        SUM.format(body="h = MatMul (x, m)  y = ReduceSum <keepdims = 0> (h, a)"),
        a=np.array([1]),
        m=np.ascontiguousarray(halves.T),
    )
    assert verify(once, regrouped).passed
    result = verify(once, regrouped, contract="exact")
    assert result.verdict == "different" and "not bit-identical" in result.reason


def test_an_exact_rewrite_passes_whatever_kernels_the_runtime_picks_for_constants(verify: Any) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 128)).astype(np.float32)
    text = "g (float[1,196,128] x) => (float[1,196,256] y) {{ {} }}"
    turned = parse(text.format("t = Transpose(w) y = MatMul(x, t)"), w=w)
    plain = parse(text.format("y = MatMul(x, w)"), w=np.ascontiguousarray(w.T))
    result = verify(turned, plain, contract="exact")
    assert result.passed and result.truth == "bits"
    moved = w.T.copy()
    moved[3, 5] = np.nextafter(moved[3, 5], np.float32(np.inf))
    assert not verify(turned, parse(text.format("y = MatMul(x, w)"), w=moved), contract="exact").passed


def test_what_the_runtime_makes_otherwise_is_no_rounding(verify: Any) -> None:
    """By the standard the NonZero of a scalar has the shape [0, N]; who folds it changes what this runtime makes."""
    text = "g (int64[1,1] x) => (int64[M,N] y) {{ {} }}"
    original = parse(text.format("h = NonZero (s)  y = Add (h, x)"), s=np.array(3, np.float32))
    folded = parse(text.format("y = Add (h, x)"), h=np.zeros((0, 1), np.int64))
    result = verify(original, folded, contract="exact")
    assert result.verdict == "different" and len(result.outputs) == 1


def test_operator_by_operator_the_types_are_those_that_are_stored(tmp_path: Path) -> None:
    text = """g (float[1,2,5,5] x) => (float[1,2,4,4] y, float16[2] z) {
        c = Conv(x, w) n = BatchNormalization(c, s, s, s, s) r = Relu(n) y = AveragePool<kernel_shape = [2, 2]>(r)
        z = Cast<to = 10>(s) }"""
    w, s = np.ones((2, 2, 1, 1), np.float32) / 3, np.ones(2, np.float32) / 3
    onnx.save(parse(text, w=w, s=s), tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32)
    (found,) = evaluate_stored(str(tmp_path / "m.onnx"), [{"x": x}])
    assert [array.dtype for array in found] == [np.float32, np.float16]
    expected = run_onnx(str(tmp_path / "m.onnx"), [{"x": x}], False, False).outcomes[0]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_lost_interface_is_incompatible(verify: Any) -> None:
    renamed = linear()
    renamed.graph.output[0].name = renamed.graph.node[0].output[0] = "z"
    result = verify(linear(), renamed)
    assert result.verdict == "incompatible" and result.reason == "output 'y' is missing"
    both = parse("g (float[N,6] x) => (float[N,5] y, float[N,5] z) { y = MatMul (x, w)  z = Neg (y) }")
    result = verify(linear(), both)
    assert result.verdict == "incompatible" and "2 outputs instead of 1" in result.reason


def test_outputs_in_another_order_are_still_compared_by_name(verify: Any) -> None:
    one = parse("g (float[N,6] x) => (float[N,6] y, float[N,6] z) { y = Exp (x)  z = Neg (x) }")
    other = parse("g (float[N,6] x) => (float[N,6] z, float[N,6] y) { y = Exp (x)  z = Neg (x) }")
    result = verify(one, other)
    assert result.verdict == "incompatible" and "another order" in result.reason


def test_an_input_that_is_needed_anew(verify: Any) -> None:
    more = parse("g (float[N,6] x, float[6,5] w) => (float[N,5] y) { y = MatMul (x, w) }")
    result = verify(linear(), more)
    assert result.verdict == "incompatible" and "needs an input 'w'" in result.reason


WITH_DEFAULT = (
    """g (float[N,4] x, float[4] w) => (float[N,4] y) <float[4] w = {1.5, 2.5, 3.5, 4.5}> { y = Mul (x, w) }"""
)


def test_an_input_with_a_default_keeps_its_meaning(verify: Any) -> None:
    """Folding an overridable constant leaves an input behind that no longer does anything."""
    before = parse(WITH_DEFAULT)
    assert verify(before, parse(WITH_DEFAULT)).passed
    folded = parse(WITH_DEFAULT.replace("Mul (x, w)", "Mul (x, v)"), v=np.array([1.5, 2.5, 3.5, 4.5], np.float32))
    result = verify(before, folded)
    assert result.verdict == "different" and "other values for inputs with a default" in result.reason
    assert verify(before, folded, removed_inputs=["w"]).passed
    del folded.graph.input[1], folded.graph.initializer[0]
    assert verify(before, folded, removed_inputs=["w"]).passed
    assert verify(before, folded).verdict == "incompatible"


def test_a_model_that_only_the_original_can_run_is_different(verify: Any) -> None:
    broken = linear()
    broken.graph.node[0].op_type, broken.graph.node[0].domain = "Unknown", "custom"
    result = verify(linear(), broken)
    assert result.verdict == "different" and "the optimized model fails" in result.reason and "Unknown" in result.reason


def test_a_model_that_nothing_can_run_asks_for_no_data(verify: Any) -> None:
    custom = linear()
    custom.graph.node[0].op_type, custom.graph.node[0].domain = "Unknown", "custom"
    result = verify(custom, custom)
    assert result.verdict == "unverifiable" and "ONNX Runtime cannot run the original" in result.reason
    assert "Unknown" in result.reason


def test_what_onnx_runtime_cannot_run_is_judged_in_float64(verify: Any) -> None:
    weight = RNG.standard_normal((6, 5)).astype(ml_dtypes.bfloat16)
    text = "g (bfloat16[N,6] x) => (bfloat16[N,5] y) { a = MatMul (x, w)  y = Cos (a) }"
    wrong = weight.copy()
    wrong[2, 2] *= 1.5
    result = verify(parse(text, w=weight), parse(text, w=weight))
    assert result.passed and result.truth == "float64" and "ONNX Runtime cannot run the original" in result.truth_note
    assert verify(parse(text, w=weight), parse(text, w=wrong)).verdict == "different"


def test_a_crash_of_the_runtime_loses_nothing(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.proof.runners.ONNX_RUNTIME", "bad_runtimes:crash")
    model = linear()
    result = verify(model, model)
    assert result.passed and "ONNX Runtime cannot run the original" in result.truth_note


def test_a_hang_is_a_named_outcome(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.proof.runners.ONNX_RUNTIME", "bad_runtimes:forever")
    result = verify(linear(), linear(), timeout=3)
    assert "timed out" in result.truth_note


def test_where_float64_cannot_run_the_noise_floor_decides(verify: Any) -> None:
    """A contrib op: ONNX Runtime knows it, the float64 evaluation does not."""

    def gelu(factor: float = 1.0) -> ModelProto:
        model = linear(factor)
        model.graph.node[0].output[0] = "a"
        model.graph.node.append(helper.make_node("Gelu", ["a"], ["y"], domain="com.microsoft"))
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return model

    result = verify(gelu(), gelu())
    assert result.passed and result.truth == "noise-floor" and "Gelu" in result.truth_note
    assert verify(gelu(), gelu(1 + 2**-24)).passed
    result = verify(gelu(), gelu(1.001))
    assert result.verdict == "different" and result.truth == "noise-floor"


def test_ids_out_of_a_tables_range_are_never_held_against_a_model(verify: Any) -> None:
    table = RNG.standard_normal((7, 3)).astype(np.float32)
    model = parse("g (int64[N] ids) => (float[N,3] y) { y = Gather (t, ids) }", t=table)
    assert verify(model, model).passed
    wrong = table.copy()
    wrong[6, 2] += 0.01
    assert not verify(model, parse("g (int64[N] ids) => (float[N,3] y) { y = Gather (t, ids) }", t=wrong)).passed


def test_class_ids_may_differ_at_ties_only(verify: Any) -> None:
    text = "g (float[N,6] x) => (int64[N,1] y) { a = MatMul (x, w)  y = ArgMax <axis = 1> (a) }"
    weight = RNG.standard_normal((6, 5)).astype(np.float32)
    assert verify(parse(text, w=weight), parse(text, w=weight * np.float32(3))).passed
    swapped = np.ascontiguousarray(weight[:, [1, 0, 2, 3, 4]])
    result = verify(parse(text, w=weight), parse(text, w=swapped))
    assert result.verdict == "different" and "elements differ" in result.reason


def test_sizes_are_found_by_asking_the_model(verify: Any) -> None:
    text = "g (float[A,B] x, float[B,C] v) => (float[M,12] y) { a = MatMul (x, v)  y = Reshape (a, s) }"
    model = parse(text, s=np.array([-1, 12]))
    result = verify(model, model)
    assert result.passed and len(result.sets) > 1
    shaped = verify(model, model, input_shapes={"x": (3, 4), "v": (4, 8)})
    assert shaped.passed


def test_a_model_that_rejects_everything_says_what_to_give(verify: Any) -> None:
    model = parse("g (float[A,B] x) => (float[7,11,13] y) { y = Reshape (x, s) }", s=np.array([7, 11, 13]))
    with pytest.raises(InputError, match=r"rejects every generated input for 'x'.*--input-shape.*--inputs"):
        verify(model, model)
    assert verify(model, model, input_shapes={"x": (77, 13)}).passed


def test_a_declared_size_of_zero_is_that_size(verify: Any) -> None:
    model = parse("g (float[0,3] x) => (float[0,3] y) { y = Relu (x) }")
    result = verify(model, model)
    assert result.passed and "no output has any elements" in str(result)
    assert verify(model, model, input_shapes={"x": (0, 3)}).passed
    summed = parse("g (float[0,3] x) => (float y) { y = ReduceSum <keepdims = 0> (x) }")
    assert verify(summed, summed).passed and "no output" not in str(verify(summed, summed))
    text = "g (float[1,1,0] x) => (float[A,B,C] y) { y = Conv (x, w) }"
    model = parse(text, w=np.ones((1, 1, 1), np.float32))
    with pytest.raises(InputError, match=r"rejects every .*; it declares a size of 0 for 'x'"):
        verify(model, model)


def test_nothing_but_nan_proves_nothing(verify: Any) -> None:
    result = verify(linear(), linear(2.0), inputs={"x": np.full((2, 6), np.nan, np.float32)})
    assert result.verdict == "unverifiable" and "not-a-number" in result.reason


def test_data_of_the_user(verify: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=RNG.standard_normal((2, 6)).astype(np.float32))
    result = verify(linear(), linear(), inputs=tmp_path / "data.npz")
    assert result.passed and result.sets == ["data.npz"]
    text = "g (int64[N] i) => (float[N] y) { y = Gather (t, i) }"
    model = parse(text, t=np.zeros(3, np.float32))
    with pytest.raises(InputError, match="rejects the given inputs"):
        verify(model, model, inputs={"i": np.array([5])})


def test_a_difference_of_random_models_proves_nothing(verify: Any) -> None:
    text = "g (float[4] x) => (float[4] y) {{ r = RandomNormalLike {seed} (x)  y = {op} (x, r) }}"
    result = verify(parse(text.format(seed="", op="Add")), parse(text.format(seed="", op="Sub")))
    assert result.verdict == "unverifiable" and "random" in result.reason
    seeded = text.format(seed="<seed = 1.0>", op="Add"), text.format(seed="<seed = 1.0>", op="Sub")
    assert verify(parse(seeded[0]), parse(seeded[1])).verdict == "different"


def test_what_a_function_or_a_dropout_draws_proves_nothing(verify: Any) -> None:
    def in_function(shift: float) -> ModelProto:
        text = """<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>
        g (float[2,6] x) => (float[2,6] y) { n = custom.noise (x) y = Add (n, b) }
        <domain: "custom", opset_import: ["" : 17]> noise (x) => (y) { n = RandomNormalLike (x) y = Add (x, n) }"""
        model = onnx.parser.parse_model(text)
        model.graph.initializer.append(numpy_helper.from_array(np.full(6, shift, np.float32), "b"))
        return model

    def dropped(shift: float, training: bool) -> ModelProto:
        text = "g (float[2,6] x) => (float[2,6] y) { d = Dropout (x, ratio, training) y = Add (d, b) }"
        constants = {"ratio": np.float32(0.1), "training": np.array(training), "b": np.full(6, shift, np.float32)}
        return parse(text, **{name: np.asarray(value) for name, value in constants.items()})

    assert verify(in_function(0.0), in_function(1.0)).verdict == "unverifiable"
    assert verify(dropped(0.0, True), dropped(1.0, True)).verdict == "unverifiable"
    assert verify(dropped(0.0, False), dropped(0.0, False)).passed
    assert verify(dropped(0.0, False), dropped(1.0, False)).verdict == "different"


def test_a_truth_that_is_no_number_where_the_runtimes_is_decides_nothing(verify: Any) -> None:
    def pooled(factor: float) -> ModelProto:
        return parse(
            """g (float[1,1,2,2] x) => (float[1,1,2,4] y) {
            p = AveragePool <kernel_shape = [2, 2], dilations = [3, 3], pads = [1, 1, 1, 1]> (x)
            s = Add (x, p) y = MatMul (s, w) }""",
            opset=19,
            w=(factor * np.random.default_rng(0).standard_normal((2, 4))).astype(np.float32),
        )

    result = verify(pooled(1.0), pooled(1.0))
    assert result.passed and result.truth == "noise-floor" and "not finite" in result.truth_note
    assert verify(pooled(1.0), pooled(1.01)).verdict == "different"


@pytest.mark.parametrize(
    ("text", "changed"),
    [("Abs (x)", "Identity (x)"), ("Clip (x, low, high)", "Identity (x)"), ("Clip (x, low)", "Identity (x)")],
)
def test_integers_are_negative_and_large_sometimes(verify: Any, text: str, changed: str) -> None:
    one, other = (
        parse(f"g (int64[3,8] x) => (int64[3,8] y) {{ y = {what} }}", low=np.array(0), high=np.array(255))
        for what in (text, changed)
    )
    assert verify(one, one).passed and verify(one, other).verdict == "different"


def test_maps_are_judged_by_their_keys(verify: Any) -> None:
    def classifier(factor: float) -> ModelProto:
        zip_map = helper.make_node("ZipMap", ["p"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[3, 7])
        scale = helper.make_node("Mul", ["x", "f"], ["p"])
        kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        graph = helper.make_graph(
            [scale, zip_map],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
            [helper.make_value_info("y", helper.make_sequence_type_proto(kind))],
            [numpy_helper.from_array(np.array([1, factor], np.float32), "f")],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    assert verify(classifier(1.0), classifier(1.0)).passed
    result = verify(classifier(1.0), classifier(1.5))
    assert result.verdict == "different" and "y[0][7]" in result.reason


def test_the_excess_of_a_wrong_function_is_shown(verify: Any) -> None:
    result = verify(linear(), linear(1.001))
    assert result.outputs[0].excess > 1


def test_noise_as_large_as_the_output_proves_nothing(verify: Any) -> None:
    """The difference of two products that are equal but for rounding, magnified."""
    text = """g (float[8,64] x) => (float[8,64] y) {
        p = MatMul (x, a)  q = MatMul (p, b)  r = MatMul (x, c)  s = Sub (q, r)  y = Mul (s, k) }"""
    a, b = RNG.standard_normal((2, 64, 64)).astype(np.float32)
    made = {"a": a, "b": b, "c": (a.astype(np.float64) @ b).astype(np.float32), "k": np.array(1e6, np.float32)}
    result = verify(parse(text, **made), parse(text, **made))
    assert result.verdict == "unverifiable" and "rounding alone" in result.reason


def test_a_legal_model_on_which_the_runtime_crashes(verify: Any) -> None:
    """BatchNormalization before opset 14 may name its further outputs as empty."""
    text = "g (float[N,3,4,4] x) => (float[N,3,4,4] y) { y = BatchNormalization (x, s, b, m, v) }"
    parameters = {name: RNG.uniform(0.5, 1.5, 3).astype(np.float32) for name in "sbmv"}
    odd = parse(text, opset=9, **parameters)
    odd.graph.node[0].output.extend([""] * 4)
    assert verify(odd, parse(text, opset=9, **parameters)).passed
    assert verify(odd, odd).passed
    wrong = parse(text, opset=9, **{**parameters, "v": parameters["v"] * np.float32(1.01)})
    assert verify(odd, wrong).verdict == "different"


def test_sequences_and_strings(verify: Any) -> None:
    graph = helper.make_graph(
        [helper.make_node("SequenceAt", ["xs", "i"], ["a"]), helper.make_node("SplitToSequence", ["a"], ["y"])],
        "g",
        [
            helper.make_tensor_sequence_value_info("xs", TensorProto.FLOAT, [2, 3]),
            helper.make_tensor_value_info("s", TensorProto.STRING, [2]),
        ],
        [
            helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("t", TensorProto.STRING, [2]),
        ],
        [numpy_helper.from_array(np.array(1), "i")],
    )
    graph.node.append(helper.make_node("Identity", ["s"], ["t"]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = verify(model, model)
    assert result.passed and {figures.name for figures in result.outputs} == {"y[0]", "y[1]", "t"}


def test_a_truth_that_is_far_from_the_runtime_is_not_trusted(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuser.proof import runners

    original = runners.OnnxRunner.truth

    def wrong(self: Any, *args: Any) -> Any:
        return [[[value * 2 for value in outcome] for outcome in answers] for answers in original(self, *args)]

    monkeypatch.setattr(runners.OnnxRunner, "truth", wrong)
    result = verify(linear(), linear())
    assert (
        result.passed and result.truth == "noise-floor" and "far from what ONNX Runtime computes" in result.truth_note
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contract": "roughly"}, "contract is 'exact' or 'rounding', not 'roughly'"),
        ({"seed": -1}, "seed must not be negative"),
        ({"input_shapes": {"z": (1,)}}, "there is no input 'z'"),
    ],
)
def test_bad_options(verify: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify(linear(), linear(), **options)


def test_bad_models(verify: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.onnx"):
        verify(tmp_path / "missing.onnx", linear())
    with pytest.raises(InputError, match=r"cannot verify a builtins.int"):
        verify(linear(), 3)


def test_an_onnx_comparison_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fuser.proof, fuser.proof.sides, fuser.proof.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_takes_long_runs_in_two_processes_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    with Workers() as workers:
        alone = run_verify(model, model, workers=workers)
        assert workers.second.pid is None, "a second process is not worth its start here"
        monkeypatch.setattr("fuser.proof.check._LONG", 0.0)
        monkeypatch.setattr("fuser.proof.check.cores", lambda: 2)
        together = run_verify(model, model, workers=workers)
        assert workers.second.pid not in (None, workers.first.pid)
        assert run_verify(model, linear(1.001), workers=workers).verdict == "different"
    assert (together.outputs, together.sets) == (alone.outputs, alone.sets)


def test_models_that_do_not_fit_side_by_side_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.proof.check._LONG", 0.0)
    monkeypatch.setattr("fuser.proof.check.cores", lambda: 2)
    monkeypatch.setattr("fuser.proof.check._TOGETHER", 59)
    with Workers() as workers:
        assert run_verify(linear(), linear(), workers=workers).passed
        assert workers.second.pid is None


def test_a_session_is_kept_for_the_same_file_only(tmp_path: Path) -> None:
    path, other = tmp_path / "model.onnx", tmp_path / "other.onnx"
    x = RNG.standard_normal((1, 6)).astype(np.float32)
    onnx.save(linear(), path)
    onnx.save(linear(2.0), other)

    def ran(path: Path, optimize: bool = False) -> tuple[np.ndarray, bool]:
        found = run_onnx(str(path), [{"x": x}], optimize, False)
        return found.outcomes[0][0], found.loading == 0

    try:
        first, kept = ran(path)
        assert not kept and ran(path)[1]
        assert not ran(path, optimize=True)[1]
        assert not ran(other)[1]
        onnx.save(linear(2.0), path)  # the same name, another model
        second, kept = ran(path)
        assert not kept and np.array_equal(second, ran(other)[0]) and not np.array_equal(second, first)
        release()
        assert not ran(other)[1]
    finally:
        release()


def test_what_was_found_of_an_original_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = Worker.call

    def call(self: Worker, function: str, path: str, *args: Any, **options: Any) -> Any:
        calls.append(function.split(":")[1])
        return real(self, function, path, *args, **options)

    monkeypatch.setattr(Worker, "call", call)
    model = linear()
    with Workers() as workers, Original() as original:
        row = {"workers": workers, "original": original}
        first = run_verify(model, linear(), **row)
        everything = len(calls)
        calls.clear()
        assert run_verify(model, linear(1.001), **row).verdict == "different"
        assert run_verify(model, linear(), contract="exact", **row).truth == "bits"
        again = run_verify(model, linear(), **row)
        assert (again.outputs, again.sets, again.truth) == (first.outputs, first.sets, first.truth)
        assert again.cost_ratio > 0
    assert everything == 5, "two runs and the truth of the original, and of the other"
    assert calls.count("run_onnx") == 3 and calls.count("evaluate") >= 2
