"""The rows of Muon: on matrices alone, beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import fusedopt
from fusedopt.bench import matrices, rows
from fusedopt.bench.contestants import OURS
from fusedopt.bench.measure import measure
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import Row

TINY = Row("3 matrices of 16 x 16", "Muon", threads=1)


def test_there_are_models_of_matrices_alone() -> None:
    sizes = {name: len(shapes) for name, shapes in rows.MATRICES.items()}
    assert sizes == {"96 matrices of 128 x 128": 96, "matrices of a small GPT": 16}
    for row in rows.matrix_rows(2, "cpu", quick=False):
        assert {len(shape) for shape in row.shapes} == {2}
        assert row.states == 1
        assert all(p.grad is not None for p in rows.parameters(row))
    assert "Muon" not in rows.optimizers()


def test_a_name_may_say_how_many_of_what_size() -> None:
    assert TINY.shapes == [(16, 16)] * 3


@pytest.mark.parametrize("mode", ["plain", "clip", "scaler"])
def test_right_numbers_pass(mode: str) -> None:
    result = measure(TINY._replace(mode=mode), matrices.contestants(), repeats=2)
    assert [(t.name, t.wrong, t.failed) for t in result.timings] == [
        (OURS, "", ""),
        ("torch", "", ""),
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.022}, {"momentum": 0.8}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}],
    ids=str,
)
def test_wrong_numbers_are_found(wrong: dict[str, Any]) -> None:
    def slightly_wrong(row: Row, params: list[Tensor]) -> Step:
        step: Step = fusedopt.Muon(params, **{**row.arguments, **wrong}).step
        return step

    assert matrices.mistake(slightly_wrong, TINY).startswith("off by ")
