"""Trace a module with `torch.fx`, without touching it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fuser.errors import InputError
from fuser.graphs.torch.carriers import attribute
from fuser.graphs.torch.copy import REGISTRIES, Copier

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class _Tracer(fx.Tracer):
    """Modules with hooks stay calls, so that the hooks run when the model does, not while it is traced.

    opaque: classes of modules that stay calls too.
    """

    proxy_buffer_attributes = True  # else what the model does to its buffers would be done now, once

    def __init__(self, opaque: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__()
        self._opaque = opaque
        self._autocast = _autocast()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast() != self._autocast:
            raise ValueError("a part of it runs under torch.autocast, which a trace does not show")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_watched = any(m.__dict__.get(name) or getattr(nn.modules.module, f"_global{name}", None) for name in _HOOKS)
        return is_watched or isinstance(m, self._opaque) or super().is_leaf_module(m, module_qualified_name)


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def trace(module: nn.Module) -> fx.GraphModule:
    """The module as a graph over copies of its submodules, which share the memory of its tensors.

    The copy is traced, because tracing writes: the tracer registers the constants that it meets, and the module's
    own code may assign what it computes.

    Raises `InputError` where the module cannot be traced.
    """
    copier = Copier()
    own = copier.module(module)
    kept = {id(tensor): (name, tensor, _version(tensor)) for name, tensor in _plain_tensors(own)}
    try:
        graph = _graph(own)
    except Exception as error:  # the user's own forward runs here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"torch.fx cannot trace this {type(module).__name__} ({first}); "
            "give example_inputs so that torch.export can capture it"
        ) from error
    for name, buffer in own.named_buffers():
        if isinstance(buffer, fx.Proxy):
            raise InputError(
                f"{type(module).__name__} assigns to its buffer {name!r} as it runs, which tracing would lose; "
                "give example_inputs so that torch.export can capture it"
            )
    still = {id(tensor) for _, tensor in _plain_tensors(own)}
    for name, tensor, version in kept.values():
        if id(tensor) not in still or _version(tensor) != version:
            raise InputError(
                f"{type(module).__name__} changes its tensor {name!r} as it runs, which tracing would do once and for "
                "all; make it a buffer that is written in place"
            )
    unread = [
        node.target for node in graph.nodes if node.op == "placeholder" and node.args == (None,) and not node.users
    ]
    if unread and _decides(unread, graph, Copier().module(module)):
        raise InputError(
            f"{type(module).__name__} does something else without {', '.join(map(repr, unread))}, which a "
            "trace does not show; give example_inputs so that torch.export captures the call that is meant"
        )
    graph._tracer_cls = fx.Tracer  # a saved result names its tracer, and must load without this package
    held: dict[str, Any] = {}
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = None  # an annotation that nobody has evaluated; with it, torch can neither save nor script it
        if node.op in ("get_attr", "call_module"):
            original = attribute(module, node.target)
            is_tensor = node.op == "get_attr" and isinstance(original, torch.Tensor)
            held[node.target] = copier.tensor(original) if is_tensor else attribute(own, node.target)
    traced = fx.GraphModule(held, graph, type(module).__name__)
    traced.training = own.training
    for path, child in traced.named_modules():
        child.training = own.get_submodule(path).training
    for name in _HOOKS:
        traced.__dict__[name] = own.__dict__[name]
    return traced


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that are kept in attributes, and in the containers there, without being registered."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in REGISTRIES:
                for leaf in tree_leaves(value):
                    if isinstance(leaf, torch.Tensor):
                        yield f"{path}.{name}".lstrip("."), leaf


def _version(tensor: torch.Tensor) -> int:
    """How often it was written; of a tensor that was made in inference mode nobody counts it."""
    return 0 if tensor.is_inference() else tensor._version


def _decides(names: Sequence[str], graph: fx.Graph, module: nn.Module) -> bool:
    """Whether the module's graph is another one where the arguments, which nobody reads, are None.

    A tracer stands for every argument by an object, so that `argument is None` is always false.
    """
    try:
        other = _graph(module, dict.fromkeys(names))
    except Exception:  # it cannot be called without them, or that cannot be traced
        return False
    return _form(graph) != _form(other)


def _form(graph: fx.Graph) -> list[Any]:
    """What is called on what."""
    nodes = [node for node in graph.nodes if node.target is not fx._symbolic_trace._assert_is_none]
    place = {node: i for i, node in enumerate(nodes)}
    form: list[Any] = []
    for node in nodes:
        given = map_arg((node.args, node.kwargs), lambda operand: f"%{place[operand]}")
        has_name = node.op not in ("placeholder", "get_attr")  # each trace names its constants anew
        form.append((node.op, node.target if has_name else "", "" if node.op == "placeholder" else repr(given)))
    return form


def _graph(module: nn.Module, concrete: dict[str, Any] | None = None) -> fx.Graph:
    try:
        return _Tracer().trace(module, concrete)
    except fx.proxy.TraceError:
        # torch's BatchNorms check the number of axes, which stops the tracer in a subclass of the user's.
        return _Tracer(opaque=(nn.modules.batchnorm._NormBase,)).trace(module, concrete)
