"""The oracle finds wrong numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedopt.bench import oracle, rows, table
from fusedopt.bench.contestants import OURS, Contestant
from fusedopt.bench.measure import measure
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import Row
from tests.bench.common import TINY, TORCH, build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", rows.optimizers())
def test_right_numbers_pass(optimizer: str, dtype: torch.dtype) -> None:
    row = Row("3 x 16", optimizer, dtype=dtype)
    for contestant in TORCH:
        if contestant.name in (OURS, "torch loop") and contestant.enters(row):
            assert oracle.mistake(contestant.build, row) == "", contestant.name


@pytest.mark.parametrize("mode", ["clip", "scaler"])
@pytest.mark.parametrize("name", ["torch fused", "torch fused + grad_scale", "torch loop"])
def test_right_numbers_pass_after_clipping(name: str, mode: str) -> None:
    assert oracle.mistake(build(name), Row("3 x 16", "AdamW", mode)) == ""


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("SGD", {"lr": 0.1001}),
        ("AdamW", {"betas": (0.9, 0.998)}),
        ("AdamW", {"weight_decay": 0.02}),
        ("AdamW", {"eps": 1e-6}),
        ("RMSprop", {"alpha": 0.991}),
    ],
)
def test_wrong_numbers_are_found(optimizer: str, arguments: dict[str, Any]) -> None:
    row = Row("3 x 16", optimizer)

    def slightly_wrong(row: Row, params: list[Tensor]) -> Step:
        cls = getattr(torch.optim, optimizer)
        wrong: torch.optim.Optimizer = cls(params, **{**row.arguments, **arguments})
        return wrong.step

    assert oracle.mistake(slightly_wrong, row).startswith("off by ")


def test_a_peer_that_ignores_clipping_or_does_nothing_is_wrong() -> None:
    def does_nothing(row: Row, params: list[Tensor]) -> Step:
        return lambda: None

    def unclipped(row: Row, params: list[Tensor]) -> Step:
        return torch.optim.SGD(params, **row.arguments).step

    assert oracle.mistake(does_nothing, Row("3 x 16", "SGD")) != ""
    assert oracle.mistake(unclipped, Row("3 x 16", "SGD", "clip")) != ""


def test_a_wrong_peer_is_timed_and_marked() -> None:
    def not_a_number(row: Row, params: list[Tensor]) -> Step:
        return lambda: [p.data.fill_(torch.nan) for p in params]

    result = measure(TINY, [*TORCH, Contestant("bad", lambda row: True, not_a_number)], repeats=2)
    bad = result.timings[-1]
    assert (bad.name, bad.wrong, bad.failed) == ("bad", "not finite", "")
    assert bad.milliseconds > 0
    best = table.best_peer(result)
    assert best is not None
    assert best.name != "bad"
