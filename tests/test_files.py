"""Model files: the skeleton, reading tensors, wrapping models in memory, refusing bad input."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fuser.errors import InputError
from fuser.files import ModelFile, load, save
from fuser.files.skeleton import SMALL
from fuser.files.tensors import FORMATS

MODELS = Path(__file__).parents[2] / "shared" / "models"
RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def make_model(*initializers: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """A model that is valid on the wire; its graph need not compute anything."""
    signature = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
    graph = helper.make_graph(
        nodes or [helper.make_node("Relu", ["x"], ["y"])], "g", signature, signature, initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.doc_string, model.metadata_props.add().key = "kept", "k"
    return model


def rich_model() -> onnx.ModelProto:
    """Large tensors wherever they can be: initializers, attributes, subgraphs, functions; stored in every way."""
    then, other = (
        helper.make_graph(
            [helper.make_node("Constant", [], [f"c{name}"], value=numpy_helper.from_array(values(400), f"v{name}"))],
            name,
            [],
            [helper.make_tensor_value_info(f"c{name}", TensorProto.FLOAT, [400])],
            [numpy_helper.from_array(values(20, 20), f"w{name}")],
        )
        for name in ("then", "else")
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(values(500), "v")),
        helper.make_node("If", ["b"], ["z"], then_branch=then, else_branch=other),
    ]
    floats = helper.make_tensor("floats", TensorProto.FLOAT, [300], values(300))
    floats.doc_string = "after the values"
    model = make_model(
        numpy_helper.from_array(values(16, 32), "raw"),
        floats,
        helper.make_tensor("doubles", TensorProto.DOUBLE, [200], RNG.standard_normal(200)),
        helper.make_tensor("ints", TensorProto.INT64, [600], range(600)),
        helper.make_tensor("halves", TensorProto.FLOAT16, [700], values(700)),
        helper.make_tensor("strings", TensorProto.STRING, [2], [b"a" * 2000, b"b"]),
        numpy_helper.from_array(values(3), "small"),
        numpy_helper.from_array(np.empty((0, 5), np.float32), "empty"),
        nodes=nodes,
    )
    inner = helper.make_node("Constant", [], ["o"], value=numpy_helper.from_array(values(900), "f"))
    model.functions.append(helper.make_function("local", "F", [], ["o"], [inner], [helper.make_opsetid("", 17)]))
    return model


@pytest.fixture
def rich(tmp_path: Path) -> tuple[onnx.ModelProto, Path]:
    model, path = rich_model(), tmp_path / "rich.onnx"
    path.write_bytes(model.SerializeToString())
    return model, path


def external(tmp_path: Path, **entries: str) -> Path:
    """A model with one tensor of 400 floats in `weights.bin`, its reference changed by `entries`."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[400], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "8", "length": "1600", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(bytes(8) + np.arange(400, dtype=np.float32).tobytes())
    path = folder / "m.onnx"
    path.write_bytes(make_model(tensor).SerializeToString())
    return path


def refused(path: Path | str) -> str:
    """The message, one line, by which `load` refuses the file."""
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600
    return message


# --- the skeleton ---------------------------------------------------------------------------------------------


def test_large_tensors_become_references_and_small_ones_stay(rich):
    model, path = rich
    loaded = load(path)
    assert loaded.path == path
    assert loaded.proto.ByteSize() < model.ByteSize() / 2
    for original, kept in zip(model.graph.initializer, loaded.proto.graph.initializer, strict=True):
        is_reference = kept.data_location == TensorProto.EXTERNAL
        assert is_reference == (original.name in ("raw", "floats", "doubles")), original.name
        assert (kept.name, list(kept.dims), kept.data_type) == (original.name, list(original.dims), original.data_type)
        assert is_reference or kept == original
    branch = loaded.proto.graph.node[1].attribute[0].g
    assert branch.initializer[0].data_location == TensorProto.EXTERNAL
    assert branch.node[0].attribute[0].t.data_location == TensorProto.EXTERNAL
    assert loaded.proto.functions[0].node[0].attribute[0].t.data_location == TensorProto.EXTERNAL


def test_the_skeleton_is_a_legal_model_with_external_data(rich):
    model, path = rich
    skeleton = path.with_name("skeleton.onnx")
    skeleton.write_bytes(load(path).proto.SerializeToString())
    loaded = onnx.load(skeleton)
    np.testing.assert_array_equal(
        numpy_helper.to_array(loaded.graph.initializer[0]), numpy_helper.to_array(model.graph.initializer[0])
    )


def test_every_tensor_reads_as_onnx_reads_it(rich):
    model, path = rich
    loaded = load(path)
    pairs = [*zip(model.graph.initializer, loaded.proto.graph.initializer, strict=True)]
    pairs += [(m.graph.node[0].attribute[0].t, k.graph.node[0].attribute[0].t) for m, k in [(model, loaded.proto)]]
    for original, kept in pairs:
        expected, found = numpy_helper.to_array(original), loaded.array(kept)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_the_threshold_is_the_first_size_that_is_not_parsed(tmp_path):
    path = tmp_path / "m.onnx"
    inline, referenced = SMALL // 4 - 1, SMALL // 4
    tensors = [numpy_helper.from_array(values(n), f"w{n}") for n in (inline, referenced)]
    path.write_bytes(make_model(*tensors).SerializeToString())
    first, second = load(path).proto.graph.initializer
    assert first.HasField("raw_data") and not second.HasField("raw_data")


def test_a_wire_scan_crosses_the_edges_of_its_window(tmp_path):
    """Thousands of small and large tensors, so that fields straddle every window."""
    path = tmp_path / "m.onnx"
    sizes = [int(n) for n in RNG.integers(1, 30_000, 400)] + [70_000, 1, 200_000]
    model = make_model(*(numpy_helper.from_array(values(n), f"w{i}" * (i % 7 + 1)) for i, n in enumerate(sizes)))
    path.write_bytes(model.SerializeToString())
    assert load(path).to_proto() == model


def test_fields_in_any_order_and_split_messages_are_read(tmp_path):
    """Not as protobuf writes them, but legal: the graph in two parts, a tensor's data before its shape."""
    from fuser.files import wire

    model = make_model()
    raw = values(300).tobytes()
    tensor = wire.delimited(9, raw) + wire.delimited(8, b"w") + b"\x10\x01" + b"\x08\xac\x02"
    data = wire.delimited(7, wire.delimited(5, tensor)) + model.SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    loaded = load(path)
    (kept,) = loaded.proto.graph.initializer
    assert kept.data_location == TensorProto.EXTERNAL
    assert loaded.array(kept).tobytes() == raw
    save(loaded, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == data


def test_a_tensor_with_values_and_a_reference_is_read_as_protobuf_has_it(tmp_path):
    path = external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].raw_data = bytes(1600)
    path.write_bytes(model.SerializeToString())
    loaded = load(path)
    assert loaded.proto == model
    np.testing.assert_array_equal(loaded.array(loaded.proto.graph.initializer[0]), np.arange(400))


@pytest.mark.skipif(not MODELS.is_dir(), reason="the shared models are not here")
def test_real_models_come_back_the_same(tmp_path):
    for path in sorted(MODELS.glob("*.onnx")):
        loaded = load(path)
        assert loaded.to_proto() == onnx.load(path)
        save(loaded, tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


# --- data types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_type", sorted(FORMATS), ids=lambda t: TensorProto.DataType.Name(t))
@pytest.mark.parametrize("count", [7, 5000], ids=["inline", "referenced"])
def test_every_data_type_survives(data_type, count, tmp_path):
    dtype = FORMATS[data_type].dtype
    numbers = RNG.integers(0, 2, count) if dtype.kind in "bu" or "uint" in dtype.name else RNG.integers(-2, 2, count)
    array = np.abs(numbers).astype(dtype) if "e8m0" in dtype.name else numbers.astype(dtype)
    expected = numpy_helper.from_array(array, "w")
    model = ModelFile.from_proto(make_model())
    tensor = model.tensor("w", array)
    assert (tensor.data_location == TensorProto.EXTERNAL) == (len(expected.raw_data) >= SMALL)
    model.proto.graph.initializer.append(tensor)
    save(model, tmp_path / "m.onnx")
    (written,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert written == expected
    found = load(tmp_path / "m.onnx")
    for reader, source in ((model, tensor), (found, found.proto.graph.initializer[0])):
        back = reader.array(source)
        assert back.dtype == dtype
        np.testing.assert_array_equal(back.astype(np.complex128), array.astype(np.complex128))


def test_values_in_int32_data_come_in_their_own_type():
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, [3], [1.0, -2.0, 0.5])
    array = ModelFile.from_proto(make_model()).array(tensor)
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), [1.0, -2.0, 0.5])


@pytest.mark.parametrize("array", [values(40, 30).T, values(50, 60)[::2, ::3], values(2000).astype(">f4")])
def test_any_memory_layout_can_be_stored(array):
    model = ModelFile.from_proto(make_model())
    np.testing.assert_array_equal(model.array(model.tensor("w", array)), array)


def test_scalars_strings_and_types_without_an_onnx_name():
    model = ModelFile.from_proto(make_model())
    scalar = model.array(model.tensor("s", np.array(2.5, np.float32)))
    assert scalar.shape == () and scalar == 2.5
    words = np.array(["a", "bc"], object)
    assert model.array(model.tensor("t", words)).tolist() == ["a", "bc"]
    with pytest.raises(InputError, match="datetime64"):
        model.tensor("d", np.zeros(3, "datetime64[s]"))


def test_each_read_is_a_fresh_array(rich):
    loaded = load(rich[1])
    tensor = loaded.proto.graph.initializer[0]
    first = loaded.array(tensor)
    first[:] = 7
    assert (loaded.array(tensor) != 7).all()


# --- models in memory -----------------------------------------------------------------------------------------


def test_a_wrapped_model_is_neither_copied_nor_changed():
    model = rich_model()
    before = model.SerializeToString()
    wrapped = ModelFile.from_proto(model)
    assert wrapped.path is None and wrapped.proto.ByteSize() < model.ByteSize()
    assert not wrapped.changed()
    assert wrapped.to_proto().SerializeToString() == before
    wrapped.proto.graph.initializer[0].CopyFrom(wrapped.tensor("new", values(500)))
    wrapped.proto.graph.node[0].name = "renamed"
    assert wrapped.changed()
    assert model.SerializeToString() == before
    assert wrapped.to_proto().graph.initializer[0].name == "new"
    assert len(wrapped.to_proto().graph.initializer[0].raw_data) == 2000


def test_a_wrapped_models_own_external_data_stays_external(tmp_path):
    path = external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    wrapped = ModelFile.from_proto(model, base_dir=path.parent)
    np.testing.assert_array_equal(wrapped.array(wrapped.proto.graph.initializer[0]), np.arange(400))
    wrapped.proto.graph.initializer.append(wrapped.tensor("new", values(500)))
    out = wrapped.to_proto()
    assert out.graph.initializer[0] == model.graph.initializer[0]
    assert out.graph.initializer[1].HasField("raw_data")
    nowhere = ModelFile.from_proto(model)
    with pytest.raises(InputError, match="base_dir"):
        nowhere.array(nowhere.proto.graph.initializer[0])


def test_a_wrapped_tensor_must_fill_its_shape():
    tensor = numpy_helper.from_array(values(500), "w")
    tensor.dims[0] = 501
    with pytest.raises(InputError, match="'w' of shape"):
        ModelFile.from_proto(make_model(tensor))


def test_a_skeleton_does_not_stand_for_its_model():
    wrapped = ModelFile.from_proto(rich_model())
    with pytest.raises(InputError, match="another ModelFile"):
        ModelFile.from_proto(wrapped.proto)


def test_changed_knows_an_edit_from_none(rich):
    loaded = load(rich[1])
    assert not loaded.changed()
    loaded.proto.graph.name = "h"
    assert loaded.changed()
    loaded.proto.graph.name = "g"
    assert not loaded.changed()


# --- refusals -------------------------------------------------------------------------------------------------


def test_refuses_what_is_not_a_file(tmp_path):
    assert "No such file" in refused(tmp_path / "none.onnx")
    assert "folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")
    assert "not a regular file" in refused("/dev/zero")
    refused("a\0b")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello, this is not a model\n" * 100, "text file"),
        (b'{"nodes": []}', "text file"),
        ("größer".encode() * 300, "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "torch.onnx.export"),
        (bytes(1000), "corrupt"),
        (b"\x08\x08", "no graph"),
        (b"\x08\x08\x3a", "corrupt"),
        (b"\x08\x08\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "claims"),
        (b"\x08\x08\x3a" + b"\xff" * 30, "ten bytes"),
        (b"\x0b\x0c" * 50, "wire type 3"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "corrupt"),
    ],
    ids=range(13),
)
def test_refuses_other_formats(data, words, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    assert words in refused(path)


def test_refuses_a_graph_without_an_ir_version(tmp_path):
    model = make_model()
    model.ClearField("ir_version")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "IR version" in refused(tmp_path / "m.onnx")


def test_refuses_every_truncation(rich, tmp_path):
    data = rich[1].read_bytes()
    path = tmp_path / "cut.onnx"
    for length in [*range(1, 400), *range(400, len(data), 211)]:
        path.write_bytes(data[:length])
        # A cut before or after the graph leaves a shorter model of the same kind.
        if onnx_reads(data[:length]):
            load(path)
        else:
            refused(path)


def onnx_reads(data: bytes) -> bool:
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return False
    return model.HasField("graph") and model.ir_version > 0


def test_refuses_nesting_without_end(tmp_path):
    from fuser.files import wire

    # graph > node > attribute > graph > ..., each message large enough to be entered
    data = b"\x12" + wire.varint(2000) + bytes(2000)
    for level in range(400):
        data = wire.delimited((1, 6, 5)[level % 3], data)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08" + wire.delimited(7, data))
    assert "corrupt" in refused(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "dims", [[401], [-400], [-20, -20], [2**62, 2**62], [2**63 - 1] * 60, [400, *[1] * 64], [2**62] * 60_000, []]
)
@pytest.mark.parametrize("count", [400, 4], ids=["referenced", "inline"])
def test_refuses_shapes_that_the_data_does_not_fill(dims, count, tmp_path):
    tensor = numpy_helper.from_array(values(count), "w")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    (tmp_path / "m.onnx").write_bytes(make_model(tensor).SerializeToString())
    assert "'w'" in refused(tmp_path / "m.onnx")


@pytest.mark.parametrize("data_type", [0, 8, 99])
def test_refuses_raw_data_of_types_without_such(data_type, tmp_path):
    tensor = numpy_helper.from_array(values(400), "w")
    tensor.data_type = data_type
    (tmp_path / "m.onnx").write_bytes(make_model(tensor).SerializeToString())
    assert "'w'" in refused(tmp_path / "m.onnx")


def test_refuses_typed_values_that_do_not_fill_the_shape():
    model = ModelFile.from_proto(make_model())
    for tensor in (
        TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], float_data=[1.0, 2.0]),
        TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**40]),
        TensorProto(name="w", data_type=99, dims=[1]),
    ):
        with pytest.raises(InputError, match="'w'"):
            model.array(tensor)


def test_refuses_names_that_are_not_text(tmp_path):
    data = make_model(numpy_helper.from_array(values(3), "weights")).SerializeToString()
    for name in (b"weights", b"Relu", b"kept"):
        path = tmp_path / "m.onnx"
        path.write_bytes(data.replace(name, b"\xff" * len(name)))
        if name != b"kept":  # prose that nobody reads
            assert "UTF-8" in refused(path)


@pytest.mark.parametrize("field", [b"QQgraph", b"QQproducer", b"QQtensor"])
def test_refuses_text_that_is_none_in_a_model_in_memory(field):
    model = make_model(numpy_helper.from_array(values(3000), "QQtensor"))
    model.graph.name, model.producer_name = "QQgraph", "QQproducer"
    spoilt = onnx.ModelProto.FromString(model.SerializeToString().replace(field, b"\xff\xfe" + field[2:]))
    with pytest.raises(InputError, match="not UTF-8"):
        ModelFile.from_proto(spoilt)


# --- external data --------------------------------------------------------------------------------------------


def test_external_data_is_read_when_asked_for(tmp_path):
    loaded = load(external(tmp_path))
    (tensor,) = loaded.proto.graph.initializer
    np.testing.assert_array_equal(loaded.array(tensor), np.arange(400))
    assert loaded.is_external


def test_offset_and_length_may_be_left_out(tmp_path):
    path = external(tmp_path, offset="0")
    model = onnx.load(path, load_external_data=False)
    del model.graph.initializer[0].external_data[1:]
    path.write_bytes(model.SerializeToString())
    np.testing.assert_array_equal(load(path).array(model.graph.initializer[0])[2:], np.arange(398))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "."}, "'.', which is a folder"),
        ({"location": "../secret.bin"}, "outside"),
        ({"location": "sub/../../secret.bin"}, "outside"),
        ({"location": "/etc/passwd"}, "outside"),
        ({"location": "C:\\secret.bin"}, "outside"),
        ({"location": "..\\secret.bin"}, "outside"),
        ({"location": "link.bin"}, "outside"),
        ({"location": "folder/secret.bin"}, "outside"),
        ({"location": "gone.bin"}, "missing"),
        ({"location": ""}, "usable name"),
        ({"location": "a\0b"}, "usable name"),
        ({"location": "x" * 5000}, "missing"),
        ({"location": "<fuser>/new"}, "another ModelFile"),
        ({"location": "."}, "folder"),
        ({"location": "pipe"}, "not a regular file"),
        ({"offset": "9"}, "truncated"),
        ({"offset": "-8"}, "no number"),
        ({"offset": "9" * 19}, "truncated"),
        ({"offset": "9" * 9999}, "no number"),
        ({"offset": "1_0"}, "no number"),
        ({"length": "1596"}, "needs 1,600 bytes"),
        ({"length": "0x640"}, "no number"),
    ],
    ids=str,
)
def test_refuses_external_data(entries, words, tmp_path):
    path = external(tmp_path, **entries)
    (tmp_path / "secret.bin").write_bytes(bytes(2000))
    (path.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    (path.parent / "folder").symlink_to(tmp_path)
    os.mkfifo(path.parent / "pipe")
    assert words in (message := refused(path))
    assert "'w'" in message or words in ("folder", "not a regular file")


def test_links_within_the_models_own_folders_are_followed(tmp_path):
    """As in a download cache: names in one folder lead to contents in another."""
    real = external(tmp_path)
    names = tmp_path / "names"
    names.mkdir()
    (names / "m.onnx").symlink_to(real)
    assert load(names / "m.onnx").is_external  # data beside the real file
    (names / "weights.bin").symlink_to(real.with_name("weights.bin"))
    loaded = load(names / "m.onnx")
    np.testing.assert_array_equal(loaded.array(loaded.proto.graph.initializer[0]), np.arange(400))


def test_a_file_changed_under_our_feet_is_noticed(tmp_path):
    path = external(tmp_path)
    loaded = load(path)
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(1608))
    os.replace(other, path.with_name("weights.bin"))
    loaded._data._open = None  # as after another data file was read
    with pytest.raises(InputError, match="changed by somebody else"):
        loaded.array(loaded.proto.graph.initializer[0])


def test_thousands_of_data_files_need_one_descriptor(tmp_path):
    tensors = []
    for i in range(300):
        (tmp_path / f"w{i}.bin").write_bytes(np.full(300, i, np.float32).tobytes())
        tensor = TensorProto(name=f"w{i}", data_type=1, dims=[300], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"w{i}.bin")
        tensors.append(tensor)
    (tmp_path / "m.onnx").write_bytes(make_model(*tensors).SerializeToString())
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)); from fuser.files import *\n"
        "m = load(sys.argv[1]); assert all(m.array(t)[0] == i for i, t in enumerate(m.proto.graph.initializer))\n"
        "save(m, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "m.onnx", tmp_path / "o.onnx"], check=True)
    assert numpy_helper.to_array(onnx.load(tmp_path / "o.onnx").graph.initializer[299])[0] == 299


# --- tensors that are computed when they are read ------------------------------------------------------------------


def doubled(array, rows):
    """Each row, times two, plus its number."""
    return (array * 2 + np.arange(rows.start, rows.stop, dtype=array.dtype)[:, None]).astype(array.dtype)


def computed(model):
    """Replace the first initializer by one that is computed; what it holds."""
    (old, *_) = model.proto.graph.initializer
    expected = doubled(model.array(old), slice(0, old.dims[0]))
    new = model.computed("new", old, doubled)
    assert new is not None and model.origin(new).name == "NEW"
    old.CopyFrom(new)
    return expected


@pytest.mark.parametrize("at_a_time", [1, 300, 1 << 20])
def test_a_computed_tensor_reads_like_a_stored_one(at_a_time, tmp_path, monkeypatch):
    monkeypatch.setattr("fuser.files.sources.ROWS_AT_A_TIME", at_a_time)
    weight = values(37, 25)
    onnx.save(make_model(numpy_helper.from_array(weight, "w")), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    expected = computed(model)
    (tensor,) = model.proto.graph.initializer
    np.testing.assert_array_equal(model.array(tensor), expected)
    assert b"".join(map(bytes, model.pieces(tensor))) == expected.tobytes()
    assert model.blob(tensor).source.step % 100 == 0  # whole rows, so that none is computed twice
    blob, raw = model.blob(tensor), expected.tobytes()
    rng = np.random.default_rng(0)
    for start, end in np.sort(rng.integers(0, len(raw), (200, 2))).tolist():
        view = memoryview(bytearray(end - start))
        blob.source.readinto(view, start)
        assert view.tobytes() == raw[start:end]


@pytest.mark.parametrize("layout", ["auto", "single", "external"])
@pytest.mark.parametrize("source", ["inline", "external"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_computed_tensor_is_written_whole(source, layout, in_place, tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / ("m.onnx" if in_place else "o.onnx")
    proto = make_model(numpy_helper.from_array(values(700, 900), "w"), numpy_helper.from_array(values(300), "v"))
    onnx.save(proto, path, save_as_external_data=source == "external", location="m.data", size_threshold=0)
    model = load(path)
    expected = computed(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuser.files.model.Spool", None)  # it takes no temporary file
        saved = save(model, out, layout=layout)
    assert (saved.data is not None) == (layout == "external" or (layout == "auto" and source == "external"))
    (first, second) = load(out).proto.graph.initializer
    np.testing.assert_array_equal(load(out).array(first), expected)
    assert load(out).array(second).shape == (300,)


def test_what_has_to_be_stored_is_not_computed(tmp_path, monkeypatch):
    packed = helper.make_tensor("p", TensorProto.INT4, [64, 64], np.zeros(2048, np.uint8).tobytes(), raw=True)
    protos = [numpy_helper.from_array(values(64, 64), "w"), numpy_helper.from_array(values(4, 4), "small"), packed]
    scalar_like = numpy_helper.from_array(values(512), "row")
    onnx.save(make_model(*protos, scalar_like), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    weight, small, packed, row = model.proto.graph.initializer
    assert model.computed("n", small, doubled) is None
    assert model.computed("n", packed, doubled) is None
    assert model.computed("n", row, doubled) is not None
    new = model.computed("n", weight, doubled)
    assert new is not None
    assert model.computed("n", new, doubled) is None  # it would be computed again and again
    monkeypatch.setattr("fuser.files.model.ROWS_AT_A_TIME", 64 * 4 - 1)
    assert model.computed("n", weight, doubled) is None
    borrowed = ModelFile.from_proto(make_model(*protos))
    assert borrowed.computed("n", borrowed.proto.graph.initializer[0], doubled) is None


# --- cost -----------------------------------------------------------------------------------------------------


def test_weights_do_not_stay_in_memory(tmp_path):
    """200 MB are loaded, read, made anew and written with the memory of a few tensors."""
    path = tmp_path / "m.onnx"
    save_large(path, count=50)
    code = """
import resource, sys
from fuser.files import load, save
load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(sys.argv[1])
for tensor in model.proto.graph.initializer:
    tensor.CopyFrom(model.tensor(tensor.name, model.array(tensor) * 2))
save(model, sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "o.onnx"], check=True, capture_output=True, text=True
    )
    kilobytes = int(done.stdout) * (1 if sys.platform == "linux" else 1 / 1024)
    assert kilobytes < 40_000


def save_large(path: Path, count: int) -> None:
    """A model of `count` initializers of 4 MB, the i-th full of i."""
    model = ModelFile.from_proto(make_model())
    for i in range(count):
        model.proto.graph.initializer.append(model.tensor(f"w{i}", np.full((1024, 1024), i, np.float32)))
    save(model, path)


def test_loading_takes_time_linear_in_the_nodes(tmp_path):
    """CPU time, the best of three, for 4,000 and 16,000 nodes."""

    def seconds(count: int) -> float:
        path = tmp_path / f"{count}.onnx"
        nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"n{i}") for i in range(count)]
        block = values(16, 4, 3, 3)
        path.write_bytes(
            make_model(
                *(numpy_helper.from_array(block, f"w{i}") for i in range(count)), nodes=nodes
            ).SerializeToString()
        )
        times = []
        for _ in range(3):
            start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            load(path)
            times.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - start)
        return min(times)

    assert seconds(16_000) < 4 * seconds(4_000) * 1.6
