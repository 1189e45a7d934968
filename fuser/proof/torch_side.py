"""A torch model in a comparison: run in this process, without leaving a trace in it."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fuser.errors import InputError
from fuser.graphs.torch.copy import Copier
from fuser.proof import data, inputs
from fuser.proof.float64_torch import InFloat64, nudge, to_numpy, to_torch
from fuser.proof.inputs import InputSet, Sizes, Spec
from fuser.proof.outcome import Failure, Outcome, first_line
from fuser.proof.runners import Feeds
from fuser.proof.sides import OnnxSide, Probe, finite, longest_row


class Twice(tuple[Any, ...]):
    """Inputs for two calls in a row, of which the second one counts: the first may leave something behind."""


class TorchRunner:
    """A module in torch, evaluated as it stands: its mode, its state and the random state are left as they were.

    What a forward notes down otherwise (a counter, a list) is noted in a copy, which shares the tensors.
    """

    runtime = "torch"

    def __init__(self, module: torch.nn.Module, arguments: Arguments) -> None:
        self._module, self._arguments = Copier().module(module), arguments
        self.seconds = 0.0

    def returned(self) -> Any:
        """What the module returns for the examples, as it is."""
        return self._call(self._module, self._arguments.examples)

    def run(
        self, sets: Sequence[Feeds], *, optimize: bool = False, first: bool = False, seed: int = 0
    ) -> list[Outcome]:
        """See `Runner.run`; torch has no optimizer of its own to switch.  seed: of what the module draws."""
        started = time.perf_counter()
        outcomes = [self._run(self._module, values, seed=seed) for values in (sets[:1] if first else sets)]
        self.seconds = time.perf_counter() - started
        return outcomes

    def truth(self, sets: Sequence[Feeds], nudges: Sequence[int | None] = (None,)) -> list[list[Outcome]]:
        """See `Runner.truth`."""
        answers: list[list[Outcome]] = []
        for seed in nudges:
            try:
                wide = copy.deepcopy(self._module).double()
                if seed is not None:
                    nudge(wide, {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}, seed)
            except Exception as error:
                answers.append([Failure("unsupported", f"no float64 copy: {first_line(error)}")] * len(sets))
                continue
            answers.append([self._run(wide, values, wide=True) for values in sets])
        return answers

    def _run(self, module: torch.nn.Module, values: Feeds, *, wide: bool = False, seed: int = 0) -> Outcome:
        try:
            leaves = pytree.tree_leaves(self._call(module, values, wide=wide, seed=seed))
            return [to_numpy(leaf) if isinstance(leaf, torch.Tensor) else _scalar(leaf) for leaf in leaves]
        except Exception as error:
            return Failure("refused", first_line(error))

    def _call(self, module: torch.nn.Module, values: Feeds, *, wide: bool = False, seed: int = 0) -> Any:
        calls = [self._arguments.call(values, wide) for _ in range(2 if isinstance(values, Twice) else 1)]
        with torch.no_grad(), torch.random.fork_rng(), torch.autocast("cpu", enabled=False), _undisturbed(module):
            torch.manual_seed(seed)
            with _in_float64() if wide else contextlib.nullcontext():
                return [module(*args, **kwargs) for args, kwargs in calls][-1]


class Arguments:
    """The structure of a module's arguments; its tensors are the inputs of a comparison."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._leaves, self._structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        paths, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        places = [pytree.keystr(path) for path, leaf in paths if isinstance(leaf, torch.Tensor)]
        self.names = [f"{'args' if place.startswith('[0]') else 'kwargs'}{place[3:]}" for place in places]
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        self.examples = [to_numpy(tensor) for tensor in self.tensors]

    def call(self, values: Feeds, wide: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments that hold `values`."""
        remaining = iter([to_torch(v, like) for v, like in zip(values, self.tensors, strict=True)])
        leaves = [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        if wide:
            leaves = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return args, kwargs


class TorchSide:
    """A module, a GraphModule or an ExportedProgram."""

    is_seeded = True
    size = 0
    overridable: Sequence[str] = ()

    def __init__(self, model: torch.nn.Module | torch.export.ExportedProgram, arguments: Arguments) -> None:
        module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
        self.arguments = arguments
        self.terms = longest_row(tensor.shape for tensor in (*module.parameters(), *module.buffers()))
        self.runner: Any = TorchRunner(module, arguments)
        # The outputs are known once it has been run on the examples.
        example = self.runner.run([arguments.examples])[0]
        if isinstance(example, Failure):
            raise InputError(f"the module cannot be run on the example inputs: {example}")
        self.returned = self.runner.returned()
        self.output_names = _output_names(self.returned)
        self._sizes: list[tuple[str, list[tuple[int, ...]]]] = []
        if isinstance(model, torch.export.ExportedProgram):
            self._sizes = _other_sizes(model, arguments.examples)
        self._keeps_state = False

    def is_random(self) -> bool:
        """See `Side.is_random`: told by two seeds."""
        one, other = (self.runner.run([self.arguments.examples], seed=seed)[0] for seed in (0, 1))
        if isinstance(one, Failure) or isinstance(other, Failure):
            return False  # it ran before; what fails now and then is no matter of chance
        return any(not np.array_equal(x, y) for x, y in zip(one, other, strict=True))

    def lost_by(self, after: Any) -> list[str]:
        """See `Side.lost_by`: the structure of what is returned, and each tensor's kind."""
        if not isinstance(after, TorchSide):
            return []
        old, new = pytree.tree_structure(self.returned), pytree.tree_structure(after.returned)
        if old != new:
            return [f"it returns {new} instead of {old}"]
        return [
            problem
            for name, was, now in zip(
                self.output_names, pytree.tree_leaves(self.returned), pytree.tree_leaves(after.returned), strict=True
            )
            for problem in _differences(name, was, now)
        ]

    def cannot_pair(self, after: Any) -> str:
        """See `Side.cannot_pair`.  Also tells what the other one allows and does, too."""
        if isinstance(after, TorchSide):
            self._sizes, self._keeps_state = self._sizes or after._sizes, True
        if len(after.output_names) != len(self.output_names):
            return f"it has {len(after.output_names)} outputs instead of {len(self.output_names)}"
        if isinstance(after, OnnxSide) and len(after.input_names) != len(self.arguments.names):
            return f"it has {len(after.input_names)} inputs instead of {len(self.arguments.names)}"
        return ""

    def paired(self, after: Any, outputs: list[Any]) -> list[Any]:
        """See `Side.paired`: by order."""
        return outputs

    def given(self, source: Any) -> list[InputSet]:
        """See `Side.given`."""
        specs = [
            Spec(name, example.dtype, ["?"] * example.ndim)
            for name, example in zip(self.arguments.names, self.arguments.examples, strict=True)
        ]
        return data.given(source, specs)

    def probe(self, seed: int) -> Probe:
        """See `Side.probe`: the example inputs are known to fit."""
        self.runner.run([self.arguments.examples])
        return Probe({}, self.runner.seconds)

    def more(self, sizes: Sizes, seed: int, number: int) -> list[InputSet]:
        """See `Side.more`: the examples, and others like them, of other sizes where these are open."""
        examples = self.arguments.examples
        sets = [InputSet("the example inputs", tuple(examples))]
        for label, shapes in self._sizes:
            resized = [np.resize(array, shape) for array, shape in zip(examples, shapes, strict=True)]
            sets.append(InputSet(label, inputs.vary(resized, "normal", seed).values))
        order = ("normal", "large", "zeros", "negative", "small", "unit")
        sets += [inputs.vary(examples, kind, seed + index) for index, kind in enumerate(order)]
        if self._keeps_state:
            sets.append(InputSet("the example inputs, given twice", Twice(examples)))
        return sets[: max(number, 2)]

    def stand_in(self, failure: Failure) -> bool:
        """See `Side.stand_in`: torch runs every module it knows."""
        return False

    def is_finite(self, outputs: list[Any]) -> bool:
        """See `Side.is_finite`."""
        return finite(outputs)

    def output_dtype(self, name: str, output: Any) -> Any:
        """See `Side.output_dtype`."""
        return output.dtype


def _other_sizes(
    program: torch.export.ExportedProgram, examples: Sequence[Any]
) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Shapes of all inputs where each size that the program leaves open is another one than in the examples; in words.

    Nothing where no size is open, or they depend on each other in ways that leave no others.
    """
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    values = [placeholders.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    if [len(shape) for shape in shapes] != [array.ndim for array in examples]:
        return []
    found: list[tuple[str, list[tuple[int, ...]]]] = []
    for step in (1, -1):
        sizes: dict[Any, int] = {}
        for shape, array in zip(shapes, examples, strict=True):
            for dim, size in zip(shape, array.shape, strict=True):
                if isinstance(dim, torch.SymInt) and dim.node.expr.is_symbol:
                    sizes.setdefault(dim.node.expr, size + step * (1 + len(sizes)))
        ranges = program.range_constraints
        if not sizes or any(size < 1 or s not in ranges or size not in ranges[s] for s, size in sizes.items()):
            continue
        others = [tuple(_size(dim, sizes) for dim in shape) for shape in shapes]
        if all(size > 0 for shape in others for size in shape):
            told = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
            found.append((f"normal ({told})", others))
    return found


def _size(dim: Any, sizes: Mapping[Any, int]) -> int:
    """0 for what is no whole number."""
    if not isinstance(dim, torch.SymInt):
        return int(dim)
    size = dim.node.expr.subs(sizes)
    return int(size) if size.is_integer and size.is_number else 0


def arguments_for(
    models: Sequence[Any], example_inputs: Sequence[Any] | None, example_kwargs: Mapping[str, Any] | None
) -> Arguments:
    """The arguments that were given or, where none were, those that one of the models carries.

    Raises `InputError` where there are none.
    """
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise InputError(f"example_inputs is a tuple of positional arguments, not a {type(example_inputs).__name__}")
    if example_inputs is not None or example_kwargs is not None:
        return Arguments(example_inputs or (), example_kwargs or {})
    for model in models:
        if isinstance(model, torch.export.ExportedProgram) and model.example_inputs is not None:
            return Arguments(*model.example_inputs)
        if isinstance(model, torch.fx.GraphModule) and (found := _from_metadata(model)) is not None:
            return Arguments(found, {})
    names = " and ".join({type(model).__name__: None for model in models if isinstance(model, torch.nn.Module)})
    raise InputError(f"a {names} says nothing of its inputs: give example_inputs=(x, ...), as for its call")


def _from_metadata(module: torch.fx.GraphModule) -> tuple[Any, ...] | None:
    """Inputs of the shapes that torch.export noted at the placeholders."""
    examples: list[Any] = []
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
            return None
        generator = torch.Generator().manual_seed(0)
        floating = value.dtype.is_floating_point
        examples.append(
            torch.randn(value.shape, generator=generator).to(value.dtype)
            if floating
            else torch.zeros(value.shape, dtype=value.dtype)
        )
    return tuple(examples)


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """The mode of that name, which no compiler can see through: `torch.cond` and its like call one of their own accord.

    They have done so before, on the examples; a compiler that is not loaded by now is none that has to be held back.
    """
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with eager, InFloat64():  # type: ignore[no-untyped-call]
        yield


@contextlib.contextmanager
def _undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Restore what a module may write at a call: buffers, and tensors that it merely holds."""
    saved = [
        (holder, name, tensor, tensor.clone())
        for part in module.modules()
        for holder in (part._buffers, vars(part))
        for name, tensor in holder.items()
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided  # others cannot be compared
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for holder, name, tensor, was in saved:
                holder[name] = tensor
                if not torch.equal(tensor, was):
                    tensor.copy_(was)


def _output_names(returned: Any) -> list[str]:
    paths, _ = pytree.tree_flatten_with_path(returned)
    return [f"output{pytree.keystr(path)}" for path, _ in paths]


def _differences(name: str, was: Any, now: Any) -> Iterator[str]:
    if isinstance(was, torch.Tensor) != isinstance(now, torch.Tensor):
        yield f"{name}: it was a {type(was).__name__} and is a {type(now).__name__}"
    elif isinstance(was, torch.Tensor):
        for what in ("dtype", "shape", "device"):
            if getattr(was, what) != getattr(now, what):
                yield f"{name}: its {what} was {getattr(was, what)} and is {getattr(now, what)}"


def _scalar(value: Any) -> Any:
    return None if value is None else np.asarray(value)
