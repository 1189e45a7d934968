"""The ONNX graph: onnx-graphsurgeon's nodes and tensors are edited, the original ModelProto carries.

GraphSurgeon drops metadata, denotations and optional types on export and copies every weight.  So a model is never
exported through it: `to_model` patches what changed into the proto that was loaded, and everything else keeps its
bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from onnx import TensorProto

from fuser import costs
from fuser.affine import Scaled
from fuser.files import ModelFile
from fuser.graph import Array, Reader, Summary
from fuser.graphs.onnx import carrier
from fuser.graphs.onnx.duplicates import DuplicateConstants, duplicate_nodes
from fuser.graphs.onnx.editor import ABSENT, OLDEST_OPSET, Node, Scope, Tensor, Variable
from fuser.graphs.onnx.editor import Constant as StoredConstant
from fuser.graphs.onnx.known import KnownValues
from fuser.graphs.onnx.readers import (
    MEASURED,
    OPERANDS,
    READERS,
    NodeReader,
    Unreadable,
    bias_add,
    bias_position,
    says_all,
    target_shape,
)
from fuser.graphs.onnx.sequences import split_sequence
from fuser.graphs.onnx.values import CannotEvaluate, Shape, elements, numpy_dtype
from fuser.graphs.onnx.wiring import Wiring, is_standard, operator
from fuser.neutral import MAY_CHANGE_NOTHING, as_identity
from fuser.ops import (
    SMALL_CONSTANT,
    AveragePool,
    Concat,
    Constant,
    Conv,
    Dead,
    Duplicate,
    DuplicateConstant,
    Identity,
    Linear,
    MaxPool,
    Movement,
    Op,
    Pad,
    Padding,
    Range,
    Reduction,
    Reshape,
    Slice,
    SplitSequence,
    Sum,
    Transpose,
    Value,
)
from fuser.remarks import Missed

O = TypeVar("O", bound=Op)  # noqa: E741

KEEPS_RANK = frozenset(
    "BatchNormalization InstanceNormalization GroupNormalization LayerNormalization Transpose Identity Dropout Cast "
    "CastLike Relu LeakyRelu Elu Gelu Sigmoid HardSigmoid HardSwish Tanh Clip Abs Neg Exp Sqrt Erf Softplus Softmax "
    "LogSoftmax".split()
)
"""Operators whose output has as many axes as their first operand; inference saw no Reshape that became known since."""

BROADCASTS = frozenset({"Add", "Sub", "Mul", "Div"})
"""Operators whose output has as many axes as that of their two operands which has more."""

_GEMM_TYPES = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)

_COUNTED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_NOT_COUNTED = frozenset(
    "LSTM GRU RNN Einsum Attention DeformConv ConvInteger MatMulInteger QLinearConv QLinearMatMul".split()
)
"""What multiplies and adds in ways that are not counted."""

SPLIT_TAKES_SIZES_SINCE = 13
"""Before that opset the sizes of a Split are an attribute."""

SLICE_TAKES_RANGES_SINCE = 10
"""Before that opset the bounds of a Slice are attributes."""

FORMAL_INPUTS_BEFORE_IR = 4
"""Before IR 4 every initializer had to be listed as an input; it was a formality, and nobody replaced them."""


class OnnxGraph:
    """`fuser.graph.Graph` over an ONNX model: its main graph, bodies and functions; opset 7 and up, IR 3 and up.

    model: edited in place, by `to_model`.
    freeze_inputs: initializers that are also graph inputs count as constants, and those inputs go.
    notes: what a person should know of the model.

    Raises `InputError` for a model that is not a graph: cyclic, or with a value produced twice.
    """

    host = "onnx"
    rows_only = True  # Gemm

    def __init__(self, model: ModelFile, *, freeze_inputs: bool = False) -> None:
        self.edits = 0
        self._model = model
        self._ir_version = model.proto.ir_version
        graph = model.proto.graph
        formal = self._ir_version < FORMAL_INPUTS_BEFORE_IR
        self.wiring = Wiring(model.proto, freeze_inputs=freeze_inputs and not formal)
        stored = self.wiring.scopes[0].names
        backed = {info.name for info in graph.input if isinstance(stored[info.name], StoredConstant)}
        self._removed = set() if formal or not freeze_inputs else backed
        self.removable_inputs = sorted(backed) if formal or freeze_inputs else []
        self.known = KnownValues(model, self.wiring, set() if formal else backed, frozen=freeze_inputs)
        self._duplicate_constants = DuplicateConstants(model, self.wiring)
        self.wiring.scopes[0].changed = bool(self._removed)
        opset = self.wiring.scopes[0].opset
        self.notes = [] if opset >= OLDEST_OPSET else [_too_old(opset)]
        self._zeros: dict[int, bool] = {}
        self._origins: dict[int, list[str]] = {}
        self._readings: dict[int, Op | None] = {}
        self._readers: dict[int, list[Reader]] = {}
        self._read_at = self._learned_at = 0
        self._taken = {name for scope in self.wiring.scopes for name in scope.names}
        self._taken.update(node.name for node in self.wiring.order)
        self._node_names = Counter(node.scope.path + node.name for node in self.wiring.order)

    # -- reading

    def ops(self, kind: type[O]) -> Iterator[O]:
        if kind is Constant:
            yield from self._constant_ops()  # type: ignore[misc]
        elif kind is Dead:
            yield from self._dead_ops()  # type: ignore[misc]
        elif kind is Duplicate:
            yield from self._duplicate_ops()  # type: ignore[misc]
        elif kind is SplitSequence:
            for node in self.wiring.of(["SplitToSequence"]):
                if self._is_read_here(node) and (found := split_sequence(self, node)) is not None:
                    yield found  # type: ignore[misc]
        elif kind is DuplicateConstant:
            for constant, twin in self._duplicate_constants:
                yield DuplicateConstant(constant.producer, constant, twin)  # type: ignore[misc]
        else:
            kinds = (kind, *MAY_CHANGE_NOTHING) if kind is Identity else kind
            operators = {name for name, (read_as, _) in READERS.items() if read_as is Op or issubclass(read_as, kinds)}
            for node in self.wiring.of(operators):
                op = None if self.known.is_foldable(node) else self.read(node)
                if op is not None and kind is Identity:
                    op = as_identity(self, op)
                if isinstance(op, kind) and op.node is node:
                    yield op

    def read(self, node: Node) -> Op | None:
        """The node as an op; None where the vocabulary has no word, or the node is not exactly understood."""
        if self._read_at != self.edits:  # what was read holds until the next edit
            self._forget_readings()
        if id(node) not in self._readings:
            self._readings[id(node)] = self._read(node)
        return self._readings[id(node)]

    def _forget_readings(self) -> None:
        self._readings.clear()
        self._readers.clear()
        self._read_at = self.edits

    def _read(self, node: Node) -> Op | None:
        scope = node.scope
        if node.op not in READERS or not self._is_read_here(node):
            return None
        try:
            return READERS[node.op][1](NodeReader(self, node, scope.opset))
        except Unreadable:
            return None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return None  # not a legal node: an operand or an attribute is missing, or of another kind

    def op_producing(self, value: Value) -> Op | None:
        node = value.producer
        return None if node is None else self.read(node)

    def readers(self, value: Value) -> Sequence[Reader]:
        if self._read_at != self.edits:
            self._forget_readings()
        if id(value) not in self._readers:
            self._readers[id(value)] = self._who_reads(value)
        return self._readers[id(value)]

    def _who_reads(self, value: Value) -> list[Reader]:
        home, constant = value.home, value.known
        found = []
        for node, position in value.uses():
            if constant and self.known.is_foldable(node):  # it is computed ahead of run time, like the value itself
                continue
            # An op inside a body may run many times or never: outside, it is a reader without a meaning.
            op = self.read(node) if node.scope is home else None
            found.append(Reader(self._node_name(node), op, is_standard(node) and (node.op, position) in MEASURED))
        return found + [Reader(name, None) for name in value.public]

    def constant(self, value: Value) -> Array | Missed:
        return self.known.value(value)

    def shape(self, value: Value) -> Shape | None:
        return self.known.shape(value)

    def rank(self, value: Value) -> int | None:
        least = 0  # what broadcasting makes of it
        while True:
            producer = value.producer
            kind = operator(producer)
            if kind == "Gemm":
                return max(least, 2)
            operands = [] if producer is None else producer.inputs
            if kind in ("Conv", "ConvTranspose") and len(operands) > 1:
                value = operands[1]  # ONNX has no unbatched convolution
                continue
            shape = self.known.shape(value)
            if shape is not None:
                return max(least, len(shape))
            if kind in KEEPS_RANK and operands:
                value = operands[0]
                continue
            first, second = (self.known.shape(x) for x in operands) if len(operands) == 2 else (None, None)
            if kind == "MatMul" and second is not None and len(second) == 2:
                value = operands[0]
            elif kind in BROADCASTS and (first is None) != (second is None):
                least = max(least, len(first or second or ()))
                value = operands[0] if first is None else operands[1]
            else:
                return None

    def can_vanish(self, op: Op, by: Value) -> bool:
        return all(not output.public or self._can_write(value, op) for output, value in self._pairs(op, by))

    def is_stable(self, value: Value) -> bool:
        return True  # ONNX has values, not memory

    def freed(self, value: Value) -> int:
        return self._freed([value], next(iter(value.slots.values()))) if len(value.slots) == 1 else 0

    def refuses_padding(self, op: Conv | AveragePool | MaxPool, pad: Pad, padding: Padding) -> Missed | None:
        return None  # any sides, any sizes

    def refuses_uniting(self, op: Linear) -> Missed | None:
        if self.element_type(op.weight) in _GEMM_TYPES:
            return None
        return Missed("type", f"a Gemm multiplies no matrices of the type of {self.describe(op.weight)}")

    def describe(self, x: Op | Value) -> str:
        if not isinstance(x, Op):
            return repr(x.name)
        return self._node_name(x.node) if x.node is not None else self._constant_name(x.output)

    def summary(self) -> Summary:
        alive = [node for node in self.wiring.order if not node.erased]
        summary = Summary(dict(Counter(node.op for node in alive)))
        stored = [value for node in alive if isinstance(value := node.attrs.get("value"), StoredConstant)]
        for scope in self.wiring.scopes:
            constants = (tensor for tensor in scope.names.values() if isinstance(tensor, StoredConstant))
            stored += [tensor for tensor in constants if tensor.name not in scope.dropped]
        counts: Counter[int] = Counter()
        for tensor in stored:
            if tensor.proto is not None:
                counts[tensor.proto.data_type] += math.prod(tensor.sizes)
        for data_type, count in counts.items():
            dtype = numpy_dtype(data_type)
            summary.bytes += count * dtype.itemsize if dtype else 0
            if dtype and dtype.kind not in "biuOSU":  # shapes and indices are not parameters
                summary.parameters += count
        summary.multiply_adds = self._multiply_adds(alive)
        return summary

    def _multiply_adds(self, nodes: Sequence[Node]) -> int | None:
        main = self.wiring.scopes[0]
        inputs = (self.known.shape(main.names[info.name]) for info in self._model.proto.graph.input)
        batch = frozenset(shape[0] for shape in inputs if shape and isinstance(shape[0], str))
        total = 0
        for node in nodes:
            if not is_standard(node) or node.op in _NOT_COUNTED:
                return None
            if node.op not in _COUNTED:
                continue
            if len(node.inputs) < 2 or not node.outputs:  # not a legal node
                return None
            x, w, y = (costs.per_sample(self.known.shape(t), batch) for t in (*node.inputs[:2], node.outputs[0]))
            if not x or not w or y is None or node.scope is not self.wiring.scopes[0]:
                return None
            if node.op.startswith("Conv"):
                total += costs.conv(x, w, y, transposed=node.op == "ConvTranspose")
            else:
                total += costs.product(x, y, axis=0 if node.attrs.get("transA") else -1)
        return total

    # -- reading, for the dialect

    def is_zero(self, value: Tensor) -> bool:
        """Whether all elements of a known value are zeros."""
        if id(value) not in self._zeros:
            array = self.known.value(value)
            self._zeros[id(value)] = not isinstance(array, Missed) and not array.any()
        return self._zeros[id(value)]

    def element_type(self, value: Tensor) -> int | None:
        """The ONNX element type, where it is known."""
        return self.known.element_type(value)

    # -- editing

    def set_constants(self, op: Op, **arrays: Array | Scaled | None) -> None:
        node: Node = op.node
        weight = arrays.get("weight")
        if isinstance(op, Conv | Linear) and weight is not None and self._resizes(op, weight):
            groups = op.groups if isinstance(op, Conv) and op.transposed else 1
            self._set_width(op, weight.shape[op.out_axis] * groups)
        for field, array in arrays.items():
            if array is None:
                self.wiring.truncate_inputs(node, OPERANDS[node.op][field])  # what is optional comes last
            elif node.op == "MatMul" and field == "bias":
                self._set_matmul_bias(node, array)
            else:
                self._set_operand(node, OPERANDS[node.op][field], field, array)
        if node.op == "Gemm":
            for name in ("alpha", "beta"):
                node.attrs.pop(name, None)
        self.edits += 1

    def set_padding(self, op: Conv | AveragePool | MaxPool, padding: Padding) -> None:
        node: Node = op.node
        self.wiring.set_attribute(node, "pads", [before for before, _ in padding] + [after for _, after in padding])
        node.attrs.pop("auto_pad", None)
        if isinstance(op, AveragePool):
            self.wiring.set_attribute(node, "count_include_pad", 1)
        self.edits += 1

    def replace(self, op: Op, by: Value) -> None:
        producer = by.producer
        was_read = op.node is not None and self.wiring.is_read(op.node)
        if self.can_vanish(op, by):
            pairs = self._pairs(op, by)
            for node in self._nodes(op):
                self.wiring.erase(node)
            for output, value in pairs:
                # What is known, and declared, of a name has to stay true of it.
                same = not isinstance(op, Movement) or self.known.shape(output) == self.known.shape(value)
                self._redirect(output, value, may_rename=same)
        else:
            self._become_identity(op.node, by)
        if producer is not None and was_read:
            self._note_origin(producer, op.node)
        self.edits += 1

    def set_input(self, op: Op, value: Value) -> None:
        node, old = op.node, op.input  # type: ignore[attr-defined]
        position = next(i for i, tensor in enumerate(node.inputs) if tensor is old)
        self.wiring.set_input(node, position, value)
        if (producer := old.producer) is not None:
            self._note_origin(node, producer)
        self.edits += 1

    def set_inputs(self, op: Concat | Sum, values: Sequence[Value]) -> None:
        producers = [producer for tensor in op.inputs if (producer := tensor.producer) is not None]
        self.wiring.truncate_inputs(op.node, 0)
        for position, value in enumerate(values):
            self.wiring.set_input(op.node, position, value)
        for producer in producers:
            if not self.wiring.is_read(producer):
                self._note_origin(op.node, producer)
        self.edits += 1

    def set_permutation(self, op: Transpose, permutation: Sequence[int]) -> None:
        self.wiring.set_attribute(op.node, "perm", list(permutation))
        self.edits += 1

    def set_ranges(self, op: Slice, ranges: Sequence[Range]) -> None:
        node, scope = op.node, op.node.scope
        axes, *bounds = zip(*ranges, strict=True)
        numbers = dict(zip(("starts", "ends", "axes", "steps"), (bounds[0], bounds[1], axes, bounds[2]), strict=True))
        if scope.opset < SLICE_TAKES_RANGES_SINCE:
            for name in ("starts", "ends", "axes"):
                self.wiring.set_attribute(node, name, list(numbers[name]))
        else:
            self.wiring.truncate_inputs(node, 1)
            for position, (name, values) in enumerate(numbers.items(), 1):
                constant = self._new_constant(scope, f"{op.output.name}.{name}", np.array(values, np.int64), node)
                self.wiring.set_input(node, position, constant)
        self.edits += 1

    def set_shape(self, op: Movement) -> None:
        if op.node.op == "Reshape" and says_all(self, op.node):
            return
        shape = target_shape(self, op.output)
        assert shape is not None  # otherwise it is not `absolute`
        self._reshape_to(op, shape)

    def reduce_in_shape(self, op: Reduction, reshape: Reshape) -> None:
        self.wiring.set_attribute(op.node, "keepdims", int(not op.keeps_axes))
        self.wiring.erase(reshape.node)
        self.wiring.set_output(op.node, op.output, reshape.output)
        op.node.scope.dropped.add(op.output.name)
        self._note_origin(op.node, reshape.node)
        self.edits += 1

    def unite(self, op: Linear, around: tuple[Reshape, Reshape] | None) -> None:
        add = op.output.producer
        if around is not None:
            before, after = around
            self.set_shape(after)
            data, weight = self.shape(op.input), self.shape(op.weight)
            assert weight is not None and isinstance(weight[0], int)
            self._reshape_to(before, [-1, weight[0]])
            rows = None if data is None else elements(data[:-1])
            for node, features in zip((before.node, add), weight, strict=True):
                self.known.state(self._rename_output(node), self.element_type(op.weight), (rows, features))
        for position, tensor in enumerate((op.node.inputs[0], op.weight, op.bias)):
            self.wiring.set_input(add, position, tensor)
        self._note_origin(add, op.node)
        self.wiring.erase(op.node)
        add.op = "Gemm"
        self.edits += 1

    def _reshape_to(self, op: Movement, target: Sequence[int]) -> None:
        node: Node = op.node
        shape = np.array(target, np.int64)
        self.wiring.truncate_inputs(node, 1)
        constant = self._new_constant(node.scope, f"{op.output.name}.shape", shape, node)
        self.wiring.set_input(node, 1, constant)
        node.op = "Reshape"
        node.attrs.clear()
        self.edits += 1

    def replace_with_constant(self, op: Op) -> None:
        node: Node = op.node
        for output in node.outputs:
            uses = output.uses()
            if not uses:
                continue
            value = self.known.evaluate(output) if output.known else self._only_a_target(node)
            assert value is not None  # otherwise it is no `Constant`
            constant = self._new_constant(node.scope, output.name, value, node)
            for reader, position in uses:
                self.wiring.set_input(reader, position, constant)
        self.wiring.erase(node)
        self.edits += 1

    def split(self, op: SplitSequence) -> None:
        node, scope = op.node, op.node.scope
        assert op.sizes is not None
        outputs = [Variable(self._fresh(f"{op.output.name}_{i}")) for i in range(len(op.sizes))]
        for index, value in op.taken:
            self.wiring.erase(value.producer)
            outputs[index] = value
        attributes: dict[str, int | list[int]] = {"axis": op.axis}
        inputs = [op.input]
        if scope.opset < SPLIT_TAKES_SIZES_SINCE:
            attributes["split"] = list(op.sizes)
        else:
            inputs.append(self._new_constant(scope, f"{op.output.name}.sizes", np.array(op.sizes, np.int64), node))
        split = Node("Split", node.name or self._fresh(f"{op.output.name}_split"), attributes)
        self.wiring.insert(split, before=node)
        self.wiring.erase(node)
        self.wiring.link(split, inputs, outputs)
        for output in outputs:
            self.wiring.adopt(scope, output)
        self.edits += 1

    def erase(self, op: Op) -> None:
        if op.node is None:
            self.wiring.drop_unread(op.output)
        else:
            self.wiring.erase(op.node)
        self.edits += 1

    def commit(self) -> None:
        self.wiring.sweep(keep=self.known.overridable)
        self.wiring.settle()
        self._forget_readings()

    def to_model(self) -> ModelFile:
        """Patch what changed into the model and return it; this graph is not to be used after that."""
        if any(scope.changed for scope in self.wiring.scopes):
            carrier.patch(self._model.proto, self.wiring, self._origins, self._removed)
        return self._model

    def _is_read_here(self, node: Node) -> bool:
        """Whether nodes like this one, where it is, are understood at all."""
        scope = node.scope
        return is_standard(node) and scope.opset >= OLDEST_OPSET and not scope.frozen and not node.erased

    # -- ops that are found, not read

    def _constant_ops(self) -> Iterator[Constant]:
        """Nodes whose outputs are known, at the edge: what only feeds others of their kind goes with them.

        Where an edge stays, small values that feed it are the edge.
        """
        if self._learned_at != self.edits:
            self.known.learn()
            self._forget_readings()
            self._learned_at = self.edits
        targets = {id(tensor.producer) for node in self.wiring.of(["Reshape"]) for tensor in node.inputs[1:]}
        for node in self.wiring.order:
            makes_target = id(node) in targets
            if not (makes_target or self.known.is_foldable(node)) or node.erased:
                continue
            if any(output.public for output in node.outputs):
                continue
            if makes_target and (target := self._only_a_target(node)) is not None:
                yield Constant(node, node.outputs[0], elements_freed=0, elements_made=target.size)
            if node.erased or not self.known.is_foldable(node):
                continue
            readers = [reader for output in node.outputs for reader in output.slots.values()]
            if all(self.known.is_foldable(reader) for reader in readers):
                continue
            if (op := self._as_constant(node)) is not None:
                yield op
                if not node.erased:
                    yield from self._small_constants_behind(node)

    def _small_constants_behind(self, node: Node) -> Iterator[Constant]:
        pending, seen = [node], {id(node)}
        while pending:
            for tensor in list(pending.pop().inputs):
                producer = tensor.producer
                if producer is None or id(producer) in seen or not self.known.is_foldable(producer):
                    continue
                seen.add(id(producer))
                size = elements(self.known.shape(tensor) or ())  # to compute a large value for nothing takes long
                op = self._as_constant(producer) if size is None or size <= SMALL_CONSTANT else None
                if op is not None and op.elements_made <= SMALL_CONSTANT:
                    yield op
                if not producer.erased:
                    pending.append(producer)

    def _as_constant(self, node: Node) -> Constant | None:
        if node.op == "Constant" and not self._holds_initializers(node.scope):
            return None
        if any(output.public for output in node.outputs):
            return None
        try:
            made = sum(self.known.evaluate(output).size for output in node.outputs if output.slots)
        except CannotEvaluate:
            return None
        freed = made if node.op == "Constant" else self._freed(node.inputs, node)
        return Constant(node, node.outputs[0], elements_freed=freed, elements_made=made)

    def _only_a_target(self, node: Node) -> Array | None:
        """What may stand for the output of a node that only Reshapes read, as their target; see `reshape_target`."""
        if len(node.outputs) != 1 or (output := node.outputs[0]).known:
            return None
        targets: list[Array] = []
        for reader, position in output.uses():
            if reader.op != "Reshape" or position != 1 or not is_standard(reader):
                return None
            target = self.known.reshape_target(output, reader.inputs[0])
            if target is None or (targets and not np.array_equal(target, targets[0])):
                return None
            if reader.attrs.get("allowzero") and not target.all():  # there a 0 copies nothing
                return None
            targets.append(target)
        return targets[0] if targets else None

    def _freed(self, tensors: Sequence[Tensor], reader: Node) -> int:
        """How many elements of constants nobody reads any more once `reader` does not read `tensors`."""
        freed, going, pending = 0, {id(reader)}, list(tensors)
        counted: set[int] = set()
        while pending:
            tensor = pending.pop()
            if tensor is ABSENT or id(tensor) in counted or tensor.public:
                continue
            if not all(id(user) in going for user in tensor.slots.values()):
                continue  # seen again with the next of its readers that goes
            counted.add(id(tensor))
            producer = tensor.producer
            if producer is None or operator(producer) == "Constant":
                freed += elements(self.known.shape(tensor) or ()) or 0
            elif all(output is tensor or not output.slots for output in producer.outputs):
                going.add(id(producer))
                pending += producer.inputs
        return freed

    def _dead_ops(self) -> Iterator[Dead]:
        """From the end to the start, so that what feeds only dead nodes is dead when it is reached."""
        for node in reversed(self.wiring.order):
            if node.erased or not is_standard(node) or node.scope.frozen:
                continue
            if not self.wiring.is_read(node):
                yield Dead(node, node.outputs[0] if node.outputs else None)
        for tensor in self.wiring.unread:
            if tensor.name not in self.wiring.scopes[0].dropped:
                yield Dead(None, tensor)

    def _duplicate_ops(self) -> Iterator[Duplicate]:
        for node, twin in duplicate_nodes(self.wiring):
            output, by = next((y, z) for y, z in zip(node.outputs, twin.outputs, strict=True) if y is not ABSENT)
            yield Duplicate(node, output, by)

    # -- small edits

    def _pairs(self, op: Op, by: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(output, what its readers are to read)."""
        if not isinstance(op, Duplicate):
            return [(op.output, by)]
        twin = by.producer
        assert twin is not None
        pairs = zip(op.node.outputs, twin.outputs, strict=True)
        return [(output, other) for output, other in pairs if output is not ABSENT]

    def _can_write(self, value: Tensor, op: Op) -> bool:
        """Whether the producer of `value` can write under the name of the op's output."""
        producer = value.producer
        if producer is None or op.node is None or value.public:
            return False
        return producer.scope is op.node.scope

    def _redirect(self, output: Tensor, value: Tensor, *, may_rename: bool) -> None:
        """Readers of `output`, whose node is gone, read `value`.

        may_rename: they are alike in type and shape.
        """
        if may_rename:
            self.known.inherit(value, output)
        readers, producer = output.uses(), value.producer
        renames = may_rename and producer is not None and not value.slots and producer.scope is output.home
        if output.public or (renames and not value.public):
            assert producer is not None  # otherwise the op could not vanish
            others = value.uses()
            # The producer writes under the name of what goes: its readers keep their bytes.
            self.wiring.set_output(producer, value, output)
            producer.scope.dropped.add(value.name)
            self.known.inherit(output, value)
            output, value, readers = value, output, others
        for reader, position in readers:
            self.wiring.set_input(reader, position, value)

    def _resizes(self, op: Conv | Linear, weight: Array | Scaled) -> bool:
        """Whether the new weight makes another number of outputs."""
        old = self.shape(op.weight)
        return old is None or old[op.out_axis] != weight.shape[op.out_axis]

    def _set_width(self, op: Conv | Linear, channels: int) -> None:
        """What is stated of the number of channels of the op's output is no longer true."""
        axis = -1 if isinstance(op, Linear) else 1
        product = op.node.outputs[0]
        if product is not op.output:  # of a MatMul whose bias an Add adds
            fresh = self._rename_output(op.node)
            self.known.inherit(fresh, product)
            self.known.set_size(fresh, axis, channels)
        self.known.set_size(op.output, axis, channels)

    def _rename_output(self, node: Node) -> Tensor:
        """Under its old name, another shape may be declared than it has now."""
        old = node.outputs[0]
        fresh, uses = Variable(self._fresh(old.name)), old.uses()
        self.wiring.set_output(node, old, fresh)
        node.scope.dropped.add(old.name)
        for reader, position in uses:
            self.wiring.set_input(reader, position, fresh)
        return fresh

    def _nodes(self, op: Op) -> list[Node]:
        """The nodes that go with an op: both of a MatMul and the Add of its bias, none of a stored constant."""
        last = op.output.producer
        return [node for node in ([last] if last is op.node else [last, op.node]) if node is not None]

    def _note_origin(self, node: Node, gone: Node) -> None:
        """Remember that `gone` is part of the node now."""
        origins = self._origins.setdefault(id(node), [])
        origins += [*self._origins.get(id(gone), ()), gone.name or gone.outputs[0].name]

    def _become_identity(self, node: Node, by: Tensor) -> None:
        """Where both names are in a signature, a node must stay between them."""
        self.wiring.truncate_inputs(node, 1)
        self.wiring.set_input(node, 0, by)
        node.op = "Identity"
        node.attrs.clear()

    def _set_operand(self, node: Node, position: int, field: str, array: Array | Scaled) -> None:
        old = node.inputs[position] if position < len(node.inputs) else ABSENT
        base = f"{node.name or node.outputs[0].name}.{field}" if old is ABSENT else old.name
        self.wiring.set_input(node, position, self._new_constant(node.scope, base, array, node, of=old))

    def _set_matmul_bias(self, matmul: Node, array: Array | Scaled) -> None:
        if (add := bias_add(self, matmul)) is not None:
            self._set_operand(add, bias_position(self, add), "bias", array)
            return
        scope, output = matmul.scope, matmul.outputs[0]
        stem = matmul.name or output.name
        product = Variable(self._fresh(f"{output.name}_product"))
        self.wiring.set_output(matmul, output, product)
        self.known.inherit(product, output)
        bias = self._new_constant(scope, f"{stem}.bias", array, matmul)
        add = Node("Add", self._fresh(f"{stem}_bias"))
        self.wiring.insert(add, after=matmul)
        self.wiring.link(add, [product, bias], [output])

    def _new_constant(
        self, scope: Scope, base: str, array: Array | Scaled, user: Node, *, of: Tensor = ABSENT
    ) -> Tensor:
        """A constant under a new name; a node before `user` where the scope can hold no initializers.

        of: what a `Scaled` is a product of.
        """
        name = self._fresh(base.removesuffix("_folded") + "_folded")
        tensor = StoredConstant(self._computed(name, array, of) or self._model.tensor(name, np.asarray(array)))
        scope.changed = True
        if self._holds_initializers(scope):
            scope.new_constants.append(tensor)
            self.wiring.adopt(scope, tensor)
            tensor.known = True
            return tensor
        output = Variable(name)
        node = Node("Constant", self._fresh(f"{name}_node"), attrs={"value": tensor})
        self.wiring.insert(node, before=user)
        self.wiring.link(node, [], [output])
        self.wiring.adopt(scope, output)
        output.known = True
        return output

    def _computed(self, name: str, array: Array | Scaled, of: Tensor) -> TensorProto | None:
        """What is no more than a stored weight times a factor, where that need not be stored before the model is."""
        if not isinstance(array, Scaled) or not isinstance(of, StoredConstant) or of.proto is None:
            return None
        return self._model.computed(name, of.proto, array.rows)

    def _holds_initializers(self, scope: Scope) -> bool:
        return not scope.in_function and (self._ir_version >= FORMAL_INPUTS_BEFORE_IR or scope.parent is None)

    def _fresh(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def _constant_name(self, tensor: Tensor) -> str:
        scope = tensor.home
        return f"{scope.path if scope else ''}{tensor.name}"

    def _node_name(self, node: Node) -> str:
        path: str = node.scope.path
        if node.name and self._node_names[path + node.name] == 1:
            return path + str(node.name)
        outputs = [output.name for output in node.outputs if output is not ABSENT]
        return path + str(outputs[0] if outputs else node.op)


def _too_old(opset: int) -> str:
    what = f"is of opset {opset}" if opset else "imports no opset of the default domain"
    return (
        f"the model {what}, and operators are understood from opset {OLDEST_OPSET} on, so its main graph is left alone"
        "; onnx.version_converter makes a newer one of it"
    )
