"""A function in a process of its own: answers, failures, and a pipe that never gets out of step."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fuser.isolate import Crashed, Raised, TimedOut, Worker


@pytest.fixture(scope="module")
def worker():
    with Worker() as worker:
        yield worker


def test_answers(worker):
    assert worker.call("math:sqrt", 9) == 3
    assert worker.call("os:getpid") == worker.pid != os.getpid()


def test_an_exception_is_named_in_one_line(worker):
    with pytest.raises(Raised, match=r"^ValueError: ") as caught:
        worker.call("math:sqrt", -1)
    assert "Traceback" in caught.value.details


def test_a_missing_function_is_an_error_of_the_call(worker):
    with pytest.raises(Raised, match="AttributeError"):
        worker.call("math:nothing")
    with pytest.raises(Raised, match="ModuleNotFoundError"):
        worker.call("no_such_module:f")


def test_what_does_not_pickle_leaves_the_pipe_in_step(worker):
    with pytest.raises(Exception, match="pickle"):
        worker.call("builtins:len", [b"x" * (1 << 20), lambda: None])
    with pytest.raises(Raised, match="pickle"):
        worker.call("threading:Lock")
    assert worker.call("builtins:len", [1, 2]) == 2


def test_what_a_function_prints_does_not_reach_the_pipe(worker):
    assert worker.call("builtins:print", "hello") is None
    assert worker.call("os:write", 1, b"raw") == 3
    assert worker.call("math:sqrt", 4) == 2


def test_a_crash_is_named_and_the_next_call_starts_afresh(worker):
    pid = worker.call("os:getpid")
    with pytest.raises(Crashed, match="killed by SIGABRT"):
        worker.call("os:abort")
    with pytest.raises(Crashed, match="exit code 7"):
        worker.call("os:_exit", 7)
    assert worker.call("os:getpid") != pid


def test_a_hang_is_ended(worker):
    with pytest.raises(TimedOut, match=r"no answer within 0\.2 s"):
        worker.call("time:sleep", 60, timeout=0.2)
    assert worker.call("math:sqrt", 4) == 2


def test_an_interrupted_call_does_not_answer_the_next_one(worker, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    worker.call("math:sqrt", 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fuser.isolate.pickle.load", interrupt)
        worker.call("math:sqrt", 100)
    assert worker.call("math:sqrt", 16) == 4


def test_ctrl_c_is_left_to_the_parent(worker):
    pid = worker.call("os:getpid")
    os.kill(pid, signal.SIGINT)
    time.sleep(0.05)
    assert worker.call("os:getpid") == pid


def test_preloaded_modules_are_there_at_the_first_call():
    with Worker(preload=["wave", "no_such_module"]) as worker:
        worker.start()
        assert worker.call("builtins:eval", "'wave' in __import__('sys').modules")


def test_the_child_finds_the_modules_of_the_parent_and_no_others(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("def f(): return 42")
    shadow = tmp_path / "here"
    shadow.mkdir()
    (shadow / "wave.py").write_text("raise SystemExit(9)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(shadow)
    with Worker() as worker:
        assert worker.call("neighbour:f") == 42
        assert worker.call("builtins:eval", "__import__('wave').__name__") == "wave"


def test_the_environment_is_extended():
    with Worker(env={"FUSER_TEST": "yes"}) as worker:
        assert worker.call("os:getenv", "FUSER_TEST") == "yes"
        assert worker.call("os:getenv", "PATH") == os.environ["PATH"]


def test_closing_twice_is_fine():
    worker = Worker()
    worker.close()
    worker.call("math:sqrt", 4)
    worker.close()
    worker.close()
    assert worker.pid is None
