"""fold-pad: what is padded, by whom, and with what, on ONNX and torch."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from fuser.passes.eliminate_identity import EliminateIdentity
from fuser.passes.fold_batch_norm import FoldBatchNorm
from fuser.passes.fold_constants import FoldConstants
from fuser.passes.fold_pad import FoldPad
from fuzz_onnx import evaluator, widened
from hosts import Onnx
from hosts_torch import HOSTS, Exported, Lifted, Traced
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types
from rewriting import DOUBLE, applied, refused, rewritten
from torch import Tensor, nn

from fuser import pipeline
from fuser.files import ModelFile
from fuser.graphs.onnx.graph import OnnxGraph
from fuser.graphs.torch.graph import TorchGraph

FOLD = FoldPad()
RNG = np.random.default_rng(4)
LOWEST = float("-inf")


def pad(
    pads: Any,
    source: str = "x",
    target: str = "p",
    *,
    value: Any = None,
    axes: Any = None,
    opset: int = 18,
    dtype: Any = np.float64,
    **attributes: Any,
) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    """A Pad as its opset writes it, and its constants."""
    if opset < 11:
        more = {} if value is None else {"value": float(value)}
        return node("Pad", [source], [target], pads=list(pads), **more, **attributes), {}
    constants = {"pads": np.asarray(pads, np.int64)}
    inputs = [source, "pads"]
    if value is not None or axes is not None:
        inputs.append("" if value is None else "value")
    if value is not None:
        constants["value"] = np.asarray(value, dtype)
    if axes is not None:
        inputs.append("axes")
        constants["axes"] = np.asarray(axes, np.int64)
    return node("Pad", inputs, [target], **attributes), constants


def net(
    padding: tuple[onnx.NodeProto, dict[str, np.ndarray]],
    *after: onnx.NodeProto,
    before: Sequence[onnx.NodeProto] = (),
    opset: int = 18,
    **extra: Any,
) -> onnx.ModelProto:
    first, constants = padding
    weights = {**conv_constants(dtype=np.float64), **constants, **extra.pop("constants", {})}
    return model([*before, first, *after], constants=weights, dtype=DOUBLE, opset=opset, **extra)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(evaluator(proto).run(None, widened({"x": x}))[0])


def check(proto: onnx.ModelProto, x: np.ndarray, *, kept: list[str] | None = None) -> onnx.ModelProto:
    """The Pad is gone, and the function is the same in float64; the model stays legal."""
    outcome, result = rewritten(proto, FOLD)
    assert [str(remark) for remark in outcome.missed] == []
    assert "Pad" not in op_types(result.graph)
    if kept is not None:
        assert op_types(result.graph) == kept
    onnx.checker.check_model(result, full_check=True)
    wanted, found = run(proto, x), run(result, x)
    assert wanted.shape == found.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    return result


X = RNG.standard_normal((2, 4, 8, 8))

# -- folded


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 12, 13, 17, 18, 21, 22])
@pytest.mark.parametrize("value", [None, 0.0])
def test_every_opset(opset: int, value: float | None) -> None:
    proto = net(pad([0, 0, 1, 2, 0, 0, 3, 0], value=value, opset=opset), conv("p", "y"), opset=opset)
    result = check(proto, X, kept=["Conv"])
    assert list(result.graph.node[0].attribute[0].ints) == [1, 2, 3, 0]
    assert {tensor.name for tensor in result.graph.initializer} == {"w", "gamma", "beta", "mean", "var"}


@pytest.mark.parametrize(
    ("axes", "pads"),
    [([2, 3], [1, 2, 3, 0]), ([3, 2], [2, 1, 0, 3]), ([-1, 2], [2, 1, 0, 3]), ([-2, -1], [1, 2, 3, 0])],
)
def test_axes_in_any_order_and_sign(axes: list[int], pads: list[int]) -> None:
    result = check(net(pad(pads, axes=axes), conv("p", "y")), X)
    assert list(result.graph.node[0].attribute[0].ints) == [1, 2, 3, 0]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_convolution(data: st.DataObject) -> None:
    draw = data.draw
    spatial = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = [draw(st.integers(1, 3)) for _ in range(spatial)]
    side = st.integers(0, 3)
    own = [draw(side) for _ in range(2 * spatial)]
    axes = draw(st.permutations(range(2, 2 + spatial)))[: draw(st.integers(1, spatial))]
    added = [draw(side) for _ in range(2 * len(axes))]
    named = [axis - (spatial + 2) if draw(st.booleans()) else axis for axis in axes]
    attributes = {
        "group": groups,
        "strides": [draw(st.integers(1, 3)) for _ in kernel],
        "dilations": [draw(st.integers(1, 2)) for _ in kernel],
    }
    if draw(st.booleans()):
        attributes["pads"] = own
    x = RNG.standard_normal((2, 4, *[6] * spatial))
    weight = {"v": RNG.standard_normal((4, 4 // groups, *kernel))}
    proto = net(pad(added, axes=named), conv("p", "y", "v", **attributes), x=x.shape, constants=weight)
    if any(added):
        check(proto, x, kept=["Conv"])
    else:  # an identity
        assert op_types(applied(proto, EliminateIdentity(), bound=0).graph) == ["Conv"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pool(data: st.DataObject) -> None:
    """Whatever it answers is right, and most of the time it is "applied"."""
    draw = data.draw
    spatial = draw(st.integers(1, 3))
    kernel = [draw(st.integers(2, 4)) for _ in range(spatial)]
    side = st.integers(0, 2)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": [draw(st.integers(1, 3)) for _ in kernel]}
    if draw(st.booleans()):
        attributes["pads"] = [draw(st.integers(0, 1)) for _ in range(2 * spatial)]
    if draw(st.booleans()):
        attributes["ceil_mode"] = draw(st.integers(0, 1))
    operator = draw(st.sampled_from(["AveragePool", "MaxPool"]))
    if operator == "AveragePool" and draw(st.booleans()):
        attributes["count_include_pad"] = 1
    if operator == "MaxPool" and draw(st.booleans()):
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in kernel]
    value = 0.0 if operator == "AveragePool" else draw(st.sampled_from([LOWEST, np.finfo(np.float64).min, 0.0]))
    pads = [0, 0, *(draw(side) for _ in range(spatial)), 0, 0, *(draw(side) for _ in range(spatial))]
    x = RNG.standard_normal((2, 4, *[draw(st.integers(7, 9)) for _ in kernel]))
    proto = net(pad(pads, value=value), node(operator, ["p"], **attributes), x=x.shape)
    outcome, result = rewritten(proto, FOLD)
    assert {remark.code for remark in outcome.missed} <= {"geometry", "value", "window"}
    np.testing.assert_allclose(run(result, x), run(proto, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_automatic_padding_of_a_known_size(mode: str, stride: int) -> None:
    proto = net(pad([0, 0, 1, 0, 0, 0, 0, 2]), conv("p", "y", auto_pad=mode, strides=[stride] * 2))
    result = check(proto, X)
    assert {a.name for a in result.graph.node[0].attribute} == {"pads", "strides"}


def test_everything_that_reads_it_takes_it() -> None:
    after = [conv("p", "a"), node("AveragePool", ["p"], ["b"], kernel_shape=[3, 3]), node("Add", ["a", "b"])]
    check(net(pad([0, 0, 1, 1, 0, 0, 1, 1]), *after), X, kept=["Conv", "AveragePool", "Add"])


def test_pads_that_nodes_compute() -> None:
    first, constants = pad([0, 0, 1, 1, 0, 0, 1, 1])
    computed = node("Concat", ["half", "half"], ["pads"], axis=0)
    proto = net((first, {"half": constants["pads"][:4]}), conv("p", "y"), before=[computed])
    check(proto, X, kept=["Conv"])


@pytest.mark.parametrize("before", ["Relu", "Sigmoid", "Clip"])
def test_zeros_are_below_what_is_not_negative(before: str) -> None:
    """A network from Keras pads behind the first ReLU."""
    pool = node("MaxPool", ["p"], kernel_shape=[3, 3], strides=[2, 2])
    first = node(before, ["x", "zero"] if before == "Clip" else ["x"], ["r"])
    proto = net(pad([0, 0, 1, 1, 0, 0, 1, 1], "r"), pool, before=[first], constants={"zero": np.array(0.0)})
    check(proto, X, kept=[before, "MaxPool"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.uint8, np.int8])
def test_the_lowest_number_of_a_type_is_below_all(dtype: Any) -> None:
    lowest = np.finfo(dtype).min if np.dtype(dtype).kind == "f" else np.iinfo(dtype).min
    first, constants = pad([0, 0, 1, 1, 0, 0, 1, 1], value=lowest, dtype=dtype)
    pool = node("MaxPool", ["p"], kernel_shape=[3, 3])
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    _, result = rewritten(model([first, pool], constants=constants, dtype=kind, opset=18), FOLD)
    assert op_types(result.graph) == ["MaxPool"]


def test_stated_shapes_stay_true() -> None:
    """The value in front keeps its own shape, and what is said of the padded one goes with it."""
    proto = net(pad([0, 0, 1, 1, 0, 0, 1, 1], "r"), conv("p", "y"), before=[node("Relu", ["x"], ["r"])])
    proto = onnx.shape_inference.infer_shapes(proto)
    result = check(proto, X, kept=["Relu", "Conv"])
    assert [info.name for info in result.graph.value_info] == ["r"]
    assert [one.doc_string for one in result.graph.node] == ["", "fuser.folded: pad_p"]


def test_a_batch_norm_in_between_goes_first() -> None:
    proto = net(pad([0, 0, 1, 1, 0, 0, 1, 1]), batch_norm("p", "n"), conv("n", "y"), opset=17)
    outcome, result = rewritten(proto, FoldBatchNorm(), FOLD)
    assert outcome.missed == [] and op_types(result.graph) == ["Conv"]
    np.testing.assert_allclose(run(result, X), run(proto, X), rtol=1e-9, atol=1e-9)


def test_a_batch_norm_in_front_does_not_commute_with_padding() -> None:
    before = [node("Relu", ["x"], ["r"]), batch_norm("r", "n")]
    proto = net(pad([0, 0, 1, 1, 0, 0, 1, 1], "n"), conv("p", "y"), before=before, opset=17)
    outcome, result = rewritten(proto, FoldBatchNorm(), FOLD)
    assert [remark.code for remark in outcome.missed] == ["padding"]
    np.testing.assert_allclose(run(result, X), run(proto, X), rtol=1e-12, atol=1e-12)


# -- refused


ONES = [0, 0, 1, 1, 0, 0, 1, 1]

REFUSED: dict[str, tuple[str, Callable[[], onnx.ModelProto]]] = {
    "reflect": ("mode", lambda: net(pad(ONES, mode="reflect"), conv("p", "y"))),
    "edge": ("mode", lambda: net(pad(ONES, mode="edge"), conv("p", "y"))),
    "wrap": ("mode", lambda: net(pad(ONES, mode="wrap"), conv("p", "y"), opset=19)),
    "negative": ("negative", lambda: net(pad([0, 0, 1, -1, 0, 0, 1, 1]), conv("p", "y"))),
    "negative-in-all": ("negative", lambda: net(pad([0, 0, -1, 0, 0, 0, 0, 0]), conv("p", "y", pads=[1, 1, 1, 1]))),
    "value": ("value", lambda: net(pad(ONES, value=0.5), conv("p", "y"))),
    "value-7": ("value", lambda: net(pad(ONES, value=1.0, opset=7), conv("p", "y"), opset=7)),
    "batch": ("axes", lambda: net(pad([1, 0, 1, 1, 0, 0, 1, 1]), conv("p", "y"))),
    "channels": ("axes", lambda: net(pad([0, 1, 1, 1, 0, 1, 1, 1]), conv("p", "y"), x=("N", 2, 8, 8))),
    "read-elsewhere": (
        "shared-output",
        lambda: net(pad(ONES), conv("p", "c"), node("Relu", ["p"], ["r"]), node("MatMul", ["c", "r"])),
    ),
    "measured": (
        "shared-output",
        lambda: net(pad(ONES), conv("p", "c"), node("Shape", ["p"], ["s"]), node("Expand", ["c", "s"])),
    ),
    "output": ("shared-output", lambda: net(pad(ONES), conv("p", "y"), outputs=["y", "p"])),
    "transposed": ("geometry", lambda: net(pad(ONES), node("ConvTranspose", ["p", "w"]))),
    "same": (
        "geometry",
        lambda: net(pad(ONES), conv("p", "y", auto_pad="SAME_UPPER", strides=[2, 2]), x=("N", 4, "H", "W")),
    ),
    "global": ("geometry", lambda: net(pad(ONES), node("GlobalAveragePool", ["p"]))),
    "ceil": ("geometry", lambda: net(pad(ONES), node("AveragePool", ["p"], kernel_shape=[3, 3], ceil_mode=1))),
    "dilated": (
        "geometry",
        lambda: net(pad(ONES, value=LOWEST), node("MaxPool", ["p"], kernel_shape=[2, 2], dilations=[2, 2])),
    ),
    "max-of-zeros": ("value", lambda: net(pad(ONES), node("MaxPool", ["p"], kernel_shape=[3, 3]))),
    "mean-of-ones": ("value", lambda: net(pad(ONES, value=1.0), node("AveragePool", ["p"], kernel_shape=[3, 3]))),
    "own-zeros-not-counted": (
        "value",
        lambda: net(pad(ONES), node("AveragePool", ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])),
    ),
    "wide": ("window", lambda: net(pad(ONES), node("AveragePool", ["p"], kernel_shape=[1, 3]))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    code, build = REFUSED[name]
    assert refused(build(), FOLD) == {code: 1}


def test_not_constant() -> None:
    proto = net(pad(ONES), conv("p", "y"))
    del proto.graph.initializer[-1]
    proto.graph.input.append(onnx.helper.make_tensor_value_info("pads", onnx.TensorProto.INT64, [8]))
    assert refused(proto, FOLD) == {"not-constant": 1}
    proto = net(pad(ONES, value=0.0), conv("p", "y"))
    del proto.graph.initializer[-1]
    proto.graph.input.append(onnx.helper.make_tensor_value_info("value", DOUBLE, []))
    assert refused(proto, FOLD) == {"not-constant": 1}


def test_overridable() -> None:
    proto = net(pad(ONES), conv("p", "y"), also_inputs=["pads"])
    assert refused(proto, FOLD) == {"overridable": 1}


def test_rank() -> None:
    """Inside a function nobody knows how many axes there are; counted from behind they need not be known."""
    assert _in_function([2, 3]) == {"rank": 1}
    assert _in_function([-2, -1]) == {"applied": 1}


def _in_function(axes: list[int]) -> Counter[str]:
    tensors = {
        "pads": np.ones(4, np.int64),
        "axes": np.array(axes),
        "w": RNG.standard_normal((4, 4, 3, 3)),
    }
    nodes = [
        *(node("Constant", [], [name], value=onnx.numpy_helper.from_array(t)) for name, t in tensors.items()),
        node("Pad", ["a", "pads", "", "axes"], ["p"]),
        conv("p", "b"),
    ]
    imports = [onnx.helper.make_opsetid("", 18)]
    function = onnx.helper.make_function("custom", "Block", ["a"], ["b"], nodes, imports)
    call = node("Block", ["x"], ["y"], domain="custom")
    graph = OnnxGraph(ModelFile.from_proto(model([call], opset=18, dtype=DOUBLE, functions=[function])))
    return Counter(remark.code for remark in FOLD.run(graph))


def test_nothing_that_pads_reads_it() -> None:
    assert refused(net(pad(ONES), node("Relu", ["p"])), FOLD) == {}


def test_a_weight_that_is_padded_stays() -> None:
    proto = net(
        pad([0, 0, 1, 1, 0, 0, 1, 1]), conv("p", "a"), conv("x", "b", "p"), node("Add", ["a", "b"]), x=(4, 4, 1, 1)
    )
    assert refused(proto, FOLD) == {"shared-output": 1}


# -- every host


@dataclass(frozen=True)
class Padded:
    """A net, its input, the remarks of fold-pad by code, and those of hosts that see more or less."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    codes: dict[str, int]
    elsewhere: dict[str, dict[str, int]] = field(default_factory=dict)


def after_pad(pad: nn.Module, *layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 1), copy.deepcopy(pad), *copy.deepcopy(layers))


def functional(pad: Callable[[Tensor], Tensor], *layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Net(lambda m, x: m.after(pad(x)), after=nn.Sequential(*copy.deepcopy(layers)))


def written_into() -> nn.Module:
    """The input of the Pad changes before the convolution would read it."""

    def wiring(m: Net, x: Tensor) -> Tensor:
        y = m.first(x)
        padded = F.pad(y, (1, 1, 1, 1))
        y.mul_(2)
        return m.second(padded) + y.sum()

    return Net(wiring, first=nn.Conv2d(4, 4, 1), second=nn.Conv2d(4, 4, 3))


def watched() -> nn.Module:
    net = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3))
    net[1].register_forward_hook(lambda module, args, y: y * 2)
    return net


IMAGE = (2, 4, 8, 9)
ON_ONNX = "Onnx"

CASES: dict[str, Padded] = {
    "conv2d": Padded(after_pad(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(4, 6, 3, padding=1)), IMAGE, {"applied": 1}),
    "conv1d": Padded(lambda: nn.Sequential(nn.ZeroPad1d(2), nn.Conv1d(4, 6, 3)), (2, 4, 9), {"applied": 1}),
    "conv3d": Padded(lambda: nn.Sequential(nn.ZeroPad3d(1), nn.Conv3d(4, 6, 3)), (2, 4, 5, 5, 5), {"applied": 1}),
    "grouped": Padded(
        after_pad(nn.ConstantPad2d(1, 0.0), nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=2)), IMAGE, {"applied": 1}
    ),
    "one-axis": Padded(functional(lambda x: F.pad(x, (1, 1)), nn.Conv2d(4, 6, 3)), IMAGE, {"applied": 1}),
    "constant-pad-nd": Padded(
        functional(lambda x: torch.constant_pad_nd(x, (1, 1, 2, 2), 0.0), nn.Conv2d(4, 6, 3)), IMAGE, {"applied": 1}
    ),
    "functional-conv": Padded(
        lambda: Net(lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=0), m.conv.weight), conv=nn.Conv2d(4, 6, 3)),
        IMAGE,
        {"applied": 1},
    ),
    "valid": Padded(after_pad(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3, padding="valid")), IMAGE, {"applied": 1}),
    "same-even": Padded(
        after_pad(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(4, 6, 2, padding="same")),
        IMAGE,
        {"applied": 1},
        {"Decomposed": {"asymmetric": 1}},  # a Pad of its own
    ),
    "two-readers": Padded(
        lambda: Net(
            lambda m, x: m.a(y := m.pad(x)) + m.b(y), pad=nn.ZeroPad2d(1), a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 6, 3)
        ),
        IMAGE,
        {"applied": 1},
    ),
    "called-twice": Padded(
        lambda: Net(lambda m, x: m.conv(m.pad(m.conv(x))), pad=nn.ZeroPad2d(1), conv=nn.Conv2d(4, 4, 3)),
        IMAGE,
        {"applied": 1},
    ),
    "two-pads": Padded(after_pad(nn.ZeroPad2d(1), nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)), IMAGE, {"applied": 2}),
    "average": Padded(after_pad(nn.ZeroPad2d(1), nn.AvgPool2d(3, 2)), IMAGE, {"applied": 1}, {"Traced": {}}),
    "average-more": Padded(
        after_pad(nn.ZeroPad2d(1), nn.AvgPool2d(4, 2, padding=1)), IMAGE, {"applied": 1}, {"Traced": {}}
    ),
    "functional-average": Padded(
        functional(lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, count_include_pad=False), nn.Identity()),
        IMAGE,
        {"applied": 1},
        {"Traced": {}},
    ),
    "max": Padded(after_pad(nn.ConstantPad2d(1, LOWEST), nn.MaxPool2d(3, 2)), IMAGE, {"applied": 1}),
    "functional-max": Padded(
        functional(lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=LOWEST), 3, 2), nn.Identity()),
        IMAGE,
        {"applied": 1},
    ),
    "max-of-relu": Padded(
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)), IMAGE, {"applied": 1}
    ),
    "max-of-relu-in-place": Padded(
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)),
        IMAGE,
        {"applied": 1},
    ),
    "channels-last": Padded(
        lambda: Net(
            lambda m, x: m.conv(F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1))).permute(0, 2, 3, 1).flatten(1),
            conv=nn.Conv2d(4, 6, 3),
        ),
        (2, 8, 9, 4),
        {"applied": 1},
    ),
    # -- refused
    "asymmetric": Padded(
        after_pad(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 6, 3, stride=2)),
        IMAGE,
        {"asymmetric": 1},
        {ON_ONNX: {"applied": 1}},
    ),
    "half-a-window": Padded(
        after_pad(nn.ConstantPad2d(2, LOWEST), nn.MaxPool2d(3)), IMAGE, {"window": 1}, {ON_ONNX: {"applied": 1}}
    ),
    "reflect": Padded(after_pad(nn.ReflectionPad2d(1), nn.Conv2d(4, 6, 3)), IMAGE, {"mode": 1}, {"Decomposed": {}}),
    "replicate": Padded(after_pad(nn.ReplicationPad2d(1), nn.Conv2d(4, 6, 3)), IMAGE, {"mode": 1}, {"Decomposed": {}}),
    "negative": Padded(after_pad(nn.ZeroPad2d((1, -1, 0, 0)), nn.Conv2d(4, 6, 3)), IMAGE, {"negative": 1}),
    "value": Padded(after_pad(nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 6, 3)), IMAGE, {"value": 1}),
    "max-of-zeros": Padded(after_pad(nn.ZeroPad2d(1), nn.MaxPool2d(3)), IMAGE, {"value": 1}),
    "channels": Padded(functional(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), nn.Conv2d(6, 6, 3)), IMAGE, {"axes": 1}),
    "transposed": Padded(after_pad(nn.ZeroPad2d(1), nn.ConvTranspose2d(4, 6, 3)), IMAGE, {"geometry": 1}),
    "padding-mode": Padded(
        after_pad(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
        IMAGE,
        {"mode": 1},  # of the convolution, which is two operators there
        {"Traced": {"geometry": 1}, ON_ONNX: {}, "Decomposed": {}},
    ),
    "ceil": Padded(after_pad(nn.ConstantPad2d(1, LOWEST), nn.MaxPool2d(3, 2, ceil_mode=True)), IMAGE, {"geometry": 1}),
    "read-elsewhere": Padded(
        lambda: Net(lambda m, x: m.conv(y := m.pad(x)) + y.mean(), pad=nn.ZeroPad2d(1), conv=nn.Conv2d(4, 6, 3)),
        IMAGE,
        {"shared-output": 1},
    ),
    "measured": Padded(
        lambda: Net(
            lambda m, x: m.conv(y := m.pad(x)).reshape(y.shape[0], -1), pad=nn.ZeroPad2d(1), conv=nn.Conv2d(4, 6, 3)
        ),
        IMAGE,
        {"applied": 1},
        {"Traced": {"shared-output": 1}},
    ),
}


@pytest.fixture(params=[Onnx, *HOSTS], ids=lambda host: host.__name__)
def host(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("name", CASES)
def test_the_remarks_and_the_function(host: Any, name: str) -> None:
    case = CASES[name]
    torch.manual_seed(2)
    module, x = case.build().eval(), torch.randn(case.shape)
    truth = copy.deepcopy(module).double()(x.double()).detach().numpy()
    if not isinstance(host, Onnx):
        module, x = module.double(), x.double()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    graph = host.build(module, (x,))
    outcome = pipeline.run(graph, [FoldConstants(), FOLD])
    remarks = [r for r in (*outcome.applied, *outcome.missed) if r.pass_name == FOLD.name]
    assert Counter(r.code for r in remarks) == case.elsewhere.get(type(host).__name__, case.codes)
    left = [op for op in graph.summary().ops if "pad" in op.lower()]
    assert not left or {r.code for r in remarks} != {"applied"}
    found = host.run(host.result(graph), x)
    bound = 2e-6 if isinstance(host, Onnx) else 1e-13
    assert found.shape == truth.shape
    assert np.abs(found - truth).max() <= bound * np.abs(truth).max()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not pipeline.run(graph, [FOLD]).applied


def test_written() -> None:
    torch.manual_seed(2)
    module, x = written_into().double().eval(), torch.randn(IMAGE).double()
    graph = Traced().build(module, (x,))
    assert [remark.code for remark in FOLD.run(graph)] == ["written"]
    np.testing.assert_array_equal(Traced().run(graph.result(), x), module(x).detach())


def test_hooks() -> None:
    graph = Traced().build(watched(), ())
    assert [remark.code for remark in FOLD.run(graph)] == ["hooks"]


def test_sizes_of_the_run() -> None:
    class Centered(nn.Module):
        """As timm does: as much as it takes for ceil(size / stride) windows."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=2)

        def forward(self, x: Tensor) -> Any:
            return self.conv(F.pad(x, (0, x.shape[-1] % 2, 1, 1)))

    module = Centered().eval()
    graph = Traced().build(module, ())
    assert [remark.code for remark in FOLD.run(graph)] == ["not-constant"]


@pytest.mark.parametrize("host", [Exported, Lifted])
def test_layout(host: Any) -> None:
    """A Pad of rows that are columns in memory makes an ordinary image of them; the operator itself does not."""

    def wiring(m: Net, x: Tensor) -> Tensor:
        return m.pool(F.pad(x.transpose(2, 3), (1, 1, 1, 1), value=LOWEST))

    module, x = Net(wiring, pool=nn.MaxPool2d(3)).eval(), torch.randn(IMAGE).double()
    graph = host().build(module, (x,))
    assert [remark.code for remark in FOLD.run(graph)] == ["layout"]
    np.testing.assert_array_equal(host().run(host().result(graph), x), module(x).detach())


def test_a_preserved_signature_names_what_is_left() -> None:
    module, x = after_pad(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3))().eval().double(), torch.randn(IMAGE).double()
    program = torch.export.export(module, (x,), preserve_module_call_signature=("1", "2"))
    graph = TorchGraph.from_exported_program(program)
    assert [remark.code for remark in FOLD.run(graph)] == ["applied"]
    graph.commit()
    result = graph.result()
    result.validate()
    found = torch.export.unflatten(result)(x)
    np.testing.assert_allclose(found.detach(), module(x).detach(), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_torch_operator(data: st.DataObject) -> None:
    """Whatever it answers is right, traced and exported."""
    draw = data.draw
    spatial = draw(st.integers(1, 3))
    side = st.integers(-1, 2)
    pairs = [draw(side) for _ in range(2 * draw(st.integers(1, spatial)))]
    if draw(st.booleans()):
        pairs = [side for side in pairs[::2] for _ in range(2)]
    value = draw(st.sampled_from([0.0, 0.0, LOWEST, 1.0]))
    size, stride = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    kind = draw(st.sampled_from(["Conv", "Conv", "MaxPool", "AvgPool"]))
    layer = getattr(nn, f"{kind}{spatial}d")
    options: dict[str, Any] = {"stride": stride, "padding": draw(st.integers(0, size // 2))}
    if kind == "Conv":
        made = layer(4, 4, size, groups=draw(st.sampled_from([1, 2, 4])), dilation=draw(st.integers(1, 2)), **options)
    else:
        if kind == "AvgPool":
            options["count_include_pad"] = draw(st.booleans())
        made = layer(size, ceil_mode=draw(st.booleans()), **options)
    relu = draw(st.booleans())

    def wiring(m: Net, x: Tensor) -> Tensor:
        return m.layer(F.pad(torch.relu(x) if relu else x, pairs, value=value))

    module, x = (
        Net(wiring, layer=made).double().eval(),
        torch.randn(2, 4, *[9] * spatial).double(),
    )  # the widest window is 7, and 2 are cropped
    wanted = module(x).detach().numpy()
    for host in (Traced(), Exported()):
        graph = host.build(module, (x,))
        FOLD.run(graph)
        graph.commit()
        found = host.run(host.result(graph), x)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
