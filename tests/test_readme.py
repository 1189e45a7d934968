"""What the README shows is run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types

from fuser import pipeline
from fuser.files import ModelFile
from fuser.graphs.onnx import OnnxGraph

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [line[2:].partition("#")[0].strip() for line in lines if line.startswith("$ fuser ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    nodes = [conv(), batch_norm("c", "b"), node("Relu", ["b"])]
    onnx.save(model(nodes, constants=conv_constants(), x=(1, 4, 8, 8)), folder / "model.onnx")
    subprocess.run([sys.executable, "-m", "fuser", "optimize", "model.onnx", "-q"], check=True, cwd=folder)
    for name in ("other.onnx", "a.onnx", "b.onnx"):
        (folder / name).write_bytes((folder / "model.fused.onnx").read_bytes())
    return folder


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_command(command: str, folder: Path) -> None:
    _, *arguments = shlex.split(command)
    if arguments[0] == "bench":
        arguments += ["--seconds", "0.2", "--arms", "ort-on"]
    done = subprocess.run(
        [sys.executable, "-m", "fuser", *arguments], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_the_pass_of_the_tutorial_runs() -> None:
    (code,) = (block for block in blocks("python") if "class EraseNeutral" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    nodes = [node("Mul", ["x", "one"], ["m"]), node("Relu", ["m"])]
    graph = OnnxGraph(ModelFile.from_proto(model(nodes, constants={"one": np.float32(1)})))
    outcome = pipeline.run(graph, [names["EraseNeutral"]()])
    assert [remark.site for remark in outcome.applied] == ["mul_m"]
    assert op_types(graph.to_model().to_proto().graph) == ["Relu"]


def test_the_python_of_the_readme_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (code,) = (block for block in blocks("python") if "exported_program" in block)
    code = re.sub(r"^fuser\.benchmark.*$", "", code, flags=re.MULTILINE)  # measured elsewhere
    code = code.replace("result.report.missed[0].code", "result.report.missed")
    monkeypatch.chdir(folder)
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 4, 8, 8)
    exported = torch.export.export(module, (x,))
    names: dict[str, Any] = {
        "model_proto": onnx.load("model.onnx"),
        "module": module,
        "x": x,
        "graph_module": torch.fx.symbolic_trace(module),
        "exported_program": exported,
    }
    exec(code, names)
    assert isinstance(names["result"].model, type(exported))
    assert [remark.code for remark in names["result"].report.applied] == ["applied"]


def test_the_export_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (code,) = (block for block in blocks("python") if "fuser.export(" in block)
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4))
    names: dict[str, Any] = {"module": module, "x": torch.randn(2, 4, 8, 8)}
    exec(code, names)
    assert names["result"].report.verification.passed
    assert op_types(onnx.load("exported.onnx").graph) == ["Conv"]
