"""The command line as a person meets it: what it prints, how it exits, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_models import batch_norm, conv, conv_constants, model, node, op_types
from typer.testing import CliRunner

from fuser.cli import _with_values, app


def fuser(*arguments: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fuser", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **env},
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one model that folds."""
    nodes = [conv(), batch_norm("c", "b"), node("Relu", ["b"])]
    onnx.save(model(nodes, constants=conv_constants(), x=(1, 4, 8, 8)), tmp_path / "net.onnx")
    return tmp_path


def test_optimize_writes_a_verified_file_under_the_default_name(folder: Path) -> None:
    done = fuser("optimize", folder / "net.onnx")
    assert done.returncode == 0, done.stderr
    assert op_types(onnx.load(folder / "net.fused.onnx").graph) == ["Conv", "Relu"]
    assert "fold-batch-norm" in done.stdout
    assert "verified" in done.stdout
    assert f"wrote {folder / 'net.fused.onnx'}" in done.stdout
    assert sorted(os.listdir(folder)) == ["net.fused.onnx", "net.onnx"]


def test_optimize_in_place(folder: Path) -> None:
    assert fuser("optimize", folder / "net.onnx", folder / "net.onnx", "--quiet").stdout == ""
    assert op_types(onnx.load(folder / "net.onnx").graph) == ["Conv", "Relu"]
    assert os.listdir(folder) == ["net.onnx"]
    again = fuser("optimize", folder / "net.onnx", folder / "net.onnx").stdout
    assert "0 rewrites" in again and "wrote" not in again


def test_in_place_tells_of_data_that_is_not_read_any_more(folder: Path) -> None:
    net = folder / "net.onnx"
    onnx.save(onnx.load(net), net, save_as_external_data=True, location="net.bin", size_threshold=0)
    done = fuser("optimize", net, net)
    assert "warning: net.onnx does not read net.bin any more" in done.stdout
    assert (folder / "net.bin").exists()


def test_bench_needs_the_original(folder: Path) -> None:
    before = (folder / "net.onnx").read_bytes()
    done = fuser("optimize", folder / "net.onnx", folder / "net.onnx", "--bench")
    assert done.returncode == 2 and "OUT must be another file" in done.stderr
    (folder / "net.fused.onnx").symlink_to(folder / "net.onnx")  # where the result goes by default
    done = fuser("optimize", folder / "net.onnx", "--bench")
    assert done.returncode == 2 and "OUT must be another file" in done.stderr
    assert (folder / "net.onnx").read_bytes() == before
    assert fuser("optimize", folder / "net.onnx", "--bench", "--plan").returncode == 0
    assert "nothing was written or measured" in fuser("optimize", folder / "net.onnx", "--bench", "--plan").stdout


def test_a_second_run_applies_nothing_says_so_and_writes_the_same_bytes(folder: Path) -> None:
    fuser("optimize", folder / "net.onnx", folder / "a.onnx")
    done = fuser("optimize", folder / "a.onnx", folder / "b.onnx")
    assert done.returncode == 0
    assert "0 rewrites" in done.stdout
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


def test_plan_changes_nothing(folder: Path) -> None:
    done = fuser("optimize", folder / "net.onnx", "--plan")
    assert done.returncode == 0
    assert "fold-batch-norm" in done.stdout
    assert "nothing was written" in done.stdout
    assert os.listdir(folder) == ["net.onnx"]


def test_explain_prints_a_line_for_each_candidate(folder: Path) -> None:
    done = fuser("explain", folder / "net.onnx", "--passes", "fold-batch-norm")
    first, *table, last = done.stdout.strip().splitlines()
    assert [line.split()[0] for line in table] == [
        "before",
        "nodes",
        "BatchNormalization",
        *"parameters bytes multiply-adds".split(),
    ]
    assert first.startswith("applied fold-batch-norm @ bn_b: ")
    assert last == "1 would be applied, 0 missed; nothing was written"
    assert os.listdir(folder) == ["net.onnx"]


def test_explain_as_json(folder: Path) -> None:
    story = json.loads(fuser("explain", folder / "net.onnx", "--json").stdout)
    assert [r["site"] for r in story["applied"] if r["pass_name"] == "fold-batch-norm"] == ["bn_b"]


def test_the_report_is_json_with_the_whole_story(folder: Path) -> None:
    fuser("optimize", folder / "net.onnx", "--report", folder / "story.json")
    story = json.loads((folder / "story.json").read_text())
    assert story["before"]["ops"] == {"Conv": 1, "BatchNormalization": 1, "Relu": 1}
    assert story["after"]["ops"] == {"Conv": 1, "Relu": 1}
    assert story["verification"]["passed"] is True
    assert story["written"] == [str(folder / "net.fused.onnx")]


def test_optimize_as_json_prints_nothing_else(folder: Path) -> None:
    story = json.loads(fuser("optimize", folder / "net.onnx", "--json").stdout)
    assert story["written"] == [str(folder / "net.fused.onnx")]
    assert "fuser bench" in fuser("optimize", folder / "net.onnx", "--json", "--bench").stderr


def test_bench_as_json_and_to_a_file(folder: Path) -> None:
    net, story = folder / "net.onnx", folder / "bench.json"
    done = fuser("bench", net, "--arms", "ort-on", "--seconds", "0.2", "--json", "--report", story)
    assert json.loads(done.stdout) == json.loads(story.read_text())
    assert [arm["name"] for arm in json.loads(done.stdout)["arms"]] == ["ort-on"]


@pytest.mark.parametrize(
    "given, seen",
    [
        (["--fail-if-slower"], ["--fail-if-slower=0"]),
        (["--fail-if-slower", "2.5"], ["--fail-if-slower", "2.5"]),
        (["a", "--fail-if-slower", "--json"], ["a", "--fail-if-slower=0", "--json"]),
        (["--fail-if-slower", "a.onnx", "b.onnx"], ["--fail-if-slower=0", "a.onnx", "b.onnx"]),
        (["--fail-if-slower=5"], ["--fail-if-slower=5"]),
    ],
)
def test_fail_if_slower_may_stand_without_its_number(given: list[str], seen: list[str]) -> None:
    assert _with_values(given) == seen


def test_external_data_and_single_file(folder: Path) -> None:
    done = fuser("optimize", folder / "net.onnx", folder / "a.onnx", "--external-data", "--threshold", "16")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(folder)) == ["a.onnx", "a.onnx.data", "net.onnx"]
    assert f"wrote {folder / 'a.onnx.data'}" in done.stdout
    assert fuser("optimize", folder / "a.onnx", folder / "b.onnx", "--single-file").returncode == 0
    assert op_types(onnx.load(folder / "b.onnx").graph) == ["Conv", "Relu"]
    assert not (folder / "b.onnx.data").exists()


def test_many_models_one_of_them_broken(folder: Path) -> None:
    (folder / "copy.onnx").write_bytes((folder / "net.onnx").read_bytes())
    (folder / "bad.onnx").write_text("no model")
    models = [folder / name for name in ("net.onnx", "bad.onnx", "copy.onnx")]
    done = fuser("optimize", *models, "--output-dir", folder / "out", "--jobs", "2")
    assert done.returncode == 1
    assert sorted(os.listdir(folder / "out")) == ["copy.onnx", "net.onnx"]
    assert op_types(onnx.load(folder / "out" / "net.onnx").graph) == ["Conv", "Relu"]
    assert "failed: " in done.stdout
    lines = fuser("optimize", *models, "--output-dir", folder / "out", "--json-lines").stdout.splitlines()
    assert sorted(not json.loads(line)["error"] for line in lines) == [False, True, True]
    quiet = fuser("optimize", *models, "--output-dir", folder / "out", "--quiet")
    assert quiet.returncode == 1 and not quiet.stdout
    (line,) = quiet.stderr.splitlines()
    assert line.startswith("error: ") and line.count("bad.onnx") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_report_that_cannot_be_written_to_the_end(folder: Path) -> None:
    done = fuser("optimize", folder / "net.onnx", "--report", "/dev/full")
    assert done.returncode == 2 and "cannot write /dev/full: No space left" in done.stderr


def test_bench_measures_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Path, str, float]] = []

    class Measured:
        def render(self) -> str:
            return "the table"

    def benchmark(before: Path, after: str, *, seconds: float, **_: object) -> Measured:
        measured.append((before, after, seconds))
        return Measured()

    monkeypatch.setattr("fuser.bench.benchmark", benchmark)
    arguments = ["optimize", str(folder / "net.onnx"), "--no-verify", "--bench", "--bench-seconds", "3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert measured == [(folder / "net.onnx", str(folder / "net.fused.onnx"), 3.0)]


TESTS = str(Path(__file__).parent)


def test_optimizers_of_others_afterwards(tmp_path: Path) -> None:
    nodes = [node("Identity", ["x"], ["i"]), conv("i"), batch_norm("c", "b"), node("Relu", ["b"])]
    onnx.save(model(nodes, constants=conv_constants(), x=(1, 4, 8, 8)), tmp_path / "in.onnx")
    steps = [f"foreign_steps:{name}" for name in ("drops_relu", "drops_identity", "dies")]
    options = ["--passes", "fold-batch-norm", "--then", ",".join(steps)]
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    done = fuser("optimize", tmp_path / "in.onnx", out, *options, "--report", report, "-v", PYTHONPATH=TESTS)
    assert done.returncode == 0, done.stderr
    assert op_types(onnx.load(out).graph) == ["Conv", "Relu"]  # without what the wrong one did
    story = json.loads(report.read_text())
    assert [(r["pass_name"], r["code"]) for r in story["missed"]] == [
        (steps[0], "failed-verification"),
        (steps[2], "crashed"),
    ]
    assert story["applied"][-1]["pass_name"] == steps[1]
    assert all(step in done.stdout for step in steps)
    assert "failed-verification" in done.stdout and "crashed" in done.stdout


def test_passes_and_skip(folder: Path) -> None:
    done = fuser("optimize", folder / "net.onnx", "--skip", "fold-batch-norm")
    assert done.returncode == 0
    assert (folder / "net.fused.onnx").read_bytes() == (folder / "net.onnx").read_bytes()


def test_overridable_weights_are_told_in_one_line_and_freeze_inputs_folds_them(tmp_path: Path) -> None:
    constants = conv_constants()
    proto = model([conv(), batch_norm()], constants=constants, also_inputs=list(constants), x=(1, 4, 8, 8))
    onnx.save(proto, tmp_path / "net.onnx")
    done = fuser("optimize", tmp_path / "net.onnx")
    assert done.returncode == 0
    assert "--freeze-inputs makes those inputs constant" in done.stdout
    assert (tmp_path / "net.fused.onnx").read_bytes() == (tmp_path / "net.onnx").read_bytes()
    assert fuser("optimize", tmp_path / "net.onnx", "--freeze-inputs").returncode == 0
    after = onnx.load(tmp_path / "net.fused.onnx")
    assert op_types(after.graph) == ["Conv"]
    assert [i.name for i in after.graph.input] == ["x"]


def test_a_frozen_model_is_verified_with_the_option_that_the_message_names(tmp_path: Path) -> None:
    constants = conv_constants()
    proto = model([conv(), batch_norm()], constants=constants, also_inputs=list(constants), x=(1, 4, 8, 8))
    before, after = tmp_path / "net.onnx", tmp_path / "net.fused.onnx"
    onnx.save(proto, before)
    fuser("optimize", before, "--freeze-inputs")
    done = fuser("verify", before, after)
    assert done.returncode == 1 and "incompatible: inputs 'w'" in done.stdout
    assert done.stdout.count("are missing") == 1 and "--freeze-inputs, in Python removed_inputs" in done.stdout
    assert fuser("verify", before, after, "--freeze-inputs").returncode == 0
    assert fuser("bisect", before, after, "--freeze-inputs").stdout == "no difference was found\n"


@pytest.mark.parametrize("columns", ["80", "40"])
def test_tables_cut_neither_names_nor_figures(folder: Path, columns: str) -> None:
    done = fuser("optimize", folder / "net.onnx", COLUMNS=columns)
    assert done.returncode == 0 and "fold-batch-norm" in done.stdout and "…" not in done.stdout
    proto = onnx.load(folder / "net.onnx")
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "/features/block_12/activation/LeakyRelu_output_0"
    onnx.save(proto, folder / "long.onnx")
    done = fuser("verify", folder / "long.onnx", folder / "long.onnx", COLUMNS=columns)
    assert done.returncode == 0 and "…" not in done.stdout
    head = done.stdout.splitlines()[0].split()
    figures = ["max", "abs", "original", "excess"] if columns == "40" else ["relative", "ulp", "SNR", "dB", "excess"]
    assert head[-len(figures) :] == figures


def test_passes_lists_what_is_registered() -> None:
    done = fuser("passes")
    assert done.returncode == 0
    assert "fold-batch-norm" in done.stdout
    assert "graph-fuser" in done.stdout


def test_help_is_quick_and_an_onnx_job_never_imports_torch(folder: Path) -> None:
    started = os.times()
    assert fuser("--help").returncode == 0
    ended = os.times()  # processor time: a busy machine does not make it slow
    assert ended.children_user + ended.children_system - started.children_user - started.children_system < 1
    script = (
        "import sys, fuser\n"
        f"fuser.optimize({str(folder / 'net.onnx')!r}, verify=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


# -- bad input: one line, exit code 2, nothing written

BAD = {
    "missing": None,
    "empty": b"",
    "text": b"this is not a model, it is a poem\n" * 20,
    "json": b'{"ir_version": 8, "graph": {}}',
    "zip": b"PK\x03\x04" + bytes(100),
    "noise": bytes(np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8)),
}


@pytest.mark.parametrize("command", ["optimize", "explain"])
@pytest.mark.parametrize("case", [*BAD, "directory", "truncated", "external-data-missing"])
def test_bad_input(command: str, case: str, folder: Path) -> None:
    path = folder / "bad.onnx"
    if case == "directory":
        path.mkdir()
    elif case == "truncated":
        path.write_bytes((folder / "net.onnx").read_bytes()[:-300])
    elif case == "external-data-missing":
        onnx.save(onnx.load(folder / "net.onnx"), path, save_as_external_data=True, location="w.bin", size_threshold=0)
        (folder / "w.bin").unlink()
    elif (data := BAD[case]) is not None:
        path.write_bytes(data)
    before = sorted(os.listdir(folder))
    done = fuser(command, path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--passes", "fold-batchnorm"], "there is no pass 'fold-batchnorm'"),
        (["--skip", "nothing"], "there is no pass 'nothing'"),
        (["--then", "onnx-sim"], "there is no step 'onnx-sim'"),
        (["--input-shape", "x=1,3"], "--input-shape takes NAME:1,3,224,224"),
        (["--on-failure", "ignore"], "on_failure is one of rollback, abort"),
        (["a.onnx", "b.onnx"], "give IN and OUT, or several models and --output-dir"),
        (["--verify", "maybe"], "--verify takes auto, whole or none"),
        (["--shared-weights", "maybe"], "shared_weights is one of copy, refuse"),
        (["--report", "no/such/folder/r.json"], "there is no folder no/such/folder"),
        (["--report", "."], "cannot write .: it is a folder; add a file name"),
        (["--inputs", "none.npz"], "there is no none.npz"),
        (["--report", "net.onnx"], "cannot write net.onnx: it is the place of a model"),
        (["--report", "./net.fused.onnx"], "it is the place of a model"),
        (["out.onnx", "--report", "out.onnx.data"], "it is the place of a model"),
        (["--jobs", "2"], "--jobs and --json-lines are for --output-dir"),
        (["--json-lines"], "--jobs and --json-lines are for --output-dir"),
        (["--output-dir", "out", "--passes", "nothing"], "there is no pass 'nothing'"),
        (["--output-dir", "out", "--then", "nothing"], "there is no step 'nothing'"),
        (["--output-dir", "out", "--on-failure", "ignore"], "on_failure is one of rollback, abort"),
        (["--bench", "--bench-seconds", "0"], "seconds must be positive"),
        (["--no-verify", "--verify=whole"], "contradict each other"),
        (["--no-verify", "--inputs", "x.npz"], "--no-verify and --inputs contradict each other"),
        (["--verify=none", "--inputs", "x.npz"], "--no-verify and --inputs contradict each other"),
        (["--no-verify", "--input-shape", "x:1,4,8,8"], "--no-verify and --input-shape contradict each other"),
        (["--no-verify", "--on-failure=abort"], "--no-verify and --on-failure=abort contradict each other"),
        (["--single-file", "--external-data"], "--single-file and --external-data contradict each other"),
        (["--single-file", "--threshold", "0"], "--single-file and --threshold contradict each other"),
        (["--input-shape", "x:1,4,8,8", "--input-shape", "x:2,4,8,8"], "--input-shape is given twice for 'x'"),
        (["--passes", "fold-pad,fold-affine", "--skip", "fold-pad"], "'fold-pad' is both to run and to skip"),
        (["--json", "--quiet"], "--quiet and --json contradict each other"),
        (["--verbose", "--quiet"], "--quiet and --verbose contradict each other"),
        (["--output-dir", "out", "--json-lines", "--quiet"], "--quiet and --json-lines contradict each other"),
        (["--output-dir", "out", "--verbose"], "--verbose are for one model"),
        (["--output-dir", "."], "cannot write net.onnx: it is one of the models to read"),
        (["."], ". is a folder"),
        ([""], ". is a folder"),
    ],
)
def test_bad_usage(arguments: list[str], says: str, folder: Path) -> None:
    done = fuser("optimize", "net.onnx", *arguments, cwd=folder)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(folder) == ["net.onnx"]


def test_bisect_of_two_models_takes_no_passes(folder: Path) -> None:
    done = fuser("bisect", folder / "net.onnx", folder / "net.onnx", "--passes", "fold-pad")
    assert done.returncode == 2 and "are for the rewrites of IN; leave out B" in done.stderr


def test_a_plot_that_cannot_be_written_is_told_before_the_measurement(folder: Path) -> None:
    done = fuser("bench", "net.onnx", "--plot", "no/p.png", cwd=folder)
    assert done.returncode == 2 and done.stderr == "error: cannot write no/p.png: there is no folder no\n"


def test_files_that_are_not_there_make_no_folder(folder: Path) -> None:
    done = fuser("optimize", "none-*.onnx", "--output-dir", "out", cwd=folder)
    assert done.returncode == 1 and "cannot read none-*.onnx" in done.stdout
    assert os.listdir(folder) == ["net.onnx"]


def test_bench_for_no_time(folder: Path) -> None:
    done = fuser("bench", folder / "net.onnx", "--seconds", "nan")
    assert done.returncode == 2 and "seconds must be positive" in done.stderr


def test_the_pages_of_one_pass(folder: Path) -> None:
    done = fuser("passes", "fold-pad", "--pages", folder / "pages")
    assert done.returncode == 2 and "leave out its name" in done.stderr and not (folder / "pages").exists()


def test_pages_where_a_file_is(folder: Path) -> None:
    done = fuser("passes", "--pages", "net.onnx", cwd=folder)
    assert (done.returncode, done.stderr) == (2, "error: cannot make the folder net.onnx: File exists\n")


@pytest.mark.parametrize("damage", ["cut", "changed", "no memory"])
def test_damaged_inputs(folder: Path, damage: str) -> None:
    data = folder / "data.npz"
    np.savez(data, x=np.ones((1, 4, 8, 8), np.float32))
    content = data.read_bytes()
    if damage == "cut":
        data.write_bytes(content[:500])
    elif damage == "changed":
        data.write_bytes(content[:400] + b"x" * 100 + content[500:])
    else:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 3, 16, 16), }"
        data = folder / "data.npy"
        data.write_bytes(b"\x93NUMPY\x01\x00v\x00" + header.ljust(117) + b"\n")
    done = fuser("optimize", folder / "net.onnx", "--inputs", data)
    assert done.returncode == 2 and "is not readable as .npz or .npy" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_inputs_too_large_to_generate(tmp_path: Path) -> None:
    onnx.save(model([node("Relu", ["x"], ["r"]), node("Identity", ["r"])], x=(2**62, 2**40)), tmp_path / "net.onnx")
    done = fuser("optimize", tmp_path / "net.onnx")
    assert done.returncode == 2 and "do not fit into memory" in done.stderr


def test_models_that_are_none(folder: Path) -> None:
    whole = onnx.load(folder / "net.onnx")
    whole.graph.node[0].input[0] = "nobody"
    onnx.save(whole, folder / "dangling.onnx")
    done = fuser("optimize", folder / "dangling.onnx")
    assert done.returncode == 2 and "nothing makes 'nobody', which 'conv_c' reads" in done.stderr
    del whole.graph.output[:]
    onnx.save(whole, folder / "mute.onnx")
    done = fuser("optimize", folder / "mute.onnx")
    assert done.returncode == 2 and "it has no outputs" in done.stderr


def test_a_reader_that_takes_little(folder: Path) -> None:
    """A closed standard output, and one that knows few characters."""
    command = [sys.executable, "-m", "fuser", "optimize", str(folder / "net.onnx")]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    done = fuser("optimize", folder / "net.onnx", folder / "größer.onnx", PYTHONIOENCODING="ascii", COLUMNS="40")
    assert done.returncode == 0, done.stderr
    assert "fold-b" in done.stdout and (folder / "größer.onnx").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["passes"], ["explain", "net.onnx", "--json"], ["bisect", "net.onnx"]])
def test_a_result_that_cannot_be_printed(folder: Path, arguments: list[str], buffered: str) -> None:
    command = ["sh", "-c", '"$@" >/dev/full', "sh", sys.executable, "-m", "fuser", *arguments]
    env = {**os.environ, "PYTHONUNBUFFERED": buffered}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=120)
    assert (done.returncode, done.stderr) == (2, "error: cannot print the result: No space left on device\n")


def test_an_output_that_cannot_be_written(folder: Path) -> None:
    done = fuser("optimize", folder / "net.onnx", folder / "no" / "such" / "out.onnx")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(folder) == ["net.onnx"]


def test_an_output_that_is_a_directory(folder: Path) -> None:
    (folder / "out").mkdir()
    done = fuser("optimize", folder / "net.onnx", folder / "out")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(folder / "out") == []


def test_the_version_is_told() -> None:
    from importlib.metadata import version

    done = fuser("--version")
    assert (done.returncode, done.stdout) == (0, f"graph-fuser {version('graph-fuser')}\n")


@pytest.mark.parametrize("option", ["--passes", "--skip"])
def test_a_list_without_a_name_is_no_list(folder: Path, option: str) -> None:
    done = fuser("optimize", folder / "net.onnx", option, " , ")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ' , ' names nothing")
    assert os.listdir(folder) == ["net.onnx"]


def test_bisect_says_that_nothing_is_wrong(folder: Path) -> None:
    done = fuser("bisect", folder / "net.onnx")
    assert (done.returncode, done.stdout) == (0, "no wrong rewrite was found\n")


def test_bisect_finds_what_verify_finds(tmp_path: Path) -> None:
    """A bound that only large inputs reach."""
    for name, high in (("a.onnx", 6), ("b.onnx", 7)):
        bounds = {"low": np.float32(0), "high": np.float32(high)}
        onnx.save(model([node("Clip", ["x", "low", "high"])], constants=bounds, x=(2, 4)), tmp_path / name)
    assert "different" in fuser("verify", "a.onnx", "b.onnx", cwd=tmp_path).stdout
    done = fuser("bisect", "a.onnx", "b.onnx", cwd=tmp_path)
    assert done.returncode == 1 and "first difference" in done.stdout and "for large" in done.stdout


def test_a_model_of_an_old_opset_is_told(folder: Path) -> None:
    proto = onnx.load(folder / "net.onnx")
    proto.opset_import[0].version = 6
    onnx.save(proto, folder / "old.onnx")
    done = fuser("explain", folder / "old.onnx")
    assert done.returncode == 0 and done.stderr.startswith("warning: the model is of opset 6")
