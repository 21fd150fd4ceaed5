"""Averages of shards are shards of the averages: steps, checkpoints, and in the model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import fusedopt
from tests.ecosystem.common import batch, make_model
from tests.ecosystem.ranks import run_ranks
from tests.helpers import assert_same_bits, values

STEPS, DECAY = 4, 0.7
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}


def make(dtype: torch.dtype, shards: bool) -> tuple[nn.Module, fusedopt.EMA]:
    model: nn.Module = make_model().to(dtype)
    if shards:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, fusedopt.EMA(fusedopt.AdamW(model.parameters()), DECAY, warmup=True)


def train(model: nn.Module, optimizer: fusedopt.EMA, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(model.parameters()):
            gradient = values(tuple(p.shape), 1000 * (step + 1) + i, p.dtype)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        optimizer.step()


def whole(x: Any) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def found(model: nn.Module, optimizer: fusedopt.EMA) -> list[Tensor]:
    averages = [optimizer.average(p) for p in model.parameters()]
    return [whole(x) for x in (*model.parameters(), *averages)]


# ---- what the ranks do ---------------------------------------------------------------------------


def steps_and_checkpoints() -> dict[str, list[Tensor]]:
    results = {}
    for name, dtype in DTYPES.items():
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)  # that of the first rank
        model, optimizer = make(dtype, shards=True)
        train(model, optimizer, range(2))
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        save(state, checkpoint_id=folder[0])
        model, optimizer = make(dtype, shards=True)
        read: dict[str, Any] = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        load(read, checkpoint_id=folder[0])
        model.load_state_dict(read["model"])
        set_optimizer_state_dict(model, optimizer, optim_state_dict=read["optimizer"])
        assert optimizer.param_groups[0]["ema_step"] == 2
        average = optimizer.average(next(model.parameters()))
        assert isinstance(average, DTensor)
        train(model, optimizer, range(2, STEPS))
        results[name] = found(model, optimizer)
    return results


def evaluations() -> dict[str, Tensor]:
    """Evaluate, in the middle of training, which leaves the root's weights gathered."""
    model, optimizer = make(torch.float64, shards=True)
    train(model, optimizer, range(2))
    results = {}
    with torch.no_grad():
        results["before"] = model(batch(0))
        with optimizer.swapped(model):
            results["inside"] = model(batch(0))
        results["after"] = model(batch(0))
    return results


# ---- what has to hold ----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_and_checkpoints_are_those_of_the_whole(ranks: int, tmp_path: Path) -> None:
    expected = {}
    for name, dtype in DTYPES.items():
        model, optimizer = make(dtype, shards=False)
        train(model, optimizer, range(STEPS))
        expected[name] = found(model, optimizer)
    for results in run_ranks(steps_and_checkpoints, ranks, tmp_path):
        for name, tensors in results.items():
            for x, y in zip(tensors, expected[name], strict=True):
                assert_same_bits(x, y)


def test_gathered_weights_are_those_of_now(tmp_path: Path) -> None:
    model, optimizer = make(torch.float64, shards=False)
    train(model, optimizer, range(2))
    with torch.no_grad():
        before = model(batch(0))
        with optimizer.swapped():
            inside = model(batch(0))
    assert not torch.equal(before, inside)
    for results in run_ranks(evaluations, 2, tmp_path):
        for name, expected in (("before", before), ("inside", inside), ("after", before)):
            torch.testing.assert_close(results[name], expected)
