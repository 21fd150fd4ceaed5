"""Tensors of any dtype and layout."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_layout,
    each_optimizer,
    oracle,
    parameters,
    train,
    values,
)
from tests.registry import DTYPES, GRADIENT_LAYOUTS, LAYOUTS, Config


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_optimizer
def test_every_dtype_is_computed_wide_and_rounded_once(
    config: Config, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Each step is one of float32 (float64 for float64), whose results are then stored."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    p = Parameter(values((40,), 0, dtype))
    optimizer = config.cls([p], **config.kwargs)
    for step in range(3):
        p.data = p.data.to(grad_dtype)
        p.grad = values((40,), 1 + step, grad_dtype)
        p.data = (values((40,), 0) if step == 0 else p.data).to(dtype)
        wide_p = Parameter(p.detach().to(wide))
        wide_p.grad = p.grad.to(wide)
        wide_optimizer = config.cls([wide_p], **config.kwargs)
        for key, value in optimizer.state.get(p, {}).items():
            wide_optimizer.state[wide_p][key] = value.clone() if key == "step" else value.to(wide)
        optimizer.step()
        wide_optimizer.step()
        assert_same_bits(p.detach(), wide_p.detach().to(dtype))
        for key, value in optimizer.state[p].items():
            assert value.dtype == (torch.float32 if key == "step" else dtype)
            assert_same_bits(value, wide_optimizer.state[wide_p][key].to(value.dtype))


@pytest.mark.cpu_only("torch steps strided parameters on devices")
@each_layout
@each_optimizer
def test_any_layout_gives_the_bits_of_the_contiguous_one(
    config: Config, layout: str, gather: str
) -> None:
    """One step with the gradient in every layout, each from the state that the last one left."""
    shape = (2, 3, 4, 5)
    p = Parameter(LAYOUTS[layout](values(shape, 0, torch.float32)))
    contiguous = Parameter(values(shape, 0, torch.float32))
    optimizer = config.cls([p], **config.kwargs)
    expected = config.cls([contiguous], **config.kwargs)
    for step, arrange in enumerate(GRADIENT_LAYOUTS):
        p.grad = arrange(values(shape, 1 + step, torch.float32))
        contiguous.grad = p.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        expected.step()
        assert_same_state(optimizer, expected, assert_same_bits)


@each_optimizer
def test_zero_size_and_0_dim_parameters(config: Config, gather: str) -> None:
    params = parameters([(0,), (), (3, 0, 2), (1, 1), (0,)])
    optimizer = config.cls(params, **config.kwargs)
    plain = parameters([(0,), (), (3, 0, 2), (1, 1), (0,)])
    expected = oracle(config)(plain, **config.kwargs)
    train(optimizer, params, 2)
    train(expected, plain, 2)
    assert all(p in optimizer.state for p in params)
    assert_same_state(optimizer, expected, assert_within)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,)])
def test_a_gradient_that_torch_negates_lazily(shape: tuple[int, ...], gather: str) -> None:
    """The imaginary part of a conjugate is a view with the negative bit, not negated memory."""
    a, b = Parameter(torch.full(shape, 1.0)), Parameter(torch.full(shape, 2.0))
    torch.autograd.backward((torch.complex(a, b).conj() * torch.tensor(3 + 4j)).real.sum())
    assert b.grad is not None
    assert b.grad.is_neg() == (shape != (3,))  # autograd has copied the last
    fusedopt.SGD([a, b], lr=1.0).step()
    assert (a == 1 - 3).all()
    assert (b == 2 - 4).all()


def test_inference_tensors_are_stepped_in_inference_mode() -> None:
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
        fusedopt.SGD([p], lr=0.5).step()
        assert p.tolist() == [0.5] * 3


def test_inference_tensors_are_stepped_outside_of_it_too(gather: str) -> None:
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
    fusedopt.SGD([p], lr=0.5).step()
    assert p.tolist() == [0.5] * 3


@each_optimizer
def test_version_counters_are_bumped(config: Config, gather: str) -> None:
    (p,) = parameters([(4,)])
    loss = (p * p).sum()  # saves p for its backward
    optimizer = config.cls([p], **config.kwargs)
    train(optimizer, [p], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)
