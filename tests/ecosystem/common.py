"""The model, the data and the optimizers of the tests beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from tests.helpers import oracle
from tests.registry import PLAIN_CONFIGS, Config


def _maker(config: Config) -> Callable[..., Any]:
    return lambda params, **kwargs: config.cls(params, **{**config.kwargs, **kwargs})


def _lookahead(params: Any, **kwargs: Any) -> fusedopt.Lookahead:
    return fusedopt.Lookahead(fusedopt.AdamW(params, **kwargs), k=2)


# Every optimizer, made from parameters and the keyword arguments of `fusedopt._base.Fused`.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    **{config.name: _maker(config) for config in PLAIN_CONFIGS},
    "Lookahead": _lookahead,
}
CONFIGS = {config.name: config for config in PLAIN_CONFIGS}
each_name = pytest.mark.parametrize("name", OPTIMIZERS)


def torchs(name: str, params: Any) -> Any:
    """Return what torch has for an optimizer; a Lookahead is one around torch's."""
    if name == "Lookahead":
        return fusedopt.Lookahead(torchs("AdamW", params), k=2)
    config = CONFIGS[name]
    return oracle(config)(params, **config.kwargs)


def make_model(first: int = 5, second: int = 6) -> nn.Sequential:
    """Return a model that, split over 2 or 4 ranks, has uneven shards and empty ones."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, first), nn.Linear(first, second), nn.Linear(second, 1)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 7, generator=generator, dtype=torch.float64)


def part_of_batch(step: int, rank: int, ranks: int) -> Tensor:
    return batch(step)[rank::ranks]


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a loss whose gradient is the mean over the rows of x."""
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def backward(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    loss = loss_of(model, x)
    torch.autograd.backward(loss)
    return loss


def train(model: nn.Module, optimizer: Any, steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        backward(model, batch(step))
        optimizer.step()
