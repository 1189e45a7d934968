"""The torch dialects as hosts: each turns a module into a graph, and a result into numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fuser.graphs.torch.graph import TorchGraph

Inputs = tuple[torch.Tensor, ...]


class Traced:
    """A module traced with `torch.fx`: call_module nodes, and no shapes."""

    def build(self, module: nn.Module, example_inputs: Inputs) -> TorchGraph:
        return TorchGraph.from_module(module)

    def result(self, graph: TorchGraph) -> Any:
        return graph.result()

    def run(self, result: Any, *inputs: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(result(*inputs))


class Exported(Traced):
    """An exported GraphModule: ATen operators, parameters read by get_attr."""

    def build(self, module: nn.Module, example_inputs: Inputs) -> TorchGraph:
        return TorchGraph.from_graph_module(torch.export.export(module, example_inputs).module())


class Lifted(Traced):
    """An ExportedProgram: ATen operators, parameters as inputs of the graph."""

    def build(self, module: nn.Module, example_inputs: Inputs) -> TorchGraph:
        return TorchGraph.from_exported_program(torch.export.export(module, example_inputs))

    def result(self, graph: TorchGraph) -> torch.export.ExportedProgram:
        program = graph.result()
        program.validate()
        return program

    def run(self, result: Any, *inputs: torch.Tensor) -> np.ndarray:
        return super().run(result.module(), *inputs)


class Decomposed(Lifted):
    """An ExportedProgram in core ATen: `convolution`, `addmm`, a BatchNorm with three outputs."""

    def build(self, module: nn.Module, example_inputs: Inputs) -> TorchGraph:
        program = torch.export.export(module, example_inputs).run_decompositions()
        return TorchGraph.from_exported_program(program)


HOSTS = (Traced, Exported, Lifted, Decomposed)
