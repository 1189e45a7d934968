"""Files that are replaced whole or not at all.

The new content goes to a file without a name (`O_TMPFILE`): nothing is left of it when the process is killed.  It
gets its name at the end: directly where the target does not exist yet; else over a hidden name,
`.NAME.XXXXXXXX.fuser`, as Linux cannot put a nameless file in the place of another.  A kill in the microseconds
between leaves that hidden file, and on file systems without `O_TMPFILE` (NFS) a kill at any moment does; the next
save of the same target removes it.  A lock tells such a file from one that a living process is writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from fuser.files.sources import Blob

_CHUNK = 1 << 20
# What copy_file_range says where it cannot do it: other file systems, old kernels.
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[int]:
    """A file or folder, no link, open and locked; raises `OSError` where another process has locked it.

    wait: until it is free.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


class Replacement:
    """The content to come of `path`, which must not be a symbolic link.

        with Replacement(path) as new:
            new.write(...)
            new.prepare()
            new.commit()
            new.sync_folder()

    Nothing is seen at `path` before `commit`, and nothing stays when it is not reached.  An existing file's
    permissions and, if allowed, owner are kept.  Raises `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._waiting: list[bytes] = []  # small writes, joined
        self._waiting_size = 0
        self._name: Path | None = None
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._remove_leftovers()
            self._fd = self._open()
        except BaseException:
            os.close(self._folder)
            raise

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name)
        os.close(self._fd)
        os.close(self._folder)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._waiting.append(data)
        self._waiting_size += len(data)
        self.size += len(data)
        if self._waiting_size >= _CHUNK:
            self._flush()

    def pad(self, position: int) -> None:
        """Append zeros up to `position`."""
        self.write(bytes(position - self.size))

    def copy(self, blob: Blob) -> None:
        """Append a blob, without holding more than a chunk of it in memory."""
        if len(blob) < _CHUNK // 16:
            self.write(blob.array().tobytes())
            return
        self._flush()
        done = self._copy_in_kernel(blob)
        buffer = np.empty(min(len(blob) - done, max(_CHUNK // blob.source.step, 1) * blob.source.step), np.uint8)
        while done < len(blob):
            view = buffer.data[: len(blob) - done]
            blob.source.readinto(view, blob.offset + done)
            self._write_all(view)
            done += len(view)
        self.size += len(blob)

    def prepare(self) -> None:
        """Bring the content to the disk: what can fail for want of space fails here."""
        self._flush()
        self._keep_permissions()
        os.fsync(self._fd)

    def commit(self) -> None:
        """Give the prepared file its place.  File systems keep the order of such steps through a power failure."""
        if self._name is None and not self._link(self.path):
            while not self._link(name := self._hidden()):
                pass
            self._name = name
        if self._name:
            os.replace(self._name, self.path)
            self._name = None

    def sync_folder(self) -> None:
        """Bring the names to the disk."""
        os.fsync(self._folder)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        nameless = getattr(os, "O_TMPFILE", None)
        if nameless and os.path.exists("/proc/self/fd"):
            try:
                fd = os.open(self.path.parent, flags | nameless, 0o666)
                fcntl.flock(fd, fcntl.LOCK_EX)
                return fd
            except OSError as error:
                if error.errno not in _CANNOT | {errno.EISDIR, errno.ENOENT}:
                    raise
        name = self._hidden()
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666)
        self._name = name
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    def _hidden(self) -> Path:
        return self.path.with_name(f".{self.path.name[:50]}.{secrets.token_hex(4)}.fuser")

    def _remove_leftovers(self) -> None:
        """Remove the hidden files of saves that were killed: those that nobody has locked."""
        with os.scandir(self.path.parent) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if name.startswith(f".{self.path.name[:50]}.") and name.endswith(".fuser"):
                with contextlib.suppress(OSError), locked(self.path.with_name(name)):
                    os.unlink(self.path.with_name(name))

    def _link(self, name: Path) -> bool:
        """Give the nameless file a name; False when it is taken."""
        try:
            # A folder descriptor makes Python call linkat, which follows the link in /proc.
            os.link(f"/proc/self/fd/{self._fd}", name, src_dir_fd=self._folder, follow_symlinks=True)
        except FileExistsError:
            return False
        return True

    def _keep_permissions(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            old = os.stat(self.path)
            with contextlib.suppress(PermissionError):
                os.fchown(self._fd, old.st_uid, old.st_gid)
            os.fchmod(self._fd, stat.S_IMODE(old.st_mode))

    def _flush(self) -> None:
        if self._waiting:
            data, self._waiting, self._waiting_size = b"".join(self._waiting), [], 0
            self._write_all(memoryview(data))

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._fd, view) :]

    def _copy_in_kernel(self, blob: Blob) -> int:
        """How many bytes of the blob the kernel copied from file to file (some file systems share the blocks)."""
        done = 0
        if blob.source.fd is None or not hasattr(os, "copy_file_range"):
            return done
        try:
            while done < len(blob):
                count = os.copy_file_range(blob.source.fd, self._fd, len(blob) - done, blob.offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        return done
