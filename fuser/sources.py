"""Each kind of model a user can hand over: how to open it as a graph, and how to give the same kind back.

A source never changes what it was given, and can be opened any number of times: leaving a rewrite out means
starting over without it.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fuser import foreign
from fuser.errors import InputError
from fuser.foreign import Step
from fuser.graph import Graph, Summary
from fuser.onnx_objects import in_memory, is_in_memory
from fuser.remarks import Missed
from fuser.scratch import scratch_folder

if TYPE_CHECKING:
    from fuser.files import ModelFile
    from fuser.files.save import Layout


@dataclass(frozen=True)
class Written:
    """The files that were written, and what a person should know of them; mostly nothing."""

    files: list[str] = field(default_factory=list)
    note: str = ""


class Candidate:
    """A rewritten model: as it is to be verified, and as the user gets it."""

    @cached_property
    def model(self) -> Any:
        """For the check; of a model that is to be written, a file that is read back."""
        raise NotImplementedError

    def finish(self) -> tuple[Any, Written]:
        """The result as the user gets it."""
        raise NotImplementedError


class Source:
    """A model as it was given.  A context manager, because a candidate may need scratch space.

    name: what a person would call it.
    original: what equivalence is judged against.
    is_onnx: whether the original is an ONNX model.
    removable_inputs: inputs that the user asked to drop, or that are formalities.
    may_lack_inputs: whether it is no error that there is nothing to run the model on.
    notes: what a person should know of the model, once it was opened.
    """

    is_onnx = False
    may_lack_inputs = False

    def __init__(self, name: str, original: Any) -> None:
        self.name, self.original = name, original
        self.removable_inputs: Sequence[str] = ()
        self.notes: Sequence[str] = ()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def check(self) -> None:
        """Complain before the work, not after it: raise `InputError` for what cannot be read or written."""

    def graph(self) -> Graph:
        """A fresh graph over the original."""
        raise NotImplementedError

    def candidate(self, graph: Graph) -> Candidate:
        """What a rewritten graph amounts to; nothing is made of it before it is asked for."""
        raise NotImplementedError


@dataclass(frozen=True)
class Destination:
    """Where and how an ONNX model is to be written; see `fuser.files.save`."""

    path: Path
    layout: Layout = "auto"
    threshold: int = 1024

    def check(self) -> None:
        """Raise `InputError` when no model can be written there."""
        from fuser import files

        files.check_target(self.path)

    def write(self, model: ModelFile) -> Written:
        from fuser import files

        saved = files.save(model, self.path, layout=self.layout, threshold=self.threshold)
        paths = [] if saved.unchanged else [self.path, saved.data]
        return Written([str(path) for path in paths if path is not None], saved.note)


class OnnxSource(Source):
    """A model in memory or in a file.

    read: gives the model anew, as a `ModelFile` that may be edited in place.
    hand_back: makes of the edited one what the user expects; None where that is the path of the destination.
    destination: where it is to be written, if anywhere.
    """

    is_onnx = True

    def __init__(
        self,
        name: str,
        original: Any,
        read: Callable[[], ModelFile],
        hand_back: Callable[[ModelFile], Any] | None,
        destination: Destination | None,
        freeze_inputs: bool,
    ) -> None:
        super().__init__(name, original)
        self.hand_back, self.destination = hand_back, destination
        self._read, self._freeze_inputs = read, freeze_inputs
        self._stack = contextlib.ExitStack()
        self._opened: weakref.WeakSet[ModelFile] = weakref.WeakSet()

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for model in self._opened:
            model.close()

    def check(self) -> None:
        from fuser.files.sources import File

        if isinstance(self.original, Path):
            File(self.original).close()
        if self.destination is not None:
            self.destination.check()

    def graph(self) -> Graph:
        from fuser.graphs.onnx.graph import OnnxGraph

        model = self._read()
        self._opened.add(model)
        graph = OnnxGraph(model, freeze_inputs=self._freeze_inputs)
        self.removable_inputs, self.notes = graph.removable_inputs, graph.notes
        return graph

    def candidate(self, graph: Any) -> Candidate:
        return _OnnxCandidate(self, graph)

    @cached_property
    def _scratch(self) -> Path:
        return self._stack.enter_context(scratch_folder())

    def scratch(self, name: str = "") -> Path:
        """A folder for candidates; it goes with the source.  name: of a new folder in it."""
        return Path(tempfile.mkdtemp(prefix=name, dir=self._scratch)) if name else self._scratch

    def summary(self, candidate: Any) -> Summary:
        """What a candidate is made of."""
        from fuser.graphs.onnx.graph import OnnxGraph

        return OnnxGraph(candidate.edited).summary()

    def after(self, step: Step, candidate: Any) -> Candidate | Missed:
        """What a foreign optimizer makes of a candidate."""
        done = foreign.run(step, candidate.edited, self.scratch("step-"))
        if isinstance(done, Missed):
            return done
        return _OnnxCandidate(self, self._laid_out_like(candidate.edited, done))

    def _laid_out_like(self, before: ModelFile, after: ModelFile) -> ModelFile:
        """`after`, its weights in a data file where those of `before` are: "auto" follows the model that was given."""
        from fuser import files

        if self.destination is None or after.is_external or not before.is_external:
            return after
        path, threshold = self.scratch("step-") / "external.onnx", self.destination.threshold
        return files.load(files.save(after, path, layout="external", threshold=threshold).path)


class _OnnxCandidate(Candidate):
    """made: the graph, or a model that somebody else has made of it."""

    def __init__(self, source: OnnxSource, made: Any) -> None:
        self._source, self._made = source, made

    @cached_property
    def edited(self) -> ModelFile:
        """The model to be written."""
        from fuser.files import ModelFile

        return self._made if isinstance(self._made, ModelFile) else self._made.to_model()

    @cached_property
    def model(self) -> Any:
        from fuser import files

        if self._source.hand_back is not None:
            return self.edited.to_proto()
        return files.save(self.edited, self._source.scratch() / "candidate.onnx").path

    def finish(self) -> tuple[Any, Written]:
        source = self._source
        written = source.destination.write(self.edited) if source.destination else Written()
        if source.hand_back is not None:
            return source.hand_back(self.edited), written
        return source.destination.path if source.destination else None, written


class TorchSource(Source):
    """A module that is traced, a GraphModule, or an ExportedProgram."""

    def __init__(
        self,
        name: str,
        original: Any,
        open_graph: Callable[[], Any],
        hand_back: Callable[[Any], Any] = lambda done: done,
        *,
        may_lack_inputs: bool,
    ) -> None:
        super().__init__(name, original)
        self._open, self._hand_back = open_graph, hand_back
        self.may_lack_inputs = may_lack_inputs

    def graph(self) -> Graph:
        graph: Graph = self._open()
        return graph

    def candidate(self, graph: Any) -> Candidate:
        return _TorchCandidate(lambda: self._hand_back(graph.result()))


class _TorchCandidate(Candidate):
    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @cached_property
    def model(self) -> Any:
        return self._make()

    def finish(self) -> tuple[Any, Written]:
        return self.model, Written()


def open_source(
    model: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    freeze_inputs: bool = False,
    layout: Layout = "auto",
    threshold: int = 1024,
) -> Source:
    """The source for `model`; raises `InputError` for a kind that is not understood, or options it has no use for."""
    target = None if output is None else Destination(Path(output), layout, threshold)
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        return _file(path, target or Destination(default_output(path), layout, threshold), freeze_inputs)
    kinds = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__}
    if is_in_memory(model):
        return _in_memory(model, target, freeze_inputs)
    if not kinds & {"torch.Module", "torch.ExportedProgram"}:
        raise InputError(
            f"cannot optimize a {type(model).__module__}.{type(model).__qualname__}; give the path of an .onnx file, "
            "an onnx.ModelProto, a gs.Graph, an onnx_ir.Model, a torch.onnx.ONNXProgram, a torch.nn.Module, "
            "a torch.fx.GraphModule or an ExportedProgram"
        )
    if target is not None:
        raise InputError("`output` is for ONNX models; save the returned module with torch.save or torch.export.save")
    return _torch(model, example_inputs, example_kwargs, dynamic_shapes)


def default_output(path: Path) -> Path:
    """`model.onnx` -> `model.fused.onnx`; raises `InputError` for what names no file."""
    if not path.name:
        raise InputError(f"{path} is a folder; name the model file in it")
    return path.with_name(f"{path.name.removesuffix('.onnx')}.fused.onnx")


def _file(path: Path, destination: Destination, freeze_inputs: bool) -> Source:
    from fuser import files

    return OnnxSource(path.name, path, lambda: files.load(path), None, destination, freeze_inputs)


def _in_memory(model: Any, destination: Destination | None, freeze_inputs: bool) -> Source:
    from fuser.files import ModelFile

    opened = in_memory(model)
    assert opened is not None
    return OnnxSource(
        opened.name or "model",
        opened.proto,
        lambda: ModelFile.from_proto(opened.proto),
        lambda done: opened.back(done.to_proto()),
        destination,
        freeze_inputs,
    )


def _torch(
    model: Any, example_inputs: Sequence[Any] | None, example_kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> Source:
    import torch

    from fuser.graphs.torch.graph import TorchGraph

    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise InputError(f"example_inputs is a tuple of positional arguments, not a {type(example_inputs).__name__}")
    name = type(model).__name__
    if isinstance(model, torch.export.ExportedProgram):
        return TorchSource(name, model, lambda: TorchGraph.from_exported_program(model), may_lack_inputs=False)
    is_graph = isinstance(model, torch.fx.GraphModule)
    if example_inputs is None or is_graph:
        _refuse_lazy(model)

        def open_graph() -> Any:
            if is_graph:
                return TorchGraph.from_graph_module(model, example_inputs, example_kwargs)
            return TorchGraph.from_module(model)

        return TorchSource(name, model, open_graph, may_lack_inputs=example_inputs is None)
    program = capture(model, tuple(example_inputs), dict(example_kwargs or {}), dynamic_shapes)
    return TorchSource(
        name,
        model,
        lambda: TorchGraph.from_exported_program(program),
        lambda done: _module_of(done, model.training),
        may_lack_inputs=False,
    )


def _module_of(program: Any, training: bool) -> Any:
    """The program as a module that is set to its mode and saved as modules are, which torch's own is not.

    It is loaded where this package is installed.  training: the mode of the module that was captured; the other one
    would need another capture.
    """
    module = program.module()
    for part in module.modules():
        part.training = training

    def train(mode: bool = True) -> Any:
        if mode != training:
            names = ("eval", "training")
            raise NotImplementedError(f"captured in {names[training]} mode; optimize the module in {names[mode]} mode")
        return module

    def reduce(protocol: int) -> tuple[Any, ...]:
        import torch

        file = io.BytesIO()
        torch.export.save(program, file)
        state = {**dict(module.named_parameters(remove_duplicate=False)), **_buffers(module)}
        return _restored, (file.getvalue(), state, training)

    module.train, module.eval = train, lambda: train(False)
    module.__reduce_ex__ = reduce  # where pickle looks for it; its guards and hooks are functions without a name
    return module


def _buffers(module: Any) -> dict[str, Any]:
    return dict(module.named_buffers(remove_duplicate=False))


def _restored(program: bytes, state: Mapping[str, Any], training: bool) -> Any:
    """The module that was pickled: the program, and the state as it was at that time."""
    import torch

    module = _module_of(torch.export.load(io.BytesIO(program)), training)
    buffers = _buffers(module)
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        part = module.get_submodule(path)
        (part._buffers if name in buffers else part._parameters)[leaf] = tensor
    return module


def _refuse_lazy(module: Any) -> None:
    """Raise `InputError` for a module that the first call makes what it is: that must be the user's."""
    import torch

    if any(map(torch.nn.parameter.is_lazy, (*module.parameters(), *module.buffers()))):
        name = type(module).__name__
        raise InputError(
            f"this {name} has lazy parts, whose shapes a first call decides: call it once, then optimize it"
        )


def capture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Any:
    """The module as an ExportedProgram; raises `InputError`, one line, where torch.export cannot make one.

    As torch.onnx.export does, it is tried in strict mode where it does not work otherwise: there `torch.cond` is more
    forgiving.
    """
    import torch

    _refuse_lazy(module)
    errors: list[Exception] = []
    for strict in (False, True):
        try:
            # It tells of its attempts on stderr; the error that matters is raised.
            with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
                return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
        except Exception as error:
            errors.append(error)
    first = (str(errors[0]).strip().splitlines() or [type(errors[0]).__name__])[0]
    raise InputError(f"torch.export cannot capture this {type(module).__name__}: {first}") from errors[0]
