"""Give one call site new constants, in the form in which its dialect states them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload

from fuser.graph import Array
from fuser.graphs.torch.calls import Signature, aten, bind, signature, write
from fuser.graphs.torch.constants import Constants
from fuser.graphs.torch.copy import shallow
from fuser.graphs.torch.readers import MODULE_OPERANDS, OPERANDS
from fuser.graphs.torch.values import to_array, to_tensor
from fuser.graphs.torch.wiring import Wiring
from fuser.ops import Conv, Linear, Op

if TYPE_CHECKING:
    from fuser.graphs.torch.graph import TorchGraph


class BiasAdd(NamedTuple):
    """The addition that gives a matrix product its bias; `argument` is the bias's name in its call."""

    add: fx.Node
    bias: fx.Node
    argument: str


def factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The operands of a matrix product."""
    data, weight, *_ = _arguments(product).values()
    return data, weight


def is_matrix_product(node: fx.Node) -> bool:
    """Whether the node multiplies two matrices, and nothing with more axes."""
    found = signature(node)
    return found is not None and found.name == "mm"


Arrays: TypeAlias = Mapping[str, Array | None]


def set_operands(graph: TorchGraph, wiring: Wiring, constants: Constants, op: Op, arrays: Arrays) -> None:
    """Set new constants by the names of the op's fields, or take them away; nobody else's change."""
    resizes = isinstance(op, Conv | Linear) and _resizes(graph, op, arrays.get("weight"))
    if op.node.op == "call_module":
        _call_own_module(wiring, op, arrays)
    else:
        _Arguments(graph, wiring, constants, op).set(arrays)
    if resizes:
        for node in dict.fromkeys((op.node, op.output)):
            wiring.meta.refresh(node)


def _resizes(graph: TorchGraph, op: Conv | Linear, weight: Array | None) -> bool:
    """Whether the new weight makes another number of outputs."""
    old = graph.shape(op.weight)
    return weight is not None and (old is None or old[op.out_axis] != weight.shape[op.out_axis])


def _call_own_module(wiring: Wiring, op: Op, arrays: Arrays) -> None:
    old = cast(nn.Module, wiring.called(op.node))
    own = shallow(old)
    for field, array in arrays.items():
        name = MODULE_OPERANDS[type(op)][field]
        if array is None:
            own._parameters[name] = None
            continue
        like = getattr(old, name, None)
        if not isinstance(like, torch.Tensor):
            like = next(chain(old.parameters(), old.buffers()))
        tensor = to_tensor(array, like)
        if name in own._buffers:
            own._buffers[name] = tensor
        else:
            own._parameters[name] = nn.Parameter(tensor, requires_grad=like.requires_grad)
    if isinstance(op, Conv | Linear):
        _state_sizes(own, op)
    for name in ("elementwise_affine", "affine"):  # what a normalization says of itself
        if hasattr(own, name) and getattr(own, "weight", None) is None:
            setattr(own, name, False)
    wiring.call_own(op.node, own)


def _state_sizes(module: Any, op: Conv | Linear) -> None:
    """What a module says of the sizes of its weight; nothing in torch computes with it."""
    outputs, inputs = module.weight.shape[:2]
    if isinstance(op, Linear):
        module.out_features, module.in_features = outputs, inputs
    elif op.transposed:
        module.in_channels, module.out_channels = outputs, inputs * op.groups
    else:
        module.out_channels, module.in_channels = outputs, inputs * op.groups


def unite(graph: TorchGraph, wiring: Wiring, constants: Constants, op: Linear) -> None:
    """Let the node that adds the bias of a product multiply, too: `addmm`, or `linear` where there are batch axes."""
    found = graph.bias_add(op.node)
    assert found is not None  # otherwise the bias is not apart
    is_aten = isinstance(op.node.target, OpOverload)
    data, weight = factors(op.node)
    target: Any
    if is_matrix_product(op.node):
        target = aten.addmm.default if is_aten else torch.addmm
        operands = (found.bias, data, weight)
    else:
        target = aten.linear.default if is_aten else F.linear
        turned = to_array(constants.value(weight)).T
        stored = _Arguments(graph, wiring, constants, op).constant(found.add, "weight", turned, weight)
        operands = (data, stored, found.bias)
    wiring.become(found.add, target, *operands)
    wiring.loosen(op.node, weight)


class _Arguments:
    """The arguments of a function call."""

    def __init__(self, graph: TorchGraph, wiring: Wiring, constants: Constants, op: Op) -> None:
        self._wiring, self._constants, self._op = wiring, constants, op
        self._node: fx.Node = op.node
        self._signature = cast(Signature, signature(self._node))
        self._is_product = self._signature.name in ("mm", "matmul")
        self._bias = graph.bias_add(self._node) if self._is_product else None

    def set(self, given: Arrays) -> None:
        arrays = {field: array for field, array in given.items() if array is not None}
        for field in given.keys() - arrays.keys():
            self._take_away(OPERANDS[self._signature.name][field])
        if self._signature.name == "bmm":
            self._become_linear(**arrays)
            return
        if self._is_product and "bias" in arrays and self._bias is None:
            self._become_biased(**arrays)
            return
        if self._bias is not None and "bias" in arrays:
            add, old, argument = self._bias
            new = self.constant(add, "bias", arrays.pop("bias"), old)
            write(add, cast(Signature, signature(add)), argument, new)
            self._wiring.loosen(old)
        for field, array in arrays.items():
            name = OPERANDS[self._signature.name][field]
            old = _arguments(self._node)[name]
            is_number = array.ndim == 0 and isinstance(old, (int, float))
            value: Any = float(array) if is_number else self.constant(self._node, field, array, old)
            write(self._node, self._signature, name, value)
            if isinstance(old, fx.Node):
                self._wiring.loosen(old)
        if self._signature.name == "addmm":
            kept = {name: value for name, value in self._node.kwargs.items() if name not in ("alpha", "beta")}
            self._node.kwargs = kept

    def _take_away(self, name: str) -> None:
        old = _arguments(self._node)[name]
        write(self._node, self._signature, name, None)
        self._wiring.loosen(old)

    def _become_biased(self, bias: Array, weight: Array | None = None) -> None:
        """A matrix product with a bias is another operator: `addmm`, or `linear` where there are batch axes."""
        if self._signature.name != "mm":
            self._become_linear(weight, bias)
            return
        node, (data, old) = self._node, factors(self._node)
        target: Any = aten.addmm.default if isinstance(node.target, OpOverload) else torch.addmm
        added = self.constant(node, "bias", bias, None)
        new = old if weight is None else self.constant(node, "weight", weight, old)
        self._wiring.become(node, target, added, data, new)

    def _become_linear(self, weight: Array | None = None, bias: Array | None = None) -> None:
        """`linear` takes the matrix the other way round, once for the whole batch."""
        node, (data, _), old = self._node, factors(self._node), cast(Linear, self._op).weight
        target: Any = aten.linear.default if isinstance(node.target, OpOverload) else F.linear
        weight = to_array(self._constants.value(old)) if weight is None else weight
        added = [] if bias is None else [self.constant(node, "bias", bias, None)]
        self._wiring.become(node, target, data, self.constant(node, "weight", weight.T, old), *added)

    def constant(self, user: fx.Node, field: str, array: Array, old: Any) -> fx.Node:
        """A new constant for one operand, like the one it takes the place of, or like another of the op's."""
        operands = [value for value in (old, *vars(self._op).values()) if isinstance(value, fx.Node)]
        source = next(filter(self._constants.is_known, operands), None)
        if source is None:
            tensor = to_tensor(array, like=next(self._wiring.carrier.tensors(), torch.empty(0)))
            return new_constant(self._wiring, self._constants, user, f"{user.name}_{field}", tensor)
        leaves = self._constants.leaves(source)
        target = self._wiring.carrier.target(leaves[0]) if len(leaves) == 1 else None
        if target is None:
            name = f"{user.name}_{field}"
        else:
            name = target if source is old else f"{target.rpartition('.')[0]}.{field}".lstrip(".")
        tensor = to_tensor(array, like=self._constants.value(source))
        tensor = as_parameter(tensor, self._constants.tensors(source))
        return new_constant(self._wiring, self._constants, user, name, tensor)


def new_constant(wiring: Wiring, constants: Constants, user: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
    """A node for `tensor` that `user` can read, stored under a name made from `name`."""
    made = wiring.new_constant(user, name, tensor)
    for node in made.values():
        constants.learn(node)
    return made[user.graph]


def as_parameter(tensor: torch.Tensor, likes: Sequence[torch.Tensor]) -> torch.Tensor:
    """What is made of parameters is a parameter, trainable where they are."""
    if not any(isinstance(like, nn.Parameter) for like in likes):
        return tensor
    trainable = tensor.is_floating_point() or tensor.is_complex()
    return nn.Parameter(tensor, requires_grad=trainable and any(like.requires_grad for like in likes))


def _arguments(node: fx.Node) -> dict[str, Any]:
    return bind(node, cast(Signature, signature(node))) or {}
