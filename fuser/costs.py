"""How many multiply-adds an operator takes: one formula for each, whatever graph it is in.

convolution              elements(Y) * elements(W) / Cout
transposed convolution   elements(X) * elements(W) / Cin
matrix product           elements(Y) * K
attention                elements(Q) * S + elements(Y) * S,   S: how many keys there are
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

from fuser.graph import Dim

Sizes = tuple[int, ...]


def conv(x: Sizes, w: Sizes, y: Sizes, transposed: bool = False) -> int:
    """w: [Cout, Cin/groups, *kernel], or [Cin, Cout/groups, *kernel] when transposed."""
    return prod(x if transposed else y) * prod(w[1:])


def product(x: Sizes, y: Sizes, axis: int = -1) -> int:
    """y = x @ w, summed over `axis` of x."""
    return prod(y) * x[axis]


def attention(q: Sizes, k: Sizes, y: Sizes) -> int:
    """y = softmax(q @ k.T) @ v"""
    return (prod(q) + prod(y)) * k[-2]


@lru_cache(maxsize=1 << 12)
def per_sample(shape: tuple[Dim, ...] | None, batch: frozenset[Dim]) -> Sizes | None:
    """The shape with 1 for the sizes of `batch`; None where another one is not known."""
    if shape is None:
        return None
    sizes = [size if isinstance(size, int) else 1 for size in shape if isinstance(size, int) or size in batch]
    return tuple(sizes) if len(sizes) == len(shape) else None
