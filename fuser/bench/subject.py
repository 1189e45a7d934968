"""Make the models ready to be sent to other processes: one host, the same inputs, what they cost."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fuser import files
from fuser.bench.costs import Costs, of_onnx, of_torch
from fuser.bench.sampling import PATIENT
from fuser.errors import InputError
from fuser.isolate import Worker
from fuser.onnx_objects import in_memory, is_in_memory
from fuser.proof.inputs import Spec, generate
from fuser.proof.interface import public_inputs
from fuser.proof.sides import OnnxSide

Shapes = Mapping[str, Sequence[int]]


@dataclass
class Subjects:
    """models: what a `Job` takes, by role; inputs: the same for all of them; names: for a person."""

    host: str
    models: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None
    names: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Costs] = field(default_factory=dict)
    input_shapes: dict[str, str] = field(default_factory=dict)


def prepare(
    models: Mapping[str, Any],
    folder: Path,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch: int | None = None,
    input_shapes: Shapes | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Subjects:
    """The models by role, ready to be measured; `folder` holds what has to be saved, until the end.

    Raises `InputError` for what is not a model, for two models of different hosts, and for inputs that are
    missing or do not fit.
    """
    hosts = {role: _host(model) for role, model in models.items()}
    if len(set(hosts.values())) > 1:
        raise InputError("cannot compare an ONNX model with a torch module; give two of the same kind")
    host = next(iter(hosts.values()))
    if host == "onnx":
        if dtype is not None:
            raise InputError("the dtype of an ONNX model is in the file; --dtype is for torch modules")
        return _onnx(models, folder, example_inputs, batch, input_shapes, seed)
    args, kwargs = _torch_inputs(models["before"], example_inputs, example_kwargs, input_shapes, seed)
    return _torch(models, folder, _batched(args, batch), _batched(kwargs, batch))


def _host(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return "torch" if str(model).endswith(".pt2") else "onnx"
    if is_in_memory(model):
        return "onnx"
    kinds = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__}
    if kinds & {"torch.Module", "torch.ExportedProgram"}:
        return "torch"
    raise InputError(
        f"cannot benchmark a {type(model).__module__}.{type(model).__qualname__}; give a path of an .onnx or .pt2 "
        "file, an onnx.ModelProto, a gs.Graph, an onnx_ir.Model, a torch.onnx.ONNXProgram, a torch.nn.Module, "
        "a GraphModule or an ExportedProgram"
    )


# -- ONNX


def _onnx(
    models: Mapping[str, Any], folder: Path, given: Any, batch: int | None, shapes: Shapes | None, seed: int
) -> Subjects:
    subjects = Subjects("onnx")
    opened: dict[str, files.ModelFile] = {}
    for role, model in models.items():
        path = _on_disk(model, folder / f"{role}.onnx")
        opened[role] = files.load(path)
        subjects.models[role] = str(path)
        subjects.names[role] = _onnx_name(model)
    subjects.inputs = _onnx_inputs(opened["before"], subjects.models["before"], given, batch, shapes, seed)
    for role, model in opened.items():
        lacking = [v.name for v in public_inputs(model.proto.graph) if v.name not in subjects.inputs]
        if lacking:
            raise InputError(f"{subjects.names[role]} has an input {lacking[0]!r} for which there is no value")
        subjects.costs[role] = of_onnx(model, Path(subjects.models[role]), subjects.inputs)
    subjects.input_shapes = {
        name: _text(value.dtype, value.shape) if isinstance(value, np.ndarray) else f"{len(value)} tensors"
        for name, value in subjects.inputs.items()
    }
    return subjects


def _onnx_inputs(
    model: files.ModelFile, path: str, given: Any, batch: int | None, shapes: Shapes | None, seed: int
) -> dict[str, Any]:
    """The user's arrays, or seeded ones of sizes that the model accepts, by name."""
    with Worker() as worker:
        side = OnnxSide(model, path, worker, PATIENT, shapes, ())
        if given is not None:
            values = side.given(given)[0].values
        else:
            sizes = {**side.probe(seed).sizes, **_batch_sizes(side.specs, batch)}
            values = generate(side.specs, sizes, "normal", seed).values
        return {name: x for name, x in zip(side.input_names, values, strict=True) if x is not None}


def _batch_sizes(specs: Sequence[Spec], batch: int | None) -> dict[str, int]:
    """The size that was asked for, for every symbol that is a first axis."""
    if batch is None:
        return {}
    for spec in specs:
        if spec.dims and isinstance(spec.dims[0], int) and spec.dims[0] != batch:
            raise InputError(
                f"the first axis of the input {spec.name!r} is fixed at {spec.dims[0]}; it cannot be {batch}"
            )
    return {spec.dims[0]: batch for spec in specs if spec.dims and isinstance(spec.dims[0], str)}


def _on_disk(model: Any, path: Path) -> Path:
    if isinstance(model, (str, os.PathLike)):
        return Path(model)
    opened = in_memory(model)
    assert opened is not None
    files.save(files.ModelFile.from_proto(opened.proto), path)
    return path


def _onnx_name(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return Path(model).name
    return str(getattr(model, "name", "") or getattr(getattr(model, "graph", None), "name", "") or "model")


# -- torch


def _torch(models: Mapping[str, Any], folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subjects:
    import torch

    subjects = Subjects("torch", inputs=(args, kwargs))
    loaded = {role: _torch_module(model) for role, model in models.items()}
    for role, model in loaded.items():
        subjects.names[role] = _torch_name(models[role])
        subjects.costs[role] = of_torch(model, args, kwargs)
    saved = {role: _saved(model, folder / role, args, kwargs) for role, model in loaded.items()}
    if all(saved.values()):
        torch.save((args, kwargs), folder / "inputs.pt")
        subjects.inputs = str(folder / "inputs.pt")
        subjects.models.update(saved)
    else:
        subjects.models.update(loaded)
    leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    subjects.input_shapes = {f"input {i}": _text(t.dtype, t.shape) for i, t in enumerate(tensors)}
    return subjects


def _torch_module(model: Any) -> Any:
    import torch

    if isinstance(model, (str, os.PathLike)):
        try:
            return torch.export.load(model)
        except Exception as error:
            raise InputError(f"cannot read {model} as a torch.export program: {error}") from error
    if isinstance(model, torch.nn.Module):
        stateful = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd)
        training = [n for n, m in model.named_modules() if m.training and isinstance(m, stateful)]
        if training:
            raise InputError(f"{training[0]!r} is in training mode; call .eval() on the model before measuring it")
    return model


def _torch_name(model: Any) -> str:
    return Path(model).name if isinstance(model, (str, os.PathLike)) else type(model).__name__


def _saved(model: Any, stem: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The path of a file that another process can load, or None where there is no such thing."""
    import torch

    try:
        if _was_exported(model):  # it does not pickle, but exported anew it is the same graph
            model = torch.export.export(model, args, kwargs)
        if isinstance(model, torch.export.ExportedProgram):
            torch.export.save(model, stem.with_suffix(".pt2"))
            return str(stem.with_suffix(".pt2"))
        path = stem.with_suffix(".pt")
        torch.save(model, path)
        # A pickle names classes by where they are defined, and `__main__` is another module there.
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return None if b"__main__" in archive.read(pickled) else str(path)
    except Exception:  # whatever a stranger's pickling may raise
        return None


def _was_exported(model: Any) -> bool:
    """Whether this is the graph module of an exported program."""
    hooks = getattr(model, "_forward_pre_hooks", {}).values()
    return any(getattr(hook, "__name__", "") == "_check_input_constraints_pre_hook" for hook in hooks)


def _torch_inputs(
    model: Any, given: Any, keywords: Mapping[str, Any] | None, shapes: Shapes | None, seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch

    if given is not None or keywords:
        if given is not None and not isinstance(given, (tuple, list)):
            given = (given,)
        return tuple(given or ()), dict(keywords or {})
    if shapes:
        generator = torch.Generator().manual_seed(seed)
        return (), {name: torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}
    loaded = _torch_module(model)
    if isinstance(loaded, torch.export.ExportedProgram) and loaded.example_inputs is not None:
        args, kwargs = loaded.example_inputs
        return tuple(args), dict(kwargs)
    raise InputError("a torch module needs example_inputs=(x, ...), or input_shapes={'argument': (1, 3, 224, 224)}")


def _batched(inputs: Any, batch: int | None) -> Any:
    """Every tensor with its first axis repeated, or cut, to `batch`."""
    import torch

    def resize(value: Any) -> Any:
        if batch is None or not isinstance(value, torch.Tensor) or not value.ndim or not value.shape[0]:
            return value
        return torch.cat([value] * -(-batch // value.shape[0]))[:batch]

    return torch.utils._pytree.tree_map(resize, inputs)


def _text(dtype: Any, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{','.join(map(str, shape))}]"
