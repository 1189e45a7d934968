"""`optimize` over many files at once: one process each by default, or any executor, that of a cluster included.

for outcome in optimize_many(["a.onnx", "b.onnx"], "optimized"):
    print(outcome.path, outcome.error or outcome.result)
"""

from __future__ import annotations

import inspect
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuser import api
from fuser.api import Result
from fuser.errors import FuserError, InputError
from fuser.isolate import Crashed, Worker, cores


@dataclass(frozen=True)
class Outcome:
    """What became of one file: a result, or why there is none.  Can be pickled.

    path: as it was given.
    result: its `model` is the path that was written.
    error: one line; empty where there is a result.
    exit_code: what the command line would end with.
    """

    path: str
    result: Result | None = None
    error: str = ""
    exit_code: int = 0

    @property
    def ok(self) -> bool:
        return self.result is not None

    def to_dict(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        written = str(self.result.model) if self.result else None
        report = self.result.report.to_dict() if self.result else None
        return {"path": self.path, "output": written, "error": self.error, "report": report}


def optimize_many(
    paths: Iterable[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    jobs: int | None = None,
    progress: Callable[[Outcome], None] | None = None,
    **options: Any,
) -> list[Outcome]:
    """Optimize each file of `paths` into `output_dir`, under its own name; one that fails does not stop the others.

    Args:
        paths: .onnx files; their names have to differ, whatever folders they are in.
        output_dir: made if it does not exist, and none of those of `paths`.  For an executor of other machines: a
            folder that they share.
        executor: any `concurrent.futures.Executor`, that of a cluster included (Dask's `Client.get_executor()`); it
            is not shut down.  By default each job has a process of its own, so that a crash harms one file only.
        jobs: how many run at a time without an `executor`; one for each core by default.
        progress: called with each outcome, in the order in which they come in.
        options: as for `optimize`; they apply to all.

    Returns:
        An outcome for each path, in the order of `paths`.

    Raises:
        InputError: the arguments are not usable; of a file that is not, its outcome tells.
        TypeError: an option that `optimize` does not have.
    """
    if executor is not None and jobs is not None:
        raise InputError("give an executor or a number of jobs, not both: an executor decides that itself")
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs is 1 or more, not {jobs}")
    inspect.signature(api.optimize).bind(None, None, **options)  # an unknown option is no failure of a file
    api.check_options(**options)
    if isinstance(paths, (str, os.PathLike)):
        raise InputError("paths is a list of files")
    sources = [os.fspath(path) for path in paths]
    targets = _targets(sources, Path(output_dir))
    if executor is not None or any(map(os.path.exists, sources)):  # other machines may see what this one does not
        _make(Path(output_dir))
    with ExitStack() as stack:
        run: Callable[[str, str, dict[str, Any]], Outcome] = optimize_one
        if executor is None:
            workers = _Workers(stack)
            executor = stack.enter_context(ThreadPoolExecutor(min(jobs or cores(), max(len(sources), 1))))
            run = workers.optimize_one
        futures: dict[Future[Outcome], int] = {}
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            futures[executor.submit(run, source, target, options)] = number
        outcomes: dict[int, Outcome] = {}
        try:
            for future in as_completed(futures):
                number = futures[future]
                outcomes[number] = _outcome(future, sources[number])
                if progress is not None:
                    progress(outcomes[number])
        except BaseException:  # Ctrl-C: what has not begun is not to begin
            for future in futures:
                future.cancel()
            raise
    return [outcomes[number] for number in range(len(sources))]


def optimize_one(source: str, target: str, options: dict[str, Any]) -> Outcome:
    """One file, in whatever process this is; every failure is an outcome."""
    try:
        return Outcome(source, api.optimize(source, target, **options))
    except FuserError as error:
        return Outcome(source, None, _line(error), error.exit_code)
    except Exception as error:  # it must not take the others along
        return Outcome(source, None, f"unexpected {type(error).__name__}: {_line(error)}", 1)


class _Workers:
    """A child process for each thread that calls.

    Unlike the children of a `ProcessPoolExecutor`, these do not import the caller's script again, and the death of one
    fails only the file that it was at.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._local, self._lock = stack, threading.local(), threading.Lock()

    def optimize_one(self, source: str, target: str, options: dict[str, Any]) -> Outcome:
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = Worker(preload=["fuser.api"])
            with self._lock:
                self._stack.callback(worker.close)
        outcome: Outcome = worker.call("fuser.many:optimize_one", source, target, options)
        return outcome


def _targets(sources: list[str], folder: Path) -> list[str]:
    names = Counter(Path(source).name for source in sources)
    if doubled := [name for name, count in names.items() if count > 1]:
        raise InputError(f"several of the files are called {doubled[0]}; in one folder they would overwrite each other")
    targets = [str(folder / Path(source).name) for source in sources]
    places = set(map(os.path.realpath, sources))
    for target in targets:
        if os.path.realpath(target) in places:
            raise InputError(f"cannot write {target}: it is one of the models to read; choose another output folder")
    return targets


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def _outcome(future: Future[Outcome], source: str) -> Outcome:
    try:
        return future.result()
    except Crashed as error:
        return Outcome(source, None, f"while it was optimized, {_line(error)}", 1)
    except Exception as error:  # the executor's own: a broken pool, a worker lost, options that cannot be pickled
        return Outcome(source, None, f"it could not be run: {type(error).__name__}: {_line(error)}", 1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
