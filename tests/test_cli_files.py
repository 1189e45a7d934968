"""The command line on awkward files and places: links, folders that may not be written, disks without space."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types

FOLDED = ["Conv", "Relu"]


def fuser(
    *arguments: str | Path, cwd: Path, prefix: list[str] | None = None, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [*(prefix or []), sys.executable, "-m", "fuser", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, preexec_fn=before)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Bad input or output: exit code 2, and one line that says what is wrong."""
    assert done.returncode == 2, done
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """`models/net.onnx`, its weights beside it, and in `here` a relative link to it."""
    (tmp_path / "models").mkdir()
    (tmp_path / "here").mkdir()
    nodes = [conv(), batch_norm("c", "b"), node("Relu", ["b"])]
    onnx.save(
        model(nodes, constants=conv_constants(), x=(1, 4, 8, 8)),
        tmp_path / "models" / "net.onnx",
        save_as_external_data=True,
        location="net.bin",
        size_threshold=0,
    )
    (tmp_path / "here" / "link.onnx").symlink_to("../models/net.onnx")
    return tmp_path


def test_a_model_behind_a_relative_link_is_read_with_its_data(home: Path) -> None:
    before = content(home / "models")
    done = fuser("optimize", "link.onnx", "--quiet", cwd=home / "here")
    assert done.returncode == 0, done.stderr
    assert content(home / "models") == before
    written = home / "here" / "link.fused.onnx"
    assert op_types(onnx.load(written).graph) == FOLDED
    assert {name.removesuffix(".data") for name in os.listdir(home / "here")} == {"link.fused.onnx", "link.onnx"}


def test_a_relative_link_as_output_stays_a_link(home: Path) -> None:
    (home / "here" / "out.onnx").symlink_to("../models/old.onnx")
    for _ in range(2):  # to a file that is not there yet, and to one that is
        done = fuser(
            "optimize", "../models/net.onnx", "out.onnx", "--single-file", "-q", "--no-verify", cwd=home / "here"
        )
        assert done.returncode == 0, done.stderr
        assert os.readlink(home / "here" / "out.onnx") == "../models/old.onnx"
        assert op_types(onnx.load(home / "models" / "old.onnx").graph) == FOLDED
    assert sorted(os.listdir(home / "models")) == ["net.bin", "net.onnx", "old.onnx"]


def test_in_place_over_a_relative_link(home: Path) -> None:
    done = fuser("optimize", "link.onnx", "link.onnx", "--single-file", "--quiet", cwd=home / "here")
    assert done.returncode == 0, done.stderr
    assert os.readlink(home / "here" / "link.onnx") == "../models/net.onnx"
    assert op_types(onnx.load(home / "models" / "net.onnx").graph) == FOLDED


def test_a_folder_that_may_not_be_written_is_one_line(home: Path) -> None:
    prefix = []
    if os.geteuid() == 0:  # nothing is forbidden to root, unless it gives that up
        if not shutil.which("setpriv"):
            pytest.skip("root without setpriv")
        prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    before = content(home)
    (home / "models").chmod(0o555)
    try:
        done = fuser("optimize", "net.onnx", "--no-verify", cwd=home / "models", prefix=prefix)
        fails(done, "Permission denied", "net.fused.onnx")
        done = fuser("optimize", "net.onnx", "net.onnx", "--no-verify", cwd=home / "models", prefix=prefix)
        fails(done, "Permission denied")
    finally:
        (home / "models").chmod(0o755)
    assert content(home) == before


@pytest.mark.parametrize("existing", [False, True])
def test_no_room_for_the_output_leaves_what_was_there(existing: bool, home: Path) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    if existing:
        (home / "here" / "out.onnx").write_bytes(b"old")
    before = content(home)
    arguments = ("optimize", "link.onnx", "out.onnx", "--single-file", "--no-verify")
    fails(fuser(*arguments, cwd=home / "here", before=little_room), "cannot write", "File too large")
    assert content(home) == before


def test_a_device_is_no_place_for_a_model(home: Path) -> None:
    fails(fuser("optimize", "link.onnx", "/dev/full", "--no-verify", cwd=home / "here"), "not a regular file")


@pytest.mark.parametrize("name", ["/dev/stdout", "log"])
def test_a_model_does_not_take_the_place_of_what_is_printed(name: str, home: Path) -> None:
    log = home / "here" / "log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "fuser", "optimize", "link.onnx", name, "--no-verify"]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, cwd=log.parent, timeout=120)
    assert (done.returncode, log.read_text()) == (2, "")
    assert done.stderr.startswith(f"error: cannot write {name}: what is printed goes there")


def test_a_pipe_is_no_place_for_a_model(home: Path) -> None:
    fails(fuser("optimize", "link.onnx", "/dev/stdout", "--no-verify", cwd=home / "here"), "not a regular file")


@pytest.mark.parametrize("ending", [".json", ".onnxjson", ".onnxtxt", ".pbtxt", ".textproto", ".prototxt"])
def test_names_that_onnx_reads_as_text_are_refused(ending: str, home: Path) -> None:
    before = content(home)
    done = fuser("optimize", "link.onnx", f"out{ending}", cwd=home / "here")
    fails(done, f"cannot write out{ending}: onnx reads {ending} as text", "call it .onnx")
    assert content(home) == before


def test_data_files_that_leave_the_folder_are_refused(home: Path) -> None:
    secret = home / "secret.bin"
    np.zeros(10_000, np.float32).tofile(secret)
    for location in ("../secret.bin", str(secret)):
        proto = onnx.load(home / "models" / "net.onnx", load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (home / "models" / "bad.onnx").write_bytes(proto.SerializeToString())
        fails(fuser("optimize", "bad.onnx", cwd=home / "models"), "outside the model's folder")
    (home / "models" / "net.bin").unlink()
    (home / "models" / "net.bin").symlink_to("../secret.bin")
    fails(fuser("optimize", "net.onnx", cwd=home / "models"), "outside the model's folder")
    assert sorted(os.listdir(home / "models")) == ["bad.onnx", "net.bin", "net.onnx"]
