"""Small ONNX models for the tests, written in ONNX's own text format where that is clearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

RNG = np.random.default_rng(20)

Tensors = Mapping[str, np.ndarray]


def model(
    nodes: Sequence[NodeProto],
    *,
    x: Sequence[int | str] = ("N", 4, 8, 8),
    outputs: Sequence[str] = ("y",),
    constants: Tensors | None = None,
    opset: int = 17,
    ir_version: int = 8,
    dtype: int = onnx.TensorProto.FLOAT,
    also_inputs: Sequence[str] = (),
    **extra: object,
) -> ModelProto:
    """A model with the input `x`; `also_inputs` names constants that are listed as graph inputs too."""
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()]
    inputs = [helper.make_tensor_value_info("x", dtype, list(x))]
    inputs += [
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors if t.name in also_inputs
    ]
    results = [helper.make_tensor_value_info(name, dtype, None) for name in outputs]
    graph = helper.make_graph(list(nodes), "g", inputs, results, tensors)
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)],
        ir_version=ir_version,
        **extra,
    )
    inferred = onnx.shape_inference.infer_shapes(proto).graph.output
    for output, found in zip(proto.graph.output, inferred, strict=True):
        output.CopyFrom(found)  # the checker asks for a shape
        if not output.type.tensor_type.HasField("shape"):
            output.type.tensor_type.shape.CopyFrom(proto.graph.input[0].type.tensor_type.shape)
    return proto


def conv_constants(cin: int = 4, cout: int = 4, kernel: int = 3, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """A weight `w` and the four parameters of a BatchNorm."""
    return {
        "w": RNG.standard_normal((cout, cin, kernel, kernel)).astype(dtype),
        "gamma": RNG.uniform(0.5, 1.5, cout).astype(dtype),
        "beta": RNG.standard_normal(cout).astype(dtype),
        "mean": RNG.standard_normal(cout).astype(dtype),
        "var": RNG.uniform(0.5, 1.5, cout).astype(dtype),
    }


def conv(source: str = "x", target: str = "c", weight: str = "w", *bias: str, **attributes: object) -> NodeProto:
    return helper.make_node("Conv", [source, weight, *bias], [target], name=f"conv_{target}", **attributes)


def batch_norm(source: str = "c", target: str = "y", *, outputs: Sequence[str] = (), **attributes: object) -> NodeProto:
    return helper.make_node(
        "BatchNormalization",
        [source, "gamma", "beta", "mean", "var"],
        [target, *outputs],
        name=f"bn_{target}",
        **attributes,
    )


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attributes: object) -> NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), name=f"{op.lower()}_{outputs[0]}", **attributes)


def body(nodes: Sequence[NodeProto], outputs: Sequence[str], constants: Tensors | None = None) -> onnx.GraphProto:
    """A branch of an If."""
    return helper.make_graph(
        list(nodes),
        "body",
        [],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()],
    )


def op_types(graph: onnx.GraphProto) -> list[str]:
    return [n.op_type for n in graph.node]
