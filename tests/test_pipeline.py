"""What runs the passes: order, rounds, the audits, and the registry that finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import model, node

from fuser import pipeline, registry
from fuser.errors import InputError, PassError
from fuser.files import ModelFile
from fuser.graphs.onnx.graph import OnnxGraph
from fuser.job import Job
from fuser.ops import Dead, Elementwise, Identity
from fuser.remarks import Missed
from fuser.rewrite import Contract, RewritePass
from fuser.sources import open_source


def chain(*operators: str) -> OnnxGraph:
    return OnnxGraph(ModelFile.from_proto(chained(*operators)))


def chained(*operators: str) -> onnx.ModelProto:
    """A chain of nodes named op0, op1, ..."""
    nodes = [
        node(op, [f"v{i}" if i else "x"], [f"v{i + 1}" if i + 1 < len(operators) else "y"])
        for i, op in enumerate(operators)
    ]
    for i, n in enumerate(nodes):
        n.name = f"op{i}"
    return model(nodes)


@dataclass(frozen=True)
class Drop(RewritePass[Any, Any]):
    """identity(x) => x, with hooks to misbehave."""

    in_match: Callable[[Any, Any], Any] = lambda graph, op: op
    in_rewrite: Callable[[Any, Any], Any] = lambda graph, op: graph.replace(op, by=op.input)

    name, root = "drop", Identity

    def match(self, graph: Any, op: Any) -> Any:
        return self.in_match(graph, op)

    def rewrite(self, graph: Any, match: Any) -> str:
        self.in_rewrite(graph, match)
        return "dropped"


def test_every_candidate_has_exactly_one_remark() -> None:
    def odd_ones(graph: Any, op: Any) -> Any:
        return op if graph.describe(op) in ("op1", "op3") else Missed("even", "its number is even", "none")

    outcome = pipeline.run(chain("Identity", "Identity", "Relu", "Identity", "Relu"), [Drop(odd_ones)])
    assert [r.site for r in outcome.applied] == ["op1", "op3"]
    assert [(r.site, r.code, r.remedy) for r in outcome.missed] == [("op0", "even", "none")]
    assert outcome.runs[0].applied == 2
    assert outcome.runs[0].missed == 1
    assert len(outcome.history) == 4  # three candidates in the first round, one in the second
    assert outcome.rounds == 2


def test_an_op_is_read_when_it_is_reached() -> None:
    graph = chain("Identity", "Identity", "Identity", "Relu")
    outcome = pipeline.run(graph, [Drop()])
    assert [r.site for r in outcome.applied] == ["op0", "op1", "op2"]
    assert graph.summary().ops == {"Relu": 1}


def test_an_early_no_that_is_cured_later_is_not_told_in_the_end() -> None:
    class AfterRelu(Drop):
        name, root = "after-relu", Elementwise

    def wants_relu(graph: Any, op: Any) -> Any:
        return op if graph.readers(op.left)[0].name == "never" else Missed("not-yet", "an identity is in the way")

    nodes = [node("Identity", ["x"], ["i"]), node("Add", ["i", "i"])]
    graph = OnnxGraph(ModelFile.from_proto(model(nodes)))
    outcome = pipeline.run(graph, [AfterRelu(wants_relu), Drop()])
    assert [r.code for r in outcome.history] == ["not-yet", "applied", "not-yet"]
    assert [r.code for r in outcome.missed] == ["not-yet"]


def test_stop_after_admits_so_many_rewrites() -> None:
    outcome = pipeline.run(chain("Identity", "Identity", "Identity", "Relu"), [Drop()], stop_after=2)
    assert [r.site for r in outcome.applied] == ["op0", "op1"]
    assert [(r.site, r.code) for r in outcome.missed] == [("op2", "stopped")]


def test_left_out_rewrites_are_missed_as_rolled_back() -> None:
    outcome = pipeline.run(chain("Identity", "Identity", "Relu"), [Drop()], leave_out={("drop", "op0"): "too bold"})
    assert [r.site for r in outcome.applied] == ["op1"]
    assert [(r.site, r.code) for r in outcome.missed] == [("op0", "rolled-back")]
    assert outcome.missed[0].reason.endswith("is not equivalent to the original: too bold")


def test_a_pass_that_edits_while_matching_is_named() -> None:
    def edits(graph: Any, op: Any) -> Any:
        graph.replace(op, by=op.input)
        return Missed("innocent", "nothing happened")

    with pytest.raises(PassError, match="drop edited the graph while matching op0") as error:
        pipeline.run(chain("Identity", "Relu"), [Drop(edits)])
    assert error.value.pass_name == "drop"


def test_a_pass_that_claims_a_rewrite_it_did_not_make_is_named() -> None:
    with pytest.raises(PassError, match="says that it rewrote op0 but changed nothing"):
        pipeline.run(chain("Identity", "Relu"), [Drop(in_rewrite=lambda graph, op: None)])


def test_a_pass_that_changes_the_graph_without_saying_so_is_named() -> None:
    class Sly(Drop):
        def run(self, graph: Any, admit: Any = None) -> list[Any]:
            op = next(graph.ops(Identity))
            graph.replace(op, by=op.input)
            return []

    with pytest.raises(PassError, match="drop changed the graph without saying so"):
        pipeline.run(chain("Identity", "Relu"), [Sly()])


def test_a_pass_that_raises_is_named_with_the_site() -> None:
    with pytest.raises(PassError, match="drop failed at op1: ZeroDivisionError") as error:
        pipeline.run(chain("Relu", "Identity", "Relu"), [Drop(lambda graph, op: 1 // 0)])
    assert error.value.pass_name == "drop"


def test_a_graph_that_is_not_valid_after_a_pass_names_the_pass() -> None:
    with pytest.raises(PassError, match="not valid after pass drop: 'v1' is read, but the node that made it is gone"):
        pipeline.run(chain("Identity", "Relu"), [Drop(in_rewrite=lambda graph, op: graph.erase(op))])


def test_more_rounds_than_ever_are_fine_where_the_graph_shrinks() -> None:
    """One identity in each round."""
    latest = [0]

    def first_of_a_round(graph: Any, op: Any) -> Any:
        waits = graph.edits != latest[0]
        return Missed("later", "one a round") if waits else op

    class Slow(Drop):
        def run(self, graph: Any, admit: Any = None) -> Any:
            latest[0] = graph.edits
            return super().run(graph, admit)

    count = pipeline.MAX_ROUNDS + 30
    graph = chain(*["Identity"] * count, "Relu")
    outcome = pipeline.run(graph, [Slow(first_of_a_round)])
    assert (len(outcome.applied), outcome.rounds) == (count, count + 1)
    assert graph.summary().ops == {"Relu": 1}


def test_passes_that_undo_each_other_are_an_error() -> None:
    def same_again(graph: Any, op: Any) -> None:
        graph.set_constants(op, right=graph.constant(op.right))

    class Restless(Drop):
        name, root = "restless", Elementwise

    graph = OnnxGraph(ModelFile.from_proto(model([node("Add", ["x", "k"])], constants={"k": np.ones(8, np.float32)})))
    with pytest.raises(PassError, match="undo each other: restless"):
        pipeline.run(graph, [Restless(in_rewrite=same_again)])


def test_a_pass_for_another_host_is_not_run() -> None:
    class TorchOnly(Drop):
        name, hosts = "torch-only", ("torch",)

    outcome = pipeline.run(chain("Identity", "Relu"), [TorchOnly()])
    assert outcome.runs == []
    assert outcome.applied == []


# -- the registry


def test_the_built_in_passes_come_through_the_entry_points() -> None:
    found = registry.load()
    assert {info.owner for info in found.passes} == {"graph-fuser"}
    assert "fold-batch-norm" in [info.name for info in found.passes]
    for info in found.passes:
        module = info.cls.__module__.rpartition(".")[2]
        assert info.name == module.replace("_", "-")
        assert info.cls.__name__ == "".join(word.capitalize() for word in module.split("_"))
        assert info.summary


def test_select_keeps_the_order_given_and_names_what_is_unknown() -> None:
    found = registry.load()
    names = [info.name for info in found.passes]
    assert [p.name for p in found.select(reversed(names))] == list(reversed(names))
    assert [p.name for p in found.select(skip=names[1:])] == names[:1]
    with pytest.raises(InputError, match=r"there is no pass 'fold-batchnorm'; the passes are .*fold-batch-norm"):
        found.select(["fold-batchnorm"])
    with pytest.raises(InputError, match="there is no pass 'nope'"):
        found.select(skip=["nope"])


def test_the_kind_dead_visits_a_chain_from_its_end() -> None:
    class Bury(Drop):
        name, root = "bury", Dead

    nodes = [node("Neg", ["x"], ["a"]), node("Neg", ["a"], ["b"]), node("Relu", ["x"])]
    graph = OnnxGraph(ModelFile.from_proto(model(nodes)))
    outcome = pipeline.run(graph, [Bury(in_rewrite=lambda graph, op: graph.erase(op))])
    assert [r.site for r in outcome.applied] == ["neg_b", "neg_a"]


def test_a_late_pass_waits_until_the_others_have_nothing_left_to_do() -> None:
    class Late(Drop):
        name, late = "late", True

    def only(*sites: str) -> Callable[[Any, Any], Any]:
        return lambda graph, op: op if graph.describe(op) in sites else Missed("no", "not this one")

    graph = chain("Relu", "Identity", "Identity", "Identity", "Relu")
    needs_op1_gone = Drop(
        lambda graph, op: op if graph.describe(op) == "op1" or graph.edits else Missed("not-yet", "op1 is there")
    )
    order = pipeline.run(graph, [Late(only("op3", "op2")), needs_op1_gone]).applied
    assert [r.pass_name for r in order] == ["drop"] * 3

    graph = chain("Relu", "Identity", "Identity", "Relu")
    applied = pipeline.run(graph, [Late(only("op1")), Drop(only("op2"))]).applied
    assert [(r.pass_name, r.site) for r in applied] == [("drop", "op2"), ("late", "op1")]


def test_only_some_rewrites_may_be_admitted() -> None:
    outcome = pipeline.run(chain("Identity", "Identity", "Relu"), [Drop()], only={("drop", "op1")})
    assert [r.site for r in outcome.applied] == ["op1"]
    assert [(r.site, r.code) for r in outcome.missed] == [("op0", "rolled-back")]


def test_what_stands_in_for_a_wrong_rewrite_may_be_as_wrong() -> None:
    """Without the one at fault another becomes possible: it is left out, too, and the rest is kept."""

    def unless_another_is_gone(graph: Any, op: Any) -> Any:
        left = [graph.describe(one) for one in graph.ops(Identity)]
        return Missed("late", "the first one is gone") if graph.describe(op) == "op1" and "op0" not in left else op

    def check(candidate: onnx.ModelProto, contract: Contract) -> Any:
        """Wrong without the first two; it does not matter whether the third one is there."""
        passed = {"op0", "op1"} <= {one.name for one in candidate.graph.node}
        return SimpleNamespace(passed=passed, verdict="", reason="it is another function")

    proto = chained("Identity", "Identity", "Identity", "Relu")
    job = Job(open_source(proto), [Drop(unless_another_is_gone)], None)
    job.rewrite()
    assert [remark.site for remark in job.report.applied] == ["op0", "op2"]
    job.prove(check, abort=False, whole=False)
    assert [remark.site for remark in job.report.applied] == ["op2"]
    assert [(remark.site, remark.code) for remark in job.report.missed] == [(f"op{i}", "rolled-back") for i in (0, 1)]
    assert "drop @ op0 was left out" in job.report.warnings[0]
