"""How much memory a step of matrices takes, as torch's allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import _orthogonal
from fusedopt._orthogonal import NUMBERS, Iteration, orthogonalize_, orthogonalized
from tests.helpers import each_dtype, set_gradients, train, values
from tests.muon.common import matrices

pytestmark = pytest.mark.cpu_only("on a device, torch's operators have temporaries of their own")

ITERATION = Iteration((3.4445, -4.775, 2.0315), 5, 1e-7)


def most_allocated(function: Callable[[], object]) -> int:
    """Return how many bytes of tensors more than before there were at some time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    total = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def taken_by_a_product(side: int, dtype: torch.dtype) -> int:
    """Return what torch's own product takes: of bfloat16, memory to work in on some processors."""
    a = torch.ones(side, side, dtype=dtype)
    product = torch.empty_like(a)
    return most_allocated(lambda: torch.mm(a, a, out=product))


def taken_by_a_step(params: list[Any], **options: Any) -> int:
    optimizer = fusedopt.Muon(params, **options)
    train(optimizer, params, 1)
    set_gradients(params, 1)
    return most_allocated(optimizer.step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("side", [64, 80, 96, 120, 128, 256, 512])
def test_a_step_takes_no_more_than_two_of_the_largest_batch(
    side: int, count: int, dtype: torch.dtype
) -> None:
    """In the precision of the iteration."""
    params = matrices(dtype, [(64, side)] * count + [(64, 32)])
    # (As much as two matrices of 64 x 128 is needed for one of them alone.)
    numbers = NUMBERS if (side, count) == (128, 2) else 0
    assert taken_by_a_step(params) <= 2 * count * 64 * side * 4 + numbers


@pytest.mark.parametrize(
    "shape",
    [(384, 384), (385, 385), (384, 480), (480, 384), (400, 600), (256, 512), (1024, 256)],
    ids=str,
)
@pytest.mark.parametrize("state_dtype", [None, "mxfp8"])
@each_dtype
def test_a_single_matrix_takes_two_of_its_kind(
    dtype: torch.dtype, shape: tuple[int, int], state_dtype: Any
) -> None:
    itemsize = 8 if dtype == torch.float64 else 4
    bound = 2 * shape[0] * shape[1] * itemsize + NUMBERS
    assert taken_by_a_step(matrices(dtype, [shape]), state_dtype=state_dtype) <= bound


@pytest.mark.parametrize(
    ("side", "options", "kinds"),
    [(200, {}, 3.0), (512, {"ns_dtype": torch.bfloat16}, 1.5)],
)
def test_a_small_square_matrix_takes_three_and_a_bfloat16_one_half_of_that(
    side: int, options: dict[str, Any], kinds: float
) -> None:
    taken = taken_by_a_step(matrices(torch.float32, [(side, side)]), **options)
    iterated = options.get("ns_dtype", torch.float32)
    assert taken <= kinds * side * side * 4 + NUMBERS + taken_by_a_product(side, iterated)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 5), (2, 2), (5, 5), (5, 7), (7, 5), (6, 9), (9, 6), (4, 16), (16, 4)],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 7])
def test_what_makes_do_with_less_memory_is_the_same(
    shape: tuple[int, int], count: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_orthogonal, "HALVES_FROM_BYTES", 0)
    monkeypatch.setattr(_orthogonal, "SLICE_BYTES", 2 * shape[0] * shape[1] * 8)
    x = values((count, *shape), 0)
    iteration = ITERATION._replace(steps=steps)
    expected = orthogonalized(x, iteration)
    orthogonalize_(x, iteration)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (64, 256), (256, 64)], ids=str)
def test_small_singular_values_keep_their_digits(shape: tuple[int, int], smallest: float) -> None:
    """Of float32: torch's bfloat16 errs by some percent."""
    short = min(shape)
    u = torch.linalg.qr(values((shape[0], short), 0)).Q
    v = torch.linalg.qr(values((shape[1], short), 1)).Q
    singular = smallest ** torch.linspace(0, 1, short).double()
    start = (u * singular) @ v.mT
    exact = orthogonalized(start, ITERATION)
    x = start.float().repeat(4, 1, 1)
    orthogonalize_(x, ITERATION)
    assert (x[0].double() - exact).norm() <= 2e-5 * exact.norm()
