"""Averages in the place of the weights for a while, and back, bit for bit.

What both take is all that is used, but for float16 weights: a piece at a time changes places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusedopt._shards import local

_PIECE = 1 << 20  # elements


@torch.no_grad()
def exchange(p: Tensor, average: Tensor) -> Callable[[], None]:
    """Put an average in the place of a parameter; return what puts both back.

    In between, the average's memory has the weights. If it is the float32 average of a bfloat16
    parameter, it has those 16 bits of each weight beside the 16 that the parameter lacks of the
    average. A float16 lacks more: there the weights are kept beside both, 2 bytes each.
    """
    weights, others = local(p), local(average)
    if weights.dtype == others.dtype:
        _swap(weights, others)
        return lambda: _swap(weights, others)
    if (weights.dtype, others.dtype) == (torch.bfloat16, torch.float32):
        _round(weights, others)
        return lambda: _restore(weights, others)
    kept = weights.clone()
    weights.copy_(others)
    return lambda: _put_back(weights, kept)


@torch.no_grad()
def _put_back(weights: Tensor, kept: Tensor) -> None:
    weights.copy_(kept)


@torch.no_grad()
def _swap(weights: Tensor, average: Tensor) -> None:
    for x, y in _pieces(weights, average):
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)


@torch.no_grad()
def _round(weights: Tensor, average: Tensor) -> None:
    """Round to nearest, where between two to the larger one in size: that can be undone."""
    for x, y in _pieces(weights.view(torch.int16), average.view(torch.int32)):
        rounded = (y + 0x8000) >> 16
        y.copy_((x.int() << 16) | (y & 0xFFFF))
        x.copy_(rounded)


@torch.no_grad()
def _restore(weights: Tensor, average: Tensor) -> None:
    for x, y in _pieces(weights.view(torch.int16), average.view(torch.int32)):
        low = y & 0xFFFF
        high = x.int() - (low >> 15)
        x.copy_(y >> 16)
        y.copy_((high << 16) | low)


def _pieces(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same elements of both, some at a time."""
    if x.ndim == 0 or x.numel() <= _PIECE:
        yield x, y
        return
    rows = max(1, _PIECE * len(x) // x.numel())
    for first in range(0, len(x), rows):
        if rows > 1:
            yield x[first : first + rows], y[first : first + rows]
        else:
            yield from _pieces(x[first], y[first])
