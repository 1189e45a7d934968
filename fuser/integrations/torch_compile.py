"""`torch.compile(model, backend="fuser")`: the passes run on each captured graph, then another compiler takes it.

    compiled = torch.compile(model.eval(), backend="fuser", options={"compiler": "inductor", "report": print})
    with torch.inference_mode():
        compiled(x)

Dynamo captures what it can, with guards on shapes, types and modes, and passes parameters and buffers to the graph
as inputs.  While the passes run, these are known.  Afterwards only what a rewrite may depend on is held constant;
everything else is read from the module at each call, as ever.  What is held constant is compared with the module's
values at each call: after an update the passes run again, and the new constants take the place of the old ones.

Some graphs are left to the compiler as they are, with a warning: where gradients may be asked for, under autocast
(it decides about types while the graph runs), and in functions that `torch.func` transforms.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn

from fuser import registry
from fuser.errors import InputError, PassError, VerificationError
from fuser.graphs.torch.bodies import placeholders
from fuser.graphs.torch.captured import is_number, is_parameter
from fuser.graphs.torch.graph import TorchGraph
from fuser.graphs.torch.purity import may_be_written
from fuser.graphs.torch.values import is_readable
from fuser.job import Job
from fuser.report import Report
from fuser.rewrite import Contract
from fuser.sources import TorchSource

Compiled: TypeAlias = Callable[..., Any]
Compiler: TypeAlias = Callable[[fx.GraphModule, list[Any]], Compiled]
Known: TypeAlias = dict[int, "torch.Tensor | float"]
"""What is known of the inputs of a graph, by position."""

FOLLOWING = ("eager", "aot_eager", "aot_eager_decomp_partition", "cudagraphs", "inductor")
"""Compilers that read a graph's constants at each call, so that new numbers can be put in their place."""

MANY = 3
"""After so many calls in a row that each find new values, the graph is no longer kept up with them."""

log = logging.getLogger("fuser")


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` takes.

    compiler: who gets the optimized graph: the name of a backend of torch.compile, or a function like one.
    passes, skip, shared_weights: as for `fuser.optimize`.
    updates: how a change of a constant is noticed.  "values" compares the numbers at each call, and so reads the
        folded weights once.  "versions" looks at the tensors' identity and version counter, which costs next to
        nothing, but cannot see what is written through `.data`, through NumPy, or by another process.
    verify: compare the rewritten graph with the captured one, judged by float64, and leave out what is wrong.  After
        an update the same rewrites are made with new numbers, and only checked one by one.
    report: called with the `Report` of each graph.
    """

    compiler: str | Compiler = "inductor"
    passes: Iterable[str] | None = None
    skip: Iterable[str] = ()
    shared_weights: str = "copy"
    updates: Literal["values", "versions"] = "values"
    verify: bool = True
    report: Callable[[Report], object] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Raises `InputError` for an option that does not exist, or a value that it cannot have."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise InputError(f"backend='fuser' has no option {name!r}; it takes {', '.join(names)}")
        for name, allowed in (("updates", ("values", "versions")), ("shared_weights", ("copy", "refuse"))):
            if given.get(name, allowed[0]) not in allowed:
                raise InputError(f"{name} is one of {', '.join(allowed)}; not {given[name]!r}")
        return cls(**given)


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a graph that Dynamo captured; torch calls this for `backend="fuser"`.

    mode: as for torch.compile with Inductor.
    options: see `Options`.

    Raises `InputError` for an unknown option, compiler or pass, and what the compiler raises.
    """
    chosen = Options.of(options or {})
    compiler = _compiler(chosen.compiler, mode)
    passes = registry.load().select(chosen.passes, chosen.skip, shared_weights=chosen.shared_weights)
    why = _unfit(module, example_inputs)
    if not why:
        try:
            optimizer = _Optimizer(module, example_inputs, passes, by_value=chosen.updates == "values")
            optimized = optimizer.optimize(example_inputs, verify=chosen.verify)
            compiled = compiler(optimized.module, list(example_inputs))  # may tell Dynamo to start over
            if chosen.report is not None:
                chosen.report(optimized.report)
            if not optimized.report.applied:
                return compiled
            return _Following(optimizer, optimized, compiled, chosen.compiler in FOLLOWING).run
        except (PassError, VerificationError) as error:
            why = str(error)
    warnings.warn(f"fuser leaves a graph to the compiler as it is: {why}", stacklevel=2)
    return compiler(module, list(example_inputs))


def _compiler(chosen: str | Compiler, mode: str | None) -> Compiler:
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    if chosen == "fuser":
        raise InputError("the compiler that comes after fuser cannot be fuser")
    try:
        compiler = lookup_backend(chosen)
    except InvalidBackend as error:
        raise InputError(f"there is no compiler {chosen!r}: torch.compiler.list_backends() names them") from error
    if mode is None:
        return compiler
    from torch._inductor import list_mode_options

    return partial(compiler, config_patches=list_mode_options(mode))  # type: ignore[call-arg]


def _unfit(module: fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    """Why the graph cannot be optimized; empty where it can."""
    tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
    targets = {node.target for node in module.graph.nodes if node.op == "call_function"}
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients may be asked for; call it under torch.inference_mode() or torch.no_grad()"
    if any("_functorch" in (getattr(target, "__module__", None) or "") for target in targets):
        return "it is transformed by torch.func"
    if any(node.target is torch._C._set_grad_enabled and node.args[0] for node in module.graph.nodes):
        return "it computes gradients"
    if torch.amp.autocast_mode._enter_autocast in targets or any(map(_is_autocast, {t.device.type for t in tensors})):
        return "autocast decides about its types while it runs; convert the model, as by model.bfloat16()"
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return "its parameters are no inputs: torch._dynamo.config.inline_inbuilt_nn_modules is off"
    return ""


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@dataclass
class _Optimized:
    """module: the graph for the values its parameters had; its new constants are attributes.

    watches: the inputs that it depends on without reading them.
    """

    module: fx.GraphModule
    watches: list[_Watch]
    report: Report

    def constants(self) -> dict[str, torch.Tensor]:
        """The new constants by name."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def program(self) -> Any:
        """What is computed, apart from the values of the new constants."""
        code = [(name, part.code) for name, part in self.module.named_modules() if isinstance(part, fx.GraphModule)]
        kinds = [(name, t.shape, t.stride(), t.dtype, t.device) for name, t in self.constants().items()]
        return code, kinds


class _Optimizer:
    """Runs the passes over one captured graph, as often as its parameters change.

    by_value: whether parameters are compared by their numbers.
    """

    def __init__(
        self, module: fx.GraphModule, example_inputs: Sequence[Any], passes: list[Any], by_value: bool
    ) -> None:
        self.module, self._passes, self._by_value = module, passes, by_value
        inputs = placeholders(module.graph)
        written = {i for i, node in enumerate(inputs) if may_be_written(node, _no_module)}
        self._written = [i for i in written if isinstance(example_inputs[i], torch.Tensor)]
        memory = {_storage(example_inputs[i]) for i in self._written}
        self._numbers = [i for i, node in enumerate(inputs) if is_number(node)]
        self._parameters = [
            i
            for i, node in enumerate(inputs)
            if is_parameter(node) and is_readable(example_inputs[i]) and _storage(example_inputs[i]) not in memory
        ]

    def optimize(self, args: Sequence[Any], *, verify: bool) -> _Optimized:
        """Raises `PassError` and `VerificationError` as `fuser.optimize` does."""
        known = self._known(args)
        graphs: list[TorchGraph] = []

        def open_graph() -> TorchGraph:
            graphs.append(TorchGraph.from_captured(self.module, known))
            return graphs[-1]

        name = f"graph {self.module.meta.get('dynamo_compile_id', '')}".strip()
        job = Job(TorchSource(name, self.module, open_graph, may_lack_inputs=True), self._passes, None)
        job.rewrite()
        if verify:
            job.prove(partial(self._check, known, args), abort=False, whole=False)
        module: fx.GraphModule = job.finish()
        seen = {id(tensor) for graph in graphs for tensor in graph.constants_seen()}
        watched = [i for i in known if i in self._numbers or id(known[i]) in seen]
        watches = [_Watch.of(args[i], i, self._by_value or i in self._numbers) for i in watched]
        return _Optimized(module, watches, job.report)

    def may_alias(self, args: Sequence[Any], watches: Iterable[_Watch]) -> bool:
        """Whether the graph would write into memory of what it holds constant."""
        if not self._written:
            return False
        memory = {_storage(args[watch.position]) for watch in watches}
        return any(_storage(args[position]) in memory for position in self._written)

    def _known(self, args: Sequence[Any]) -> Known:
        return {**{i: args[i] for i in self._parameters}, **{i: args[i].item() for i in self._numbers}}

    def _check(self, known: Known, args: Sequence[Any], candidate: Any, contract: Contract) -> Any:
        from fuser import proof

        state = {i: args[i] for i in known}
        free = tuple(_plain(value) for i, value in enumerate(args) if i not in known)
        before, after = _Closed(self.module, state), _Closed(candidate, state)
        return proof.verify(before, after, example_inputs=free, contract=contract.value)


class _Following:
    """A compiled graph whose constants follow the parameters they were made from.

    can_follow: whether the compiler reads the constants at each call.
    """

    def __init__(self, optimizer: _Optimizer, optimized: _Optimized, compiled: Compiled, can_follow: bool) -> None:
        self._optimizer, self._optimized, self._compiled = optimizer, optimized, compiled
        self._can_follow = can_follow
        self._lock = threading.Lock()
        self._changes = 0  # in a row

    def run(self, *args: Any) -> Any:
        """Call the compiled graph; the captured one, in eager mode, once it cannot follow."""
        watches = self._optimized.watches
        if self._optimizer.may_alias(args, watches):
            return self._optimizer.module(*args)
        if all(watch.is_same(args) for watch in watches):
            self._changes = 0
            return self._compiled(*args)
        with self._lock:
            self._changes += 1
            if why := self._follow(args):
                warnings.warn(
                    f"a parameter of a graph that fuser has optimized has changed, and {why}; the graph now runs as "
                    "it was captured, in eager mode, until torch.compiler.reset()",
                    stacklevel=2,
                )
                self._optimized, self._compiled = (
                    _Optimized(self._optimizer.module, [], self._optimized.report),
                    self._optimizer.module,
                )
        return self._compiled(*args)

    def _follow(self, args: Sequence[Any]) -> str:
        """Renew the constants; why that cannot be, or nothing."""
        if not self._can_follow or _freezes():
            return "the compiler may hold the old value"
        if self._changes >= MANY:
            return f"so it has before each of the last {MANY} calls"
        try:
            new = self._optimizer.optimize(args, verify=False)
        except (PassError, VerificationError) as error:
            return str(error)
        if new.program() != self._optimized.program():
            return "other rewrites apply to the new value"
        with torch.no_grad():
            for name, constant in self._optimized.constants().items():
                constant.copy_(new.constants()[name])
        self._optimized.watches = new.watches
        log.info("a parameter has changed: %d constants renewed", len(new.constants()))
        return ""


class _Watch:
    """The value that an input had, to tell whether it still has it."""

    def __init__(self, position: int, bits: torch.Tensor | None, tensor: torch.Tensor) -> None:
        self.position, self._bits = position, bits
        self._reference = weakref.ref(tensor)
        self._pointer = tensor.data_ptr()
        self._version = 0 if tensor.is_inference() else tensor._version

    @classmethod
    def of(cls, tensor: torch.Tensor, position: int, by_value: bool) -> _Watch:
        """by_value: whether to keep the numbers; inference tensors count no versions."""
        return cls(position, _bits(tensor).clone() if by_value or tensor.is_inference() else None, tensor)

    def is_same(self, args: Sequence[Any]) -> bool:
        """Whether what is passed now has that value."""
        tensor: torch.Tensor = args[self.position]
        if self._bits is not None:
            return torch.equal(self._bits, _bits(tensor))
        if tensor is not self._reference():
            return False
        return bool(tensor.data_ptr() == self._pointer and tensor._version == self._version)


class _Closed(nn.Module):
    """The graph as a function of its other inputs alone, with the known ones as state of its own."""

    def __init__(self, module: fx.GraphModule, state: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self.graph_module, self._state_at = module, set(state)
        for position, tensor in state.items():
            self.register_buffer(f"input_{position}", tensor.detach())

    def forward(self, *free: Any) -> Any:
        rest = iter(free)
        count = len(free) + len(self._state_at)
        return self.graph_module(
            *(getattr(self, f"input_{i}") if i in self._state_at else next(rest) for i in range(count))
        )


_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that not-a-number is equal to itself."""
    return tensor.detach().view(_SAME_SIZE[tensor.element_size()])


def _storage(tensor: torch.Tensor) -> int:
    """Which memory the tensor is in; its identity where it has none of the usual kind."""
    return tensor.untyped_storage().data_ptr() if is_readable(tensor) else id(tensor)


def _plain(value: Any) -> Any:
    """The number behind a symbolic one, without a guard on it."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _no_module(node: fx.Node) -> None:
    """What a call_module calls is not looked into."""


def _freezes() -> bool:
    """Whether Inductor takes parameters for constants."""
    from torch._inductor import config

    return bool(config.freezing)
