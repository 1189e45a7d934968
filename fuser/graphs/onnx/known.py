"""Which values of an ONNX model are known before run time, what they are, and what shapes are proven."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from fuser.files import ModelFile
from fuser.graph import Array, Dim
from fuser.graphs.onnx.editor import ABSENT, OLDEST_OPSET, Constant, Node, Scope, Tensor, export_node, names_read
from fuser.graphs.onnx.sizes import MAX_SIZES, SIZE_OPERATORS, SizeArithmetic
from fuser.graphs.onnx.values import (
    EVALUABLE,
    CannotEvaluate,
    Shape,
    are_worth_trusting,
    attribute_value,
    elements,
    evaluate,
    for_inference,
    infer_shapes,
    is_invented,
    numpy_dtype,
    type_and_shape,
)
from fuser.graphs.onnx.wiring import Wiring, has_references, is_standard
from fuser.remarks import Missed

_FOLDABLE = EVALUABLE | {"Constant"}
_NEED_A_SHAPE = {"Shape", "Size"}
"""Operators that may be known although their first operand is not."""

_NOT_INFERRED = {"GroupNormalization"}
"""Operators whose output is shaped as their first operand is, which inference does not say."""

_TOLD = _NOT_INFERRED | {"Reshape"}
"""Operators of whose output more may be known here than inference says."""

SMALL = 1 << 20
"""Computed values up to this many bytes are kept."""

RESHAPES = 8
"""No more in a row are looked through for what inference did not see; the rewrites leave one of them."""

RECENT = 1 << 26
"""So many bytes of larger ones are kept, too: those that were computed last."""


class KnownValues:
    """Constants, and whatever follows from constants alone.

    A value is *overridable* when it is an initializer that a caller may replace, and *quantized* when it comes
    out of a DequantizeLinear of constants: known, but not to be turned into floating point.

    frozen: initializers that are also graph inputs count as constants.
    """

    def __init__(self, model: ModelFile, wiring: Wiring, overridable: set[str], *, frozen: bool) -> None:
        self._trained = _trained(model.proto)
        self._model, self._wiring = model, wiring
        self._quantized: dict[int, Tensor] = {}
        self.overridable: dict[int, Tensor] = {}
        self._values: dict[int, Array] = {}
        self._recent: dict[int, Array] = {}
        self._types: dict[int, tuple[int, Shape | None]] | None = None
        self._trusts_declared = False
        # What inference was told beside the graph, by name.
        self._told_sizes: dict[str, Array] = {}
        self._told_shapes: dict[str, tuple[int, Shape]] = {}
        self._sizes = SizeArithmetic(self.shape, self._small)
        self._sized: dict[int, Node] = {}
        for scope in wiring.scopes:
            for tensor in scope.names.values():
                replaceable = tensor.name in self._trained or (tensor.name in overridable and not frozen)
                if scope is wiring.scopes[0] and replaceable:
                    self.overridable[id(tensor)] = tensor
                elif isinstance(tensor, Constant) and tensor.proto is not None:
                    tensor.known = True
        for node in wiring.order:
            self._classify(node)
        self._infer_further()
        self._visible = self._visible_targets()

    def value(self, tensor: Tensor) -> Array | Missed:
        """The value, or why it is not known."""
        if tensor.known:
            try:
                return self._stored(tensor) if isinstance(tensor, Constant) else self.evaluate(tensor)
            except CannotEvaluate as error:
                return Missed("not-constant", f"{tensor.name!r} is not known before run time: {error}")
        if id(tensor) in self.overridable and tensor.name in self._trained:
            return Missed("overridable", f"the initializer {tensor.name!r} is updated by the model's training_info")
        if id(tensor) in self.overridable:
            return Missed(
                "overridable",
                f"the initializer {tensor.name!r} is also a graph input, so a caller may replace it",
                "--freeze-inputs makes such inputs constant",
            )
        if id(tensor) in self._quantized:
            return Missed(
                "quantized",
                f"{tensor.name!r} comes out of a DequantizeLinear",
                "optimize the float model, and quantize after that",
            )
        return Missed("not-constant", f"{tensor.name!r} is not known before run time")

    def is_foldable(self, node: Node) -> bool:
        """Whether all that the node makes is known: its inputs are, and it does the same every time."""
        if id(node) in self._sized:
            return True
        if node.inputs and not node.inputs[0].known and node.op not in _NEED_A_SHAPE:
            return False  # mostly the first operand decides; no such operator can go without it
        if node.op not in _FOLDABLE or not is_standard(node):
            return False
        scope = node.scope
        if scope.frozen or scope.opset < OLDEST_OPSET:
            return False
        if node.op == "Constant":
            return bool(node.attrs) and "sparse_value" not in node.attrs and not has_references(node)
        if not node.inputs:
            return False
        for position, tensor in enumerate(node.inputs):
            if not tensor.known and tensor is not ABSENT and self._stand_in(node, position) is None:
                return False
        return not has_references(node)

    def evaluate(self, value: Tensor) -> Array:
        """The value of a known tensor; without recursion, for chains of any length.  Raises `CannotEvaluate`."""
        pending = [value]
        fresh: dict[int, Array] = {}
        while pending:
            tensor = pending[-1]
            if self._lookup(tensor, fresh) is not None:
                pending.pop()
            elif isinstance(tensor, Constant):
                fresh[id(tensor)] = self._stored(tensor)
            elif tensor.producer is None:
                raise CannotEvaluate(f"nothing makes {tensor.name!r}")
            else:
                node = tensor.producer
                inputs = [self._operand(node, position, fresh) for position in range(len(node.inputs))]
                missing = [t for t, x in zip(node.inputs, inputs, strict=True) if x is None and t is not ABSENT]
                pending += missing
                if not missing:
                    self._keep(node, self._compute(node, inputs), fresh)
                    if self._lookup(tensor, fresh) is None:
                        raise CannotEvaluate(f"{node.op} does not make {tensor.name!r}")
        found = self._lookup(value, fresh)
        assert found is not None
        return found

    def element_type(self, tensor: Tensor) -> int | None:
        """The ONNX element type, where it is known."""
        if isinstance(tensor, Constant):
            return None if tensor.proto is None else tensor.proto.data_type
        return self._inferred().get(id(tensor), (0, None))[0] or None

    def shape(self, tensor: Tensor, through: int = RESHAPES) -> Shape | None:
        """What is inferred, or follows from the value itself: inference does not look into functions.

        through: how many Reshapes in a row are looked through.
        """
        if isinstance(tensor, Constant):
            return tensor.sizes
        inferred = self._inferred_shape(tensor)
        if through and (node := tensor.producer) is not None:
            if node.op == "Reshape":
                inferred = self._reshaped(node, inferred, through)
            elif inferred is None and node.op in _NOT_INFERRED and node.inputs and is_standard(node):
                inferred = self.shape(node.inputs[0], through - 1)
        if inferred is None and tensor.known:
            with contextlib.suppress(CannotEvaluate):
                return tuple(self.evaluate(tensor).shape)
        return inferred

    def _reshaped(self, node: Node, inferred: Shape | None, through: int) -> Shape | None:
        """What a Reshape to a known shape makes: inference saw neither how that is computed nor what was since."""
        if (inferred is not None and elements(inferred) is not None) or len(node.inputs) < 2 or not is_standard(node):
            return inferred
        target = self._target(node.inputs[1])
        if target is None or (inferred is not None and len(inferred) != len(target)):
            return inferred
        source = self.shape(node.inputs[0], through - 1)
        told = _resized(source, target, allow_zero=bool(node.attrs.get("allowzero")))
        here = inferred or (None,) * len(target)
        return tuple(b if isinstance(b, int) or a is None else a for a, b in zip(here, told, strict=True))

    def learn(self) -> None:
        """Look again at what was not known: edits make shapes known, and sizes are made of shapes.

        A Reshape whose target became a constant tells inference of what is behind it.
        """
        visible = self._visible_targets()
        if new := visible - self._visible:
            self._visible = visible
            self._told_shapes = {name: told for name, told in self._told_shapes.items() if name not in new}
            known = self._inferred()
            self._types = {}
            self._collect(self._wiring.scopes[0], self._infer(self._told_sizes, self._told_shapes))
            for key, (element_type, shape) in known.items():
                now = self._types.get(key, (0, None))
                self._types[key] = now[0] or element_type, _both(shape, now[1])
        for node in self._wiring.order:
            if not node.erased and not (node.outputs and node.outputs[0].known):
                self._classify(node)

    def _visible_targets(self) -> set[str]:
        """The Reshapes of the main graph, by what they make, whose targets inference sees."""
        main = self._wiring.scopes[0]
        reshapes = [node for node in self._wiring.of(["Reshape"]) if node.scope is main and len(node.inputs) > 1]
        return {output.name for node in reshapes for output in node.outputs if isinstance(node.inputs[1], Constant)}

    def _target(self, tensor: Tensor) -> Shape | None:
        """What is known of the target of a Reshape."""
        value = self.value(tensor)
        if not isinstance(value, Missed):
            return tuple(int(size) for size in value)
        sizes = self._sizes.of(tensor)
        return None if sizes is None or sizes.ndim != 1 else tuple(sizes)

    def inherit(self, tensor: Tensor, source: Tensor) -> None:
        """`tensor` now holds what `source` held."""
        if self._types is not None and id(source) in self._types:
            self._types.setdefault(id(tensor), self._types[id(source)])

    def state(self, tensor: Tensor, element_type: int | None, shape: Shape) -> None:
        """What an edit knows of a new value."""
        self._inferred()[id(tensor)] = element_type or TensorProto.UNDEFINED, shape

    def set_size(self, tensor: Tensor, axis: int, size: int) -> None:
        """The size of one axis of `tensor` is no longer what was inferred."""
        element_type, shape = self._inferred().get(id(tensor), (0, None))
        if shape:
            sizes = list(shape)
            sizes[axis] = size
            self._inferred()[id(tensor)] = element_type, tuple(sizes)

    # -- one sweep at the start

    def _classify(self, node: Node) -> None:
        if (self._quantized or node.op == "DequantizeLinear") and self._is_quantized(node):
            self._quantized.update((id(output), output) for output in node.outputs if output is not ABSENT)
        elif self.is_foldable(node):
            for output in node.outputs:
                output.known = output is not ABSENT
        elif node.op in SIZE_OPERATORS:
            self._classify_sizes(node)

    def _classify_sizes(self, node: Node) -> None:
        """Sizes may be known where not all of the shape is that they are taken from."""
        if not is_standard(node) or node.scope.frozen or has_references(node):
            return
        sizes = self._sizes.visit(node)
        if sizes is None or not all(isinstance(size, int) for size in sizes.flat):
            return
        element_type = self.element_type(node.outputs[0])
        dtype = None if element_type is None else numpy_dtype(element_type)
        if dtype is None or dtype.kind not in "ib":
            return
        with contextlib.suppress(OverflowError):
            array = sizes.astype(dtype)
            array.flags.writeable = False
            node.outputs[0].known = True
            self._values[id(node.outputs[0])] = array
            self._sized[id(node)] = node

    def reshape_target(self, tensor: Tensor, data: Tensor) -> Array | None:
        """What a Reshape of `data` may be given for `tensor`, sizes of which not all are known; None for no such thing.

        A size that the axis of `data` at its place has is copied: 0.  A single one that is not known is told by the
        number of elements: -1, unless another 0 or -1 says something.
        """
        sizes, shape = self._sizes.of(tensor), self.shape(data) or ()
        if sizes is None or sizes.ndim != 1:
            return None
        known = [size for size in sizes if isinstance(size, int)]
        if len(known) == sizes.size - 1 and all(size > 0 for size in known):
            return np.array([size if isinstance(size, int) else -1 for size in sizes], np.int64)
        here = (*shape, *[None] * sizes.size)
        if all(isinstance(size, int) or (size is not None and size == here[i]) for i, size in enumerate(sizes)):
            return np.array([size if isinstance(size, int) else 0 for size in sizes], np.int64)
        return None

    def _small(self, tensor: Tensor) -> Array | None:
        """The value of a small constant."""
        if not tensor.known:
            return None
        shape = self.shape(tensor)
        count = None if shape is None else elements(shape)
        if count is None or count > MAX_SIZES:
            return None
        with contextlib.suppress(CannotEvaluate):
            return self.evaluate(tensor)
        return None

    def _is_quantized(self, node: Node) -> bool:
        given = [tensor for tensor in node.inputs if tensor is not ABSENT]
        if node.op == "DequantizeLinear":
            return bool(given) and (given[0].known or id(given[0]) in self._quantized)
        if not any(id(tensor) in self._quantized for tensor in given):
            return False
        return all(id(tensor) in self._quantized or tensor.known for tensor in given)

    # -- computing

    def _lookup(self, tensor: Tensor, fresh: dict[int, Array]) -> Array | None:
        for values in (fresh, self._values, self._recent):
            if id(tensor) in values:
                return values[id(tensor)]
        return None

    def _operand(self, node: Node, position: int, fresh: dict[int, Array]) -> Array | None:
        found = self._lookup(node.inputs[position], fresh)
        if found is not None or node.inputs[position].known:
            return found
        return self._stand_in(node, position)

    def _stand_in(self, node: Node, position: int) -> Array | None:
        """For an operand of which only the type or the shape matters: an array that has it, without storage."""
        if (node.op, position) == ("CastLike", 1):
            element_type = self.element_type(node.inputs[1])
            dtype = None if element_type is None else numpy_dtype(element_type)
            return None if dtype is None else np.zeros((), dtype)
        if node.op in ("Shape", "Size"):
            shape = self.shape(node.inputs[0])
            if shape is not None and elements(shape) is not None:
                return np.broadcast_to(np.zeros((), np.bool_), shape)  # type: ignore[arg-type]
        return None

    def _compute(self, node: Node, inputs: Sequence[Array | None]) -> Sequence[Array | None]:
        if node.op == "Constant":
            if isinstance(node.attrs.get("value"), Constant):
                return [self._stored(node.attrs["value"])]
            value = None if node.proto is None else attribute_value(node.proto.attribute[0])
            if value is None:
                raise CannotEvaluate("its Constant node holds a kind of value that is not understood")
            return [value]
        declared = [self._inferred_shape(output) for output in node.outputs]
        return evaluate(export_node(node), node.scope.opset, inputs, declared)

    def _keep(self, node: Node, arrays: Sequence[Array | None], fresh: dict[int, Array]) -> None:
        for output, array in zip(node.outputs, arrays, strict=False):
            if array is None or output is ABSENT:
                continue
            array.flags.writeable = False
            fresh[id(output)] = array
            if array.nbytes <= SMALL:
                self._values[id(output)] = array
            elif array.nbytes <= RECENT:
                self._recent[id(output)] = array
                while sum(kept.nbytes for kept in self._recent.values()) > RECENT:
                    del self._recent[next(iter(self._recent))]

    def _stored(self, tensor: Constant) -> Array:
        if tensor.proto is None:
            raise CannotEvaluate(f"{tensor.name!r} is sparse")
        return self._model.array(tensor.proto)

    # -- types and shapes

    def _inferred(self) -> dict[int, tuple[int, Shape | None]]:
        if self._types is None:
            self._types = {}
            graph = self._model.proto.graph
            inferred = self._infer()
            self._trusts_declared = are_worth_trusting((*graph.value_info, *graph.output), _infos(inferred))
            self._collect(self._wiring.scopes[0], self._infer() if self._trusts_declared else inferred)
        return self._types

    def _infer(
        self, sizes: Mapping[str, Array] | None = None, shapes: Mapping[str, tuple[int, Shape]] | None = None
    ) -> GraphProto:
        """The graph with what inference says of its values; see `infer_shapes`."""
        main, silent = self._wiring.scopes[0], self._silent()
        nodes = [export_node(node) for node in self._wiring.order if node.scope is main and not node.erased]
        stored = [t for name, t in main.names.items() if name not in silent and name not in main.dropped]
        tensors = [t.proto for t in stored if isinstance(t, Constant) and isinstance(t.proto, TensorProto)]
        seen = for_inference(self._model.proto, nodes, tensors, trusts_declared=self._trusts_declared)
        return infer_shapes(seen, sizes, shapes).graph

    def _silent(self) -> set[str]:
        """The parameters of BatchNorms, often most of what is stored: nothing depends on their shapes."""
        norms = [node for node in self._wiring.of(["BatchNormalization"]) if len(node.outputs) == 1]
        read = [tensor for node in norms for tensor in node.inputs[1:] if len(tensor.slots) == 1]
        main = self._wiring.scopes[0]
        return {t.name for t in read if isinstance(t, Constant) and t.home is main and not t.public}

    def _infer_further(self) -> None:
        """Infer shapes again with what was computed, until that tells nothing new.

        Inference does not compute the operand of a Reshape, nor divide sizes that have names; and behind a value whose
        size is not known, a `Shape` is not known before run time, nor is what is computed of it.
        """
        sizes: dict[str, Array] = {}
        shapes: dict[str, tuple[int, Shape]] = {}
        while True:
            new_sizes: dict[str, Array] = {}
            new_shapes = self._reshaped_shapes(shapes)
            if self._has_unknown_shapes():
                edge = [output for output in self._computed_edge() if output.name not in sizes | shapes]
                new_sizes = {output.name: value for output in edge if (value := self._size(output)) is not None}
                # What is no size is asked only when all else has told what it could: it may be large.
                new_shapes = new_shapes if new_sizes or new_shapes else self._unknown_shapes(edge)
            if not new_sizes and not new_shapes:
                self._told_sizes, self._told_shapes = sizes, shapes
                return
            sizes, shapes = sizes | new_sizes, shapes | new_shapes
            self._collect(self._wiring.scopes[0], self._infer(sizes, shapes))
            for node in self._wiring.order:
                self._classify(node)

    def _reshaped_shapes(self, told: Collection[str]) -> dict[str, tuple[int, Shape]]:
        """What Reshapes of the main graph make, where their targets tell more than inference did; each but once.

        And what is made by operators of which inference says nothing.
        """
        main = self._wiring.scopes[0]
        found: dict[str, tuple[int, Shape]] = {}
        for node in self._wiring.order:
            if node.op not in _TOLD or node.scope is not main or not node.outputs:
                continue
            output = node.outputs[0]
            if output.name in told:
                continue
            shape, element_type = _lasting(self.shape(output)), self.element_type(output)
            if node.op in _NOT_INFERRED and node.inputs:
                element_type = self.element_type(node.inputs[0])
            if shape and element_type and shape != _lasting(self._inferred_shape(output)) and not output.public:
                found[output.name] = element_type, shape
        return found

    def _has_unknown_shapes(self) -> bool:
        return any(
            not _is_proven(self._inferred_shape(output)) and output is not ABSENT and not self.is_foldable(node)
            for node in self._wiring.order
            for output in node.outputs
        )

    def _computed_edge(self) -> list[Tensor]:
        """What nodes of the main graph make of constants alone, and other nodes read."""
        main = self._wiring.scopes[0]
        return [
            output
            for node in self._wiring.order
            if node.scope is main and node.op != "Constant" and self.is_foldable(node)
            for output in node.outputs
            if not all(map(self.is_foldable, output.slots.values()))
        ]

    def _size(self, tensor: Tensor) -> Array | None:
        """The value, where it can say a shape, axes or bounds: a few whole numbers."""
        shape, element_type = self._inferred_shape(tensor), self.element_type(tensor)
        if element_type not in (None, TensorProto.INT64, TensorProto.INT32):
            return None
        if shape is not None and (elements(shape) or 0) > MAX_SIZES:
            return None
        with contextlib.suppress(CannotEvaluate):
            value = self.evaluate(tensor)
            return value if value.dtype.kind == "i" and value.size <= MAX_SIZES else None
        return None

    def _unknown_shapes(self, tensors: Sequence[Tensor]) -> dict[str, tuple[int, Shape]]:
        """Element types and shapes that only the values tell."""
        found: dict[str, tuple[int, Shape]] = {}
        for tensor in tensors:
            if not _is_proven(self._inferred_shape(tensor)):
                with contextlib.suppress(CannotEvaluate, KeyError):
                    value = self.evaluate(tensor)
                    found[tensor.name] = int(helper.np_dtype_to_tensor_dtype(value.dtype)), value.shape
        return found

    def _inferred_shape(self, tensor: Tensor) -> Shape | None:
        return self._inferred().get(id(tensor), (0, None))[1]

    def _collect(self, scope: Scope, graph: GraphProto) -> None:
        assert self._types is not None
        for info in _infos(graph):
            if (tensor := scope.names.get(info.name)) is not None:
                self._types[id(tensor)] = type_and_shape(info)
        if scope.frozen or not scope.children:
            return
        children: dict[tuple[str, ...], list[Scope]] = {}
        for child in scope.children:
            assert child.owner is not None
            children.setdefault(tuple(output.name for output in child.owner.outputs), []).append(child)
        for node in graph.node:
            bodies = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
            for child, body in zip(children.get(tuple(node.output), ()), bodies, strict=False):
                self._collect(child, body)


def _trained(model: ModelProto) -> set[str]:
    """The names of the main graph that training reads or updates."""
    names: set[str] = set()
    for info in model.training_info:
        names |= names_read(info.initialization) | names_read(info.algorithm)
        names |= {binding.key for binding in (*info.initialization_binding, *info.update_binding)}
    return names


@lru_cache(maxsize=1 << 12)
def _is_proven(shape: Shape | None) -> bool:
    """Whether every size is a number, or has a name that is not one of those that inference invents."""
    return shape is not None and not any(map(is_invented, shape))


def _both(before: Shape | None, now: Shape | None) -> Shape | None:
    """What two inferences say of a value."""
    kept = _lasting(before)
    if kept is None or now is None or len(kept) != len(now):
        return kept if now is None else now
    return tuple(a if is_invented(b) and a is not None else b for a, b in zip(kept, now, strict=True))


def _lasting(shape: Shape | None) -> Shape | None:
    """Without the names that an inference invented: the next one may give them to other sizes."""
    return None if shape is None else tuple(None if is_invented(size) else size for size in shape)


def _infos(graph: GraphProto) -> Iterator[ValueInfoProto]:
    """What is said of the values of a graph."""
    yield from (*graph.input, *graph.value_info, *graph.output)


def _resized(source: Shape | None, target: Shape, *, allow_zero: bool) -> Shape:
    """The shape that a Reshape of `source` to `target` makes: 0 copies a size, -1 is what the others leave."""
    copies = [i for i, size in enumerate(target) if size == 0 and not allow_zero]
    copied = (*(source or ()), *[None] * len(target))
    told = [copied[i] if i in copies else None if size == -1 else size for i, size in enumerate(target)]
    if source is not None and target.count(-1) == 1:
        given = [size for i, size in enumerate(source) if i not in copies]
        taken = [size for i, size in enumerate(target) if i not in copies and size != -1]
        told[target.index(-1)] = _quotient(given, taken)
    return tuple(told)


def _quotient(given: list[Dim], taken: list[Dim]) -> int | None:
    """What is left of a product of sizes, when that of others is taken out; those with names have to cancel out."""
    left = Counter(size for size in given if not isinstance(size, int))
    if None in left or left != Counter(size for size in taken if not isinstance(size, int)):
        return None
    numbers = [math.prod(size for size in sizes if isinstance(size, int)) for sizes in (given, taken)]
    return numbers[0] // numbers[1] if numbers[1] and numbers[0] % numbers[1] == 0 else None
