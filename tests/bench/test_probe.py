"""The limit of the memory, and what is said where the machine was busy."""

from __future__ import annotations

import io
import itertools
import time

import pytest
import torch
from rich.console import Console

from fusedopt import _core
from fusedopt.bench import table
from fusedopt.bench.contestants import contestants
from fusedopt.bench.measure import measure
from fusedopt.bench.probe import bandwidth_probes, move, probed
from fusedopt.bench.results import Overhead, RowResult, Timing, spread
from fusedopt.bench.rows import Row
from tests.bench.common import TINY


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("norm_too", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_way_moves_everything(count: int, norm_too: bool, threads: int) -> None:
    n = 3 * 16384 + 7 * 16  # parts of the way back, and a part of a part
    for ahead, temporal in itertools.product(range(len(_core.probed_ahead)), (True, False)):
        arrays = [torch.randn(n) for _ in range(count)]
        added = arrays[1].clone()
        expected = [x if i == 1 else x + added for i, x in enumerate(arrays)]
        move(arrays, norm_too, ahead, temporal, threads)
        for x, y in zip(arrays, expected, strict=True):
            assert torch.equal(x, y)


def test_arrays_that_no_way_can_move_are_refused() -> None:
    arrays = [torch.zeros(32) for _ in range(3)]
    for wrong, ahead in (
        (arrays[:2], 0),
        ([x[:20] for x in arrays], 0),
        ([x[1:17] for x in arrays], 0),
        (arrays, 3),
    ):
        with pytest.raises(ValueError, match=r"expected|no such"):
            move(wrong, False, ahead, True, 1)


@pytest.mark.parametrize(
    ("optimizer", "mode", "streams"),
    [("AdamW", "plain", 7), ("AdamW", "clip", 8), ("SGD", "plain", 5), ("Lion", "clip", 6)],
)
def test_each_way_moves_as_much_as_the_row(optimizer: str, mode: str, streams: int) -> None:
    row = Row("2 x 16K", optimizer, mode)
    arrays, n = probed(row)
    ways, moved = bandwidth_probes(row)
    assert (arrays, moved) == ((streams + 1) // 2, 4 * n * streams)
    assert moved == row.bytes
    assert len(ways) == 1 + 2 * len(_core.probed_ahead)
    for step in ways.values():
        step()


def test_the_limit_is_the_fastest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = {"slow": 0.02, "fast": 0.002, "slower": 0.03}

    def ways(row: Row) -> object:
        return {name: lambda s=s: time.sleep(s) for name, s in slept.items()}, 1_000_000

    monkeypatch.setattr("fusedopt.bench.measure.bandwidth_probes", ways)
    result = measure(TINY, contestants("none"), repeats=3)
    assert result.limit_way == "fast"
    assert result.limit_gigabytes_per_second > 1e6 / 0.02 / 1e9


def _row(ours: list[float], limit: list[float]) -> RowResult:
    timing = Timing("fusedopt", 1.0, spread=spread(ours), share_of_limit=1.55)
    facts = ("a row", "1 x 1M", "AdamW", "plain", "float32", 2, 1, 1_000_000, 28_000_000, 30.0)
    return RowResult(*facts, [timing], limit_spread=spread(limit))


QUIET, BUSY = [1.0, 1.01, 1.02, 1.03, 1.04], [1.0, 1.0, 1.1, 1.3, 1.4]


@pytest.mark.parametrize(
    ("ours", "limit", "said"),
    [(QUIET, QUIET, "155%"), (BUSY, QUIET, "busy"), (QUIET, BUSY, "busy")],
)
def test_a_row_of_a_busy_machine_has_no_percentage(
    ours: list[float], limit: list[float], said: str
) -> None:
    row = _row(ours, limit)
    assert row.share(row.timings[0]) == said
    printed = io.StringIO()
    Console(file=printed, width=110).print(table.row_table(row))
    assert f" {said} " in printed.getvalue()


@pytest.mark.parametrize(
    ("kernel", "apart", "said"),
    [
        (0.3, 0.05, ["0.20", "0.30", "0.10"]),
        (-0.1, 0.05, ["busy"] * 3),
        (0.3, 0.5, ["busy"] * 3),
    ],
)
def test_parts_of_an_overhead_are_not_below_zero(
    kernel: float, apart: float, said: list[str]
) -> None:
    found = Overhead("AdamW", 20, 2, 0.2, kernel, 0.1, {}, spread=apart)
    assert found.parts(2) == said
