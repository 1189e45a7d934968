"""Mutated bytes of sound models, through all of `optimize`: a result, or one line that says what is wrong.

The attempts are made in a process of their own, so that a crash or a hang of the C++ underneath is an outcome.
The long run:

    pytest tests/test_fuzz_files.py -m fuzz -s
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuzz_onnx import random_model
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import ModelProto
from test_files_fuzz import mutated

import fuser
from fuser.errors import FuserError
from fuser.isolate import Worker

CHUNK = 100
SECONDS = 10.0
LONG = int(os.environ.get("FUSER_FUZZ_FILES", "10000"))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(preload=["onnx", "onnxruntime"]) as running:
        yield running


def messages(message: Message) -> Iterator[Message]:
    """The message and all in it."""
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if isinstance(value, Sequence) else [value]:
                yield from messages(inner)


def bend(model: ModelProto, dice: random.Random) -> None:
    """One field somewhere gets another value: it parses, and says something that nobody meant."""
    texts = ["", "x", *(name for node in model.graph.node for name in (*node.input, *node.output, node.op_type))]
    numbers = [0, 1, -1, 2, 3, 7, 11, 100, 2**31 - 1, 2**63 - 1, -(2**63)]
    message = dice.choice([one for one in messages(model) if one.ListFields()])
    descriptor, value = dice.choice(message.ListFields())
    pick: Callable[[], Any] = {
        FieldDescriptor.TYPE_STRING: lambda: dice.choice(texts),
        FieldDescriptor.TYPE_BYTES: lambda: bytes(dice.randrange(256) for _ in range(dice.choice([0, 1, 4, 64]))),
        FieldDescriptor.TYPE_FLOAT: lambda: dice.choice([0.0, -1.0, 1e38, float("nan"), float("inf")]),
        FieldDescriptor.TYPE_DOUBLE: lambda: dice.choice([0.0, -1.0, 1e308, float("nan")]),
        FieldDescriptor.TYPE_ENUM: lambda: dice.choice(list(descriptor.enum_type.values_by_number)),
        FieldDescriptor.TYPE_INT32: lambda: dice.choice([n for n in numbers if abs(n) < 2**31]),
        FieldDescriptor.TYPE_UINT64: lambda: dice.choice([n for n in numbers if n >= 0]),
    }.get(descriptor.type, lambda: dice.choice(numbers))
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE or dice.random() < 0.3:
            message.ClearField(descriptor.name)
        else:
            setattr(message, descriptor.name, pick())
        return
    field: Any = value
    at = dice.randrange(len(field))
    if dice.random() < 0.4 or descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        if dice.random() < 0.5:
            del field[at]
        else:
            field.extend([field[at]])  # there twice
    else:
        field[at] = pick()


def attempt(seed: int, folder: Path) -> str:
    """Optimize a mutated model; "refused", "optimized", or "unchanged"."""
    dice = random.Random(seed)
    path, out = folder / "m.onnx", folder / "m.fused.onnx"
    model = random_model(random.Random(dice.randrange(1000))).model
    if dice.random() < 0.3:
        path.write_bytes(mutated(model.SerializeToString(), dice))
    else:
        for _ in range(dice.choice([1, 1, 2, 5])):
            bend(model, dice)
        path.write_bytes(model.SerializeToString())
    out.unlink(missing_ok=True)
    try:
        result = fuser.optimize(path, out, verify=False)
    except FuserError as error:
        assert "\n" not in str(error), f"not one line: {error!r}"
        assert not out.exists(), "refused, but written"
        return "refused"
    assert out.exists()
    return "optimized" if result.report.applied else "unchanged"


def attempts(seeds: range, folder: Path) -> Counter[str]:
    """In the child: each seed's attempt; an error names its seed."""
    os.fsync = lambda fd: None  # this process ends with the test
    counts: Counter[str] = Counter()
    for seed in seeds:
        started = time.perf_counter()
        try:
            counts[attempt(seed, folder)] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        spent = time.perf_counter() - started
        assert spent < SECONDS, f"seed {seed} took {spent:.1f} s"
    return counts


def run(seeds: range, worker: Worker, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for start in range(seeds.start, seeds.stop, CHUNK):
        part = range(start, min(start + CHUNK, seeds.stop))
        print(f"seeds {part.start} to {part.stop - 1}")  # shown where one of them kills the child
        counts += worker.call("test_fuzz_files:attempts", part, folder, timeout=CHUNK * SECONDS)
    return counts


def test_mutated_models(worker: Worker, tmp_path: Path) -> None:
    counts = run(range(100), worker, tmp_path)
    assert min(counts[kind] for kind in ("refused", "optimized")) >= 10, counts  # the mutations reach both


@pytest.mark.fuzz
def test_mutated_models_at_length(worker: Worker, tmp_path: Path) -> None:
    print(dict(run(range(1000, 1000 + LONG), worker, tmp_path)))
