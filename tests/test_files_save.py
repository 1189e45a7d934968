"""Saving: layouts, the same bytes, atomic replacement, and what stays after a failure or a kill."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_files import external, make_model, rich_model, save_large, values

from fuser.errors import InputError
from fuser.files import ModelFile, load, save
from fuser.files import atomic as atomic_module

save_module = sys.modules["fuser.files.save"]


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    path = tmp_path / "rich.onnx"
    path.write_bytes(rich_model().SerializeToString())
    return path


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every initializer as onnx itself reads it."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def assert_same(path: Path, other: Path) -> None:
    ours, theirs = arrays(path), arrays(other)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])


def filled(number: int, sizes: tuple[int, ...] = (2000, 300_000)) -> ModelFile:
    """A model whose every weight is `number`."""
    model = ModelFile.from_proto(make_model())
    for size in sizes:
        model.proto.graph.initializer.append(model.tensor(f"w{size}", np.full(size, number, np.float32)))
    return model


def number_in(path: Path) -> int:
    """The number that all weights of the model at `path` are; fails for a mixture."""
    model = load(path)
    numbers = {float(n) for t in model.proto.graph.initializer for n in np.unique(model.array(t))}
    assert len(numbers) == 1, numbers
    return int(numbers.pop())


def without_nameless_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a network file system, which has no O_TMPFILE."""
    real = os.open

    def refuse(path: object, flags: int, *args: object, **kwargs: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "refused")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# --- layouts --------------------------------------------------------------------------------------------------


def test_an_unchanged_model_is_copied_byte_for_byte(rich, tmp_path):
    # An order that protobuf would not write: only a copy keeps it.
    data = b"\x12\x03old" + rich.read_bytes()
    rich.write_bytes(data)
    saved = save(load(rich), tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == data
    assert (saved.path, saved.data, saved.size, saved.note) == (tmp_path / "o.onnx", None, len(data), "")


def test_an_unchanged_model_in_place_is_not_written(rich, tmp_path):
    before = rich.stat()
    assert save(load(rich), rich).unchanged
    assert (rich.stat().st_ino, rich.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path = external(tmp_path)
    files = {entry: entry.stat().st_ino for entry in path.parent.iterdir()}
    save(load(path), path)
    assert {entry: entry.stat().st_ino for entry in path.parent.iterdir()} == files


def test_an_edit_changes_nothing_else(rich, tmp_path):
    """The bytes are those that protobuf writes for the same edit of the whole model, typed values and all."""
    loaded, whole = load(rich), onnx.load(rich)
    for proto in (loaded.proto, whole):
        proto.graph.node[0].name = "renamed"
        proto.graph.initializer.add().CopyFrom(numpy_helper.from_array(np.zeros(3, np.float32), "new"))
    save(loaded, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == whole.SerializeToString()


def test_new_tensors_are_written_like_any_other(rich, tmp_path):
    array = values(64, 64)
    loaded, whole = load(rich), onnx.load(rich)
    loaded.proto.graph.initializer[0].CopyFrom(loaded.tensor("new", array))
    whole.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "new"))
    save(loaded, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == whole.SerializeToString()


def test_external_data_goes_into_one_file_beside_the_model(rich, tmp_path):
    out = tmp_path / "o.onnx"
    saved = save(load(rich), out, layout="external")
    assert saved.data == tmp_path / "o.onnx.data" and saved.size == out.stat().st_size + saved.data.stat().st_size
    assert_same(out, rich)
    skeleton = onnx.load(out, load_external_data=False)
    outside = {t.name for t in skeleton.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert outside == {"raw", "floats", "doubles", "halves"} - {"halves"}  # halves lie in int32_data
    # Constants in nodes stay in the model: readers of external data look at initializers only.
    assert skeleton.graph.node[0].attribute[0].t == onnx.load(rich).graph.node[0].attribute[0].t
    branch = skeleton.graph.node[1].attribute[0].g
    assert branch.initializer[0].data_location == TensorProto.EXTERNAL
    onnx.checker.check_model(external_onnx(tmp_path))


def external_onnx(tmp_path: Path) -> str:
    """A model that computes, saved with external data."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [600]) for n in "xy")
    weight = numpy_helper.from_array(np.arange(600, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return str(save(ModelFile.from_proto(model), tmp_path / "add.onnx", layout="external").path)


def test_onnxruntime_runs_what_was_saved(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(external_onnx(tmp_path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones(600, np.float32)})
    np.testing.assert_array_equal(y, np.arange(600) + 1)


def test_offsets_are_aligned_and_shared_bytes_written_once(tmp_path):
    model = filled(1, sizes=(1000, 333, 300_000, 300, 262_144))
    model.proto.graph.initializer.add().CopyFrom(model.proto.graph.initializer[2])
    saved = save(model, tmp_path / "o.onnx", layout="external")
    skeleton = onnx.load(saved.path, load_external_data=False)
    places = [{e.key: e.value for e in tensor.external_data} for tensor in skeleton.graph.initializer]
    assert all(place["location"] == "o.onnx.data" for place in places)
    offsets = [int(place["offset"]) for place in places]
    assert [offset % 64 for offset in offsets] == [0] * 6
    assert offsets[2] % 65536 == 0 and offsets[4] % 65536 == 0 and offsets[5] == offsets[2]
    assert saved.data.stat().st_size == offsets[4] + 4 * 262_144
    assert number_in(saved.path) == 1


@pytest.mark.parametrize("threshold", [0, 1024, 5000, 10**6])
def test_the_threshold_says_what_goes_out(threshold, tmp_path):
    model = ModelFile.from_proto(make_model())
    sizes = (1, 100, 255, 256, 1250, 5000)
    for size in sizes:
        model.proto.graph.initializer.append(model.tensor(f"{size}", values(size)))
    saved = save(model, tmp_path / "o.onnx", layout="external", threshold=threshold)
    out = onnx.load(saved.path, load_external_data=False).graph.initializer
    for size, tensor in zip(sizes, out, strict=True):
        assert (tensor.data_location == TensorProto.EXTERNAL) == (4 * size >= threshold), size
    assert (saved.data is None) == (threshold == 10**6)
    assert saved.data is None or saved.data.exists()


def test_auto_follows_the_source(rich, tmp_path):
    """External stays external, inline stays inline, new tensors go where the source had its own."""
    source = external(tmp_path, checksum="abc")
    mixed = onnx.load(source, load_external_data=False)
    mixed.graph.initializer.append(numpy_helper.from_array(values(1000), "inline"))
    source.write_bytes(mixed.SerializeToString())
    loaded = load(source)
    loaded.proto.graph.initializer.append(loaded.tensor("new", values(1000)))
    saved = save(loaded, tmp_path / "o.onnx")
    first, inline, new = onnx.load(saved.path, load_external_data=False).graph.initializer
    assert [t.data_location for t in (first, inline, new)] == [1, 0, 1]
    assert {e.key: e.value for e in first.external_data} == {
        "location": "o.onnx.data", "offset": "0", "length": "1600", "checksum": "abc"
    }  # fmt: skip
    loaded = load(rich)
    loaded.proto.graph.initializer.append(loaded.tensor("new", values(1000)))
    assert save(loaded, tmp_path / "p.onnx").data is None


def test_single_takes_external_data_in(tmp_path):
    source = external(tmp_path)
    saved = save(load(source), tmp_path / "o.onnx", layout="single")
    assert saved.data is None
    (tensor,) = onnx.load(saved.path, load_external_data=False).graph.initializer
    assert tensor == numpy_helper.from_array(np.arange(400, dtype=np.float32), "w")


def test_no_single_file_above_the_limit_of_protobuf(rich, tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, "LIMIT", 10_000)
    saved = save(load(rich), tmp_path / "o.onnx")
    assert saved.data and "ONNX allows 2 GB" in saved.note
    assert_same(saved.path, rich)
    with pytest.raises(InputError, match="use external data"):
        save(load(rich), tmp_path / "p.onnx", layout="single")
    assert names(tmp_path) == {"rich.onnx", "o.onnx", "o.onnx.data"}


def test_the_same_bytes_at_every_run(rich, tmp_path):
    for layout in ("single", "external"):
        contents = []
        for run in range(2):
            folder = tmp_path / f"{layout}{run}"
            folder.mkdir()
            loaded = load(rich)
            if run:
                loaded.tensor("unused", values(3000))  # moves the others in the temporary file
            loaded.proto.graph.initializer.append(loaded.tensor("new", np.full(3000, 5.0)))
            save(loaded, folder / "o.onnx", layout=layout)
            contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert contents[0] == contents[1]


def test_a_model_can_be_saved_twice_and_read_after(tmp_path):
    model = filled(3)
    save(model, tmp_path / "a.onnx")
    save(model, tmp_path / "b.onnx", layout="external")
    save(model, tmp_path / "a.onnx", layout="external")
    assert_same(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert (model.array(model.proto.graph.initializer[0]) == 3).all()


@pytest.mark.parametrize("way", ["copy_file_range missing", "copy_file_range refuses", "O_TMPFILE", "/proc", "link"])
def test_other_systems(way, rich, tmp_path, monkeypatch):
    """Without what Linux on a local disk has to offer."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EXDEV if "copy" in way else errno.EPERM, "refused")

    if way == "copy_file_range missing":
        monkeypatch.delattr(os, "copy_file_range")
    elif way == "copy_file_range refuses":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    elif way == "O_TMPFILE":
        without_nameless_files(monkeypatch)
    elif way == "/proc":
        monkeypatch.setattr(os.path, "exists", lambda path: False)
    else:
        without_nameless_files(monkeypatch)
        monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "o.onnx"
    for number in (1, 2):
        save(filled(number), out, layout="external")
        assert number_in(out) == number
    save(load(rich), tmp_path / "p.onnx")
    assert (tmp_path / "p.onnx").read_bytes() == rich.read_bytes()
    assert names(tmp_path) == {"rich.onnx", "o.onnx", "o.onnx.data", "p.onnx"}


# --- the source is safe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["auto", "single", "external"])
@pytest.mark.parametrize("source_layout", ["single", "external"])
def test_in_place(source_layout, layout, tmp_path):
    path = tmp_path / "m.onnx"
    save(filled(1), path, layout=source_layout)
    model = load(path)
    for tensor in model.proto.graph.initializer:
        tensor.CopyFrom(model.tensor(tensor.name, model.array(tensor) + 1))
    saved = save(model, path, layout=layout)
    assert number_in(path) == 2
    is_external = layout == "external" or (layout, source_layout) == ("auto", "external")
    assert names(tmp_path) == ({"m.onnx", "m.onnx.data"} if is_external else {"m.onnx"})
    assert (saved.data is not None) == is_external


def test_in_place_leaves_a_data_file_of_another_name(tmp_path):
    path = external(tmp_path)
    before = path.with_name("weights.bin").read_bytes()
    model = load(path)
    model.proto.doc_string = "changed"
    saved = save(model, path)
    assert saved.note == "m.onnx does not read weights.bin any more; remove what no other model reads"
    assert path.with_name("weights.bin").read_bytes() == before
    assert names(path.parent) == {"m.onnx", "m.onnx.data", "weights.bin"}
    assert arrays(path)["w"][399] == 399
    model = load(path)
    model.proto.doc_string = "changed again"
    assert not save(model, path).note


def test_what_is_said_of_data_that_is_not_read_any_more(tmp_path):
    path = external(tmp_path)
    (path.parent / "more").mkdir()
    (path.parent / "more" / "w.bin").write_bytes(path.with_name("weights.bin").read_bytes())
    places = [("a", "weights.bin"), ("b", "./weights.bin"), ("c", "more/w.bin")]
    proto = onnx.load(path, load_external_data=False)
    for name, location in places:
        tensor = proto.graph.initializer.add()
        tensor.CopyFrom(proto.graph.initializer[0])
        tensor.name, tensor.external_data[0].value = name, location
    path.write_bytes(proto.SerializeToString())
    assert not save(load(path), path.with_name("other.onnx"), layout="single").note  # the source still reads them
    assert "does not read more/w.bin, weights.bin any more" in save(load(path), path, layout="single").note

    proto.graph.sparse_initializer.add().values.CopyFrom(proto.graph.initializer[0])  # stays where it is
    path.write_bytes(proto.SerializeToString())
    assert not save(load(path), path, layout="single").note


def test_nothing_is_said_of_data_that_is_gone(tmp_path):
    save(filled(1), tmp_path / "m.onnx", layout="external")
    assert not save(load(tmp_path / "m.onnx"), tmp_path / "m.onnx", layout="single").note
    assert names(tmp_path) == {"m.onnx"}


@pytest.mark.parametrize("layout", ["single", "external", "auto"])
@pytest.mark.parametrize("location", ["a.onnx.data", ".//a.onnx.data"])
def test_never_over_the_data_of_another_model(layout, location, tmp_path):
    save(filled(1), tmp_path / "a.onnx", layout="external")
    other = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    for tensor in other.graph.initializer:
        tensor.external_data[0].value = location
    (tmp_path / "b.onnx").write_bytes(other.SerializeToString())
    (tmp_path / "c.onnx").write_text("no model, and it says a.onnx.data")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = load(tmp_path / "a.onnx")
    changed.proto.doc_string = "changed"
    for model in (changed, filled(2)):
        with pytest.raises(InputError, match=r"b\.onnx reads a\.onnx\.data, too"):
            save(model, tmp_path / "a.onnx", layout=layout)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "b.onnx").unlink()
    save(changed, tmp_path / "a.onnx", layout=layout)
    assert number_in(tmp_path / "a.onnx") == 1


def test_links_that_lead_nowhere_are_no_other_models(tmp_path):
    save(filled(1), tmp_path / "a.onnx", layout="external")
    (tmp_path / "gone.onnx").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.onnx").symlink_to(tmp_path / "loop.onnx")
    save(filled(2), tmp_path / "a.onnx", layout="external")
    assert number_in(tmp_path / "a.onnx") == 2


def test_a_model_beside_data_that_only_another_reads(tmp_path):
    """What is replaced is the model alone."""
    save(filled(1), tmp_path / "a.onnx", layout="external")
    os.rename(tmp_path / "a.onnx", tmp_path / "b.onnx")
    save(filled(2), tmp_path / "a.onnx", layout="single")
    assert [number_in(tmp_path / name) for name in ("a.onnx", "b.onnx")] == [2, 1]


def test_data_that_is_named_in_another_way_is_replaced_like_any_other(tmp_path):
    save(filled(1), tmp_path / "o.onnx", layout="external")
    old = onnx.load(tmp_path / "o.onnx", load_external_data=False)
    for tensor in old.graph.initializer:
        tensor.external_data[0].value = ".//o.onnx.data"
    (tmp_path / "o.onnx").write_bytes(old.SerializeToString())
    save(filled(2), tmp_path / "o.onnx", layout="single")
    assert names(tmp_path) == {"o.onnx"}


def test_a_folder_in_the_place_of_the_data(tmp_path):
    (tmp_path / "o.onnx.data").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*o\.onnx\.data: it is a folder"):
        save(filled(1), tmp_path / "o.onnx", layout="external")
    assert names(tmp_path) == {"o.onnx.data"}


def test_never_over_the_data_of_the_source(tmp_path):
    """A model that was renamed, its data not: its old name is no place for the result."""
    save(filled(1), tmp_path / "old.onnx", layout="external")
    os.rename(tmp_path / "old.onnx", tmp_path / "new.onnx")
    model = load(tmp_path / "new.onnx")
    model.proto.doc_string = "changed"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for out, layout in (("old.onnx", "external"), ("old.onnx.data", "single")):
        with pytest.raises(InputError, match="choose another output name"):
            save(model, tmp_path / out, layout=layout)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save(model, tmp_path / "old.onnx", layout="single")  # the data is still read by new.onnx
    assert number_in(tmp_path / "new.onnx") == number_in(tmp_path / "old.onnx") == 1


def test_a_source_that_others_write_to_is_noticed(rich, tmp_path):
    model = load(rich)
    with open(rich, "ab") as file:
        file.write(b"\x12\x01x")
    with pytest.raises(InputError, match="changed by somebody else"):
        save(model, tmp_path / "o.onnx")
    assert names(tmp_path) == {"rich.onnx"}


@pytest.mark.parametrize("when", ["before", "while it is copied"])
@pytest.mark.parametrize("how", ["written", "shortened"])
def test_a_data_file_that_others_write_to_is_noticed(how, when, tmp_path, monkeypatch):
    path = external(tmp_path)
    model = load(path)
    (data,) = (other for other in path.parent.iterdir() if other != path)

    def disturb():
        os.utime(data, ns=(1, 1))
        if how == "written":
            data.write_bytes(data.read_bytes())
        else:
            os.truncate(data, data.stat().st_size - 1)

    if when == "before":
        disturb()
    else:
        write = atomic_module.Replacement.prepare
        monkeypatch.setattr(atomic_module.Replacement, "prepare", lambda new: (write(new), disturb()))
    before = names(tmp_path)
    with pytest.raises(InputError, match=r"changed by somebody else|truncated|became shorter"):
        save(model, tmp_path / "o.onnx")
    assert names(tmp_path) == before


def test_a_source_that_others_replace_is_still_readable(rich, tmp_path):
    model, whole = load(rich), rich.read_bytes()
    os.replace(shutil.copy(rich, tmp_path / "copy"), rich)
    rich.with_name("copy").write_bytes(b"other")
    save(model, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == whole


# --- targets --------------------------------------------------------------------------------------------------


def test_refuses_targets_that_are_no_files(rich, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    targets = {
        tmp_path: "folder",
        tmp_path / "pipe": "regular file",
        Path("/dev/null"): "regular file",
        tmp_path / "none" / "o.onnx": "no folder",
        rich / "o.onnx": "cannot write",
        tmp_path / "loop": "cannot write",
        tmp_path / ("x" * 300): "too long",
        Path("/proc/o.onnx"): "cannot write",
    }
    before = names(tmp_path)
    for target, words in targets.items():
        with pytest.raises(InputError, match=words) as caught:
            save(load(rich), target)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        save(load(rich), "a\0b")
    assert names(tmp_path) == before


def test_a_link_stays_and_its_target_is_replaced(rich, tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    for name in ("dangling", "full"):
        link = tmp_path / f"{name}.onnx"
        link.symlink_to(folder / f"{name}.onnx")
        if name == "full":
            (folder / "full.onnx").write_bytes(b"old")
        saved = save(load(rich), link, layout="external")
        assert link.is_symlink() and saved.path == folder / f"{name}.onnx"
        assert_same(saved.path, rich)
        assert load(link).is_external  # the data lies beside the real file
    assert names(folder) == {"dangling.onnx", "dangling.onnx.data", "full.onnx", "full.onnx.data"}


def test_permissions(rich, tmp_path):
    old = os.umask(0o027)
    try:
        saved = save(load(rich), tmp_path / "o.onnx", layout="external")
        assert [stat.S_IMODE(path.stat().st_mode) for path in (saved.path, saved.data)] == [0o640, 0o640]
        saved.path.chmod(0o604)
        save(load(rich), saved.path, layout="external")
        assert stat.S_IMODE(saved.path.stat().st_mode) == 0o604
    finally:
        os.umask(old)


def test_odd_names(tmp_path):
    long = tmp_path / ("ü" * 120 + ".onnx")
    for number in (1, 2):
        save(filled(number), long)
        assert number_in(long) == number
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.onnx"))
    for number in (1, 2):
        save(filled(number), strange)
        assert number_in(strange) == number
    with pytest.raises(InputError, match="UTF-8"):
        save(filled(3), strange, layout="external")
    assert number_in(strange) == 2
    # A line of an error must be printable whatever the name.
    assert load(strange).to_proto() == filled(2).to_proto()


# --- failures and kills ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, function: str, at: int) -> Iterator[None]:
    """The `at`-th call of `os.function` finds the disk full."""
    real, calls = getattr(os, function), [0]

    def fail(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        yield


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("function", ["write", "copy_file_range", "fsync"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(existing, function, at, tmp_path, monkeypatch):
    out = tmp_path / "o.onnx"
    if existing:
        save(filled(1), out, layout="external")
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    model = filled(2, sizes=(2000, 300_000, 400_000))
    with failing(monkeypatch, function, at), pytest.raises(InputError, match="No space left") as caught:
        save(model, out, layout="external")
    assert str(out) in str(caught.value)
    assert {path.name: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()} == before
    save(model, out, layout="external")
    assert number_in(out) == 2


def test_a_file_size_limit(tmp_path):
    save(filled(1), tmp_path / "o.onnx")
    save_large(tmp_path / "large.onnx", count=2)
    code = """
import resource, sys
from fuser.errors import InputError
from fuser.files import load, save
model = load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
try:
    save(model, sys.argv[2])
except InputError as error:
    print(error)
"""
    run = [sys.executable, "-c", code, tmp_path / "large.onnx", tmp_path / "o.onnx"]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    assert "File too large" in done.stdout and done.stdout.count("\n") == 1
    assert number_in(tmp_path / "o.onnx") == 1
    assert names(tmp_path) == {"o.onnx", "large.onnx"}


def test_no_space_for_new_tensors(tmp_path, monkeypatch):
    model = ModelFile.from_proto(make_model())
    with failing(monkeypatch, "pwrite", 1), pytest.raises(InputError, match="TMPDIR"):
        model.tensor("w", values(1000))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(InputError, match="TMPDIR"):
        ModelFile.from_proto(make_model()).tensor("w", values(1000))


STEPS = ("open", "link", "replace", "unlink", "fsync", "fchmod", "copy_file_range")


def die_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that dies before its `step`-th system call; whether it did die."""
    child = os.fork()
    if child == 0:
        calls = 0
        try:

            def counted(real: Callable[..., object], *args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == step:
                    os._exit(9)
                return real(*args, **kwargs)

            for name in STEPS:
                setattr(os, name, functools.partial(counted, getattr(os, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9


@pytest.mark.parametrize("nameless", [True, False], ids=["O_TMPFILE", "named"])
@pytest.mark.parametrize("new_layout", ["single", "external"])
@pytest.mark.parametrize(
    ("old_layout", "small"), [(None, True), ("single", True), ("external", True), ("external", False)]
)
def test_a_death_at_any_step(old_layout, small, new_layout, nameless, tmp_path, monkeypatch):
    """Wherever a save ends: the old or the new model, whole; and the next save leaves no other file.

    small: whether the old data is copied for a moment, or gets a second name.
    """
    if not nameless:
        without_nameless_files(monkeypatch)
    if not small:
        monkeypatch.setattr(save_module, "_SMALL_COPY", 0)
    expected = {"o.onnx", "o.onnx.data"} if new_layout == "external" else {"o.onnx"}
    step, died, outcomes, two_names = 0, True, set(), 0
    while died:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        out = folder / "o.onnx"
        if old_layout:
            save(filled(1), out, layout=old_layout)
        model = filled(2)
        died = die_at(step, lambda model=model, out=out: save(model, out, layout=new_layout))
        if out.exists():
            assert number_in(out) in (1, 2)
            if all(path.stat().st_nlink == 1 for path in folder.iterdir()):
                onnx.load(out)  # which refuses data files with two names
            else:
                two_names += 1
            outcomes.add(number_in(out))
        else:
            assert old_layout is None
        if nameless:  # beside the model: data files, and no temporary but in one moment
            assert len([name for name in names(folder) if name.endswith(".fuser")]) <= 1
        if died and out.exists() and step % 2:  # in place, from whatever is there
            model = load(out)
            model.proto.doc_string = "again"
            number = number_in(out)
        else:
            number = 2
        save(model, out, layout=new_layout)
        assert number_in(out) == number
        assert names(folder) == expected
        shutil.rmtree(folder)
    assert step > 5 and two_names <= (0 if small else 6)
    assert outcomes == ({1, 2} if old_layout else {2})


def kill_at_random(rounds: int, seed: int, folder: Path) -> None:
    """SIGKILL a child that saves without end; after each kill the target must be whole and the next save clean."""
    code = """
import sys, itertools
sys.path.insert(0, sys.argv[2])
from test_files_save import filled, save
models = {n: filled(n, sizes=(2000, 3_000_000)) for n in (1, 2)}
print("ready", flush=True)
for i in itertools.count():
    save(models[i % 2 + 1], sys.argv[1], layout=("external", "external", "single")[i % 3])
"""
    out = folder / "o.onnx"
    random.seed(seed)
    temporary = 0
    for _ in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", code, out, Path(__file__).parent], stdout=subprocess.PIPE, start_new_session=True
        )
        assert child.stdout and child.stdout.readline() == b"ready\n"
        time.sleep(random.random() * 0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if out.exists():
            assert number_in(out) in (1, 2, 3)
            onnx.load(out)
        temporary += any(name.endswith(".fuser") for name in names(folder))
        save(filled(3), out, layout="external")
        assert number_in(out) == 3
        assert names(folder) == {"o.onnx", "o.onnx.data"}
    print(f"{rounds} kills, {temporary} left a hidden file for the next save to remove")


def test_kills_at_random_moments(tmp_path):
    kill_at_random(5, seed=0, folder=tmp_path)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(4))
def test_hundreds_of_kills(seed, tmp_path):
    kill_at_random(100, seed=seed + 1, folder=tmp_path)


def test_what_a_living_process_writes_is_left_alone(tmp_path, monkeypatch):
    without_nameless_files(monkeypatch)
    out = tmp_path / "o.onnx"
    with atomic_module.Replacement(out) as slow:
        slow.write(b"slow")
        save(filled(1), out)
        assert number_in(out) == 1
        slow.prepare()
        slow.commit()
    assert out.read_bytes() == b"slow"
    (tmp_path / ".o.onnx.0123abcd.fuser").write_bytes(b"of a process that was killed")
    save(filled(2), out)
    assert names(tmp_path) == {"o.onnx"}
