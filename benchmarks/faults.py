"""Does the equivalence check catch what is wrong, and let pass what is right?

    python benchmarks/faults.py [--quick] [--models FOLDER]

Networks are generated (and taken from FOLDER, where it exists), folded by an independent few lines of numpy, and
then broken in the ways in which optimizers break models.  A broken model counts as a fault when it changes the
float64 function by more than rounding on inputs that the check has not seen.  Every fault must be caught and no
right fold refused; the table says so, and the exit code is 1 otherwise.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fuser.proof import verify
from fuser.proof.float64_onnx import evaluate
from fuser.proof.inputs import generate, specs_of
from fuser.proof.outcome import Failure
from fuser.proof.rounding import unit_roundoff
from fuser.proof.runners import Workers

Array = np.ndarray[Any, Any]

BEYOND = 10.0
"""A change is a fault when it is larger than this many times what one rounding of every constant does."""

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
_TYPES: dict[str, tuple[Any, int]] = {
    "float32": (np.float32, TensorProto.FLOAT),
    "float16": (np.float16, TensorProto.FLOAT16),
    "bfloat16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
}


# -- networks


@dataclass
class Net:
    """A network under construction: layers follow one another, each from a value to a new one."""

    dtype: str = "float32"
    seed: int = 0
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def constant(self, values: Any, dtype: Any = None) -> str:
        """A new initializer, rounded to the network's type."""
        name = f"k{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values).astype(dtype or _TYPES[self.dtype][0]), name))
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """A new node; the name of its first output."""
        names = [f"v{len(self.nodes)}", *(f"v{len(self.nodes)}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{op}_{len(self.nodes)}", **attributes))
        return names[0]

    def conv(
        self, x: str, cin: int, cout: int, k: int = 3, *, dims: int = 2, group: int = 1, bias: bool = False,
        transposed: bool = False, offset: float = 0.0, **attributes: Any,
    ) -> str:  # fmt: skip
        """A convolution of 'same' size; `offset` is a mean that its outputs get from the bias."""
        shape = (cin, cout // group) if transposed else (cout, cin // group)
        fan = (cin // group) * k**dims
        inputs = [x, self.constant(self.rng.standard_normal((*shape, *[k] * dims)) / np.sqrt(fan))]
        if bias or offset:
            inputs.append(self.constant(self.rng.standard_normal(cout) + offset))
        attributes.setdefault("pads", [k // 2] * 2 * dims)
        return self.add("ConvTranspose" if transposed else "Conv", *inputs, group=group, **attributes)

    def batch_norm(self, x: str, channels: int, *, mean: float = 0.0, epsilon: float = 1e-3) -> str:
        """With statistics as training leaves them."""
        parameters = (
            self.rng.uniform(0.5, 1.5, channels),
            self.rng.standard_normal(channels) * 0.3,
            self.rng.standard_normal(channels) * 0.3 + mean,
            self.rng.uniform(0.05, 1.5, channels),
        )
        return self.add("BatchNormalization", x, *map(self.constant, parameters), epsilon=epsilon)

    def block(self, x: str, cin: int, cout: int, **options: Any) -> str:
        """Conv, BatchNorm, Relu."""
        mean = options.get("offset", 0.0)
        return self.add("Relu", self.batch_norm(self.conv(x, cin, cout, **options), cout, mean=mean))

    def model(self, shape: Sequence[Any], *outputs: str, opset: int = 17) -> ModelProto:
        """The finished model with the input `x`."""
        dtype = _TYPES[self.dtype][1]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", dtype, list(shape))],
            [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def residual(net: Net) -> ModelProto:
    x = net.block("x", 3, 8)
    y = net.batch_norm(net.conv(net.block(x, 8, 8), 8, 8), 8)
    return net.model((1, 3, 12, 12), net.add("Relu", net.add("Add", x, y)))


def grouped(net: Net) -> ModelProto:
    x = net.block("x", 4, 8, k=1)
    x = net.block(x, 8, 8, group=4, bias=True)
    return net.model((1, 4, 10, 10), net.batch_norm(net.conv(x, 8, 8, group=2), 8))


def depthwise(net: Net) -> ModelProto:
    x = net.block("x", 3, 8, strides=[2, 2])
    x = net.block(x, 8, 8, group=8)
    return net.model((1, 3, 14, 14), net.batch_norm(net.conv(x, 8, 12, k=1), 12))


def transposed(net: Net) -> ModelProto:
    x = net.block("x", 4, 4, transposed=True, strides=[2, 2], bias=True)
    return net.model((1, 4, 6, 6), net.batch_norm(net.conv(x, 4, 4, group=2, transposed=True), 4))


def one_dimensional(net: Net) -> ModelProto:
    x = net.block("x", 4, 8, dims=1, k=5, dilations=[2], pads=[4, 4])
    return net.model((1, 4, 40), net.batch_norm(net.conv(x, 8, 8, dims=1, k=1), 8))


def three_dimensional(net: Net) -> ModelProto:
    return net.model((1, 2, 5, 6, 7), net.block(net.block("x", 2, 4, dims=3), 4, 4, dims=3, bias=True))


def recurrent(net: Net) -> ModelProto:
    x = net.block("x", 4, 6, dims=1)
    x = net.add("Transpose", x, perm=[2, 0, 1])
    weights = [net.constant(net.rng.standard_normal(shape) * 0.4) for shape in ((1, 20, 6), (1, 20, 5), (1, 40))]
    x = net.add("LSTM", x, *weights, hidden_size=5)
    x = net.add("Squeeze", x, net.constant([1], np.int64))
    x = net.add("MatMul", x, net.constant(net.rng.standard_normal((5, 7))))
    return net.model((1, 4, 16), net.add("Add", x, net.constant(net.rng.standard_normal(7))))


def attention(net: Net) -> ModelProto:
    x = net.block("x", 4, 16, dims=1)
    x = net.add("Transpose", x, perm=[0, 2, 1])
    q, k, v = (net.add("MatMul", x, net.constant(net.rng.standard_normal((16, 16)) * 0.25)) for _ in range(3))
    scores = net.add("Mul", net.add("MatMul", q, net.add("Transpose", k, perm=[0, 2, 1])), net.constant(0.25))
    x = net.add("Add", x, net.add("MatMul", net.add("Softmax", scores, axis=-1), v))
    scale, shift = net.constant(net.rng.uniform(0.5, 1.5, 16)), net.constant(net.rng.standard_normal(16))
    return net.model((1, 4, 12), net.add("LayerNormalization", x, scale, shift, axis=-1))


def several_outputs(net: Net) -> ModelProto:
    x = net.block("x", 3, 8)
    features = net.batch_norm(net.conv(x, 8, 8), 8)
    pooled = net.add("Flatten", net.add("GlobalAveragePool", net.block(x, 8, 10)))
    logits = net.add("Gemm", pooled, net.constant(net.rng.standard_normal((5, 10))), transB=1)
    return net.model((1, 3, 9, 9), features, logits, net.add("Softmax", logits))


def dynamic(net: Net) -> ModelProto:
    x = net.block("x", 3, 8, strides=[2, 2])
    return net.model(("N", 3, "H", "W"), net.batch_norm(net.conv(net.add("MaxPool", x, kernel_shape=[2, 2]), 8, 6), 6))


def deep(net: Net) -> ModelProto:
    """Forty layers without a shortcut: float32 noise is amplified on its way."""
    x = "x"
    for _ in range(40):
        x = net.block(x, 6, 6)
    return net.model((1, 6, 8, 8), x)


def cancelling(net: Net) -> ModelProto:
    """Means a thousand times the deviation: the original loses three digits, the fold loses fewer."""
    x = net.block("x", 3, 8, offset=1000.0)
    return net.model((1, 3, 10, 10), net.batch_norm(net.conv(x, 8, 8, offset=-300.0), 8, mean=-300.0))


NETS: list[Callable[[Net], ModelProto]] = [
    *(residual, grouped, depthwise, transposed, one_dimensional, three_dimensional),
    *(recurrent, attention, several_outputs, dynamic, deep, cancelling),
]
QUICK = {residual, grouped, transposed, several_outputs, cancelling}


# -- the fold, right and wrong


@dataclass
class Site:
    """A convolution and the BatchNorm that reads it, by name; and its new constants."""

    conv: str
    channels: int
    groups: int
    weight: str
    bias: str


def fold(model: ModelProto, *, wrong: str = "", at: int = -1) -> tuple[ModelProto, list[Site]]:
    """Fold every BatchNorm after a convolution that nothing else reads; one of them wrong in the way named."""
    model = copy.deepcopy(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    reads = Counter(name for node in graph.node for name in node.input) + Counter(v.name for v in graph.output)
    sites: list[Site] = []
    for node in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = makers.get(node.input[0])
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose") or reads[conv.output[0]] > 1:
            continue
        conv.name = conv.name or f"conv of {conv.output[0]}"
        is_wrong = len(sites) == at
        site = _fold_one(graph, constants, conv, node, wrong if is_wrong else "")
        conv.output[0] = node.output[0]
        graph.node.remove(node)
        sites.append(site)
    return model, sites


def _fold_one(graph: Any, constants: dict[str, TensorProto], conv: NodeProto, bn: NodeProto, wrong: str) -> Site:
    arrays = [numpy_helper.to_array(constants[name]) for name in [conv.input[1], *bn.input[1:5]]]
    dtype = arrays[0].dtype
    weight, scale, shift, mean, var = (array.astype(np.float64) for array in arrays)
    bias = np.zeros(len(scale))
    if len(conv.input) > 2 and conv.input[2]:
        bias = numpy_helper.to_array(constants[conv.input[2]]).astype(np.float64)
    epsilon = next((a.f for a in bn.attribute if a.name == "epsilon"), 1e-5)
    groups = next((a.i for a in conv.attribute if a.name == "group"), 1)
    factor = scale / np.sqrt(var + (epsilon * 10 if wrong == "wrong epsilon" else epsilon))
    if wrong == "variance for deviation":
        factor = scale / (var + epsilon)
    if wrong == "one channel off by 1 %":
        factor[len(factor) // 2] *= 1.01
    if wrong == "dropped bias":  # the convolution's; where it has none, the BatchNorm's
        bias, shift = (bias * 0, shift) if bias.any() else (bias, shift * 0)
    new_bias = (bias - mean) * factor + shift
    if wrong == "wrong group":
        factor = np.roll(factor, len(factor) // groups)
    transposed = conv.op_type == "ConvTranspose"
    if transposed:
        per_row = np.repeat(factor.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        per_row = per_row.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    else:
        per_row = factor.reshape(-1, *[1] * (weight.ndim - 1))
    if wrong == "wrong axis":
        per_row = np.resize(factor, weight.shape[1 - transposed])
        per_row = per_row.reshape(*([-1, 1] if transposed else [1, -1]), *[1] * (weight.ndim - 2))
    new_weight = weight if wrong == "stale weight" else weight * per_row
    site = Site(conv.name, len(factor), int(groups), f"{conv.name}.weight", f"{conv.name}.bias")
    graph.initializer.append(numpy_helper.from_array(new_weight.astype(dtype), site.weight))
    graph.initializer.append(numpy_helper.from_array(new_bias.astype(dtype), site.bias))
    del conv.input[1:]
    conv.input.extend([site.weight, site.bias])
    return site


IN_THE_FOLD = (
    "wrong epsilon",
    "variance for deviation",
    "wrong axis",
    "one channel off by 1 %",
    "dropped bias",
    "stale weight",
    "wrong group",
)


def in_the_graph(model: ModelProto, sites: list[Site], rng: np.random.Generator) -> Iterator[tuple[str, ModelProto]]:
    """Faults that are no matter of arithmetic, one model each."""
    constants = {tensor.name: index for index, tensor in enumerate(model.graph.initializer)}

    def broken() -> ModelProto:
        return copy.deepcopy(model)

    def pick(candidates: list[Any]) -> Any:
        return candidates[int(rng.integers(len(candidates)))] if candidates else None

    shapes = defaultdict(list)
    for site in sites:
        tensor = model.graph.initializer[constants[site.weight]]
        shapes[tuple(tensor.dims)].append(site)
    if alike := pick([group for group in shapes.values() if len(group) > 1]):
        other = broken()
        first, second = (other.graph.initializer[constants[site.weight]] for site in alike[:2])
        first.raw_data, second.raw_data = second.raw_data, first.raw_data
        yield "swapped constants", other
    relus = [index for index, node in enumerate(model.graph.node) if node.op_type == "Relu"]
    if (index := pick(relus)) is not None:
        other = broken()
        _bypass(other, index)
        yield "Relu lost", other
    others = [index for index, node in enumerate(model.graph.node) if node.op_type in ("Add", "Mul", "Softmax", "Sum")]
    if (index := pick(others)) is not None:
        other = broken()
        _bypass(other, index)
        yield "node removed", other
    rectified = {node.input[0] for node in model.graph.node if node.op_type == "Relu"}
    plain = {node.name for node in model.graph.node if node.output[0] not in rectified}
    if site := pick([site for site in sites if site.conv in plain]):
        other = broken()
        index = next(i for i, node in enumerate(other.graph.node) if node.name == site.conv)
        node = other.graph.node[index]
        inner = f"{node.output[0]}_inner"
        relu = helper.make_node("Relu", [inner], [node.output[0]], name="gained")
        node.output[0] = inner
        other.graph.node.insert(index + 1, relu)
        yield "Relu gained", other
    padded = [
        (i, j)
        for i, node in enumerate(model.graph.node)
        for j, attribute in enumerate(node.attribute)
        if attribute.name == "pads" and min(attribute.ints) > 0
    ]
    if place := pick(padded):
        other = broken()
        pads = other.graph.node[place[0]].attribute[place[1]].ints
        pads[0], pads[len(pads) // 2] = pads[0] + 1, pads[len(pads) // 2] - 1
        yield "off-by-one padding", other
    other = broken()
    old = other.graph.output[0].name
    for node in other.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = f"{old}_renamed"
    other.graph.output[0].name = f"{old}_renamed"
    yield "output renamed", other


def _bypass(model: ModelProto, index: int) -> None:
    """Take a node out; its readers read its first input instead."""
    node = model.graph.node[index]
    source, target = node.input[0], node.output[0]
    if target in {value.name for value in model.graph.output}:
        model.graph.node[index].CopyFrom(helper.make_node("Identity", [source], [target]))
        return
    del model.graph.node[index]
    for other in model.graph.node:
        for i, name in enumerate(other.input):
            if name == target:
                other.input[i] = source


# -- is it a fault?


def is_fault(before: ModelProto, after: ModelProto, roundoff: float) -> bool:
    """Whether the float64 functions differ by more than rounding, on inputs of seeds that the check does not use."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("before.onnx", "after.onnx")]
        for path, model in zip(paths, (before, after), strict=True):
            onnx.save(model, path)
        sets = list(_unseen_inputs(paths[0]))
        truth, *nudged = evaluate(paths[0], sets, [None, 11, 12])
        (broken,) = evaluate(paths[1], sets, [None])
    for index, right in enumerate(truth):
        assert not isinstance(right, Failure), right
        wrong = broken[index]
        if isinstance(wrong, Failure) or any(a.shape != b.shape for a, b in zip(right, wrong, strict=True)):
            return True
        for output, value in enumerate(right):
            spread = max(np.abs(other[index][output] - value).max() for other in nudged)  # type: ignore[index]
            allowed = BEYOND * (spread + roundoff * np.abs(value).max())
            if np.abs(wrong[output] - value).max() > allowed:
                return True
    return False


def _unseen_inputs(path: str) -> Iterator[dict[str, Any]]:
    from fuser.files import load

    specs = specs_of(load(path))
    sizes = {"N": 2, "H": 21, "W": 19}
    for spec in specs:
        for dim in spec.dims or []:
            if isinstance(dim, str):
                sizes.setdefault(dim, 1)
    for seed, kind in ((901, "normal"), (902, "unit"), (903, "negative")):
        made = generate(specs, sizes, kind, seed)
        yield {spec.name: value for spec, value in zip(specs, made.values, strict=True)}


# -- the count


@dataclass
class Count:
    """Faults injected and caught; right folds checked and refused; the ones that went wrong, by name."""

    workers: Workers
    injected: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    folds: int = 0
    alarms: int = 0
    below_rounding: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every fault was caught and no right fold refused."""
        return not self.failures

    def check(self, name: str, before: ModelProto, seed: int) -> None:
        """The right fold of one model, then every way to break it."""
        rng = np.random.default_rng(seed)
        after, sites = fold(before)
        if not sites:
            return
        self.folds += 1
        verdict = verify(before, after, workers=self.workers)
        if not verdict.passed:
            self.alarms += 1
            self.failures.append(f"false alarm: {name}: {verdict}")
        dtype = numpy_helper.to_array(next(t for t in after.graph.initializer if t.name == sites[0].weight)).dtype
        for kind in IN_THE_FOLD:
            at = int(rng.integers(len(sites)))
            if kind == "wrong group":
                at = next((i for i, site in enumerate(sites) if site.groups > 1), -1)
            if at >= 0:
                self._inject(name, kind, before, fold(before, wrong=kind, at=at)[0], unit_roundoff(dtype))
        for kind, broken in in_the_graph(after, sites, rng):
            self._inject(name, kind, before, broken, unit_roundoff(dtype))

    def _inject(self, name: str, kind: str, before: ModelProto, broken: ModelProto, roundoff: float) -> None:
        if kind != "output renamed" and not is_fault(before, broken, roundoff):
            self.below_rounding += 1
            return
        self.injected[kind] += 1
        verdict = verify(before, broken, workers=self.workers)
        if verdict.passed or verdict.verdict == "unverifiable":
            self.failures.append(f"missed: {kind} in {name}: {verdict}")
        else:
            self.caught[kind] += 1

    def table(self) -> str:
        """The counts, for a person."""
        lines = [f"{'fault':<26}{'injected':>9}{'caught':>9}"]
        lines += [f"{kind:<26}{number:>9}{self.caught[kind]:>9}" for kind, number in sorted(self.injected.items())]
        lines.append(f"{'all':<26}{self.injected.total():>9}{self.caught.total():>9}")
        lines.append(f"right folds: {self.folds}, false alarms: {self.alarms}")
        lines.append(f"changes below rounding, not counted as faults: {self.below_rounding}")
        return "\n".join([*lines, *self.failures])


def cases(quick: bool, models: Path | None) -> Iterator[tuple[str, ModelProto]]:
    """Every network in every type, and the real models."""
    for build in NETS:
        if quick and build not in QUICK:
            continue
        for dtype in _TYPES:
            if dtype == "bfloat16" and quick:
                continue
            yield f"{build.__name__} {dtype}", build(Net(dtype, seed=NETS.index(build)))
    if models and models.is_dir() and not quick:
        for path in sorted(models.glob("*.onnx")):
            yield path.name, frozen(onnx.load(path))


def frozen(model: ModelProto) -> ModelProto:
    """`model` with its constants taken from the list of inputs: one that a caller may replace must not be folded."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a fault was missed or a right fold refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a few networks, in two types")
    parser.add_argument("--models", type=Path, default=MODELS, help="a folder of further ONNX models")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    with Workers() as workers:
        count = Count(workers)
        for seed, (name, model) in enumerate(cases(options.quick, options.models)):
            count.check(name, model, seed)
            print(f"{name}: {count.injected.total()} faults, {len(count.failures)} failures", file=sys.stderr)
    print(count.table())
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if count.good else 1


if __name__ == "__main__":
    sys.exit(main())
