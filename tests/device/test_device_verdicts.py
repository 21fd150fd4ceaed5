"""Verdicts on the gradients that nobody waits for."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import _core, clip
from tests.device.common import never_waiting
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    parameters,
    set_gradients,
    train,
    values,
)
from tests.registry import CONFIGS, PLAIN_CONFIGS, Config

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "skipping": {"skip_nonfinite": True},
    "both": {"max_grad_norm": 0.5, "skip_nonfinite": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_step_never_waits(config: Config, options: dict[str, Any]) -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = config.cls(params, **config.kwargs, **options)
    starts_unlike = config.kwargs.get("dampening") and "skip_nonfinite" in options
    for step in range(3):
        set_gradients(params, step)
        if starts_unlike and step == 0:  # that verdict is waited for
            optimizer.step()
            continue
        with never_waiting():
            optimizer.step()
    assert optimizer.grad_norm is None if not options else optimizer.grad_norm.dim() == 0


def test_pending_clips_never_wait() -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = fusedopt.AdamW(params, skip_nonfinite=True)
    set_gradients(params, 0)
    with never_waiting():
        norm = optimizer.clip_grad_norm_(0.5)
        optimizer.clip_grads_with_norm_(0.25, norm)
        optimizer.step()
        fusedopt.clip_grad_norm_(params, 0.1)


@pytest.mark.parametrize("special", [math.inf, math.nan])
@pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)
def test_a_skipped_step_changes_and_counts_nothing(config: Config, special: float) -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = config.cls(params, **config.kwargs, skip_nonfinite=True)
    clean_params = parameters([(5,), (3, 4)], torch.float32)
    clean = config.cls(clean_params, **config.kwargs)
    for step in range(5):
        set_gradients(params, step)
        if step in (0, 3):
            assert params[0].grad is not None
            params[0].grad[2] = special
            optimizer.step()
            assert optimizer.grad_norm is not None
            assert not optimizer.grad_norm.isfinite()
            continue
        optimizer.step()
        set_gradients(clean_params, step)
        clean.step()
    assert optimizer.skipped_steps == 2
    assert_same_state(optimizer, clean, lambda a, b: assert_same_bits(a.to(b.device), b))


def test_a_device_that_knows_of_infinities_skips_what_torch_steps() -> None:
    """Sparse gradients alone: the CPU makes the step, and has to wait for the verdict."""
    p = Parameter(torch.ones(4, 2))
    optimizer = fusedopt.SGD([p], lr=1.0, amp_scaling=True)
    p.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=True
    )
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]  # scalers do
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]  # scalers do
    optimizer.step()
    assert (p == 1).all()
    assert optimizer.skipped_steps == 1
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]  # scalers do
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer.step()
    assert (p[1] == 0.75).all()


def test_skipped_steps_are_added_up_in_place() -> None:
    """A graph repeats the addition, and has to find what it left."""
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.SGD(params, lr=0.1, skip_nonfinite=True)
    train(optimizer, params, 1)
    counter = optimizer._skipped_steps
    assert isinstance(counter, Tensor)
    params[0].grad = torch.full_like(params[0], math.nan)
    optimizer.step()
    assert optimizer._skipped_steps is counter
    assert optimizer.skipped_steps == 1


def test_coefficients_have_the_bits_of_the_cpus() -> None:
    norms = values((500,), 0).abs() * 3
    for norm in norms:
        actual = clip.coefficient(norm, 0.7)
        assert isinstance(actual, Tensor)
        assert float(actual) == _core.clip_coefficient(float(norm), 0.7)


def test_counts_move_to_the_device_when_it_may_skip() -> None:
    """And stay as they are."""
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.Adam(params)
    train(optimizer, params, 3)
    optimizer.skip_nonfinite = True
    train(optimizer, params, range(3, 5))
    step = optimizer.state[params[0]]["step"]
    assert (float(step), step.device) == (5.0, params[0].device)
    optimizer.skip_nonfinite = False
    train(optimizer, params, range(5, 6))
    assert float(optimizer.state[params[0]]["step"]) == 6.0

    plain_params = parameters([(5,)], torch.float32)
    plain = fusedopt.Adam(plain_params)
    train(plain, plain_params, 6)
    assert_same_bits(params[0].detach(), plain_params[0].detach())


def test_a_count_stays_where_it_is_if_the_step_fails() -> None:
    params = parameters([(5,), (3,)], torch.float32)
    optimizer = fusedopt.Adam(params)
    train(optimizer, params, 1)
    optimizer.skip_nonfinite = True
    step = optimizer.state[params[0]]["step"]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match="exp_avg of params"):
        train(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] is step


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_has_one_count_that_moves() -> None:
    (p,) = parameters([(5,)], torch.float32)
    optimizer = fusedopt.Adam([p, p])
    train(optimizer, [p], 2)
    optimizer.skip_nonfinite = True
    train(optimizer, [p], range(2, 4))
    assert float(optimizer.state[p]["step"]) == 8

    (q,) = parameters([(5,)], torch.float32)
    plain = fusedopt.Adam([q, q])
    train(plain, [q], 4)
    assert_same_bits(p.detach(), q.detach())


def test_the_first_step_of_dampened_momentum_waits_for_the_verdict() -> None:
    """A skipped one would leave a buffer of zeros, and the next step would not be a first one."""
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True)
    params[0].grad = torch.full_like(params[0], math.inf)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.skipped_steps == 1
    gradient = values((5,), 1, torch.float32)
    params[0].grad = gradient.clone()
    optimizer.step()
    assert_same_bits(optimizer.state[params[0]]["momentum_buffer"], gradient)


def test_counts_of_other_dtypes_are_named() -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.Adam(params, capturable=True)
    train(optimizer, params, 1)
    step = optimizer.state[params[0]]["step"]
    optimizer.state[params[0]]["step"] = step.half()
    before = params[0].detach().clone()
    with pytest.raises(TypeError, match=r"step of params\[0\] is .*float16.*expected a number, or"):
        train(optimizer, params, 1)
    assert_same_bits(params[0].detach(), before)
