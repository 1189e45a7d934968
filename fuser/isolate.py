"""Run a function in a process of its own: a crash or a hang of a runtime becomes a named outcome.

    with Worker() as worker:
        worker.call("fuser.proof.runners:run_onnx", path, feeds, timeout=60)

The child is a fresh interpreter (`python -m fuser.isolate`), not a fork: runtimes with threads of their own
do not survive a fork, and a spawned `multiprocessing` child would import the user's main script again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from fuser.errors import FuserError


class IsolatedFailure(FuserError):
    """What went wrong in the child; the message is one line."""

    exit_code = 1


class Crashed(IsolatedFailure):
    """The child died: a segmentation fault, an abort, the out-of-memory killer."""


class TimedOut(IsolatedFailure):
    """The child did not answer within its time."""


class Raised(IsolatedFailure):
    """The function raised; `details` holds the child's traceback."""

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details

    @classmethod
    def of(cls, error: Exception) -> Raised:
        """What to tell of an exception that is being handled."""
        first = (str(error).strip().splitlines() or [""])[0]
        return cls(f"{type(error).__name__}: {first}", traceback.format_exc())


class Worker:
    """A child process that answers one call after another; it is started at the first call.

    After a crash or a time-out the next call starts a fresh child, so nothing is lost but that one call.
    """

    def __init__(self, env: dict[str, str] | None = None, preload: Sequence[str] = ()) -> None:
        """env: added to the child's environment.  preload: modules the child imports as soon as it starts."""
        # The child finds what the parent finds, a user's module next to their script say, and nothing else:
        # without the second variable, a folder `onnx` in the working directory would shadow the package.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._env = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", **(env or {})}
        self._preload = list(preload)
        self._child: subprocess.Popen[bytes] | None = None
        self._stderr: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the child now, without waiting for it, so that several can import at the same time."""
        self._start()

    @property
    def pid(self) -> int | None:
        """The child's process id, or None before the first call."""
        return self._child.pid if self._child else None

    def call(self, function: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """The result of `module:function(*args, **kwargs)` in the child.

        Arguments and result travel pickled.  Raises `Crashed`, `TimedOut` or `Raised`.
        """
        request = pickle.dumps((function, args, kwargs), pickle.HIGHEST_PROTOCOL)  # may fail: before the pipe
        child = self._start()
        assert child.stdin and child.stdout
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            child.kill()

        timer = threading.Timer(timeout, expire) if timeout else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            child.stdin.write(request)
            child.stdin.flush()
            ok, answer = pickle.load(child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            code, tail = child.wait(), self._last_words()
            self.close()
            if expired.is_set():
                raise TimedOut(f"no answer within {timeout:g} s") from None
            raise Crashed(_cause(code) + (f": {tail}" if tail else "")) from None
        except BaseException:  # Ctrl-C: the answer still to come must not be taken for the next call's
            self.close()
            raise
        finally:
            if timer:
                timer.cancel()
        if not ok:
            raise Raised(*answer)
        return answer

    def close(self) -> None:
        """End the child; safe to call twice."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, self._stderr):
            if stream:
                with contextlib.suppress(OSError):  # unsent bytes of a child that is gone
                    stream.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
            self._child = subprocess.Popen(
                [sys.executable, "-m", "fuser.isolate", *self._preload],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=self._env,
            )
        return self._child

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cause(code: int) -> str:
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def _serve() -> None:
    """Answer calls until the parent closes the pipe.  What the runtimes print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    calls = sys.stdin.buffer
    for name in sys.argv[1:]:
        with contextlib.suppress(Exception):  # the first call that needs it says what is wrong
            importlib.import_module(name)
    while True:
        try:
            function, args, kwargs = pickle.load(calls)
        except EOFError:
            return
        try:
            module, name = function.split(":")
            result = getattr(importlib.import_module(module), name)(*args, **kwargs)
            answer = pickle.dumps((True, result), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raised = Raised.of(error)
            answer = pickle.dumps((False, (str(raised), raised.details)), pickle.HIGHEST_PROTOCOL)
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    _serve()
