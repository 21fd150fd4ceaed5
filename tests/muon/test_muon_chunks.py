"""Chunks of a batch, which take one memory in turn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import _batches
from fusedopt._batches import Matrix, chunks


def matrix(rows: int, columns: int) -> Matrix:
    p = torch.empty(0)
    return Matrix(0, {}, p, torch.float32, 1, rows, columns)


def test_a_chunk_on_a_cpu_has_16_mb_or_four_matrices_and_64_mb_at_most() -> None:
    sizes = {
        128: 96,  # as many as there are
        1024: 4,  # of 4 MB each
        1536: 4,  # 9 MB each
        3072: 1,  # 36 MB each
    }
    for side, count in sizes.items():
        first, *_ = chunks([matrix(side, side)] * 96)
        assert len(first) == count, side
        assert sum(len(chunk) for chunk in chunks([matrix(side, side)] * 96)) == 96


@pytest.mark.parametrize("nesterov", [False, True])
def test_matrices_that_take_one_memory_in_turn_step_as_each_does_alone(
    nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_batches, "CHUNK_BYTES", 1)  # one matrix a chunk
    torch.manual_seed(0)
    shapes = [(8, 8), (40, 24), (8, 8), (3, 50), (40, 24)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float64]
    together = [Parameter(torch.randn(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]
    alone = [Parameter(p.detach().clone()) for p in together]
    optimizers = [
        fusedopt.Muon(params, nesterov=nesterov) for params in (together, *([p] for p in alone))
    ]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(p, q)
