"""What a node's `meta` says of its value, and the meta of nodes that edits add."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata

TensorLike: TypeAlias = torch.Tensor | TensorMetadata


def meta_tensor(node: fx.Node) -> TensorLike | None:
    """The tensor that capture or shape propagation has recorded for a node; it has a shape and a dtype."""
    for key in ("val", "tensor_meta"):
        found = node.meta.get(key)
        if isinstance(found, (torch.Tensor, TensorMetadata)):
            return found
    return None


class MetaWriter:
    """Gives new nodes the meta that their neighbours have."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._mode: Any = None
        self._has_tensor_meta = False
        for node in nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                self._mode = value.fake_mode
                self._has_tensor_meta = "tensor_meta" in node.meta
                break

    def describe(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """Record what a node that reads `tensor` evaluates to."""
        if self._mode is None:
            return
        node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        if self._has_tensor_meta:
            node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])
