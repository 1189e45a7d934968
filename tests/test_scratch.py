"""Scratch folders are gone at the end, and those of processes that were killed are gone with the next one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuser.scratch import _PREFIX, scratch_folder

HOLD = """
from fuser.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "candidate.onnx").write_bytes(b"a model")
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process in a scratch folder of its own, which looks as if it had been there for long."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    age(folder)
    return process, folder


def age(folder: Path) -> None:
    os.utime(folder, (time.time() - 3600,) * 2)


def test_a_scratch_folder_goes_with_its_context(tmpdir: Path) -> None:
    with pytest.raises(RuntimeError), scratch_folder() as folder:
        (folder / "x").touch()
        assert folder.parent == tmpdir
        raise RuntimeError
    assert os.listdir(tmpdir) == []


def test_the_folder_of_a_killed_process_goes_with_the_next_one(tmpdir: Path) -> None:
    process, left = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (left / "candidate.onnx").exists()
    with scratch_folder() as folder:
        assert os.listdir(tmpdir) == [folder.name]


def test_the_folder_of_a_living_process_stays(tmpdir: Path) -> None:
    process, folder = holder()
    with scratch_folder():
        assert (folder / "candidate.onnx").exists()
    process.communicate("\n")
    assert os.listdir(tmpdir) == []


def test_a_folder_that_may_not_be_locked_yet_stays(tmpdir: Path) -> None:
    fresh = tmpdir / f"{_PREFIX}new"
    fresh.mkdir()
    with scratch_folder():
        assert fresh.exists()
    age(fresh)
    with scratch_folder():
        assert not fresh.exists()


def test_folders_of_other_hosts_and_users_stay(tmpdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmpdir / "graph-fuser-scratch-another-host-1"
    theirs.mkdir()
    age(theirs)
    with scratch_folder():
        assert theirs.exists()
    mine = tmpdir / f"{_PREFIX}old"
    mine.mkdir()
    age(mine)
    monkeypatch.setattr("os.getuid", lambda: os.geteuid() + 1)
    with scratch_folder():
        assert mine.exists()


def test_a_folder_for_temporary_files_that_cannot_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("fuser.scratch.os.scandir", refuse)
    with scratch_folder() as folder:
        assert folder.is_dir()
        monkeypatch.undo()


def test_nothing_else_is_removed(tmpdir: Path) -> None:
    others = [tmpdir / "fuser-data", tmpdir / f"{_PREFIX}a-file", tmpdir / f"{_PREFIX}a-link"]
    others[0].mkdir()
    others[1].touch()
    others[2].symlink_to(others[0])
    for other in others:
        os.utime(other, (0, 0), follow_symlinks=False)
    with scratch_folder():
        assert all(other.exists() for other in others)
