"""Matrices of which each rank has a part: put together on one rank, and given back.

Each matrix is made orthogonal on one rank, and the ranks share them so that each has about as much
work. Parts travel in waves, as those of the next wave do while one is worked on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt._batches import CHUNK_BYTES, Batch, Matrix, Workspace, alike
from fusedopt._shards import as_part_of, is_distributed, local

Places = list[tuple[Matrix, Tensor]]
Work = Callable[[Places], None]


class Split(NamedTuple):
    """Along which dimension of a parameter, and among which ranks."""

    group: Any
    """Of processes."""
    dim: int

    def shape(self, p: Tensor, rank: int) -> list[int]:
        """Return that of a rank's part of p: as `torch.chunk` cuts it."""
        shape = list(p.shape)
        length, ranks = shape[self.dim], self.group.size()
        most = -(-length // ranks)
        shape[self.dim] = min(most, max(0, length - rank * most))
        return shape


def is_split(p: Any) -> bool:
    """Return whether ranks have parts of p."""
    return is_distributed(p) and bool(_split_dims(p))


def _split_dims(p: Any) -> list[int]:
    """Return along which dimensions of the mesh."""
    return [
        i
        for i, where in enumerate(p.placements)
        if not where.is_replicate() and p.device_mesh.size(i) > 1
    ]


def _split_of(p: Any) -> Split | None:
    """Return how p is split, if it is along one dimension of its mesh and as `torch.chunk` does."""
    first, *others = _split_dims(p)
    where = p.placements[first]
    if others or type(where) is not sys.modules["torch.distributed.tensor"].Shard:
        return None
    return Split(p.device_mesh.get_group(first), where.dim % p.ndim)


def step(matrices: list[Matrix], fill: Work, move: Work) -> None:
    """Make matrices orthogonal that ranks have parts of; every rank has to call it.

    Args:
        matrices: the same on all ranks.
        fill: puts what is to be made orthogonal into places, of the parts of this rank.
        move: takes from such places what came of it.
    """
    found: dict[Any, tuple[Split, list[Matrix]]] = {}
    for matrix in matrices:
        split = _split_of(matrix.param)
        if split is None:
            _on_every_rank(matrix, fill, move)
            continue
        key = (split.group.group_name, split.dim, matrix.precision)
        found.setdefault(key, (split, []))[1].append(matrix)
    for split, some in found.values():
        waves = _waves(some, split.group.size())
        _in_turn([_Wave(split, wave) for wave in waves], fill, move)


def _on_every_rank(matrix: Matrix, fill: Work, move: Work) -> None:
    """Do all the work of one matrix on all ranks, however it is split."""
    p: Any = matrix.param
    part = torch.empty_like(local(p), dtype=matrix.precision, memory_format=torch.contiguous_format)
    fill([(matrix, part)])
    batch = Batch([matrix], Workspace())
    ((_, whole),) = batch.places
    split: Any = as_part_of(p, part)
    whole.copy_(split.full_tensor())
    batch.orthogonalize()
    utils = sys.modules["torch.distributed.tensor._utils"]  # which DTensors come with
    shape, offset = utils.compute_local_shape_and_global_offset(
        p.shape, p.device_mesh, p.placements
    )
    for dim, (length, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), length)
    move([(matrix, whole)])


# ---- split along one dimension -------------------------------------------------------------------


def _waves(matrices: list[Matrix], ranks: int) -> list[list[list[Matrix]]]:
    """Return waves of matrices: for each rank, those that it makes orthogonal."""
    waves: list[list[list[Matrix]]] = []
    work, room = [0] * ranks, [0] * ranks
    for matrix in sorted(matrices, key=_work_of, reverse=True):
        rank = work.index(min(work))
        work[rank] += _work_of(matrix)
        if not waves or (room[rank] and room[rank] + matrix.bytes > CHUNK_BYTES):
            waves.append([[] for _ in range(ranks)])
            room = [0] * ranks
        waves[-1][rank].append(matrix)
        room[rank] += matrix.bytes
    return waves


def _work_of(matrix: Matrix) -> int:
    return matrix.stack * matrix.rows * matrix.columns * min(matrix.rows, matrix.columns)


def _in_turn(waves: list[_Wave], fill: Work, move: Work) -> None:
    waves[0].send(fill)
    for i, wave in enumerate(waves):
        if i + 1 < len(waves):
            waves[i + 1].send(fill)
        wave.orthogonalize()
        if i > 0:
            waves[i - 1].finish(move)
    waves[-1].finish(move)


class _Buffer:
    """Parts of matrices, in the order of the ranks that they come from or go to."""

    def __init__(
        self, of_ranks: list[list[tuple[Matrix, list[int]]]], dtype: torch.dtype, device: Any
    ) -> None:
        sizes = [sum(math.prod(shape) for _, shape in some) for some in of_ranks]
        self.bytes = [size * dtype.itemsize for size in sizes]
        self.flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        self.places: list[Places] = []
        at = 0
        for some in of_ranks:
            self.places.append([])
            for matrix, shape in some:
                size = math.prod(shape)
                self.places[-1].append((matrix, self.flat[at : at + size].view(shape)))
                at += size

    def all_places(self) -> Places:
        return [place for places in self.places for place in places]


class _Wave:
    """Some matrices on their way."""

    def __init__(self, split: Split, owned: list[list[Matrix]]) -> None:
        self._split = split
        self._owned = owned

    def send(self, fill: Work) -> None:
        """Begin to send the parts of this rank, and to receive those of its matrices."""
        split, me = self._split, self._split.group.rank()
        first = next(matrix for some in self._owned for matrix in some)
        room = (first.precision, first.param.device)
        mine = self._owned[me]
        self._parts = _Buffer(
            [[(m, split.shape(m.param, me)) for m in some] for some in self._owned], *room
        )
        self._pieces = _Buffer(
            [[(m, split.shape(m.param, r)) for m in mine] for r in range(len(self._owned))], *room
        )
        fill(self._parts.all_places())
        self._begin(self._parts, self._pieces)

    def orthogonalize(self) -> None:
        """Wait for the matrices of this rank, and begin to send them back, orthogonal."""
        self._work.wait()
        batches = [
            Batch(some, Workspace()) for some in alike(self._owned[self._split.group.rank()])
        ]
        pairs = self._pairs([place for batch in batches for place in batch.places])
        for piece, there in pairs:
            there.copy_(piece)
        for batch in batches:
            batch.orthogonalize()
        for piece, there in pairs:
            piece.copy_(there)
        self._begin(self._pieces, self._parts)

    def finish(self, move: Work) -> None:
        """Wait for what came of the parts of this rank."""
        self._work.wait()
        move(self._parts.all_places())

    def _pairs(self, whole: Places) -> list[tuple[Tensor, Tensor]]:
        """Return each piece that was received, and where it is in its matrix."""
        dim = self._split.dim
        at = {id(matrix): 0 for matrix, _ in whole}
        places = {id(matrix): place for matrix, place in whole}
        pairs = []
        for matrix, piece in self._pieces.all_places():
            key, length = id(matrix), piece.shape[dim]
            pairs.append((piece, places[key].narrow(dim, at[key], length)))
            at[key] += length
        return pairs

    def _begin(self, source: _Buffer, to: _Buffer) -> None:
        # (As bytes, which every backend sends.)
        self._work: Any = dist.all_to_all_single(
            to.flat.view(torch.uint8),
            source.flat.view(torch.uint8),
            to.bytes,
            source.bytes,
            group=self._split.group,
            async_op=True,
        )
