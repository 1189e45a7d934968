"""The equivalence check against deliberately broken models: a share of what `benchmarks/faults.py` counts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fuser.proof.runners import Workers

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as one:
        yield one


def count(faults: ModuleType, workers: Workers, *cases: tuple[str, str]) -> object:
    found = faults.Count(workers)
    for seed, (name, dtype) in enumerate(cases):
        found.check(f"{name} {dtype}", getattr(faults, name)(faults.Net(dtype, seed=seed)), seed)
    return found


def test_every_fault_is_caught_and_no_right_fold_refused(faults: ModuleType, workers: Workers) -> None:
    cases = [("residual", "float32"), ("grouped", "float32"), ("transposed", "float16"), ("dynamic", "bfloat16")]
    found = count(faults, workers, *cases)
    assert found.failures == []
    assert found.caught == found.injected and found.injected.total() >= 35
    assert len(found.injected) == 13  # each kind at least once
    assert found.folds == 4 and found.alarms == 0


@pytest.mark.parametrize("name", ["deep", "cancelling", "recurrent", "attention", "several_outputs"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_right_folds_are_never_refused(faults: ModuleType, workers: Workers, name: str, dtype: str) -> None:
    from fuser.proof import verify

    before = getattr(faults, name)(faults.Net(dtype, seed=77))
    after, sites = faults.fold(before)
    assert sites
    result = verify(before, after, workers=workers)
    assert result.passed, str(result)


def test_a_fold_that_is_nearer_to_the_truth_than_the_original_passes(faults: ModuleType, workers: Workers) -> None:
    from fuser.proof import verify

    before = faults.cancelling(faults.Net("float32", seed=5))
    result = verify(before, faults.fold(before)[0], workers=workers)
    (y,) = result.outputs
    assert result.passed and y.original > 1e-3 * y.max_abs  # both lose digits, and that is no fault


def test_the_command_prints_the_table_and_exits_by_it(
    faults: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "cases", lambda quick, models: [("residual", faults.residual(faults.Net()))])
    assert faults.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "injected" in printed and "right folds: 1, false alarms: 0" in printed
    passing = type("V", (), {"passed": True, "verdict": "equivalent"})()
    monkeypatch.setattr(faults, "verify", lambda *_, **__: passing)
    assert faults.main(["--quick"]) == 1
    assert "missed: output renamed in residual" in capsys.readouterr().out
