"""Spikes that a device finds: nobody waits, and a graph could repeat it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import Spikes, _engine, _memory
from tests.device.common import never_waiting
from tests.helpers import (
    assert_same_bits,
    parameters,
    set_gradients,
    train,
)
from tests.registry import PLAIN_CONFIGS, Config

SPIKES = {
    "skip": Spikes(window=6, warmup=3, patience=2),
    "clip": Spikes(window=6, warmup=3, action="clip"),
    "threshold": Spikes(sigmas=math.inf, threshold=20.0),
}
each_spikes = pytest.mark.parametrize("spikes", SPIKES.values(), ids=SPIKES.keys())
each_config = pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)


def set_spiky_gradients(params: list[Any], step: int) -> None:
    set_gradients(params, step)
    for p in params:
        p.grad *= 64 if step in (4, 5, 8) else 1


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}], ids=str)
@each_spikes
@each_config
def test_a_step_never_waits(config: Config, spikes: Spikes, options: dict[str, Any]) -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = config.cls(params, **config.kwargs, skip_spikes=spikes, **options)
    for step in range(10):
        set_spiky_gradients(params, step)
        with never_waiting():
            optimizer.step()
    assert optimizer.skipped_steps == (0 if spikes.action == "clip" else 3)
    assert all(bool(p.isfinite().all()) for p in params)


@each_spikes
def test_pending_clips_never_wait(spikes: Spikes) -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = fusedopt.AdamW(params, skip_spikes=spikes)
    for step in range(10):
        set_spiky_gradients(params, step)
        with never_waiting():
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
    assert optimizer.skipped_steps == (0 if spikes.action == "clip" else 3)


def test_the_window_changes_in_place() -> None:
    """A graph repeats the change, and has to find what it left."""
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.SGD(params, lr=0.1, skip_spikes=True)
    train(optimizer, params, 1)
    window = optimizer.state[params[0]]["window"]
    assert window.device == params[0].device
    before = window.clone()
    train(optimizer, params, range(1, 2))
    assert optimizer.state[params[0]]["window"] is window
    assert (before[128], window[128]) == (1, 2)


def test_a_step_is_captured(capturing: None) -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.AdamW(params, capturable=True, skip_spikes=True)
    with pytest.raises(RuntimeError, match="first step"):
        train(optimizer, params, 1)
    assert not optimizer.state or not any("window" in s for s in optimizer.state.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_memory, "is_capturing", lambda _: False)
        train(optimizer, params, 1)
    with never_waiting():
        train(optimizer, params, range(1, 3))
    assert optimizer.state[params[0]]["window"][128] == 3


@each_spikes
@pytest.mark.parametrize("where", ["elsewhere", "on the device"])
def test_the_window_may_be_elsewhere(
    where: str, spikes: Spikes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the first parameter is on another device: a copy is changed, and put back."""

    def run() -> list[Tensor]:
        params = parameters([(5,), (3, 4)], torch.float32)
        optimizer = fusedopt.AdamW(params, skip_spikes=spikes)
        for step in range(10):
            set_spiky_gradients(params, step)
            optimizer.step()
        return [*(p.detach() for p in params), optimizer.state[params[0]]["window"]]

    expected = run()
    moved, copies = _memory.moved, []

    def copied(numbers: Tensor, device: int) -> Tensor:
        copies.append(moved(numbers, device).clone())
        return copies[-1]

    monkeypatch.setattr(_memory, "moved", copied)
    watch = fusedopt._spikes.watch
    monkeypatch.setattr(fusedopt._spikes, "watch", lambda *args: watch(*args)._replace(address=0))
    if where == "elsewhere":  # the CPU decides
        monkeypatch.setattr(_engine, "engine", type(_engine.engine)(device="none"))
    for actual, want in zip(run(), expected, strict=True):
        assert_same_bits(actual.cpu(), want.cpu())
    assert len(copies) == 10
