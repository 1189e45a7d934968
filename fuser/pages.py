"""The page of a pass, in Markdown, from what its docstring says: the equation, then its refusals.

Fold something into something.

    y = f(x)   =>   y = x

What has to be known of it.

Refusals:
    some-code   when that is
    other-code, third-code: as for another-pass
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator

from fuser.registry import PassInfo
from fuser.rewrite import Contract, RewritePass

CONTRACTS = {
    Contract.EXACT: "exact: the outputs of the model keep their bits",
    Contract.ROUNDING: "rounding: equal in exact arithmetic; floating point is rounded elsewhere",
}


def page(info: PassInfo) -> str:
    """The page of one pass."""
    story, _, _ = info.documentation.partition("\nRefusals:\n")
    sections = [f"# {info.name}", *_story(story), _table(("", ""), _facts(info))]
    if refusals := refusals_of(info):
        rows = [(", ".join(f"`{code}`" for code in codes), why) for codes, why in refusals]
        sections += ["## Refusals", _table(("code", "when"), rows)]
    return "\n\n".join(sections) + "\n"


def refusals_of(info: PassInfo) -> list[tuple[list[str], str]]:
    """The codes with which the pass says no, and when; a link where another pass has the same."""
    _, _, text = info.documentation.partition("\nRefusals:\n")
    found: list[tuple[list[str], str]] = []
    listed = ""
    for line in map(str.strip, text.splitlines()):
        if entry := re.fullmatch(r"([a-z0-9-]+) {2,}(.+)", line):
            found.append(([entry[1]], entry[2]))
            continue
        if line and not listed and found and not re.match(r"[a-z0-9-]+(, |: as for )", line):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line}")  # the sentence goes on
            continue
        listed = f"{listed} {line}".strip()
        codes, _, other = listed.partition(": as for ")
        if other:
            found.append((codes.split(", "), f"as for [{other}]({other}.md)"))
            listed = ""
    return found


def _story(text: str) -> Iterator[str]:
    """The paragraphs; indented ones, and those with an arrow, are equations."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    for is_equation, group in itertools.groupby(paragraphs, lambda p: p.startswith("    ") or "=>" in p):
        if is_equation:
            yield "```\n{}\n```".format("\n\n".join(map(inspect.cleandoc, group)))
        else:
            yield from group


def _facts(info: PassInfo) -> Iterator[tuple[str, str]]:
    cls = info.cls
    condition = "" if cls.concerns is RewritePass.concerns else (inspect.getdoc(cls.concerns) or "").split("\n")[0]
    yield (
        "candidates",
        f"each `{cls.root.__name__}`" + (f"; {condition[0].lower()}{condition[1:]}" if condition else ""),
    )
    yield "contract", CONTRACTS[cls.contract]
    yield "graphs", " and ".join(cls.hosts)
    if dataclasses.is_dataclass(cls):
        yield "options", " ".join((inspect.getdoc(cls) or "").split())
    yield "from", f"{info.owner}, `{cls.__module__}`"


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
