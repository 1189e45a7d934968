"""A graph that torch.compile captured: parameters and buffers are inputs of it, and it is valid for many calls.

The values of such inputs are known while the graph is rewritten, but the inputs stay: what no rewrite has made use
of is still read from the caller.  Recorded values are called `example_value` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx
from torch.fx.node import map_arg

from fuser.graphs.torch.bodies import placeholders
from fuser.graphs.torch.carriers import ModuleCarrier
from fuser.graphs.torch.copy import Copier


class CapturedCarrier(ModuleCarrier):
    """A copy of the graph; new constants are attributes of it.

    known: what is passed for some inputs, by position: parameters and buffers, and numbers as read by `item`.
    """

    def __init__(self, module: fx.GraphModule, known: Mapping[int, torch.Tensor | float]) -> None:
        super().__init__(Copier().module(module))
        inputs = placeholders(self.module.graph)
        for mine, theirs in zip(inputs, placeholders(module.graph), strict=True):
            if hasattr(theirs, "_dynamo_source"):  # no part of what fx copies; AOTAutograd asks for it
                mine._dynamo_source = theirs._dynamo_source
        self._known = {inputs[i]: value for i, value in known.items() if isinstance(value, torch.Tensor)}
        for position, value in known.items():
            if not isinstance(value, torch.Tensor):
                _insert_number(inputs[position], value)
        self._names = set(super().names())
        self._rename_meta("example_value", "val")

    def target(self, node: fx.Node) -> str | None:
        return None if node.op == "placeholder" else super().target(node)

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        return self._known.get(node) if node.op == "placeholder" else super().tensor(node)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (tensor for node, tensor in self._known.items() if node.users)
        yield from super().tensors()

    def constants(self) -> dict[str, torch.Tensor]:
        """The new constants by name."""
        stored = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: tensor for name, tensor in stored.items() if name not in self._names}

    def result(self) -> fx.GraphModule:
        self._rename_meta("val", "example_value")
        sources = getattr(self.module, "_param_name_to_source", None)
        if sources is not None:
            from torch._dynamo.source import ConstantSource

            made = {name: ConstantSource(name) for name in self.constants()}
            self.module._param_name_to_source = {**sources, **made}  # type: ignore[assignment]
        return super().result()

    def _rename_meta(self, old: str, new: str) -> None:
        for module in self.module.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                if old in node.meta:
                    node.meta[new] = node.meta.pop(old)


def is_parameter(node: fx.Node) -> bool:
    """Whether an input is what Dynamo calls static: a parameter or buffer of a module."""
    return bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


def is_number(node: fx.Node) -> bool:
    """Whether an input is a float attribute of a module, such as an epsilon, passed as a tensor of one element."""
    argument, source = node.meta.get("grapharg"), getattr(node, "_dynamo_source", None)
    wrapped = getattr(argument, "pass_arg_as_tensor", False) and all(user.target == "item" for user in node.users)
    return wrapped and source is not None and source.guard_source.is_unspecialized_nn_module()


def _insert_number(node: fx.Node, number: float) -> None:
    """Write the number where `node.item()` is read."""
    for item in list(node.users):
        for user in list(item.users):
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: number if n is item else n)  # noqa: B023
        node.graph.erase_node(item)
