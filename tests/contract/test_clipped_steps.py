"""Clipping inside the step is torch's, to the bits of the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedopt
from fusedopt import _engine
from fusedopt.clip import reference_clip_coefficient, reference_total_norm
from tests.helpers import (
    ENGINES,
    Clip,
    Make,
    all_params,
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_config,
    each_dtype,
    each_optimizer,
    oracle,
    parameters,
    set_gradients,
    train,
    values,
)
from tests.reference import reference_update, same_bits
from tests.registry import FILLED_SHAPES, MAX_NORMS, NORM_TYPES, Config

each_max_norm = pytest.mark.parametrize("max_norm", MAX_NORMS)


def as_arrays(tensors: list[Tensor]) -> list[Any]:
    return [x.to(torch.float64).numpy() for x in tensors]


def clipped_training(make: Make, clip: Clip, **kwargs: Any) -> Optimizer:
    """Two groups, a parameter that misses a gradient now and then, one that gets it late."""
    params = parameters(FILLED_SHAPES)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    optimizer = make(groups, **kwargs)
    for step in range(5):
        set_gradients(params, step)
        if step == 3:
            params[0].grad = None
        if step < 2:
            params[-1].grad = None
        clip(optimizer)
        optimizer.step()
    return optimizer


@each_max_norm
@each_optimizer
def test_max_grad_norm_is_torchs_clipping_and_a_step(config: Config, max_norm: float) -> None:
    norms, expected_norms = [], []
    expected = clipped_training(
        oracle(config),
        lambda opt: expected_norms.append(clip_grad_norm_(all_params(opt), max_norm).item()),
        **config.kwargs,
    )
    actual = clipped_training(
        lambda params, **kwargs: config.cls(params, max_grad_norm=max_norm, **kwargs),
        lambda opt: norms.append(opt.grad_norm),
        **config.kwargs,
    )
    assert_same_state(actual, expected, assert_within)
    assert norms[0] is None
    norms.append(actual.grad_norm)  # type: ignore[attr-defined]
    assert [norm.item() for norm in norms[1:]] == pytest.approx(expected_norms, rel=2.0**-23)


@each_config
def test_max_grad_norm_in_every_variant(config: Config) -> None:
    expected = clipped_training(
        oracle(config), lambda opt: clip_grad_norm_(all_params(opt), 0.7), **config.kwargs
    )
    actual = clipped_training(config.cls, lambda _: None, max_grad_norm=0.7, **config.kwargs)
    assert_same_state(actual, expected, assert_within)


@pytest.mark.parametrize("order", NORM_TYPES)
@each_max_norm
@each_optimizer
def test_the_method_is_torchs_clipping(config: Config, max_norm: float, order: float) -> None:
    expected = clipped_training(
        oracle(config),
        lambda opt: clip_grad_norm_(all_params(opt), max_norm, order),
        **config.kwargs,
    )
    actual = clipped_training(
        config.cls, lambda opt: opt.clip_grad_norm_(max_norm, order), **config.kwargs
    )
    assert_same_state(actual, expected, assert_within)


@each_dtype
@each_config
def test_a_clipped_step_has_the_bits_of_the_references(config: Config, dtype: torch.dtype) -> None:
    """The coefficient is a factor of the gradient, rounded once to compute precision."""
    params = parameters([(5,), (300, 40), (), (70_000,)], dtype)
    optimizer = config.cls(params, max_grad_norm=0.3, **config.kwargs)
    (group,) = optimizer.param_groups
    names = optimizer._rule(group).states
    for t in range(1, 4):
        set_gradients(params, t)
        grads = [p.grad for p in params if p.grad is not None]
        kept = [grad.clone() for grad in grads]
        norm = reference_total_norm(as_arrays(grads))
        factor = reference_clip_coefficient(norm, 0.3)
        expected = []
        for p, grad in zip(params, grads, strict=True):
            states = [optimizer.state[p].get(name, torch.zeros_like(p)) for name in names]
            expected.append(reference_update(optimizer, group, t, [p, grad, *states], factor))
        optimizer.step()
        assert optimizer.grad_norm.item() == np.float32(norm)
        for p, correct in zip(params, expected, strict=True):
            states = [optimizer.state[p][name] for name in names]
            assert all(same_bits(x, y) for x, y in zip([p, *states], correct, strict=True))
        for grad, before in zip(grads, kept, strict=True):
            assert_same_bits(grad, before)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@each_optimizer
def test_gradients_that_are_not_finite_give_what_torch_gives(
    config: Config, special: float
) -> None:
    def with_special(opt: Optimizer) -> None:
        grad = all_params(opt)[1].grad
        assert grad is not None
        grad[0, 0] = special

    def clip(opt: Any) -> None:
        with_special(opt)
        clip_grad_norm_(all_params(opt), 1.0)

    expected = clipped_training(oracle(config), clip, **config.kwargs)
    actual = clipped_training(config.cls, with_special, max_grad_norm=1.0, **config.kwargs)
    check = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=0, equal_nan=True)  # noqa: E731
    assert_same_state(actual, expected, check)


@each_optimizer
def test_same_bits_on_every_isa_and_any_number_of_threads(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(5,), (300, 40), (0,), (100_000,), (17, 33)]

    def trained(isa: str, threads: int) -> Optimizer:
        monkeypatch.setattr(_engine, "engine", ENGINES[isa])
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        params = parameters(shapes, torch.float32)
        params[1].data = params[1].data.t().contiguous().t()
        optimizer = config.cls(params, max_grad_norm=0.1, **config.kwargs)
        train(optimizer, params, 3)
        return optimizer

    expected = trained("generic", 1)
    for isa, threads in itertools.product(ENGINES, (1, 2, 3, 8)):
        assert_same_state(trained(isa, threads), expected, assert_same_bits)


def test_parameters_that_share_memory_are_stepped_in_their_order() -> None:
    """Also where clipping walks backwards, and on one thread as on two."""

    def trained(make: Make, clip: Clip, **kwargs: Any) -> Optimizer:
        x = values((60_000,), 0)
        params = [Parameter(view) for view in (x[:40_000], x[20_000:], x[::2])]
        optimizer = make(params, lr=0.1, momentum=0.9, **kwargs)
        for step in range(2):
            set_gradients(params, step)
            clip(optimizer)
            optimizer.step()
        return optimizer

    expected = trained(torch.optim.SGD, lambda opt: clip_grad_norm_(all_params(opt), 1.0))
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        actual = trained(fusedopt.SGD, lambda _: None, max_grad_norm=1.0)
        torch.set_num_threads(before)
        assert_same_state(actual, expected, assert_within)
