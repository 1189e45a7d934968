"""Folders for files that nobody is to keep: they go at the end, or, when the process was killed, by the next one."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fuser.files.atomic import locked

_PREFIX = f"graph-fuser-scratch-{platform.node()}-"
"""With the name of the host: on a network file system, the others do not see that a folder is locked."""

_YOUNG = 60
"""Seconds for which a folder is left alone: it may not be locked yet."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder, for as long as the context.

    It is locked, which tells it from those of processes that were killed; they are removed.
    """
    _remove_leftovers()
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX))
        with contextlib.suppress(OSError):  # where there are no locks, nothing is removed
            stack.enter_context(locked(name, wait=True))
        yield Path(name)


def _remove_leftovers() -> None:
    names: list[str] = []
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        names += [entry.path for entry in entries if entry.name.startswith(_PREFIX)]
    for name in names:
        with contextlib.suppress(OSError), locked(name) as folder:
            status = os.fstat(folder)
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG:
                shutil.rmtree(name)
