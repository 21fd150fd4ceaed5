"""Gradients as a step finds them, and others in their place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fusedopt._batches import Matrix
from fusedopt._shards import as_part_of, is_distributed, local


def gradient_of(p: Any) -> Tensor:
    """Return this process's part of the gradient of p."""
    gradient: Any = p.grad
    if is_distributed(p) and gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient).resolve_neg()


@contextmanager
def gradients(places: list[tuple[Matrix, Tensor]]) -> Iterator[None]:
    """Let parameters have other gradients meanwhile, of which this process has these parts."""
    undo: list[Callable[[], None]] = []
    try:
        for matrix, part in places:
            undo.append(_replace_gradient(matrix.param, part))
        yield
    finally:
        for each in undo:
            each()


def _replace_gradient(p: Any, part: Tensor) -> Callable[[], None]:
    """Give p a gradient of any dtype, and return what gives it back its own."""
    gradient, dtype = p.grad, p.grad_dtype
    if dtype is not None and gradient.dtype != dtype:
        # Somebody has replaced p.data since, and p would not take its own gradient back.
        kept = gradient.data
        gradient.data = part
        return lambda: setattr(gradient, "data", kept)
    new = as_part_of(p, part)
    if part.dtype == dtype:
        p.grad = new
        return lambda: setattr(p, "grad", gradient)

    def give_back() -> None:
        p.grad = None
        p.grad_dtype = dtype
        p.grad = gradient

    p.grad = None
    p.grad_dtype = None
    p.grad = new
    return give_back
