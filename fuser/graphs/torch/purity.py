"""What a node of an fx graph does besides computing its output.

A graph of torch code is not a graph of values: `add_` writes into its operand, `dropout` draws random numbers,
a hook is the user's own code.  Whoever moves, drops or precomputes a node asks here first.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload

from fuser.graphs.torch.bodies import bodies, operands, placeholders
from fuser.graphs.torch.calls import bind, signature
from fuser.graphs.torch.carriers import attribute

_LANGUAGE = ("_operator", "math", "builtins")
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in dir(operator) if name[0] == "i" and hasattr(operator, f"__{name[1:]}__")
) | {operator.setitem, operator.delitem}
_UNINITIALIZED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_CASTS = frozenset({"float", "double", "half", "bfloat16", "long", "int", "short", "char", "byte", "bool"})
"""Methods that are `to` under another name."""
_DRAWN_IN_PYTHON = "fractional_max_pool"
"""The operators of that name are given random numbers; the functions draw them."""
_AUTOGRAD_ONLY = frozenset({"detach_"})
"""In place for autograd; the numbers stay."""


def written_operands(node: fx.Node, module: nn.Module | None) -> list[fx.Node]:
    """The values this node may write into; `module` is the one that a call_module calls."""
    written: list[fx.Node] = []
    fx.node.map_arg(tuple(_written(node, module)), written.append)
    return written


def _written(node: fx.Node, module: nn.Module | None) -> Iterator[Any]:
    if node.op == "call_module":
        if is_guard(module):
            return
        if module is None or not is_known_module(module):
            yield from node.all_input_nodes  # anybody's code
        elif getattr(module, "inplace", False):
            yield from node.args[:1]
    elif node.op == "call_method":
        if _is_in_place_name(str(node.target)):
            yield from node.args[:1]
    elif node.op == "call_function":
        yield from _written_by_function(node)


def _running_statistics(node: fx.Node) -> Iterator[Any]:
    """What a normalization writes that uses the statistics of its input; its schema does not say so."""
    found = signature(node)
    given = None if found is None or not found.name.endswith(_NORMS) else bind(node, found)
    if given is not None and any(given.get(name, False) is not False for name in ("training", "use_input_stats")):
        yield from (given.get(name) for name in ("running_mean", "running_var"))
    elif _known_name(node).endswith(_NORMS) and (found is None or given is None):
        yield from node.all_input_nodes  # called in a way that is not known


_NORMS = ("batch_norm", "instance_norm")


def _written_by_function(node: fx.Node) -> Iterator[Any]:
    yield from _running_statistics(node)
    target: Any = node.target
    if isinstance(target, OpOverload):
        if target._schema.is_mutable and target._opname not in _AUTOGRAD_ONLY:
            for position, argument in enumerate(target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    yield node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
    elif isinstance(target, HigherOrderOperator):
        yield from _written_in_bodies(node)
    elif target in _IN_PLACE_OPERATORS:
        yield from node.args[:1]
    elif not is_known_function(target):
        yield from node.all_input_nodes
    elif getattr(target, "__module__", None) not in _LANGUAGE:
        if _is_in_place_name(target.__name__) or _asks_for_in_place(node):
            yield node.args[0] if node.args else node.kwargs.get("input")
        yield node.kwargs.get("out")


def _written_in_bodies(call: fx.Node) -> Iterator[Any]:
    """The operands of a higher-order operator that its bodies write into; all of them where nobody knows."""
    given, called = operands(call), bodies(call)
    passed = None if given is None else (*given.varying, *given.fixed)
    if not called:
        yield from call.all_input_nodes
    for body in called.values():
        moved = moving(body.graph.nodes, partial(_called_in, body))
        inputs = placeholders(body.graph)
        if passed is None or len(inputs) != len(passed):
            yield from call.all_input_nodes if not moved.isdisjoint(inputs) else ()
        else:
            yield from (operand for operand, node in zip(passed, inputs, strict=True) if node in moved)


def _called_in(body: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return attribute(body, str(node.target)) if node.op == "call_module" else None


def moving(nodes: Iterable[fx.Node], called: Called) -> set[fx.Node]:
    """The values that some node writes into, and all that may share memory with them."""
    pending = [operand for node in nodes for operand in written_operands(node, called(node))]
    found = set(pending)
    while pending:
        value = pending.pop()
        near = [user for user in value.users if user.op != "output" and not is_fresh(user, called(user))]
        if not is_fresh(value, called(value)):
            near += value.all_input_nodes
        pending += [node for node in near if node not in found]
        found.update(near)
    return found


def _is_in_place_name(name: str) -> bool:
    if name.startswith("__"):
        return name in ("__setitem__", "__delitem__") or f"{name[2:-2]}" in _IN_PLACE_NAMES
    return name.endswith("_") and name not in _AUTOGRAD_ONLY


_IN_PLACE_NAMES = frozenset(function.__name__ for function in _IN_PLACE_OPERATORS)


def _asks_for_in_place(node: fx.Node) -> bool:
    """Whether a function such as `F.relu` was called with `inplace=True`."""
    if node.kwargs.get("inplace"):
        return True
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code else ()
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and bool(node.args[position])


def is_known_module(module: nn.Module) -> bool:
    """Whether a call runs torch's own code and nothing else: no class of the user's in it, and no hook."""
    return all(
        type(part).__module__.startswith("torch.nn.modules.") and not has_hooks(part) for part in module.modules()
    )


def is_guard(module: nn.Module | None) -> bool:
    """Whether this is torch.export's check of the inputs: it reads shapes, not numbers."""
    return type(module).__name__ == "GuardsFn" and type(module).__module__.startswith("torch.export.")


@cache
def is_known_function(function: Any) -> bool:
    """Whether the function is the language's or torch's own, not one that the user wrapped."""
    if getattr(function, "__module__", None) in _LANGUAGE:
        return True
    name = getattr(function, "__name__", "")
    owners = (torch, F, torch.Tensor, torch.special, torch.linalg)
    return any(getattr(owner, name, None) is function for owner in owners)


def is_deterministic(node: fx.Node) -> bool:
    """Whether equal inputs always give an equal output and nothing else happens, so that it can be precomputed."""
    if node.op == "call_method":
        return node.target in _CASTS or _is_deterministic_name(str(node.target))
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return False
    target: Any = node.target
    if isinstance(target, OpOverload):
        return (
            target.namespace in ("aten", "prims")
            and (not target._schema.is_mutable or target._opname in _AUTOGRAD_ONLY)
            and target._opname not in _UNINITIALIZED
            and torch.Tag.nondeterministic_seeded not in target.tags
            and (target._opname in _AUTOGRAD_ONLY or not node.is_impure())
            and not written_operands(node, None)
        )
    if not is_known_function(target) or any(True for _ in written_operands(node, None)):
        return False
    if getattr(target, "__module__", None) in _LANGUAGE:
        return target not in _IN_PLACE_OPERATORS
    return _is_deterministic_name(target.__name__)


@cache
def _is_deterministic_name(name: str) -> bool:
    """Whether the method or function of this name is a pure ATen operator."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or name in _UNINITIALIZED or _is_in_place_name(name) or name.startswith(_DRAWN_IN_PYTHON):
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return all(torch.Tag.nondeterministic_seeded not in overload.tags for overload in overloads)


def updated_buffers(module: nn.Module) -> list[torch.Tensor]:
    """What a call of the module may write by itself: in training mode normalizations keep statistics, and anybody's
    code may write whatever it holds, parameters left out."""
    if is_known_module(module):
        return list(module.buffers()) if module.training else []
    return list(_held(module, set()))


def _held(found: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors but parameters in the attributes of a module, and of all in them."""
    if id(found) in seen or isinstance(found, nn.Parameter):
        return
    seen.add(id(found))
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (nn.Module, dict, list, tuple)):
        inside = vars(found) if isinstance(found, nn.Module) else found
        for item in inside.values() if isinstance(inside, dict) else inside:
            yield from _held(item, seen)


def can_be_dropped(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether nobody misses the node when nobody reads its output."""
    if node.op == "call_module":
        return module is not None and is_known_module(module) and all(map(_is_quiet, module.modules()))
    if isinstance(node.target, OpOverload) and node.target.namespace == "quantized_decomposed":
        return True
    return is_deterministic(node)


def _is_quiet(module: nn.Module) -> bool:
    """Whether a call leaves no trace: in training mode modules draw random numbers and keep statistics."""
    return not module.training and not getattr(module, "inplace", False)


_FRESH_MODULES = frozenset(
    "conv batchnorm linear pooling activation normalization instancenorm padding upsampling".split()
)
_FRESH_OPERATORS = re.compile(
    "(_?convolution|conv[123]d|conv_transpose[123]d|linear|addmm|mm|matmul|.*batch_norm.*|add|sub|mul|(true)?div|"
    "relu6?|silu|gelu|sigmoid|tanh|hard(tanh|swish|sigmoid)|leaky_relu|avg_pool[123]d|adaptive_avg_pool[123]d|"
    "(adaptive_)?max_pool[123]d|amax|pad|constant_pad_nd|interpolate|_?upsample_.*|cat|mean|clone)"
)


def is_fresh(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the output surely is memory of its own: no view of an operand, no operand itself."""
    if node.op == "call_module":
        if module is None or not is_known_module(module):
            return False
        owner = type(module).__module__.removeprefix("torch.nn.modules.")
        return owner in _FRESH_MODULES and not getattr(module, "inplace", False) and not isinstance(module, nn.Identity)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return isinstance(node.args[1], int) and is_fresh(node.args[0], None)
    return _FRESH_OPERATORS.fullmatch(_known_name(node)) is not None and not written_operands(node, module)


def _known_name(node: fx.Node) -> str:
    """What the method, or the function of torch's or the language's, is called; empty for a user's function."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function" or not (isinstance(target, OpOverload) or is_known_function(target)):
        return ""
    return str(getattr(target, "_opname", getattr(target, "__name__", "")))


_MEASURED_FIRST = frozenset(
    "size dim ndimension numel nelement stride element_size is_contiguous is_floating_point is_complex sym_size "
    "sym_numel sym_stride sym_is_contiguous zeros_like ones_like full_like empty_like rand_like randn_like new_zeros "
    "new_ones new_full new_empty _assert_tensor_metadata".split()
)
_MEASURED_OTHER = frozenset({"reshape_as", "view_as", "expand_as", "type_as"})
_MEASURES = frozenset({"shape", "ndim", "dtype", "device", "layout"})


def measured_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of which the node asks the shape, the type or the device, and never the elements."""
    name = _known_name(node)
    given: list[Any] = []
    if name in _MEASURED_FIRST:
        given = [*node.args[:1], *(node.kwargs.get(key) for key in ("input", "self"))]
    elif name in _MEASURED_OTHER:
        given = [*node.args[1:2], node.kwargs.get("other")]
    elif node.target is getattr and node.args[1] in _MEASURES:
        given = [*node.args[:1]]
    return [operand for operand in given if isinstance(operand, fx.Node)]


def uses(node: fx.Node) -> list[fx.Node]:
    """Every use of a value in the arguments of the node."""
    taken: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), taken.append)
    return taken


def _only_measures(node: fx.Node, value: fx.Node) -> bool:
    return uses(node).count(value) == measured_operands(node).count(value)


Called = Callable[[fx.Node], nn.Module | None]
"""The module that a call_module node calls."""


def is_private(value: fx.Node, reader: fx.Node, called: Called) -> bool:
    """Whether `value` is memory of its own that only `reader` sees."""
    while len(value.users) == 1 and reader in value.users:
        if is_fresh(value, called(value)):
            return True
        written = written_operands(value, called(value))
        if not written or written != list(value.args[:1]):
            return False
        reader, value = value, written[0]  # `out += y` is the memory of `out`
    return False


def may_be_written(value: fx.Node, called: Called) -> bool:
    """Whether some reader may write into the value, or into a view of it."""
    pending, seen = [value], {value}
    while pending:
        value = pending.pop()
        for user in value.users:
            if value in written_operands(user, called(user)):
                return True
            hands_on = user.op != "output" and not is_fresh(user, called(user)) and not _only_measures(user, value)
            if hands_on and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether user code sees the calls of this very module, takes the place of a method, or makes its parameters."""
    return (
        any(getattr(module, name, None) or getattr(nn.modules.module, f"_global{name}", None) for name in _HOOKS)
        or any(callable(getattr(type(module), name, None)) for name in module.__dict__)
        or nn.utils.parametrize.is_parametrized(module)
    )


def is_watched(root: nn.Module | None) -> bool:
    """Whether user code sees the calls of the whole graph; torch.export has hooks of its own there."""
    hooks = (hook for name in _HOOKS for hook in (getattr(root, name, None) or {}).values())
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.export.") for hook in hooks)
