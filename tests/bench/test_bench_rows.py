"""The rows of the benchmark: models, optimizers, bytes."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from fusedopt.bench import rows
from fusedopt.bench.contestants import OURS, contestants
from fusedopt.bench.measure import measure
from fusedopt.bench.rows import MAX_NORM, Row
from tests.bench.common import TINY


def test_models_have_the_tensors_and_parameters_of_their_names() -> None:
    sizes = {name: (len(Row(name, "SGD").shapes), Row(name, "SGD").numel) for name in rows.MODELS}
    assert sizes == {
        "GPT-2 124M": (148, 124_439_808),
        "ResNet-50": (161, 25_557_032),
        "LoRA r16 of a 7B model": (448, 39_976_960),
        "YOLOv8 n": (183, 3_157_184),  # but for 16 fixed numbers, as many as its authors say
        "1 x 100M": (1, 100_000_000),
        "10 x 1M": (10, 10_000_000),
        "1000 x 1K": (1000, 1_024_000),
        "2000 x 1K": (2000, 2_048_000),
        "2000 x 16": (2000, 32_000),
    }


def test_every_optimizer_of_the_package_is_found() -> None:
    found = rows.optimizers()
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Lion"} <= set(found)
    assert {row.optimizer for row in rows.main_rows(2, "cpu")} == set(found)
    assert {row.optimizer for row in rows.quick_rows(2, "cpu")} == set(found)


def test_an_optimizer_without_known_arguments_is_measured_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(fusedopt.Lion):
        pass

    monkeypatch.setattr(fusedopt, "Other", Other, raising=False)
    assert rows.optimizers()[-1] == "Other"
    row = TINY._replace(optimizer="Other")
    assert row.states == 1
    result = measure(row, contestants("none"), repeats=2)
    assert [(t.name, t.wrong, t.failed) for t in result.timings] == [(OURS, "", "")]


def test_rows_name_what_differs() -> None:
    names = [str(row) for row in rows.all_rows(2, "cpu")]
    assert len(set(names)) == len(names)
    assert "GPT-2 124M, Lion, GradScaler and clip, bfloat16, 1 thread" in names
    main = [str(row) for row in rows.main_rows(2, "cpu")]
    assert set(main) < set(names)
    assert "1 x 100M, SGD, 2 threads" in main
    assert "ResNet-50, AdamW, clip, bfloat16, 2 threads" in main


def test_memory_modes_are_measured_on_a_model_with_matrices() -> None:
    for quick, model in ((True, "ResNet-50"), (False, "GPT-2 124M")):
        (row,) = rows.memory_rows(2, "cpu", quick=quick)
        assert (row.model, row.threads, str(row)) == (model, 2, f"{model}, AdamW, 2 threads")


@pytest.mark.parametrize(
    ("optimizer", "mode", "each"),
    [("AdamW", "plain", 28), ("AdamW", "clip", 32), ("SGD", "plain", 20), ("Lion", "clip", 24)],
)
def test_bytes(optimizer: str, mode: str, each: int) -> None:
    row = Row("10 x 1M", optimizer, mode)
    assert row.bytes == each * row.numel
    assert row._replace(dtype=torch.bfloat16).bytes == each * row.numel // 2


@pytest.mark.parametrize("model", ["3 x 16", "2 x 3M"])
def test_gradients_are_clipped_at_every_step(model: str) -> None:
    params = rows.parameters(Row(model, "AdamW"))
    grads = [p.grad for p in params if p.grad is not None]
    assert len(grads) == len(params)
    assert all(p.stride() == grad.stride() for p, grad in zip(params, grads, strict=True))
    norm = torch.nn.utils.get_total_norm(grads)
    assert torch.isfinite(norm)
    if model == "2 x 3M":  # the models that are measured have more gradients than 3 x 16
        assert norm > 10 * MAX_NORM
