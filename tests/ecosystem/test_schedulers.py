"""Every scheduler of torch drives every optimizer as it drives torch's; averaged models, too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from tests.ecosystem.common import OPTIMIZERS, batch, each_name, make_model, torchs, train
from tests.helpers import assert_within

STEPS = 8


def _sequential(optimizer: Any) -> Any:
    first = lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(
        optimizer, [first, lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[3]
    )


def _chained(optimizer: Any) -> Any:
    first = lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.ChainedScheduler(
        [first, lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer=optimizer
    )


def _cycles_momentum(optimizer: Any) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": _sequential,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "ChainedScheduler": _chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.001, 0.1, step_size_up=3, cycle_momentum=_cycles_momentum(o)
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=STEPS + 1, cycle_momentum=_cycles_momentum(o)
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_here() -> None:
    bases = {"LRScheduler", "_LRScheduler"}
    assert set(SCHEDULERS) - {"SWALR"} == {
        name
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and name not in bases
    }


def driven(optimizer: Any, model: nn.Module, scheduler: str) -> list[list[dict[str, Any]]]:
    """Train, and return the hyper-parameters of each step."""
    drive = SCHEDULERS[scheduler](optimizer)
    seen = []
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        drive.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        groups = [{**group} for group in optimizer.param_groups]
        for group in groups:
            del group["params"]
            group.pop("foreach", None)
        seen.append(groups)
    return seen


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_name
def test_it_drives_it_as_it_drives_torchs(name: str, scheduler: str) -> None:
    model, expected_model = make_model(), make_model()
    seen = driven(OPTIMIZERS[name](model.parameters()), model, scheduler)
    expected = driven(torchs(name, expected_model.parameters()), expected_model, scheduler)
    assert seen == expected
    if scheduler != "ConstantLR":
        assert any(step != seen[0] for step in seen)
    for p, q in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert_within(p.detach(), q.detach(), rtol=1e-9)


# ---- averages of models --------------------------------------------------------------------------


def averaged(optimizer: Any, model: Any, ema: bool) -> list[Tensor]:
    average: Any = swa_utils.get_ema_multi_avg_fn(0.9) if ema else None  # type: ignore[no-untyped-call]
    shadow = swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    anneal = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        shadow.update_parameters(model)
        anneal.step()
    swa_utils.update_bn([batch(0)], shadow)
    return [p.detach() for p in (*shadow.parameters(), *shadow.buffers())]


@pytest.mark.parametrize("ema", [False, True], ids=["swa", "ema"])
@each_name
def test_averages_of_its_models_are_those_of_torchs(name: str, ema: bool) -> None:
    model, expected_model = make_model(), make_model()
    for each in (model, expected_model):
        # Not behind a layer with a bias, whose gradient would be 0 but for rounding.
        each.insert(0, nn.BatchNorm1d(7, dtype=torch.float64))
    actual = averaged(OPTIMIZERS[name](model.parameters()), model, ema)
    expected = averaged(torchs(name, expected_model.parameters()), expected_model, ema)
    for a, b in zip(actual, expected, strict=True):
        assert_within(a, b, rtol=1e-9)
