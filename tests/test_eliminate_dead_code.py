"""eliminate-dead-code: what nobody reads goes; what has effects or a name in the signature stays."""

from __future__ import annotations

import numpy as np
from fuser.passes.eliminate_dead_code import EliminateDeadCode
from onnx_models import model, node, op_types
from rewriting import applied, refused

ELIMINATE = EliminateDeadCode()


def test_a_chain_that_nobody_reads() -> None:
    nodes = [node("Neg", ["x"], ["a"]), node("Mul", ["a", "k"], ["b"]), node("Relu", ["x"])]
    result = applied(model(nodes, constants={"k": np.ones(8, np.float32)}), ELIMINATE, bound=0)
    assert op_types(result.graph) == ["Relu"]
    assert len(result.graph.initializer) == 0  # what only it read


def test_what_is_read_stays() -> None:
    nodes = [node("Neg", ["x"], ["a"]), node("Add", ["a", "x"])]
    assert refused(model(nodes, outputs=["y", "a"]), ELIMINATE) == {}


def test_a_custom_operator_may_have_effects() -> None:
    log = node("Log", ["x"], ["a"])
    log.domain = "custom"
    assert refused(model([log, node("Relu", ["x"])]), ELIMINATE) == {}
