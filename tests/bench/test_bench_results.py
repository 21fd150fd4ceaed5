"""What is made of the times."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fusedopt.bench.contestants import OURS
from fusedopt.bench.overhead import overhead
from fusedopt.bench.results import Report, machine, read
from fusedopt.bench.rows import Row
from fusedopt.bench.training import Task, train
from tests.bench.common import TINY, TORCH, tiny_result


def test_figures_of_a_row() -> None:
    result = tiny_result()
    assert (result.tensors, result.parameters, result.bytes) == (3, 48, 28 * 48)
    ours = result.find(OURS)
    assert ours is not None
    assert ours.ratio == 1
    for timing in result.timings:
        assert timing.samples == 3
        rate = result.bytes / timing.milliseconds / 1e6
        assert timing.gigabytes_per_second == pytest.approx(rate)
        limit = result.limit_gigabytes_per_second
        assert timing.share_of_limit == pytest.approx(rate / limit)
        assert timing.ratio == pytest.approx(timing.milliseconds / ours.milliseconds)


def test_the_parts_of_the_overhead_add_up() -> None:
    result = overhead(Row("overhead", "AdamW"), TORCH, tensors=20, repeats=5)
    assert set(result.totals) == {OURS, "torch fused", "torch foreach", "torch loop"}
    parts = result.gather + result.kernel + result.rest
    assert parts == pytest.approx(result.totals[OURS])


def test_training_measures_a_share() -> None:
    from fusedopt.bench.models import GPT, ResNet

    for model in (
        lambda: ResNet(width=4, batch=2, pixels=32),
        lambda: GPT(width=24, layers=1, vocabulary=32, length=8),
    ):
        results = train(Task("tiny", "AdamW", model), TINY, TORCH, repeats=2)
        assert [result.contestant for result in results] == [OURS, "torch fused"]
        assert all(0 < result.share < 1 for result in results)


def test_json_returns_what_was_found(tmp_path: Path) -> None:
    report = Report(machine("cpu"), {"nobody": "not installed"})
    report.rows.append(tiny_result())
    report.scaling.append(tiny_result())
    report.memory.append(tiny_result())
    report.overheads.append(overhead(TINY, TORCH, tensors=5, repeats=2))
    path = tmp_path / "report.json"
    report.write(path)
    assert asdict(read(path)) == asdict(report)
    path.write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="has version 0, expected 2: measure again"):
        read(path)
