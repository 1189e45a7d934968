"""Folders for files that nobody is to keep: they go at the end, or, when the process was killed, by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "graph-fuser-scratch-"

_YOUNG = 60
"""Seconds for which a folder is left alone: it may not be locked yet."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder, for as long as the context.

    It is locked, which tells it from those of processes that were killed; they are removed.
    """
    _remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, _opened(name) as folder:
        with contextlib.suppress(OSError):  # some network file systems have no locks, so nothing is removed there
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield Path(name)


def _remove_leftovers() -> None:
    with os.scandir(tempfile.gettempdir()) as entries:
        names = [entry.path for entry in entries if entry.name.startswith(_PREFIX)]
    for name in names:
        with contextlib.suppress(OSError), _opened(name) as folder:
            status = os.fstat(folder)
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(name)


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
