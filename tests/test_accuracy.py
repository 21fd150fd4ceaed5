"""Numbers against float64: what rounding may cost, and what it must not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests.helpers import values
from tools import accuracy

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.cpu_only("devices have the bits of the CPU: test_kernels.py")


def step_with(optimizer: Any, p: Parameter, gradient: Tensor, steps: int = 1) -> None:
    p.grad = gradient.clone()
    for _ in range(steps):
        optimizer.step()


# ---- averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.RAdam, fusedopt.RMSprop])
def test_the_average_of_a_constant_square_comes_to_rest_at_it(cls: type[Any], beta2: float) -> None:
    """Where its change is less than half of what float32 resolves, and not a step before."""
    gradient = torch.linspace(0.1, 0.9, 200)
    p = Parameter(torch.zeros(200))
    alpha = {"alpha": beta2} if cls is fusedopt.RMSprop else {"betas": (0.9, beta2)}
    optimizer = cls([p], lr=0.0, **alpha)
    key = "square_avg" if cls is fusedopt.RMSprop else "exp_avg_sq"
    optimizer.state[p] = {
        "step": torch.tensor(1.0),
        key: gradient * gradient * 1.0001,
        **({} if cls is fusedopt.RMSprop else {"exp_avg": gradient.clone()}),
    }
    step_with(optimizer, p, gradient, steps=3000)
    square = gradient.double() ** 2
    error = (optimizer.state[p][key].double() - square).abs()
    resolved = torch.finfo(torch.float32).eps / 2
    decayed = square * 1e-4 * beta2**3000
    assert (error <= square * resolved * (1 / (1 - beta2) + 2) + decayed).all()


@pytest.mark.parametrize("momentum", [0.9, 0.999])
@pytest.mark.parametrize("cls", [fusedopt.SGD, fusedopt.RMSprop])
def test_the_momentum_of_a_constant_comes_to_rest_at_the_sum_of_its_series(
    cls: type[Any], momentum: float
) -> None:
    p = Parameter(torch.zeros(200))
    optimizer = cls([p], lr=0.0, momentum=momentum)
    gradient = torch.linspace(0.1, 0.9, 200)
    whole = gradient.double() / (1 - momentum)
    if cls is fusedopt.RMSprop:  # steps of a constant are 1 once the average has come to rest
        state = {"step": torch.tensor(1.0), "square_avg": gradient * gradient}
        whole = torch.ones(200, dtype=torch.float64) / (1 - momentum)
        optimizer.state[p] = {**state, "momentum_buffer": whole.float()}
    else:
        optimizer.state[p] = {"momentum_buffer": whole.float()}
    step_with(optimizer, p, gradient, steps=4000)
    error = (optimizer.state[p]["momentum_buffer"].double() / whole - 1).abs().max().item()
    # Two roundings a step, each of which is forgotten as the sum is. 0.999 and its float32 alone
    # differ by 1.3e-8, a 1.3e-5 of the sum.
    assert error <= 2 * torch.finfo(torch.float32).eps / 2 / (1 - momentum)
    if momentum == 0.9:
        assert error < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_average_that_forgets_all_is_the_gradient(dtype: torch.dtype) -> None:
    """However small it is beside the one before: GANs have beta1 = 0."""
    for old, new in ((1e3, 1e-6), (1.0, -1e-20), (1e-3, 1e4)):
        p = Parameter(torch.zeros(9, dtype=dtype))
        optimizer = fusedopt.Adam([p], betas=(0.0, 0.0))
        step_with(optimizer, p, torch.full((9,), old, dtype=dtype))
        step_with(optimizer, p, torch.full((9,), new, dtype=dtype))
        gradient = torch.full((9,), new, dtype=dtype)
        assert torch.equal(optimizer.state[p]["exp_avg"], gradient)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], gradient * gradient)


def test_lookahead_with_alpha_1_has_the_fast_weights() -> None:
    p = Parameter(torch.tensor([1e8, 1.0, -3e-9]))
    optimizer = fusedopt.Lookahead(fusedopt.SGD([p], lr=1.0), k=1, alpha=1.0)
    step_with(optimizer, p, torch.tensor([1e8 - 0.125, 0.7, 1.0]))
    fast = torch.tensor([1e8, 1.0, -3e-9]) - torch.tensor([1e8 - 0.125, 0.7, 1.0])
    assert torch.equal(p.detach(), fast)


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (fusedopt.AdamW, {}),
        (fusedopt.RAdam, {"decoupled_weight_decay": True}),
        (fusedopt.Lion, {}),
    ],
)
def test_weight_decay_of_a_small_learning_rate_is_not_rounded_to_another(
    cls: type[Any], kwargs: dict[str, Any]
) -> None:
    """1 - 1e-6 in float32 is 1 - 1.01e-6; beside the steps of an optimizer the rest shows."""
    start = torch.linspace(1.0, 2.0, 1000)
    found = []
    for decay in (0.01, 0.0):
        p = Parameter(start.clone())
        optimizer = cls([p], lr=1e-4, weight_decay=decay, **kwargs)
        for t in range(1000):
            step_with(optimizer, p, values((1000,), t, torch.float32))
        found.append(p.detach().double())
    decayed = ((found[1] - found[0]) / start).mean().item()
    assert decayed == pytest.approx(1 - (1 - 1e-6) ** 1000, rel=5e-3)


# ---- the variance of a centered RMSprop ----------------------------------------------------------


def centered_groups(dtype: torch.dtype) -> tuple[list[Parameter], list[Tensor], Any]:
    """Return parameters, a steady gradient for each, and one optimizer of them all."""
    alphas = [0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 0.9999]
    gradients = [(torch.logspace(-4, 3, 300) * (-1) ** torch.arange(300)).to(dtype) for _ in alphas]
    params = [Parameter(torch.zeros(300, dtype=dtype)) for _ in alphas]
    groups = [{"params": [p], "alpha": alpha} for p, alpha in zip(params, alphas, strict=True)]
    return params, gradients, fusedopt.RMSprop(groups, lr=1e-3, centered=True)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS], ids=str)
def test_steady_gradients_make_no_nan(dtype: torch.dtype, noise: float) -> None:
    params, gradients, optimizer = centered_groups(dtype)
    generator = torch.Generator().manual_seed(0)
    largest = 1.01 / math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
    for t in range(4000):
        before = [p.detach().double().clone() for p in params]
        factor = 1 + noise * torch.randn(300, generator=generator, dtype=torch.float64)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = (gradient.double() * factor).to(dtype) if noise else gradient
        optimizer.step()
        for p, old in zip(params, before, strict=True) if t % 400 == 399 else []:
            assert p.isfinite().all()
            moved = (p.detach().double() - old).abs()
            assert (moved <= 1e-3 * largest + old.abs() * torch.finfo(dtype).eps).all()


def test_the_variance_of_varying_gradients_is_that_of_float64() -> None:
    """A hundredth of their size is far above what float32 resolves: four digits are left of it."""
    p, q = Parameter(torch.zeros(500)), Parameter(torch.zeros(500, dtype=torch.float64))
    ours = fusedopt.RMSprop([p], lr=1e-3, centered=True)
    formula = accuracy.rmsprop(q.detach().numpy(), lr=1e-3, centered=True)
    next(formula)
    size = torch.linspace(-3, 3, 500)
    for t in range(1000):
        gradient = size * (1 + 0.01 * values((500,), t, torch.float32))
        step_with(ours, p, gradient)
        true = formula.send(gradient.double().numpy())
    error = (p.detach().double() / torch.from_numpy(true["p"]) - 1).abs().max().item()
    assert error < 2e-3


# ---- range ---------------------------------------------------------------------------------------

SECOND_MOMENTS: list[tuple[type[Any], dict[str, Any], str]] = [
    (fusedopt.Adam, {}, "exp_avg_sq"),
    (fusedopt.Adam, {"amsgrad": True}, "exp_avg_sq"),
    (fusedopt.AdamW, {}, "exp_avg_sq"),
    (fusedopt.RAdam, {}, "exp_avg_sq"),
    (fusedopt.RMSprop, {"alpha": 0.999}, "square_avg"),
]


@pytest.mark.parametrize(("cls", "kwargs", "key"), SECOND_MOMENTS)
def test_a_square_overflows_only_where_its_average_does(
    cls: type[Any], kwargs: dict[str, Any], key: str
) -> None:
    for size in (5e19, 5.8e20):
        p = Parameter(torch.zeros(40))
        optimizer = cls([p], **kwargs)
        step_with(optimizer, p, torch.full((40,), size))
        expected = torch.full((40,), 0.001 * size**2, dtype=torch.float64)
        assert torch.allclose(optimizer.state[p][key].double(), expected, rtol=1e-6)


@pytest.mark.parametrize(("cls", "kwargs", "key"), SECOND_MOMENTS)
def test_an_average_that_overflowed_comes_down_again(
    cls: type[Any], kwargs: dict[str, Any], key: str
) -> None:
    p = Parameter(torch.zeros(40))
    optimizer = cls([p], **kwargs)
    for _ in range(8):  # past RAdam's first steps, which divide by nothing
        step_with(optimizer, p, torch.ones(40))
    before = p.detach().clone()
    step_with(optimizer, p, torch.full((40,), 1e30))
    assert torch.equal(p.detach(), before) or cls is fusedopt.AdamW  # which decays
    assert optimizer.state[p][key].isinf().all()
    step_with(optimizer, p, torch.ones(40))
    first = optimizer.state[p][key].clone()
    step_with(optimizer, p, torch.ones(40))
    assert (optimizer.state[p][key] < first).all()
    assert first.isfinite().all()
    assert p.isfinite().all()


def test_nan_stays_nan() -> None:
    """Neither a smallest nor a largest number may take its place."""
    for cls, kwargs, key in SECOND_MOMENTS:
        p = Parameter(torch.zeros(21))
        optimizer = cls([p], **kwargs)
        step_with(optimizer, p, torch.full((21,), torch.nan))
        step_with(optimizer, p, torch.ones(21), steps=8)
        assert p.isnan().all()
        assert optimizer.state[p][key].isnan().all()


# ---- all rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", accuracy.CASES, ids=str)
def test_no_rule_is_farther_from_float64_than_torch_by_more_than_rounding(
    case: accuracy.Case, dtype: torch.dtype
) -> None:
    """As docs/accuracy.md measures it, for longer.

    By rounding: twice as far, since an average is rounded twice a step where torch's lerp is once;
    or, as where both are nearly exact, what the dtype resolves in each of the steps that an average
    remembers.
    """
    steps = 200
    result = accuracy.measure(case, dtype, (steps,))
    for key in result[steps, "fusedopt"]:
        for cell in accuracy.cells(result, steps, key):
            assert not cell.ours.nan
            if cell.torch is not None and not cell.torch.nan:
                resolved = torch.finfo(dtype).eps / (1 - case.kwargs.get("momentum", 0.9))
                assert cell.ours.size <= max(2 * cell.torch.size, resolved), (key, cell)
