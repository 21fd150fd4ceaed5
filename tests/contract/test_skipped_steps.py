"""Steps that are skipped because their gradients are not finite."""

from __future__ import annotations

import math

import pytest
import torch

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    each_optimizer,
    parameters,
    set_gradients,
    train,
)
from tests.registry import Config


@pytest.mark.cpu_only("on devices, a first step that is skipped makes states")
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("special", [math.inf, math.nan])
@each_optimizer
def test_skip_nonfinite_changes_nothing(
    config: Config, special: float, max_norm: float | None
) -> None:
    params, clean_params = parameters(), parameters()
    optimizer = config.cls(params, skip_nonfinite=True, max_grad_norm=max_norm, **config.kwargs)
    clean = config.cls(clean_params, max_grad_norm=max_norm, **config.kwargs)
    versions = []
    for step in range(4):
        set_gradients(params, step)
        if step in (0, 2):
            assert params[1].grad is not None
            params[1].grad[0, 0] = special
            versions.append([p._version for p in params])
            before = len(optimizer.state)
            optimizer.step()
            versions.append([p._version for p in params])
            assert len(optimizer.state) == before
            assert not optimizer.grad_norm.isfinite()
            continue
        optimizer.step()
        set_gradients(clean_params, step)
        clean.step()
    assert optimizer.skipped_steps == 2
    assert versions[0] == versions[1]
    assert versions[2] == versions[3]
    assert_same_state(optimizer, clean, assert_same_bits)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_skip_nonfinite_heeds_a_norm_from_elsewhere(norm: float) -> None:
    """As where another rank has the bad gradient: all ranks must skip."""
    (p,) = parameters([(4,)])
    before = p.detach().clone()
    optimizer = fusedopt.AdamW([p], skip_nonfinite=True)
    set_gradients([p], 0)
    optimizer.clip_grads_with_norm_(1.0, norm)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not optimizer.state
    assert_same_bits(p.detach(), before)
    optimizer.step()
    assert optimizer.skipped_steps == 1


def test_a_plain_step_count_waits_too() -> None:
    (p,) = parameters([(4,)])
    optimizer = fusedopt.Adam([p], skip_nonfinite=True)
    train(optimizer, [p], 1)
    optimizer.state[p]["step"] = 1
    p.grad = torch.full((4,), math.nan, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    train(optimizer, [p], 1)
    assert optimizer.state[p]["step"] == 2
