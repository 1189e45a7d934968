"""The float64 evaluation of ONNX models, held against torch in double precision and against hand-made values."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from fuser.proof.float64_onnx import evaluate, intermediates
from fuser.proof.outcome import Failure

RNG = np.random.default_rng(3)


def run(tmp_path: Path, model: onnx.ModelProto, *values: Any, nudge: int | None = None) -> list[np.ndarray]:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    feeds = {value.name: array for value, array in zip(model.graph.input, values, strict=True)}
    outcome = evaluate(str(path), [feeds], [nudge])[0][0]
    assert not isinstance(outcome, Failure), outcome
    return outcome


def one_node(op: str, *arrays: np.ndarray, outputs: int = 1, opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    """A model of one node: the first array is the input, the others are constants."""
    names = [f"a{i}" for i in range(len(arrays))]
    results = [f"y{i}" for i in range(outputs)]
    kinds = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **attributes)],
        "g",
        [helper.make_tensor_value_info(names[0], kinds[0], list(arrays[0].shape))],
        [helper.make_empty_tensor_value_info(name) for name in results],
        [numpy_helper.from_array(array, name) for name, array in zip(names[1:], arrays[1:], strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


def close(actual: np.ndarray, expected: Any) -> None:
    expected = expected.numpy() if isinstance(expected, torch.Tensor) else expected
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


CONVS = [
    {"x": (2, 6, 20), "w": (4, 6, 3), "stride": 2, "padding": 1},
    {"x": (2, 6, 9, 8), "w": (4, 6, 3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"x": (1, 6, 9, 8), "w": (4, 3, 3, 3), "groups": 2},
    {"x": (1, 6, 9, 8), "w": (12, 1, 3, 3), "groups": 6, "padding": 1},
    {"x": (1, 40, 7, 7), "w": (5, 40, 3, 3), "padding": 2},
    {"x": (1, 3, 5, 6, 7), "w": (4, 3, 2, 3, 1), "stride": (1, 2, 3)},
]


def attributes_of(case: dict[str, Any]) -> dict[str, Any]:
    rank = len(case["w"]) - 2

    def spread(value: Any) -> list[int]:
        return list(value) if isinstance(value, tuple) else [value] * rank

    return {
        "strides": spread(case.get("stride", 1)),
        "dilations": spread(case.get("dilation", 1)),
        "pads": spread(case.get("padding", 0)) * 2,
        "group": case.get("groups", 1),
    }


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in case.items() if key not in ("x", "w")}


@pytest.mark.parametrize("case", CONVS, ids=lambda case: "x".join(map(str, case["w"])))
def test_convolution(case: dict[str, Any], tmp_path: Path) -> None:
    x, w, b = normal(*case["x"]), normal(*case["w"]), normal(case["w"][0])
    op = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    (y,) = run(tmp_path, one_node("Conv", x, w, b, **attributes_of(case)), x)
    close(y, op(double(x), double(w), double(b), **options_of(case)))


def test_a_convolution_too_large_to_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.proof.float64_ops._GATHERED", 0)
    for case in CONVS:
        x, w = normal(*case["x"]), normal(*case["w"])
        op = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
        (y,) = run(tmp_path, one_node("Conv", x, w, **attributes_of(case)), x)
        close(y, op(double(x), double(w), **options_of(case)))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_convolution_with_automatic_padding(auto_pad: str, tmp_path: Path) -> None:
    x, w = normal(1, 3, 10, 7), normal(4, 3, 4, 3)
    needed = (0, 0, 0, 0) if auto_pad == "VALID" else (1, 1, 1, 1)  # left, right, top, bottom; stride 2
    y_pad = {"SAME_UPPER": (1, 1, 1, 1), "SAME_LOWER": (1, 1, 1, 1)}.get(auto_pad, needed)
    (y,) = run(tmp_path, one_node("Conv", x, w, auto_pad=auto_pad, strides=[2, 2]), x)
    close(y, F.conv2d(F.pad(double(x), y_pad), double(w), stride=2))
    x, w = normal(1, 2, 6), normal(2, 2, 2)  # an odd total: the extra one goes to the end, or to the start
    odd = {"SAME_UPPER": (0, 1), "SAME_LOWER": (1, 0)}.get(auto_pad, (0, 0))
    (y,) = run(tmp_path, one_node("Conv", x, w, auto_pad=auto_pad), x)
    close(y, F.conv1d(F.pad(double(x), odd), double(w)))


TRANSPOSED = [
    {"x": (2, 6, 9), "w": (6, 4, 3), "stride": 2, "padding": 1, "output_padding": 1},
    {"x": (1, 6, 5, 4), "w": (6, 2, 3, 2), "groups": 3, "stride": (2, 3), "dilation": (2, 1)},
    {"x": (1, 4, 5, 4), "w": (4, 1, 3, 3), "groups": 4, "padding": 1},
    {"x": (1, 2, 3, 4, 3), "w": (2, 3, 2, 2, 2), "stride": 2},
]


@pytest.mark.parametrize("case", TRANSPOSED, ids=lambda case: "x".join(map(str, case["w"])))
def test_transposed_convolution(case: dict[str, Any], tmp_path: Path) -> None:
    x, w = normal(*case["x"]), normal(*case["w"])
    b = normal(case["w"][1] * case.get("groups", 1))
    extra = {"output_padding": [case["output_padding"]] * (x.ndim - 2)} if "output_padding" in case else {}
    op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
    (y,) = run(tmp_path, one_node("ConvTranspose", x, w, b, **attributes_of(case), **extra), x)
    close(y, op(double(x), double(w), double(b), **options_of(case)))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_transposed_convolution_of_a_given_shape_is_as_in_onnx_runtime(auto_pad: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    x, w = normal(1, 2, 5), normal(2, 3, 4)
    for more in ({}, {"output_shape": [11]}):
        model = one_node("ConvTranspose", x, w, auto_pad=auto_pad, strides=[2], **more)
        (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, {"a0": x})
        (y,) = run(tmp_path, model, x)
        np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize("pad", [0, 1])
def test_pooling(ceil_mode: int, pad: int, tmp_path: Path) -> None:
    x = normal(2, 3, 10, 9)
    common = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [pad] * 4, "ceil_mode": ceil_mode}
    (y,) = run(tmp_path, one_node("MaxPool", x, opset=19, **common), x)
    close(y, F.max_pool2d(double(x), (3, 2), 2, pad, ceil_mode=bool(ceil_mode)))
    for counted in (0, 1):
        (y,) = run(tmp_path, one_node("AveragePool", x, opset=19, count_include_pad=counted, **common), x)
        close(y, F.avg_pool2d(double(x), (3, 2), 2, pad, bool(ceil_mode), bool(counted)))


def test_pooling_gives_indices_and_pools_integers(tmp_path: Path) -> None:
    x = normal(2, 3, 8, 6)
    model = one_node("MaxPool", x, outputs=2, kernel_shape=[2, 3], strides=[2, 3], dilations=[1, 1])
    _, places = run(tmp_path, model, x)
    _, expected = F.max_pool2d(double(x), (2, 3), (2, 3), return_indices=True)
    planes = np.arange(6).reshape(2, 3, 1, 1) * 48  # ONNX counts through the whole tensor
    assert np.array_equal(places, expected.numpy() + planes)
    small = RNG.integers(-100, 100, (1, 1, 4), dtype=np.int8)
    (y,) = run(tmp_path, one_node("MaxPool", small, kernel_shape=[2], pads=[1, 1]), small)
    padded = [-128, *small[0, 0].tolist(), -128]
    assert y.dtype == np.int8 and y[0, 0].tolist() == [max(pair) for pair in itertools.pairwise(padded)]


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15])
def test_batch_norm_of_every_opset(opset: int, tmp_path: Path) -> None:
    x, (scale, bias, mean) = normal(2, 4, 3, 5), normal(3, 4)
    var = RNG.uniform(0.1, 2, 4).astype(np.float32)
    model = one_node("BatchNormalization", x, scale, bias, mean, var, opset=opset, epsilon=0.01)
    (y,) = run(tmp_path, model, x)
    close(y, F.batch_norm(double(x), *map(double, (mean, var, scale, bias)), eps=float(np.float32(0.01))))


def test_batch_norm_of_another_number_of_channels_fails(tmp_path: Path) -> None:
    model = one_node("BatchNormalization", normal(2, 1, 3)[0][None], *normal(4, 4))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    outcome = evaluate(str(path), [{"a0": np.zeros((2, 1, 3), np.float32)}], [None])[0][0]
    assert isinstance(outcome, Failure) and "4 values for 1 channels" in str(outcome)


def test_batch_norm_in_training_mode(tmp_path: Path) -> None:
    x, (scale, bias, mean) = normal(4, 4, 3, 5), normal(3, 4)
    var = RNG.uniform(0.1, 2, 4).astype(np.float32)
    model = one_node("BatchNormalization", x, scale, bias, mean, var, outputs=3, training_mode=1, momentum=0.75)
    y, running_mean, running_var = run(tmp_path, model, x)
    close(y, F.batch_norm(double(x), None, None, double(scale), double(bias), True, eps=float(np.float32(1e-5))))
    close(running_mean, mean.astype(np.float64) * 0.75 + x.astype(np.float64).mean((0, 2, 3)) * 0.25)
    close(running_var, var.astype(np.float64) * 0.75 + x.astype(np.float64).var((0, 2, 3)) * 0.25)


def test_batch_norm_with_a_statistic_for_each_element(tmp_path: Path) -> None:
    x, parameters = normal(2, 3, 4, 5), [np.abs(normal(3, 4, 5)) for _ in range(4)]
    (y,) = run(tmp_path, one_node("BatchNormalization", x, *parameters, opset=7, spatial=0, epsilon=0.5), x)
    scale, bias, mean, var = (p.astype(np.float64) for p in parameters)
    close(y, (x.astype(np.float64) - mean) / np.sqrt(var + 0.5) * scale + bias)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers(kind: str, tmp_path: Path) -> None:
    x = normal(7, 2, 3)
    layer = getattr(torch.nn, kind)(3, 4, bidirectional=True).double()
    order = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}[kind]  # the gates: torch's order to ONNX's

    def gates(name: str) -> np.ndarray:
        both = [getattr(layer, f"{name}_l0{end}").detach().numpy() for end in ("", "_reverse")]
        return np.stack([np.concatenate([np.split(one, len(order))[i] for i in order]) for one in both])

    bias = np.concatenate([gates("bias_ih"), gates("bias_hh")], axis=1)
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    arrays = x.astype(np.float64), gates("weight_ih"), gates("weight_hh"), bias
    model = one_node(kind, *arrays, hidden_size=4, direction="bidirectional", **more)
    (y,) = run(tmp_path, model, arrays[0])
    close(y.transpose(0, 2, 1, 3).reshape(7, 2, 8), layer(double(x))[0].detach())


def test_casts_to_floats_do_not_round_and_others_do(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N] x) => (float[N] a, int64[N] b, float[N] c) {
            half = Cast <to = 10> (x)
            a = Cast <to = 1> (half)
            b = Cast <to = 7> (x)
            c = CastLike (half, x)
        }""")
    x = np.array([1.0001, -2.7, 70000.0], np.float32)
    a, b, c = run(tmp_path, model, x)
    assert np.array_equal(a, x.astype(np.float64)) and np.array_equal(c, a)
    assert b.dtype == np.int64 and b.tolist() == [1, -2, 70000]


def test_quantized_values_are_taken_as_they_are(tmp_path: Path) -> None:
    q = RNG.integers(-128, 128, (4, 3), dtype=np.int8)
    scale, zero = np.array([0.1, 0.2, 0.3], np.float32), np.array([1, -2, 3], np.int8)
    (y,) = run(tmp_path, one_node("DequantizeLinear", q, scale, zero, axis=1), q)
    close(y, (q.astype(np.float64) - zero) * scale.astype(np.float64))
    scale = RNG.uniform(0.1, 1, (2, 3)).astype(np.float32)
    (y,) = run(tmp_path, one_node("DequantizeLinear", q, scale, opset=21, axis=0, block_size=2), q)
    close(y, q.astype(np.float64) * np.repeat(scale, 2, 0).astype(np.float64))


def test_subgraphs_and_functions_are_evaluated_in_float64_too(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2] x, bool up) => (float[2] y, float[2] z)
        <float[2] third = {0.33333333, 0.66666667}> {
            y = If (up) <
                then_branch = g1 () => (float[2] a) {
                    tenth = Constant <value = float[2] {0.1, 0.2}> ()
                    a = Mul (x, tenth) },
                else_branch = g2 () => (float[2] b) { h = Cast <to = 10> (third)  b = Mul (x, h) } >
            z = local.twice (y)
        }
        <domain: "local", opset_import: ["" : 17]>
        twice (v) => (w) { h = Cast <to = 10> (v)  w = Add (h, h) }""")
    x = np.array([1.1, 2.3], np.float32)
    tenth, third = (np.array(v, np.float32).astype(np.float64) for v in ([0.1, 0.2], [0.33333333, 0.66666667]))
    for up, constant in ((True, tenth), (False, third)):
        y, z = run(tmp_path, model, x, np.array(up))
        close(y, x.astype(np.float64) * constant)
        close(z, 2 * x.astype(np.float64) * constant)
        moved, _ = run(tmp_path, model, x, np.array(up), nudge=1)
        assert 0 < np.abs(moved / y - 1).max() < 2**-9


def test_one_hot_with_a_depth_of_one_element(tmp_path: Path) -> None:
    ids = np.array([[0, 2], [-1, 1]])
    (y,) = run(tmp_path, one_node("OneHot", ids, np.array([3]), np.array([0.0, 1.0], np.float32)), ids)
    assert np.array_equal(y, np.eye(3)[ids])


def test_a_nudge_moves_constants_by_a_rounding_but_no_sizes(tmp_path: Path) -> None:
    x, w = normal(1, 4), normal(4, 8)
    model = one_node("MatMul", x, w)
    (truth,) = run(tmp_path, model, x)
    (moved,) = run(tmp_path, model, x, nudge=1)
    assert 0 < np.abs(moved - truth).max() <= 5.001 * 2**-24 * (np.abs(x) @ np.abs(w)).max()  # one, and four of its row
    grown = np.array([1, 1, 1.3333334, 1.7], np.float32)
    image = normal(1, 1, 6, 10)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 6, 10])],
            [helper.make_empty_tensor_value_info("y")],
            [numpy_helper.from_array(grown, "scales")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    assert np.array_equal(run(tmp_path, model, image)[0], run(tmp_path, model, image, nudge=1)[0])


def test_what_cannot_be_evaluated_is_a_named_failure(tmp_path: Path) -> None:
    path = tmp_path / "custom.onnx"
    x = normal(2)
    model = one_node("Relu", x)
    model.graph.node[0].domain = "custom"
    model.opset_import.append(helper.make_opsetid("custom", 1))
    onnx.save(model, path)
    ((outcome,),) = evaluate(str(path), [{"a0": x}], [None])
    assert isinstance(outcome, Failure) and outcome.kind == "unsupported" and "custom" in outcome.message
    onnx.save(one_node("MatMul", x, normal(2, 2)), path)
    ((refused, good),) = evaluate(str(path), [{"a0": normal(3)}, {"a0": x}], [None])
    assert isinstance(refused, Failure) and refused.kind == "refused" and not isinstance(good, Failure)


def test_constants_that_do_not_fit_into_memory_are_a_named_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(one_node("MatMul", normal(2), normal(2, 2)), path)
    monkeypatch.setattr("fuser.proof.float64_onnx.available_memory", lambda: 64)
    ((outcome,),) = evaluate(str(path), [{"a0": normal(2)}], [None])
    assert isinstance(outcome, Failure) and outcome.kind == "too-large"


def test_inner_tensors_can_be_asked_for(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y) { a = Neg (x)  b = Exp (a)  y = Relu (b) }""")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    x = normal(2)
    found = intermediates(str(path), {"x": x}, ["a", "b", "nothing"])
    assert set(found) == {"a", "b"}
    close(found["b"], np.exp(-x.astype(np.float64)))


def deep(layers: int) -> onnx.ModelProto:
    """Convolutions with large weights, two kinds of attributes in turn, and a weight that is an output as well."""
    weights = [normal(16, 16, 3, 3) / 12 for _ in range(layers)]
    nodes = [
        helper.make_node("Conv", [f"h{i}", f"w{i}"], [f"h{i + 1}"], pads=[1 + i % 2] * 4, dilations=[1 + i % 2] * 2)
        for i in range(layers)
    ]
    nodes.append(helper.make_node("Identity", ["w0"], ["kept"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, [None, 16, 6, 5])],
        [helper.make_empty_tensor_value_info(name) for name in (f"h{layers}", "kept")],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_sets_that_run_together_give_what_each_gives_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    model = deep(4)
    onnx.save(model, path)
    sets = [{"h0": normal(n, 16, 6, 5)} for n in (1, 2)] + [{"h0": normal(1, 15, 6, 5)}, {"h0": normal(3, 16, 6, 5)}]
    (together,) = evaluate(path, sets, [None])
    y = double(sets[3]["h0"])
    for i, tensor in enumerate(model.graph.initializer):
        step = 1 + i % 2
        y = F.conv2d(y, double(numpy_helper.to_array(tensor)), padding=step, dilation=step)
    close(together[3][0], y)
    close(together[0][1], double(numpy_helper.to_array(model.graph.initializer[0])))
    for feeds, found in zip(sets, together, strict=True):
        ((alone,),) = evaluate(path, [feeds], [None])
        if isinstance(found, Failure):
            assert feeds["h0"].shape[1] == 15 and isinstance(alone, Failure)
        else:
            assert all(np.array_equal(a, b) for a, b in zip(alone, found, strict=True))


def test_large_weights_are_read_when_they_are_needed_and_freed_after(tmp_path: Path) -> None:
    """Of weights worth 60 MB in float64, no more than a few are in memory at a time."""
    import tracemalloc

    weights = [normal(500, 500) / 25 for _ in range(30)]
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(30)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, [1, 500])],
        [helper.make_empty_tensor_value_info("h30")],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    evaluate(str(path), [{"h0": normal(1, 500)}], [None])  # what is imported and cached is not counted
    tracemalloc.start()
    try:
        evaluate(str(path), [{"h0": normal(1, 500)}, {"h0": normal(1, 500)}], [None])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6


def test_tensors_of_nodes_and_bodies_are_read_from_the_file(tmp_path: Path) -> None:
    weight = normal(40, 40)
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[40] x, bool c) => (float[40] y) {
            w = Constant ()
            a = MatMul (x, w)
            y = If (c) <then_branch = t () => (float[40] u) { u = MatMul (a, v) },
                        else_branch = e () => (float[40] u) { u = Identity (a) }>
        }""")
    model.graph.node[0].attribute.append(helper.make_attribute("value", numpy_helper.from_array(weight, "w")))
    (body,) = (a.g for a in model.graph.node[2].attribute if a.name == "then_branch")
    body.initializer.append(numpy_helper.from_array(weight.T.copy(), "v"))
    x = normal(40)
    wide = weight.astype(np.float64)
    close(run(tmp_path, model, x, np.array(True))[0], x.astype(np.float64) @ wide @ wide.T)
    close(run(tmp_path, model, x, np.array(False))[0], x.astype(np.float64) @ wide)
