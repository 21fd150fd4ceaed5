"""Parameters, gradients and states may all be replaced between steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_config,
    each_optimizer,
    oracle,
    parameters,
    set_gradients,
    train,
)
from tests.registry import Config


def _replace_state(optimizer: Optimizer, p: Parameter) -> Parameter:
    optimizer.state[p] = dict(optimizer.state[p])
    return p


def _replace_tensors(optimizer: Optimizer, p: Parameter) -> Parameter:
    for key, value in optimizer.state[p].items():
        optimizer.state[p][key] = value.clone()
        value.fill_(torch.nan)
    return p


def _replace_data(optimizer: Optimizer, p: Parameter) -> Parameter:
    old = p.data
    p.data = p.data.clone()
    old.fill_(torch.nan)
    return p


def _replace_parameter(optimizer: Optimizer, p: Parameter) -> Parameter:
    new = Parameter(p.detach().clone())
    optimizer.param_groups[0]["params"] = [new]
    optimizer.state[new] = optimizer.state.pop(p)
    return new


@pytest.mark.parametrize(
    "replace", [_replace_state, _replace_tensors, _replace_data, _replace_parameter]
)
@each_config
def test_everything_may_be_replaced_between_steps(
    config: Config, replace: Callable[[Optimizer, Parameter], Parameter]
) -> None:
    (p,), (undisturbed,) = parameters([(40,)]), parameters([(40,)])
    optimizer = config.cls([p], **config.kwargs)
    expected = config.cls([undisturbed], **config.kwargs)
    train(expected, [undisturbed], 4)
    train(optimizer, [p], 2)
    if not optimizer.state and replace is not _replace_data:
        optimizer.state[p] = {}
    p = replace(optimizer, p)
    train(optimizer, [p], range(2, 4))
    assert_same_bits(p.detach(), undisturbed.detach())
    for key, value in expected.state.get(undisturbed, {}).items():
        assert_same_bits(optimizer.state[p][key], value)


def drop_the_last(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"].pop()


def drop_all(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"].clear()


def shorten_the_second(optimizer: Optimizer) -> None:
    p = optimizer.param_groups[0]["params"][1]
    half = len(p) // 2
    gradient, p.grad = p.grad, None
    p.data = p.data[:half]
    p.grad = gradient[:half]
    state = optimizer.state.get(p, {})
    state.update({key: x[:half] for key, x in state.items() if torch.is_tensor(x) and x.dim()})


@pytest.mark.parametrize("change", [drop_the_last, drop_all, shorten_the_second])
@each_optimizer
def test_a_step_for_less_of_the_memory_of_the_last_one(
    config: Config, change: Callable[[Optimizer], None]
) -> None:
    """What is left lies where it lay before."""

    def trained(make: Callable[..., Optimizer]) -> tuple[Optimizer, list[Tensor]]:
        params = parameters([(90,), (60,), (80,)])
        whole = [p.data for p in params]
        optimizer = make(params, **config.kwargs)
        set_gradients(params, 0)
        for _ in range(3):
            optimizer.step()
        change(optimizer)
        for _ in range(2):
            optimizer.step()
        return optimizer, whole

    actual, actual_memory = trained(config.cls)
    expected, expected_memory = trained(oracle(config))
    assert_same_state(actual, expected, assert_within)
    for x, y in zip(actual_memory, expected_memory, strict=True):
        assert_within(x, y)


@each_optimizer
def test_what_a_step_does_may_change_while_nothing_moves(config: Config, two_threads: None) -> None:
    """The work is shared by threads as in the step before, unless that was other work."""

    def trained(threads: int) -> Optimizer:
        torch.set_num_threads(threads)
        params = parameters([(300_000,), (70,), (150_000,)])
        optimizer = config.cls(params, **config.kwargs)
        set_gradients(params, 0)
        for max_norm in (None, None, 1.0, 1.0, None, 0.1):
            optimizer.max_grad_norm = max_norm
            optimizer.step()
        return optimizer

    assert_same_state(trained(2), trained(1), assert_same_bits)


def test_a_list_of_parameters_that_changes_during_the_step() -> None:
    """Hyper-parameters are read in Python, which may do anything."""

    class Shrinking(float):
        def __float__(self) -> float:
            del optimizer.param_groups[0]["params"][1:]
            return 0.1

    params = parameters([(4,)] * 50)
    optimizer = fusedopt.SGD(params, lr=0.1)
    optimizer.param_groups[0]["lr"] = Shrinking(0.1)
    set_gradients(params, 0)
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 1
