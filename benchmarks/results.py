"""benchmarks/RESULTS.md: one section for each command, replaced when it runs with `--write`."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuser.bench import ArmResult, environment
from fuser.bench.render import interval, seconds
from fuser.bench.sampling import AFTER, BEFORE

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = """# Results

Written by the commands named in each section; see fuser/bench/statistics.py for what the verdicts mean.
"after / before" is the ratio of the latencies (below 1: faster) with its 99 % interval.
"""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def machine(device: str = "cpu", threads: int | None = None, seed: int = 0) -> str:
    """One line on where the numbers come from."""
    e: Mapping[str, Any] = environment.describe(device, threads or environment.usable_cores(), seed)
    gpu = f"{e['gpu']['name']}, driver {e['gpu']['driver_version']}; " if e["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    today = datetime.date.today().isoformat()
    return f"{gpu}{e['cpu']}, {e['cores']} cores, {e['threads']} threads; Python {e['python']}, {versions}; {today}."


def comparison(result: ArmResult) -> list[str]:
    """The cells "before", "after", "after / before" and "verdict" of one arm; a failed one says why."""
    if not result.comparison:
        return ["", "", "", result.problem or "interrupted"]
    medians = [seconds(result.summaries[role].median) for role in (BEFORE, AFTER)]
    return [*medians, interval(result.comparison.change), result.comparison.verdict.word]


def write(section: str, body: str, path: Path = RESULTS) -> None:
    """Put `body` under the heading `section`, with the command that runs; the other sections stay as they are."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = path.read_text() if path.exists() else TITLE
    parts = text.rstrip().split("\n## ")
    new = f"{section}\n\n`{command}`\n\n{body}"
    kept = [part.rstrip() for part in parts[1:]]
    at = next((i for i, part in enumerate(kept) if part.split("\n", 1)[0] == section), len(kept))
    kept[at : at + 1] = [new]
    path.write_text("\n\n## ".join([parts[0].rstrip(), *kept]) + "\n")
