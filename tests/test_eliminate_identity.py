"""eliminate-identity: what hands on what it gets goes, and the names of the signature stay."""

from __future__ import annotations

import numpy as np
import onnx
from fuser.passes.eliminate_identity import EliminateIdentity
from onnx_models import model, node, op_types
from rewriting import applied, refused

ELIMINATE = EliminateIdentity()


def test_identities_dropouts_and_casts_to_the_same_type() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Identity", ["a"], ["b"]),
        node("Dropout", ["b"], ["c"]),
        node("Cast", ["c"], ["d"], to=onnx.TensorProto.FLOAT),
        node("Neg", ["d"]),
    ]
    result = applied(model(nodes), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Relu", "Neg"]


def test_an_output_keeps_its_name() -> None:
    result = applied(model([node("Relu", ["x"], ["a"]), node("Identity", ["a"])]), ELIMINATE, bound=0)
    assert [(n.op_type, n.output[0]) for n in result.graph.node] == [("Relu", "y")]


def test_what_changes_something_is_no_candidate() -> None:
    nodes = [node("Cast", ["x"], ["a"], to=onnx.TensorProto.DOUBLE), node("Cast", ["a"], to=onnx.TensorProto.FLOAT)]
    assert refused(model(nodes), ELIMINATE) == {}
    training = [node("Dropout", ["x", "ratio", "on"])]
    constants = {"ratio": np.array(0.5, np.float32), "on": np.array(True)}
    assert refused(model(training, constants=constants), ELIMINATE) == {}


def test_both_public() -> None:
    assert refused(model([node("Identity", ["x"])]), ELIMINATE) == {"both-public": 1}
    twice = [node("Relu", ["x"], ["a"]), node("Identity", ["a"])]
    assert refused(model(twice, outputs=["y", "a"]), ELIMINATE) == {"both-public": 1}


def test_the_producer_takes_the_name_of_the_output_with_all_its_readers() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Identity", ["a"]), node("Neg", ["a"], ["z"])]
    result = applied(model(nodes, outputs=["y", "z"]), ELIMINATE, bound=0)
    assert [(n.op_type, list(n.input), list(n.output)) for n in result.graph.node] == [
        ("Relu", ["x"], ["y"]),
        ("Neg", ["y"], ["z"]),
    ]
