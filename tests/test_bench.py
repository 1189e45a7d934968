"""Benchmarks: how samples are taken, what is told of them, and whole runs on real runtimes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from torch import nn

import fuser
from fuser import files
from fuser.bench import Benchmark, environment, instance, render, sampling
from fuser.bench.arms import ARMS, DEFAULTS, DUPLICATED, select
from fuser.bench.costs import Costs, file_bytes, of_torch, onnx_multiply_adds
from fuser.bench.host_onnx import op_times
from fuser.bench.instance import Job, Opened, OpTime, Warm
from fuser.bench.result import ArmResult
from fuser.bench.sampling import Launch, Plan, Samples, Turn, take
from fuser.bench.subject import prepare
from fuser.errors import FuserError, InputError
from fuser.isolate import Raised

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 4, 16, 16] x) => (float[N, 4, 16, 16] y) {
    a = Relu(x)
    b = Neg(a)
    y = Relu(b)
}
"""


def save(text: str, path: Path) -> Path:
    onnx.save(parser.parse_model(text), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(CHAIN, tmp_path / "chain.onnx")


# -- the arms


def test_default_arms_exist_and_fit():
    for (host, device), names in DEFAULTS.items():
        assert [arm.name for arm in select(host, device)] == list(names)
        assert all((ARMS[name].host, ARMS[name].device) == (host, device) for name in names)


def test_unknown_arms_and_devices_are_refused():
    with pytest.raises(InputError, match="the arms are ort-off, ort-partial, ort-on"):
        select("onnx", "cpu", ["torch-eager"])
    with pytest.raises(InputError, match="the devices are cpu and cuda"):
        select("onnx", "tpu")


def test_a_missing_provider_is_told(monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "install onnxruntime-gpu" in (ARMS["ort-cuda"].unavailable() or "")
    assert "TensorrtExecutionProvider" in (ARMS["ort-tensorrt"].unavailable() or "")
    assert ARMS["ort-on"].unavailable() is None


def test_a_missing_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ARMS["torch-cuda"].unavailable() == "torch finds no CUDA device"
    assert ARMS["torch-eager"].unavailable() is None


def test_the_partial_arm_leaves_the_batch_norm_to_fuser(tmp_path):
    """ONNX Runtime ignores names that it does not know: a typo would go unnoticed."""
    import onnxruntime as ort

    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[4, 3] x, float[1, 1, 4, 4] z) => (float[4, 2] y, float[1, 2, 4, 4] v)
    <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2, 1, 1, 1] k = {1, 2}, float[2] s = {1, 2}, float[2] b = {0, 1}> {
        m = MatMul(x, w)
        y = BatchNormalization(m, s, b, b, s)
        c = Conv(z, k)
        v = BatchNormalization(c, s, b, b, s)
    }"""
    kinds = {}
    for disabled in ((), DUPLICATED):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "out.onnx")
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        ort.InferenceSession(
            save(text, tmp_path / "in.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled),
        )
        kinds[disabled] = [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
    assert "BatchNormalization" not in kinds[()]
    assert kinds[DUPLICATED].count("BatchNormalization") == 2


# -- inside the process of an instance


class Fake:
    """An instance that takes the times it is told."""

    def __init__(self, times: Callable[[], float]) -> None:
        self.times, self.runs, self.inner = times, 0, []

    def run(self) -> None:
        self.runs += 1

    def time(self, inner: int) -> float:
        self.inner.append(inner)
        return self.times()

    def profile(self, runs: int) -> list[OpTime]:
        return [OpTime("Add", 1.0, 1), OpTime("Conv", 2.0, 1)]

    def peak_bytes(self) -> int:
        return 7


@pytest.fixture
def fake(monkeypatch) -> Fake:
    fake = Fake(lambda: 0.5)
    monkeypatch.setattr(instance, "_instances", {0: fake})
    return fake


def test_measure_leads_in_and_takes_samples(fake):
    assert instance.measure(0, samples=3, inner=7, lead_in=2) == [0.5] * 3
    assert fake.runs == 2 and fake.inner == [7, 7, 7]


def test_warm_up_ends_when_the_latency_settles(fake):
    falling = iter([9.0, *[8.0] * 3, *[4.0] * 3, *[1.0] * 9, *[0.1] * 99])
    fake.times = lambda: next(falling)
    assert instance.warm_up(0, limit=5.0) == Warm(1.0, True, 7)


def test_warm_up_ends_when_its_time_is_up(fake):
    assert instance.warm_up(0, limit=0.0) == Warm(0.5, False, 7)


def test_interruptions_of_the_warm_up_are_not_the_latency(fake):
    busy = chain([0.1, *[0.001] * 3], repeat(0.01))
    fake.times = lambda: next(busy)
    assert instance.warm_up(0, limit=5.0).seconds == 0.001


def test_profile_tells_the_slowest_first(fake):
    assert [op.op for op in instance.profile(0, runs=3)] == ["Conv", "Add"]


def test_peak_memory_is_of_this_process():
    block = np.ones(8 << 20)
    peak = instance.peak_memory()
    assert peak is None or peak > block.nbytes


def test_op_times_leave_out_the_first_run():
    def event(op: str, ts: int, dur: int, kind: str = "_kernel_time") -> dict:
        return {"cat": "Node", "name": f"n{kind}", "ts": ts, "dur": dur, "args": {"op_name": op}}

    first = [event("Conv", 0, 10**9), event("Relu", 1, 10**9)]
    rest = [event(op, ts, dur) for ts, (op, dur) in enumerate([("Conv", 30), ("Relu", 2)] * 2, 2)]
    noise = [event("Conv", 9, 10**9, "_fence_before"), {"cat": "Session", "name": "model_run", "ts": 0, "dur": 1}]
    found = {op.op: op for op in op_times(rest + noise + first, runs=2)}
    assert found["Conv"].seconds == pytest.approx(30e-6) and found["Conv"].count == 1
    assert found["Relu"].seconds == pytest.approx(2e-6)


# -- taking samples, with processes that are not there


class Machine:
    """Answers for every role; `seconds[role]` is its latency, `fail` is called before each answer."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.calls, self.open, self.fail = seconds, [], 0, lambda role, function: None
        self.rng = np.random.default_rng(0)

    @contextmanager
    def caller(self, job: Job):
        self.open += 1
        try:
            yield self.Caller(self, job.model)
        finally:
            self.open -= 1

    class Caller:
        def __init__(self, machine: Machine, role: str) -> None:
            self.machine, self.role = machine, role

        def call(self, function: str, *args, timeout=None):
            function = function.split(":")[1]
            self.machine.fail(self.role, function)
            self.machine.calls.append((function, self.role))
            latency = self.machine.seconds[self.role]
            if function == "open_instance":
                return Opened(0, 0.1, 0.2, 1)
            if function == "warm_up":
                return Warm(latency, True, 100)
            _, samples, _, _ = args
            return list(latency * np.exp(self.machine.rng.normal(0, 0.01, samples)))


@pytest.fixture
def run(monkeypatch):
    def run(machine: Machine, seconds: float = 0.02, launches: int = 10) -> Samples:
        monkeypatch.setattr(sampling, "_caller", machine.caller)
        monkeypatch.setattr(sampling, "PATIENCE", 1e9)
        samples = Samples()
        take({role: Job("onnx", role, {}, 1) for role in machine.seconds}, Plan(seconds, launches), 0, samples)
        assert machine.open == 0  # every process is gone
        return samples

    return run


def test_every_round_asks_every_role_in_random_order(run):
    machine = Machine(before=0.01, after=0.01, again=0.01)
    samples = run(machine)
    turns = [role for function, role in machine.calls if function == "measure"]
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(order) == ["after", "again", "before"] for order in rounds)
    assert len(set(rounds)) == 6
    assert sum(len(launch.rounds) for launch in samples.launches) == len(rounds)


def test_a_clear_result_ends_early(run):
    samples = run(Machine(before=0.02, after=0.01, again=0.02))
    assert len(samples.launches) == sampling.LOOK_AFTER
    comparison = samples.compare(0)
    assert comparison.verdict.word == "faster" and comparison.change.ratio == pytest.approx(0.5, rel=0.02)
    assert comparison.same.ratio == pytest.approx(1, rel=0.02)


def test_slower_is_slower(run):
    assert run(Machine(before=0.01, after=0.02, again=0.01)).compare(0).verdict.word == "slower"


def test_an_inconclusive_result_gets_twice_the_launches(run):
    machine = Machine(before=0.01, after=0.01, again=0.01)
    jumps = np.random.default_rng(1)

    def jump(role, function):
        if function == "open_instance":
            machine.seconds[role] = 0.01 * np.exp(jumps.normal(0, 0.7))

    machine.fail = jump
    samples = run(machine)
    assert len(samples.launches) == 20 and samples.compare(0).verdict.word == "inconclusive"


def test_one_model_alone_has_no_verdict(run):
    samples = run(Machine(before=0.01), launches=3)
    assert len(samples.launches) == 3 and samples.compare(0) is None and samples.of("before")


@pytest.mark.parametrize("function", ["open_instance", "warm_up", "measure"])
def test_an_error_names_the_model_and_keeps_what_there_is(run, function):
    machine = Machine(before=0.01, after=0.01, again=0.01)

    def fail(role, called):
        launches = sum(c == ("open_instance", "after") for c in machine.calls)
        if role == "after" and called == function and launches >= 2:
            raise Raised("RuntimeError: no kernel", "")

    machine.fail = fail
    samples = run(machine)
    assert samples.error.startswith("after: ") and samples.error.endswith("failed: RuntimeError: no kernel")
    assert 1 <= len(samples.complete) <= 2 and not samples.interrupted


def test_ctrl_c_keeps_the_rounds_that_are_complete(run):
    machine = Machine(before=0.01, after=0.01, again=0.01)

    def interrupt(role, function):
        if sum(c[0] == "measure" for c in machine.calls) == 8:
            raise KeyboardInterrupt

    machine.fail = interrupt
    samples = run(machine, seconds=1000)
    assert samples.interrupted and not samples.error
    assert [len(launch.rounds) for launch in samples.launches] == [2]
    assert samples.compare(0).verdict.word == "inconclusive"


@pytest.mark.parametrize("seconds", [1e-7, 1e-5, 1e-3, 0.02, 0.2, 5.0])
def test_turns_are_long_enough_and_not_too_long(seconds):
    turn = Turn.of(seconds)
    assert turn.inner * seconds >= sampling.SHORTEST and 1 <= turn.samples <= sampling.MOST_SAMPLES
    assert turn.samples * turn.inner * seconds <= max(2 * sampling.REQUEST, seconds)
    assert turn.lead_in * seconds <= 10 * sampling.LEAD_IN
    assert (turn.lead_in == 0) == (seconds > 10 * sampling.LEAD_IN)


# -- what a model costs


def test_multiply_adds_are_those_that_torch_counts(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, groups=2),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
        nn.Flatten(2),
        nn.Linear(17 * 17, 5),
        nn.Flatten(),
        nn.Linear(30, 7),
    ).eval()
    x = torch.zeros(2, 4, 17, 17)
    program = torch.onnx.export(net, (x,), dynamo=True, optimize=False, verbose=False)
    expected = of_torch(net, (x,), {}).multiply_adds
    hand = 2 * 8 * 8 * 8 * 2 * 9 + 2 * 8 * 8 * 8 * 3 * 9 + 2 * 6 * 289 * 5 + 2 * 30 * 7
    assert onnx_multiply_adds(program.model_proto, {program.model_proto.graph.input[0].name: x.shape}) == expected
    assert expected == hand


def test_a_module_and_its_graph_are_counted_alike_by_what_runs():
    conv, norm = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
    net, x = nn.Sequential(conv, norm, nn.ReLU(), conv, nn.Flatten()).eval(), torch.zeros(1, 2, 9, 9)
    program = torch.export.export(net, (x,))
    expected = {"aten.convolution": 2, "aten.native_batch_norm": 1, "aten.relu": 1}
    for model in (net, torch.fx.symbolic_trace(net), program.module(), program):
        assert of_torch(model, (x,), {}).ops == expected
    broken = of_torch(net, (torch.zeros(1, 3, 9, 9),), {})
    assert (broken.ops, broken.multiply_adds) == ({}, None)


def test_multiply_adds_follow_the_inputs_and_are_none_when_unknown():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N, K] x) => (float[N, M] y) <float[3, 5] w> { y = Gemm<transA = 0>(x, w) }"""
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((3, 5), np.float32), "w"))
    assert onnx_multiply_adds(model, {"x": (4, 3)}) == 4 * 3 * 5
    model.graph.node[0].attribute[0].i = 1
    assert onnx_multiply_adds(model, {"x": (3, 4)}) == 4 * 3 * 5
    assert onnx_multiply_adds(model, {}) is None


def test_file_bytes_count_external_data(tmp_path):
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    loaded = files.load(tmp_path / "m.onnx")
    expected = sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.data"))
    assert file_bytes(loaded.proto, tmp_path / "m.onnx") == expected > 64 * 64 * 4


# -- the machine


def test_usable_cores_respect_the_quota_of_a_container(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(environment, "_CGROUP", quota)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert environment.usable_cores() == 8
    for text, cores in (("max 100000", 8), ("150000 100000", 2), ("1000 100000", 1), ("9900000 100000", 8)):
        quota.write_text(text)
        assert environment.usable_cores() == cores


def test_environment_is_plain_and_names_what_matters():
    found = environment.describe("cpu", 3, 11)
    json.dumps(found, allow_nan=False)
    assert found["threads"] == 3 and found["seed"] == 11 and found["cpu"] and found["versions"]["onnxruntime"]


def test_other_load_is_what_is_not_ours(monkeypatch):
    ticks = iter([environment._Ticks(100, 1000), environment._Ticks(180, 1200)])
    own = iter([5.0, 5.3])
    monkeypatch.setattr(environment, "_ticks", lambda: next(ticks))
    monkeypatch.setattr(environment, "_own_seconds", lambda: next(own))
    monkeypatch.setattr(environment.os, "sysconf", lambda _: 100)
    with environment.watch() as load:
        assert load.share is None
    assert load.share == pytest.approx((80 - 30) / 200)


# -- what is told


def result_of(medians: dict[str, float], launches: int = 5, arm: str = "ort-on", n: int = 10) -> ArmResult:
    """A result with `n` samples in each of two rounds of each launch."""
    rng = np.random.default_rng(0)
    samples = Samples()
    for _ in range(launches):
        launch = Launch(
            {role: Opened(0, 0.1, 0.2, 1) for role in medians}, {role: Warm(1, True, 1 << 20) for role in medians}
        )
        for _ in range(2):
            launch.rounds.append({r: list(m * np.exp(rng.normal(0, 0.003, n))) for r, m in medians.items()})
        samples.launches.append(launch)
    return ArmResult(ARMS[arm], samples)


def benchmark_of(*arms: ArmResult, roles: tuple[str, ...] = ("before", "after")) -> Benchmark:
    costs = {"before": Costs(1000, {"Conv": 2, "BatchNormalization": 2}, 10, 40, 99), "after": Costs(900, {"Conv": 2})}
    return Benchmark(
        {role: f"{role}.onnx" for role in roles},
        {role: costs[role] for role in roles},
        {"x": "float32[1,3]"},
        list(arms),
        environment.describe("cpu", 2, 0),
    )


def pair(before: float, after: float, **kwargs) -> ArmResult:
    return result_of({"before": before, "after": after, "again": before}, **kwargs)


def test_slower_than_looks_at_the_whole_interval():
    slower, same, faster = pair(0.01, 0.0112), pair(0.01, 0.01), pair(0.01, 0.005)
    benchmark = benchmark_of(slower, same, faster)
    assert [a.comparison.verdict.word for a in benchmark.arms] == ["slower", "no measurable change", "faster"]
    assert benchmark.slower_than() == [slower] == benchmark.slower_than(10)
    assert benchmark.slower_than(13) == []
    change = slower.comparison.change
    assert change.log_low < change.log
    assert benchmark.slower_than((change.ratio - 1) * 100 - 1e-6) == []  # the estimate is, the interval is not


def test_a_model_that_no_longer_runs_fails_the_check():
    broken = ArmResult(ARMS["ort-on"], Samples(error="after: opening failed: no kernel"))
    both = ArmResult(ARMS["ort-on"], Samples(error="before: opening failed: no kernel"))
    skipped = ArmResult(ARMS["ort-cuda"], skipped="not here")
    assert benchmark_of(broken, both, skipped).slower_than() == [broken]


def test_json_holds_samples_and_conclusions():
    benchmark = benchmark_of(pair(0.01, 0.005), ArmResult(ARMS["ort-cuda"], skipped="not here"))
    data = json.loads(json.dumps(benchmark.to_dict(), allow_nan=False))
    arm, skipped = data["arms"]
    assert len(arm["launches"]) == 5 and set(arm["launches"][0]["rounds"][0]) == {"before", "after", "again"}
    assert arm["verdict"]["word"] == "faster" and arm["ratio"]["ratio"] == pytest.approx(0.5, rel=0.01)
    assert arm["ratio"]["low"] <= arm["ratio"]["ratio"] <= arm["ratio"]["high"]
    assert arm["peak_bytes"]["after"] == 1 << 20 and arm["load_seconds"]["before"] == 0.1
    assert skipped["problem"] == "not here" and skipped["verdict"] is None
    assert data["models"]["before"]["ops"] == {"Conv": 2, "BatchNormalization": 2}
    assert data["environment"]["threads"] == 2 and data["confidence"] == 0.99


def test_open_intervals_are_null_in_json():
    data = json.loads(json.dumps(benchmark_of(pair(0.01, 0.005, launches=1)).to_dict(), allow_nan=False))
    assert data["arms"][0]["ratio"]["high"] is None and data["arms"][0]["verdict"]["word"] == "inconclusive"


def test_the_table_says_what_matters():
    first = pair(0.01, 0.005)
    first.profile = {
        "before": [OpTime("Conv", 0.004, 2), OpTime("Relu", 0.001, 1)],
        "after": [OpTime("Conv", 0.003, 2)],
    }
    broken = ArmResult(ARMS["ort-off"], Samples(error="after: opening failed: no kernel"))
    benchmark = benchmark_of(first, broken, ArmResult(ARMS["ort-cuda"], skipped="not here"))
    benchmark.interrupted = True
    text = str(benchmark)
    for expected in (
        "before.onnx",
        "float32[1,3]",
        "BatchNormalization",
        "faster",
        "2.0",
        render.seconds(first.summaries["before"].median),
        render.seconds(first.summaries["after"].median),
        *render.interval(first.comparison.change).split(" ", 1),
        "100 ms",
        "1.00 MiB",
        "4.00 ms in 2",
        "not measured: after: opening failed: no kernel",
        "not measured: not here",
        "interrupted: this is what was measured until then",
        "onnxruntime",
    ):
        assert expected in text, expected


def test_names_are_not_markup():
    benchmark = benchmark_of(pair(0.01, 0.01))
    benchmark.names["before"] = "[/b]x[red].onnx"
    assert "[/b]x[red].onnx" in str(benchmark)


def test_a_single_model_is_before_nothing():
    text = str(benchmark_of(result_of({"before": 0.01}), roles=("before",)))
    assert "model: before.onnx" in text and "verdict" not in text and "A/A" not in text


def test_nothing_measured_still_prints():
    text = str(benchmark_of(ArmResult(ARMS["ort-cuda"], skipped="not here")))
    assert "not here" in text and "Latency" not in text


def test_warnings_state_their_threshold():
    noisy = pair(0.01, 0.01, n=3)
    rounds = [taken for launch in noisy.samples.launches for taken in launch.rounds]
    rounds[0]["after"][0] = 1.0
    for i, taken in enumerate(rounds):
        taken["before"] = [x * (1 + 0.05 * i) for x in taken["before"]]
    noisy.other_load = 0.5
    for launch in noisy.samples.launches:
        launch.warm["before"] = Warm(1, False, None)
    text = "\n".join(noisy.warnings)
    assert "after: the coefficient of variation is" in text and "(over 10%)" in text
    assert "30 samples are few (under 100)" in text
    assert "slower meanwhile: throttling" in text
    assert "other processes took 50% of the machine" in text
    assert "did not settle during warm-up in 5 launches" in text


def test_a_quiet_measurement_warns_of_nothing():
    assert pair(0.01, 0.01).warnings == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (1e-4, "100 µs"), (5e-9, "5.00 ns"), (None, "-")],
)
def test_seconds_have_units(value, text):
    assert render.seconds(value) == text


def test_counts_have_units():
    assert [render.count(x) for x in (None, 7, 1500, 2_500_000, 10**10)] == [
        "unknown",
        "7",
        "1.50 k",
        "2.50 M",
        "10.0 G",
    ]
    assert [render.byte_count(x) for x in (None, 7, 1536, 3 << 20, 1 << 30)] == [
        "-",
        "7 B",
        "1.50 KiB",
        "3.00 MiB",
        "1.00 GiB",
    ]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots_are_written(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    target = tmp_path / f"plot{suffix}"
    benchmark_of(pair(0.01, 0.005), pair(0.01, 0.01, launches=1), ArmResult(ARMS["ort-cuda"])).plot(target)
    assert target.stat().st_size > 1000
    benchmark_of(result_of({"before": 0.01}), roles=("before",)).plot(target)


def test_plots_that_cannot_be_made_are_refused(tmp_path, monkeypatch):
    benchmark = benchmark_of(pair(0.01, 0.005))
    with pytest.raises(InputError, match=r"ends in \.png or \.svg"):
        benchmark.plot(tmp_path / "plot.pdf")
    with pytest.raises(InputError, match="nothing to plot"):
        benchmark_of(ArmResult(ARMS["ort-cuda"])).plot(tmp_path / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"install graph-fuser\[plot\]"):
        benchmark.plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


# -- making models ready


def test_inputs_are_seeded_and_of_the_batch_that_was_asked_for(model, tmp_path):
    first, second, other = (prepare({"before": model}, tmp_path, batch=3, seed=s).inputs["x"] for s in (0, 0, 1))
    assert first.shape == (3, 4, 16, 16) and first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_a_fixed_batch_is_not_overridden(tmp_path):
    fixed = save(CHAIN.replace("N, ", "1, "), tmp_path / "fixed.onnx")
    with pytest.raises(InputError, match=r"first axis of the input 'x' is fixed at 1; it cannot be 2"):
        prepare({"before": fixed}, tmp_path, batch=2)


def test_protos_and_graphs_are_measured_like_files(model, tmp_path):
    import onnx_graphsurgeon as gs

    proto = onnx.load(model)
    for given in (proto, gs.import_onnx(proto)):
        subjects = prepare({"before": given}, tmp_path)
        assert onnx.load(subjects.models["before"]).graph.node[1].op_type == "Neg"
        assert subjects.names["before"] == "net" and subjects.costs["before"].nodes == 3


def test_an_input_that_only_the_second_model_has_is_refused(model, tmp_path):
    other = save(CHAIN.replace("x)", "z)").replace("Relu(x)", "Relu(z)"), tmp_path / "other.onnx")
    with pytest.raises(InputError, match="has an input 'z' for which there is no value"):
        prepare({"before": model, "after": other}, tmp_path)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


X = torch.zeros(1, 3, 8, 8)


def test_torch_modules_are_sent_to_other_processes(tmp_path):
    exported = torch.export.export(net(), (X,))
    for given in (net(), torch.fx.symbolic_trace(net()), exported, exported.module()):
        subjects = prepare({"before": given}, tmp_path, example_inputs=(X,))
        assert Path(subjects.models["before"]).exists() and Path(subjects.inputs).exists()
    assert prepare({"before": exported}, tmp_path).input_shapes == {"input 0": "float32[1,3,8,8]"}


def test_modules_that_do_not_pickle_stay_here(tmp_path):
    class Local(nn.Module):
        def forward(self, x):
            return x

    here = Local().eval()
    subjects = prepare({"before": net(), "after": here}, tmp_path, example_inputs=(X,))
    assert subjects.models["after"] is here and isinstance(subjects.models["before"], nn.Module)


def test_classes_of_the_main_script_stay_here(tmp_path, monkeypatch):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "Script", type("Script", (nn.Module,), {"__module__": "__main__"}), raising=False)
    module = main.Script().eval()
    assert prepare({"before": module}, tmp_path, example_inputs=(X,)).models["before"] is module


def test_torch_batch_and_shapes(tmp_path):
    subjects = prepare({"before": net()}, tmp_path, example_inputs=X, batch=5)
    args, kwargs = torch.load(subjects.inputs)
    assert args[0].shape == (5, 3, 8, 8) and kwargs == {}
    subjects = prepare({"before": net()}, tmp_path, input_shapes={"input": (2, 3, 8, 8)})
    assert torch.load(subjects.inputs)[1]["input"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0}, "seconds must be positive"),
        ({"threads": 0}, "threads must be from 1 to 1024, not 0"),
        ({"threads": 1_000_000}, "threads must be from 1 to 1024, not 1000000"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"dtype": "int7"}, "there is no dtype 'int7'; give one of fp32, fp16, bf16"),
        ({"dtype": "fp16"}, "the dtype of an ONNX model is in the file"),
        ({"after": net()}, "cannot compare an ONNX model with a torch module"),
        ({"before": 3}, "cannot benchmark a builtins.int"),
        ({"before": "missing.onnx"}, "missing.onnx"),
        ({"before": "missing.pt2"}, "cannot read missing.pt2"),
        ({"before": net()}, "a torch module needs example_inputs"),
        ({"before": nn.BatchNorm2d(3), "example_inputs": (X,)}, "is in training mode; call .eval"),
        ({"example_inputs": {"y": np.zeros(3)}}, "'x'"),
    ],
)
def test_bad_input_is_refused(model, arguments, message):
    with pytest.raises(InputError, match=message):
        fuser.benchmark(**{"before": model, **arguments})


# -- whole runs


def test_two_onnx_models(model, tmp_path):
    heavy = tmp_path / "heavy.onnx"
    weight = np.ones((64, 4, 7, 7), np.float32)
    proto = onnx.load(model)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto.graph.node.append(helper.make_node("Conv", ["y", "w"], ["z"], pads=[3] * 4))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    onnx.save(proto, heavy)
    lines: list[str] = []
    result = fuser.benchmark(
        model, heavy, seconds=0.3, threads=1, arms=["ort-off"], batch=8, profile=True, progress=lines.append
    )
    (arm,) = result.arms
    assert arm.problem is None and len(arm.samples.complete) >= 3 and arm.isolated
    assert result.verdicts["ort-off"] in ("slower", "inconclusive")
    assert arm.comparison.change.ratio > 1.5
    assert arm.peak_bytes("after") > 1 << 20 and arm.load_seconds("before") > 0
    assert {op.op for op in arm.profile["after"]} == {"Relu", "Neg", "Conv"}
    assert result.inputs == {"x": "float32[8,4,16,16]"} and result.environment["threads"] == 1
    assert lines[0] == "ort-off: launch 1" and lines[-1] == "ort-off: profile"
    assert result.costs["after"].multiply_adds == 8 * 64 * 16 * 16 * 4 * 49


def test_a_model_that_does_not_run_is_told_and_the_other_arms_go_on(model, tmp_path):
    bad = save(CHAIN.replace("Neg(a)", "Nope(a)"), tmp_path / "bad.onnx")
    result = fuser.benchmark(model, bad, seconds=0.1, arms=["ort-off", "ort-on"])
    assert [a.arm.name for a in result.arms] == ["ort-off", "ort-on"] and not result.measured
    for arm in result.arms:
        assert arm.problem.startswith("after: opening failed") and "Nope" in arm.problem
    assert result.slower_than() == result.arms and "not measured" in str(result)


def test_a_module_of_this_process_is_measured_here():
    class Local(nn.Module):
        def forward(self, x):
            return x @ x

    threads = torch.get_num_threads()
    module = Local().eval()
    result = fuser.benchmark(
        module, module, example_inputs=(torch.ones(64, 64),), seconds=0.1, arms=["torch-eager"], threads=1, profile=True
    )
    (arm,) = result.arms
    assert arm.problem is None and not arm.isolated and arm.comparison
    assert "measured in this process" in arm.warnings[0] and arm.peak_bytes("before") is None
    assert any("mm" in op.op for op in arm.profile["before"])
    assert torch.get_num_threads() == threads and not instance._instances


def test_a_module_is_cast_for_the_measurement_only():
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

        def forward(self, x):
            assert x.dtype == self.weight.dtype == torch.bfloat16
            return x @ self.weight

    module = Local().eval()
    result = fuser.benchmark(
        module, example_inputs=(torch.ones(8, 8),), dtype="bf16", seconds=0.05, arms=["torch-eager"]
    )
    assert result.arms[0].problem is None and module.weight.dtype == torch.float32


def test_a_missing_provider_is_reported(model, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    result = fuser.benchmark(model, device="cuda", seconds=0.1)
    assert [a.arm.name for a in result.arms] == ["ort-cuda", "ort-tensorrt"] and not result.measured
    assert all("install onnxruntime-gpu" in a.problem for a in result.arms)


def test_ctrl_c_ends_the_run_and_keeps_what_there_is(model, monkeypatch):
    def interrupted(jobs, plan, seed, into, progress):
        into.interrupted = True

    monkeypatch.setattr("fuser.bench.take", interrupted)
    result = fuser.benchmark(model, model)
    assert result.interrupted and len(result.arms) == 1 and "interrupted" in str(result)


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_ctrl_c_from_a_terminal(model):
    """The signal reaches the processes of the instances as well."""
    script = (
        "import sys, fuser\n"
        "say = lambda line: print(line, file=sys.stderr, flush=True)\n"
        "print(fuser.benchmark(sys.argv[1], sys.argv[1], seconds=1000, arms=['ort-on'], threads=1, progress=say))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stderr.readline() == "ort-on: launch 1\n"
    time.sleep(3)  # processes start, warm up, and go round
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and err == ""
    assert "interrupted: this is what was measured until then" in out


def test_a_profile_that_fails_is_a_note(model, monkeypatch):
    def fails(job):
        raise FuserError("no profiler")

    monkeypatch.setattr("fuser.bench.take", lambda *_: None)
    monkeypatch.setattr("fuser.bench.profile_of", fails)
    result = fuser.benchmark(model, arms=["ort-on"], profile=True)
    assert result.arms[0].notes == ["no profile: no profiler"]
