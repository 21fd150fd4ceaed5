"""Parameters and gradients that share memory."""

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
    each_optimizer,
    oracle,
    parameters,
    set_gradients,
    train,
    values,
)
from tests.registry import Config

OVERLAPS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "disjoint": lambda x: [x[: len(x) // 3], x[len(x) // 3 :]],
    "interleaved": lambda x: [x[::2], x[1::2]],
    "tied": lambda x: [x, x.view(-1, 4)],
    "overlapping": lambda x: [x[: len(x) // 2], x[len(x) // 3 :], x[::2]],
}


@pytest.mark.cpu_only("torch steps strided parameters on devices, first")
@pytest.mark.parametrize("overlap", OVERLAPS)
@each_optimizer
def test_one_storage_seen_through_several_parameters(
    config: Config, overlap: str, two_threads: None
) -> None:
    """Updated one after the other, as torch does; large enough for threads to meet in it."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        params = [Parameter(view) for view in OVERLAPS[overlap](values((600_000,), 0))]
        optimizer = make(params, **config.kwargs)
        train(optimizer, params, 2)
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


@pytest.mark.cpu_only("torch steps parameters on devices in any order")
@pytest.mark.parametrize("attribute", ["grad", "data"])
@each_optimizer
def test_memory_that_is_shared_for_some_steps(
    config: Config, attribute: str, two_threads: None
) -> None:
    """Nothing is in the steps before, nor in those after. One thread keeps the order anyway."""

    def trained(threads: int) -> Optimizer:
        torch.set_num_threads(threads)
        # Of two threads, the second would begin with the third parameter.
        params = parameters([(300_000,), (600_000,), (400_000,), (500_000,)])
        optimizer = config.cls(params, **config.kwargs)
        train(optimizer, params, 2)
        apart = params[2].data
        for _ in range(2):
            set_gradients(params, 3)
            setattr(params[2], attribute, params[1].detach()[:400_000])
            optimizer.step()
        params[2].data = apart
        train(optimizer, params, 2)
        return optimizer

    assert_same_state(trained(2), trained(1), assert_same_bits)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@each_optimizer
def test_a_parameter_listed_twice_is_stepped_twice(config: Config) -> None:
    """As tied weights are when the parameters of two modules are joined: torch only warns."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        (p,) = parameters([(4,)])
        optimizer = make([p, p], **config.kwargs)
        train(optimizer, [p], 3)
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("count", [3, 3.0], ids=["int", "float"])
def test_a_parameter_listed_twice_counts_plain_steps_twice(count: float) -> None:
    (p,) = parameters([(4,)])
    optimizer = fusedopt.Adam([p, p])
    train(optimizer, [p], 1)
    optimizer.state[p]["step"] = count
    train(optimizer, [p], 1)
    assert optimizer.state[p]["step"] == 5


@each_optimizer
def test_a_gradient_that_is_its_parameter_in_another_order(config: Config) -> None:
    """Read before any of it is written."""
    x = values((300, 300), 0)
    p, expected_p = Parameter(x.clone()), Parameter(x.clone())
    p.grad, expected_p.grad = p.data.t(), x.t().clone()
    optimizer, expected = (config.cls([q], **config.kwargs) for q in (p, expected_p))
    optimizer.step()
    expected.step()
    assert_same_state(optimizer, expected, assert_same_bits)


@each_optimizer
def test_a_gradient_that_is_another_parameter(config: Config, two_threads: None) -> None:
    """Updated one after the other, the second with what the first has become."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        a, b = parameters([(60_000,), (60_000,)])
        optimizer = make([a, b], **config.kwargs)
        for step in range(2):
            a.grad, b.grad = values((60_000,), 1000 + step), a.detach()
            optimizer.step()
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)
