"""The demo's GPT, smaller: what tools that compare trainings train, many times."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from examples import train_gpt

WIDTH, LAYERS, CONTEXT, WINDOWS = 64, 2, 64, 128


def make() -> train_gpt.GPT:
    return train_gpt.GPT(WIDTH, LAYERS)


def weights() -> int:
    return sum(p.numel() for p in make().parameters())


def held_out_losses(model: Any, optimizer: Any, seed: int, steps: int, tests: int) -> list[float]:
    """Train a model; return so many held-out losses on the way, at equal distances."""
    text, held_text = train_gpt.load_text()
    spread = np.linspace(0, len(held_text) - CONTEXT - 1, num=WINDOWS, dtype=np.int64)
    held_out = train_gpt.windows(held_text, spread, CONTEXT)
    schedule = train_gpt.schedule_for(optimizer, steps)
    random = np.random.default_rng(seed)
    losses = []
    for step in range(1, steps + 1):
        starts = random.integers(0, len(text) - CONTEXT, size=train_gpt.BATCH)
        optimizer.zero_grad()
        model.loss(*train_gpt.windows(text, starts, CONTEXT)).backward()
        optimizer.step()
        schedule.step()
        if step % (steps // tests) == 0:
            with torch.no_grad():
                losses.append(model.loss(*held_out).item())
    return losses
