"""Many files at once: one outcome each, whatever happens to the others, on any executor."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx_models import batch_norm, conv, conv_constants, model, op_types

from fuser import many
from fuser.errors import InputError
from fuser.isolate import Worker
from fuser.many import Outcome, optimize_many

UNVERIFIED: Any = {"verify": False}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two sound models, and between them one that is none."""
    paths = [tmp_path / name for name in ("first.onnx", "broken.onnx", "second.onnx")]
    for path in paths:
        onnx.save(model([conv(), batch_norm()], constants=conv_constants()), path)
    paths[1].write_bytes(b"this is no model")
    return paths


def check(outcomes: list[Outcome], files: list[Path], folder: Path) -> None:
    assert [outcome.path for outcome in outcomes] == [str(path) for path in files]
    first, broken, second = outcomes
    for outcome in (first, second):
        assert outcome.ok and not outcome.error and outcome.exit_code == 0
        assert outcome.result is not None and len(outcome.result.report.applied) == 1
        written = folder / Path(outcome.path).name
        assert Path(outcome.result.model) == written
        assert op_types(onnx.load(written).graph) == ["Conv"]
    assert not broken.ok and broken.exit_code == 2
    assert broken.error and "\n" not in broken.error
    assert not (folder / "broken.onnx").exists()


def test_a_broken_model_does_not_stop_the_others(files: list[Path], tmp_path: Path) -> None:
    check(optimize_many(files, tmp_path / "out", jobs=2, **UNVERIFIED), files, tmp_path / "out")


def test_results_are_verified_by_default(files: list[Path], tmp_path: Path) -> None:
    (outcome,) = optimize_many(files[:1], tmp_path / "out")
    assert outcome.result is not None and outcome.result.report.verification.verdict == "equivalent"


@contextmanager
def dask() -> Iterator[Executor]:
    import distributed

    silent = {"silence_logs": 50, "dashboard_address": None}
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **silent) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


class Remote(Executor):
    """What the executors of clusters have in common: whatever goes there and comes back is pickled."""

    def __enter__(self) -> Remote:
        return self

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        sent = pickle.dumps((function, args, kwargs))
        function, args, kwargs = pickle.loads(sent)
        future: Future[Any] = Future()
        future.set_result(pickle.loads(pickle.dumps(function(*args, **kwargs))))
        return future


@pytest.mark.parametrize(
    "make",
    [
        lambda: ThreadPoolExecutor(2),
        lambda: ProcessPoolExecutor(2, multiprocessing.get_context("spawn")),
        Remote,
        dask,
    ],
    ids=["threads", "processes", "pickled", "dask"],
)
def test_any_executor_will_do(make: Callable[[], Any], files: list[Path], tmp_path: Path) -> None:
    with make() as executor:
        check(optimize_many(files, tmp_path / "out", executor=executor, **UNVERIFIED), files, tmp_path / "out")
        assert executor.submit(int, "1").result() == 1, "it was shut down"


def test_outcomes_can_be_pickled_and_told_as_json(files: list[Path], tmp_path: Path) -> None:
    outcomes = optimize_many(files, tmp_path / "out", jobs=1, **UNVERIFIED)
    for outcome, again in zip(outcomes, pickle.loads(pickle.dumps(outcomes)), strict=True):
        assert again.to_dict() == outcome.to_dict()
        assert again.to_dict()["report"] is None or again.to_dict()["report"]["applied"]


def test_a_script_needs_no_main_guard(files: list[Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from fuser.many import optimize_many\n"
        "print('started')\n"
        "found = optimize_many(sys.argv[2:], sys.argv[1], jobs=2, verify=False)\n"
        "print([one.ok for one in found])\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "out"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["started", "[True, False, True]"], done.stderr


class Lossy(Executor):
    """Loses a task, as a pool does whose process is killed."""

    def submit(self, function: Any, /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if "broken" in args[0]:
            future.set_exception(RuntimeError("a worker\nwas lost"))
        else:
            future.set_result(function(*args, **options))
        return future


def test_a_task_that_an_executor_loses_is_one_failure(files: list[Path], tmp_path: Path) -> None:
    outcomes = optimize_many(files, tmp_path / "out", executor=Lossy(), **UNVERIFIED)
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert outcomes[1].error == "it could not be run: RuntimeError: a worker was lost"
    assert outcomes[1].exit_code == 1


def deadly(source: str, target: str, options: dict[str, Any]) -> Outcome:
    if "broken" in source:
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(source, error="alive")


def test_a_crash_harms_one_file_only(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deadly(Worker):
        def call(self, function: str, *args: Any, **options: Any) -> Any:
            return super().call("test_many:deadly", *args, **options)

    monkeypatch.setattr(many, "Worker", Deadly)
    outcomes = optimize_many(files, tmp_path / "out", jobs=1)
    assert [outcome.error for outcome in outcomes] == [
        "alive", "while it was optimized, the process was killed by SIGKILL", "alive",
    ]  # fmt: skip


def test_progress_is_told_of_each_outcome(files: list[Path], tmp_path: Path) -> None:
    told: list[Outcome] = []
    outcomes = optimize_many(
        files, tmp_path / "out", executor=ThreadPoolExecutor(1), progress=told.append, **UNVERIFIED
    )
    assert sorted(one.path for one in told) == sorted(one.path for one in outcomes)


def test_an_interruption_starts_nothing_more(files: list[Path], tmp_path: Path) -> None:
    def interrupt(outcome: Outcome) -> None:
        raise KeyboardInterrupt

    copies = [tmp_path / f"{number}.onnx" for number in range(40)]
    for copy in copies:
        copy.write_bytes(files[0].read_bytes())
    with pytest.raises(KeyboardInterrupt):
        optimize_many(copies, tmp_path / "out", jobs=1, progress=interrupt, **UNVERIFIED)
    assert len(list((tmp_path / "out").glob("*.onnx"))) < len(copies)


def test_files_of_one_name_are_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"several of the files are called first\.onnx"):
        optimize_many([files[0], tmp_path / "sub" / "first.onnx"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_arguments_is_said_before_anything_is_done(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not both"):
        optimize_many(files, tmp_path, executor=ThreadPoolExecutor(1), jobs=2)
    with pytest.raises(InputError, match="1 or more"):
        optimize_many(files, tmp_path, jobs=0)
    with pytest.raises(InputError, match="a list of files"):
        optimize_many(str(files[0]), tmp_path)
    for option in ({"layout": "both"}, {"verify": "perhaps"}, {"shared_weights": "keep"}, {"passes": ["nothing"]}):
        with pytest.raises(InputError, match=r"both|perhaps|keep|nothing"):
            optimize_many(files, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="speed"):
        optimize_many(files, tmp_path, speed=11)
    with pytest.raises(InputError, match="cannot make the folder"):
        optimize_many(files, files[0])


def test_the_models_themselves_are_not_overwritten(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"out/first\.onnx: it is one of the models to read"):
        optimize_many(files, tmp_path / "out")
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "first.onnx"
    other.symlink_to(files[2])
    with pytest.raises(InputError, match=r"second\.onnx: it is one of the models to read"):
        optimize_many([other, files[2]], tmp_path)


def test_a_folder_is_made_for_models_that_are_there(files: list[Path], tmp_path: Path) -> None:
    (outcome,) = optimize_many([tmp_path / "none.onnx"], tmp_path / "out")
    assert "cannot read" in outcome.error and not (tmp_path / "out").exists()
    optimize_many([tmp_path / "none.onnx", files[0]], tmp_path / "out", **UNVERIFIED)
    assert os.listdir(tmp_path / "out") == ["first.onnx"]


def test_no_files_are_no_outcomes(tmp_path: Path) -> None:
    assert optimize_many([], tmp_path / "out") == []
