"""What users of swa_utils, timm and ema-pytorch know of averages holds of ours, or is a line away.

By their formulas in float64, or by torch's AveragedModel beside it; more is in test_ema*.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn, update_bn

import fusedopt
from tests.helpers import assert_same_bits, assert_within, parameters, train, values
from tests.test_ema import DECAY, ema, torchs_average_of

each_module = pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])


class WarmedUp(fusedopt.EMA):
    """With the decays of timm's ModelEmaV3 and of ema-pytorch's EMA."""

    inv_gamma, power, min_decay, update_after_step = 1.0, 2 / 3, 0.0, 0

    def decay_of(self, n: int) -> float:
        epoch = max(0, n - self.update_after_step)
        rising = 1 - (1 + epoch / self.inv_gamma) ** -self.power
        return min(max(rising, self.min_decay), self.decay) if epoch else 0.0


@each_module
@pytest.mark.parametrize(
    ("after", "gamma", "power", "least"),
    [(0, 1.0, 2 / 3, 0.0), (0, 2.0, 3 / 4, 0.4), (3, 1.0, 1.0, 0.0), (20, 1.0, 2 / 3, 0.2)],
)
def test_the_warm_up_of_timm_and_ema_pytorch(
    module: Any, after: int, gamma: float, power: float, least: float
) -> None:
    """As after ModelEmaV3.update(model, step=1), 2 and so on; a copy up to update_after_step."""
    (p,) = parameters([(5,)])
    names = {"inv_gamma": gamma, "power": power, "min_decay": least, "update_after_step": after}
    optimizer = type("Asked", (WarmedUp,), names)(module.SGD([p], lr=0.1), DECAY)
    expected = torch.zeros_like(p)
    for step in range(9):
        train(optimizer, [p], range(step, step + 1))
        epoch = max(0, step - after)
        decay = max(min(1 - (1 + epoch / gamma) ** -power, DECAY), least) if epoch else 0.0
        expected = decay * expected + (1 - decay) * p.detach()
        assert_within(optimizer.state[p]["ema"], expected)


@each_module
def test_equal_averages_are_those_of_swa(module: Any) -> None:
    """Both peers say so of their warm-up with 1 and 1."""
    (p,) = parameters([(5,)])
    optimizer = type("Equal", (WarmedUp,), {"power": 1.0})(module.AdamW([p]), decay=1.0)
    average: Any = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]  # of torch
    swa, kept = AveragedModel(nn.ParameterList([p]), multi_avg_fn=average), []
    for step in range(9):
        train(optimizer, [p], range(step, step + 1))
        swa.update_parameters(nn.ParameterList([p]))
        kept.append(p.detach().clone())
    assert_within(optimizer.state[p]["ema"], torch.stack(kept).mean(0))
    # (Torch's share of the weights is a float32.)
    assert_within(optimizer.state[p]["ema"], next(swa.parameters()).detach(), rtol=1e-9)


@each_module
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_nothing_and_all_is_kept(module: Any, decay: float) -> None:
    """With 1, as ema-pytorch's frozen average, all of the first one; with 0, the weights."""
    params = parameters()
    train(optimizer := fusedopt.EMA(module.AdamW(params), decay), params, 1)
    first = [p.detach().clone() for p in params]
    train(optimizer, params, range(1, 4))
    for p, q in zip(params, first, strict=True):
        assert_same_bits(optimizer.state[p]["ema"], q if decay else p.detach())


@each_module
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 1e-3), (torch.float32, 1e-5)])
def test_many_small_steps_do_not_drift(module: Any, dtype: torch.dtype, rtol: float) -> None:
    """As with ModelEmaV3's dtype=float32: each share is far below a digit of a bfloat16."""
    p = nn.Parameter(torch.ones(16, 16, dtype=dtype))
    optimizer = fusedopt.EMA(module.SGD([p], lr=1.0), decay=0.9998)
    average = torch.zeros(0)
    p.grad = torch.full_like(p, -(2**-7))
    for step in range(1000):
        optimizer.step()
        average = average.lerp(p.detach().double(), 1 - 0.9998) if step else p.detach().double()
    moved = optimizer.state[p]["ema"].double() - 1
    torch.testing.assert_close(moved, average - 1, rtol=rtol, atol=0)


class Model(nn.Module):
    """Some weights are frozen, some are there twice, and there are buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4, dtype=torch.float64)
        self.frozen = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.last = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Any:
        return self.last(self.norm(self.frozen(self.first(x)).tanh()))


def trained(module: Any, without: str = "-") -> tuple[Model, Any, AveragedModel]:
    model = Model()
    chosen = [p for name, p in model.named_parameters() if not name.startswith(without)]
    optimizer = fusedopt.EMA(module.SGD(model.parameters(), lr=0.1), DECAY, params=chosen)
    averaged = torchs_average_of(model)
    go_on(model, optimizer, range(9), averaged)
    return model, optimizer, averaged


def go_on(model: Model, optimizer: Any, steps: range, averaged: AveragedModel) -> None:
    for step in steps:
        optimizer.zero_grad()
        torch.autograd.backward(model(values((6, 4), step)).square().mean())
        optimizer.step()
        averaged.update_parameters(model)


@each_module
@pytest.mark.parametrize("without", ["-", "norm."])
def test_frozen_and_tied_weights_and_those_left_out(module: Any, without: str) -> None:
    """Tied ones move once; what ema-pytorch copies by its name is the model's own here."""
    model, optimizer, averaged = trained(module, without)
    own, made = copy.deepcopy(model.state_dict()), optimizer.to_averaged_model(model)
    with optimizer.swapped():
        inside = copy.deepcopy(model.state_dict())
    for name, x in averaged.module.state_dict().items():
        expected = own[name] if name.startswith(without) else x
        for found in (made.module.state_dict()[name], inside[name]):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@each_module
def test_update_bn_of_averages(module: Any) -> None:
    """In an averaged model; or in the model itself, whose buffers then stay so."""
    model, optimizer, averaged = trained(module)
    before, made = copy.deepcopy(model.state_dict()), optimizer.to_averaged_model(model)
    loader = [values((6, 4), 100 + i) for i in range(5)]
    for each in (averaged, made):
        update_bn(loader, each)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with optimizer.swapped():
        update_bn(loader, model)
    for buffers in (made.module.buffers(), model.buffers()):
        torch.testing.assert_close([*buffers], [*averaged.module.buffers()])


@each_module
def test_a_compiled_model_is_evaluated_with_averages(module: Any) -> None:
    model, optimizer, averaged = trained(module)
    compiled: Any = torch.compile(model.eval(), backend="eager")
    for step in range(2):
        go_on(model, optimizer, range(step, step + 1), averaged)
        own = compiled(x := values((6, 4), 50))
        with optimizer.swapped():
            torch.testing.assert_close(compiled(x), averaged.eval()(x))
        assert_same_bits(compiled(x), own)


@each_module
def test_averages_that_begin_anew_at_the_weights(module: Any) -> None:
    """As after ModelEmaV3.set: the next one is a copy again."""
    model, optimizer, _ = trained(module)
    optimizer.load_averaged_model(AveragedModel(model), model)
    fresh = torchs_average_of(model)
    for steps in (range(0), range(3)):
        go_on(model, optimizer, steps, fresh)
        made = optimizer.to_averaged_model(model)
        torch.testing.assert_close(made.state_dict(), fresh.state_dict(), rtol=0, atol=1e-14)


@each_module
def test_weights_that_are_set_to_the_averages(module: Any) -> None:
    """As by ema-pytorch's update_model_with_ema_every: training goes on from there."""
    (p,), (plain,) = parameters([(3, 4)]), parameters([(3, 4)])
    optimizer, expected = ema(module.SGD, [p], lr=0.1), torch.optim.SGD([plain], lr=0.1)
    average = torch.zeros_like(plain)
    for step in range(9):
        train(optimizer, [p], range(step, step + 1))
        train(expected, [plain], range(step, step + 1))
        with torch.no_grad():
            average.lerp_(plain, 1 - DECAY if step else 1.0)
            if step % 3 == 2:
                p.copy_(optimizer.average(p))
                plain.copy_(average)
            for x, y in ((p, plain), (optimizer.average(p), average)):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
