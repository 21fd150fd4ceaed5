"""A training run through a batch that would spoil it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import Spikes

STEPS, SPIKE = 200, 150


def losses(*, bad: str, **options: Any) -> list[float]:
    """Train a small model; a batch in the middle may be broken, or not be there at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = fusedopt.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    found = []
    for step in range(STEPS):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
        y = (x.sum(1, keepdim=True) / 2).sin()
        if step == SPIKE and bad == "left out":
            continue
        if step == SPIKE and bad == "labels":
            y = y * 1000
        optimizer.zero_grad()
        loss = loss_of(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step != SPIKE:
            found.append(float(loss.detach()))
    assert optimizer.skipped_steps == (
        bad == "labels" and options.get("skip_spikes") in (True, Spikes())
    )
    return found


@pytest.mark.cpu_only("a model of torch's, on the CPU")
def test_a_skipped_batch_leaves_the_losses_of_a_run_without_it() -> None:
    without = losses(bad="left out")
    assert losses(bad="labels", skip_spikes=True) == without
    assert losses(bad="none", skip_spikes=True) == losses(bad="none")
    assert max(losses(bad="labels")[SPIKE:]) > 1000 * max(without[SPIKE:])


@pytest.mark.cpu_only("a model of torch's, on the CPU")
def test_a_clipped_batch_does_little() -> None:
    without = losses(bad="left out")
    clipped = losses(bad="labels", skip_spikes=Spikes(action="clip"))
    assert clipped[:SPIKE] == without[:SPIKE]
    assert max(clipped[SPIKE:]) < 2 * max(without[SPIKE - 50 :])
