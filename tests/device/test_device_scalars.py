"""Scalars that the device folds, from a learning rate or a count that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import fusedopt
from fusedopt import _memory
from tests.device.common import never_waiting
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    parameters,
    set_gradients,
    train,
)
from tests.registry import CONFIGS, Config

COUNTING = [config for config in CONFIGS if config.torch_cls and config.name != "SGD"]
CAPTURABLE = [config for config in COUNTING if "capturable" in config.cls([torch.ones(1)]).defaults]


def assert_close_as_rounded(actual: Tensor, expected: Tensor) -> None:
    """Compare after a few steps whose scalars may differ by a unit of their last digit."""
    unit = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=16 * unit, atol=16 * unit)


def with_lr_on_device(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)


@pytest.mark.parametrize("config", CAPTURABLE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_capturable_steps_have_the_bits_of_others(
    config: Config, dtype: torch.dtype, device: str
) -> None:
    """fold() of each rule is _scalars() of its class; a late parameter has another count."""

    def trained(**options: Any) -> tuple[Optimizer, list[Any]]:
        params = parameters([(5,), (3, 4), (7,)], dtype)
        optimizer = config.cls(params, **{**config.kwargs, **options})
        train(optimizer, params[:2], 3)
        train(optimizer, params, range(3, 9))
        steps = [optimizer.state[p].pop("step") for p in params]
        return optimizer, steps

    (expected, counts), (actual, device_counts) = trained(), trained(capturable=True)
    # (A GPU's pow may differ from the CPU's in its last digit.)
    check = assert_same_bits if device == "emulated" else assert_close_as_rounded
    assert_same_state(actual, expected, check)
    assert [float(x) for x in device_counts] == [float(x) for x in counts] == [9, 9, 6]
    assert all(x.device == actual.param_groups[0]["params"][0].device for x in device_counts)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_learning_rate_on_the_device_gives_the_same_bits(config: Config) -> None:
    def trained(prepare: Callable[[Optimizer], None]) -> Optimizer:
        params = parameters([(5,), (3, 4)], torch.float32)
        optimizer = config.cls(params, **config.kwargs)
        prepare(optimizer)
        train(optimizer, params, 3)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5  # a tensor: in place
        train(optimizer, params, range(3, 8))
        return optimizer

    expected = trained(lambda _: None)
    assert_same_state(trained(with_lr_on_device), expected, assert_same_bits)


def test_a_learning_rate_is_read_when_the_device_gets_there() -> None:
    """Not by the CPU, which would have to wait."""
    params = parameters([(5,)], torch.float32)
    lr = torch.tensor(0.1)
    optimizer = fusedopt.Lion(params, lr=lr)
    set_gradients(params, 0)
    with never_waiting():
        optimizer.step()
    lr.fill_(0.0)
    before = params[0].detach().clone()
    train(optimizer, params, 1)
    assert_same_bits(params[0].detach(), before)


def test_a_step_that_the_cpu_counts_is_not_captured(capturing: None) -> None:
    """It would be the same one at each replay."""
    params = parameters([(5,)], torch.float32)
    set_gradients(params, 0)
    before = params[0].detach().clone()
    with torch.device("cpu"):  # or torch makes Adagrad's count on a default device
        adagrad = fusedopt.Adagrad(params)
    for optimizer in (fusedopt.AdamW(params), adagrad):
        with pytest.raises(RuntimeError, match=r"step of params\[0\].*pass capturable=True"):
            optimizer.step()
    lookahead = fusedopt.Lookahead(fusedopt.SGD(params, lr=0.1))
    with pytest.raises(RuntimeError, match="capture the wrapped optimizer's"):
        lookahead.step()
    assert_same_bits(params[0].detach(), before)


def test_counts_that_become_capturable_move_before_the_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["capturable"] = True
    train(optimizer, params, range(1, 2))
    monkeypatch.setattr(_memory, "is_capturing", lambda _: True)
    train(optimizer, params, range(2, 3))
    assert float(optimizer.state[params[0]]["step"]) == 3
