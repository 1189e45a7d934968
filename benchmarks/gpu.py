"""Latency before and after on a CUDA GPU: float32, float16 and bfloat16, batch 1 and a large one; eager, compiled
and as a CUDA graph.

    python benchmarks/gpu.py [--net resnet] [--out gpu.json] [--write]

Says so and ends well where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import architectures
import results
import torch

import fuser

HEADER = ("network", "dtype", "batch", "arm", "before", "after", "after / before", "verdict")


def rows(name: str, dtype: str, batch: int, time: float) -> tuple[list[list[Any]], dict[str, Any]]:
    """One row an arm, and everything that was measured."""
    model, x = architectures.build(name), architectures.example(batch)
    fused = fuser.optimize(model, example_inputs=(x,)).model
    benchmark = fuser.benchmark(
        model,
        fused,
        example_inputs=(x,),
        device="cuda",
        dtype=dtype,
        seconds=time,
        progress=lambda line: print(f"{name} {dtype} {batch}: {line}", file=sys.stderr),
    )
    out = [[name, dtype, batch, result.arm.name, *results.comparison(result)] for result in benchmark.arms]
    return out, {"network": name, "dtype": dtype, "batch": batch, **benchmark.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=architectures.names(), help="repeatable; default: all")
    parser.add_argument("--dtype", action="append", choices=["fp32", "fp16", "bf16"], help="repeatable")
    parser.add_argument("--batch", action="append", type=int, help="repeatable; default: 1 and 64")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each arm")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="raw samples and environment")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch finds no CUDA device")
        return
    table, raw = [], []
    for name in options.net or architectures.names():
        for dtype in options.dtype or ("fp32", "fp16", "bf16"):
            for batch in options.batch or (1, 64):
                new, everything = rows(name, dtype, batch, options.seconds)
                table += new
                raw.append(everything)
                options.out.write_text(json.dumps(raw))  # what there is survives an interruption
    body = f"{results.machine('cuda')}\n\n{results.table(HEADER, table)}"
    print(body)
    if options.write:
        results.write("On a GPU", body)


if __name__ == "__main__":
    main()
