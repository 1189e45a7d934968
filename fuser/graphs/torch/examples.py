"""How many axes the values of a graph have on example inputs, and of what type they are; no number is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fuser.graphs.torch.bodies import placeholders
from fuser.graphs.torch.purity import is_known_function, is_known_module


def on_examples(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[fx.Node, torch.Tensor]:
    """Fake tensors for the values, up to the first that anybody's own code makes: that code is not run."""
    names = [str(node.target) for node in placeholders(module.graph)]
    evaluation = _Evaluation(module, {**dict(zip(names, args, strict=False)), **kwargs})
    with contextlib.suppress(Exception), torch.no_grad():  # what does not fit is told when it is run
        evaluation.run(enable_io_processing=False)
    return evaluation.found


class _Evaluation(fx.Interpreter):
    """Everything that is read has a fake in its place, so that what is written is that."""

    def __init__(self, module: fx.GraphModule, given: Mapping[str, Any]) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, torch.Tensor] = {}
        self._given, self._mode = given, FakeTensorMode()

    def _faked(self, value: Any) -> Any:
        return tree_map_only(torch.Tensor, self._mode.from_tensor, value)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._faked(self._given[target] if target in self._given else args[0])

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._faked(self.fetch_attr(target))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        state = self._faked({**dict(module.named_parameters()), **dict(module.named_buffers())})
        return torch.func.functional_call(module, state, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            is_known = is_known_module(self.fetch_attr(str(n.target)))
        else:
            is_known = n.op != "call_function" or isinstance(n.target, OpOverload) or is_known_function(n.target)
        if not is_known:
            raise ValueError(f"{n.target} is not run")
        with self._mode:
            value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.found[n] = value
        return value
