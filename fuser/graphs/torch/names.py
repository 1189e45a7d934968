"""What a person calls the operators of an fx graph."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import fx, nn
from torch._ops import OpOverload

from fuser.graphs.torch.calls import signature
from fuser.graphs.torch.purity import is_guard
from fuser.graphs.torch.readers import SEVERAL_OUTPUTS
from fuser.graphs.torch.scopes import Scope


def name_sites(
    nodes: Sequence[fx.Node], scopes: Mapping[fx.Graph, Scope], is_known: Callable[[fx.Node], bool]
) -> dict[fx.Node, str]:
    """A name for each operator that is unique in the model: its module's path, with the node's name where the
    path alone would not tell which operator is meant."""
    paths = {node: _module_path(node) for node in nodes if node.op in _OPERATORS and not is_part(node)}
    shared = Counter(path for node, path in paths.items() if not is_known(node))
    sites: dict[fx.Node, str] = {}
    for node, path in paths.items():
        is_alone = shared[path] == 1 and _is_in_leaf(node) and not is_known(node)
        name = path if path and is_alone else f"{path} ({node.name})" if path else node.name
        label = scopes[node.graph].label
        sites[node] = f"{label}.{name}" if label else name
    taken = Counter(sites.values())  # a function in the outermost forward may be called what a module is called
    return {node: name if taken[name] == 1 else f"{name} ({node.name})" for node, name in sites.items()}


def operator_name(node: fx.Node, module: nn.Module | None) -> str:
    """The name under which users know what the node calls; empty where it is no operator."""
    if module is not None:
        return "" if is_guard(module) else type(module).__name__
    if node.op not in _OPERATORS or node.target is operator.getitem:
        return ""
    if isinstance(node.target, OpOverload):
        return str(node.target.overloadpacket)
    return getattr(node.target, "__name__", str(node.target))


_OPERATORS = ("call_function", "call_method", "call_module")


def is_tuple(node: fx.Node) -> bool:
    """Whether the node returns several values, of which the vocabulary knows the first."""
    found = signature(node)
    return found is not None and found.name in SEVERAL_OUTPUTS


def is_part(node: fx.Node) -> bool:
    """Whether the node only takes one of another's outputs."""
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and is_tuple(node.args[0])


def _module_path(node: fx.Node) -> str:
    """The path of the module that the node is a call of, or was captured in."""
    if node.op == "call_module":
        return str(node.target)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def _is_in_leaf(node: fx.Node) -> bool:
    """Whether the module around the node is torch's own, so that its path says what the node does."""
    if node.op == "call_module":
        return True
    stack = node.meta.get("nn_module_stack")
    kind = list(stack.values())[-1][1] if stack else ""
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
    return name.startswith("torch.nn.") and not name.startswith("torch.nn.modules.container.")
