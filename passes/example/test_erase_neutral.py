"""The pass on both kinds of graph, through the public interface."""

from __future__ import annotations

import onnx
import torch

import fuser


def product(factor: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        net (float[2, 3] x) => (float[2, 3] y) <float c = {{{factor}}}> {{
            p = Mul(x, c)
            y = Relu(p)
        }}"""
    )


class Product(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 1.0)


def test_on_onnx() -> None:
    result = fuser.optimize(product("1"), passes=["erase-neutral"])
    assert [node.op_type for node in result.model.graph.node] == ["Relu"]
    assert result.report.verification.passed


def test_on_torch() -> None:
    report = fuser.optimize(Product(), example_inputs=(torch.randn(2, 3),), passes=["erase-neutral"]).report
    assert [remark.code for remark in report.applied] == ["applied"]
    assert report.verification.passed


def test_another_factor_is_left_alone() -> None:
    model = product("2")
    result = fuser.optimize(model, passes=["erase-neutral"])
    assert [remark.code for remark in result.report.missed] == ["not-one"]
    assert result.model == model
