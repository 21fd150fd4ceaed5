"""A factor that clipping leaves for the next step to apply."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import fusedopt
from tests.helpers import (
    Clip,
    all_params,
    assert_same_bits,
    assert_same_state,
    assert_within,
    parameters,
    set_gradients,
)


def one_step(clip: Clip | None = None, **kwargs: Any) -> Tensor:
    params = parameters([(5,)])
    optimizer = fusedopt.SGD(params, lr=0.1, **kwargs)
    set_gradients(params, 0)
    if clip:
        clip(optimizer)
    optimizer.step()
    return params[0].detach()


def test_a_factor_serves_one_step() -> None:
    params, twice = parameters([(5,)]), parameters([(5,)])
    set_gradients(params, 0)
    set_gradients(twice, 0)
    optimizer, plain = (fusedopt.SGD(p, lr=0.1) for p in (params, twice))
    optimizer.clip_grad_norm_(0.0)
    optimizer.step()
    optimizer.step()
    plain.step()
    assert_same_bits(params[0].detach(), twice[0].detach())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_the_factor(set_to_none: bool) -> None:
    def dropped(optimizer: Any) -> None:
        optimizer.clip_grad_norm_(0.0)
        optimizer.zero_grad(set_to_none)
        set_gradients(all_params(optimizer), 0)

    assert_same_bits(one_step(dropped), one_step())


def test_a_step_that_fails_keeps_the_factor() -> None:
    def failing(optimizer: Any) -> None:
        (p,) = all_params(optimizer)
        optimizer.clip_grad_norm_(0.5)
        kept = p.data
        p.data = torch.ones(2, dtype=torch.float64)
        with pytest.raises(ValueError, match="has shape"):
            optimizer.step()
        p.data = kept

    assert_same_bits(one_step(failing), one_step(lambda opt: opt.clip_grad_norm_(0.5)))


def test_clipping_twice_is_clipping_by_the_smaller() -> None:
    norms = []

    def twice(optimizer: Any) -> None:
        norms.append(optimizer.clip_grad_norm_(0.5).item())
        norms.append(optimizer.clip_grad_norm_(0.25).item())

    assert_within(one_step(twice), one_step(lambda opt: opt.clip_grad_norm_(0.25)), rtol=1e-5)
    assert norms[1] == pytest.approx(0.5, rel=1e-5)
    both = one_step(lambda opt: opt.clip_grad_norm_(0.5), max_grad_norm=0.25)
    assert_within(both, one_step(max_grad_norm=0.25), rtol=1e-5)


def test_two_optimizers_share_a_norm() -> None:
    params, expected_params = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    set_gradients(params, 0)
    set_gradients(expected_params, 0)
    norm = fusedopt.get_total_norm([p.grad for p in params if p.grad is not None])
    for p, given in zip(params, (norm, norm.item()), strict=True):
        optimizer = fusedopt.SGD([p], lr=0.1)
        optimizer.clip_grads_with_norm_(0.5, given)
        optimizer.step()
        optimizer.step()  # without
    clip_grad_norm_(expected_params, 0.5)
    expected = torch.optim.SGD(expected_params, lr=0.1)
    expected.step()
    set_gradients(expected_params, 0)
    expected.step()
    for p, q in zip(params, expected_params, strict=True):
        assert_within(p.detach(), q.detach())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("scaler_of", [torch.amp, fusedopt], ids=["torch", "fusedopt"])
def test_a_factor_of_gradients_that_are_gone_serves_no_step(
    scaler_of: Any, bad: float, set_to_none: bool
) -> None:
    """A scaler that skips does not call step(), and the model's zero_grad() tells nobody."""

    def trained(module: Any, clip: Clip) -> Tensor:
        model = torch.nn.Linear(3, 1, bias=False).double()
        torch.nn.init.constant_(model.weight, 0.5)
        optimizer = module.SGD(model.parameters(), lr=0.1)
        scaler = scaler_of.GradScaler("cpu", init_scale=4.0)
        for factor in (1.0, bad, 2.0, 3.0):
            loss = model(torch.full((2, 3), 1.0, dtype=torch.float64)).square().sum() * factor
            torch.autograd.backward(scaler.scale(loss))
            scaler.unscale_(optimizer)
            clip(optimizer)
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none)
        return model.weight.detach()

    expected = trained(torch.optim, lambda opt: clip_grad_norm_(all_params(opt), 0.5))
    assert_within(trained(fusedopt, lambda opt: opt.clip_grad_norm_(0.5)), expected)


def test_a_first_group_without_parameters() -> None:
    (p,) = parameters([(5,)])
    set_gradients([p], 0)
    groups: list[dict[str, list[Any]]] = [{"params": []}, {"params": [p]}]
    optimizer = fusedopt.SGD(groups, lr=0.1, max_grad_norm=0.5)
    norm = optimizer.clip_grad_norm_(0.5)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert_same_bits(optimizer.grad_norm, norm)


class Wrapper:
    """What Lightning puts around an optimizer: an object of its class that has nothing of it."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def step(self) -> None:
        self._optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@pytest.mark.parametrize(
    "clip",
    [lambda opt: opt.clip_grad_norm_(0.5), lambda opt: opt.clip_grads_with_norm_(0.5, 2.0)],
    ids=["clip_grad_norm_", "clip_grads_with_norm_"],
)
def test_a_wrapper_that_takes_on_the_class(clip: Clip) -> None:
    def trained(wrap: Callable[[Any], Any]) -> Any:
        params = parameters()
        optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=100.0, skip_nonfinite=True)
        wrapped = wrap(optimizer)
        assert isinstance(wrapped, fusedopt.SGD)
        for step in range(3):
            set_gradients(params, step)
            clip(wrapped)
            if step == 1:
                wrapped.zero_grad()
                set_gradients(params, step)
            wrapped.step()
        params[0].grad = torch.full_like(params[0], math.nan)
        wrapped.step()
        assert wrapped.skipped_steps == 1
        assert wrapped.max_grad_norm == 100.0
        assert wrapped.skip_nonfinite
        assert wrapped.grad_norm is not None
        assert math.isnan(wrapped.grad_norm)
        return optimizer

    assert_same_state(trained(Wrapper), trained(lambda opt: opt), assert_same_bits)
