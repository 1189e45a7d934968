"""The two models of a comparison, each with what is known of its inputs and outputs and a way to run it."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import onnx

from fuser import files
from fuser.errors import InputError
from fuser.files.tensors import FORMATS
from fuser.isolate import Worker
from fuser.onnx_objects import is_in_memory
from fuser.proof import data, inputs
from fuser.proof.inputs import InputSet, Sizes, Spec
from fuser.proof.interface import compare_onnx, public_inputs
from fuser.proof.outcome import Failure
from fuser.proof.rounding import is_float
from fuser.proof.runners import Float64Runner, OnnxRunner, Runner, as_path

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}

_OVERRIDING = 4
"""The IR version from which on an initializer that is also an input may be overridden."""
_MOST_OVERRIDDEN = 1 << 24
"""Elements, at most, that are given in place of defaults."""


@dataclass
class Probe:
    """The first input set that the original accepted, and the seconds that loading and running it took."""

    sizes: Sizes
    seconds: float


class Side(Protocol):
    """A model in a comparison.

    output_names: names of the outputs, in order.
    runner: how it is run.
    is_seeded: whether two models that draw alike draw the same numbers.
    size: the elements of its constants.
    terms: products in its longest sum, as far as the weights tell.
    overridable: inputs with a default that both models have.
    """

    output_names: list[str]
    runner: Any
    is_seeded: bool
    size: int
    terms: int
    overridable: Any

    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        ...

    def lost_by(self, after: Any) -> list[str]:
        """What of this model's interface the other lacks."""
        ...

    def cannot_pair(self, after: Any) -> str:
        """Why inputs and outputs of the two do not correspond; empty when they do."""
        ...

    def paired(self, after: Any, outputs: list[Any]) -> list[Any]:
        """The other model's outputs in this model's order."""
        ...

    def given(self, source: Any) -> list[InputSet]:
        """The user's own inputs."""
        ...

    def probe(self, seed: int) -> Probe:
        """Find sizes that the model accepts; raises `InputError` where none are found."""
        ...

    def more(self, sizes: Sizes, seed: int, number: int) -> list[InputSet]:
        """`number` input sets of several kinds and sizes."""
        ...

    def stand_in(self, failure: Failure) -> bool:
        """Whether `runner` has been replaced, because the runtime cannot run the model at all."""
        ...

    def is_finite(self, outputs: list[Any]) -> bool:
        """Whether outputs are free of NaN and infinity."""
        ...

    def output_dtype(self, name: str, output: Any) -> Any:
        """The type to which an output is rounded, which its float64 evaluation no longer shows."""
        ...


class OnnxSide:
    """An ONNX model."""

    is_seeded = False  # the seed that a runtime chooses for a node depends on the other nodes

    def __init__(
        self,
        model: files.ModelFile,
        path: str,
        worker: Worker,
        timeout: float,
        input_shapes: Mapping[str, Sequence[int]] | None,
        removed: Collection[str],
    ) -> None:
        graph = model.proto.graph
        self.model, self.path = model, path
        self.input_names = [value.name for value in public_inputs(graph)]
        self.default_names = [value.name for value in graph.input if value.name not in set(self.input_names)]
        self.overridable: list[str] = []
        self.output_names = [value.name for value in graph.output]
        self.size = sum(math.prod(tensor.dims) for tensor in graph.initializer)
        self.terms = longest_row(tensor.dims for tensor in graph.initializer)
        self.runner: Runner = OnnxRunner(path, [*self.input_names, *self.default_names], worker, timeout)
        self._dtypes = {
            value.name: FORMATS[value.type.tensor_type.elem_type].dtype
            for value in graph.output
            if value.type.tensor_type.elem_type in FORMATS
        }
        self._removed, self._shapes = removed, input_shapes
        self._worker, self._timeout = worker, timeout
        self._specs: list[Spec] | None = None

    @property
    def specs(self) -> list[Spec]:
        """What the inputs must look like; raises `InputError` for one that cannot be generated."""
        if self._specs is None:
            self._specs = inputs.specs_of(self.model, self._shapes)
        return self._specs

    def is_random(self) -> bool:
        """See `Side.is_random`: without a seed of its own."""
        proto = self.model.proto
        nodes = [node for graph in (proto.graph, *proto.functions) for node in _nodes(graph)]
        unseeded = [node for node in nodes if all(attribute.name != "seed" for attribute in node.attribute)]
        if any(node.op_type in _RANDOM for node in unseeded):
            return True
        modes = {node.input[2] for node in unseeded if node.op_type == "Dropout" and len(node.input) > 2} - {""}
        stored = {name: a.t for node in nodes for a in node.attribute if a.name == "value" for name in node.output}
        stored |= {tensor.name: tensor for tensor in proto.graph.initializer}
        return any(mode not in stored or self.model.array(stored[mode]).any() for mode in modes)

    def lost_by(self, after: Any) -> list[str]:
        """See `Side.lost_by`."""
        return compare_onnx(self.model.proto, after.model.proto, self._removed) if isinstance(after, OnnxSide) else []

    def cannot_pair(self, after: Any) -> str:
        """See `Side.cannot_pair`.  Also tells the other runner which input is which."""
        if len(after.output_names) != len(self.output_names):
            return f"it has {len(after.output_names)} outputs instead of {len(self.output_names)}"
        if isinstance(after, OnnxSide):
            return self._pair(after)
        theirs, mine = len(after.arguments.names), len(self.input_names)
        return "" if theirs == mine else f"it has {theirs} inputs instead of {mine}"

    def _pair(self, after: OnnxSide) -> str:
        required = set(after.input_names)
        if not set(self.input_names) <= required and len(required) == len(self.input_names):
            return ""  # renamed: the interface says so, and the order tells which is which
        mine = [*self.input_names, *self.default_names]
        if unknown := required - set(mine):
            return f"it needs an input {min(unknown)!r} that the original does not have"
        theirs = required | set(after.default_names)
        names = [name if name in theirs else None for name in mine]
        after.runner = OnnxRunner(after.path, names, self._worker, self._timeout)
        if self.model.proto.ir_version >= _OVERRIDING and not required & set(self.default_names):
            self.overridable = [name for name in self.default_names if name in theirs and name not in self._removed]
        return ""

    def paired(self, after: Any, outputs: list[Any]) -> list[Any]:
        """See `Side.paired`: by name where the names are the same."""
        if isinstance(after, OnnxSide) and set(after.output_names) == set(self.output_names):
            by_name = dict(zip(after.output_names, outputs, strict=True))
            return [by_name[name] for name in self.output_names]
        return outputs

    def given(self, source: Any) -> list[InputSet]:
        """See `Side.given`."""
        return data.given(source, self.specs)

    def probe(self, seed: int) -> Probe:
        """See `Side.probe`.  A runtime that cannot run the model at all is replaced by the float64 evaluation."""
        failure: Failure | None = None
        for specs, candidates in self._attempts():
            sets = [inputs.generate(specs, sizes, "normal", seed).values for sizes in candidates]
            outcomes = self.runner.run(sets, first=True)
            if not isinstance(outcomes[-1], Failure):
                self._specs = specs
                return Probe(candidates[len(outcomes) - 1], self.runner.seconds)
            failure = outcomes[-1]
            if self.stand_in(failure):
                return self.probe(seed)
            if failure.kind != "refused":
                return Probe(candidates[0], 0.0)  # no other input would change that
        raise inputs.refused(self.specs, str(failure))

    def stand_in(self, failure: Failure) -> bool:
        """See `Side.stand_in`."""
        if failure.kind == "refused" or isinstance(self.runner, Float64Runner):
            return False
        self.runner = Float64Runner(self.runner, str(failure))
        return True

    def _attempts(self) -> Iterator[tuple[list[Spec], list[Sizes]]]:
        """Specs and sizes to try: the likeliest alone, then the others together."""
        ranks = (4, 2, 3, 1, 5) if inputs.unknown_rank(self.specs) else (0,)
        for rank in ranks:
            specs = inputs.with_rank(self.specs, rank)
            sizes = inputs.base_sizes(specs)
            yield specs, sizes[:1]
            if sizes[1:]:
                yield specs, sizes[1:]

    def more(self, sizes: Sizes, seed: int, number: int) -> list[InputSet]:
        """See `Side.more`: the most telling first; other sizes and other kinds in turn."""
        others = [(other, "normal") for other in inputs.more_sizes(self.specs, sizes)]
        kinds = [(sizes, kind) for kind in inputs.KINDS[1:]] if self.specs else []
        turns = [one for pair in zip_longest(others, kinds) for one in pair if one]
        plan = enumerate([(sizes, "normal"), *turns][:number])
        sets = [inputs.generate(self.specs, which, kind, seed + index) for index, (which, kind) in plan]
        return [*sets, *self._overriding(sets[0], seed)]

    def _overriding(self, one: InputSet, seed: int) -> Iterator[InputSet]:
        """The same inputs with other values for those that have a default: a caller may give them."""
        if not self.overridable:
            return
        names = set(self.overridable)
        changed = [tensor for tensor in self.model.proto.graph.initializer if tensor.name in names]
        if not changed or sum(math.prod(tensor.dims) for tensor in changed) > _MOST_OVERRIDDEN:
            return
        rng = np.random.default_rng(seed)
        values: dict[str, Any] = {}
        for tensor in changed:
            default = self.model.array(tensor)
            if is_float(default.dtype):  # integers may be shapes
                values[tensor.name] = (default * rng.uniform(1, 1.5, default.shape)).astype(default.dtype)
        if values:
            given = tuple(values.get(name) for name in self.default_names)
            yield InputSet(f"{one.label}, other values for inputs with a default", (*one.values, *given))

    def is_finite(self, outputs: list[Any]) -> bool:
        """See `Side.is_finite`."""
        return finite(outputs)

    def output_dtype(self, name: str, output: Any) -> Any:
        """See `Side.output_dtype`."""
        if not isinstance(self.runner, Float64Runner):
            return output.dtype
        return self._dtypes.get(name, output.dtype)


def longest_row(shapes: Iterable[Sequence[int]]) -> int:
    """The most elements that a row of a weight has: what makes one output channel, [Cout, Cin/groups, *kernel]."""
    return max((math.prod(shape[1:]) for shape in shapes if len(shape) > 1), default=0)


def finite(outputs: list[Any]) -> bool:
    """Whether all floating point values are finite."""
    arrays = [array for value in outputs for array in (value if isinstance(value, list) else [value])]
    return all(
        bool(np.isfinite(array.astype(np.float64)).all())
        for array in arrays
        if isinstance(array, np.ndarray) and is_float(array.dtype)
    )


class Original:
    """What is found once of an ONNX model that many others are compared with, on the same inputs.

    side: the model, opened.
    found: its inputs, outputs and truths, by what they depend on.
    stack: closes it.
    """

    def __init__(self) -> None:
        self.side: OnnxSide | None = None
        self.found: dict[Any, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Original:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def open_sides(
    stack: ExitStack,
    worker: Worker,
    before: Any,
    after: Any,
    *,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
    timeout: float,
    removed_inputs: Collection[str],
    original: Original | None = None,
) -> tuple[Any, Any]:
    """Both models, opened; `stack` closes them.  What `original` holds is not opened again."""

    sides: list[Any] = [original.side if original else None, None]
    for index, model in enumerate((before, after)):
        if sides[index] is not None:
            continue
        if is_onnx(model):
            file, path = _open_onnx(original.stack if original and not index else stack, model)
            sides[index] = OnnxSide(file, path, worker, timeout, input_shapes, removed_inputs)
            if original and not index:
                original.side = sides[index]
        elif not any(kind.__module__.split(".")[0] == "torch" for kind in type(model).__mro__):
            raise InputError(
                f"cannot verify a {type(model).__module__}.{type(model).__qualname__}; give the path of an .onnx file, "
                "an onnx.ModelProto, a gs.Graph, an onnx_ir.Model, a torch.onnx.ONNXProgram, a torch.nn.Module, "
                "a torch.fx.GraphModule or an ExportedProgram"
            )
    if None in sides:
        from fuser.proof.torch_side import TorchSide, arguments_for

        arguments = arguments_for((before, after), example_inputs, example_kwargs)
        sides = [side or TorchSide(model, arguments) for side, model in zip(sides, (before, after), strict=True)]
    return sides[0], sides[1]


def is_onnx(model: Any) -> bool:
    """Whether `model` is a path or an ONNX model in memory."""
    return isinstance(model, (str, os.PathLike)) or is_in_memory(model)


def _open_onnx(stack: ExitStack, model: Any) -> tuple[files.ModelFile, str]:
    path = stack.enter_context(as_path(model))
    return files.load(path), path


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                yield from _nodes(body)
