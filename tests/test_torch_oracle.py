"""Against torch's own implementation, in float64, where a wrong formula cannot hide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    get_error_inputs_for_all_optims,
    optim_db,
)

import fusedopt
from tests.helpers import (
    SHAPES,
    assert_same_state,
    assert_within,
    each_config,
    oracle,
    parameters,
    values,
)
from tests.registry import CONFIGS, Config

STEPS = 9  # the late parameter's seventh step is one that RAdam rectifies

MATRICES = {"Muon"}  # takes no other shapes: tests/muon
COVERED = [info for info in optim_db if hasattr(fusedopt, info.name) and info.name not in MATRICES]

OPTIM_DB = [
    Config(info.name, case.kwargs)
    for info in COVERED
    for case in info.optim_inputs_func("cpu", torch.float64)
]

ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name, error_inputs in [
        *((info.name, info.optim_error_inputs_func) for info in COVERED),
        ("Lion", get_error_inputs_for_all_optims),
    ]
    for error in error_inputs("cpu", torch.float64)
]

# What a second group does differently, so that one step runs several variants of a rule.
OTHER_GROUP: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.3, "maximize": True},
    "Adam": {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True, "maximize": True},
    "AdamW": {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0, "amsgrad": True},
    "RMSprop": {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 0.02, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.3, "maximize": True},
    "RAdam": {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3, "maximize": True},
    "Lion": {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.3, "maximize": True},
}


def test_optim_db_has_every_optimizer_that_torch_has() -> None:
    """Or the tests below would pass by having no case."""
    covered = {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "RAdam"}
    assert {config.name for config in OPTIM_DB} == covered
    assert len(OPTIM_DB) >= 40


def trained(make: Any, groups: list[dict[str, Any]], kwargs: dict[str, Any]) -> Optimizer:
    """Step an optimizer whose first parameter misses a gradient and whose last gets it late."""
    optimizer: Optimizer = make(groups, **kwargs)
    params = [p for group in groups for p in group["params"]]
    for step in range(STEPS):
        for i, p in enumerate(params):
            absent = (p is params[0] and step == 3) or (p is params[-1] and step < 2)
            p.grad = None if absent else values(tuple(p.shape), 100 * (step + 1) + i)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("config", OPTIM_DB + CONFIGS, ids=str)
def test_float64_equals_torch(config: Config) -> None:
    def groups() -> list[dict[str, Any]]:
        params = parameters()
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "weight_decay": 0.05}]

    actual = trained(config.cls, groups(), config.kwargs)
    assert_same_state(actual, trained(oracle(config), groups(), config.kwargs), assert_within)


@pytest.mark.parametrize("name", OTHER_GROUP)
def test_float64_equals_torch_with_options_of_each_group(name: str) -> None:
    def groups() -> list[dict[str, Any]]:
        params = parameters(SHAPES * 2)
        return [
            {"params": params[:3]},
            {"params": params[3:7], **OTHER_GROUP[name]},
            {"params": params[7:], "lr": 0.3},
        ]

    config = Config(name, {})
    assert_same_state(
        trained(config.cls, groups(), {}), trained(oracle(config), groups(), {}), assert_within
    )


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_errors_are_torchs(name: str, error: ErrorOptimizerInput) -> None:
    """Torch's own list of wrong arguments: the same exception with the same words."""
    given = error.optimizer_error_input
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    with pytest.raises(error.error_type, match=error.error_regex):  # pytest raises warnings too
        getattr(fusedopt, name)(given.params, **given.kwargs)


# ---- float32 -------------------------------------------------------------------------------------


@each_config
def test_float32_errs_by_its_own_rounding_alone(config: Config) -> None:
    r"""Float32 from float64, element by element.

    The model. With u = 2^-24, every operation and every scalar rounded to float32 multiplies its
    result by 1 + d, \|d\| <= u. An element's gradients keep one sign, so that sums do not cancel
    and relative errors add up instead of being amplified. In one step, the part of a state that
    came from an earlier step is multiplied by a rounded scalar and added to: 3 u for each of T
    steps, 4.5 u where two states meet, as one square root of a sum of squares does. Making the
    states' new parts and an update of them takes fewer than 16 roundings more, scalars included,
    in every rule. The parameter itself meets 3: the scalar of its decay, the product, the
    subtraction. So after T steps, with D the sum of all updates' sizes and P the largest \|p\|,

        error <= u * (3 T P + (4.5 T + 16) D) * 2,

    where 2 covers what is left of cancellation: g + weight_decay * p, and the variance of centered
    RMSprop, v - mean^2, whose condition (v + mean^2) / (v - mean^2) is below 2.4 here and halved by
    the square root; and products of the d.
    """
    steps, shape = 7, (1000,)
    sign = torch.sign(values(shape, 0))

    def gradient(step: int) -> Tensor:
        return (sign * (1 + values(shape, 1 + step).abs().clamp(max=1))).float()

    start = values(shape, 99, torch.float32).clamp(-1, 1)
    p, exact = Parameter(start.clone()), Parameter(start.double())
    optimizer = config.cls([p], **config.kwargs)
    exact_optimizer = oracle(config)([exact], **config.kwargs)
    largest, moved = exact.detach().abs(), torch.zeros_like(exact.detach())
    for step in range(steps):
        before = exact.detach().clone()
        p.grad, exact.grad = gradient(step), gradient(step).double()
        optimizer.step()
        exact_optimizer.step()
        largest = torch.maximum(largest, exact.detach().abs())
        moved += (exact.detach() - before).abs()
    u = 2.0**-24
    bound = u * (3 * steps * largest + (4.5 * steps + 16) * moved) * 2
    error = (p.detach().double() - exact.detach()).abs()
    worst = int((error / bound).argmax())
    assert (error <= bound).all(), f"{error[worst]} > {bound[worst]} at {worst}"
