"""fold-batch-norm: one specification over every host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from fuser.passes.fold_batch_norm import FoldBatchNorm
from hosts import HOSTS, Onnx
from nets import CASES, Case, lively

from fuser.ops import BatchNorm


@pytest.fixture(params=HOSTS, ids=lambda cls: cls.__name__)
def host(request: pytest.FixtureRequest) -> Any:
    return request.param()


def example(case: Case) -> torch.Tensor:
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CASES)
def test_every_batch_norm_gets_the_remark_of_the_specification(host: Any, name: str) -> None:
    case = CASES[name]
    codes = case.elsewhere.get(type(host).__name__, case.codes)
    if codes is None:
        pytest.skip("this host cannot hold the net")
    torch.manual_seed(5)
    module, x = lively(case.build()), example(case)
    if not isinstance(host, Onnx):  # ONNX Runtime has no float64 convolution
        module, x = module.double(), x.double()
    before = host.build(module, (x,))
    expected = host.run(host.result(before), x)

    graph = host.build(module, (x,))
    remarks = FoldBatchNorm().run(graph)
    graph.commit()
    assert Counter(remark.code for remark in remarks) == codes
    assert len(list(graph.ops(BatchNorm))) == sum(codes.values()) - codes.get("applied", 0)
    found = host.run(host.result(graph), x)
    bound = 1e-12 if found.dtype == np.float64 else 2e-5
    if "applied" in codes:
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
    else:
        np.testing.assert_array_equal(found, expected)  # refusing changes nothing, bit for bit
