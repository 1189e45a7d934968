"""A copy of a module tree that shares its tensors' memory and nothing else.

`copy.deepcopy` would copy the weights, and fails on what cannot be pickled.  Here modules, their registries and
the lists that hold them are new; parameters and buffers are aliases (see `torch_values.alias`); everything else
is shared.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fuser.graphs.torch.values import alias

ModuleT = TypeVar("ModuleT", bound=nn.Module)

REGISTRIES = ("_parameters", "_buffers", "_modules")
_BELONGS_TO_THE_CODE = ("_graph", "_code", "_lineno_map", "_prologue_start")


class Copier:
    """Copies with one memory: what was shared is shared among the copies."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self._originals: list[Any] = []  # an id is only good for as long as its object lives

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """An alias; the same one for the same tensor, so that tied parameters stay tied."""
        if id(tensor) not in self._made:
            self._remember(tensor, alias(tensor))
        made: torch.Tensor = self._made[id(tensor)]
        return made

    def module(self, module: ModuleT) -> ModuleT:
        """The module and all below it."""
        fresh = [original for original in module.modules() if id(original) not in self._made]
        for original in fresh:
            self._remember(original, _blank(original))
        for original in fresh:
            if self._made[id(original)] is not original:
                self._fill(self._made[id(original)], original)
        result: ModuleT = self._made[id(module)]
        return result

    def _remember(self, original: Any, made: Any) -> None:
        self._made[id(original)] = made
        self._originals.append(original)

    def _fill(self, made: nn.Module, original: nn.Module) -> None:
        """Give `made` the state of `original`."""
        code = _BELONGS_TO_THE_CODE if isinstance(original, fx.GraphModule) else ()
        for tensor in (*original._parameters.values(), *original._buffers.values()):
            if tensor is not None:
                self.tensor(tensor)
        for name, value in original.__dict__.items():
            if name not in code:
                made.__dict__[name] = self._mapped(value)
        if isinstance(original, fx.GraphModule):
            assert isinstance(made, fx.GraphModule)
            made.graph = copy.deepcopy(original.graph)  # the nodes' meta keeps its objects

    def _mapped(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, torch.Tensor) and id(value) not in self._made and value.is_leaf:
            self._remember(value, value.clone())  # nobody's parameter: what a forward keeps for itself, and writes
        if isinstance(value, (torch.Tensor, nn.Module)):
            return self._made.get(id(value), value)
        if isinstance(value, types.MethodType) and id(value.__self__) in self._made:
            return types.MethodType(value.__func__, self._made[id(value.__self__)])
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._mapped(item)) for key, item in value.items())
        if type(value) in (list, tuple, set):
            return type(value)(self._mapped(item) for item in value)
        return value


def _blank(module: nn.Module) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return module  # its state lives in C++; it can only be shared
    if isinstance(module, fx.GraphModule):
        # Each GraphModule has a class of its own, which carries its generated `forward`.
        return fx.GraphModule(nn.Module(), fx.Graph(), type(module).__name__)
    blank: nn.Module = object.__new__(type(module))
    return blank


def shallow(module: nn.Module) -> nn.Module:
    """The same module with registries of its own: what is registered on the copy is not seen by the other."""
    made: nn.Module = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    for registry in REGISTRIES:
        made.__dict__[registry] = dict(module.__dict__[registry])
    return made
