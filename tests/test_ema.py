"""Moving averages of the weights: their numbers, on every layout, dtype and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from tests.helpers import (
    ENGINES,
    assert_same_bits,
    assert_within,
    each_isa,
    each_optimizer,
    oracle,
    parameters,
    set_gradients,
    train,
    values,
)
from tests.reference import same_bits
from tests.registry import DTYPES, LAYOUTS, Config

DECAY, STEPS = 0.7, 6
HALVES = (torch.bfloat16, torch.float16)


def ema(make: Callable[..., Any], params: Any, **kwargs: Any) -> Any:
    return fusedopt.EMA(make(params, **kwargs), decay=DECAY)


def torchs_average_of(model: Module) -> AveragedModel:
    average = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]  # of torch
    return AveragedModel(model, multi_avg_fn=average)


def averaged_by_torch(params: list[Parameter]) -> tuple[Module, AveragedModel]:
    model = ParameterList(params)
    return model, torchs_average_of(model)


@pytest.mark.parametrize("torchs", [False, True], ids=["fusedopt", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_optimizer
def test_it_is_torchs_average(config: Config, dtype: torch.dtype, torchs: bool) -> None:
    params = parameters(dtype=dtype)
    make = oracle(config) if torchs else config.cls
    optimizer = ema(make, params, **config.kwargs)
    model, expected = averaged_by_torch(params)
    for step in range(STEPS):
        train(optimizer, params, range(step, step + 1))
        expected.update_parameters(model)
    for p, q in zip(params, expected.parameters(), strict=True):
        average = optimizer.state[p]["ema"]
        assert average.dtype == dtype
        torch.testing.assert_close(average, q.detach(), rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert optimizer.param_groups[0]["ema_step"] == STEPS


def reference(p: Tensor, average: Tensor, weight: float) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    new = fusedopt.EMA.reference(p.to(wide).numpy(), average.to(wide).numpy(), weight=weight)
    return torch.as_tensor(new).to(average.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_isa
def test_every_instruction_set_has_the_bits_of_the_reference(
    isa: str, dtype: torch.dtype, layout: str
) -> None:
    for kind in {dtype, torch.float32} if dtype in HALVES else {dtype}:
        p = LAYOUTS[layout](values((2, 3, 40, 50), 0, dtype))
        average = values((2, 3, 40, 50), 1, kind)
        expected, before = reference(p, average, 1 - DECAY), p.clone()
        if ENGINES[isa].emulated:
            p = p.contiguous()
        ENGINES[isa].update("ema", 0, [1 - DECAY], 1.0, [p, p, average], 2)
        assert same_bits(average, expected)
        assert same_bits(p, before)


ARRANGED: list[Callable[[Tensor], Tensor]] = [
    LAYOUTS[name] for name in ("contiguous", "channels_last", "transposed", "strided")
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_optimizer
def test_a_step_is_one_without_it_and_then_the_reference(
    config: Config, dtype: torch.dtype, two_threads: None
) -> None:
    tensors = [arrange(values((2, 3, 40, 50), i, dtype)) for i, arrange in enumerate(ARRANGED)]
    tensors += [values((70_000,), 9, dtype), values((), 8, dtype), values((0, 3), 7, dtype)]
    params, plain_params = ([Parameter(x.clone()) for x in tensors] for _ in range(2))
    optimizer = ema(config.cls, params, **config.kwargs)
    plain = config.cls(plain_params, **config.kwargs)
    averages: list[Tensor] = []
    for step in range(4):
        train(optimizer, params, range(step, step + 1))
        train(plain, plain_params, range(step, step + 1))
        if not averages:
            averages = [p.detach().float() if p.dtype in HALVES else p.detach() for p in params]
            averages = [x.clone() for x in averages]
        weight = 1 - DECAY if step else 1.0
        for i, (p, q) in enumerate(zip(params, plain_params, strict=True)):
            assert same_bits(p.detach(), q.detach())
            averages[i] = reference(q.detach(), averages[i], weight)
            assert same_bits(optimizer.state[p]["ema"], averages[i])
            assert optimizer.state[p]["ema"].stride() == q.stride() or layouts_differ(q)


def layouts_differ(q: Tensor) -> bool:
    """Return whether nothing new has the strides of q: there are gaps between its elements."""
    return torch.empty_like(q).stride() != q.stride()


def test_threads_and_ways_of_reading_change_nothing(gather: str) -> None:
    def trained(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        params = parameters([(300, 500), (7,)] * 80, torch.float32)
        optimizer = ema(fusedopt.AdamW, params)
        train(optimizer, params, 3)
        return [optimizer.state[p]["ema"] for p in params]

    before = torch.get_num_threads()
    try:
        for x, y in zip(trained(1), trained(2), strict=True):
            assert_same_bits(x, y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_with_masters_it_is_that_of_float32(dtype: torch.dtype) -> None:
    ours = parameters([(70,), (3, 4)], dtype)
    theirs = [Parameter(p.detach().float()) for p in ours]
    options: dict[str, Any] = {"state_dtype": torch.float32, "master_weights": True}
    optimizer, expected = ema(fusedopt.AdamW, ours, **options), ema(fusedopt.AdamW, theirs)
    for step in range(5):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        assert_same_bits(optimizer.state[p]["ema"], expected.state[q]["ema"])


@pytest.mark.parametrize("mode", [{"state_dtype": "mxfp8"}, {"stochastic_rounding": True}], ids=str)
def test_the_bits_of_random_rounding_are_those_without_it(mode: dict[str, Any]) -> None:
    """And the average is of what is stored."""
    shape = (64, 128)
    ours, plain_ones = (parameters([shape], torch.bfloat16) for _ in range(2))
    optimizer, plain = ema(fusedopt.AdamW, ours, **mode), fusedopt.AdamW(plain_ones, **mode)
    average = ours[0].detach().float().clone()
    for step in range(3):
        train(optimizer, ours, range(step, step + 1))
        train(plain, plain_ones, range(step, step + 1))
        assert_same_bits(ours[0].detach(), plain_ones[0].detach())
        average = reference(ours[0].detach(), average, 1 - DECAY if step else 1.0)
        assert_same_bits(optimizer.state[ours[0]]["ema"], average)


# ---- when it moves -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
def test_the_warm_up_is_that_of_tensorflow(module: Any) -> None:
    (p,) = parameters([(5,)])
    optimizer = fusedopt.EMA(module.SGD([p], lr=0.1), decay=0.3, warmup=True)
    expected = torch.zeros(5, dtype=torch.float64)
    for n, decay in enumerate([0.0, 2 / 11, 3 / 12, 0.3, 0.3]):
        assert optimizer.decay_of(n) == decay
        train(optimizer, [p], range(n, n + 1))
        expected = decay * expected + (1 - decay) * p.detach()
        assert_within(optimizer.state[p]["ema"], expected)


@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
def test_every_third_step(module: Any) -> None:
    params = parameters()
    optimizer = fusedopt.EMA(module.AdamW(params), decay=DECAY, every=3)
    model, expected = averaged_by_torch(params)
    for step in range(8):
        before = [p.detach().clone() for p in params]
        train(optimizer, params, range(step, step + 1))
        if (step + 1) % 3 == 0:
            expected.update_parameters(model)
        if step == 0:  # it begins where they were
            for p, q in zip(params, before, strict=True):
                assert_same_bits(optimizer.state[p]["ema"], q)
    for p, q in zip(params, expected.parameters(), strict=True):
        assert_within(optimizer.state[p]["ema"], q.detach())


@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
@pytest.mark.parametrize("as_list", [False, True])
def test_chosen_parameters(module: Any, as_list: bool) -> None:
    params = parameters()
    chosen: Any = params[1:3] if as_list else lambda p: p.ndim == 2
    optimizer = fusedopt.EMA(module.AdamW(params), decay=DECAY, params=chosen)
    whole_params = parameters()
    whole = ema(module.AdamW, whole_params)
    train(optimizer, params, 3)
    train(whole, whole_params, 3)
    for p, q in zip(params, whole_params, strict=True):
        assert_same_bits(p.detach(), q.detach())
        is_chosen = any(p is each for each in params[1:3]) if as_list else p.ndim == 2
        assert ("ema" in optimizer.state[p]) == is_chosen
        if is_chosen:
            assert_same_bits(optimizer.state[p]["ema"], whole.state[q]["ema"])


@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
def test_a_late_gradient_and_a_missing_one(module: Any) -> None:
    """A late parameter has been where it was: as torch's average of it. Without one, both rest."""
    first, late = parameters([(5,), (3, 4)])
    optimizer = ema(module.SGD, [first, late], lr=0.1)
    model, expected = averaged_by_torch([first, late])
    for step in range(2):
        train(optimizer, [first], range(step, step + 1))
        expected.update_parameters(model)
    assert "ema" not in optimizer.state.get(late, {})
    train(optimizer, [first, late], range(2, 3))
    expected.update_parameters(model)
    for p, q in zip([first, late], expected.parameters(), strict=True):
        assert_within(optimizer.state[p]["ema"], q.detach())
    rests = optimizer.state[late]["ema"].clone()
    late.grad = None
    set_gradients([first], 3)
    optimizer.step()
    assert_same_bits(optimizer.state[late]["ema"], rests)


def test_the_decay_may_change_between_steps() -> None:
    (p,) = parameters([(5,)])
    optimizer = ema(fusedopt.SGD, [p], lr=0.1)
    train(optimizer, [p], 1)
    optimizer.decay = 0.0
    train(optimizer, [p], range(1, 2))
    assert_within(optimizer.state[p]["ema"], p.detach())
