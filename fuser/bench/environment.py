"""The machine a measurement was made on, and what it was busy with."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("graph-fuser", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt")
_CGROUP = Path("/sys/fs/cgroup/cpu.max")
_FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")

OTHER_LOAD = 0.10
"""The share of the machine above which the work of others is worth a warning."""


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its container (cgroup v2), rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP).partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def describe(device: str, threads: int, seed: int) -> dict[str, Any]:
    """What a reader of the numbers needs to know; values that cannot be read are None."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "cores_online": os.cpu_count(),
        "governor": _read(_FREQUENCY / "scaling_governor") or None,
        "mhz": _mhz("scaling_cur_freq"),
        "mhz_max": _mhz("cpuinfo_max_freq"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_bytes": _memory(),
        "gpu": _gpu() if device == "cuda" else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "device": device,
        "threads": threads,
        "seed": seed,
    }


@dataclass
class OtherLoad:
    """Work of other processes while something was measured, as a share of the whole machine (0 to 1)."""

    share: float | None = None


@contextmanager
def watch() -> Iterator[OtherLoad]:
    """Watch what else the machine does; the answer is there when the block, and its children, have ended."""
    load, before, mine = OtherLoad(), _ticks(), _own_seconds()
    try:
        yield load
    finally:
        after = _ticks()
        if before and after and after.total > before.total:
            own = (_own_seconds() - mine) * os.sysconf("SC_CLK_TCK")
            load.share = max(0.0, (after.busy - before.busy - own) / (after.total - before.total))


@dataclass(frozen=True)
class _Ticks:
    busy: int
    total: int


def _ticks() -> _Ticks | None:
    """Clock ticks of all cores since boot: user nice system idle iowait irq softirq steal (proc_stat(5))."""
    first = _read(Path("/proc/stat")).partition("\n")[0].split()
    if first[:1] != ["cpu"]:
        return None
    ticks = [int(x) for x in first[1:9]]
    return _Ticks(sum(ticks) - ticks[3] - ticks[4], sum(ticks))


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _cpu_model() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _mhz(name: str) -> int | None:
    khz = _read(_FREQUENCY / name)
    return int(khz) // 1000 if khz.isdigit() else None


def _memory() -> int | None:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _gpu() -> dict[str, str] | None:
    """Name, driver and clocks of the first GPU, from the driver's own tool."""
    fields = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "power.limit")
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in answer.split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
