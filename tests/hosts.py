"""The hosts that one specification runs on: each turns a module into a graph and a graph into numbers."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from hosts_torch import Decomposed, Exported, Lifted, Traced
from torch import nn

from fuser.files import ModelFile
from fuser.graphs.onnx.graph import OnnxGraph


class Onnx:
    """A module exported to ONNX with its BatchNorms, run by ONNX Runtime without its own optimizer."""

    def build(self, module: nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> OnnxGraph:
        return OnnxGraph(ModelFile.from_proto(exported(module, example_inputs)))

    def result(self, graph: OnnxGraph) -> onnx.ModelProto:
        return graph.to_model().to_proto()

    def run(self, result: Any, *inputs: torch.Tensor) -> np.ndarray:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(result.SerializeToString(), options)
        names = [value.name for value in session.get_inputs()]
        return np.asarray(session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))[0])


def exported(module: nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """The raw export: nothing folded, by the quick exporter that needs no tracing through torch.export."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example_inputs,
            buffer,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=17,
        )
    return onnx.load_from_string(buffer.getvalue())


HOSTS = (Onnx, Traced, Exported, Lifted, Decomposed)
