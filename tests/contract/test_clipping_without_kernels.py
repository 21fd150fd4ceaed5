"""Clipping by the norm of gradients that the engine cannot read, too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedopt
from tests.helpers import (
    Clip,
    Make,
    all_params,
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_optimizer,
    oracle,
    parameters,
    set_gradients,
    values,
)
from tests.registry import Config


def mixed(dense: bool) -> list[Parameter]:
    """A table with sparse gradients and plain parameters; dense, for torch."""
    params = parameters([(6, 3), (5,), (300, 100)])
    index = torch.tensor([[1, 4, 1]])
    # Around it, not as an argument, which torch 2.12 warns of as if it were not there.
    with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]  # of torch
        table = torch.sparse_coo_tensor(index, values((3, 3), 7), (6, 3))
    set_gradients(params, 0)
    params[0].grad = table.to_dense() if dense else table
    return params


@pytest.mark.filterwarnings("ignore:fusedopt.SGD has no kernel")
def test_the_norm_covers_sparse_gradients() -> None:
    params, expected_params = mixed(dense=False), mixed(dense=True)
    optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=0.5)
    kept = params[0].grad
    optimizer.step()
    expected = clip_grad_norm_(expected_params, 0.5)
    assert optimizer.grad_norm is not None
    assert_within(optimizer.grad_norm.double(), expected, rtol=2.0**-24)
    torch.optim.SGD(expected_params, lr=0.1).step()
    for p, q in zip(params, expected_params, strict=True):
        assert_within(p.detach(), q.detach())
    assert params[0].grad is kept
    total = fusedopt.get_total_norm([p.grad for p in params if p.grad is not None])
    assert_within(total, expected)


@pytest.mark.filterwarnings("ignore:fusedopt")
@each_optimizer
def test_the_norm_covers_complex_gradients(config: Config) -> None:
    def trained(make: Make, clip: Clip, real: bool) -> Optimizer:
        z = values((5, 2), 1)
        params = [Parameter(z if real else torch.view_as_complex(z)), *parameters([(4,)])]
        optimizer = make(params, **config.kwargs)
        for step in range(3):
            gradient = values((5, 2), 10 + step)
            params[0].grad = gradient if real else torch.view_as_complex(gradient)
            params[1].grad = values((4,), 20 + step)
            clip(optimizer)
            optimizer.step()
        return optimizer

    expected = trained(oracle(config), lambda opt: clip_grad_norm_(all_params(opt), 0.5), real=True)
    clipped = lambda params, **kwargs: config.cls(params, max_grad_norm=0.5, **kwargs)  # noqa: E731
    actual = trained(clipped, lambda _: None, real=False)

    def check(a: Tensor, b: Tensor) -> None:
        assert_within(torch.view_as_real(a) if a.is_complex() else a, b)

    assert_same_state(actual, expected, check)


@pytest.mark.filterwarnings("ignore:fusedopt.SGD has no kernel")
def test_a_skipped_step_skips_the_fallback() -> None:
    params = mixed(dense=False)
    before = [p.detach().clone() for p in params]
    optimizer = fusedopt.SGD(params, lr=0.1, skip_nonfinite=True)
    assert params[0].grad is not None
    params[0].grad._values()[0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q)


def test_an_error_in_the_fallback_leaves_gradients_and_factor() -> None:
    params = mixed(dense=False)
    optimizer = fusedopt.Adam(params)
    optimizer.clip_grad_norm_(0.1)
    pending = optimizer._pending
    assert pending.coefficient < 1
    kept = [p.grad for p in params]
    with pytest.raises(RuntimeError, match="sparse"), pytest.warns(UserWarning, match="fusedopt"):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(params, kept, strict=True))
    assert optimizer._pending == pending
