"""Generated inputs follow the graph; the user's own are checked against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from fuser.errors import InputError
from fuser.files import ModelFile
from fuser.proof import inputs
from fuser.proof.data import given
from fuser.proof.inputs import KINDS, Spec, generate, more_sizes, specs_of, symbols_of, vary


def specs(text: str, **shapes: Any) -> list[Spec]:
    text = '<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>\n' + text
    return specs_of(ModelFile.from_proto(onnx.parser.parse_model(text)), shapes)


def values(text: str, kind: str = "normal", seed: int = 0, **sizes: int) -> list[Any]:
    return list(generate(specs(text), sizes, kind, seed).values)


def test_shapes_types_and_seeds() -> None:
    text = "g (float[2,N] x, float16[3] h, int64[] n, bool[4] b) => (float[2,N] y) { y = Relu (x) }"
    x, h, n, b = values(text, N=5)
    assert (x.shape, x.dtype) == ((2, 5), np.float32) and (h.shape, h.dtype) == ((3,), np.float16)
    assert (n.shape, n.dtype) == ((), np.int64) and b.dtype == bool
    assert np.array_equal(values(text, N=5)[0], x) and not np.array_equal(values(text, seed=1, N=5)[0], x)


@pytest.mark.parametrize("dtype", ["bool", "float", "float16", "int64", "int8", "string"])
def test_a_scalar_is_an_array_without_axes(dtype: str) -> None:
    """ONNX Runtime takes no `numpy.bool`: a model with a flag would reject everything."""
    (value,) = values(f"g ({dtype}[] x) => ({dtype}[] y) {{ y = Identity (x) }}")
    assert isinstance(value, np.ndarray) and value.shape == ()


def test_sizes_beyond_memory_are_bad_input() -> None:
    with pytest.raises(InputError, match="do not fit into memory"):
        values("g (float[N,1000000] x) => (float[N,1000000] y) { y = Relu (x) }", N=10**11)


def test_kinds() -> None:
    text = "g (float[2000] x, bfloat16[2000] h) => (float[2000] y) { y = Relu (x) }"
    by_kind = {kind: values(text, kind) for kind in KINDS}
    spread = {kind: float(x.std()) for kind, (x, _) in by_kind.items()}
    assert spread["normal"] == pytest.approx(1, rel=0.1) and spread["large"] == pytest.approx(100, rel=0.1)
    assert spread["small"] == pytest.approx(1e-3, rel=0.1) and spread["zeros"] == 0
    assert by_kind["negative"][0].max() <= 0
    assert by_kind["unit"][0].min() >= 0 and by_kind["unit"][0].max() < 1
    half = by_kind["large"][1]
    assert half.dtype == ml_dtypes.bfloat16 and float(half.astype(np.float32).std()) == pytest.approx(8, rel=0.1)


def test_ids_stay_below_the_rows_of_the_table_through_casts_and_reshapes() -> None:
    (ids,) = values("""g (int32[4000] ids) => (float[2000,2,3] y)
        <int64[2] two = {2000, 2}, float[3,3] table = {0,0,0,0,0,0,0,0,0}> {
            wide = Cast <to = 7> (ids)
            pairs = Reshape (wide, two)
            y = Gather (table, pairs) }""")
    assert ids.dtype == np.int32 and set(ids.tolist()) == {0, 1, 2}


def test_ids_stay_below_the_depth_of_a_one_hot_inside_a_branch() -> None:
    branch = "(float[N,5] {name}) {{ {name} = OneHot (ids, depth, ends) }}"
    (ids, _) = values(
        f"""g (int64[200] ids, bool up) => (float[200,5] y) <int64 depth = {{5}}, float[2] ends = {{0, 1}}> {{
            y = If (up) < then_branch = t () => {branch.format(name="a")},
                          else_branch = e () => {branch.format(name="b")} > }}"""
    )
    assert set(ids.tolist()) == {0, 1, 2, 3, 4}


def test_scalars_take_values_that_the_graph_asks_for() -> None:
    text = """g (int64 sr, float[4] x) => (bool y) <int64 a = {16000}, int64 b = {8000}> {
        first = Equal (sr, a)  second = Equal (sr, b)  y = Or (first, second) }"""
    assert {int(values(text, seed=seed)[0]) for seed in range(20)} == {8000, 16000}


def test_sizes_lengths_masks_and_words() -> None:
    shape, lengths, mask, words = values("""g (int64[2] shape, int32[3] lens, int64[8] attention_mask, string[9] s)
            => (float[M,N] y, int64[9] w)
        <float one = {1}, float[1,8,5] W = {0}, float[1,8,2] R = {0}, float[7,3,5] X = {0}> {
            y = Expand (one, shape)
            l, h = LSTM <hidden_size = 2> (X, W, R, , lens)
            m = Cast <to = 1> (attention_mask)
            w = ai.onnx.ml.LabelEncoder <keys_strings = ["red", "green"], values_int64s = [1, 2]> (s) }""")
    assert shape.min() >= 1 and shape.max() <= 3 and lengths.min() >= 1 and lengths.max() <= 3
    assert set(mask.tolist()) <= {0, 1} and set(words.tolist()) <= {"red", "green"}
    assert words.dtype == object


def test_bytes_use_their_whole_range() -> None:
    pixels, signed = values("g (uint8[5000] x, int8[5000] z) => (uint8[5000] y) { y = Identity (x) }")
    assert (pixels.min(), pixels.max()) == (0, 255) and (signed.min(), signed.max()) == (-128, 127)


def test_sequences_and_optionals() -> None:
    graph = helper.make_graph(
        [helper.make_node("SequenceLength", ["xs"], ["n"])],
        "g",
        [
            helper.make_tensor_sequence_value_info("xs", TensorProto.FLOAT, [2, 3]),
            helper.make_value_info("o", helper.make_optional_type_proto(helper.make_tensor_type_proto(1, [4]))),
        ],
        [helper.make_tensor_value_info("n", TensorProto.INT64, [])],
    )
    made = specs_of(ModelFile.from_proto(helper.make_model(graph)))
    xs, o = generate(made, {}, "normal", 0).values
    assert [x.shape for x in xs] == [(2, 3), (2, 3)] and o.shape == (4,)


def test_a_map_is_asked_for_by_name() -> None:
    graph = onnx.parser.parse_graph("g (float[1] x) => (float[1] y) { y = Relu (x) }")
    graph.input[0].name = "features"
    graph.input[0].type.Clear()
    graph.input[0].type.map_type.key_type = TensorProto.STRING
    with pytest.raises(InputError, match=r"'features' is a map type, .* --inputs .* inputs=\{'features': array\}"):
        specs_of(ModelFile.from_proto(helper.make_model(graph)))


def test_dimensions_that_only_the_readers_know() -> None:
    (image, rows) = specs("""g (float x, float[N,M] r) => (float y, float z)
        <float[4,3,2,2] w = {0}, float[6,5] v = {0}> {
            scaled = Relu (x)
            y = Conv <group = 2> (scaled, w)
            z = MatMul (r, v) }""")
    assert rows.dims == ["N", 6]
    assert image.dims == []  # declared: a scalar
    text = "g (float x) => (float y) <float[4,3,2,2] w = {0}> { y = Conv <group = 2> (x, w) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    model.graph.input[0].type.tensor_type.ClearField("shape")
    (spec,) = specs_of(ModelFile.from_proto(model))
    assert spec.dims == ["x[0]", 6, "x[2]", "x[3]"]


def test_sizes_are_equal_unequal_and_of_several_batches() -> None:
    made = specs("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Relu (x) }")
    assert symbols_of(made) == ["N", "H", "W"]
    base = inputs.base_sizes(made)[0]
    assert base["N"] == 1 and base["H"] == base["W"]
    others = list(more_sizes(made, base))
    assert {sizes["N"] for sizes in others} >= {2, 3} and any(sizes["H"] != sizes["W"] for sizes in others)
    assert any(sizes["H"] % 2 for sizes in others)


def test_sizes_that_take_much_memory_are_not_tried() -> None:
    (spec,) = inputs.with_rank([inputs.Spec("x", np.dtype(np.float32), None)], 5)
    tried = inputs.base_sizes([spec])
    assert tried and all(np.prod([sizes[dim] for dim in spec.dims]) <= inputs.LARGE for sizes in tried)
    spec.dims = ["N", inputs.LARGE]  # as it is declared
    assert inputs.base_sizes([spec]) == [{"N": 1}]


def test_expressions_of_symbols() -> None:
    made = specs("g (float[s] x) => (float[s] y) { y = Relu (x) }")
    made[0].dims = ["2*s0 + 1", "s1 // 2", "past-len", "s0"]
    assert symbols_of(made) == ["s0", "s1", "past-len"]
    (x,) = generate(made, {"s0": 3, "s1": 9, "past-len": 2}, "normal", 0).values
    assert x.shape == (7, 4, 2, 3)


def test_input_shapes_are_checked() -> None:
    text = "g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }"
    assert specs(text, x=(7, 3))[0].dims == [7, 3]
    for shapes, message in (
        ({"z": (1, 3)}, "there is no input 'z'; the inputs are 'x'"),
        ({"x": (1, 3, 1)}, "input 'x' has 2 dimensions, not 3"),
        ({"x": (1, 4)}, "dimension 1 of input 'x' is 3; it cannot be 4"),
        ({"x": (0, 3)}, "dimension 0 of input 'x' is N; it cannot be 0"),
    ):
        with pytest.raises(InputError, match=message):
            specs(text, **shapes)


def test_examples_are_varied_within_their_ranges() -> None:
    examples = [np.zeros((2, 3), np.float32), np.array([[5, 9]]), np.array([True, True, False]), np.array(7)]
    x, ids, mask, scalar = vary(examples, "normal", 1).values
    assert x.shape == (2, 3) and x.std() > 0 and x.dtype == np.float32
    assert ids.min() >= 5 and ids.max() <= 9 and mask.sum() == 2 and scalar == 7 and scalar.shape == ()


DATA = "g (float[N,3] x, int64[2] n) => (float[N,3] y) { y = Relu (x) }"
X, N = np.ones((4, 3), np.float32), np.array([1, 2])


def test_data_by_name_in_order_and_from_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", x=X, n=N)
    np.savez(tmp_path / "plain.npz", X, N)
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    for i, array in enumerate((X, N)):
        (folder / f"input_{i}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
    sources = [{"x": X, "n": N}, (X, N), tmp_path / "named.npz", str(tmp_path / "plain.npz"), folder, tmp_path]
    for source in sources:
        (one,) = given(source, specs(DATA))
        assert np.array_equal(one.values[0], X) and np.array_equal(one.values[1], N)
    assert len(given([{"x": X, "n": N}, (X, N)], specs(DATA))) == 2
    np.save(tmp_path / "x.npy", X.astype(np.float64))
    (one,) = given(tmp_path / "x.npy", specs(DATA)[:1])
    assert one.values[0].dtype == np.float32


def test_sequences_in_a_test_data_folder(tmp_path: Path) -> None:
    proto = numpy_helper.from_list([X, 2 * X])
    (tmp_path / "input_0.pb").write_bytes(proto.SerializeToString())
    spec = Spec("xs", np.dtype(np.float32), ["N", 3], "sequence")
    (one,) = given(tmp_path, [spec])
    assert len(one.values[0]) == 2 and np.array_equal(one.values[0][1], 2 * X)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"x": X}, "the given data has nothing for the input 'n'"),
        ({"x": X, "n": N, "z": N}, "has 'z', which is no input; the inputs are 'x', 'n'"),
        ((X,), r"has 1 arrays for 2 inputs \('x', 'n'\)"),
        ({"x": N, "n": N}, "input 'x' takes float32, not int64"),
        ({"x": X, "n": np.array([1.5, 2])}, "input 'n' takes int64, not float64"),
        ({"x": X[0], "n": N}, "input 'x' has 2 dimensions, not 1"),
        ({"x": X[:, :2], "n": N}, "dimension 1 of input 'x' is 3, not 2"),
        ("missing.npz", "there is no missing.npz"),
    ],
)
def test_unfit_data_is_named(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        given(source, specs(DATA))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match=r"text.npz is not readable as .npz or .npy"):
        given(tmp_path / "text.npz", specs(DATA))
    with pytest.raises(InputError, match=r"holds no input_0.pb"):
        given(tmp_path, specs(DATA))
    (tmp_path / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(InputError, match=r"input_0.pb is not a TensorProto"):
        given(tmp_path, specs(DATA))
