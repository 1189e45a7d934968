"""What the pages show is run, and what they refer to exists."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx_models import batch_norm, conv, conv_constants, model, node
from typer.testing import CliRunner

from fuser import registry
from fuser.cli import app
from fuser.pages import page, refusals_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "passes" / "README.md", ROOT / "fuser" / "proof" / "README.md"]
OURS = [info for info in registry.load().passes if info.owner == "graph-fuser"]

RUN_ELSEWHERE = {
    "make demo": "trains a model; `make` runs it",
    "make test": "runs this test",
    "pip install .": "what made this environment",
    "pip install ./example": "test_third_party installs the example, and runs its commands and its tests",
    "fuser passes cancel-transposes": "there, too",
    "fuser explain model.onnx --passes cancel-transposes": "there, too",
    "fuser optimize model.onnx --passes cancel-transposes": "there, too",
    "pytest example": "there, too",
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for path in PAGES for block in blocks(path, "console") for line in block.splitlines()]
    found = dict.fromkeys(line[2:].partition("#")[0].strip() for line in lines if line.startswith("$ "))
    return [command for command in found if command not in RUN_ELSEWHERE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    nodes = [conv(), batch_norm("c", "b"), node("Relu", ["b"])]
    onnx.save(model(nodes, constants=conv_constants(), x=(1, 4, 8, 8)), folder / "model.onnx")
    subprocess.run([sys.executable, "-m", "fuser", "optimize", "model.onnx", "-q"], check=True, cwd=folder)
    for name in ("other.onnx", "a.onnx", "b.onnx"):
        (folder / name).write_bytes((folder / "model.fused.onnx").read_bytes())
    return folder


@pytest.mark.parametrize("command", commands())
def test_command(command: str, folder: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "fuser", "a command of another program is run elsewhere, or nowhere"
    if arguments[0] == "bench":
        arguments += ["--seconds", "0.2", "--arms", "ort-on"]
    done = subprocess.run(
        [sys.executable, "-m", "fuser", *arguments], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("path", [PAGES[0], PAGES[2]], ids=["the quick start", "verification"])
def test_the_python_of_a_page_runs(path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, as somebody would who follows the page.  The tutorial's is the example's: see below."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    for name in ("model.onnx", "model.fused.onnx"):
        shutil.copy(folder / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(path, "python"):
        if shutil.which("g++") is None:
            block = block.replace('"inductor"', '"aot_eager"')
        exec(block, names)
    torch._dynamo.reset()
    if "result" in names:
        assert [remark.code for remark in names["result"].report.applied] == ["applied"]
        assert "BatchNormalization" not in {n.op_type for n in onnx.load("model.onnx").graph.node}
    if "verification" in names:
        assert names["verification"].passed


def test_the_tutorial_shows_the_files_of_the_example() -> None:
    tutorial, example = ROOT / "passes" / "README.md", ROOT / "passes" / "example"
    shown = [*blocks(tutorial, "python"), *blocks(tutorial, "toml")]
    assert shown == [
        (example / name).read_text() for name in ("cancel_transposes.py", "test_cancel_transposes.py", "pyproject.toml")
    ]


@pytest.mark.parametrize("path", [*PAGES, *sorted((ROOT / "passes" / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_readme_names_every_pass() -> None:
    text = PAGES[0].read_text()
    assert [info.name for info in OURS if f"`{info.name}`" not in text] == []


# -- the pages of the passes


def test_the_pages_are_those_of_the_docstrings() -> None:
    """`make docs` writes them."""
    written = {path.stem: path.read_text() for path in (ROOT / "passes" / "docs").iterdir()}
    assert written == {info.name: page(info) for info in OURS}, "run `make docs`"


@pytest.mark.parametrize("info", OURS, ids=lambda info: info.name)
def test_a_docstring_has_the_equation_and_every_refusal(info: Any) -> None:
    text = page(info)
    assert text.startswith(f"# {info.name}\n") and "\n```\n" in text and "=>" in text
    listed = {code for codes, _ in refusals_of(info) for code in codes}
    source = ast.parse(Path(sys.modules[info.cls.__module__].__file__ or "").read_text())
    said = {
        call.args[0].value
        for call in ast.walk(source)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Missed"
        if call.args and isinstance(call.args[0], ast.Constant)
    }
    assert said <= listed
    every = {other.name: {code for codes, _ in refusals_of(other) for code in codes} for other in OURS}
    for codes, why in refusals_of(info):
        if why.startswith("as for "):
            assert set(codes) <= every[why[len("as for [") :].partition("]")[0]]


def test_the_command_prints_and_writes_the_same_pages(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["passes", "fold-batch-norm"])
    assert said.stdout == (ROOT / "passes" / "docs" / "fold-batch-norm.md").read_text()
    assert CliRunner().invoke(app, ["passes", "--pages", str(tmp_path / "new")]).exit_code == 0
    assert {path.stem for path in (tmp_path / "new").iterdir()} == {info.name for info in registry.load().passes}


def test_every_file_in_passes_is_registered() -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "passes").glob("*.py")} - {"--init--"}
    assert {info.name for info in OURS} == files
