"""Checkpoints: of torch, of older versions of it, and of this package."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from tests.helpers import (
    assert_same_state,
    assert_within,
    each_config,
    each_optimizer,
    oracle,
    parameters,
    train,
)
from tests.registry import Config


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@each_config
def test_checkpoints_go_both_ways_with_torch(config: Config) -> None:
    """Torch, fusedopt and torch again, two steps each, as if torch had made all six."""
    params, torch_params = parameters(), parameters()
    expected = oracle(config)(torch_params, **config.kwargs)
    train(expected, torch_params, 6)
    optimizer: Any = None
    makes: list[Callable[..., Any]] = [oracle(config), config.cls, oracle(config)]
    for leg, make in enumerate(makes):
        following = make(params, **config.kwargs)
        if optimizer:
            following.load_state_dict(through_a_file(optimizer.state_dict()))
        optimizer = following
        train(optimizer, params, range(2 * leg, 2 * leg + 2))
    assert_same_state(optimizer, expected, assert_within)


def _each_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def age(state_dict: dict[str, Any]) -> None:
        for state in state_dict["state"].values():
            change(state)

    return age


def _drop_newer_keys(state_dict: dict[str, Any]) -> None:
    oldest = {"params", "lr", "lr_decay", "betas", "eps", "alpha"}
    oldest |= {"weight_decay", "momentum", "dampening"}
    for group in state_dict["param_groups"]:
        for key in set(group) - oldest:
            del group[key]


OLDER: dict[str, Callable[[dict[str, Any]], None]] = {
    "step-int": _each_state(lambda s: "step" in s and s.update(step=int(s["step"]))),
    "step-float": _each_state(lambda s: "step" in s and s.update(step=float(s["step"]))),
    "step-shape-1": _each_state(lambda s: "step" in s and s.update(step=s["step"].reshape(1))),
    "no-momentum": _each_state(lambda s: "momentum_buffer" in s and s.update(momentum_buffer=None)),
    "no-newer-keys": _drop_newer_keys,
}


@pytest.mark.parametrize("age", OLDER)
@each_optimizer
def test_older_checkpoints_load(config: Config, age: str) -> None:
    first_params = parameters()
    first = oracle(config)(first_params, **config.kwargs)
    train(first, first_params, 2)
    state_dict = first.state_dict()
    OLDER[age](state_dict)

    def continued(make: Callable[..., Optimizer]) -> list[Parameter]:
        params = copy.deepcopy(first_params)
        optimizer = make(params, **config.kwargs)
        optimizer.load_state_dict(through_a_file(state_dict))
        train(optimizer, params, range(2, 4))
        return params

    continued_by_torch = config.torch_cls or config.cls  # Lion needs only to load it
    for p, q in zip(continued(config.cls), continued(continued_by_torch), strict=True):
        assert_within(p.detach(), q.detach())


@each_optimizer
def test_hooks_of_loading_have_the_last_word(config: Config) -> None:
    params = parameters([(4,)], torch.bfloat16)
    optimizer = config.cls(params, **config.kwargs)
    train(optimizer, params, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state.update({k: v.float() for k, v in state.items() if k != "step"})

    def widen(opt: Optimizer) -> None:
        for state in opt.state.values():
            assert {v.dtype for k, v in state.items() if k != "step"} == {torch.float32}
            state.update({k: v.double() for k, v in state.items()})

    handle = optimizer.register_load_state_dict_post_hook(widen)
    optimizer.load_state_dict(state_dict)
    assert {v.dtype for v in optimizer.state[params[0]].values()} == {torch.float64}
    handle.remove()
    optimizer.register_load_state_dict_post_hook(lambda opt: opt.state.clear())
    optimizer.load_state_dict(state_dict)
    assert not optimizer.state
