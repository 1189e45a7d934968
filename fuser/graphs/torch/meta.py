"""What a node's `meta` says of its value; the meta of new nodes, and of those that an edit gives another layout."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata

TensorLike: TypeAlias = torch.Tensor | TensorMetadata

Values: TypeAlias = dict[fx.Node, Any]
"""What nodes evaluate to, as fake tensors."""


def meta_tensor(node: fx.Node) -> TensorLike | None:
    """The tensor that capture or shape propagation has recorded for a node; it has a shape and a dtype."""
    for key in ("val", "tensor_meta"):
        found = node.meta.get(key)
        if isinstance(found, (torch.Tensor, TensorMetadata)):
            return found
    return None


def have_one_layout(a: Any, b: Any) -> bool:
    """Whether two recorded values have the same type, device and place in memory."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(have_one_layout, a, b))
    if isinstance(a, TensorLike) and isinstance(b, TensorLike):
        return _layout(a) == _layout(b)
    return type(a) is type(b) and str(a) == str(b)


def _layout(tensor: Any) -> tuple[Any, ...]:
    """Symbolic sizes by name, so that comparing adds no guards."""
    strides = tensor.stride() if isinstance(tensor, torch.Tensor) else tensor.stride
    return tensor.dtype, getattr(tensor, "device", None), tuple(map(str, tensor.shape)), tuple(map(str, strides))


class Meta:
    """The recorded values of a graph that was captured with fake tensors; without them it records nothing."""

    def __init__(self, order: Sequence[fx.Node]) -> None:
        self._position = {node: i for i, node in enumerate(order)}
        self._mode: Any = None
        self._has_tensor_meta = False
        for node in order:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                self._mode = value.fake_mode
                self._has_tensor_meta = "tensor_meta" in node.meta
                break

    def describe(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """Record what a node that reads `tensor` evaluates to."""
        if self._mode is not None:
            self.record({node: self._mode.from_tensor(tensor, static_shapes=True)})

    def record(self, values: Values) -> None:
        for node, value in values.items():
            node.meta["val"] = value
            if self._has_tensor_meta and isinstance(value, torch.Tensor):
                node.meta["tensor_meta"] = _extract_tensor_metadata(value)

    def refresh(self, node: fx.Node) -> None:
        """Record what a node evaluates to, now that its operands are of other sizes."""
        if self._mode is not None and node.op == "call_function":
            with self._evaluating():
                self.record({node: self._evaluate(node, {})})
        else:
            node.meta.pop("tensor_meta", None)

    def relaid(self, node: fx.Node, value: Any) -> Values | None:
        """What nodes evaluate to if `node` evaluates to `value`, the same numbers in another layout.

        None where an operator, such as a `view`, needs the old layout.
        """
        new: Values = {node: value}
        pending = [(self._position[user], user) for user in node.users if user in self._position]
        heapq.heapify(pending)
        try:
            with self._evaluating():
                while pending:
                    _, user = heapq.heappop(pending)
                    if user.op == "output" or user in new:
                        continue
                    old = user.meta["val"]
                    if isinstance(user.target, torch._ops.HigherOrderOperator):
                        return None
                    found = self._evaluate(user, new)
                    if not have_one_layout(found, old):
                        new[user] = found
                        for reader in user.users:
                            heapq.heappush(pending, (self._position[reader], reader))
        except Exception:  # whatever an operator raises when it does not take the layout
            return None
        return new

    def asks(self, question: Callable[[], bool]) -> bool:
        """The answer to a question about recorded values; no, where it would depend on a symbolic size."""
        try:
            with self._evaluating():
                return question()
        except Exception:  # there are many types for what cannot be decided
            return False

    def copy_format(self, node: fx.Node, value: Any) -> torch.memory_format:
        """The memory format in which a copy of `value` has the layout that `node` has."""
        with self._evaluating():
            for memory_format in (torch.channels_last, torch.channels_last_3d):
                with contextlib.suppress(RuntimeError):  # of another rank
                    if have_one_layout(torch.clone(value, memory_format=memory_format), node.meta.get("val")):
                        return memory_format
        return torch.contiguous_format

    def _evaluate(self, node: fx.Node, new: Values) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: new[n] if n in new else n.meta["val"])
        assert node.op == "call_function" and callable(node.target)
        return node.target(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Compute with fake tensors; what is tried out adds no constraint on the symbolic sizes."""
        shape_env = getattr(self._mode, "shape_env", None)
        with contextlib.ExitStack() as stack:
            if self._mode is not None:
                stack.enter_context(self._mode)
            if shape_env is not None:
                stack.enter_context(shape_env.suppress_guards())
            stack.enter_context(torch.no_grad())
            yield
