"""An infinite max_norm clips nothing, and an error for infinite norms means the norm returned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import clip
from tests.helpers import assert_same_bits, each_optimizer, parameters, set_gradients
from tests.registry import Config

each_special = pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])


def stepped(config: Config, special: float, how: str) -> list[Parameter]:
    params = parameters([(5,), (3, 4)], torch.float32)
    options: dict[str, Any] = {"max_grad_norm": math.inf} if how == "max_grad_norm" else {}
    optimizer = config.cls(params, **config.kwargs, **options)
    for step in range(3):
        set_gradients(params, step)
        assert params[0].grad is not None
        params[0].grad[2] = special
        if how == "method":
            optimizer.clip_grad_norm_(math.inf)
        elif how == "given norm":
            optimizer.clip_grads_with_norm_(math.inf, special)
        elif how == "function":
            fusedopt.clip_grad_norm_(params, math.inf)
        optimizer.step()
    return params


@pytest.mark.parametrize("how", ["max_grad_norm", "method", "given norm", "function"])
@each_special
@each_optimizer
def test_finite_gradients_stay_beside_one_that_is_not(
    config: Config, special: float, how: str
) -> None:
    for p, q in zip(
        stepped(config, special, how), stepped(config, special, "not at all"), strict=True
    ):
        assert_same_bits(p.detach(), q.detach())
        assert p.isfinite().sum() >= p.numel() - 1


@each_special
def test_the_coefficient_of_a_device_says_the_same(special: float) -> None:
    norm = torch.tensor(special, dtype=torch.float64)
    assert clip.coefficient(norm, math.inf) == 1
    assert clip.coefficient(special, math.inf) == 1
    assert clip.reference_clip_coefficient(special, math.inf) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda p: fusedopt.get_total_norm([p.grad], error_if_nonfinite=True),
        lambda p: fusedopt.clip_grad_norm_([p], 1.0, error_if_nonfinite=True),
        lambda p: fusedopt.SGD([p], lr=1.0).clip_grad_norm_(1.0, error_if_nonfinite=True),
    ],
    ids=["get_total_norm", "clip_grad_norm_", "method"],
)
def test_a_norm_that_float32_does_not_hold_is_an_error(call: Any) -> None:
    """Torch's, too: its norm has the gradient's dtype."""
    p = Parameter(torch.ones(3))
    p.grad = torch.full((3,), 3e38)
    with pytest.raises(RuntimeError, match="non-finite"):
        call(p)
    assert (p.grad == 3e38).all()


def test_a_float64_norm_that_float32_does_not_hold() -> None:
    """The functions return it in float64, as torch does; the method, in float32, refuses it."""
    p = Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.full((3,), 1e100, dtype=torch.float64)
    optimizer = fusedopt.SGD([p], lr=1.0)
    with pytest.raises(RuntimeError, match="clip_grads_with_norm_"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    optimizer.clip_grads_with_norm_(1.0, fusedopt.get_total_norm([p.grad], 2.0, True))
    optimizer.step()
    assert (1 - p).norm().item() == pytest.approx(1.0)
    torch_p = Parameter(torch.ones(3, dtype=torch.float64))
    torch_p.grad = p.grad.clone()
    torch.nn.utils.clip_grad_norm_([torch_p], 1.0, error_if_nonfinite=True)
    fusedopt.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    torch.testing.assert_close(p.grad, torch_p.grad, rtol=1e-9, atol=0)
