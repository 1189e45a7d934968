"""The pass on both kinds of graph, through the public interface."""

from __future__ import annotations

import onnx
import torch

import fuser


def transposes(first: str, second: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        net (float[2, 3, 4] x) => (float[a, b, c] y) {{
            p = Transpose<perm = [{first}]>(x)
            q = Transpose<perm = [{second}]>(p)
            y = Relu(q)
        }}"""
    )


class Transposes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x.permute(1, 2, 0).permute(2, 0, 1))


def test_on_onnx() -> None:
    result = fuser.optimize(transposes("1, 2, 0", "2, 0, 1"), passes=["cancel-transposes"])
    assert [node.op_type for node in result.model.graph.node] == ["Relu"]
    assert result.report.verification.passed


def test_on_torch() -> None:
    report = fuser.optimize(Transposes(), example_inputs=(torch.randn(2, 3, 4),), passes=["cancel-transposes"]).report
    assert [remark.code for remark in report.applied] == ["applied"]
    assert report.verification.passed


def test_another_permutation_is_left_alone() -> None:
    model = transposes("1, 2, 0", "1, 2, 0")
    result = fuser.optimize(model, passes=["cancel-transposes"])
    assert [remark.code for remark in result.report.missed] == ["not-inverse"]
    assert result.model == model
