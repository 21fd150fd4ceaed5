"""The limit of the memory: a row's traffic with next to no arithmetic, moved in several ways."""

from __future__ import annotations

import functools
import itertools

import torch

from fusedopt import _core
from fusedopt._engine import engine
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import Row

_MOST_PROBED = 100_000_000  # elements: more would be no faster, and need memory


def probed(row: Row) -> tuple[int, int]:
    """Return how many arrays of how many float32 elements the probe walks on a CPU."""
    arrays = 3 if row.states == 1 else 4
    lines = row.bytes // (4 * _streams(row, arrays) * _core.probed_line)
    return arrays, max(1, min(lines, _MOST_PROBED // _core.probed_line)) * _core.probed_line


def _streams(row: Row, arrays: int) -> int:
    """Return how often an array is read or written: a norm reads the gradient once more."""
    return 2 * arrays - 1 + (row.mode != "plain")


def bandwidth_probes(row: Row) -> tuple[dict[str, Step], int]:
    """Return ways to move the row's traffic with next to no arithmetic, and the bytes of each.

    The fastest is the limit: which one that is depends on the processor. They are as large as the
    row's, up to a size, so that they find as much of it in caches. On a CPU, parameter and states
    are read and written and the gradient is read, as with an optimizer of one state or of two (the
    memory moves more bytes a second where there are two), after a norm's pass over the gradient
    where the row clips: by a rule of the engine, which has wide vectors, and by plain loops that
    ask for memory at several distances ahead, or not at all, with stores that go through caches or
    past them. On a GPU, one array is copied.
    """
    if row.device == "cuda":
        source, target = (random_bytes(row.bytes // 2, row.device) for _ in range(2))
        return {"copy": lambda: target.copy_(source)}, row.bytes // 2 * 2
    count, n = probed(row)
    arrays = [torch.zeros(n) for _ in range(count)]
    norm_too = row.mode != "plain"

    def by_rule() -> None:
        if norm_too:
            engine.norm(arrays[1:2], 2.0, row.threads)
        engine.update("traffic", count == 3, [1.0], 1.0, arrays, row.threads)

    ways: dict[str, Step] = {"rule": by_rule}
    for ahead, temporal in itertools.product(range(len(_core.probed_ahead)), (True, False)):
        name = f"{_core.probed_ahead[ahead]} bytes ahead{'' if temporal else ', past caches'}"
        ways[name] = functools.partial(move, arrays, norm_too, ahead, temporal, row.threads)
    return ways, 4 * n * _streams(row, count)


def move(
    arrays: list[torch.Tensor], norm_too: bool, ahead: int, temporal: bool, threads: int
) -> None:
    """Add the second of 3 or 4 aligned arrays to each of the others, in one of the ways."""
    pointers = [each.data_ptr() for each in arrays]
    _core.move_streams(pointers, len(arrays[0]), norm_too, ahead, temporal, threads)


def random_bytes(count: int, device: str) -> torch.Tensor:
    """Return what no memory compresses, from an aligned address on."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
