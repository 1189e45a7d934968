"""The two things a torch graph can live in, and how each of them holds constants.

A `GraphModule` registers them and reads them by `get_attr`.  An `ExportedProgram` lifts them: each is a
placeholder, an entry in the graph signature and an entry in the state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument

from fuser.graphs.torch.copy import Copier


class Carrier(Protocol):
    """Where the constants of the outermost graph are kept."""

    module: fx.GraphModule

    def target(self, node: fx.Node) -> str | None:
        """The name under which the constant that this node stands for is stored; None for other nodes."""
        ...

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The constant this node stands for; None for other nodes."""
        ...

    def names(self) -> Iterator[str]:
        """Every name that is taken."""
        ...

    def add(self, name: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
        """Register a new constant under a name that is free, and read it by a new node."""
        ...

    def drop(self, nodes: Collection[fx.Node], targets: Collection[str]) -> None:
        """Forget the constants of `nodes`, which are out of the graph, and the modules at `targets`, unless
        another node needs them."""
        ...

    def replaced(self, node: fx.Node, by: fx.Node) -> None:
        """`node` is about to go, and `by` takes its place wherever it is named."""
        ...

    def is_named(self, node: fx.Node) -> bool:
        """Whether the model names the node, so that it must stay even if nobody reads it."""
        ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every constant that is stored."""
        ...

    def result(self) -> Any:
        """The finished model."""
        ...


class ModuleCarrier:
    """A GraphModule of our own."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def target(self, node: fx.Node) -> str | None:
        return str(node.target) if self.tensor(node) is not None else None

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        value = attribute(self.module, str(node.target)) if node.op == "get_attr" else None
        return value if isinstance(value, torch.Tensor) else None

    def names(self) -> Iterator[str]:
        return registered_names(self.module)

    def add(self, name: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self.module
        for atom in path.split(".") if path else ():
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module().train(self.module.training))
            child = owner._modules[atom]
            assert child is not None
            owner = child
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
        with self.module.graph.inserting_before(before):
            return self.module.graph.get_attr(name)

    def drop(self, nodes: Collection[fx.Node], targets: Collection[str]) -> None:
        gone = {str(node.target) for node in nodes} | set(targets)
        if not gone:
            return
        used: set[str] = set()
        needed: set[str] = set()
        for node in self.module.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                used.add(node.target)
                atoms = node.target.split(".")
                needed.update(".".join(atoms[: i + 1]) for i in range(len(atoms)))
        for target in gone:
            if target not in needed and not any(_ancestors(target, used)):
                self._delete(target)

    def _delete(self, target: str) -> None:
        """Delete what is at `target`, and the plain containers that this leaves empty."""
        path, _, leaf = target.rpartition(".")
        try:
            owner = self.module.get_submodule(path)
        except AttributeError:
            return  # with a module above it
        for registry in (owner._parameters, owner._buffers, owner._modules, owner.__dict__):
            registry.pop(leaf, None)
        is_empty = not (owner._parameters or owner._buffers or owner._modules)
        if path and type(owner) is nn.Module and is_empty:
            self._delete(path)

    def replaced(self, node: fx.Node, by: fx.Node) -> None:
        """A GraphModule does not name its values."""

    def is_named(self, node: fx.Node) -> bool:
        return False

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()

    def result(self) -> fx.GraphModule:
        self.module.recompile()
        return self.module


def _ancestors(target: str, used: Collection[str]) -> Iterator[str]:
    """The modules in `used` that hold `target`."""
    atoms = target.split(".")
    paths = (".".join(atoms[:i]) for i in range(1, len(atoms)))
    return (path for path in paths if path in used)


class ProgramCarrier:
    """An ExportedProgram: its graph, signature, state dict and constants, all copies of our own."""

    def __init__(self, program: ExportedProgram) -> None:
        copier = Copier()
        self._program = program
        self.module = copier.module(program.graph_module)
        signature = program.graph_signature
        self._specs = dict(zip(_placeholders(self.module.graph), signature.input_specs, strict=True))
        self._state = {name: copier.tensor(tensor) for name, tensor in program.state_dict.items()}
        self._constants = {
            name: copier.tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in program.constants.items()
        }
        self._mutated = {spec.target for spec in signature.output_specs if spec.target is not None}
        self._calls = copy.deepcopy(program.module_call_graph)
        self._end_of: dict[InputKind, fx.Node] = {}

    def target(self, node: fx.Node) -> str | None:
        spec = self._specs.get(node)
        if spec is None or spec.kind not in _CONSTANT_KINDS or spec.target in self._mutated:
            return None
        target: str | None = spec.target
        return target

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        target = self.target(node)
        value = None if target is None else self._state.get(target, self._constants.get(target))
        return value if isinstance(value, torch.Tensor) else None

    def names(self) -> Iterator[str]:
        yield from self._state
        yield from self._constants
        yield from registered_names(self.module)

    def add(self, name: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
        is_parameter = isinstance(tensor, nn.Parameter)
        kind = InputKind.PARAMETER if is_parameter else InputKind.BUFFER
        with self.module.graph.inserting_before(self._end(kind)):
            node: fx.Node = self.module.graph.placeholder(f"{'p' if is_parameter else 'b'}_{name.replace('.', '_')}")
        node.target = node.name
        self._specs[node] = InputSpec(kind, TensorArgument(node.name), name, None if is_parameter else True)
        self._state[name] = tensor
        return node

    def _end(self, kind: InputKind) -> fx.Node:
        """The node before which the next input of this kind belongs."""
        end: Any = self._end_of.get(kind)
        if end is None or (end.op == "placeholder" and end not in self._specs):
            nodes: Iterable[fx.Node] = self.module.graph.nodes
            end = next(n for n in nodes if n.op != "placeholder" or self._specs[n].kind in _FOLLOWERS[kind])
            self._end_of[kind] = end
        return cast(fx.Node, end)

    def drop(self, nodes: Collection[fx.Node], targets: Collection[str]) -> None:
        gone = {spec.target for spec in (self._specs.pop(node) for node in nodes)}
        for target in gone - {spec.target for spec in self._specs.values()}:
            assert target is not None
            self._state.pop(target, None)
            self._constants.pop(target, None)

    def replaced(self, node: fx.Node, by: fx.Node) -> None:
        if node.graph is not self.module.graph:
            return
        old, new = node.name, by.name
        if any(user.op == "output" for user in node.users):  # outputs keep their names
            old, new = by.name, node.name
            by.name, node.name = new, old
        for argument in self._arguments():
            if argument.name == old:
                argument.name = new

    def is_named(self, node: fx.Node) -> bool:
        return any(node.name == argument.name for argument in self._arguments())

    def _arguments(self) -> Iterator[Any]:
        """The values that the signatures of preserved modules name."""
        for entry in self._calls:
            if entry.signature is not None:
                yield from entry.signature.inputs
                yield from entry.signature.outputs

    def _has_nodes(self, path: str) -> bool:
        """Whether something is left of the module at `path`; with nothing left its signature is void."""
        stacks = (node.meta.get("nn_module_stack") or {} for node in self.module.graph.nodes)
        return not path or any(path == frame[0] for stack in stacks for frame in stack.values())

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self._state.values()
        yield from (value for value in self._constants.values() if isinstance(value, torch.Tensor))

    def result(self) -> ExportedProgram:
        program, graph = self._program, self.module.graph
        outputs = next(iter(reversed(graph.nodes))).args[0]
        assert isinstance(outputs, (list, tuple))
        old_outputs = program.graph_signature.output_specs
        signature = ExportGraphSignature(
            [_named(self._specs[node], node) for node in _placeholders(graph)],
            [_named(spec, value) for spec, value in zip(old_outputs, outputs, strict=True)],
        )
        return ExportedProgram(
            root=self.module,
            graph=graph,
            graph_signature=signature,
            state_dict=self._state,
            range_constraints=dict(program.range_constraints),
            module_call_graph=[entry for entry in self._calls if entry.signature is None or self._has_nodes(entry.fqn)],
            example_inputs=program.example_inputs,
            constants=self._constants,
            verifiers=program.verifiers,
        )


_CONSTANT_KINDS = frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR})
_FOLLOWERS = {
    InputKind.PARAMETER: {InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ, InputKind.USER_INPUT},
    InputKind.BUFFER: {InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ, InputKind.USER_INPUT},
}
"""Which kinds of inputs come after a kind: parameters are first, the user's inputs last."""

SpecT = TypeVar("SpecT", InputSpec, OutputSpec)


def _named(spec: SpecT, value: Any) -> SpecT:
    """The same specification of what `value` is called now."""
    if not isinstance(value, fx.Node):
        return spec
    return replace(spec, arg=replace(spec.arg, name=value.name))


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def attribute(module: nn.Module, target: str) -> Any:
    """What a get_attr node reads; None where there is nothing."""
    found: Any = module
    for atom in target.split("."):
        found = getattr(found, atom, None)
    return found


def registered_names(module: nn.Module) -> Iterator[str]:
    """Every name that an attribute of a module below has."""
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for registry in (child.__dict__, child._parameters, child._buffers, child._modules):
            yield from (prefix + name for name in registry)
