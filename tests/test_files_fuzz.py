"""Mutated bytes of sound files: each loads or is refused in one line; no traceback, no hang, no crash."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_files import external, make_model, rich_model

from fuser.errors import InputError
from fuser.files import load, save
from fuser.files.model import tensors_of

# Values that upset parsers: the ends of ranges, varints that go on, tags of the fields that are interpreted.
SPICE = [
    b"\x00",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff" * 9 + b"\x01",
    b"\xff" * 9 + b"\x7f",
    b"p\x01",
    b"j\x04",
    b"J",
    b"*",
    b":",
]


def mutated(data: bytes, dice: random.Random) -> bytes:
    """A few edits: bytes flipped, replaced, removed, repeated, moved, the end cut off."""
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 1, 2, 5, 20])):
        at = dice.randrange(len(out) + 1)
        span = dice.choice([1, 1, 2, 4, 8, 100])
        match dice.randrange(6):
            case 0:
                if at < len(out):
                    out[at] ^= 1 << dice.randrange(8)
            case 1:
                out[at : at + span] = dice.choice(SPICE)
            case 2:
                del out[at : at + span]
            case 3:
                out[at:at] = out[at : at + span]
            case 4:
                start = dice.randrange(len(out) + 1)
                out[at : at + span] = out[start : start + span]
            case _:
                if dice.random() < 0.1:
                    del out[at:]
    return bytes(out)


def sources(folder: Path) -> Iterator[bytes]:
    """Small models of every kind; the large tensors just above the size of a reference."""
    yield rich_model().SerializeToString()
    yield external(folder).read_bytes()
    small = make_model(numpy_helper.from_array(np.arange(300, dtype=np.float32), "w"))
    yield small.SerializeToString()
    names = make_model(
        helper.make_tensor("t", TensorProto.INT32, [4], [1, 2, 3, 4]),
        numpy_helper.from_array(np.array([b"a", b"b"], object), "s"),
    )
    yield names.SerializeToString()


def attempt(path: Path, out: Path) -> str:
    """What became of the file: "refused", "unreadable" (a tensor or a save was refused), or "loaded"."""
    outcome = "loaded"
    try:
        model = load(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return "refused"
    for tensor in tensors_of(model.proto):
        try:
            array = model.array(tensor)
            assert list(array.shape) == list(tensor.dims)
        except InputError as error:
            assert "\n" not in str(error)
            outcome = "unreadable"
    model.proto.producer_version = "fuzz"  # so that the save is no mere copy
    for layout in ("auto", "external"):
        try:
            save(model, out, layout=layout)
        except InputError as error:
            assert "\n" not in str(error)
            outcome = "unreadable"
        else:
            load(out)
    return outcome


def fuzz(count: int, seed: int, tmp_path: Path) -> dict[str, int]:
    """Try `count` mutations; how many came out how."""
    dice = random.Random(seed)
    originals = list(sources(tmp_path))
    folder = tmp_path / "model"  # where the data file of `external` is
    path = folder / "mutated.onnx"
    counts = {"refused": 0, "unreadable": 0, "loaded": 0}
    for round in range(count):
        data = mutated(dice.choice(originals), dice)
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            counts[attempt(path, folder / "out.onnx")] += 1
        except BaseException:
            print(f"seed {seed}, mutation {round}: {data[:2000]!r}")
            raise
        assert time.perf_counter() - start < 10
    return counts


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda fd: None)


def test_the_originals_are_sound(tmp_path):
    for data in [*sources(tmp_path)]:
        path = tmp_path / "model" / "m.onnx"
        path.write_bytes(data)
        assert attempt(path, tmp_path / "o.onnx") == "loaded"


def test_mutated_files(tmp_path):
    counts = fuzz(3000, seed=0, tmp_path=tmp_path)
    assert min(counts.values()) >= 10, counts  # the mutations reach every outcome


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1, 11))
def test_mutated_files_at_length(seed, tmp_path):
    print(fuzz(20_000, seed=seed, tmp_path=tmp_path))


def test_protobuf_itself_reads_what_is_loaded(tmp_path):
    """A file that is accepted means the same to protobuf: the scan does not see another model."""
    dice = random.Random(7)
    originals = list(sources(tmp_path))
    path = tmp_path / "model" / "mutated.onnx"
    compared = 0
    for _ in range(1500):
        data = mutated(dice.choice(originals), dice)
        path.write_bytes(data)
        try:
            model = load(path)
            mine = {t.name: model.array(t).tobytes() for t in model.proto.graph.initializer if t.data_type != 8}
        except InputError:
            continue
        whole = onnx.ModelProto.FromString(data)
        assert whole.graph.node == model.proto.graph.node or b"p\x01" in model.serialized()
        for tensor in whole.graph.initializer:
            if tensor.data_type != TensorProto.STRING and tensor.data_location != TensorProto.EXTERNAL:
                array = model.array(tensor)
                assert (
                    array.tobytes() == mine[tensor.name]
                    or [t.name for t in whole.graph.initializer].count(tensor.name) > 1
                )
                compared += 1
    assert compared > 500
