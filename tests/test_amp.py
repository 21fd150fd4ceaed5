"""Gradient scaling: torch's scaler with and without the optimizer's help, and fusedopt's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import fusedopt
from tests.helpers import (
    all_params,
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_optimizer,
    oracle,
    parameters,
    set_gradients,
    squares,
    train,
)
from tests.registry import Config

SHAPES: list[tuple[int, ...]] = [(5,), (3, 4), (70_000,)]
FACTORS = (1.0, math.inf, 2.0, math.nan, 3.0, 1.0, 0.5, 1.0)

Scaler = Callable[..., torch.amp.GradScaler]
SCALERS: dict[str, Scaler] = {"torch": torch.amp.GradScaler, "fusedopt": fusedopt.GradScaler}
each_scaler = pytest.mark.parametrize("make_scaler", SCALERS.values(), ids=SCALERS)


def scaled_training(
    make: Callable[..., Optimizer],
    make_scaler: Scaler,
    *,
    clip: Callable[[Any], object] | None = None,
    **kwargs: Any,
) -> tuple[Optimizer, list[float]]:
    """Train with a loss that overflows now and then; return the scale after every step.

    The scales are powers of two: to unscale is exact. `clip` is called between unscaling and step.
    """
    params = parameters(SHAPES)
    optimizer = make(params, **kwargs)
    scaler = make_scaler("cpu", init_scale=8.0, growth_interval=2)
    scales = []
    for factor in FACTORS:
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(squares(params, factor)))
        if clip:
            scaler.unscale_(optimizer)
            clip(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return optimizer, scales


@pytest.mark.parametrize("amp_scaling", [False, True])
@each_scaler
@each_optimizer
def test_every_scaler_is_torchs_scaler_and_a_step(
    config: Config, make_scaler: Scaler, amp_scaling: bool
) -> None:
    expected, expected_scales = scaled_training(
        oracle(config), torch.amp.GradScaler, **config.kwargs
    )
    actual, scales = scaled_training(
        config.cls, make_scaler, amp_scaling=amp_scaling, **config.kwargs
    )
    assert scales == expected_scales
    assert len(set(scales)) > 2
    assert_same_state(actual, expected, assert_within)


@pytest.mark.parametrize("amp_scaling", [False, True])
@each_scaler
@each_optimizer
def test_clipping_sees_the_unscaled_gradients(
    config: Config, make_scaler: Scaler, amp_scaling: bool
) -> None:
    expected, expected_scales = scaled_training(
        oracle(config),
        torch.amp.GradScaler,
        clip=lambda opt: torch.nn.utils.clip_grad_norm_(all_params(opt), 0.5),
        **config.kwargs,
    )
    kwargs = {**config.kwargs, "amp_scaling": amp_scaling}
    inside, scales = scaled_training(config.cls, make_scaler, max_grad_norm=0.5, **kwargs)
    assert scales == expected_scales
    assert_same_state(inside, expected, assert_within)
    between, scales = scaled_training(
        config.cls, make_scaler, clip=lambda opt: opt.clip_grad_norm_(0.5), **kwargs
    )
    assert scales == expected_scales
    assert_same_state(between, expected, assert_within)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@each_optimizer
def test_the_fused_scaler_has_the_bits_of_unscaled_gradients(
    config: Config, max_norm: float | None
) -> None:
    """To multiply a float32 by a power of two is exact, whoever does it."""

    def trained(scale: float) -> tuple[Optimizer, list[float]]:
        params = parameters(SHAPES, torch.float32)
        optimizer = config.cls(params, max_grad_norm=max_norm, **config.kwargs)
        scaler = fusedopt.GradScaler("cpu", init_scale=scale, growth_interval=100)
        norms = []
        for step in range(3):
            set_gradients(params, step)
            for p in params:
                assert p.grad is not None
                p.grad *= scale
            kept = [p.grad.clone() for p in params if p.grad is not None]
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
            for p, before in zip(params, kept, strict=True):
                assert p.grad is not None
                assert_same_bits(p.grad, before)
            norms.append(math.nan if optimizer.grad_norm is None else optimizer.grad_norm.item())
        return optimizer, norms

    (scaled, norms), (plain, plain_norms) = trained(2.0**10), trained(1.0)
    assert_same_state(scaled, plain, assert_same_bits)
    assert str(norms) == str(plain_norms)


@pytest.mark.parametrize("found_inf", [1.0, 2.0, -1.0, math.nan])
@each_optimizer
def test_any_nonzero_found_inf_skips(config: Config, found_inf: float) -> None:
    params, clean_params = parameters(), parameters()
    optimizer = config.cls(params, amp_scaling=True, **config.kwargs)
    clean = config.cls(clean_params, **config.kwargs)
    set_gradients(params, 0)
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()
    assert not any(optimizer.state[p].get("step", 0) for p in optimizer.state)
    assert optimizer.skipped_steps == 1
    for p, q in zip(params, clean_params, strict=True):
        assert_same_bits(p.detach(), q.detach())
    optimizer.found_inf = torch.tensor([0.0])
    train(optimizer, params, 2)
    train(clean, clean_params, 2)
    assert_same_state(optimizer, clean, assert_same_bits)


@pytest.mark.parametrize("scale", [None, 4.0, torch.tensor(4.0), torch.tensor([4.0])], ids=str)
@each_optimizer
def test_grad_scale_divides(config: Config, scale: Any) -> None:
    params, plain_params = parameters(), parameters()
    optimizer = config.cls(params, max_grad_norm=0.5, **config.kwargs)
    plain = config.cls(plain_params, max_grad_norm=0.5, **config.kwargs)
    optimizer.grad_scale = scale
    for step in range(2):
        set_gradients(params, step)
        set_gradients(plain_params, step)
        for p in params:
            assert p.grad is not None
            p.grad *= 1.0 if scale is None else 4.0
        optimizer.step()
        plain.step()
    assert_same_state(optimizer, plain, assert_same_bits)
    assert_same_bits(optimizer.grad_norm, plain.grad_norm)


def test_a_skip_by_the_scaler_tells_the_norm() -> None:
    (p,) = parameters([(3,)])
    optimizer = fusedopt.SGD([p], lr=0.1, max_grad_norm=1.0, amp_scaling=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    torch.autograd.backward(scaler.scale(squares([p], math.inf)))
    optimizer.clip_grads_with_norm_(1.0, 2.0)
    scaler.step(optimizer)
    assert optimizer.grad_norm is not None
    assert not optimizer.grad_norm.isfinite()
    assert optimizer._pending.norm is None  # it has served its step


def test_amp_scaling_is_off_unless_asked_for() -> None:
    for fused in (None, True):
        optimizer: Any = fusedopt.Adam(parameters(), fused=fused)
        assert not optimizer._step_supports_amp_scaling
    optimizer = fusedopt.Adam(parameters(), amp_scaling=True)
    assert optimizer._step_supports_amp_scaling


# ---- fusedopt.GradScaler -------------------------------------------------------------------------


def test_it_does_not_write_gradients_nor_read_them_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pass(*_: Any) -> None:
        raise AssertionError("torch's own pass")

    (p,) = parameters([(3,)])
    optimizer = fusedopt.SGD([p], lr=0.1)
    scaler = fusedopt.GradScaler("cpu", init_scale=4.0)
    torch.autograd.backward(scaler.scale(squares([p], 1.0)))
    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", no_pass)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.grad_norm is None  # nobody has asked for it


def test_errors_are_torchs() -> None:
    (p,) = parameters([(3,)])
    optimizer = fusedopt.SGD([p], lr=0.1)
    for make_scaler in SCALERS.values():
        scaler = make_scaler("cpu")
        torch.autograd.backward(scaler.scale(squares([p], 1.0)))
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(optimizer, closure=lambda: 0.0)
        scaler.step(optimizer)
        with pytest.raises(RuntimeError, match="has already been called since the last update"):
            scaler.step(optimizer)
        with pytest.raises(RuntimeError, match="being called after step"):
            scaler.unscale_(optimizer)
        scaler.update()
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="already been called on this optimizer"):
            scaler.unscale_(optimizer)


def test_an_error_in_the_step_is_not_a_step() -> None:
    (p,) = parameters([(3,)])
    optimizer = fusedopt.SGD([p], lr=0.1)
    scaler = fusedopt.GradScaler("cpu")
    torch.autograd.backward(scaler.scale(squares([p], 1.0)))
    kept, p.data = p.data, torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="has shape"):
        scaler.step(optimizer)
    p.data = kept
    before = p.detach().clone()
    assert not optimizer._step_supports_amp_scaling
    scaler.step(optimizer)
    scaler.update()
    assert_within(p.detach(), before - 0.1 * 2 * before)


@pytest.mark.filterwarnings("ignore:fusedopt")
@each_scaler
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "AdamW"])
def test_parameters_without_a_kernel(name: str, make_scaler: Scaler) -> None:
    """Torch's own step refuses a scale where it has no fused kernel: it must not see it."""

    def trained(module: Any, **kwargs: Any) -> Optimizer:
        params = parameters([(4,), (3,)])
        x = params[0].detach()
        params[0].data = torch.complex(x, -x).conj().imag  # which torch has yet to negate
        optimizer: Optimizer = getattr(module, name)(params, lr=0.1, **kwargs)
        scaler = make_scaler("cpu", init_scale=4.0)
        for factor in (1.0, math.inf, 2.0):
            optimizer.zero_grad()
            torch.autograd.backward(scaler.scale(squares(params, factor)))
            scaler.step(optimizer)
            scaler.update()
        return optimizer

    for amp_scaling in (False, True):
        actual = trained(fusedopt, amp_scaling=amp_scaling)
        assert_same_state(actual, trained(torch.optim), assert_within)


def test_disabled_and_with_other_optimizers_it_is_torchs() -> None:
    for enabled in (False, True):
        params, expected_params = parameters(SHAPES), parameters(SHAPES)
        optimizer: Optimizer = fusedopt.SGD(params, lr=0.1)
        if enabled:
            optimizer = torch.optim.SGD(params, lr=0.1)
        expected = torch.optim.SGD(expected_params, lr=0.1, foreach=False)
        scaler = fusedopt.GradScaler("cpu", init_scale=4.0, enabled=enabled)
        torch.autograd.backward(scaler.scale(squares(params, 1.0)))
        torch.autograd.backward(squares(expected_params, 1.0))
        scaler.step(optimizer)
        scaler.update()
        expected.step()
        assert_same_state(optimizer, expected, assert_within)


def test_its_state_is_torchs() -> None:
    scaler = fusedopt.GradScaler("cpu", init_scale=4.0, growth_factor=3.0)
    torchs = torch.amp.GradScaler("cpu")
    torchs.load_state_dict(scaler.state_dict())
    assert torchs.state_dict() == scaler.state_dict()


def test_two_optimizers_with_one_scaler() -> None:
    """One overflows, the other steps; the scale backs off, as torch's does."""

    def trained(make: Callable[..., Optimizer], make_scaler: Scaler) -> tuple[list[Any], float]:
        pairs = [parameters([(3,)]), parameters([(4,)])]
        optimizers = [make(params, lr=0.1) for params in pairs]
        scaler = make_scaler("cpu", init_scale=8.0)
        for factor, params in zip((math.inf, 1.0), pairs, strict=True):
            torch.autograd.backward(scaler.scale(squares(params, factor)))
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        return [p.detach() for params in pairs for p in params], scaler.get_scale()

    expected, expected_scale = trained(torch.optim.SGD, torch.amp.GradScaler)
    actual, scale = trained(fusedopt.SGD, fusedopt.GradScaler)
    assert scale == expected_scale
    for p, q in zip(actual, expected, strict=True):
        assert_within(p, q)
