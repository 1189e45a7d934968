"""Passes by name, from the entry-point group `fuser.passes`: our own come in through the same door.

[project.entry-points."fuser.passes"]
my-pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fuser.errors import InputError
from fuser.rewrite import RewritePass

GROUP = "fuser.passes"


@dataclass(frozen=True)
class PassInfo:
    """A registered pass: its class, and the distribution that brought it."""

    name: str
    owner: str
    cls: type[RewritePass[Any, Any]]

    @property
    def documentation(self) -> str:
        """What it says of itself: its file's docstring, where the file is that one pass, else its class's."""
        module = inspect.getmodule(self.cls)
        alone = module is not None and module.__name__.rpartition(".")[2].replace("_", "-") == self.name
        return inspect.getdoc(module if alone else self.cls) or ""

    @property
    def summary(self) -> str:
        """The first line of that."""
        return self.documentation.split("\n", 1)[0]


@dataclass(frozen=True)
class BrokenPass:
    """An entry point that could not be used, and why; the others are not affected."""

    name: str
    owner: str
    reason: str

    def __str__(self) -> str:
        return f"the pass {self.name} of {self.owner} cannot be used: {self.reason}"


@dataclass(frozen=True)
class Registry:
    """What is installed.  `passes` are in the order in which they run by default."""

    passes: tuple[PassInfo, ...]
    broken: tuple[BrokenPass, ...]

    def select(
        self, names: Iterable[str] | None = None, skip: Iterable[str] = (), **options: Any
    ) -> list[RewritePass[Any, Any]]:
        """The passes to run: all of them, or those named, in the order given, without those to skip.

        options: given to each pass that has a field of that name.

        Raises `InputError` for a name that is not registered, or both asked for and to skip.
        """
        known = {info.name: info for info in self.passes}
        wanted, skip = list(known if names is None else names), set(skip)
        for name in [*wanted, *skip]:
            if name not in known:
                raise InputError(self._unknown(name))
        if names is not None and (both := skip.intersection(wanted)):
            raise InputError(f"the pass {min(both)!r} is both to run and to skip; say one of them")
        return [_create(known[name].cls, options) for name in wanted if name not in skip]

    def info(self, name: str) -> PassInfo:
        """The pass of that name; raises `InputError` where none is registered."""
        for info in self.passes:
            if info.name == name:
                return info
        raise InputError(self._unknown(name))

    def _unknown(self, name: str) -> str:
        for broken in self.broken:
            if broken.name == name:
                return str(broken)
        return f"there is no pass {name!r}; the passes are {', '.join(info.name for info in self.passes)}"


def load() -> Registry:
    """Read the entry points.  A plugin that fails to import, or claims a name that is taken, is set aside."""
    passes: dict[str, PassInfo] = {}
    broken: list[BrokenPass] = []
    owned = [(_owner(point), point) for point in entry_points(group=GROUP)]
    # Sorting lets the names be claimed in the same order on every machine, our own first.
    for owner, point in sorted(owned, key=lambda pair: (pair[0] != "graph-fuser", pair[0], pair[1].name)):
        if point.name in passes:
            if passes[point.name].owner != owner:  # the same distribution seen twice on the path is no clash
                other = passes[point.name].owner
                broken.append(BrokenPass(point.name, owner, f"the name is taken by {other}; rename one of them"))
            continue
        try:
            passes[point.name] = PassInfo(point.name, owner, _checked(point))
        except (Exception, SystemExit) as error:  # whatever a stranger's import may raise
            broken.append(BrokenPass(point.name, owner, f"{type(error).__name__}: {error}"))
    # Exact passes clean up for the others; beyond that the fixed point makes order a matter of speed alone.
    ordered = sorted(
        passes.values(), key=lambda info: (info.cls.late, info.cls.contract.value, info.owner != "graph-fuser")
    )
    return Registry(tuple(ordered), tuple(broken))


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"


def _checked(point: EntryPoint) -> type[RewritePass[Any, Any]]:
    cls = point.load()
    if not (inspect.isclass(cls) and issubclass(cls, RewritePass)):
        raise TypeError(f"{point.value} is not a subclass of fuser.rewrite.RewritePass")
    if inspect.isabstract(cls):
        raise TypeError(f"{point.value} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    if getattr(cls, "name", None) != point.name:
        raise TypeError(f"{point.value} calls itself {getattr(cls, 'name', None)!r}, its entry point {point.name!r}")
    _create(cls, {})
    return cls


def _create(cls: type[RewritePass[Any, Any]], options: dict[str, Any]) -> RewritePass[Any, Any]:
    if not dataclasses.is_dataclass(cls):
        return cls()
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in options.items() if name in fields})
