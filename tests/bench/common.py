"""What tests of the benchmark share."""

from __future__ import annotations

from typing import Any

from fusedopt.bench.contestants import contestants
from fusedopt.bench.measure import measure
from fusedopt.bench.results import RowResult
from fusedopt.bench.rows import Row

TORCH = contestants("torch fused,foreach,loop")
TINY = Row("3 x 16", "AdamW", threads=1)


def build(name: str) -> Any:
    return next(contestant.build for contestant in TORCH if contestant.name == name)


def tiny_result(optimizer: str = "AdamW") -> RowResult:
    return measure(TINY._replace(optimizer=optimizer), TORCH, repeats=3)
