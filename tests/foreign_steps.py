"""Optimizers as other people might write them, for `then`."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import onnx


def drops_relu(source: str, target: str) -> None:
    """Wrong: it changes the function."""
    model = onnx.load(source)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    before = next(node for node in model.graph.node if node.output[0] == relu.input[0])
    before.output[0] = relu.output[0]
    model.graph.node.remove(relu)
    onnx.save(model, target)


def drops_identity(source: str, target: str) -> None:
    """Right, but careless with metadata."""
    model = onnx.load(source)
    identity = next(node for node in model.graph.node if node.op_type == "Identity")
    for node in model.graph.node:
        node.input[:] = [identity.input[0] if name == identity.output[0] else name for name in node.input]
    model.graph.node.remove(identity)
    del model.metadata_props[:], model.opset_import[1:]
    model.doc_string = model.producer_name = ""
    onnx.save(model, target)


def renames_the_input(source: str, target: str) -> None:
    """Right numbers, another interface."""
    model = onnx.load(source)
    model.graph.input[0].name = "renamed"
    for node in model.graph.node:
        node.input[:] = ["renamed" if name == "x" else name for name in node.input]
    model.graph.node.add(op_type="Neg", input=["renamed"], output=["unused"])
    onnx.save(model, target)


def renames_the_initializers(source: str, target: str) -> None:
    """Right, if of no use; it shows in the node that it adds."""
    model = onnx.load(source)
    graph = model.graph
    names = {tensor.name: f"new_{tensor.name}" for tensor in graph.initializer}
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    graph.node[-1].output[0] = "last"
    graph.node.add(op_type="Identity", input=["last"], output=[graph.output[0].name])
    onnx.save(model, target)


def copies(source: str, target: str) -> None:
    onnx.save(onnx.load(source), target)


def dies(source: str, target: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(source: str, target: str) -> None:
    time.sleep(60)


def raises(source: str, target: str) -> None:
    np.zeros(2).reshape(3)


def writes_nothing(source: str, target: str) -> None:
    pass


def writes_rubbish(source: str, target: str) -> None:
    with open(target, "wb") as file:
        file.write(b"\x08")
