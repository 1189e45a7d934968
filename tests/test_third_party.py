"""Passes of another package, installed for real: found, run on both IRs, and contained when they are wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types

PACKAGE = Path(__file__).parent / "toy_package"
EXAMPLE = Path(__file__).parents[1] / "passes" / "example"


def installed(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed; built without the network, and not where it lies."""
    pytest.importorskip("setuptools", minversion="70.1", reason="older ones need `wheel` to build")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in package.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(PACKAGE, tmp_path_factory)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(EXAMPLE, tmp_path_factory)


def run(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "250"},
    )


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """conv -> BN -> relu -> * 1 -> conv -> BN; the second norm is next to a convolution that is read twice."""
    nodes = [
        conv("x", "c"),
        batch_norm("c", "b"),
        node("Relu", ["b"], ["r"]),
        node("Mul", ["r", "one"], ["m"]),
        conv("m", "d"),
        batch_norm("d", "y"),
    ]
    constants = {**conv_constants(), "one": np.float32(1)}
    onnx.save(model(nodes, constants=constants, x=(1, 4, 8, 8)), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_the_example_of_the_tutorial(example: Path, tmp_path: Path) -> None:
    """Its commands and its own tests, as an installed package."""
    nodes = [
        node("Transpose", ["x"], ["p"], perm=[0, 2, 3, 1]),
        node("Transpose", ["p"], ["q"], perm=[0, 3, 1, 2]),
        node("Relu", ["q"], ["y"]),
    ]
    onnx.save(model(nodes, x=(1, 4, 8, 8)), net := tmp_path / "model.onnx")
    listed = run(example, "-m", "fuser", "passes")
    (line,) = (line for line in listed.stdout.splitlines() if "cancel-transposes" in line)
    assert "fuser-cancel-transposes" in line and "Cancel two transposes" in line
    assert run(example, "-m", "fuser", "passes", "cancel-transposes").stdout.startswith("# cancel-transposes\n")
    explained = run(example, "-m", "fuser", "explain", net, "--passes", "cancel-transposes")
    assert "applied cancel-transposes @ transpose_q: its readers read 'x'" in explained.stdout
    done = run(example, "-m", "fuser", "optimize", net, "--passes", "cancel-transposes")
    assert done.returncode == 0 and op_types(onnx.load(net.with_name("model.fused.onnx")).graph) == ["Relu"]
    tested = run(example, "-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE)
    assert tested.returncode == 0, tested.stdout


GOOD = "toy-erase-neutral,fold-batch-norm"


def test_an_installed_package_is_listed_with_its_owner(site: Path) -> None:
    done = run(site, "-m", "fuser", "passes")
    assert done.returncode == 0
    (line,) = (line for line in done.stdout.splitlines() if "toy-erase-neutral" in line)
    assert "toy-passes" in line
    assert "x * 1 => x" in " ".join(line.split())


def test_what_cannot_be_used_is_set_aside_with_the_reason_and_both_owners(site: Path) -> None:
    done = run(site, "-m", "fuser", "passes")
    for name, why in {
        "toy-missing": "AttributeError",
        "toy-exits": "SystemExit: 3",
        "toy-needs-more": "TypeError",
        "toy-other-name": "TypeError: toy_passes:EraseNeutral calls itself 'toy-erase-neutral'",
        "toy-no-pass": "TypeError: toy_passes:np is not a subclass of fuser.rewrite.RewritePass",
    }.items():
        assert f"the pass {name} of toy-passes cannot be used: {why}" in done.stderr
    assert "fold-batch-norm of toy-passes cannot be used: the name is taken by graph-fuser" in done.stderr
    refused = run(site, "-m", "fuser", "optimize", "x.onnx", "--passes", "toy-missing")
    assert refused.returncode == 2
    assert "the pass toy-missing of toy-passes cannot be used" in refused.stderr


def test_a_run_of_all_passes_says_which_could_not_be_used(site: Path, net: Path) -> None:
    done = run(site, "-m", "fuser", "optimize", net)
    assert done.returncode == 0, done.stderr
    assert "warning: the pass toy-missing of toy-passes cannot be used" in done.stdout, done.stdout
    assert op_types(onnx.load(net.with_name("net.fused.onnx")).graph) == ["Conv", "Relu", "Conv"]


def test_it_runs_on_onnx(site: Path, net: Path) -> None:
    done = run(site, "-m", "fuser", "optimize", net, "--passes", GOOD)
    assert done.returncode == 0, done.stderr
    assert op_types(onnx.load(net.with_name("net.fused.onnx")).graph) == ["Conv", "Relu", "Conv"]


def test_it_runs_on_torch(site: Path) -> None:
    script = """
import torch, fuser
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return self.conv(x) * 1.0
for options in ({}, {"example_inputs": (torch.randn(1, 3, 8, 8),)}):
    report = fuser.optimize(Net().eval(), passes=["toy-erase-neutral"], **options).report
    assert [r.pass_name for r in report.applied] == ["toy-erase-neutral"], report
"""
    done = run(site, "-c", script)
    assert done.returncode == 0, done.stderr


def test_a_wrong_pass_is_rolled_back_and_named_and_the_good_rewrites_are_kept(site: Path, net: Path) -> None:
    done = run(site, "-m", "fuser", "optimize", net, "--passes", "toy-erase-neutral,toy-stale-weight,fold-batch-norm")
    assert done.returncode == 0, done.stderr
    assert "toy-stale-weight @ bn_b was left out" in done.stdout
    assert "times what is allowed" in done.stdout  # why
    assert "toy-stale-weight @ bn_y was left out" in done.stdout
    assert op_types(onnx.load(net.with_name("net.fused.onnx")).graph) == ["Conv", "Relu", "Conv"]


def test_on_failure_abort_writes_nothing_and_exits_1(site: Path, net: Path) -> None:
    before = sorted(os.listdir(net.parent))
    done = run(site, "-m", "fuser", "optimize", net, "--passes", "toy-stale-weight", "--on-failure", "abort")
    assert done.returncode == 1
    assert "not equivalent to the original" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(os.listdir(net.parent)) == before


def test_a_pass_that_raises_is_set_aside_and_the_others_go_on(site: Path, net: Path) -> None:
    done = run(site, "-m", "fuser", "optimize", net, "--passes", f"toy-raises,{GOOD}")
    assert done.returncode == 0, done.stderr
    assert "warning: toy-raises failed at conv_c: LinAlgError" in done.stdout
    assert op_types(onnx.load(net.with_name("net.fused.onnx")).graph) == ["Conv", "Relu", "Conv"]
