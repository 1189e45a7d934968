"""Latency before and after `fuser.optimize`, over a set of architectures, on both IRs.

python benchmarks/latency.py [--net resnet] [--seconds 10] [--json FILE] [--write]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import architectures
import results

import fuser
from fuser.bench import Benchmark

HEADER = ("network", "IR", "arm", "nodes", "before", "after", "after / before", "verdict")


def onnx_pair(name: str, folder: Path, time: float) -> Benchmark:
    """The raw export against what fuser makes of it."""
    before = architectures.export_raw(architectures.build(name), folder / f"{name.replace('/', '-')}.onnx")
    after = before.with_suffix(".fused.onnx")
    fuser.optimize(before, after)
    return fuser.benchmark(before, after, seconds=time, progress=tell(name))


def torch_pair(name: str, folder: Path, time: float) -> Benchmark:
    """The module against what fuser makes of it."""
    model, x = architectures.build(name), architectures.example()
    fused = fuser.optimize(model, example_inputs=(x,)).model
    return fuser.benchmark(model, fused, example_inputs=(x,), seconds=time, progress=tell(name))


PAIRS = {"onnx": onnx_pair, "torch": torch_pair}


def rows(name: str, ir: str, benchmark: Benchmark) -> list[list[Any]]:
    """One row an arm, the ones that failed included."""
    nodes = " → ".join(str(costs.nodes) for costs in benchmark.costs.values())
    return [[name, ir, result.arm.name, nodes, *results.comparison(result)] for result in benchmark.arms]


def tell(name: str) -> Any:
    return lambda line: print(f"{name}: {line}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=architectures.names(), help="repeatable; default: all")
    parser.add_argument("--ir", action="append", choices=list(PAIRS), help="repeatable; default: both")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each arm")
    parser.add_argument("--json", type=Path, help="raw samples and environment")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    options = parser.parse_args()
    table, raw = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.net or architectures.names():
            for ir in options.ir or PAIRS:
                benchmark = PAIRS[ir](name, Path(folder), options.seconds)
                table += rows(name, ir, benchmark)
                raw.append({"network": name, "ir": ir, **benchmark.to_dict()})
                if benchmark.interrupted:
                    break
    body = f"{results.machine()}\nInput 1x{'x'.join(map(str, architectures.INPUT))}.\n\n{results.table(HEADER, table)}"
    print(body)
    if options.json:
        options.json.write_text(json.dumps(raw))
    if options.write:
        results.write("Latency before and after", body)


if __name__ == "__main__":
    main()
