"""Averages in the place of the weights, and back: bit for bit, without a second copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel

import fusedopt
from fusedopt import _codecs, _exchanged
from tests.ecosystem.common import backward, batch, make_model
from tests.helpers import assert_same_bits, parameters, train, values
from tests.registry import DTYPES, LAYOUTS
from tests.test_ema import DECAY, ema, torchs_average_of

each_module = pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])


def rounded(average: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an average as a parameter has it: bfloat16 is rounded as masters are."""
    if dtype != torch.bfloat16 or average.numel() == 0:
        return average.to(dtype)
    return _codecs.split(average).parameter.view_as(average)


class OwnError(Exception):
    """What a test raises."""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_module
def test_averages_are_in_the_model_inside_and_the_weights_after(
    module: Any, dtype: torch.dtype, fails: bool
) -> None:
    params = [Parameter(arrange(values((2, 3, 4, 5), 0, dtype))) for arrange in LAYOUTS.values()]
    params += parameters([(), (0, 3), (7,)], dtype)
    optimizer = ema(module.SGD, params, lr=0.1)
    train(optimizer, params, 3)
    weights = [p.detach().clone() for p in params]
    averages = [optimizer.state[p]["ema"].clone() for p in params]
    places = [p.data_ptr() for p in params]

    def evaluate() -> None:
        with optimizer.swapped():
            for p, average in zip(params, averages, strict=True):
                assert_same_bits(p.detach(), rounded(average, dtype))
            if fails:
                raise OwnError

    if fails:
        with pytest.raises(OwnError):
            evaluate()
    else:
        evaluate()
    for p, weight, average, place in zip(params, weights, averages, places, strict=True):
        assert_same_bits(p.detach(), weight)
        assert_same_bits(optimizer.state[p]["ema"], average)
        assert p.data_ptr() == place
    train(optimizer, params, range(3, 4))  # goes on


def every_bfloat16_and_float32() -> tuple[Tensor, Tensor]:
    """Return weights of all bits, and averages: between two, beside them, infinite, NaN."""
    weights = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    averages = (high[:, None] | low[None, :]).view(torch.float32)
    return weights.flip(0)[:, None].expand(-1, 6).clone(), averages


def test_a_bfloat16_and_its_average_come_back_with_all_bits() -> None:
    p, average = every_bfloat16_and_float32()
    weights, averages = p.clone(), average.clone()
    back = _exchanged.exchange(p, average)
    numbers = ~averages.isnan()
    assert_same_bits(p[numbers], rounded(averages[numbers], torch.bfloat16))
    usual = averages.view(torch.int32) & 0x7FFFFFFF == 0x7FC00000  # as arithmetic makes NaN
    assert p[usual].isnan().all()
    back()
    assert torch.equal(p.view(torch.int16), weights.view(torch.int16))
    assert torch.equal(average.view(torch.int32), averages.view(torch.int32))


@pytest.mark.parametrize("shape", [(3_000_000,), (3, 1_500_000), (5, 7), (2, 3, 700_000), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_piece_at_a_time_changes_places(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what both take is all that is used, and not a second copy of the parameter."""
    x, y = values(shape, 0, dtype), values(shape, 1, torch.float32)
    weights, averages = x.clone(), y.clone()
    whole, sizes = _exchanged._pieces, []

    def watched(*both: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in whole(*both):
            sizes.append(piece[0].numel())
            yield piece

    monkeypatch.setattr(_exchanged, "_pieces", watched)
    back = _exchanged.exchange(x, y)
    assert_same_bits(x, rounded(averages, dtype))
    back()
    assert max(sizes) <= 1 << 20
    assert_same_bits(x, weights)
    assert_same_bits(y, averages)


def test_masters_are_what_they_were() -> None:
    params = parameters([(70,)], torch.bfloat16)
    optimizer = ema(fusedopt.AdamW, params, master_weights=True)
    train(optimizer, params, 3)
    master = optimizer._master(params[0])
    with optimizer.swapped():
        pass
    assert_same_bits(optimizer._master(params[0]), master)


REFUSED: dict[str, Callable[[Any, nn.Module], object]] = {
    "a step": lambda optimizer, _: optimizer.step(),
    "a checkpoint of the optimizer": lambda optimizer, _: optimizer.state_dict(),
    "loading a checkpoint": lambda optimizer, _: optimizer.load_state_dict({}),
    "swapped()": lambda optimizer, _: optimizer.swapped().__enter__(),
    "a copy of the optimizer": lambda optimizer, _: copy.deepcopy(optimizer),
    "to_averaged_model()": lambda optimizer, model: optimizer.to_averaged_model(model),
    "load_averaged_model()": lambda optimizer, model: optimizer.load_averaged_model(None, model),
}


@pytest.mark.parametrize("outside", [None, fusedopt.Lookahead])
@pytest.mark.parametrize("what", REFUSED)
@each_module
def test_what_takes_weights_is_refused_inside(module: Any, what: str, outside: Any) -> None:
    model = make_model()
    inner = module.AdamW(model.parameters())
    optimizer: Any = fusedopt.EMA(inner, DECAY)
    optimizer = outside(optimizer) if outside else optimizer
    for step in range(2):
        backward(model, batch(step))
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.swapped():
        inside = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError) as raised:
            REFUSED[what](optimizer, model)
        assert str(raised.value).startswith(f"{what} inside of swapped(), where the averages are")
        if what in ("a step", "a checkpoint of the optimizer"):
            with pytest.raises(RuntimeError, match="inside of swapped"):
                REFUSED[what](inner, model)
        for p, q in zip(model.parameters(), inside, strict=True):
            assert_same_bits(p.detach(), q)
    for p, q in zip(model.parameters(), before, strict=True):
        assert_same_bits(p.detach(), q)
    assert optimizer.param_groups[0]["ema_step"] == 2
    optimizer.step()
    pickle.dumps(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_released_gradient_and_master_weights_are_refused_inside() -> None:
    model = make_model().bfloat16()
    optimizer = fusedopt.EMA(fusedopt.AdamW(model.parameters(), master_weights=True))
    with fusedopt.release_gradients(model, optimizer):
        backward(model, batch(0).bfloat16())
        optimizer.step()
        with optimizer.swapped():
            with pytest.raises(RuntimeError, match="a step inside of swapped"):
                backward(model, batch(1).bfloat16())
            with pytest.raises(RuntimeError, match="a checkpoint of master weights inside"):
                optimizer.master_state_dict(model)
            with pytest.raises(RuntimeError, match="loading master weights inside"):
                optimizer.load_master_state_dict(model, {})
    assert optimizer.master_state_dict(model)


@each_module
def test_before_the_first_step_nothing_is_swapped(module: Any) -> None:
    model = make_model()
    optimizer = fusedopt.EMA(module.AdamW(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.swapped():
        for p, q in zip(model.parameters(), before, strict=True):
            assert_same_bits(p.detach(), q)


def test_buffers_stay_the_models() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = fusedopt.EMA(fusedopt.SGD(model.parameters(), lr=0.1), DECAY)
    averaged = torchs_average_of(model)
    for step in range(3):
        torch.autograd.backward(model(values((5, 3), step, torch.float32)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    made = optimizer.to_averaged_model(model)
    model.eval()
    x = values((5, 3), 9, torch.float32)
    with optimizer.swapped(), torch.no_grad():
        for other in (made, averaged):
            torch.testing.assert_close(model(x), other.eval()(x))
        state = copy.deepcopy(model.state_dict())
    assert_same_bits(state["1.running_mean"], averaged.state_dict()["module.1.running_mean"])


# ---- AveragedModel -------------------------------------------------------------------------------


@each_module
@pytest.mark.parametrize("steps", [0, 3])
def test_an_averaged_model_goes_on_from_an_ema_and_back(module: Any, steps: int) -> None:
    model = make_model()
    optimizer = fusedopt.EMA(module.AdamW(model.parameters()), DECAY, every=2)
    averaged = torchs_average_of(model)

    def trained(first: int, count: int, others: list[AveragedModel]) -> None:
        for step in range(first, first + count):
            optimizer.zero_grad()
            backward(model, batch(step))
            optimizer.step()
            if (step + 1) % 2 == 0:
                for other in others:
                    other.update_parameters(model)

    trained(0, 2 * steps, [averaged])
    made = optimizer.to_averaged_model(model)
    assert int(made.n_averaged) == int(averaged.n_averaged) == steps
    trained(2 * steps, 4, [made, averaged])
    for p, q, r in zip(model.parameters(), made.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(q, r, rtol=0, atol=1e-14)
        average = optimizer.average(p)
        assert average is not None
        torch.testing.assert_close(average, q.detach(), rtol=0, atol=1e-14)
    # And back, into an optimizer that has yet to make its first step.
    other = fusedopt.EMA(module.AdamW(model.parameters()), DECAY, every=2)
    other.load_averaged_model(averaged, model)
    assert other.param_groups[0]["ema_step"] == 2 * (steps + 2)
    with other.swapped():
        for p, q in zip(model.parameters(), averaged.parameters(), strict=True):
            assert_same_bits(p.detach(), q.detach())
    optimizer = other
    trained(2 * steps + 4, 2, [averaged])
    for p, q in zip(model.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], q.detach(), rtol=0, atol=1e-14)
    assert not other._loaded


def test_an_averaged_model_of_another_model_is_refused() -> None:
    model = make_model()
    optimizer = fusedopt.EMA(fusedopt.AdamW(model.parameters()))
    for other in (make_model(6), nn.Linear(7, 5)):
        with pytest.raises(ValueError, match=r"of the averaged model is .*, expected"):
            optimizer.load_averaged_model(AveragedModel(other), model)
    assert optimizer.param_groups[0]["ema_step"] == 0
    assert all(optimizer.average(p) is None for p in model.parameters())
