"""Random torch modules, traced, exported, and as ExportedPrograms: optimized, each is the same function.

A failure prints the seed; `random_module(random.Random(seed))` makes the module again.  The long run:

    pytest tests/test_fuzz_torch.py -m fuzz -s
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from typing import Any

import pytest
import torch
from fuzz_torch import Sample, random_module

import fuser
from fuser.errors import InputError

TOLERANCE = 1e-9
LONG = int(os.environ.get("FUSER_FUZZ_MODULES", "1000"))
HOSTS = ("traced", "exported", "program", "decomposed")


def outputs(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = module(x)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def given(sample: Sample, host: str) -> tuple[Any, dict[str, Any]]:
    """What is handed to `optimize`, and the arguments that go with it; raises what `torch.export` raises."""
    if host == "traced":
        return sample.net, {}
    if host == "exported":
        return sample.net, {"example_inputs": (sample.x,)}
    program = torch.export.export(sample.net, (sample.x,))
    return (program.run_decompositions() if host == "decomposed" else program), {}


def check(sample: Sample, host: str) -> Counter[str]:
    """Optimize, and hold the result to what is promised; what happened, counted."""
    stored = {name: value.clone() for name, value in sample.net.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in sample.net.modules()]
    # A module with statistics of the batch changes them when it runs.
    wanted = outputs(copy.deepcopy(sample.net), sample.x)
    try:
        model, options = given(sample, host)
    except Exception:
        return Counter({f"{host}: torch cannot export it": 1})
    try:
        result = fuser.optimize(model, verify=False, **options)
    except InputError:  # torch cannot trace it
        return Counter({f"{host}: refused": 1})
    applied = len(result.report.applied)
    assert not result.report.warnings, result.report.warnings
    for name, value in sample.net.state_dict().items():
        assert torch.equal(value, stored[name]), f"{name} of the given module was changed"
    assert hooks == [len(module._forward_hooks) for module in sample.net.modules()]
    program = isinstance(result.model, torch.export.ExportedProgram)
    if program:
        result.model.validate()
    found = outputs(copy.deepcopy(result.model.module() if program else result.model), sample.x)
    assert len(found) == len(wanted)
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error = float((a - b).abs().max() / max(1.0, float(a.abs().max())))
        assert error <= TOLERANCE, f"off by {error:.3g}"
    again = fuser.optimize(result.model, verify=False)
    assert not again.report.applied, f"a second run applied {[str(r) for r in again.report.applied]}"
    return Counter({f"{host}: modules": 1, f"{host}: rewrites": applied})


def run_seeds(seeds: range) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        for host in HOSTS:
            try:
                counts += check(random_module(random.Random(seed)), host)
            except BaseException:
                print(f"seed {seed}, {host}")
                raise
    return counts


def test_random_modules() -> None:
    counts = run_seeds(range(6))
    assert counts["traced: rewrites"] >= 5 and counts["exported: rewrites"] >= 5, counts


@pytest.mark.fuzz
def test_random_modules_at_length() -> None:
    print(dict(run_seeds(range(1000, 1000 + LONG))))
