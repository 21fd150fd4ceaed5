"""Taking over from torch: an optimizer in mid-run, and the names of its classes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_torch_optimizer,
    oracle,
    parameters,
    set_gradients,
)
from tests.registry import Config


def train(optimizer: Any, scheduler: Any, params: Any, steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        scheduler.step()


@each_torch_optimizer
def test_it_goes_on_with_state_groups_schedulers_and_hooks(config: Config) -> None:
    params, expected_params = parameters(), parameters()
    groups = [{"params": params[:2], "lr": 0.05}, {"params": params[2:]}]
    expected_groups = [{"params": expected_params[:2], "lr": 0.05}, {"params": expected_params[2:]}]
    old = oracle(config)(groups, **config.kwargs)
    expected = oracle(config)(expected_groups, **config.kwargs)
    scheduler, expected_scheduler = (ExponentialLR(x, 0.5) for x in (old, expected))
    stepped: list[Any] = []
    handle = old.register_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
    train(old, scheduler, params, range(2))
    optimizer = config.cls.from_torch(old)
    train(optimizer, scheduler, params, range(2, 4))
    train(expected, expected_scheduler, expected_params, range(4))
    assert type(optimizer) is config.cls
    assert stepped == [old, old, optimizer, optimizer]
    handle.remove()
    train(optimizer, scheduler, params, range(4, 5))
    train(expected, expected_scheduler, expected_params, range(4, 5))
    assert len(stepped) == 4
    assert_same_state(optimizer, expected, assert_within)


@each_torch_optimizer
def test_it_takes_the_options(config: Config) -> None:
    params, expected_params = parameters(), parameters()
    old = config.torch_cls(params, **config.kwargs)
    optimizer = config.cls.from_torch(old, max_grad_norm=0.25)
    expected = config.cls(expected_params, max_grad_norm=0.25, **config.kwargs)
    for some in (params, expected_params):
        set_gradients(some, 0)
    optimizer.step()
    expected.step()
    assert_same_state(optimizer, expected, assert_same_bits)
    assert "max_grad_norm" not in old.defaults
    with pytest.raises(ValueError, match="max_grad_norm"):
        config.cls.from_torch(old, max_grad_norm=-1.0)


def test_it_refuses_another_class() -> None:
    class Mine(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            raise AssertionError

    for other in (torch.optim.Adam, Mine, fusedopt.AdamW):
        optimizer = other(parameters())
        with pytest.raises(
            TypeError, match=rf"takes over a torch\.optim\.AdamW, got .*{other.__name__}"
        ):
            fusedopt.AdamW.from_torch(optimizer)
    with pytest.raises(TypeError, match="torch has no Lion"):
        fusedopt.Lion.from_torch(torch.optim.SGD(parameters()))


@each_torch_optimizer
def test_the_names_of_torch_mean_fusedopt_inside(config: Config) -> None:
    torchs = config.torch_cls
    with fusedopt.as_torch_optim():
        with contextlib.suppress(ZeroDivisionError), fusedopt.as_torch_optim():
            optimizer = getattr(torch.optim, config.name)(params := parameters(), **config.kwargs)
            raise ZeroDivisionError
        assert getattr(torch.optim, config.name) is config.cls
    assert type(optimizer) is config.cls
    assert getattr(torch.optim, config.name) is torchs
    set_gradients(params, 0)
    optimizer.step()
    expected = config.cls(expected_params := parameters(), **config.kwargs)
    set_gradients(expected_params, 0)
    expected.step()
    assert_same_state(optimizer, expected, assert_same_bits)
