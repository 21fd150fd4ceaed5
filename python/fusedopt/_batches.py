"""Matrices of one shape, one after the other in memory, to be made orthogonal together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt._numeric import accumulate
from fusedopt._orthogonal import Iteration, orthogonalize_, orthogonalized

# So much of one batch has its momentum beside it at once, or one matrix. On a CPU no more matrices
# than these once they have so many bytes: of 64 MB, new pages alone took twice as long as what is
# put there.
CHUNK_BYTES = 1 << 26
CHUNK_OF_CPU, BYTES_OF_CPU = 4, 1 << 24

_KERNEL_OR_STACK = (
    "; in a group with batch_dims=0 it is the kernel of a convolution, in one with batch_dims=1 a "
    "stack of matrices"
)


class Matrix(NamedTuple):
    """A parameter that is one matrix, or a stack of them."""

    group_index: int
    """Among those of the step."""
    group: dict[str, Any]
    param: Tensor
    precision: torch.dtype
    """In which it is made orthogonal."""
    stack: int
    """How many matrices it is."""
    rows: int
    columns: int

    @property
    def bytes(self) -> int:
        """How many it takes in its precision, as a whole."""
        return self.stack * self.rows * self.columns * self.precision.itemsize


def shape_of(p: Tensor, batch_dims: int | None) -> tuple[int, int, int]:
    """Return how many matrices a parameter is, and their rows and columns.

    Args:
        p: the parameter.
        batch_dims: how many of its dimensions count matrices. The next one counts rows, all
            others columns. None for torch's rule and that of convolutions: 0, but for what has
            three dimensions, which may be either.

    Raises:
        ValueError: p is no matrix.
    """
    if batch_dims is None and (p.ndim < 2 or p.ndim == 3):
        raise ValueError(
            f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()}"
            + (_KERNEL_OR_STACK if p.ndim == 3 else "")
        )
    leading = batch_dims or 0
    if not 0 <= leading <= p.ndim - 2:
        raise ValueError(
            f"a param group has batch_dims={batch_dims}, and a parameter of shape "
            f"{tuple(p.shape)}, expected two dimensions more than that, or more"
        )
    count = math.prod(p.shape[:leading])
    rows, *columns = p.shape[leading:]
    return count, rows, math.prod(columns)


class Workspace:
    """Memory that one batch takes after the other: the system hands out its pages once."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of unset contents, which the next one may take the place of."""
        count = math.prod(shape)
        last = self._memory
        if last.dtype != dtype or last.device != device or last.numel() < count:
            del last, self._memory  # before there is more
            self._memory = torch.empty(count, dtype=dtype, device=device)
        return self._memory[:count].view(shape)


class Batch:
    """Matrices that are alike, one after the other, in a workspace."""

    def __init__(self, matrices: list[Matrix], workspace: Workspace) -> None:
        first = matrices[0]
        counts = [matrix.stack for matrix in matrices]
        self._iteration = Iteration.of(first.group)
        shape = (sum(counts), first.rows, first.columns)
        self._x = workspace.of(shape, first.precision, first.param.device)
        parts = torch.split(self._x, counts)
        self.places = [
            (matrix, part.view(matrix.param.shape))
            for matrix, part in zip(matrices, parts, strict=True)
        ]

    def orthogonalize(self) -> None:
        """Make all of them orthogonal, where they are."""
        orthogonalize_(self._x, self._iteration)


def alike(matrices: Iterable[Matrix]) -> list[list[Matrix]]:
    """Return those that one batch can be made of."""
    found: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        key = (
            *(matrix.rows, matrix.columns, matrix.precision, matrix.param.device),
            Iteration.of(matrix.group),
        )
        found.setdefault(key, []).append(matrix)
    return list(found.values())


def chunks(matrices: list[Matrix]) -> Iterator[list[Matrix]]:
    """Yield some of a batch at a time, as far as memory goes.

    A chunk takes itself, and as much again to be made orthogonal.
    """
    chunk: list[Matrix] = []
    size = 0
    on_cpu = matrices[0].param.device.type == "cpu"
    for matrix in matrices:
        with_it = size + matrix.bytes
        many = on_cpu and len(chunk) >= CHUNK_OF_CPU and with_it > BYTES_OF_CPU
        if chunk and (many or with_it > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(matrix)
        size += matrix.bytes
    yield chunk


def matrix_reference(
    p: Any,
    g: Any,
    buf: Any,
    *,
    forget: float,
    weight_decay: float,
    ratio: float,
    decay: float,
    step_size: float,
    nesterov: bool,
    iteration: Iteration,
) -> tuple[Any, Any]:
    """Return a matrix and its momentum after a step: what the optimizers compute."""
    buf = accumulate(buf, g * forget, forget)
    update = accumulate(buf, g * forget, forget) if nesterov else buf
    orthogonal = orthogonalized(update, iteration)
    return p - (orthogonal * step_size + p * decay), buf
