"""What the tests of memory modes beside it share: a bfloat16 model, gradients, and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.ecosystem.common import OPTIMIZERS

MODES: dict[str, dict[str, Any]] = {
    "masters, float32 states": {"master_weights": True, "state_dtype": torch.float32},
    "masters, 8 bits": {"master_weights": True, "state_dtype": "mxfp8"},
    "random, 8 bits": {"stochastic_rounding": True, "state_dtype": "mxfp8", "seed": 3},
    "random, bfloat16 states": {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
}
each_mode = pytest.mark.parametrize("mode", MODES)

MAX_NORM = 5.0  # of gradients with norms of some hundreds

# Rows that are no whole number of blocks, one dimension, fewer rows than there are ranks, an empty
# shard after full ones, a single element.
UNEVEN = [(70, 67), (130,), (3, 1500), (9, 5, 100), (1,)]


class Model(nn.Module):
    """Parameters without a model; what tests need are gradients that no rank adds up otherwise."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i, shape in enumerate(shapes):
            values = torch.randn(shape, generator=generator)
            self.register_parameter(f"p{i}", nn.Parameter(values.bfloat16()))


def make_optimizer(name: str, model: nn.Module, mode: str) -> Any:
    return OPTIMIZERS[name](model.parameters(), max_grad_norm=MAX_NORM, **MODES[mode])


def distributed(x: Tensor, p: Any) -> Tensor:
    """Return x, split as p is."""
    return distribute_tensor(x, p.device_mesh, p.placements) if isinstance(p, DTensor) else x


def set_gradients(
    model: nn.Module, step: int, split: Callable[[Tensor, Any], Tensor] = distributed
) -> None:
    """Give parameters gradients whose squares add up without rounding, in any order."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        size = 2.0 ** -torch.randint(0, 8, p.shape, generator=generator)
        grad = torch.randint(-127, 128, p.shape, generator=generator) * size
        p.grad = split(grad.bfloat16(), p)


def train(
    model: nn.Module,
    optimizer: Any,
    steps: range,
    split: Callable[[Tensor, Any], Tensor] = distributed,
) -> None:
    for step in steps:
        set_gradients(model, step, split)
        optimizer.step()


def part_of(x: Any) -> Tensor:
    """Return what this process has of a tensor."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach().clone()


def numbers(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return parameters, masters and states, of each what this process has of it."""
    fused = getattr(optimizer, "optimizer", optimizer)  # inside of a Lookahead
    found = {f"{name} of the model": x for name, x in model.state_dict().items()}
    found |= {f"{name} in float32": x for name, x in fused.master_state_dict(model).items()}
    for name, p in model.named_parameters():
        found |= {f"{key} of {name}": x for key, x in fused.state[p].items()}
    return {name: part_of(x) for name, x in found.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless all tensors have the same bits."""
    assert list(actual) == list(expected)
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert torch.equal(bytes_of(actual[name]), bytes_of(x)), name


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return whole tensors from parts of rows; those of no dimension are the same on all ranks."""
    whole = {}
    for name, first in parts[0].items():
        of_ranks = [part[name] for part in parts]
        if first.ndim == 0:
            assert all(torch.equal(x, first) for x in of_ranks), name
        whole[name] = torch.cat(of_ranks) if first.ndim else first
    return whole
