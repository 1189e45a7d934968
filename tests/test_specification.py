"""One specification of the fold, held against every host: the same remarks, and the same function in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from fuser.passes.eliminate_identity import EliminateIdentity
from fuser.passes.fold_batch_norm import FoldBatchNorm
from fuser.passes.fold_constants import FoldConstants
from hosts import HOSTS, Onnx
from nets import CASES, Case, lively

from fuser import pipeline

PASSES = (EliminateIdentity(), FoldConstants(), FoldBatchNorm())


@pytest.fixture(params=HOSTS, ids=lambda host: host.__name__)
def host(request: pytest.FixtureRequest) -> Any:
    return request.param()


def net(case: Case) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    module = lively(case.build())
    return module, torch.randn(case.shape)


def expected(case: Case, host: Any) -> dict[str, int]:
    codes = case.elsewhere.get(type(host).__name__, case.codes)
    if codes is None:
        pytest.skip("the exporter adds the missing batch axis, so this host never holds such a net")
    return codes


@pytest.mark.parametrize("name", CASES)
def test_the_remarks_and_the_function(host: Any, name: str) -> None:
    case = CASES[name]
    codes = expected(case, host)
    module, x = net(case)
    dtype = torch.float32 if isinstance(host, Onnx) else torch.float64
    module, x = module.to(dtype), x.to(dtype)
    truth = module.double()(x.double()).detach().numpy()
    module = module.to(dtype)
    state = {key: value.clone() for key, value in module.state_dict().items()}

    graph = host.build(module, (x,))
    outcome = pipeline.run(graph, PASSES)
    remarks = [r for r in (*outcome.applied, *outcome.missed) if r.pass_name == "fold-batch-norm"]
    assert Counter(r.code for r in remarks) == codes
    result = host.run(host.result(graph), x)

    scale = np.abs(truth).max()
    bound = 3e-6 if dtype is torch.float32 else 1e-12
    assert np.abs(result - truth).max() <= bound * scale
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} of the user's module was changed"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "applied" not in case.codes])
def test_refusing_changes_nothing(host: Any, name: str) -> None:
    case = CASES[name]
    expected(case, host)
    module, x = net(case)
    before = host.run(host.result(host.build(module, (x,))), x)
    graph = host.build(module, (x,))
    outcome = pipeline.run(graph, [FoldBatchNorm()])
    assert not outcome.applied
    np.testing.assert_array_equal(host.run(host.result(graph), x), before)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "applied" in case.codes])
def test_a_second_run_applies_nothing(host: Any, name: str) -> None:
    module, x = net(CASES[name])
    graph = host.build(module, (x,))
    pipeline.run(graph, PASSES)
    assert not pipeline.run(graph, PASSES).applied
