"""Random legal ONNX models over the vocabulary of fuser and around it.

`random_model(dice)` needs nothing but a `random.Random`, so a seed names a model, and hypothesis, which can stand in
for one, shrinks it.  Each node is computed in float64 as it is added: shapes are true by construction, what is not
legal is not added, and magnitudes stay where float32 rounding does not drown a fault.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.reference.op_run import OpRun

from fuser.proof.float64_onnx import Float64Evaluator
from fuser.proof.float64_ops import OPS
from fuser.proof.rounding import is_float

Array: TypeAlias = np.ndarray[Any, Any]

OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 20, 21, 22, 23)
BFLOAT16_SINCE = 22  # Conv takes it from there
FUNCTIONS_SINCE_IR = 8
LARGEST, MOST_ELEMENTS = 1e3, 20_000

STEMS = (
    "v layer.0/conv /block/Add_output_0 w_folded b_folded_2 x:0 größe 重み fuser.folded -1 1 a.b.c c.bias "
    "v_product conv.weight"
).split()


class CustomHalf(OpRun):
    """An operator that nobody but its own runtime knows: y = x / 2."""

    op_domain = "custom"

    def _run(self, x: Array) -> tuple[Array]:
        return (x / 2,)


CustomHalf.__name__ = "Half"


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the graph, and what it is in float64 for the first set of inputs."""

    name: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)


@dataclass
class Block:
    """A graph, a body or a function while it is being built.

    values: what nodes may read, those of outer scopes first.
    constants: by the values they hold, so that some are read more than once.
    """

    inner: bool = False
    function: bool = False
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    constants: list[Value] = field(default_factory=list)


@dataclass
class Sample:
    """A model, inputs for it, and what it is to be optimized with.

    model: as it is given to the optimizer; its nodes may be out of order.
    feeds: sets of inputs; the first fits by construction, others only where dynamic dimensions are free.
    """

    model: ModelProto
    feeds: list[dict[str, Array]]
    options: dict[str, Any]


def evaluator(proto: ModelProto | NodeProto, **options: Any) -> Float64Evaluator:
    """The float64 evaluator that knows the custom operator, too."""
    return Float64Evaluator(proto, new_ops=[*OPS, CustomHalf], **options)


def widened(feeds: dict[str, Array]) -> dict[str, Array]:
    return {name: a.astype(np.float64) if is_float(a.dtype) else a for name, a in feeds.items()}


def random_model(dice: random.Random) -> Sample:
    """A legal model; where the draft is none (an optional feature met the wrong opset), another draft."""
    while True:
        draft = _Draft(dice)
        sample = draft.sample()
        if sample is not None:
            return sample


class _Draft:
    """One model while it is being made."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.rng = np.random.default_rng(dice.randrange(2**32))
        self.opset = dice.choice(OPSETS)
        self.ir = dice.choice([3, 4, 7, 8, 8, 10, 10]) if self.opset < 15 else dice.choice([8, 9, 10])
        self.type = self._pick_type()
        self.dtype = np.dtype(helper.tensor_dtype_to_np_dtype(self.type))
        self.names: set[str] = set()
        self.functions: list[tuple[onnx.FunctionProto, list[Value]]] = []
        self.also_inputs: list[ValueInfoProto] = []
        self.formal = self.ir < 4
        self.depth = 0
        self.condition: Value | None = None

    def _pick_type(self) -> int:
        roll = self.dice.random()
        if roll < 0.4:
            return int(TensorProto.DOUBLE)
        if roll < 0.85:
            return int(TensorProto.FLOAT)
        return int(TensorProto.BFLOAT16 if self.opset >= BFLOAT16_SINCE and roll < 0.92 else TensorProto.FLOAT16)

    # -- the whole

    def sample(self) -> Sample | None:
        main = Block()
        rank = self.dice.choice([2, 2, 3, 4, 4, 4, 5])
        x = self._input(
            main, "x", [self.dice.randint(1, 3), self._size(), *(self._size() + 2 for _ in range(rank - 2))]
        )
        if self.dice.random() < 0.2:
            self._input(main, "x2", list(x.shape))
        if self.dice.random() < 0.25:
            self.condition = Value("cond", np.array(self.dice.random() < 0.5))
        self._grow(main, self.dice.choice([3, 6, 10, 15, 25]))
        outputs = self._outputs(main)
        if not outputs:
            return None
        model, dynamic = self._assemble(main, outputs)
        feeds = [self._feed(main, model, {})]
        if dynamic:
            feeds.append(self._feed(main, model, dict.fromkeys(dynamic, self.dice.randint(1, 7))))
        if not self._is_legal(model, feeds[0]):
            return None
        return Sample(model, feeds, self._options())

    def _options(self) -> dict[str, Any]:
        if self.dice.random() < 0.6:
            return {}
        options: dict[str, Any] = {"freeze_inputs": self.dice.random() < 0.5}
        names = [
            "fold-constants",
            "eliminate-identity",
            "fold-batch-norm",
            "fold-affine",
            "fold-layer-norm",
            "fold-pad",
            "merge-branches",
            "merge-linears",
            "merge-bias",
            "merge-concats",
            "merge-slices",
            "eliminate-movements",
            "eliminate-dead-code",
        ]
        if self.dice.random() < 0.5:
            options["passes"] = self.dice.sample(names, self.dice.randint(1, len(names)))
        if self.dice.random() < 0.3:
            options["shared_weights"] = "refuse"
        return options

    def _is_legal(self, model: ModelProto, feeds: dict[str, Array]) -> bool:
        try:
            onnx.checker.check_model(ordered(model), full_check=True)
            with np.errstate(all="ignore"):
                found = evaluator(ordered(model)).run(None, widened(feeds))
        except Exception:
            return False
        return all(np.isfinite(y).all() and np.abs(y).max(initial=0) < LARGEST for y in found)

    def _outputs(self, main: Block) -> list[Value]:
        made = {name for node in main.nodes for name in node.output}
        found = [v for v in main.values if v.name in made]
        if not found:
            return []
        chosen = [found[-1]]
        for _ in range(self.dice.choice([0, 0, 0, 1, 1, 3])):
            other = self.dice.choice(found)
            if all(other is not one for one in chosen):
                chosen.append(other)
        if len(chosen) > 1 and self.dice.random() < 0.3:
            chosen.reverse()
        return chosen

    def _assemble(self, main: Block, outputs: Sequence[Value]) -> tuple[ModelProto, set[str]]:
        dynamic = {d for d in ("N", "H") if self.dice.random() < 0.3}
        inputs = []
        for v in main.values[:2]:
            if v.name in ("x", "x2"):
                dims: list[int | str] = list(v.shape)
                if "N" in dynamic:
                    dims[0] = "N"
                if "H" in dynamic and len(dims) > 2:
                    dims[2] = "H"
                inputs.append(helper.make_tensor_value_info(v.name, self.type, dims))
        if self.condition is not None:
            inputs.append(helper.make_tensor_value_info("cond", TensorProto.BOOL, []))
        position = self.dice.choice([0, len(inputs)])
        inputs[position:position] = self.also_inputs
        results = [
            helper.make_tensor_value_info(v.name, self.type, [None] * v.array.ndim if dynamic else list(v.shape))
            for v in outputs
        ]
        nodes = list(main.nodes)
        if self.dice.random() < 0.05:
            self.dice.shuffle(nodes)
        graph = helper.make_graph(nodes, self.dice.choice(["g", "", "main graph"]), inputs, results, main.initializers)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("custom", 1)]
        model = helper.make_model(
            graph, opset_imports=imports, ir_version=self.ir, functions=[f for f, _ in self.functions]
        )
        self._annotate(model)
        return model, dynamic

    def _annotate(self, model: ModelProto) -> None:
        """Metadata, documentation, and value_info: all, some or none."""
        dice = self.dice
        if dice.random() < 0.3:
            model.metadata_props.add(key="owner", value="me")
            model.graph.doc_string = "a graph"
        for node in model.graph.node:
            if dice.random() < 0.1:
                node.doc_string = "a node"
            if self.ir >= 10 and dice.random() < 0.1:
                node.metadata_props.add(key="namespace", value="a/b")
        if dice.random() < 0.5:
            inferred = onnx.shape_inference.infer_shapes(ordered(model)).graph.value_info
            known = {info.name for info in model.graph.value_info}
            share = dice.choice([0.5, 1.0])
            model.graph.value_info.extend(i for i in inferred if i.name not in known and dice.random() < share)

    def _feed(self, main: Block, model: ModelProto, sizes: dict[str, int]) -> dict[str, Array]:
        feeds: dict[str, Array] = {}
        firsts = {v.name: v.array for v in main.values}
        for info in model.graph.input:
            if info.name == "cond":
                feeds["cond"] = np.array(self.condition is not None and bool(self.condition.array) != bool(sizes))
            elif info.name in ("x", "x2"):
                dims = [
                    sizes.get(d.dim_param, n)
                    for d, n in zip(info.type.tensor_type.shape.dim, firsts[info.name].shape, strict=True)
                ]
                array = firsts[info.name] if not sizes else self.rng.standard_normal(dims)
                feeds[info.name] = array.astype(self.dtype)
        return feeds

    # -- names and values

    def _size(self) -> int:
        return self.dice.choice([1, 2, 3, 4, 4, 4, 6])

    def _name(self) -> str:
        """A name that is free, from stems that are as odd as the format allows."""
        stem = self.dice.choice(STEMS) if self.dice.random() < 0.3 else "v"
        name, number = stem, 0
        while name in self.names or (stem == "v" and not number):
            number = number + 1 if number else len(self.names) + 1
            name = f"{stem}{number}"
        self.names.add(name)
        return name

    def _node_name(self, op: str) -> str:
        roll = self.dice.random()
        if roll < 0.15:
            return ""
        if roll < 0.3:
            return self.dice.choice(["same", "/a/b", "node_folded"])
        return f"{op}_{len(self.names)}"

    def _input(self, main: Block, name: str, shape: list[int]) -> Value:
        self.names.add(name)
        array = self.rng.standard_normal(shape).astype(self.dtype).astype(np.float64)
        main.values.append(Value(name, array))
        return main.values[-1]

    def _emit(
        self, block: Block, op: str, inputs: Sequence[Value | None], *, extra: Sequence[str] = (), **attributes: Any
    ) -> Value | None:
        """A node and its first output; None, and no node, where its result is not a sound one."""
        domain = attributes.pop("domain", "")
        declared = extra
        node = helper.make_node(
            op,
            [v.name if v is not None else "" for v in inputs],
            [self._name(), *declared],
            name=self._node_name(op),
            domain=domain,
            **attributes,
        )
        feeds = {v.name: v.array for v in inputs if v is not None}
        try:
            with np.errstate(all="ignore"):
                y = np.asarray(evaluator(node, opsets={"": self.opset, "custom": 1}).run([node.output[0]], feeds)[0])
        except Exception:
            return None
        return self._accept(block, node, y)

    def _accept(self, block: Block, node: NodeProto, y: Array) -> Value | None:
        if not 0 < y.size <= MOST_ELEMENTS or y.ndim > 6:
            return None
        if y.dtype.kind == "f" and not (np.isfinite(y).all() and np.abs(y).max() < LARGEST):
            return None
        block.nodes.append(node)
        return Value(node.output[0], y)

    # -- constants

    def _constant(self, block: Block, array: Array) -> Value:
        """A constant of the model's type, in one of the many ways to write one."""
        stored = array.astype(self.dtype)
        wide = stored.astype(np.float64)
        shared = [c for c in block.constants if c.shape == wide.shape]
        if shared and self.dice.random() < 0.15:
            return self.dice.choice(shared)
        ways: list[Callable[[Block, Array], Value | None]] = [self._as_initializer] * 6
        ways += [self._as_node, self._as_node, self._behind_identity, self._as_sum, self._as_cast, self._expanded]
        value = self.dice.choice(ways)(block, stored) or self._as_initializer(block, stored)
        block.constants.append(value)
        return value

    def _as_initializer(self, block: Block, stored: Array) -> Value:
        if block.function:
            value = self._as_node(block, stored)
            assert value is not None
            return value
        name = self._name()
        tensor = numpy_helper.from_array(stored, name)
        if stored.dtype.kind == "f" and self.dice.random() < 0.2 and tensor.data_type != TensorProto.FLOAT16:
            tensor = helper.make_tensor(name, tensor.data_type, stored.shape, stored.reshape(-1).tolist())
        block.initializers.append(tensor)
        if not block.inner and (self.formal or self.dice.random() < 0.03):
            self.also_inputs.append(helper.make_tensor_value_info(name, tensor.data_type, list(stored.shape)))
        return Value(name, stored.astype(np.float64) if is_float(stored.dtype) else stored)

    def _as_node(self, block: Block, stored: Array) -> Value | None:
        short = self.opset >= 12 and stored.size > 0 and stored.ndim < 2  # of a list without elements no type is told
        attributes: dict[str, Any] = {"value": numpy_helper.from_array(stored, self.dice.choice(["", "value", "x"]))}
        if short and stored.dtype == np.float32 and self.dice.random() < 0.7:
            attributes = {"value_floats": stored.tolist()} if stored.ndim else {"value_float": float(stored)}
        if short and stored.dtype == np.int64 and self.dice.random() < 0.7:
            attributes = {"value_ints": stored.tolist()} if stored.ndim else {"value_int": int(stored)}
        node = helper.make_node("Constant", [], [self._name()], name=self._node_name("Constant"), **attributes)
        block.nodes.append(node)
        return Value(node.output[0], stored.astype(np.float64) if is_float(stored.dtype) else stored)

    def _behind_identity(self, block: Block, stored: Array) -> Value | None:
        return self._emit(block, "Identity", [self._as_initializer(block, stored)])

    def _as_sum(self, block: Block, stored: Array) -> Value | None:
        half = (stored.astype(np.float64) / 2).astype(self.dtype)
        term = self._as_initializer(block, half)
        return self._emit(block, "Add", [term, term])

    def _as_cast(self, block: Block, stored: Array) -> Value | None:
        kind = self.dice.choice([np.float32, np.float64])
        return self._emit(block, "Cast", [self._as_initializer(block, stored.astype(kind))], to=self.type)

    def _expanded(self, block: Block, stored: Array) -> Value | None:
        """One number for all elements; ConstantOfShape, or Expand of what CastLike makes, as torch exports it."""
        if self.opset < 9 or not stored.ndim:
            return None
        shape = self._integers(block, list(stored.shape))
        number = float(stored.reshape(-1)[0])
        if self.dice.random() < 0.5 or self.opset < 15 or not block.values:
            tensor = helper.make_tensor("", self.type, [1], [number])
            return self._emit(block, "ConstantOfShape", [shape], value=tensor)
        scalar = self._as_initializer(block, np.asarray(number, np.float64))
        like = self.dice.choice(block.values)
        cast = self._emit(block, "CastLike", [scalar, like])
        return None if cast is None else self._emit(block, "Expand", [cast, shape])

    def _integers(self, block: Block, numbers: Sequence[int]) -> Value:
        array = np.asarray(numbers, np.int64)
        if self.dice.random() < 0.3:
            return self._as_node(block, array) or self._as_initializer(block, array)
        return self._as_initializer(block, array)

    def _weight(self, block: Block, shape: Sequence[int], fan_in: int, *, axis: int = 0) -> Value:
        array = self.rng.standard_normal(shape) / math.sqrt(max(fan_in, 1))
        if self.opset >= 13 and self.type == TensorProto.FLOAT and self.dice.random() < 0.1:
            quantized = self._quantized(block, array, axis)
            if quantized is not None:
                return quantized
        return self._constant(block, array)

    def _quantized(self, block: Block, array: Array, axis: int) -> Value | None:
        per_channel = self.dice.random() < 0.6
        scale = self.rng.uniform(0.01, 0.03, array.shape[axis] if per_channel else ()).astype(np.float32)
        along = scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)]) if per_channel else scale
        stored = np.clip(np.round(array / along), -127, 127).astype(np.int8)
        inputs = [self._as_initializer(block, stored), self._as_initializer(block, scale)]
        if self.dice.random() < 0.5:
            inputs.append(self._as_initializer(block, np.zeros(scale.shape, np.int8)))
        return self._emit(block, "DequantizeLinear", inputs, axis=axis)

    def _numbers(self, shape: Sequence[int]) -> Array:
        """Away from zero, so that dividing is harmless."""
        numbers: Array = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice([-1.0, 1.0, 1.0], shape)
        return numbers

    # -- growing

    def _grow(self, block: Block, steps: int) -> None:
        moves: list[tuple[Callable[[Block, Value], Value | None], int]] = [
            (self._conv, 6),
            (self._conv_transpose, 2),
            (self._gemm, 3),
            (self._matmul, 3),
            (self._batch_norm, 8),
            (self._layer_norm, 2),
            (self._pair, 3),
            (self._arithmetic, 8),
            (self._sum, 4),
            (self._branches, 3),
            (self._adapter, 2),
            (self._reshape, 4),
            (self._transpose, 2),
            (self._slice, 2),
            (self._chain, 3),
            (self._concat, 3),
            (self._average, 3),
            (self._padded, 4),
            (self._maximum, 1),
            (self._resize, 2),
            (self._hand_on, 4),
            (self._activation, 3),
            (self._dead, 1),
            (self._custom, 1 if not block.function else 0),
            (self._split, 1),
            (self._if, 2 if not block.function else 0),
            (self._loop, 1 if not block.function else 0),
            (self._call, 2 if not block.inner and not block.function else 0),
        ]
        functions, weights = [f for f, _ in moves], [w for _, w in moves]
        for _ in range(steps):
            source = block.values[-1] if self.dice.random() < 0.75 else self.dice.choice(block.values)
            made = self.dice.choices(functions, weights)[0](block, source)
            if made is not None:
                block.values.append(made)

    def _conv(self, block: Block, x: Value) -> Value | None:
        if x.array.ndim < 3:
            return None
        channels = x.shape[1]
        groups = self.dice.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
        kernel = [self.dice.choice([1, 1, 2, 3]) for _ in x.shape[2:]]
        out = groups * self.dice.choice([1, 2, 3]) if groups > 1 else self._size()
        weight = self._weight(block, [out, channels // groups, *kernel], channels // groups * math.prod(kernel))
        return self._emit(
            block, "Conv", [x, weight, *self._bias(block, out)], **self._window(kernel, groups, transposed=False)
        )

    def _conv_transpose(self, block: Block, x: Value) -> Value | None:
        if x.array.ndim < 3:
            return None
        channels = x.shape[1]
        groups = self.dice.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
        kernel = [self.dice.choice([1, 2, 3]) for _ in x.shape[2:]]
        per_group = self.dice.choice([1, 2, max(channels // groups, 1)])
        weight = self._weight(block, [channels, per_group, *kernel], channels // groups, axis=1)
        attributes = self._window(kernel, groups, transposed=True)
        return self._emit(block, "ConvTranspose", [x, weight, *self._bias(block, groups * per_group)], **attributes)

    def _bias(self, block: Block, size: int) -> list[Value | None]:
        roll = self.dice.random()
        if roll < 0.5:
            return [self._constant(block, self.rng.standard_normal(size))]
        return [None] if roll < 0.65 else []

    def _window(self, kernel: Sequence[int], groups: int, *, transposed: bool) -> dict[str, Any]:
        rank = len(kernel)
        attributes: dict[str, Any] = {}
        if groups > 1 or self.dice.random() < 0.3:
            attributes["group"] = groups
        if self.dice.random() < 0.5:
            attributes["kernel_shape"] = list(kernel)
        if self.dice.random() < 0.3:
            attributes["strides"] = [self.dice.choice([1, 2]) for _ in kernel]
        if self.dice.random() < 0.2:
            attributes["dilations"] = [self.dice.choice([1, 2]) for _ in kernel]
        roll = self.dice.random()
        if roll < 0.4:
            attributes["pads"] = [self.dice.choice([0, 1, 1]) for _ in range(2 * rank)]
        elif roll < 0.5:
            attributes["auto_pad"] = self.dice.choice(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
            if "SAME" in attributes["auto_pad"]:
                attributes.pop("dilations", None)
        if transposed and self.dice.random() < 0.15 and "strides" in attributes:
            attributes["output_padding"] = [s - 1 for s in attributes["strides"]]
        return attributes

    def _gemm(self, block: Block, x: Value) -> Value | None:
        flat: Value | None = x
        if x.array.ndim != 2:
            flat = self._emit(block, "Flatten", [x])
        if flat is None:
            return None
        attributes: dict[str, Any] = {}
        if self.dice.random() < 0.15:
            attributes["transA"] = 1
        rows, inner = flat.shape[::-1] if "transA" in attributes else flat.shape
        columns = self._size()
        shape = [inner, columns]
        if self.dice.random() < 0.5:
            attributes["transB"], shape = 1, [columns, inner]
        for name in ("alpha", "beta"):
            if self.dice.random() < 0.25:
                attributes[name] = self.dice.choice([0.5, 2.0, -1.5, 0.0] if name == "beta" else [0.5, 2.0, -1.5])
        inputs: list[Value | None] = [flat, self._weight(block, shape, inner, axis=len(shape) - 1)]
        shapes = [None, (), (1,), (columns,), (columns,), (1, columns), (rows, columns), (rows, 1), (1, 1)]
        chosen = self.dice.choice(shapes)
        if chosen is not None:
            inputs.append(self._constant(block, self.rng.standard_normal(chosen)))
        elif self.opset >= 11 and self.dice.random() < 0.3:
            inputs.append(None)
        elif self.opset < 11:
            inputs.append(self._constant(block, self.rng.standard_normal(columns)))
        return self._emit(block, "Gemm", inputs, **attributes)

    def _matmul(self, block: Block, x: Value) -> Value | None:
        if x.array.ndim < 2:
            return None
        columns = self._size()
        if self.dice.random() < 0.1:  # the weight from the left
            weight = self._weight(block, [columns, x.shape[-2]], x.shape[-2])
            return self._emit(block, "MatMul", [weight, x])
        y = self._emit(block, "MatMul", [x, self._weight(block, [x.shape[-1], columns], x.shape[-1], axis=1)])
        if y is None or self.dice.random() < 0.4:
            return y
        if self.dice.random() < 0.15:
            block.values.append(y)  # somebody else may read the product
        shape = self.dice.choice([(columns,), (columns,), (1,), (), (1, columns)])
        operands = [y, self._constant(block, self.rng.standard_normal(shape))]
        if self.dice.random() < 0.4:
            operands.reverse()
        return self._emit(block, "Add", operands)

    def _layer_norm(self, block: Block, x: Value) -> Value | None:
        """A normalization of the last axes, mostly read by a product with a bias."""
        if self.opset < 17 or x.array.ndim < 2:
            return None
        axis = self.dice.choice([-1, -1, -1, x.array.ndim - 1, x.array.ndim - 1, 1])
        operands: list[Value | None] = [x, self._constant(block, self._numbers(x.shape[axis:]))]
        if self.dice.random() < 0.8:
            operands.append(self._constant(block, self.rng.standard_normal(x.shape[axis:]).astype(np.float64)))
        y = self._emit(block, "LayerNormalization", operands, axis=axis, epsilon=0.1)
        if y is None or self.dice.random() < 0.2:
            return y
        if self.dice.random() < 0.2:
            block.values.append(y)
        return self._matmul(block, y)

    def _pair(self, block: Block, x: Value) -> Value | None:
        """Two linear operators, one after the other."""
        makers: list[Callable[[Block, Value], Value | None]] = [self._matmul, self._gemm]
        if x.array.ndim > 2:
            makers = [self._matmul, self._pointwise, self._pointwise, self._conv, self._conv_transpose]
        for _ in range(2):
            y = self.dice.choice(makers)(block, x)
            if y is None:
                return None
            x = y
        return x

    def _pointwise(self, block: Block, x: Value) -> Value | None:
        groups = self.dice.choice([g for g in (1, 1, 2) if x.shape[1] % g == 0])
        out = groups * self.dice.choice([1, 2, 4])
        weight = self._weight(block, [out, x.shape[1] // groups, *[1] * (x.array.ndim - 2)], x.shape[1] // groups)
        return self._emit(block, "Conv", [x, weight, *self._bias(block, out)], group=groups)

    def _batch_norm(self, block: Block, x: Value) -> Value | None:
        if x.array.ndim < 2:
            return None
        shape: tuple[int, ...] = x.shape[1:2]
        attributes: dict[str, Any] = {}
        extra: list[str] = []
        roll = self.dice.random()
        if roll < 0.15:
            attributes["epsilon"] = self.dice.choice([0.0, 0.1, 1e-3])
        if self.opset < 9 and self.dice.random() < 0.3:
            attributes["spatial"] = self.dice.choice([0, 1])
            if not attributes["spatial"]:
                shape = x.shape[1:]
        roll = self.dice.random()
        if roll < 0.1 and self.opset >= 9:
            if self.opset >= 14:
                attributes["training_mode"] = 1
                extra = [self._name(), self._name()]
            else:
                extra = [self._name() for _ in range(4)] if roll < 0.05 else [""] * self.dice.choice([2, 4])
        parameters = [
            self._constant(block, self._numbers(shape)),
            self._constant(block, self.rng.standard_normal(shape)),
            self._constant(block, self.rng.standard_normal(shape)),
            self._constant(block, self.rng.uniform(0.5, 2, shape)),
        ]
        if min(parameters[3].array.reshape(-1)) < 0.2:  # a shared constant that is no variance
            parameters[3] = self._as_initializer(block, self.rng.uniform(0.5, 2, shape).astype(self.dtype))
        return self._emit(block, "BatchNormalization", [x, *parameters], extra=extra, **attributes)

    def _arithmetic(self, block: Block, x: Value) -> Value | None:
        rank = x.array.ndim
        axis = self.dice.randrange(rank) if rank and self.dice.random() < 0.4 else min(1, rank - 1)
        shapes: list[tuple[int, ...]] = [(), (1,), (1,) * rank, (1,) * (rank + 1), x.shape]
        if rank:
            one = tuple(n if i == axis else 1 for i, n in enumerate(x.shape))
            shapes += [one, one, one[axis:], one[axis:], one[axis:], x.shape[-1:], (2, *[1] * rank)]
            if x.shape[0] == 1:
                shapes.append((3, *one[1:]))  # the result is larger than the operand
        c = self._constant(block, self._numbers(self.dice.choice(shapes)))
        op = self.dice.choice(["Add", "Sub", "Mul", "Div"])
        operands = [x, c]
        if self.dice.random() < 0.35 and (op != "Div" or np.abs(x.array).min() > 0.3):
            operands.reverse()
        if operands[1] is c and op == "Div" and np.abs(c.array).min() < 0.2:
            op = "Mul"
        return self._emit(block, op, operands)

    def _sum(self, block: Block, x: Value) -> Value | None:
        others = [v for v in block.values if v.shape == x.shape] + [
            v for v in block.values if v.array.ndim == x.array.ndim and 1 in v.shape
        ]
        op = self.dice.choice(["Add", "Add", "Sub", "Mul"])
        return self._emit(block, op, [x, self.dice.choice(others or [x])])

    def _branches(self, block: Block, x: Value) -> Value | None:
        """Parallel linear branches of one input, as in RepVGG."""
        if x.array.ndim < 3:
            return None
        channels = x.shape[1]
        groups = self.dice.choice([g for g in (1, 1, channels) if channels % g == 0])
        out = self.dice.choice([channels, channels, groups * 2])
        stride = self.dice.choice([1, 1, 2])
        made: list[Value | None] = []
        for kernel in self.dice.sample([1, 3, 3, 2], self.dice.choice([1, 2, 3])):
            y = self._branch(block, x, kernel, out, groups, stride)
            if y is not None and self.dice.random() < 0.5:
                y = self._batch_norm(block, y) or y
            made.append(y)
        if self.dice.random() < 0.6:
            made.append(self._batch_norm(block, x) if self.dice.random() < 0.5 else x)
        return self._all_joined(block, made)

    def _branch(self, block: Block, x: Value, kernel: int, out: int, groups: int, stride: int) -> Value | None:
        """A convolution, sometimes with a pointwise one, or an average, before it."""
        axes = x.array.ndim - 2
        if self.dice.random() < 0.3:
            first = self._pointwise if self.dice.random() < 0.7 else self._average
            x, groups = first(block, x) or x, 1
            if x.array.ndim != axes + 2:
                return None
        channels = x.shape[1]
        weight = self._weight(block, [out, channels // groups, *[kernel] * axes], channels)
        operands = [x, weight, *(self._bias(block, out) if self.dice.random() < 0.6 else [])]
        pads, strides = [kernel // 2] * (2 * axes), [stride] * axes
        return self._emit(block, "Conv", operands, group=groups, pads=pads, strides=strides)

    def _adapter(self, block: Block, x: Value) -> Value | None:
        """A matrix product, and beside it two of low rank."""
        if not x.array.ndim or not x.shape[-1]:
            return None
        rows, low, out = x.shape[-1], self.dice.choice([1, 2]), self.dice.choice([x.shape[-1], 4])
        down, up = self._weight(block, [rows, low], rows), self._weight(block, [low, out], low)
        thin = self._emit(block, "MatMul", [x, down])
        wide = thin and self._emit(block, "MatMul", [thin, up])
        if wide is not None and self.dice.random() < 0.5:
            wide = self._arithmetic(block, wide) or wide
        return self._all_joined(block, [self._emit(block, "MatMul", [x, self._weight(block, [rows, out], rows)]), wide])

    def _all_joined(self, block: Block, made: Sequence[Value | None]) -> Value | None:
        """The sum of all, by one node or by several."""
        values = [value for value in made if value is not None]
        if len({value.shape for value in values}) == 1 and self.dice.random() < 0.4:
            return self._emit(block, "Sum", list(values))
        total: Value | None = None
        for value in values:
            total = self._joined(block, total, value)
        return total

    def _joined(self, block: Block, a: Value | None, b: Value | None) -> Value | None:
        if a is None or b is None or a.shape != b.shape:
            return a or b
        operands = [a, b] if self.dice.random() < 0.5 else [b, a]
        return self._emit(block, self.dice.choice(["Add", "Add", "Sub"]), operands)

    def _reshape(self, block: Block, x: Value) -> Value | None:
        kind, rank = (
            self.dice.choice(["reshape", "reshape", "flatten", "squeeze", "unsqueeze", "computed"]),
            x.array.ndim,
        )
        if kind == "flatten":
            low = -rank if self.opset >= 11 else 0
            return self._emit(block, "Flatten", [x], axis=self.dice.randint(low, rank))
        if kind == "squeeze":
            axes = [i for i, n in enumerate(x.shape) if n == 1]
            return self._with_axes(block, "Squeeze", x, axes, since=13) if axes else None
        if kind == "unsqueeze":
            return self._with_axes(block, "Unsqueeze", x, [self.dice.randint(0, rank)], since=13)
        target = self._target(x.shape)
        if kind == "computed" and self.opset >= 11 and rank > 1:
            shape = self._emit(block, "Shape", [x])
            first = shape and self._emit(block, "Gather", [shape, self._integers(block, [0])])
            rest = self._integers(block, [-1])
            joined = first and self._emit(block, "Concat", [first, rest], axis=0)
            return self._emit(block, "Reshape", [x, joined]) if joined else None
        attributes: dict[str, Any] = (
            {"allowzero": self.dice.choice([0, 1])} if self.opset >= 14 and self.dice.random() < 0.1 else {}
        )
        return self._emit(block, "Reshape", [x, self._integers(block, target)], **attributes)

    def _target(self, shape: tuple[int, ...]) -> list[int]:
        """Another shape of as many elements: axes merged, split, kept with 0, inferred with -1."""
        target = list(shape)
        for _ in range(self.dice.randint(1, 3)):
            roll = self.dice.random()
            if roll < 0.4 and len(target) > 1:
                i = self.dice.randrange(len(target) - 1)
                target[i : i + 2] = [target[i] * target[i + 1]]
            elif target and len(target) < 5:
                i = self.dice.randrange(len(target))
                factor = self.dice.choice([f for f in (1, 2, 3, 4) if target[i] % f == 0])
                target[i : i + 1] = [factor, target[i] // factor]
        if target and self.dice.random() < 0.4:
            target[self.dice.randrange(len(target))] = -1
        if target and target[:1] == list(shape[:1]) and self.dice.random() < 0.4:
            target[0] = 0
        return target

    def _with_axes(self, block: Block, op: str, x: Value, axes: list[int], *, since: int, **more: Any) -> Value | None:
        """An operator whose axes were an attribute before opset `since`, and are an input from there on."""
        if self.opset >= 11 and self.dice.random() < 0.2 and op != "Unsqueeze":
            axes = [axis - x.array.ndim for axis in axes]
        if self.opset >= since:
            return self._emit(block, op, [x, self._integers(block, axes)], **more)
        return self._emit(block, op, [x], axes=axes, **more)

    def _transpose(self, block: Block, x: Value) -> Value | None:
        if not x.array.ndim or self.dice.random() < 0.2:
            return self._emit(block, "Transpose", [x])
        return self._emit(block, "Transpose", [x], perm=self.dice.sample(range(x.array.ndim), x.array.ndim))

    def _slice(self, block: Block, x: Value) -> Value | None:
        """Of some axes, from either end; backwards and with gaps, too, since opset 10."""
        rank, dice = x.array.ndim, self.dice
        if not rank:
            return None
        axes = dice.sample(range(rank), dice.randint(1, min(rank, 2)))
        starts = [dice.choice([0, 0, 1, 2, -2, -n]) for n in (x.shape[axis] for axis in axes)]
        ends = [dice.choice([2**63 - 1, 2**31 - 1, 2, 5, x.shape[axis], -1]) for axis in axes]
        steps = [dice.choice([1, 1, 1, 2]) if self.opset >= 10 else 1 for _ in axes]
        if self.opset >= 10 and dice.random() < 0.1:
            starts[0], ends[0], steps[0] = -1, -(2**63) + 1, -1
        if dice.random() < 0.3:
            axes = [axis - rank for axis in axes]
        if self.opset < 10:
            return self._emit(block, "Slice", [x], starts=starts, ends=ends, axes=axes)
        operands = [starts, ends, axes, *([steps] if max(steps) > 1 or min(steps) < 0 else [])]
        return self._emit(block, "Slice", [x, *(self._integers(block, numbers) for numbers in operands)])

    def _chain(self, block: Block, x: Value) -> Value | None:
        """What one operator could do as well: movements, slices and concatenations in a row; a product of rows."""
        move = self.dice.choice([self._transpose, self._slice, self._reshape, self._reshape, self._concat])
        if self.dice.random() < 0.3:
            moves = [self._reshape, self._matmul, self._reshape]
        else:
            moves = [self.dice.choice([move, move, move, self._transpose]) for _ in range(self.dice.choice([2, 2, 3]))]
        for one in moves:
            y = one(block, x)
            if y is None:
                return None
            if self.dice.random() < 0.1:
                block.values.append(y)  # somebody else may read it
            x = y
        return x

    def _concat(self, block: Block, x: Value) -> Value | None:
        if not x.array.ndim:
            return None
        axis = self.dice.choice([min(1, x.array.ndim - 1), self.dice.randrange(x.array.ndim)])
        rest = (*x.shape[:axis], *x.shape[axis + 1 :])
        others = [
            v for v in block.values if v.array.ndim == x.array.ndim and (*v.shape[:axis], *v.shape[axis + 1 :]) == rest
        ]
        parts = [x, *(self.dice.choice(others or [x]) for _ in range(self.dice.choice([0, 1, 1, 2])))]
        if self.dice.random() < 0.5:
            parts = [self._batch_norm(block, v) or v if self.dice.random() < 0.3 else v for v in parts]
        if self.dice.random() < 0.15:
            parts.append(self._constant(block, self.rng.standard_normal(x.shape)))
        self.dice.shuffle(parts)
        negative = self.opset >= 11 and self.dice.random() < 0.2
        return self._emit(block, "Concat", parts, axis=axis - x.array.ndim if negative else axis)

    def _padded(self, block: Block, x: Value) -> Value | None:
        """A Pad, mostly with something behind it that could pad by itself."""
        rank = x.array.ndim
        if rank < 3:
            return None
        if self.dice.random() < 0.3:
            x = self._emit(block, "Relu", [x]) or x
        y = self._pad(block, x)
        if y is None or self.dice.random() < 0.15:
            return y
        if self.dice.random() < 0.1:
            block.values.append(y)  # somebody else may read it
        return self.dice.choice([self._conv, self._conv, self._average, self._maximum, self._batch_norm])(block, y)

    def _pad(self, block: Block, x: Value) -> Value | None:
        rank, dice = x.array.ndim, self.dice
        spatial = list(range(2, rank))
        axes = list(range(rank)) if dice.random() < 0.1 else dice.sample(spatial, dice.randint(1, len(spatial)))
        sides = [0, 1, 1, 2, -1] if dice.random() < 0.1 else [0, 1, 1, 2]
        pairs = {axis: (dice.choice(sides), dice.choice(sides)) for axis in axes}
        attributes: dict[str, Any] = {}
        if dice.random() < 0.2:
            attributes["mode"] = dice.choice(["constant", "reflect", "edge"])
        value = dice.choice([None, None, 0.0, 0.0, 0.5])
        named = self.opset >= 18 and dice.random() < 0.6
        order = axes if named else list(range(rank))
        pads = [pairs.get(axis, (0, 0))[side] for side in (0, 1) for axis in order]
        if self.opset < 11:
            attributes.update({} if value is None else {"value": value})
            return self._emit(block, "Pad", [x], pads=pads, **attributes)
        inputs: list[Value | None] = [x, self._integers(block, pads)]
        if value is not None or named:
            inputs.append(None if value is None else self._as_initializer(block, np.asarray(value, self.dtype)))
        if named:
            inputs.append(self._integers(block, [axis - rank if dice.random() < 0.4 else axis for axis in axes]))
        return self._emit(block, "Pad", inputs, **attributes)

    def _maximum(self, block: Block, x: Value) -> Value | None:
        if x.array.ndim < 3:
            return None
        kernel = [self.dice.choice([1, 2, 3]) for _ in x.shape[2:]]
        attributes = self._window(kernel, 1, transposed=False) | {"kernel_shape": kernel}
        attributes.pop("group", None)
        if self.opset < 10:
            attributes.pop("dilations", None)
        if "pads" in attributes:
            attributes["pads"] = [min(p, k - 1) for p, k in zip(attributes["pads"], kernel * 2, strict=True)]
        if self.opset >= 10 and "auto_pad" not in attributes and self.dice.random() < 0.1:
            attributes["ceil_mode"] = 1
        return self._emit(block, "MaxPool", [x], **attributes)

    def _resize(self, block: Block, x: Value) -> Value | None:
        """Twice as large, or of another size; channels too, now and then."""
        rank = x.array.ndim
        if rank < 3 or self.opset < 13:
            return None
        factors = [1.0, self.dice.choice([1.0] * 9 + [2.0]), *(self.dice.choice([1.0, 1.5, 2.0]) for _ in x.shape[2:])]
        mode = self.dice.choice(["nearest", "linear"])
        how = self.dice.choice(["half_pixel", "asymmetric", "align_corners"])
        if self.dice.random() < 0.5:
            given = [None, self._as_initializer(block, np.asarray(factors, np.float32))]
        else:
            sizes = [int(size * factor) for size, factor in zip(x.shape, factors, strict=True)]
            given = [None, None, self._integers(block, sizes)]
        return self._emit(block, "Resize", [x, *given], mode=mode, coordinate_transformation_mode=how)

    def _average(self, block: Block, x: Value) -> Value | None:
        rank = x.array.ndim
        if rank < 3:
            return None
        kind = self.dice.choice(["AveragePool", "GlobalAveragePool", "ReduceMean"])
        if kind == "GlobalAveragePool":
            return self._emit(block, kind, [x])
        if kind == "ReduceMean":
            axes = self.dice.choice([list(range(2, rank)), [rank - 1], [1], [0, 2]])
            return self._with_axes(block, kind, x, axes, since=18, keepdims=self.dice.choice([0, 1]))
        attributes = self._window([self.dice.choice([1, 2, 3]) for _ in x.shape[2:]], 1, transposed=False)
        attributes["kernel_shape"] = attributes.get("kernel_shape") or [self.dice.choice([1, 2])] * (rank - 2)
        if self.opset < 19:
            attributes.pop("dilations", None)
        attributes.pop("group", None)
        if "pads" in attributes:
            attributes["pads"] = [
                min(p, k - 1) for p, k in zip(attributes["pads"], attributes["kernel_shape"] * 2, strict=True)
            ]
        if self.dice.random() < 0.4:
            attributes["count_include_pad"] = 1
        if self.opset >= 10 and "auto_pad" not in attributes and self.dice.random() < 0.2:
            attributes["ceil_mode"] = 1
        return self._emit(block, "AveragePool", [x], **attributes)

    def _hand_on(self, block: Block, x: Value) -> Value | None:
        """Identity, Dropout, a Cast to the same type, or one there and back."""
        kind = self.dice.choice(["Identity", "Dropout", "Dropout", "Cast", "Cast twice"])
        if kind == "Identity":
            return self._emit(block, "Identity", [x])
        if kind == "Cast":
            return self._emit(block, "Cast", [x], to=self.type)
        if kind == "Cast twice":
            if self.type == TensorProto.BFLOAT16:
                return None
            wide = self._emit(block, "Cast", [x], to=TensorProto.DOUBLE)
            return wide and self._emit(block, "Cast", [wide], to=self.type)
        if self.opset < 12:
            return self._emit(
                block, "Dropout", [x], ratio=0.3, extra=[self._name()] if self.dice.random() < 0.2 else []
            )
        ratio = self._as_initializer(block, np.asarray(0.4, self.dtype))
        off = self._as_initializer(block, np.asarray(False))
        inputs: list[Value | None] = self.dice.choice([[x], [x, ratio], [x, None, off], [x, ratio, off]])
        return self._emit(block, "Dropout", inputs, extra=[self._name()] if self.dice.random() < 0.2 else [])

    def _activation(self, block: Block, x: Value) -> Value | None:
        return self._emit(block, self.dice.choice(["Relu", "Relu", "Tanh", "Neg", "Abs"]), [x])

    def _dead(self, block: Block, x: Value) -> Value | None:
        """A value that nobody reads: it is not offered to anyone."""
        self._emit(block, self.dice.choice(["Relu", "Identity"]), [x])
        return None

    def _custom(self, block: Block, x: Value) -> Value | None:
        return self._emit(block, "Half", [x], domain="custom")

    def _split(self, block: Block, x: Value) -> Value | None:
        if x.array.ndim < 2 or x.shape[1] < 2:
            return None
        sizes = [1, x.shape[1] - 1]
        if self.opset >= 13:
            y = self._emit(block, "Split", [x, self._integers(block, sizes)], axis=1, extra=[other := self._name()])
        else:
            y = self._emit(block, "Split", [x], axis=1, split=sizes, extra=[other := self._name()])
        if y is not None:
            block.values.append(Value(other, x.array[:, 1:]))
        return y

    # -- bodies and functions

    def _body(self, block: Block, steps: int, own: Sequence[Value] = ()) -> Block:
        inner = Block(inner=True, values=[*block.values, *own], constants=list(block.constants))
        self.depth += 1
        self._grow(inner, steps)
        self.depth -= 1
        return inner

    def _if(self, block: Block, x: Value) -> Value | None:
        if self.condition is None or self.depth > 1 or self.opset < 11:
            return None
        branches = []
        outputs: list[Value] = []
        for _ in range(2):
            inner = self._body(block, self.dice.randint(1, 4))
            made = {name for node in inner.nodes for name in node.output}
            found = [v for v in inner.values if v.name in made]
            if not found:
                return None
            outputs.append(self.dice.choice(found[-2:]))
            branches.append(inner)
        node = helper.make_node(
            "If",
            [self.condition.name],
            [self._name()],
            name=self._node_name("If"),
            then_branch=self._graph("then", branches[0], [outputs[0]]),
            else_branch=self._graph("else", branches[1], [outputs[1]]),
        )
        taken = outputs[0] if self.condition.array else outputs[1]
        y = self._accept(block, node, taken.array)
        # Where the two shapes differ, what reads the value could fail for the other condition.
        return y if outputs[0].shape == outputs[1].shape else None

    def _loop(self, block: Block, x: Value) -> Value | None:
        """The state keeps its shape; the body may read anything outside."""
        if self.depth > 1 or self.opset < 11:
            return None
        count, alive, state = self._name(), self._name(), self._name()
        inner = self._body(block, self.dice.randint(1, 3), [Value(state, x.array)])
        same = [v for v in inner.values if v.shape == x.shape and any(v.name in n.output for n in inner.nodes)]
        if not same:
            return None
        bounded = self._emit(inner, "Tanh", [same[-1]])
        on = self._name()
        inner.nodes.append(helper.make_node("Identity", [alive], [on]))
        if bounded is None:
            return None
        body = self._graph("body", inner, [bounded])
        body.output.insert(0, helper.make_tensor_value_info(on, TensorProto.BOOL, []))
        for info in (
            helper.make_tensor_value_info(count, TensorProto.INT64, []),
            helper.make_tensor_value_info(alive, TensorProto.BOOL, []),
            helper.make_tensor_value_info(state, self.type, [None] * x.array.ndim),
        ):
            body.input.append(info)
        trips = self._as_initializer(block, np.asarray(2, np.int64))
        node = helper.make_node(
            "Loop", [trips.name, "", x.name], [self._name()], name=self._node_name("Loop"), body=body
        )
        return self._accept(block, node, np.tanh(bounded.array))

    def _graph(self, name: str, block: Block, outputs: Sequence[Value]) -> GraphProto:
        infos = [helper.make_tensor_value_info(v.name, self.type, [None] * v.array.ndim) for v in outputs]
        return helper.make_graph(block.nodes, name, [], infos, block.initializers)

    def _call(self, block: Block, x: Value) -> Value | None:
        """A local function of x; made here, or one that was made before for an operand of this shape."""
        if self.ir < FUNCTIONS_SINCE_IR:
            return None
        fits = [f for f, operands in self.functions if operands[0].shape == x.shape]
        if fits and self.dice.random() < 0.5:
            function = self.dice.choice(fits)
        else:
            inner = Block(inner=True, function=True, values=[Value("x", x.array)])
            self._grow(inner, self.dice.randint(1, 4))
            made = [v for v in inner.values if any(v.name in n.output for n in inner.nodes)]
            if not made:
                return None
            attributes = self._refer(inner)
            function = helper.make_function(
                "custom", f"F{len(self.functions)}", ["x"], [made[-1].name], inner.nodes,
                [helper.make_opsetid("", self.opset)], attributes,
            )  # fmt: skip
            self.functions.append((function, [x]))
        values = {"epsilon": 0.25, "alpha": 1.5}
        arguments: dict[str, Any] = {name: values[name] for name in function.attribute}
        node = helper.make_node(
            function.name, [x.name], [self._name()], name=self._node_name("call"), domain="custom", **arguments
        )
        try:
            run = evaluator(_wrapped(function, node, self.opset, self.type, x))
            with np.errstate(all="ignore"):
                y = np.asarray(run.run(None, {x.name: x.array})[0])
        except Exception:
            return None
        return self._accept(block, node, y)

    def _refer(self, inner: Block) -> list[str]:
        """Let some attributes be given by the caller."""
        names = set()
        for node in inner.nodes:
            for op, name in (("BatchNormalization", "epsilon"), ("Gemm", "alpha")):
                if node.op_type == op and self.dice.random() < 0.3:
                    kept = [a for a in node.attribute if a.name != name]
                    del node.attribute[:]
                    node.attribute.extend(kept)
                    node.attribute.append(
                        onnx.AttributeProto(name=name, ref_attr_name=name, type=onnx.AttributeProto.FLOAT)
                    )
                    names.add(name)
        return sorted(names)


def _wrapped(function: onnx.FunctionProto, node: NodeProto, opset: int, kind: int, x: Value) -> ModelProto:
    graph = helper.make_graph(
        [node],
        "call",
        [helper.make_tensor_value_info(x.name, kind, list(x.shape))],
        [helper.make_tensor_value_info(node.output[0], kind, None)],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[function])


def names_read(node: NodeProto) -> set[str]:
    """What the node reads, in its bodies too."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names |= {output.name for output in graph.output}
            for inner in graph.node:
                names |= names_read(inner)
    return names


def ordered(model: ModelProto) -> ModelProto:
    """A copy whose nodes stand in order, for those who ask for that."""
    made = {name for node in model.graph.node for name in node.output if name}
    waiting, done = list(model.graph.node), set[str]()
    nodes: list[NodeProto] = []
    while waiting:
        ready = [n for n in waiting if not (names_read(n) & made) - done - set(n.output)]
        if len(ready) == len(waiting):
            return model if not nodes else _with_nodes(model, nodes + ready)
        if not ready:
            raise ValueError("the nodes form a circle")
        first = ready[0]
        nodes.append(first)
        done.update(first.output)
        waiting = [n for n in waiting if n is not first]
    return _with_nodes(model, nodes)


def _with_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy
