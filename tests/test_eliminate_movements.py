"""eliminate-movements: there and back again is nothing, on every host."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fuser.passes.eliminate_identity import EliminateIdentity
from fuser.passes.eliminate_movements import EliminateMovements
from fuser.passes.fold_constants import FoldConstants
from hosts import HOSTS
from hosts_torch import Traced
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net
from onnx.reference import ReferenceEvaluator
from onnx_models import body, model, node, op_types
from rewriting import DOUBLE, applied, refused, rewritten
from torch import Tensor, nn

from fuser import pipeline

ELIMINATE = EliminateMovements()

Wiring = Callable[[Net, Tensor], Tensor]

NETS: dict[str, tuple[Wiring, int]] = {
    "transpose-back": (lambda m, x: x.exp().transpose(1, 3).transpose(1, 3) + 1, 1),
    "permute-back": (lambda m, x: x.exp().permute(0, 2, 3, 1).permute(0, 3, 1, 2) + 1, 1),
    "permute-on": (lambda m, x: x.exp().permute(0, 2, 3, 1).permute(0, 2, 3, 1) + 1, 1),
    "transpose-on": (lambda m, x: x.exp().transpose(1, -1).permute(0, 2, 3, 1) + 1, 1),
    "permute-read": (lambda m, x: (y := x.exp().permute(0, 2, 3, 1)).permute(0, 2, 3, 1).flatten() + y.flatten(), 0),
    "reshape-back": (lambda m, x: x.exp().reshape(2, 4, 16).reshape(2, 4, 4, 4) + 1, 1),
    "reshape-on": (lambda m, x: x.exp().reshape(2, 64).reshape(8, 16) + 1, 1),
}


ELSEWHERE = {
    ("Onnx", "transpose-back"): 0,  # the exporter has done that
    ("Onnx", "permute-back"): 0,
    ("Onnx", "permute-on"): 0,
    ("Onnx", "transpose-on"): 0,
    ("Traced", "transpose-back"): 0,  # the rank is not known
}


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@pytest.mark.parametrize("name", NETS)
def test_the_same_bits_without_the_detour(host: Any, name: str) -> None:
    wiring, count = NETS[name]
    module, x = Net(wiring), torch.randn(2, 4, 4, 4)
    before = host().run(host().result(host().build(module, (x,))), x)
    graph = host().build(module, (x,))
    outcome = pipeline.run(graph, [FoldConstants(), EliminateIdentity(), ELIMINATE])
    removed = sum(remark.pass_name == "eliminate-movements" for remark in outcome.applied)
    assert (removed, outcome.missed) == (ELSEWHERE.get((host.__name__, name), count), [])
    np.testing.assert_array_equal(host().run(host().result(graph), x), before)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(4)))
def test_exactly_the_inverse_goes(p: list[int], q: list[int]) -> None:
    nodes = [node("Transpose", ["x"], ["a"], perm=p), node("Transpose", ["a"], ["b"], perm=q), node("Neg", ["b"])]
    _, result = rewritten(model(nodes, x=(2, 3, 4, 5)), EliminateIdentity(), ELIMINATE)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    both = x.transpose(p).transpose(q)
    assert op_types(result.graph).count("Transpose") == (both.shape != x.shape)
    np.testing.assert_array_equal(ReferenceEvaluator(result).run(None, {"x": x})[0], -both)


@pytest.mark.parametrize(
    "second",
    [[2, -1], [0, -1], [-1, 8, 8], [-1, 0]],
    ids=["says-all", "copies", "another-rank", "copies-the-last"],
)
def test_a_size_that_is_copied_is_said(second: list[int]) -> None:
    nodes = [node("Reshape", ["x", "s"], ["a"]), node("Reshape", ["a", "t"], ["b"]), node("Neg", ["b"])]
    constants = {"s": np.array([8, -1]), "t": np.array(second)}
    proto = model(nodes, x=("N", 4, "M", 8), constants=constants)
    outcome, result = rewritten(proto, ELIMINATE)
    assert len(outcome.applied) == 1
    assert op_types(result.graph) == ["Reshape", "Neg"]
    x = np.random.default_rng(0).standard_normal((3, 4, 2, 8)).astype(np.float32)
    before, after = (ReferenceEvaluator(one).run(None, {"x": x})[0] for one in (proto, result))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("batch", [2, "N"])
@pytest.mark.parametrize("opset", [7, 11, 17, 21])
def test_what_only_changes_the_shape_is_one_reshape(opset: int, batch: int | str) -> None:
    def axes(*numbers: int) -> tuple[list[str], dict[str, list[int]]]:
        return ([f"axes{numbers[0]}"], {}) if opset >= 13 else ([], {"axes": list(numbers)})

    (first, one), (second, two) = axes(1), axes(3)
    nodes = [
        node("Flatten", ["x"], ["f"], axis=1),
        node("Unsqueeze", ["f", *first], ["u"], **one),
        node("Unsqueeze", ["u", *second], ["v"], **two),
        node("Squeeze", ["v", *first], ["s"], **one),
        node("Neg", ["s"]),
    ]
    constants = {"axes1": np.array([1]), "axes3": np.array([3])} if opset >= 13 else {}
    proto = model(nodes, x=(batch, 4, 3), constants=constants, opset=opset, dtype=DOUBLE)
    result = applied(proto, ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Reshape", "Neg"]
    assert not rewritten(result, ELIMINATE)[0].applied


def test_an_empty_shape_is_not_said() -> None:
    """A zero in the target of a Reshape copies a size."""
    nodes = [node("Unsqueeze", ["x", "a"], ["u"]), node("Unsqueeze", ["u", "a"], ["v"]), node("Neg", ["v"])]
    assert refused(model(nodes, x=(2, 0, 4), constants={"a": np.array([0])}), ELIMINATE) == {}


def test_two_sizes_that_are_not_known_are_not_said() -> None:
    nodes = [node("Unsqueeze", ["x", "a"], ["u"]), node("Unsqueeze", ["u", "a"], ["v"]), node("Neg", ["v"])]
    assert refused(model(nodes, x=("N", 3, "M"), constants={"a": np.array([0])}), ELIMINATE) == {}


def test_a_transpose_in_a_body_that_may_run_often_stays_there() -> None:
    branch = [node("Transpose", ["t"], ["b"], perm=[1, 2, 0, 3])]
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 2, 0, 3]),
        node("If", ["yes"], then_branch=body(branch, ["b"]), else_branch=body([node("Neg", ["x"], ["c"])], ["c"])),
    ]
    proto = model(nodes, x=(4, 4, 4, 4), constants={"yes": np.array(True)})
    assert refused(proto, ELIMINATE) == {}


def test_a_reshape_that_others_read_stays() -> None:
    nodes = [node("Reshape", ["x", "s"], ["a"]), node("Reshape", ["a", "t"], ["b"]), node("Neg", ["b"])]
    constants = {"s": np.array([8, -1]), "t": np.array([4, -1])}
    for other in ([node("Exp", ["a"], ["z"])], [node("Shape", ["a"], ["s2"]), node("Cast", ["s2"], ["z"], to=1)]):
        proto = model([*nodes, *other], x=(2, 4, 8, 8), constants=constants, outputs=["y", "z"])
        assert refused(proto, ELIMINATE) == {}


def test_back_to_the_shape_it_had_though_others_read_what_is_between() -> None:
    nodes = [
        node("Neg", ["x"], ["n"]),
        node("Reshape", ["n", "s"], ["a"]),
        node("Reshape", ["a", "t"], ["b"]),
        node("Neg", ["b"]),
        node("Exp", ["a"], ["z"]),
    ]
    constants = {"s": np.array([8, -1]), "t": np.array([2, 4, 8, 8])}
    result = applied(model(nodes, x=(2, 4, 8, 8), constants=constants, outputs=["y", "z"]), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Neg", "Reshape", "Neg", "Exp"]


def test_both_public() -> None:
    nodes = [node("Transpose", ["x"], ["a"], perm=[0, 2, 1, 3]), node("Transpose", ["a"], perm=[0, 2, 1, 3])]
    assert refused(model(nodes, x=(2, 4, 8, 8)), ELIMINATE) == {"both-public": 1}


def test_written() -> None:
    def wiring(m: Net, x: Tensor) -> Tensor:
        y = x * 2
        z = y.permute(1, 0).permute(1, 0)
        y.add_(1)
        return z * y

    outcome = pipeline.run(Traced().build(Net(wiring), ()), [ELIMINATE])
    assert [remark.code for remark in (*outcome.applied, *outcome.missed)] == ["written"]


def test_a_long_chain() -> None:
    names = ["x", *(f"t{i}" for i in range(2000)), "y"]
    nodes = [node("Transpose", [a], [b], perm=[0, 2, 1, 3]) for a, b in itertools.pairwise(names[:-1])]
    outcome, result = rewritten(model([*nodes, node("Neg", [names[-2]])], x=(2, 4, 4, 4)), ELIMINATE)
    assert op_types(result.graph) == ["Neg"] and len(outcome.applied) >= 1000


def test_nn_modules_are_movements_too() -> None:
    module = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (4, 16)), nn.ReLU())
    assert pipeline.run(Traced().build(module, ()), [ELIMINATE]).applied == []  # Flatten copies the batch


def test_what_is_declared_of_a_name_stays_true() -> None:
    """The Relu may not write under the name of the reshaped value, which is declared in another shape."""
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Reshape", ["r", "flat"], ["f"]),
        node("Reshape", ["f", "wide"], ["w"]),
        node("Neg", ["w"]),
    ]
    proto = model(nodes, x=(2, 4, 3), constants={"flat": np.array([8, 3]), "wide": np.array([2, 2, 6])}, dtype=DOUBLE)
    proto.graph.value_info.add().CopyFrom(onnx.helper.make_tensor_value_info("f", DOUBLE, [8, 3]))
    result = applied(proto, ELIMINATE)
    assert op_types(result.graph) == ["Relu", "Reshape", "Neg"]


@pytest.mark.parametrize(
    ("shape", "permutation", "goes"),
    [
        ((2, 1, 1, 8), [0, 3, 1, 2], True),
        ((2, 1, 4, 1), [0, 2, 3, 1], True),
        ((1, 1, 1, 1), [3, 2, 1, 0], True),
        (("N", 1, 8), [0, 2, 1], True),
        ((2, 4, 1, 8), [0, 3, 1, 2], False),
        (("N", 8, 1), [1, 0, 2], False),
    ],
)
def test_a_transpose_of_single_elements_is_a_reshape(
    shape: tuple[int | str, ...], permutation: list[int], goes: bool
) -> None:
    nodes = [node("Transpose", ["x"], ["t"], perm=permutation), node("Reshape", ["t", "s"], ["r"]), node("Neg", ["r"])]
    proto = model(nodes, x=shape, constants={"s": np.array([-1, 4 if 4 in shape else 1])}, dtype=DOUBLE)
    if goes:
        assert op_types(applied(proto, ELIMINATE, bound=0).graph) == ["Reshape", "Neg"]
    else:
        assert refused(proto, ELIMINATE) == {}


def test_transposes_that_become_one_and_then_a_reshape() -> None:
    """The permutation that the first rewrite stated goes with the second one."""
    nodes = [
        node("Reshape", ["x", "s"], ["r"]),
        node("Transpose", ["r"], ["a"], perm=[1, 0, 2]),
        node("Transpose", ["a"], ["b"], perm=[1, 2, 0]),
        node("Softmax", ["b"], axis=0),
    ]
    proto = model(nodes, x=(4, 3, 4), constants={"s": np.array([4, 12, 1])}, dtype=DOUBLE)
    result = applied(proto, ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Reshape", "Softmax"]


def test_a_reshape_and_a_transpose_of_single_elements() -> None:
    """As of attention between two groups: the transpose says the shape by itself."""
    nodes = [
        node("Reshape", ["x", "s"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3]),
        node("Softmax", ["t"], axis=1),
    ]
    result = applied(
        model(nodes, x=("N", 8), constants={"s": np.array([-1, 1, 2, 4])}, dtype=DOUBLE), ELIMINATE, bound=0
    )
    assert op_types(result.graph) == ["Reshape", "Softmax"]
