"""What a graph may capture of a step, and what would be another step at each replay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import _memory
from tests.helpers import assert_same_bits, parameters, set_gradients, train
from tests.registry import PLAIN_CONFIGS, Config

KEEP_STATES: list[Config] = [c for c in PLAIN_CONFIGS if c.name not in ("Adagrad", "Lookahead")]


def capturable(config: Config, params: list[torch.nn.Parameter]) -> Any:
    optimizer = config.cls(params, **config.kwargs)
    if "capturable" in optimizer.defaults:
        for group in optimizer.param_groups:
            group["capturable"] = True
    return optimizer


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes all later steps those of a graph that is captured."""
    return lambda: monkeypatch.setattr(_memory, "is_capturing", lambda _: True)


@pytest.mark.parametrize("config", KEEP_STATES, ids=str)
def test_a_first_step_is_not_captured(config: Config, capture: Callable[[], None]) -> None:
    """Each replay would make its states anew."""
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = capturable(config, params)
    rule = optimizer._rule(optimizer.param_groups[0])
    before = [p.detach().clone() for p in params]
    if rule.states or rule.counts_steps:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_memory, "is_capturing", lambda _: True)
            with pytest.raises(RuntimeError, match=r"first step of params\[0\].*take one step"):
                train(optimizer, params, 1)
        assert not optimizer.state
        for p, q in zip(params, before, strict=True):
            assert_same_bits(p.detach(), q)
        train(optimizer, params, 1)
    capture()
    train(optimizer, params, range(1, 3))
    assert all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_late_gradient_is_not_captured(capture: Callable[[], None]) -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = fusedopt.Lion(params)
    train(optimizer, params[:1], 1)
    capture()
    with pytest.raises(RuntimeError, match=r"first step of params\[1\]"):
        train(optimizer, params, range(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_counts_of_another_dtype_become_float32_on_their_device(
    dtype: torch.dtype, capture: Callable[[], None]
) -> None:
    """Torch makes them so where float64 is the default dtype. Nobody waits for them."""
    params, others = (parameters([(5,), (3, 4)], torch.float32) for _ in range(2))
    actual = fusedopt.AdamW(params, capturable=True)
    expected = fusedopt.AdamW(others, capturable=True)
    train(actual, params, 2)
    train(expected, others, 3)
    for p in params:
        actual.state[p]["step"] = actual.state[p]["step"].to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_memory, "is_capturing", lambda _: True)
        with pytest.raises(RuntimeError, match=r"not yet a float32.*take one step"):
            train(actual, params, range(2, 3))
    train(actual, params, range(2, 3))
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert actual.state[p]["step"].dtype == torch.float32
        assert float(actual.state[p]["step"]) == 3
    capture()
    train(actual, params, range(3, 4))


@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.RAdam, fusedopt.Lion])
def test_hyper_parameters_that_are_waited_for_are_not_captured(
    cls: Any, capture: Callable[[], None]
) -> None:
    params, others = (parameters([(5,)], torch.float32) for _ in range(2))
    options: dict[str, Any] = {} if cls is fusedopt.Lion else {"capturable": True}
    optimizer, plain = cls(params, lr=0.1, **options), cls(others, lr=0.1, **options)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    optimizer.param_groups[0]["betas"] = (torch.tensor(beta1, dtype=torch.float64), beta2)
    train(optimizer, params, 2)
    train(plain, others, 2)
    before = params[0].detach().clone()
    assert_same_bits(before, others[0].detach())
    capture()
    set_gradients(params, 2)
    with pytest.raises(RuntimeError, match=r"waits for a number on .*; pass a number"):
        optimizer.step()
    assert_same_bits(params[0].detach(), before)


def test_the_stream_of_the_tensors_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch asks that of the current device, whose stream may be another one."""
    current = [0]

    @contextmanager
    def on(device: int) -> Any:
        before, current[0] = current[0], device
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert [_memory.is_capturing(device) for device in (-1, 0, 1, 2)] == [False, False, True, False]
    assert current == [0]
