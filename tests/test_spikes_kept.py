"""The window of norms, wherever an optimizer is copied, saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import Spikes
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    each_dtype,
    each_optimizer,
    parameters,
    set_gradients,
)
from tests.registry import Config

SPIKES = Spikes(window=8, warmup=4, patience=3)
SPIKY = (6, 9, 13, 14)
STEPS = 16


def train(optimizer: Any, params: list[Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        for p in params:
            assert p.grad is not None
            p.grad *= 64 if step in SPIKY else 1
        optimizer.step()


def through_memory(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def by_state_dict(optimizer: Any, make: Callable[[Any], Any]) -> Any:
    fresh = make([Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]])
    fresh.load_state_dict(through_memory(optimizer.state_dict()))
    return fresh


WAYS: dict[str, Callable[..., Any]] = {
    "state dict": by_state_dict,
    "pickle": lambda optimizer, _: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": lambda optimizer, _: copy.deepcopy(optimizer),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [2, 7, 10, 14])
@each_dtype
def test_a_resumed_run_goes_on_as_the_other(way: str, at: int, dtype: torch.dtype) -> None:
    def make(params: Any) -> fusedopt.AdamW:
        return fusedopt.AdamW(params, skip_spikes=SPIKES, state_dtype=torch.float32)

    params = parameters(dtype=dtype)
    optimizer = make(params)
    train(optimizer, params, range(at))
    resumed = WAYS[way](optimizer, make)
    before = resumed.skipped_steps
    train(optimizer, params, range(at, STEPS))
    train(resumed, resumed.param_groups[0]["params"], range(at, STEPS))
    assert optimizer.skipped_steps == len(SPIKY)
    assert resumed.skipped_steps - before == sum(step >= at for step in SPIKY)
    assert "window" in optimizer.state[params[0]]
    assert_same_state(resumed, optimizer, assert_same_bits)


@each_optimizer
def test_every_optimizer_resumes(config: Config) -> None:
    def make(params: Any) -> Any:
        return config.cls(params, skip_spikes=SPIKES, **config.kwargs)

    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(10))
    copies = [Parameter(p.detach().clone()) for p in params]
    resumed = make(copies)
    resumed.load_state_dict(through_memory(optimizer.state_dict()))
    train(optimizer, params, range(10, STEPS))
    train(resumed, copies, range(10, STEPS))
    assert_same_state(resumed, optimizer, assert_same_bits)


@pytest.mark.parametrize(
    "modes",
    [
        {"master_weights": True},
        {"state_dtype": "mxfp8", "stochastic_rounding": True},
        {"state_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_with_memory_modes(modes: dict[str, Any]) -> None:
    def make(params: Any) -> Any:
        return fusedopt.AdamW(params, skip_spikes=SPIKES, **modes)

    params = parameters([(5,), (64, 128)], torch.bfloat16)
    optimizer = make(params)
    train(optimizer, params, range(10))
    resumed = by_state_dict(optimizer, make)
    train(optimizer, params, range(10, STEPS))
    train(resumed, resumed.param_groups[0]["params"], range(10, STEPS))
    assert optimizer.skipped_steps == 4
    assert_same_state(resumed, optimizer, assert_same_bits)


def test_the_window_is_a_copy_of_the_checkpoints() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES)
    train(optimizer, params, range(6))
    checkpoint = optimizer.state_dict()
    optimizer.load_state_dict(checkpoint)
    before = checkpoint["state"][0]["window"].clone()
    train(optimizer, params, range(6, 9))
    assert_same_bits(checkpoint["state"][0]["window"], before)
    assert not torch.equal(optimizer.state[params[0]]["window"], before)


def test_torchs_optimizer_takes_the_checkpoint_and_gives_it_back() -> None:
    params = parameters(dtype=torch.float32)
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES)
    train(optimizer, params, range(10))
    before = optimizer.state[params[0]]["window"].clone()
    theirs = torch.optim.AdamW(params, foreach=False)
    theirs.load_state_dict(through_memory(optimizer.state_dict()))
    set_gradients(params, 10)
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    after = optimizer.state[params[0]]["window"]
    assert after.dtype == torch.float64
    assert_same_bits(after.float(), before.float())  # torch has rounded it, as any state
    train(optimizer, params, range(11, STEPS))
    assert all("window" not in s for s in optimizer.torch_state_dict()["state"].values())


def test_an_optimizer_without_the_option_drops_it() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES)
    train(optimizer, params, range(6))
    plain = by_state_dict(optimizer, fusedopt.AdamW)
    assert all("window" not in state for state in plain.state.values())


def test_a_window_of_another_length_begins_anew() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES)
    train(optimizer, params, range(6))
    optimizer.skip_spikes = True
    train(optimizer, params, range(6, 7))  # a spike by the window before
    assert optimizer.skipped_steps == 0
    window = optimizer.state[params[0]]["window"]
    assert window.shape == (130,)
    assert window[128] == 1


def test_one_taken_over_from_torch_counts_from_then_on() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params)
    set_gradients(params, 0)
    theirs.step()
    optimizer = fusedopt.AdamW.from_torch(theirs, skip_spikes=SPIKES)
    train(optimizer, params, range(1, STEPS))
    assert optimizer.skipped_steps == 4


# ---- where it is ---------------------------------------------------------------------------------


def test_frozen_parameters_do_not_have_it() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES)
    train(optimizer, params[1:], range(8))
    assert params[0] not in optimizer.state
    assert "window" in optimizer.state[params[1]]
    before = optimizer.state[params[1]]["window"].clone()
    params[0].requires_grad_(True)
    train(optimizer, params, range(8, 9))
    assert "window" not in optimizer.state[params[0]]
    assert not torch.equal(optimizer.state[params[1]]["window"], before)


def test_a_first_gradient_may_come_late() -> None:
    """The window is there first, and is no state of a rule."""
    params, clean_params = parameters(), parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=True)
    clean = fusedopt.AdamW(clean_params)
    train(optimizer, params[1:], range(3))
    train(clean, clean_params[1:], range(3))
    assert list(optimizer.state[params[0]]) == ["window"]
    set_gradients(params, 3)
    set_gradients(clean_params, 3)
    optimizer.step()
    clean.step()
    assert list(optimizer.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq", "window"]
    assert optimizer.state[params[0]].pop("window")[128] == 4
    assert_same_state(optimizer, clean, assert_same_bits)


def test_a_state_that_somebody_replaces_takes_it_along() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES)
    train(optimizer, params, range(6))
    for p in params:
        optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
    train(optimizer, params, range(6, 7))
    assert optimizer.skipped_steps == 1


def test_a_step_that_fails_leaves_it_as_it_was() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES)
    train(optimizer, params, range(6))
    before = optimizer.state[params[0]]["window"].clone()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match="has shape"):
        train(optimizer, params, range(6, 7))
    assert_same_bits(optimizer.state[params[0]]["window"], before)
    assert optimizer.skipped_steps == 0
