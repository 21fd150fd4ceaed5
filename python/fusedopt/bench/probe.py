"""The limit of the memory: a row's traffic with next to no arithmetic."""

from __future__ import annotations

import torch

from fusedopt._engine import engine
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import Row

_MOST_PROBED = 100_000_000  # elements: more would be no faster, and need memory


def probed(row: Row) -> tuple[int, int]:
    """Return how many arrays of how many float32 elements the probe walks on a CPU."""
    arrays = 3 if row.states == 1 else 4
    return arrays, max(1, min(row.bytes // (4 * (2 * arrays - 1)), _MOST_PROBED))


def bandwidth_probe(row: Row) -> tuple[Step, int]:
    """Return the row's traffic with next to no arithmetic, and how many bytes it moves.

    It is as large as the row's, up to a size, so that it finds as much of it in caches. On a CPU,
    parameter and states are read and written and the gradient is read, as with an optimizer of one
    state or of two: the memory moves more bytes a second where there are two. On a GPU, one array
    is copied.
    """
    if row.device == "cuda":
        source, target = (random_bytes(row.bytes // 2, row.device) for _ in range(2))
        return lambda: target.copy_(source), row.bytes // 2 * 2
    count, n = probed(row)
    arrays = [torch.zeros(n) for _ in range(count)]

    def stream() -> None:
        engine.update("traffic", count == 3, [1.0], 1.0, arrays, row.threads)

    return stream, 4 * n * (2 * count - 1)


def random_bytes(count: int, device: str) -> torch.Tensor:
    """Return what no memory compresses, from an aligned address on."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
