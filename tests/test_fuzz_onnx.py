"""Random ONNX models: optimized, each is legal, is the same function, and is untouched where nothing was done.

A failure prints the seed; `random_model(random.Random(seed))` makes the model again.  The long run:

    pytest tests/test_fuzz_onnx.py -m fuzz -s
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fuzz_onnx import Array, Sample, evaluator, ordered, random_model, widened
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

import fuser
from fuser.graphs.onnx.editor import ABSENT
from fuser.isolate import Crashed, Worker
from fuser.proof.outcome import Failure

TOLERANCE = {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 1e-3, np.dtype(np.float16): 0.1}
LOW = 0.3
"""Of bfloat16: a fold that is wrong is wrong by more than that, mostly; the other types see finer faults."""

RUN = "fuser.proof.runners:run_onnx"
LONG = int(os.environ.get("FUSER_FUZZ_MODELS", "10000"))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(preload=["onnxruntime"]) as running:
        yield running


def same_bytes(a: Any, b: Any) -> bool:
    return bool(a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True))


def check(sample: Sample, worker: Worker | None, folder: Path) -> Counter[str]:
    """Optimize the sample's model, and hold the result to everything that is promised; what happened, counted."""
    model = sample.model
    before = model.SerializeToString(deterministic=True)
    result = fuser.optimize(model, verify=False, **sample.options)
    after: ModelProto = result.model
    assert model.SerializeToString(deterministic=True) == before, "the given model was changed"
    assert not result.report.warnings, result.report.warnings
    applied = len(result.report.applied)
    counts = Counter({"models": 1, "changed": bool(applied), "rewrites": applied})
    if not applied and not sample.options.get("freeze_inputs"):
        assert after.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(ordered(after) if not is_ordered(model) else after, full_check=True)
    same_interface(model, after, frozen=bool(sample.options.get("freeze_inputs")))
    assert not (ABSENT.known or ABSENT.slots or ABSENT.producer or ABSENT.public), "it is shared by all models"
    untouched_is_the_same(model, after)
    again = fuser.optimize(after, verify=False, **sample.options)
    assert not again.report.applied, f"a second run applied {[str(r) for r in again.report.applied]}"
    repeated = fuser.optimize(model, verify=False, **sample.options)
    assert same_bytes(repeated.model, after), "another run gave other bytes"
    counts += same_function(sample, after, worker, folder)
    return counts


def is_ordered(model: ModelProto) -> bool:
    return ordered(model) is model


def same_interface(before: ModelProto, after: ModelProto, *, frozen: bool) -> None:
    backed = {t.name for t in before.graph.initializer}
    free = frozen or before.ir_version < 4
    was = [i for i in before.graph.input if not (free and i.name in backed)]
    now = [i for i in after.graph.input if not (free and i.name in {t.name for t in after.graph.initializer} | backed)]
    assert was == now, "the inputs changed"
    assert list(before.graph.output) == list(after.graph.output), "the outputs changed"
    assert list(before.opset_import) == list(after.opset_import)
    assert list(before.metadata_props) == list(after.metadata_props)
    assert before.graph.doc_string == after.graph.doc_string and before.graph.name == after.graph.name


def untouched_is_the_same(before: ModelProto, after: ModelProto) -> None:
    """Nodes with the operands they had keep their bytes; initializers are never edited, and none is left unread."""
    nodes = {tuple(node.output): node for node in before.graph.node}
    for node in after.graph.node:
        old = nodes.get(tuple(node.output))
        marked = "fuser.folded" in node.doc_string or any(m.key == "fuser.folded" for m in node.metadata_props)
        bodies = any(a.HasField("g") for a in node.attribute)
        if old is None or marked or bodies or old.op_type == "Gemm":
            continue
        if old.op_type == node.op_type and list(old.input) == list(node.input):
            assert same_bytes(old, node), f"{node.name!r} was changed"
    tensors = {tensor.name: tensor for tensor in before.graph.initializer}
    for tensor in after.graph.initializer:
        assert tensor.name not in tensors or same_bytes(tensors[tensor.name], tensor), f"{tensor.name!r} was edited"
    unread_before = set(tensors) - all_names(before)
    orphans = {tensor.name for tensor in after.graph.initializer} - all_names(after) - unread_before
    orphans -= {info.name for info in after.graph.input}  # a caller may go on giving those
    assert not orphans, f"nobody reads {orphans}"


def all_names(model: ModelProto) -> set[str]:
    from fuzz_onnx import names_read

    names = {output.name for output in model.graph.output}
    return names.union(*(names_read(node) for node in model.graph.node))


def same_function(sample: Sample, after: ModelProto, worker: Worker | None, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    first, second = evaluator(ordered(sample.model)), evaluator(ordered(after))
    names = [output.name for output in sample.model.graph.output]
    truths = []
    for number, feeds in enumerate(sample.feeds):
        try:
            with np.errstate(all="ignore"):
                truth = first.run(None, widened(feeds))
        except Exception:
            assert number, "the generator promises that the first inputs fit"
            continue
        if not all(np.isfinite(wanted).all() for wanted in truth):
            continue
        with np.errstate(all="ignore"):
            found = second.run(None, widened(feeds))
        truths.append((feeds, truth))
        dtype = smallest(sample)
        for name, wanted, given_ in zip(names, truth, found, strict=True):
            close(name, wanted, given_, TOLERANCE.get(dtype, LOW))
        counts["evaluations"] += 1
    if worker is not None:
        counts += same_in_runtime(sample, after, truths, worker, folder)
    return counts


def same_in_runtime(
    sample: Sample, after: ModelProto, truths: list[tuple[dict[str, Array], list[Array]]], worker: Worker, folder: Path
) -> Counter[str]:
    """ONNX Runtime, its own optimizer off: where it runs the original, it runs the result, as well."""
    paths = folder / "before.onnx", folder / "after.onnx"
    outcomes = []
    for path, model in zip(paths, (sample.model, after), strict=True):
        path.write_bytes(model.SerializeToString())
        try:
            ran = worker.call(RUN, str(path), [feeds for feeds, _ in truths], False, False, timeout=60)
            outcomes.append(ran.outcomes)
        except Crashed:
            outcomes.append(None)
    if outcomes[0] is None or isinstance(outcomes[0][0], Failure):
        return Counter({"not run": 1})
    assert outcomes[1] is not None, "the runtime runs the original, and crashes on the result"
    for (_, truth), old, new in zip(truths, *outcomes, strict=True):
        if isinstance(old, Failure):
            continue
        assert not isinstance(new, Failure), f"the runtime runs the original, but not the result: {new}"
        for info, wanted, x, y in zip(sample.model.graph.output, truth, old, new, strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            own = distance(wanted, x) if x.shape == wanted.shape else np.inf
            if not own < 0.1:
                continue  # rounding overwhelms this model, or the runtime means something else by it
            close(info.name, wanted, y, TOLERANCE.get(smallest(sample), LOW) + 4 * own)
    return Counter({"run": 1})


def smallest(sample: Sample) -> np.dtype[Any]:
    """The type that decides how much is rounded."""
    return next(np.dtype(a.dtype) for name, a in sample.feeds[0].items() if name != "cond")


def distance(wanted: Array, found: Array) -> float:
    """The largest difference, relative to the largest element; that of values near zero counts as it is."""
    scale = max(1.0, float(np.abs(wanted).max(initial=0)))
    return float(np.abs(wanted - found).max(initial=0)) / scale


def close(name: str, wanted: Array, found: Array, tolerance: float) -> None:
    assert wanted.shape == found.shape, f"{name!r} has the shape {found.shape}, not {wanted.shape}"
    if wanted.dtype.kind != "f":
        assert (wanted == found).all(), name
        return
    error = distance(wanted, found)
    assert error <= tolerance, f"{name!r} is off by {error:.3g}, relative to its largest element"


def run_seeds(seeds: range, worker: Worker | None, folder: Path) -> Counter[str]:
    """What happened, counted; after the last seed, raises where any failed."""
    counts: Counter[str] = Counter()
    failed: dict[int, str] = {}
    for seed in seeds:
        sample = None
        try:
            sample = random_model(random.Random(seed))
            counts += check(sample, worker, folder)
        except Exception as error:
            failed[seed] = f"{type(error).__name__}: {error}"
            print(f"seed {seed}, options {sample and sample.options}: {failed[seed]}")
            print(sample and onnx.printer.to_text(sample.model), flush=True)
    assert not failed, f"{len(failed)} of {len(seeds)} models failed: {failed}"
    return counts


def test_random_models(worker: Worker, tmp_path: Path) -> None:
    counts = run_seeds(range(100), worker, tmp_path)
    assert counts["changed"] >= 60, counts  # the models give the passes something to do
    assert counts["run"] >= 25, counts


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(st.randoms(use_true_random=False))
def test_models_that_hypothesis_draws(tmp_path_factory: pytest.TempPathFactory, dice: random.Random) -> None:
    """The same models by another road: a failure here is shrunk to a small one."""
    check(random_model(dice), None, Path())


@pytest.mark.fuzz
def test_random_models_at_length(worker: Worker, tmp_path: Path) -> None:
    counts = run_seeds(range(1000, 1000 + LONG), worker, tmp_path)
    print(dict(counts))
