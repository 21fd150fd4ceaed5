"""The method step, and what it reads anew each time."""

from __future__ import annotations

import functools
import inspect
import logging
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import flop_counter  # noqa: F401  (says at its import that there is no triton)

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_config,
    each_optimizer,
    oracle,
    parameters,
    squares,
    train,
    values,
)
from tests.registry import Config


@pytest.mark.parametrize("keyword", [False, True])
@each_optimizer
def test_closure(config: Config, keyword: bool) -> None:
    """Called with gradients enabled, before they are read; its value comes back unchanged."""
    (p,), (expected,) = parameters([(4,)]), parameters([(4,)])
    returned = object()

    def closure() -> Any:
        assert torch.is_grad_enabled()
        p.grad = expected.grad
        return returned

    expected.grad = values((4,), 1)
    config.cls([expected], **config.kwargs).step()
    optimizer = config.cls([p], **config.kwargs)
    with torch.no_grad():
        result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert result is returned
    assert_same_bits(p.detach(), expected.detach())


@each_optimizer
def test_step_takes_a_closure_and_no_grad_scaler(config: Config) -> None:
    optimizer = config.cls(parameters(), **config.kwargs)
    assert list(inspect.signature(optimizer.step).parameters) == ["closure"]


@each_optimizer
def test_step_is_a_method_that_may_be_patched(config: Config) -> None:
    params = parameters()
    optimizer = config.cls(params, **config.kwargs)
    assert isinstance(optimizer.step, types.MethodType)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)  # patches it too
    original, calls = optimizer.step, []

    @functools.wraps(original)
    def patched(*args: Any) -> Any:  # as accelerate does
        calls.append(args)
        return original(*args)

    optimizer.step = patched
    train(optimizer, params, 1)
    scheduler.step()  # warns if it has not seen the optimizer step
    assert calls == [()]
    assert all(p in optimizer.state for p in params)


@pytest.mark.parametrize(
    "config",
    [
        Config("SGD", {"lr": 0.1, "momentum": 0.9}),
        Config("Adam", {}),
        Config("AdamW", {}),
        Config("RMSprop", {"momentum": 0.9}),
        Config("RAdam", {}),
        Config("Lion", {}),
    ],
    ids=str,
)
def test_hyper_parameters_are_read_every_step(config: Config) -> None:
    """OneCycleLR moves lr, and momentum or the first beta, at every step."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        params = parameters()
        optimizer = make(params, **config.kwargs)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
        for step in range(7):
            train(optimizer, params, range(step, step + 1))
            scheduler.step()
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


@pytest.mark.parametrize(
    "lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, requires_grad=True)], ids=str
)
@each_optimizer
def test_a_tensor_lr_is_read_when_it_has_changed_in_place(config: Config, lr: Tensor) -> None:
    kwargs = {key: value for key, value in config.kwargs.items() if key != "lr"}
    lr = lr.detach().clone().requires_grad_(lr.requires_grad)
    params, plain_params = parameters(), parameters()
    optimizer = config.cls(params, lr=lr, **kwargs)
    expected = oracle(config)(plain_params, lr=0.1, **kwargs)
    for step, changed in enumerate((0.1, 0.5, 0.0, 0.25)):
        with torch.no_grad():
            lr.fill_(changed)
        expected.param_groups[0]["lr"] = lr.item()
        train(optimizer, params, range(step, step + 1))
        train(expected, plain_params, range(step, step + 1))
    assert optimizer.param_groups[0]["lr"] is lr
    assert_same_state(optimizer, expected, assert_within)


@each_config
def test_lr_0_creates_state_and_moves_nothing(config: Config) -> None:
    params, before, moving = parameters(), parameters(), parameters()
    optimizer = config.cls(params, **{**config.kwargs, "lr": 0})
    train(optimizer, params, 1)
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q.detach())
    other = config.cls(moving, **config.kwargs)
    train(other, moving, 1)
    for p, q in zip(params, moving, strict=True):
        assert set(optimizer.state.get(p, {})) == set(other.state.get(q, {}))
        for key, value in other.state.get(q, {}).items():
            assert_same_bits(optimizer.state[p][key], value)


def test_a_compiled_training_step_is_right_and_silent() -> None:
    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    log = Log(logging.WARNING)
    x = values((5, 3), 1)

    def trained(compiled: bool) -> nn.Linear:
        model = nn.Linear(3, 2, dtype=torch.float64)
        nn.init.constant_(model.weight, 0.5)
        nn.init.constant_(model.bias, 0.5)
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.1)

        def train_step(x: Tensor) -> None:
            optimizer.zero_grad()
            torch.autograd.backward(model(x).square().sum())
            optimizer.step()

        step = torch.compile(train_step, backend="eager") if compiled else train_step
        for _ in range(3):
            step(x)
        return model

    expected = trained(compiled=False)
    loggers = [logging.getLogger(name) for name in ("torch", "torch._dynamo")]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(log)
        actual = trained(compiled=True)
        for logger in loggers:
            logger.removeHandler(log)
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
    assert [str(warning.message) for warning in warned] == []
    assert messages == []


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_grad_scaler_behaves_as_with_torch(name: str, fused: bool | None, unscale: bool) -> None:
    """It unscales and skips by itself, whatever ``fused`` is."""

    def trained(cls: Callable[..., Optimizer], **kwargs: Any) -> tuple[Optimizer, float]:
        params = parameters([(5,), (3, 4)])
        optimizer = cls(params, lr=0.1, **kwargs)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for factor in (1.0, torch.inf, 2.0, torch.nan, 3.0, 1.0):
            optimizer.zero_grad()
            torch.autograd.backward(scaler.scale(squares(params, factor)))
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return optimizer, scaler.get_scale()

    actual, scale = trained(getattr(fusedopt, name), fused=fused)
    expected, expected_scale = trained(getattr(torch.optim, name), foreach=False)
    assert scale == expected_scale
    assert_same_state(actual, expected, assert_within)
