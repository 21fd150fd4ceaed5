"""What the benchmark does on a GPU, as far as it can be seen without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedopt.bench import measure, probe
from fusedopt.bench.results import Timing
from fusedopt.bench.rows import Row
from fusedopt.bench.table import _cells


class Event:
    """One of a stream that is where the clock says."""

    clock = 0.0  # milliseconds

    def __init__(self, device: str, enable_timing: bool) -> None:
        assert (device, enable_timing) == ("cuda", True)

    def record(self) -> None:
        self.at = Event.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_a_time_is_of_one_of_the_steps_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", Event)
    taken: list[float] = []

    def step() -> None:
        Event.clock += 10.0
        taken.append(Event.clock)

    assert measure._seconds(step, "cuda", 8) == pytest.approx(0.010)
    assert len(taken) == 8


@pytest.mark.parametrize(
    ("model", "device", "queued"),
    [("1 x 100M", "cuda", measure.QUEUED), ("1 x 100M", "cpu", 1), ("10 x 1K", "cuda", 1)],
)
def test_steps_of_long_rows_are_queued(
    model: str, device: str, queued: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the host's part of a step, before its first launch, would be a tenth of its time."""
    asked: list[int] = []

    def seconds(step: Any, where: str, queued: int = 1) -> float:
        asked.append(queued)
        return 1.0

    monkeypatch.setattr(measure, "_seconds", seconds)
    row = Row(model, "AdamW", device=device)
    measure._interleave({"fusedopt": lambda: None}, row, 1, 0.0, lambda text: None)
    assert set(asked) == {queued}


def test_the_hosts_part_has_a_column_of_its_own() -> None:
    timing = Timing("fusedopt")
    assert _cells(timing, "")["host"] == ""
    timing.host_microseconds = measure._host_seconds(lambda: None, "cpu") * 1e6
    assert _cells(timing, "")["host"].endswith(" us")


def test_the_probe_copies_what_nothing_compresses() -> None:
    data = probe.random_bytes(100_003, "cpu")
    assert len(set(data.tolist())) == 256
    assert data.data_ptr() % 16 == 0
