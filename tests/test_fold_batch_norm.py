"""fold-batch-norm where only ONNX can say it: odd operands, types, quantized weights; and each refusal by its code.

`test_specification` holds the same fold against every host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from fuser.passes.fold_batch_norm import FoldBatchNorm
from hosts_torch import Traced
from onnx import helper, numpy_helper
from onnx_models import RNG, batch_norm, conv, conv_constants, model, node, op_types
from rewriting import DOUBLE, applied, evaluate, refused, rewritten

import fuser
from fuser.files import ModelFile

FOLD = FoldBatchNorm()


def constants(cout: int = 4, cin: int = 4, dtype: Any = np.float64, **more: Any) -> dict[str, np.ndarray]:
    return {**conv_constants(cin, cout, dtype=dtype), **more}


def double(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray], **options: Any) -> onnx.ModelProto:
    return model(nodes, constants=tensors, dtype=DOUBLE, **options)


def standard(*bias: str, **options: Any) -> onnx.ModelProto:
    tensors = constants(b=RNG.standard_normal(4)) if bias == ("b",) else constants()
    return double([conv("x", "c", "w", *bias), batch_norm()], tensors, **options)


# -- folded


@pytest.mark.parametrize("bias", [(), ("",), ("b",)])
def test_with_and_without_bias(bias: tuple[str, ...]) -> None:
    assert op_types(applied(standard(*bias), FOLD).graph) == ["Conv"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_before_and_after(groups: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((4, 4 // groups, 3, 3))
    applied(double([conv(group=groups), batch_norm()], constants(w=weight)), FOLD)
    ahead = double(
        [node("Relu", ["x"], ["r"]), batch_norm("r", "n"), conv("n", "y", group=groups)], constants(w=weight)
    )
    applied(ahead, FOLD)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [1.0, 2.0, 0.0])
@pytest.mark.parametrize("shape", [None, (), (1,), (5,), (1, 5), (3, 5), (3, 1)])
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("ahead", [False, True])
def test_gemm(alpha: float, beta: float, shape: tuple[int, ...] | None, turned: int, ahead: bool) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((5, 5))
    tensors = constants(5, 5, w=weight)
    names = ["n" if ahead else "x", "w"]
    if shape is not None:
        tensors["b"] = rng.standard_normal(shape)
        names.append("b")
    gemm = node("Gemm", names, ["y" if ahead else "c"], alpha=alpha, beta=beta, transB=turned)
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "n"), gemm] if ahead else [gemm, batch_norm()]
    result = applied(double(nodes, tensors, x=(3, 5)), FOLD)
    assert "BatchNormalization" not in op_types(result.graph)


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(0.5, 1.0, 2.0), (0.5, 2.0, 2.0), (1.0, 2.0, 3.0), (1.0, 2.0, 1.0)]
)
def test_alpha_and_beta_go_even_where_a_constant_keeps_its_value(alpha: float, beta: float, gamma: float) -> None:
    tensors = constants(w=RNG.standard_normal((4, 4)), b=RNG.standard_normal(4), gamma=np.full(4, gamma))
    tensors |= {"beta": np.zeros(4), "mean": np.zeros(4), "var": np.ones(4)}
    for names in (["n", "w"], ["n", "w", "b"]):
        gemm = node("Gemm", names, alpha=alpha, beta=beta)
        nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "n", epsilon=0.0), gemm]
        applied(double(nodes, tensors, x=(3, 4)), FOLD)


def test_matmul_gets_a_bias() -> None:
    result = applied(double([node("MatMul", ["x", "w"], ["c"]), batch_norm()], constants(w=np.eye(4)), x=(3, 4)), FOLD)
    assert op_types(result.graph) == ["MatMul", "Add"]


def test_a_concatenation_of_one_branch_forward() -> None:
    tensors = constants(narrow=RNG.standard_normal((3, 4, 1, 1)), wide=RNG.standard_normal((3, 7, 3, 3)))
    nodes = [
        node("Relu", ["x"], ["r"]),
        batch_norm("r", "n"),
        conv("x", "z", "narrow"),
        node("Concat", ["z", "n"], ["j"], axis=1),
        conv("j", "y", "wide"),
    ]
    result = applied(double(nodes, tensors), FOLD)
    assert op_types(result.graph) == ["Relu", "Conv", "Concat", "Conv"]


@pytest.mark.parametrize("function", ["Add", "Sub"])
def test_a_sum_of_two_convolutions(function: str) -> None:
    nodes = [conv("x", "p"), conv("x", "q", "v"), node(function, ["p", "q"], ["c"]), batch_norm()]
    result = applied(double(nodes, constants(v=RNG.standard_normal((4, 4, 3, 3)))), FOLD)
    assert op_types(result.graph) == ["Conv", "Conv", function]


def test_through_an_average() -> None:
    nodes = [conv(), node("GlobalAveragePool", ["c"], ["p"]), batch_norm("p")]
    applied(double(nodes, constants()), FOLD)


def test_through_flatten_into_a_matrix_product() -> None:
    nodes = [
        node("Relu", ["x"], ["r"]),
        batch_norm("r", "n"),
        node("Flatten", ["n"], ["f"]),
        node("Gemm", ["f", "m"]),
    ]
    applied(double(nodes, constants(m=RNG.standard_normal((36, 5))), x=("N", 4, 3, 3)), FOLD)


def test_the_producer_is_preferred_and_a_shift_alone_leaves_the_weight() -> None:
    tensors = constants()
    tensors |= {"gamma": np.ones(4), "var": np.ones(4), "mean": np.zeros(4)}
    proto = double([conv(), batch_norm("c", "n", epsilon=0.0), conv("n", "y")], tensors)
    _, result = rewritten(proto, FOLD)
    assert result.graph.node[0].input[1] == "w"
    assert op_types(result.graph) == ["Conv", "Conv"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_computed_in_double_and_rounded_once(dtype: Any) -> None:
    tensors = conv_constants()
    half = {**tensors, "w": tensors["w"].astype(dtype)}
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = model([conv(), batch_norm()], constants=half, dtype=element)
    outcome, result = rewritten(proto, FOLD)
    assert len(outcome.applied) == 1
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in result.graph.initializer}
    weight, bias = (arrays[name] for name in result.graph.node[0].input[1:])
    assert weight.dtype == bias.dtype == dtype  # the convolution's type, whatever that of the statistics
    s = tensors["gamma"].astype(np.float64) / np.sqrt(tensors["var"].astype(np.float64) + 1e-5)
    expected = (half["w"].astype(np.float64) * s.reshape(-1, 1, 1, 1)).astype(dtype)
    np.testing.assert_array_equal(weight, expected)


NEWER: dict[str, Any] = {"opset": 19, "ir_version": 9}
"""What the reference evaluator needs for DequantizeLinear."""


def quantized(axis: int | None, gamma: np.ndarray, linear: bool = False, scales: int = 4) -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    shape = (4, 4) if linear else (4, 4, 3, 3)
    tensors = constants(gamma=gamma, q=rng.integers(-100, 100, shape).astype(np.int8))
    scale: Any = 0.25 if axis is None else rng.uniform(0.1, 1, scales)
    tensors = {name: a if a.dtype == np.int8 else a.astype(np.float32) for name, a in tensors.items()}
    tensors["scale"] = np.asarray(scale, np.float32)
    tensors.pop("w")
    dequantize = node("DequantizeLinear", ["q", "scale"], ["w"], **({} if axis is None else {"axis": axis}))
    product = node("MatMul", ["x", "w"], ["c"]) if linear else conv()
    return model(
        [dequantize, product, batch_norm()], constants=tensors, x=(3, 4) if linear else ("N", 4, 8, 8), **NEWER
    )


@pytest.mark.parametrize("linear", [False, True])
def test_a_weight_quantized_per_channel_keeps_its_integers(linear: bool) -> None:
    proto = quantized(1 if linear else 0, np.array([0.5, 1, 2, 3]), linear)
    result = applied(proto, FOLD, bound=1e-5)
    assert "BatchNormalization" not in op_types(result.graph)
    (before,) = [t for t in proto.graph.initializer if t.name == "q"]
    (after,) = [t for t in result.graph.initializer if t.name == "q"]
    assert after == before


# -- refused


@pytest.mark.parametrize(
    "proto",
    [
        quantized(None, np.ones(4)),
        quantized(1, np.ones(4)),
        quantized(0, np.array([1.0, -1, 1, 1])),
        quantized(0, np.array([1.0, 0, 1, 1])),
        quantized(0, np.ones(4), linear=True),
        quantized(0, np.ones(4), scales=1),
    ],
    ids=["per-tensor", "other-axis", "negative", "zero", "linear-other-axis", "one-for-the-axis"],
)
def test_quantized(proto: onnx.ModelProto) -> None:
    assert refused(proto, FOLD) == {"quantized": 1}
    (missed,) = fuser.explain(proto, passes=["fold-batch-norm"]).missed
    assert "channels there" not in missed.reason


def test_training_mode() -> None:
    tensors = constants()
    training = batch_norm("c", "y", outputs=["m", "v"], training_mode=1)
    assert refused(double([conv(), training], tensors), FOLD) == {"training-mode": 1}
    old = batch_norm("c", "y", outputs=["m", "v", "sm", "sv"])
    assert refused(double([conv(), old], tensors, opset=9), FOLD) == {"training-mode": 1}


def test_not_per_channel() -> None:
    proto = double([conv(), batch_norm(spatial=0)], constants(), opset=7)
    assert refused(proto, FOLD) == {"not-per-channel": 1}


@pytest.mark.parametrize("name", ["w", "gamma", "beta", "mean", "var"])
def test_not_constant(name: str) -> None:
    tensors = constants()
    shape = tensors.pop(name).shape
    proto = double([conv(), batch_norm()], tensors)
    proto.graph.input.append(onnx.helper.make_tensor_value_info(name, DOUBLE, shape))
    assert refused(proto, FOLD) == {"not-constant": 1}


@pytest.mark.parametrize("name", ["w", "gamma", "beta", "mean", "var", "b"])
def test_overridable(name: str) -> None:
    proto = standard("b", also_inputs=[name])
    assert refused(proto, FOLD) == {"overridable": 1}
    applied(proto, FOLD, freeze_inputs=True)


def test_no_linear() -> None:
    proto = double([node("Relu", ["x"], ["c"]), batch_norm()], constants())
    assert refused(proto, FOLD) == {"no-linear": 1}


def test_shared_output() -> None:
    nodes = [conv(), batch_norm("c", "n"), node("Add", ["c", "n"])]
    assert refused(double(nodes, constants()), FOLD) == {"shared-output": 1}
    assert refused(double([conv(), batch_norm()], constants(), outputs=["y", "c"]), FOLD) == {"shared-output": 1}


def test_axis_mismatch() -> None:
    nodes = [node("MatMul", ["x", "w"], ["c"]), batch_norm()]
    assert refused(double(nodes, constants(w=np.eye(4)), x=(2, 4, 4)), FOLD) == {"axis-mismatch": 1}


def test_padding() -> None:
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "n"), conv("n", "y", pads=[1, 1, 1, 1])]
    assert refused(double(nodes, constants()), FOLD) == {"padding": 1}
    nodes[2] = conv("n", "y", auto_pad="SAME_UPPER")
    assert refused(double(nodes, constants()), FOLD) == {"padding": 1}
    nodes[2] = node("ConvTranspose", ["n", "w"])
    assert refused(double(nodes, constants()), FOLD) == {"padding": 1}
    unshifted = constants(beta=np.zeros(4), mean=np.zeros(4))  # a scale commutes with zeros
    applied(double(nodes, unshifted), FOLD)


@pytest.mark.parametrize("counted", [0, 1])
def test_padding_in_an_average(counted: int) -> None:
    pool = node("AveragePool", ["c"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=counted)
    proto = double([conv(), pool, batch_norm("p")], constants())
    if counted:
        assert refused(proto, FOLD) == {"padding": 1}
    else:
        applied(proto, FOLD)


@pytest.mark.parametrize(
    ("value", "gamma", "code"),
    [(0.0, 1.0, "padding"), (-np.inf, 1.0, None), (-np.inf, -1.0, "not-monotone"), (None, 1.0, "padding")],
)
def test_padding_that_is_normalized(value: float | None, gamma: float, code: str | None) -> None:
    """What is padded stays what it is where the normalization makes the same of it."""
    nodes = [
        conv(),
        node("Pad", ["c", "pads", "v"], ["p"]),
        batch_norm("p", "n"),
        node("MaxPool", ["n"], kernel_shape=[3, 3]),
    ]
    tensors = constants(pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]), gamma=np.full(4, gamma))
    if value is None:
        nodes.insert(0, node("ReduceMax", ["x"], ["v"], keepdims=0))
    else:
        tensors["v"] = np.array(value)
    proto = double(nodes, tensors)
    if code is None:
        applied(proto, FOLD)
    else:
        assert refused(proto, FOLD) == {code: 1}


def test_padding_of_the_channels() -> None:
    nodes = [conv(), node("Pad", ["c", "pads"], ["p"], mode="edge"), batch_norm("p")]
    pads = np.array([0, 1, 0, 0, 0, 1, 0, 0])
    wide = {name: np.full(6, 2.0) for name in ("gamma", "beta", "mean", "var")}
    assert refused(double(nodes, {**constants(), **wide, "pads": pads}), FOLD) == {"axis-mismatch": 1}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pool", ["MaxPool", "GlobalMaxPool", "ReduceMax"])
@pytest.mark.parametrize("gamma", [1.0, 0.0, -1.0])
def test_not_monotone(gamma: float, pool: str, ahead: bool) -> None:
    """A factor of zero would make nan of the infinity that a pool may be padded with."""
    attributes = {"MaxPool": {"kernel_shape": [3, 3]}, "ReduceMax": {"axes": [2, -1]}}.get(pool, {})
    nodes = [conv(), node(pool, ["c"], ["p"], **attributes), batch_norm("p")]
    if ahead:
        nodes = [
            node("Relu", ["x"], ["r"]),
            batch_norm("r", "n"),
            node(pool, ["n"], ["p"], **attributes),
            conv("p", "y", "point"),
        ]
    point = RNG.standard_normal((4, 4, 1, 1))
    proto = double(nodes, constants(gamma=np.array([1, gamma, 1, 1]), point=point), x=("N", 4, 9, 9))
    if gamma > 0:
        applied(proto, FOLD)
    else:
        assert refused(proto, FOLD) == {"not-monotone": 1}


def test_a_sum_with_an_operand_without_channels() -> None:
    nodes = [conv("x", "p"), node("MatMul", ["z", "m"], ["q"]), node("Add", ["p", "q"], ["c"]), batch_norm()]
    proto = double(nodes, constants(m=np.eye(6), z=np.eye(6)))
    assert refused(proto, FOLD) == {"axis-mismatch": 1}


def test_not_finite() -> None:
    none = constants(var=np.array([1.0, 0, 1, 1]))
    assert refused(double([conv(), batch_norm(epsilon=0.0)], none), FOLD) == {"not-finite": 1}
    half = {name: a.astype(np.float16) for name, a in constants().items()}
    half["w"], half["var"] = np.full_like(half["w"], 1000), np.full_like(half["var"], 1e-4)
    proto = model([conv(), batch_norm()], constants=half, dtype=onnx.TensorProto.FLOAT16)
    assert refused(proto, FOLD) == {"not-finite": 1}


@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "w"])
def test_what_is_not_finite_is_named(name: str) -> None:
    arrays = constants()
    arrays[name] = arrays[name].copy()
    arrays[name][1] = np.nan
    (remark,) = fuser.explain(double([conv(), batch_norm()], arrays), passes=[FOLD.name]).missed
    field = {"gamma": "scale", "beta": "bias"}.get(name, name)
    told = "the constants of conv_c are not finite" if name == "w" else f"channel 1 has {field} nan"
    assert remark.code == "not-finite" and told in remark.reason


def test_an_epsilon_that_the_caller_decides() -> None:
    norm = batch_norm()
    del norm.attribute[:]
    norm.attribute.add(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT)
    stored = [helper.make_node("Constant", [], [k], value=numpy_helper.from_array(v)) for k, v in constants().items()]
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("custom", "Block", ["x"], ["y"], [*stored, conv(), norm], imports, ["eps"])
    proto = model([helper.make_node("Block", ["x"], ["y"], domain="custom", eps=0.5)], functions=[function])
    assert refused(proto, FOLD) == {"not-constant": 1}


def test_shape_mismatch() -> None:
    proto = standard()
    proto.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(np.ones(3), "beta"))
    graph_codes = refused(proto, FOLD)
    assert graph_codes == {"shape-mismatch": 1}


def test_shared_weights() -> None:
    nodes = [conv("x", "p"), conv("x", "q"), batch_norm("p", "n"), node("Add", ["n", "q"])]
    proto = double(nodes, constants())
    assert refused(proto, FoldBatchNorm(shared_weights="refuse")) == {"shared-weights": 1}
    outcome, result = rewritten(proto, FOLD)
    assert "its own copy of a shared weight: 1,152 bytes" in outcome.applied[0].reason
    np.testing.assert_allclose(evaluate(result), evaluate(proto), rtol=1e-9, atol=1e-12)


def test_hooks() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    module[0].register_forward_hook(lambda *_: None)
    graph = Traced().build(module, (torch.zeros(1, 4, 8, 8),))
    assert [remark.code for remark in FOLD.run(graph)] == ["hooks"]


def test_rank() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()
    graph = Traced().build(module, (torch.zeros(2, 4),))
    assert [remark.code for remark in FOLD.run(graph)] == ["rank"]


def test_written() -> None:
    class Later(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            x = torch.sigmoid(x)
            y = self.norm(x)
            x.sub_(1)  # the convolution would see this
            return self.conv(y)

    graph = Traced().build(Later().eval(), (torch.zeros(1, 4, 8, 8),))
    assert [remark.code for remark in FOLD.run(graph)] == ["written"]


def test_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the algebra wrong, the fold would refuse."""
    monkeypatch.setattr("fuser.affine.scaled", lambda weight, factor, dtype: weight * 2)
    assert refused(standard("b"), FOLD) == {"unsound": 1}


# -- weights that are large


def large(tmp_path: Path, *nodes: onnx.NodeProto, external: bool, **tensors: np.ndarray) -> Path:
    path, channels = tmp_path / "large.onnx", 520
    found = {**conv_constants(channels, channels, 1), **tensors}
    proto = model([conv(), *nodes], constants=found, x=("N", channels, 4, 4))
    onnx.save(proto, path, save_as_external_data=external, location="large.data", size_threshold=1024)
    return path


def optimized(path: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """From the file, and from memory."""
    report = fuser.optimize(path, path.with_name("out.onnx")).report
    assert report.verification is not None and report.verification.passed
    return onnx.load(path.with_name("out.onnx")), fuser.optimize(onnx.load(path)).model


@pytest.mark.parametrize("external", [False, True])
def test_a_large_weight_takes_no_temporary_file(
    external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large(tmp_path, batch_norm(), external=external)
    expected = fuser.optimize(onnx.load(path)).model
    monkeypatch.setattr("fuser.files.model.Spool", NoSpool)
    fuser.optimize(path, tmp_path / "out.onnx", verify=False)
    (weight, *_), (right, *_) = (
        [numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.startswith("w")]
        for proto in (onnx.load(tmp_path / "out.onnx"), expected)
    )
    np.testing.assert_array_equal(weight, right)


class NoSpool:
    """One with room for what belongs to single channels."""

    size = 0

    def close(self) -> None:
        """Nothing is open."""

    def append(self, raw: Any) -> int:
        assert raw.nbytes < 1 << 14
        self.kept = [*getattr(self, "kept", []), raw.tobytes()]
        self.size += raw.nbytes
        return self.size - raw.nbytes

    def readinto(self, view: memoryview, offset: int) -> None:
        view[:] = b"".join(self.kept)[offset : offset + len(view)]

    fd = None


@pytest.mark.parametrize("external", [False, True])
def test_a_large_weight_that_is_folded_twice_is_the_one_from_memory(external: bool, tmp_path: Path) -> None:
    factor = RNG.uniform(0.5, 1.5, (520, 1, 1)).astype(np.float32)
    nodes = batch_norm("c", "n"), node("Mul", ["n", "m"], ["s"]), node("Relu", ["s"], ["y"])
    from_file, from_memory = optimized(large(tmp_path, *nodes, external=external, m=factor))
    assert op_types(from_file.graph) == op_types(from_memory.graph) == ["Conv", "Relu"]
    for a, b in zip(from_file.graph.initializer, from_memory.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))


LARGE_LAYERS = {
    "grouped": ((520, 260, 1, 2), lambda: conv("x", "c", group=2)),
    "depthwise": ((520, 1, 1, 1024), lambda: conv("x", "c", group=520)),
    "transposed": ((520, 520, 1, 1), lambda: node("ConvTranspose", ["x", "w"], ["c"])),
    "transposed and grouped": ((520, 260, 1, 2), lambda: node("ConvTranspose", ["x", "w"], ["c"], group=2)),
    "one output": ((1, 520, 23, 23), lambda: conv("x", "c")),
}


def bytes_kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """To be filled with what each weight that is computed keeps in memory until it is written."""
    kept: list[int] = []
    computed = ModelFile.computed

    def watched(model: ModelFile, name: str, base: Any, rows: Any) -> Any:
        kept.append(sum(cell.cell_contents.nbytes for cell in rows.__closure__))
        return computed(model, name, base, rows)

    monkeypatch.setattr(ModelFile, "computed", watched)
    return kept


@pytest.mark.parametrize("layer", LARGE_LAYERS)
@pytest.mark.parametrize("ahead", [False, True])
def test_large_layers_of_every_kind_are_those_from_memory(
    layer: str, ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, make = LARGE_LAYERS[layer]
    first = make()
    outputs = shape[1] * 2 if first.op_type == "ConvTranspose" and len(first.attribute) else shape[0]
    channels = 520 if ahead else outputs
    constants = {**conv_constants(4, channels), "w": RNG.standard_normal(shape).astype(np.float32) / 100}
    nodes = [first, batch_norm("c", "y")]
    if ahead:
        first.input[0], first.output[0] = "n", "y"
        nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "n"), first]
        if first.op_type == "ConvTranspose":  # a shift does not commute with it
            constants["beta"], constants["mean"] = np.zeros(520, np.float32), np.zeros(520, np.float32)
    path = tmp_path / "large.onnx"
    onnx.save(model(nodes, constants=constants, x=("N", 520, 23, 1024)), path)
    kept = bytes_kept(monkeypatch)
    from_file = fuser.optimize(path, tmp_path / "out.onnx", verify=False).report
    assert from_file.after.ops.get("BatchNormalization", 0) == 0
    assert sum(kept) <= 1 << 17  # of more than a megabyte; what would take more is stored
    from_memory = fuser.optimize(onnx.load(path), verify=False).model
    for a, b in zip(onnx.load(tmp_path / "out.onnx").graph.initializer, from_memory.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_factor_of_a_large_matrix_takes_no_space(
    turned: int, ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, size = bytes_kept(monkeypatch), 520
    gemm = node("Gemm", ["m" if ahead else "x", "w"], ["y" if ahead else "c"], transB=turned, alpha=0.5)
    scale = node("Mul", ["x" if ahead else "c", "s"], ["m" if ahead else "y"])
    constants = {name: RNG.standard_normal(shape).astype("f") for name, shape in (("w", (size, size)), ("s", size))}
    path = tmp_path / "large.onnx"
    onnx.save(model([scale, gemm] if ahead else [gemm, scale], constants=constants, x=("N", size)), path)
    report = fuser.optimize(path, tmp_path / "out.onnx").report
    assert report.after.ops == {"Gemm": 1}
    assert kept == [size * 8]


def test_a_large_weight_that_would_overflow_stays(tmp_path: Path) -> None:
    path = large(tmp_path, batch_norm(), external=False, gamma=np.full(520, 3e38, np.float32))
    (remark,) = fuser.optimize(path, tmp_path / "out.onnx", passes=["fold-batch-norm"]).report.missed
    assert remark.code == "not-finite"


def test_a_large_weight_of_a_module() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(520, 520, 1), torch.nn.BatchNorm2d(520)).eval()
    x = torch.randn(2, 520, 3, 3)
    result = fuser.optimize(module, example_inputs=(x,))
    assert [remark.pass_name for remark in result.report.applied] == ["fold-batch-norm"]
    torch.testing.assert_close(result.model(x), module(x))
