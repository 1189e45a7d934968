"""From a model to GraphSurgeon's graph, node for node."""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto
from onnx_graphsurgeon.logger import G_LOGGER

from fuser.errors import InputError

_Path: TypeAlias = tuple[int | str, ...]
"""Of a body: the place of its node and the name of the attribute, from the outermost graph inwards."""


def import_model(model: onnx.ModelProto) -> gs.Graph:
    """GraphSurgeon's graph of `model`, with the nodes where they stand there.

    GraphSurgeon goes through the nodes once, and what a body reads before it is made it takes for a value of that
    body's own.  So nodes that have bodies are put behind all that these read, and put back afterwards.

    Raises `InputError` for what GraphSurgeon cannot read.
    """
    graphs = [model.graph, *model.functions]
    places: list[dict[_Path, list[int]]] = [{} for _ in graphs]
    for graph, moved in zip(graphs, places, strict=True):
        _sort(graph, (), moved)
    editors: list[gs.Graph | None] = [None] * len(graphs)
    try:
        with _quietly():
            main = gs.import_onnx(model)
        editors = [main, *main.functions]
    except Exception as error:  # it raises its own type for what it does not know
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"onnx-graphsurgeon cannot read the model: {first}") from error
    finally:
        for graph, editor, moved in zip(graphs, editors, places, strict=True):
            if moved:
                _put_back(graph, editor, (), moved)
    return main


def names_read(graph: GraphProto | FunctionProto) -> set[str]:
    """Every name that the graph or a body inside it reads, its own included."""
    names = {name for node in graph.node for name in node.input}
    if isinstance(graph, GraphProto):
        names |= {info.name for info in graph.output}
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                names |= names_read(body)
    return names


def _sort(graph: GraphProto | FunctionProto, path: _Path, moved: dict[_Path, list[int]]) -> None:
    """Put nodes with bodies behind what these read, in all bodies too; into `moved` goes where each node stood."""
    if not any(True for _ in _bodies(graph)):
        return
    made = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    needs = [{made[name] for name in node.input if name in made} for node in graph.node]
    for i, attribute in _bodies(graph):
        needs[i] |= {made[name] for name in names_read(attribute.g) if name in made} - {i}
    if any(before > i for i, befores in enumerate(needs) for before in befores):
        try:
            stood = list(graphlib.TopologicalSorter(dict(enumerate(needs))).static_order())
        except graphlib.CycleError:  # who builds the index tells what is no legal graph
            return
        moved[path] = stood
        _sort_by(graph.node, sorted(range(len(stood)), key=stood.__getitem__))
    for i, attribute in _bodies(graph):
        _sort(attribute.g, (*path, i, attribute.name), moved)


def _put_back(
    graph: GraphProto | FunctionProto, editor: gs.Graph | None, path: _Path, moved: dict[_Path, list[int]]
) -> None:
    for i, attribute in _bodies(graph):
        body = None if editor is None else editor.nodes[i].attrs.get(attribute.name)
        _put_back(attribute.g, body, (*path, i, attribute.name), moved)
    if path in moved:
        _sort_by(graph.node, moved[path])
        if editor is not None:
            _sort_by(editor.nodes, moved[path])


def _sort_by(nodes: Any, keys: Sequence[int]) -> None:
    """Sort by a key for each node."""
    following = iter(keys)
    nodes.sort(key=lambda _: next(following))


def _bodies(graph: GraphProto | FunctionProto) -> Iterator[tuple[int, AttributeProto]]:
    for i, node in enumerate(graph.node):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield i, attribute


@contextmanager
def _quietly() -> Iterator[None]:
    """GraphSurgeon warns of its own export, which is not used; what it cannot read, it raises as well as prints."""
    severity = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL + 1
    try:
        yield
    finally:
        G_LOGGER.severity = severity
