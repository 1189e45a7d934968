"""External data: the files beside a model that hold its tensors, and the paths that are refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from fuser.errors import InputError
from fuser.files.sources import WINDOW, File, Identity, changed
from fuser.files.tensors import shown


class DataFiles:
    """The data files of a model, by location.  One is open at a time, so that thousands are no matter.

    Data lies in the first of `folders` that has it.  A location that leads out of all of them, by `..`, as an
    absolute path or over a symbolic link, is refused: a model from elsewhere must not read other files.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(dict.fromkeys(folders))
        self._files: dict[str, DataFile] = {}
        self._open: File | None = None

    def find(self, location: str, tensor: str) -> DataFile:
        """The data file at `location`.  Raises `InputError`, which names `tensor`."""
        if location not in self._files:
            path = self._path(location, tensor)
            self._files[location] = DataFile(self, path)
        return self._files[location]

    def open(self, path: Path) -> File:
        """The file at `path`, found before; an earlier one may be closed."""
        if self._open is None or self._open.path != path:
            self._open = File(path)
        return self._open

    def close(self) -> None:
        """The one that is open, if one is; it is opened again when it is read."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def paths(self) -> list[Path]:
        """Every data file found so far."""
        return [file.path for file in self._files.values()]

    def identities(self) -> set[tuple[int, int]]:
        """(device, inode) of every data file found so far."""
        return {(file.identity.device, file.identity.inode) for file in self._files.values()}

    def check_unchanged(self) -> None:
        """Raise `InputError` when somebody wrote into a data file since it was opened.

        One that was replaced, or is gone, is another matter: what is still open can be read.
        """
        for file in self._files.values():
            file.check_unchanged()

    def _path(self, location: str, tensor: str) -> Path:
        whose = f"the data of tensor {shown(tensor)}"
        if not self._folders:
            raise InputError(f"{whose} is in the file {shown(location)}: say in which folder (base_dir)")
        if not location or "\0" in location:
            raise InputError(f"{whose} is in a file without a usable name: {shown(location)}")
        for pure in (PurePosixPath(location), PureWindowsPath(location)):
            if pure.anchor or ".." in pure.parts:
                raise InputError(f"{whose} lies outside the model's folder: {shown(location)}")
        inside = [os.path.realpath(folder) for folder in self._folders]
        for folder in self._folders:
            path = os.path.realpath(folder / location)
            if os.path.isdir(path):
                raise InputError(f"{whose} is in {shown(location)}, which is a folder")
            if os.path.lexists(path):
                if not any(os.path.commonpath([path, home]) == home for home in inside):
                    raise InputError(f"{whose} lies outside the model's folder: {shown(location)} leads to {path}")
                return Path(path)
        raise InputError(f"{whose} is missing: no file {shown(location)} in {self._folders[0]}")


class DataFile:
    """One data file: a `Source` that opens it when it is read."""

    step = WINDOW

    def __init__(self, files: DataFiles, path: Path) -> None:
        self._files, self.path = files, path
        self.identity = files.open(path).identity
        self.size = self.identity.size

    @property
    def fd(self) -> int | None:
        return self._file().fd

    def readinto(self, view: memoryview, offset: int) -> None:
        self._file().readinto(view, offset)

    def check_unchanged(self) -> None:
        try:
            now = Identity.of(self.path.stat())
        except OSError:
            return
        if now != self.identity and (now.device, now.inode) == (self.identity.device, self.identity.inode):
            raise changed(self.path)

    def _file(self) -> File:
        file = self._files.open(self.path)
        if file.identity != self.identity:
            raise changed(self.path)
        return file
