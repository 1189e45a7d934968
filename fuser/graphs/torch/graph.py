"""`Graph` over torch.fx: traced modules, `torch.export` graphs, decomposed ATen, and branches of `torch.cond`.

The graph works on a copy that shares the memory of the user's tensors and nothing else (see `copy`).  New
constants have names of their own, so loading an old state dict cannot silently undo an edit.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from fuser.affine import Scaled
from fuser.graph import Array, Dim, Reader, Summary
from fuser.graphs.torch.calls import aten, bind, signature, write
from fuser.graphs.torch.captured import CapturedCarrier
from fuser.graphs.torch.carriers import Carrier, ModuleCarrier, ProgramCarrier, attribute
from fuser.graphs.torch.constants import Constants, memory
from fuser.graphs.torch.copy import Copier
from fuser.graphs.torch.costs import multiply_adds
from fuser.graphs.torch.duplicates import duplicate_nodes
from fuser.graphs.torch.examples import on_examples
from fuser.graphs.torch.facts import Facts, common_dtype
from fuser.graphs.torch.meta import TensorLike, Values, have_one_layout, meta_tensor
from fuser.graphs.torch.names import is_tuple, name_sites, operator_name
from fuser.graphs.torch.operands import (
    BiasAdd,
    as_parameter,
    factors,
    is_matrix_product,
    new_constant,
    set_operands,
    unite,
)
from fuser.graphs.torch.padding import memory_formats, refusal, set_padding
from fuser.graphs.torch.purity import (
    can_be_dropped,
    is_fresh,
    is_guard,
    is_private,
    may_be_written,
    measured_operands,
    uses,
    written_operands,
)
from fuser.graphs.torch.readers import (
    MODULE_READERS,
    READERS,
    Call,
    Literal,
    ModuleCall,
    ModuleTensor,
    Unreadable,
    module_class,
)
from fuser.graphs.torch.tracing import trace
from fuser.graphs.torch.values import is_readable, to_array
from fuser.graphs.torch.wiring import Wiring
from fuser.neutral import MAY_CHANGE_NOTHING, as_identity
from fuser.ops import (
    SMALL_CONSTANT,
    AveragePool,
    Concat,
    Constant,
    Conv,
    Dead,
    Duplicate,
    Identity,
    Linear,
    MaxPool,
    Movement,
    Op,
    Pad,
    Padding,
    Range,
    Reduction,
    Reshape,
    Slice,
    SplitSequence,
    Sum,
    Transpose,
    Value,
)
from fuser.remarks import Missed

O = TypeVar("O", bound=Op)  # noqa: E741


class TorchGraph:
    """A torch.fx graph seen through the vocabulary; see `fuser.graph.Graph` for the contract.

    Values are fx nodes, or `ModuleTensor` and `Literal` for operands that have no node.
    """

    host = "torch"
    rows_only = False

    def __init__(self, carrier: Carrier, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None):
        """args, kwargs: inputs that tell of a graph without shapes how many axes its values have."""
        self.edits = 0
        self._carrier = carrier
        self._wiring = Wiring(carrier)
        self._called = self._wiring.called
        self._constants = Constants(self._wiring.order, self._wiring.origin, self._called)
        self._sites = name_sites(self._wiring.order, self._wiring.scopes, self._constants.is_known)
        unknown = [node for node in self._wiring.order if meta_tensor(node) is None]
        known = self._constants.described(unknown)
        if unknown and (args or kwargs):
            known = {**on_examples(carrier.module, args or (), kwargs or {}), **known}
        self._facts = Facts(unknown, self._called, known)
        self._module_tensors: dict[tuple[str, str], ModuleTensor] = {}

    @classmethod
    def from_module(cls, module: nn.Module) -> TorchGraph:
        """Trace a module with `torch.fx`; raises `InputError` where that is not possible."""
        return cls(ModuleCarrier(trace(module)))

    @classmethod
    def from_graph_module(
        cls, module: fx.GraphModule, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> TorchGraph:
        """A GraphModule: traced, or exported with its parameters as attributes; what it is called with, if known."""
        return cls(ModuleCarrier(Copier().module(module)), args, kwargs)

    @classmethod
    def from_exported_program(cls, program: ExportedProgram) -> TorchGraph:
        """An ExportedProgram, with its parameters as inputs of the graph."""
        return cls(ProgramCarrier(program))

    @classmethod
    def from_captured(cls, module: fx.GraphModule, known: Mapping[int, torch.Tensor | float]) -> TorchGraph:
        """A graph of torch.compile, and what is known of its inputs; see `CapturedCarrier`."""
        return cls(CapturedCarrier(module, known))

    def result(self) -> Any:
        """The edited model, of the kind that was given: a GraphModule or an ExportedProgram."""
        for scope in self._wiring.scopes.values():
            scope.module.recompile()
        return self._carrier.result()

    # -- reading

    def ops(self, kind: type[O]) -> Iterator[O]:
        if kind is Constant:
            yield from cast(Iterator[O], self._constant_ops())
        elif kind is Dead:
            yield from cast(Iterator[O], self._dead_ops())
        elif kind is Duplicate:
            yield from cast(Iterator[O], self._duplicate_ops())
        else:
            kinds = (kind, *MAY_CHANGE_NOTHING) if kind is Identity else kind
            for node in self._wiring.alive():
                if self._constants.is_known(node) or not issubclass(self._kind(node), kinds):
                    continue
                op = self.read(node)
                if op is not None and kind is Identity:
                    op = as_identity(self, op)
                if isinstance(op, kind) and op.node is node:
                    yield op

    def read(self, node: fx.Node) -> Op | None:
        """The node as an op; None where the vocabulary has no word, or the node is not exactly understood."""
        op, sealed = self._read(node), self._wiring.scope(node).sealed
        return op if op is None or sealed is None else replace(op, hooked=sealed)

    def _read(self, node: fx.Node) -> Op | None:
        try:
            if (module := self._called(node)) is not None:
                entry = MODULE_READERS.get(module_class(module))
                return None if entry is None else entry[1](ModuleCall(self, node, module))
            found = signature(node)
            if found is None or found.name not in READERS:
                return None
            if found.name == "getitem" and isinstance(source := node.args[0], fx.Node) and is_tuple(source):
                op = self.read(source)
                return op if op is not None and op.output is node else None
            arguments = bind(node, found)
            return None if arguments is None else READERS[found.name][1](Call(self, node, found.name, arguments))
        except Unreadable:
            return None

    def op_producing(self, value: Value) -> Op | None:
        return self.read(value) if isinstance(value, fx.Node) and not self._constants.is_leaf(value) else None

    def readers(self, value: Value) -> Sequence[Reader]:
        tensor = self._tensor(value)
        if tensor is None:
            return [reader for _, reader in self._uses(value)] if isinstance(value, fx.Node) else []
        found: list[Reader] = []
        for holder in self._wiring.sharers(tensor):
            if holder.op == "call_module":
                found.append(self._reader(holder))
            else:  # what passes it into a body does not read it; the body does
                found += [reader for user, reader in self._uses(holder) if not self._wiring.passes_in(user, holder)]
        return found

    def constant(self, value: Value) -> Array | Missed:
        if isinstance(value, Literal):
            return to_array(torch.tensor(value.number, dtype=value.dtype))
        tensor = self._tensor(value)
        if tensor is None and isinstance(value, fx.Node):
            if self._is_dequantized(value):
                return Missed("quantized", f"{self.describe(value)} is stored quantized")
            if self._constants.is_known(value):
                tensor = self._computed(value)
        if tensor is None:
            return Missed("not-constant", f"{self.describe(value)} is not known before run time")
        if not is_readable(tensor):
            return Missed("not-constant", f"{self.describe(value)} has no numbers: it is a {_kind_of_tensor(tensor)}")
        return to_array(self._constants.look_at(tensor))

    def shape(self, value: Value) -> tuple[Dim, ...] | None:
        if isinstance(value, Literal):
            return ()
        tensor: TensorLike | None = self._tensor(value)
        if tensor is None and isinstance(value, fx.Node):
            tensor = meta_tensor(value)
            if tensor is None:
                tensor = self._known_tensor(value)
        if tensor is None:
            return None
        return tuple(map(_dim, tensor.shape))

    def rank(self, value: Value) -> int | None:
        shape = self.shape(value)
        if shape is None and isinstance(value, fx.Node):
            return self._facts.rank(value)
        return None if shape is None else len(shape)

    def can_vanish(self, op: Op, by: Value) -> bool:
        """Not where two values that somebody can tell apart, or write into, would become the same object."""
        if not isinstance(by, fx.Node):
            return False
        if _is_output(op.output) and (by.op in ("placeholder", "get_attr") or _is_output(by)):
            return False
        if self._needs_strides(op, by):
            return False
        return self._may_share(op.output, by) and self._relaid(op.output, by) is not None

    def is_stable(self, value: Value) -> bool:
        return not isinstance(value, fx.Node) or not may_be_written(value, self._called)

    def freed(self, value: Value) -> int:
        tensor = self._tensor(value)
        if tensor is not None:
            return tensor.numel() if len(self.readers(value)) == 1 else 0
        return self._freed(value) if isinstance(value, fx.Node) and len(value.users) == 1 else 0

    def refuses_padding(self, op: Conv | AveragePool | MaxPool, pad: Pad, padding: Padding) -> Missed | None:
        name = self.describe(op)
        refused = refusal(op, name, padding)
        if refused is None and not self._is_laid_out_alike(pad.output, pad.input):
            return Missed("layout", f"{name} would lay out its result differently in memory")
        return refused

    def refuses_uniting(self, op: Linear) -> Missed | None:
        if is_matrix_product(op.node) or self.freed(op.weight):
            return None
        return Missed("grows", f"{self.describe(op.weight)} would be stored once more, the other way round")

    def describe(self, x: Op | Value) -> str:
        if isinstance(x, Op):
            return self._site(x.node)
        return repr(x.name if isinstance(x, fx.Node) else str(x))

    def summary(self) -> Summary:
        names = (operator_name(node, self._called(node)) for node in self._wiring.alive())
        summary = Summary(dict(Counter(name for name in names if name)))
        stored = {id(tensor): tensor for tensor in self._carrier.tensors()}
        for tensor in stored.values():
            summary.bytes += tensor.numel() * tensor.element_size()
            if tensor.is_floating_point() or tensor.is_complex():  # counters are not parameters
                summary.parameters += tensor.numel()
        summary.multiply_adds = multiply_adds(self, self._wiring)
        return summary

    def constants_seen(self) -> list[torch.Tensor]:
        """The parameters and buffers whose numbers somebody has asked for: what a rewrite may depend on."""
        return list(self._constants.seen.values())

    # -- reading, for the dialects

    def dtype(self, value: fx.Node) -> torch.dtype | None:
        """The type of a value where it is proven."""
        tensor: TensorLike | None = self._tensor(value)
        if tensor is None:
            tensor = meta_tensor(value)
        return self._facts.dtype.get(value) if tensor is None else tensor.dtype

    def common_dtype(self, left: Any, right: Any) -> torch.dtype | None:
        """The floating type of two operands, one of which may be a number, if torch promotes neither."""
        return common_dtype(left, right, self.dtype, self.rank)

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a call_module calls."""
        return self._called(node)

    def is_known(self, value: fx.Node) -> bool:
        """Whether the value is known before run time."""
        return self._constants.is_known(value)

    def is_same_kind(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two values have the same type, device and layout in memory, as far as is proven."""
        x, y = meta_tensor(a), meta_tensor(b)
        return x is not None and y is not None and have_one_layout(x, y)

    def is_private(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether `value` is memory of its own that only `reader` sees."""
        return is_private(value, reader, self._called)

    def first_output(self, node: fx.Node, alone: bool) -> fx.Node:
        """The first element of a node that returns several; `alone`: where nobody reads the others."""
        parts = [(user.target is operator.getitem and user.args[1], user) for user in node.users]
        first = [user for index, user in parts if index == 0 and index is not False]
        others = [user for _, user in parts if user not in first]
        if len(first) != 1 or (alone and any(user.users or user.target is not operator.getitem for user in others)):
            raise Unreadable
        return first[0]

    def bias_add(self, product: fx.Node) -> BiasAdd | None:
        """The bias of a matrix product: an addition of a constant vector that is its only reader.

        The two read as one `Linear`; as two ops, each would offer the other's constant again for ever.
        """
        if len(product.users) != 1:
            return None
        (add,) = product.users
        found = signature(add)
        arguments = bind(add, found) if found is not None and found.name in ("add", "add_") else None
        if arguments is None or arguments["alpha"] != 1:
            return None
        argument = "other" if arguments["self"] is product else "self"
        bias = arguments[argument]
        if not isinstance(bias, fx.Node) or bias is product or not self.is_known(bias):
            return None
        _, weight = factors(product)
        features, shape = self.shape(weight), self.shape(bias)
        if features is None or shape not in ((), (1,), features[1:]) or self.dtype(bias) != self.dtype(weight):
            return None
        return BiasAdd(add, bias, argument)

    def repeated_matrix(self, value: fx.Node) -> fx.Node | None:
        """The constant matrix of which `value` holds a copy for each element of the batch."""
        shape = self.shape(value)
        while shape is not None and len(shape) == 3:
            found = signature(value)
            arguments = bind(value, found) if found is not None and found.name in ("expand", "view") else None
            if arguments is None or not isinstance(source := arguments["self"], fx.Node):
                return None
            inner = self.shape(source)
            if inner == shape[1:] and found is not None and found.name == "expand":
                return source if self.is_known(source) else None
            if inner != shape:
                return None
            value = source
        return None

    def linear_with_bias(self, add: fx.Node) -> Op | None:
        """The `Linear` whose bias this node adds."""
        for operand in add.all_input_nodes:
            found = signature(operand)
            if found is not None and found.name in ("mm", "matmul"):
                bias = self.bias_add(operand)
                if bias is not None and bias.add is add:
                    return self.read(operand)
        return None

    def module_tensor(self, target: str, name: str) -> ModuleTensor:
        """The one handle of a module's parameter or buffer."""
        return self._module_tensors.setdefault((target, name), ModuleTensor(target, name))

    # -- editing

    def set_constants(self, op: Op, **arrays: Array | Scaled | None) -> None:
        computed = {field: None if array is None else np.asarray(array) for field, array in arrays.items()}
        set_operands(self, self._wiring, self._constants, op, computed)
        self.edits += 1

    def set_padding(self, op: Conv | AveragePool | MaxPool, padding: Padding) -> None:
        set_padding(self._wiring, op, padding)
        self.edits += 1

    def replace(self, op: Op, by: Value) -> None:
        output: fx.Node = op.output
        relaid = self._relaid(output, by) if self.can_vanish(op, by) else None
        if relaid is None:
            self._become_copy(op, by)
        else:
            users = list(output.users)
            self._carrier.replaced(output, by)
            output.replace_all_uses_with(by)
            self._wiring.meta.record(relaid)
            self._erase_op(op)
            for user in users:
                self._constants.learn(user)
        self.edits += 1

    def set_input(self, op: Op, value: Value) -> None:
        node, old = op.node, op.input  # type: ignore[attr-defined]
        node.replace_input_with(old, value)
        self._wiring.loosen(old)
        self._wiring.meta.refresh(node)
        self.edits += 1

    def set_inputs(self, op: Concat | Sum, values: Sequence[Value]) -> None:
        node: fx.Node = op.node  # a Concat: no reader here makes a Sum
        found = signature(node)
        assert found is not None
        write(node, found, "tensors", list(values))
        self._wiring.loosen(*op.inputs)
        self.edits += 1

    def set_permutation(self, op: Transpose, permutation: Sequence[int]) -> None:
        node: fx.Node = op.node
        target: Any = aten.permute.default if isinstance(node.target, OpOverload) else torch.permute
        self._wiring.become(node, target, op.input, list(permutation))
        self.edits += 1

    def set_ranges(self, op: Slice, ranges: Sequence[Range]) -> None:
        """Never asked: torch slices one axis at a time, so it offers no slice of several."""
        raise AssertionError(f"{op} is no op of a torch graph")

    def set_shape(self, op: Movement) -> None:
        """Nothing to do: what is `absolute` here says its shape as it is."""

    def unite(self, op: Linear, around: tuple[Reshape, Reshape] | None) -> None:
        assert around is None  # data of more axes is taken as it is
        unite(self, self._wiring, self._constants, op)
        self.edits += 1

    def replace_with_constant(self, op: Op) -> None:
        node: fx.Node = op.node
        value = self._constants.value(node)
        like = self._constants.tensors(node)
        tensor = value.detach()
        if memory(tensor) in map(memory, like) and tensor.nbytes != tensor.untyped_storage().nbytes():
            tensor = tensor.clone()  # a slice would keep the whole alive; a transposed weight may share its memory
        constant = new_constant(self._wiring, self._constants, node, node.name, as_parameter(tensor, like))
        users = list(node.users)
        node.replace_all_uses_with(constant)
        self._wiring.erase(node)
        for user in users:
            self._constants.learn(user)
        self.edits += 1

    def reduce_in_shape(self, op: Reduction, reshape: Reshape) -> None:
        """Never asked: a view costs nothing here."""
        raise AssertionError(f"{op} stays as it is")

    def split(self, op: SplitSequence) -> None:
        """Never asked: a torch graph has no sequences of tensors, so it offers none."""
        raise AssertionError(f"{op} is no op of a torch graph")

    def erase(self, op: Op) -> None:
        self._erase_op(op)
        self.edits += 1

    def commit(self) -> None:
        self._wiring.sweep(self._is_droppable)
        self._wiring.lint()

    # -- ops that are found, not read

    def _constant_ops(self) -> Iterator[Constant]:
        """Known nodes at the edge: what only feeds others of their kind goes with them.

        Where an edge stays, small values that feed it are the edge.
        """
        for node in self._wiring.alive():
            if (
                self._is_sealed(node)
                or not self._is_expression(node)
                or all(self._constants.is_known(user) for user in node.users)
            ):
                continue
            if (op := self._as_constant(node)) is not None:
                yield op
                if not self._wiring.is_erased(node):
                    yield from self._small_constants_behind(node)

    def _small_constants_behind(self, node: fx.Node) -> Iterator[Constant]:
        pending, seen = [node], {node}
        while pending:
            for operand in pending.pop().all_input_nodes:
                if operand in seen or not self._is_expression(operand):
                    continue
                seen.add(operand)
                op = self._as_constant(operand)
                if op is not None and op.elements_made <= SMALL_CONSTANT:
                    yield op
                if not self._wiring.is_erased(operand):
                    pending.append(operand)

    def _as_constant(self, node: fx.Node) -> Constant | None:
        if _is_output(node) or self.repeated_matrix(node) is not None:  # such a view costs nothing
            return None
        value = self._computed(node)
        if value is None:
            return None
        return Constant(node, node, elements_made=value.numel(), elements_freed=self._freed(node))

    def _freed(self, node: fx.Node) -> int:
        """How many elements of constants nobody reads any more once `node` is gone."""
        freed, going = 0, {node}
        pending = [node]
        while pending:
            for operand in pending.pop().all_input_nodes:
                if operand in going or not all(user in going for user in operand.users):
                    continue
                going.add(operand)
                pending.append(operand)
                tensor = self._wiring.origin(operand)
                if isinstance(tensor, torch.Tensor) and len(self._wiring.sharers(tensor)) == 1:
                    freed += tensor.numel()
        return freed

    def _dead_ops(self) -> Iterator[Dead]:
        """From the end to the start, so that what feeds only dead nodes is dead when it is reached."""
        for node in reversed(self._wiring.order):
            is_dead = not self._wiring.is_erased(node) and not node.users and self._is_droppable(node)
            if is_dead and not self._is_sealed(node):
                yield Dead(node, node)

    def _duplicate_ops(self) -> Iterator[Duplicate]:
        for node, twin in duplicate_nodes(self._wiring.alive, self._called, self._tensor):
            if not self._carrier.is_named(node) and not self._is_sealed(node):
                yield Duplicate(node, node, twin)

    # -- reading, inside

    def _is_sealed(self, node: fx.Node) -> bool:
        return self._wiring.scope(node).sealed is not None

    def _kind(self, node: fx.Node) -> type[Op]:
        """What kind of op the node can be; `Op` itself for a node without a word."""
        module, found = self._called(node), signature(node)
        entry: Any = None
        if module is not None:
            entry = MODULE_READERS.get(module_class(module))
        elif found is not None:
            entry = READERS.get(found.name)
        return entry[0] if entry is not None else Op

    def _tensor(self, value: Value) -> torch.Tensor | None:
        """The tensor that is stored under this value, even where its numbers cannot be read."""
        if isinstance(value, ModuleTensor):
            module = attribute(self._carrier.module, value.target)
            found: Any = module._parameters.get(value.name, module._buffers.get(value.name))
        else:
            found = value
        while isinstance(found, fx.Node):
            found = self._wiring.origin(found)
        return found if isinstance(found, torch.Tensor) and not self._constants.is_written(found) else None

    def _known_tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor that is stored, or that an expression of stored ones makes."""
        tensor = self._tensor(node)
        return self._computed(node) if tensor is None and self._constants.is_known(node) else tensor

    def _computed(self, node: fx.Node) -> torch.Tensor | None:
        """The value of an expression of constants; None where it is no tensor."""
        try:
            value = self._constants.value(node)
        except Exception:  # any failure of a single node only means that it stays in the graph
            return None
        return value if isinstance(value, torch.Tensor) and is_readable(value) else None

    def _is_expression(self, node: fx.Node) -> bool:
        return self._constants.is_known(node) and self._wiring.origin(node) is None

    def _is_dequantized(self, node: fx.Node) -> bool:
        found = signature(node)
        quantized = found is not None and found.name.startswith("dequantize_")
        return quantized and all(map(self._constants.is_known, node.all_input_nodes))

    def _is_droppable(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method", "call_module") or self._carrier.is_named(node):
            return False
        return can_be_dropped(node, self._called(node))

    def _reader(self, node: fx.Node) -> Reader:
        return Reader(self._site(node), self.read(node))

    def _uses(self, value: fx.Node) -> Iterator[tuple[fx.Node, Reader]]:
        """One reader for each time that a node takes `value`, and the node."""
        for user in value.users:
            taken = uses(user)
            if user.op == "output":
                label = self._wiring.scope(user).label or "graph"
                yield from (
                    (user, Reader(f"{label} output {i}", None)) for i, node in enumerate(taken) if node is value
                )
            elif not is_guard(self._called(user)):
                measured = measured_operands(user).count(value)
                yield from [(user, self._reader(user)._replace(shape_only=True))] * measured
                yield from [(user, self._reader(user))] * (taken.count(value) - measured)

    def _site(self, node: fx.Node) -> str:
        return self._sites.get(node, node.name)

    # -- editing, inside

    def _may_share(self, output: fx.Node, by: fx.Node) -> bool:
        """Whether it makes no difference that writing into one of the two would be seen in the other."""
        written = written_operands(output, self._called(output))
        are_one = not is_fresh(output, self._called(output)) and written in ([], [by])
        if are_one or self.is_private(by, output):
            return True
        if may_be_written(output, self._called) or may_be_written(by, self._called):
            return False
        return not (self._is_handed_out(output) and self._is_handed_out(by))

    def _is_handed_out(self, value: fx.Node) -> bool:
        """Whether the caller gets the value or a view of it, or gave it; he may write into what he has."""
        pending, seen = [value], {value}
        while pending:
            value = pending.pop()
            if value.op == "placeholder" or _is_output(value):
                return True
            views = [user for user in value.users if user not in seen and not is_fresh(user, self._called(user))]
            pending += views
            seen.update(views)
        return False

    def _relaid(self, output: fx.Node, by: fx.Node) -> Values | None:
        """How other values are laid out if readers of `output` read `by`; None if some reader could not.

        BatchNorm makes what is dense of what it is given; a `view` of its output may not be one of its input.
        """
        old, new = output.meta.get("val"), by.meta.get("val")
        if old is not None and new is not None:
            return {} if have_one_layout(old, new) else self._wiring.meta.relaid(output, new)
        return {} if self._is_dense(by) or not self._is_dense(output) or not self._has_views else None

    def _needs_strides(self, op: Op, by: fx.Node) -> bool:
        """Whether a `view` would be one of what the caller gives, in whatever layout: `op` may have copied that."""
        if op.node.target in _STRIDED or not any(user.target in _STRIDED for user in op.output.users):
            return False
        while isinstance(moved := self.read(by), (Identity, Movement)):
            by = moved.input
        return by.op == "placeholder" and self._wiring.origin(by) is None

    def _is_laid_out_alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether an operator lays out its result after the one as after the other."""
        x, y = a.meta.get("val"), b.meta.get("val")
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return self._wiring.meta.asks(lambda: memory_formats(x) == memory_formats(y))
        return self._is_dense(b) or not self._has_views

    def _is_dense(self, value: fx.Node) -> bool:
        """Whether a value of unknown strides is sure to be in the order of its axes (or of `channels_last`)."""
        while isinstance(op := self.read(value), (Identity, Reshape)):
            value = op.input
        return value.op in ("placeholder", "get_attr") or is_fresh(value, self._called(value))

    @property
    def _has_views(self) -> bool:
        """Whether some operator depends on the strides of its operand."""
        return any(node.target in _STRIDED for node in self._wiring.alive())

    def _become_copy(self, op: Op, by: fx.Node) -> None:
        output: fx.Node = op.output
        target = aten.clone.default if isinstance(op.node.target, OpOverload) else torch.clone
        value = by.meta.get("val")
        if value is not None and have_one_layout(value, output.meta.get("val")):
            self._wiring.become(output, target, by)
        else:
            memory_format = torch.contiguous_format if value is None else self._wiring.meta.copy_format(output, value)
            self._wiring.become(output, target, by, memory_format=memory_format)
        if op.node is not output:
            self._wiring.erase(op.node)

    def _erase_op(self, op: Op) -> None:
        """Erase the nodes of an op: its output, its unread further outputs, and the node itself."""
        for node in dict.fromkeys((op.output, op.node)):
            for user in list(node.users):
                if user.target is operator.getitem and not user.users:
                    self._wiring.erase(user)
            self._wiring.erase(node)


def _dim(size: int | torch.SymInt) -> Dim:
    """A symbolic size may be a number: of an axis that was declared dynamic, and turned out to have but one size."""
    if isinstance(size, int):
        return size
    number: int | None = size.node.maybe_as_int()
    return str(size) if number is None else number


def _is_output(value: fx.Node) -> bool:
    return any(user.op == "output" for user in value.users)


def _kind_of_tensor(tensor: torch.Tensor) -> str:
    return "tensor on the meta device" if tensor.device.type == "meta" else type(tensor).__name__


_STRIDED = frozenset(
    {"view", "view_as", "as_strided", "stride", torch.as_strided, aten.view.default, aten.view_as.default}
)
