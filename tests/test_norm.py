"""Norms of gradients, and the functions that clip in place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import fusedopt
from fusedopt import _core
from fusedopt.clip import reference_clip_coefficient, reference_total_norm
from tests.helpers import (
    ENGINES,
    assert_same_bits,
    assert_within,
    each_dtype,
    each_isa,
    parameters,
    set_gradients,
    values,
)
from tests.registry import DTYPES, FILLED_SHAPES, MAX_NORMS, NORM_TYPES

ORDERS = [1.0, 2.0, math.inf]  # those of the engine

each_order = pytest.mark.parametrize("order", ORDERS)


def wild(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers of many magnitudes, subnormal ones and zeros among them."""
    x = values((n,), seed)
    return (x * 10 ** (8 * values((n,), seed + 1)).clamp(-40, 3) * (x.abs() > 0.1)).to(dtype)


def as_arrays(tensors: list[Tensor]) -> list[Any]:
    return [x.to(torch.float64).numpy() for x in tensors]


def engine_norm(isa: str, tensors: list[Tensor], order: float, threads: int) -> float:
    total, sums, others = ENGINES[isa].norm(tensors, order, threads)
    assert others == []
    total += sum(float(x) for x in sums)
    return math.sqrt(total) if order == 2 else total


# ---- the norm, bit for bit -----------------------------------------------------------------------


@each_isa
@each_dtype
@each_order
def test_norm_has_the_bits_of_the_reference(isa: str, dtype: torch.dtype, order: float) -> None:
    """For sizes around a lane, a block and several pieces, misaligned by 0 to 3 elements."""
    sizes = [0, 1, 15, 16, 17, 33, 4095, 4096, 4097, 9000, 300_001]
    for n, offset in itertools.product(sizes, range(4)):
        if n > 10_000 and offset != 1:
            continue
        x = wild(n + offset, n, dtype)[offset:]
        expected = reference_total_norm(as_arrays([x]), order)
        assert engine_norm(isa, [x], order, 1) == expected, (n, offset)


@each_isa
@each_order
def test_norm_of_many_tensors_on_any_number_of_threads(isa: str, order: float) -> None:
    sizes = [0, 7, 300_000, 1, 4096, 70_001, 0, 500]
    tensors = [wild(n, i, DTYPES[i % 4]) for i, n in enumerate(sizes)]
    expected = reference_total_norm(as_arrays(tensors), order)
    for threads in (1, 2, 3, 8):
        assert engine_norm(isa, tensors, order, threads) == expected


@each_isa
@each_dtype
@each_order
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 5, 16, 4096, 9999])
def test_norm_of_numbers_that_are_not_finite(
    isa: str, dtype: torch.dtype, order: float, special: float, place: int
) -> None:
    x = values((10_000,), 1, dtype)
    x[place] = special
    norm = engine_norm(isa, [x, torch.ones(3)], order, 2)
    assert math.isnan(norm) if math.isnan(special) else norm == math.inf


@each_order
def test_norm_of_any_layout_is_over_its_elements(order: float) -> None:
    x = wild(6 * 50 * 40, 3, torch.float32).view(6, 50, 40)
    layouts = [
        x[:, ::2],
        x.permute(2, 0, 1),
        x[:, :, 1:],
        x[:, :1].expand(6, 50, 40),
        x.mT,
        x[0, 0, 0],
    ]
    for view in layouts:
        expected = torch.linalg.vector_norm(view.double(), order).item()
        assert fusedopt.get_total_norm([view], order).item() == pytest.approx(expected, rel=1e-7)
    dense = x.permute(2, 0, 1)  # all of its memory, in another order
    assert reference_total_norm([dense.numpy()], order) == reference_total_norm([x.numpy()], order)
    assert_same_bits(fusedopt.get_total_norm([dense], order), fusedopt.get_total_norm([x], order))


@pytest.mark.parametrize("size", [1e20, 1e-30, 1e37, 1e-44])
def test_norm_of_large_and_small_gradients(size: float) -> None:
    x = torch.full((1000,), size)
    expected = torch.linalg.vector_norm(x.double()).item()
    assert fusedopt.get_total_norm([x]).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_order
def test_norm_of_16_bit_gradients_is_not_rounded_to_16_bits(
    order: float, dtype: torch.dtype
) -> None:
    x = [values((1000,), seed, dtype) * 100 for seed in range(3)]
    norm = fusedopt.get_total_norm(x, order)
    exact = torch.linalg.vector_norm(torch.cat(x).double(), order)
    assert norm.dtype == torch.float32
    assert norm.item() == exact.float().item()


def test_coefficient_is_the_references() -> None:
    numbers = [0.0, 1e-30, 1e-6, 0.5, 1.0, 1e20, math.inf, math.nan]
    for norm, max_norm in itertools.product(numbers, numbers[:-1]):
        actual = _core.clip_coefficient(norm, max_norm)
        expected = reference_clip_coefficient(norm, max_norm)
        exact = torch.tensor(max_norm, dtype=torch.float64)
        torchs = torch.clamp(exact / (norm + 1e-6), max=1.0).item()
        if math.isinf(max_norm):  # which clips nothing; torch's inf / inf is NaN
            torchs = 1.0
        np.testing.assert_equal([actual, actual], [expected, torchs])


# ---- the functions -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [*ORDERS, 3.0, 0.5, -1.0, -math.inf, 0.0])
def test_get_total_norm_is_torchs(order: float) -> None:
    tensors = [values((n,), n) for n in (1, 40, 5000)]
    expected = torch.nn.utils.get_total_norm(tensors, order)
    for given in (tensors, iter(tensors), tuple(tensors)):
        assert_within(fusedopt.get_total_norm(given, order), expected)
    one = torch.nn.utils.get_total_norm(tensors[1], order)
    assert_within(fusedopt.get_total_norm(tensors[1], order), one)


@each_order
def test_the_norm_of_nothing_is_0(order: float) -> None:
    assert_same_bits(fusedopt.get_total_norm([], order), torch.tensor(0.0))
    without = [Parameter(torch.ones(3))]
    assert_same_bits(fusedopt.clip_grad_norm_(without, 1.0, order), torch.tensor(0.0))


@pytest.mark.parametrize("order", NORM_TYPES)
@pytest.mark.parametrize("max_norm", MAX_NORMS)
@each_dtype
def test_clip_grad_norm_is_torchs(max_norm: float, order: float, dtype: torch.dtype) -> None:
    params, torch_params = parameters(FILLED_SHAPES, dtype), parameters(FILLED_SHAPES, dtype)
    set_gradients(params, 1)
    set_gradients(torch_params, 1)
    params[1].grad = torch_params[1].grad = None
    identities = [id(p.grad) for p in params]
    norm = fusedopt.clip_grad_norm_(params, max_norm, order)
    wide = [p.grad.double() for p in torch_params if p.grad is not None]
    expected_norm = torch.nn.utils.get_total_norm(wide, order)
    assert_within(norm.double(), expected_norm, rtol=1e-9 if dtype == torch.float64 else 2.0**-24)
    assert identities == [id(p.grad) for p in params]
    # The product of the gradient and of the coefficient, each rounded: two units of its dtype.
    factor = reference_clip_coefficient(expected_norm.item(), max_norm)
    unit = torch.finfo(dtype).eps
    for p, q in zip(params, torch_params, strict=True):
        if q.grad is not None:
            assert p.grad is not None
            torch.testing.assert_close(
                p.grad.double(),
                q.grad.double() * factor,
                rtol=2 * unit if dtype != torch.float64 else 1e-9,
                atol=torch.finfo(dtype).smallest_normal * unit,
            )


def test_clip_grad_norm_of_a_generator() -> None:
    params = parameters([(3,)])
    set_gradients(params, 0)
    expected = fusedopt.get_total_norm([values((3,), 1000)])
    assert_same_bits(fusedopt.clip_grad_norm_((p for p in params), 1.0), expected)
    nothing: Iterator[Parameter] = (p for p in params[:0])
    with pytest.warns(UserWarning, match="`parameters` is an empty generator"):
        fusedopt.clip_grad_norm_(nothing, 1.0)


def test_clip_grad_norm_bumps_the_versions_of_what_it_writes() -> None:
    (p,) = parameters([(3,)])
    set_gradients([p], 0)
    assert p.grad is not None
    before = p.grad._version
    fusedopt.clip_grad_norm_(p, 1e-3)
    assert p.grad._version > before


@pytest.mark.cpu_only("torch clips in place on devices, with a message of its own")
def test_an_expanded_gradient_cannot_be_clipped_in_place() -> None:
    params = parameters([(3,), (4,)])
    params[0].grad, params[1].grad = torch.ones(3).double(), torch.ones(1).double().expand(4)
    with pytest.raises(ValueError, match=r"a tensor of shape \(4,\) is a view in which elements"):
        fusedopt.clip_grad_norm_(params, 1e-3)
    assert (params[0].grad == 1).all()


@pytest.mark.parametrize("order", NORM_TYPES)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_error_if_nonfinite(order: float, bad: float) -> None:
    p = Parameter(torch.ones(3))
    p.grad = gradient = torch.tensor([1.0, bad, 2.0])
    with pytest.raises(RuntimeError) as expected:
        clip_grad_norm_(p, 1.0, order, error_if_nonfinite=True)
    optimizer = fusedopt.SGD([p], lr=0.1)
    calls: list[Callable[[], object]] = [
        lambda: fusedopt.clip_grad_norm_(p, 1.0, order, error_if_nonfinite=True),
        lambda: fusedopt.get_total_norm([gradient], order, error_if_nonfinite=True),
        lambda: optimizer.clip_grad_norm_(1.0, order, error_if_nonfinite=True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError) as raised:
            call()
        assert str(raised.value) == str(expected.value)
        assert p.grad[0] == 1
    optimizer.step()  # without a factor
    assert p[0] == torch.tensor(1.0) - torch.tensor(1.0) * 0.1


def test_groups_are_clipped_each_by_its_own_norm() -> None:
    """In place, as torch does it, or by an optimizer each: what docs/choosing.md says of them."""
    limits = (0.5, 0.1)
    ours, theirs, split = (parameters() for _ in range(3))
    groups = [{"params": ours[:2]}, {"params": ours[2:]}]
    optimizer, expected = fusedopt.SGD(groups, lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    each = [
        fusedopt.SGD(some, lr=0.1, max_grad_norm=limit)
        for some, limit in zip((split[:2], split[2:]), limits, strict=True)
    ]
    for step in range(3):
        for some in (ours, theirs, split):
            set_gradients(some, step)
        for group, limit in zip(optimizer.param_groups, limits, strict=True):
            fusedopt.clip_grad_norm_(group["params"], limit)
        for some, limit in zip((theirs[:2], theirs[2:]), limits, strict=True):
            clip_grad_norm_(some, limit)
        for one in (optimizer, expected, *each):
            one.step()
    for p, q, r in zip(ours, theirs, split, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(r, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_negative_norm_is_an_error(bad: float) -> None:
    params = parameters([(3,)])
    set_gradients(params, 0)
    optimizer = fusedopt.Adam(params)
    message = f"Invalid {{}} value: {bad}, expected 0 or more; inf clips nothing"
    calls: list[Callable[[], object]] = [
        lambda: fusedopt.clip_grad_norm_(params, bad),
        lambda: optimizer.clip_grad_norm_(bad),
        lambda: optimizer.clip_grads_with_norm_(bad, 1.0),
    ]
    for call in calls:
        with pytest.raises(ValueError) as raised:  # noqa: PT011  (compared as a whole below)
            call()
        assert str(raised.value) == message.format("max_norm")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        fusedopt.Adam(params, max_grad_norm=bad)
    assert str(raised.value) == message.format("max_grad_norm")
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        optimizer.max_grad_norm = bad
    assert optimizer.max_grad_norm is None
    assert not optimizer.state
