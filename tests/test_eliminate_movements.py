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
from onnx_models import model, node, op_types
from rewriting import DOUBLE, applied, refused, rewritten
from torch import Tensor, nn

from fuser import pipeline

ELIMINATE = EliminateMovements()

Wiring = Callable[[Net, Tensor], Tensor]

NETS: dict[str, tuple[Wiring, int]] = {
    "transpose-back": (lambda m, x: x.exp().transpose(1, 3).transpose(1, 3) + 1, 1),
    "permute-back": (lambda m, x: x.exp().permute(0, 2, 3, 1).permute(0, 3, 1, 2) + 1, 1),
    "permute-on": (lambda m, x: x.exp().permute(0, 2, 3, 1).permute(0, 2, 3, 1) + 1, 0),
    "reshape-back": (lambda m, x: x.exp().reshape(2, 4, 16).reshape(2, 4, 4, 4) + 1, 1),
    "reshape-on": (lambda m, x: x.exp().reshape(2, 64).reshape(8, 16) + 1, 1),
}


ELSEWHERE = {
    ("Onnx", "transpose-back"): 0,  # the exporter has done that
    ("Onnx", "permute-back"): 0,
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
    undone = np.zeros((2, 3, 4, 5)).transpose(p).transpose(q).shape == (2, 3, 4, 5)
    still = sum(permutation != [0, 1, 2, 3] for permutation in (p, q))
    assert op_types(result.graph).count("Transpose") == (0 if undone else still)


@pytest.mark.parametrize(
    ("second", "count"),
    [([2, -1], 1), ([0, -1], 0), ([-1, 8, 8], 1), ([-1, 0], 0)],
    ids=["says-all", "copies-a-size", "another-rank", "copies-the-last"],
)
def test_a_size_that_is_copied_matters(second: list[int], count: int) -> None:
    nodes = [node("Reshape", ["x", "s"], ["a"]), node("Reshape", ["a", "t"], ["b"]), node("Neg", ["b"])]
    constants = {"s": np.array([8, -1]), "t": np.array(second)}
    outcome, result = rewritten(model(nodes, x=(2, 4, 8, 8), constants=constants), ELIMINATE)
    assert len(outcome.applied) == count
    assert op_types(result.graph).count("Reshape") == 2 - count


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
