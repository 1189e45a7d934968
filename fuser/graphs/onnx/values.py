"""What is known of an ONNX value before run time: the result of one node, and inferred shapes.

Nodes that move data or round once per element give the same bits in numpy as in any runtime, so the reference
evaluator computes them.  For the others the last bit depends on who computes, so the runtime that will run the
model is asked.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TensorShapeProto,
    TypeProto,
    helper,
    numpy_helper,
)

from fuser.graph import Array, Dim

Shape = tuple[Dim, ...]

_SAME_BITS_EVERYWHERE = frozenset(
    """
    Abs Add And Cast CastLike Ceil Compress Concat ConstantOfShape Div Equal Expand Flatten Floor
    Gather GatherElements GatherND Greater GreaterOrEqual Identity Less LessOrEqual Max Min Mul Neg
    NonZero Not OneHot Or Pad Reshape ScatterElements ScatterND Shape Sign Size Slice Split Sqrt
    Squeeze Sub Tile Transpose Trilu Unsqueeze Where Xor
    """.split()
)
_NEEDS_THE_RUNTIME = frozenset(
    """
    ArgMax ArgMin Atan AveragePool BatchNormalization BitShift Clip Conv ConvTranspose Cos CumSum DepthToSpace
    Einsum Elu Erf Exp EyeLike Gelu Gemm GlobalAveragePool HardSigmoid HardSwish InstanceNormalization IsInf IsNaN
    LayerNormalization LeakyRelu Log LogSoftmax MatMul MaxPool Mean Mod PRelu Pow Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Resize Round Selu
    Sigmoid Sin Softmax Softplus Softsign SpaceToDepth Sum Tan Tanh TopK
    """.split()
)
_SLOW_IN_NUMPY = frozenset("GatherElements GatherND ScatterElements ScatterND".split())
"""The reference evaluator goes through their elements one by one."""
EVALUABLE = _SAME_BITS_EVERYWHERE | _NEEDS_THE_RUNTIME
"""Operators of the default domain that are computed ahead: deterministic, and without subgraphs."""

MAX_ELEMENTS = 2**28
"""No value of more elements is computed ahead: a hostile `Expand` could ask for more memory than there is."""


class CannotEvaluate(Exception):
    """Why a node has no value ahead of run time, as one line."""


def evaluate(
    node: NodeProto, opset: int, inputs: Sequence[Array | None], declared: Sequence[Shape | None]
) -> list[Array | None]:
    """The outputs of `node` for known `inputs` (None: an optional input, or output, that is absent).

    declared: what shape inference says of the outputs; used to refuse an unreasonable size beforehand.

    Raises `CannotEvaluate`.
    """
    if node.op_type not in EVALUABLE:
        raise CannotEvaluate(f"{node.op_type} is not computed ahead of run time")
    if node.op_type == "NonZero" and any(array is not None and not array.ndim for array in inputs):
        raise CannotEvaluate("runtimes do not agree on the NonZero of a scalar")
    try:
        predicted = _predicted_shape(node, inputs)
    except (IndexError, TypeError, ValueError) as error:
        raise CannotEvaluate(f"{node.op_type} has operands that it cannot have") from error
    for shape in (*declared, predicted):
        if shape is not None and elements(shape) is not None and elements(shape) > MAX_ELEMENTS:  # type: ignore[operator]
            raise CannotEvaluate(f"{node.op_type} would make {elements(shape):,} elements")
    feeds = {name: array for name, array in zip(node.input, inputs, strict=True) if array is not None}
    try:
        with np.errstate(all="ignore"):
            ways = [_in_runtime]
            if node.op_type in _SAME_BITS_EVERYWHERE:
                ways.insert(int(node.op_type in _SLOW_IN_NUMPY), _in_numpy)
            for way in ways[:-1]:
                with contextlib.suppress(Exception):  # what one does not know, or takes for another opset's
                    return way(node, opset, feeds)
            return ways[-1](node, opset, feeds)
    except Exception as error:  # any failure of a single node only means that it stays in the graph
        raise CannotEvaluate(f"{node.op_type} could not be computed: {str(error).splitlines()[0]}") from error


def _in_numpy(node: NodeProto, opset: int, feeds: Mapping[str, Array]) -> list[Array | None]:
    from onnx.reference import ReferenceEvaluator

    made = ReferenceEvaluator(node, opsets={"": opset}).run(None, dict(feeds))
    found = [np.asarray(y) if name else None for name, y in zip(node.output, made, strict=True)]
    if node.op_type in ("Cast", "CastLike") and not _is_exact(feeds[node.input[0]], found[0]):
        raise CannotEvaluate("what is lost is the runtime's choice: by way of float32, wrapped around, as text")
    return found


def _is_exact(before: Array, after: Array | None) -> bool:
    """Whether numbers are the same in another type."""
    if after is None or before.dtype.kind in "OSU" or after.dtype.kind in "OSU":
        return False
    with np.errstate(all="ignore"):
        back = after.astype(before.dtype)
    return back.tobytes() == before.tobytes()


def _in_runtime(node: NodeProto, opset: int, feeds: Mapping[str, Array]) -> list[Array | None]:
    import onnxruntime as ort

    graph = helper.make_graph(
        [node],
        "one_node",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output if name],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, 10)  # what older runtimes still read
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [name for name in node.output if name]
    made = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    return [np.asarray(made[name]) if name else None for name in node.output]


def _predicted_shape(node: NodeProto, inputs: Sequence[Array | None]) -> Shape | None:
    """The shape of a node that can make much out of little, where shape inference knew nothing."""
    known = [array for array in inputs if array is not None]
    if node.op_type == "ConstantOfShape":
        return tuple(int(size) for size in known[0])
    if node.op_type == "Expand":
        return tuple(max(1, int(size)) for size in known[1])
    if node.op_type == "Tile":
        return tuple(size * int(times) for size, times in zip(known[0].shape, known[1], strict=True))
    if node.op_type == "Range":
        start, limit, delta = (float(array) for array in known)
        return (max(0, math.ceil((limit - start) / delta)),) if delta else None
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Where", "Pow", "Max", "Min"):
        return np.broadcast_shapes(*(array.shape for array in known))
    return None


@lru_cache(maxsize=1 << 12)
def elements(shape: Shape) -> int | None:
    """How many elements; None when a dimension is not known."""
    if not all(isinstance(dim, int) for dim in shape):
        return None
    return math.prod(dim for dim in shape if isinstance(dim, int))


@cache
def numpy_dtype(element_type: int) -> np.dtype[Any] | None:
    """The dtype of an ONNX element type, from ml_dtypes where numpy has none; None for what has no size."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(element_type))
    except (KeyError, TypeError, ValueError):
        return None


def attribute_value(attribute: onnx.AttributeProto) -> Any:
    """The value a Constant node states in another attribute than `value`; None for a sparse one."""
    kinds: dict[str, Any] = {
        "value_float": lambda: np.float32(attribute.f),
        "value_floats": lambda: np.asarray(attribute.floats, np.float32),
        "value_int": lambda: np.int64(attribute.i),
        "value_ints": lambda: np.asarray(attribute.ints, np.int64),
        "value_string": lambda: np.asarray(attribute.s.decode(errors="replace"), object),
        "value_strings": lambda: np.asarray([s.decode(errors="replace") for s in attribute.strings], object),
    }
    make = kinds.get(attribute.name)
    return None if make is None else np.asarray(make())


def type_and_shape(info: onnx.ValueInfoProto) -> tuple[int, Shape | None]:
    """(element type, shape) of a tensor; (0, None) for sequences, maps and what is not stated."""
    return _type_and_shape(info.type.SerializeToString())


@lru_cache(maxsize=1 << 12)
def _type_and_shape(serialized: bytes) -> tuple[int, Shape | None]:
    """Many values of a model have the same type."""
    value = TypeProto.FromString(serialized)
    if not value.HasField("tensor_type"):
        return TensorProto.UNDEFINED, None
    tensor = value.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(map(_size, tensor.shape.dim))


def _size(dim: TensorShapeProto.Dimension) -> int | str | None:
    """Some exporters write -1 for a size that is not known."""
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param or None


def for_inference(
    model: ModelProto, nodes: Iterable[NodeProto], initializers: Iterable[TensorProto], *, trusts_declared: bool
) -> ModelProto:
    """A copy of the model as inference is to see it.

    nodes, initializers: those of the main graph as they are now; each node made before it is read, as inference goes
        through them once.
    trusts_declared: whether what is declared of values other than inputs is believed; but for names of sizes that may
        not be true: those of outputs are given by people, and runtimes only warn where they are not true.

    Every size of an input that is not known has a name of its own, so that it is known where it goes.
    """
    seen = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph, source = seen.graph, model.graph
    graph.name = source.name
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    graph.sparse_initializer.extend(source.sparse_initializer)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    doubtful = _doubtful_names(source)
    for info in graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if _size(dim) is None or dim.dim_param in doubtful:
                dim.dim_param = f"axis {axis} of {info.name}"
    if not trusts_declared:
        for body in _bodies(graph):
            del body.value_info[:]
        for info in graph.output:
            if info.type.HasField("tensor_type"):
                info.type.tensor_type.ClearField("shape")
        return seen
    graph.value_info.extend(source.value_info)
    names = [dim for info in graph.value_info for dim in info.type.tensor_type.shape.dim if dim.dim_param in doubtful]
    for dim in (*names, *(dim for info in graph.output for dim in info.type.tensor_type.shape.dim)):
        dim.ClearField("dim_param")
    return seen


def _doubtful_names(graph: GraphProto) -> set[str]:
    """Names that one input has twice, whatever the standard says of them: exporters and people call all that is
    dynamic "N", "dyn" or "?"."""
    return {name for info in graph.input for name, count in Counter(_names_of_sizes(info)).items() if count > 1}


def _names_of_sizes(info: onnx.ValueInfoProto) -> list[str]:
    return [dim.dim_param for dim in info.type.tensor_type.shape.dim if dim.dim_param]


def _bodies(graph: GraphProto) -> Iterator[GraphProto]:
    """The bodies of its nodes that inference looks into, and those inside them."""
    for node in graph.node:
        if node.op_type in _HAVE_BODIES:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    yield attribute.g
                    yield from _bodies(attribute.g)


_HAVE_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})


def are_worth_trusting(declared: Iterable[onnx.ValueInfoProto], inferred: Iterable[onnx.ValueInfoProto]) -> bool:
    """Whether what is declared of values says more than what was inferred, and nothing else.

    A file that was exported for one batch, and given a name for its size later, declares sizes that are not true.
    """
    declared = list(declared)
    names = {info.name for info in declared}
    found = {info.name: type_and_shape(info) for info in inferred if info.name in names}
    more = False
    for info in declared:
        told, (element_type, shape) = type_and_shape(info), found.get(info.name, (TensorProto.UNDEFINED, None))
        if told[0] and element_type and told[0] != element_type:
            return False
        if shape is None or told[1] is None:
            more |= told[1] is not None or not element_type
            continue
        if len(shape) != len(told[1]):
            return False
        for here, there in zip(told[1], shape, strict=True):
            if is_invented(there):
                more |= here is not None
            elif isinstance(here, int) and here != there:
                return False
    return more


def is_invented(size: Dim) -> bool:
    """Whether a size is not known, or only by a name that inference invented."""
    return size is None or (isinstance(size, str) and size.startswith("unk__"))


def infer_shapes(
    model: ModelProto,
    values: Mapping[str, Array] | None = None,
    shapes: Mapping[str, tuple[int, Shape]] | None = None,
) -> ModelProto:
    """The model with inferred value_info; the model itself where inference fails (it is only advice).

    values: what is known of the main graph, by name; inference takes it for constants.
    shapes: element types and shapes that are known.
    """
    try:
        stated = _with_known(model, values or {}, shapes or {}) if values or shapes else model
        return onnx.shape_inference.infer_shapes(stated, data_prop=True)
    except Exception:  # the C++ side raises its own types
        return model


def _with_known(model: ModelProto, values: Mapping[str, Array], shapes: Mapping[str, tuple[int, Shape]]) -> ModelProto:
    """A copy that states them: Constant nodes in the place of nodes with one output, and value_info."""
    stated = ModelProto()
    stated.CopyFrom(model)
    for node in stated.graph.node:
        if len(node.output) == 1 and node.output[0] in values:
            name = node.output[0]
            value = numpy_helper.from_array(values[name])
            node.CopyFrom(helper.make_node("Constant", [], [name], value=value))
    del stated.graph.value_info[:]
    kept = [info for info in model.graph.value_info if info.name not in shapes]
    stated.graph.value_info.extend(kept)
    stated.graph.value_info.extend(helper.make_tensor_value_info(name, *known) for name, known in shapes.items())
    return stated
