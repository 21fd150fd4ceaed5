"""Memory modes on several ranks: FSDP2, DDP and ZeRO have the bits of one process."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

with warnings.catch_warnings():  # torch's own import of what torch calls deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

import fusedopt
from tests.ecosystem.common import OPTIMIZERS
from tests.ecosystem.memory import (
    MAX_NORM,
    MODES,
    UNEVEN,
    Model,
    assert_same,
    distributed,
    each_mode,
    joined,
    make_optimizer,
    numbers,
    train,
)
from tests.ecosystem.ranks import run_ranks

STEPS = 3
# Torch splits shards once more only where that leaves no rest.
EVEN = [(72, 67), (8, 3, 900), (132,)]


class Way(NamedTuple):
    """A way to share parameters among four ranks."""

    mesh: tuple[int, ...]
    takes: str | tuple[str, str]
    """Which dimensions of the mesh."""
    wholes: list[list[int]]
    """Ranks that have all rows of a parameter together, in their order."""
    shapes: list[tuple[int, ...]] = UNEVEN


WAYS = {
    "four ranks": Way((1, 4), "tensor", [[0, 1, 2, 3]]),
    "two ranks": Way((2, 2), "tensor", [[0, 1], [2, 3]]),
    "one rank": Way((4, 1), "tensor", [[0], [1], [2], [3]]),
    "hybrid": Way((2, 2), ("data", "tensor"), [[0, 1], [2, 3]]),
    "tensor parallel": Way((2, 2), "data", [[0, 2, 1, 3]], EVEN),
}
CASES = [
    *((way, "AdamW", mode) for way in WAYS for mode in MODES),
    *(
        ("four ranks", name, mode)
        for name in OPTIMIZERS
        for mode in ("masters, 8 bits", "random, 8 bits")
        if name != "AdamW"
    ),
]


# ---- what the ranks do ---------------------------------------------------------------------------


def split_twice(x: Tensor, p: Any) -> Tensor:
    """Return x, split as p is, which `distribute_tensor` does not do."""
    data, tensor = p.device_mesh.get_coordinate()
    part = x.chunk(2)[tensor].chunk(2)[data]
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False)


@cache  # each mesh makes groups of processes
def mesh_of(*shape: int) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))


def shard(way: str, name: str, mode: str) -> dict[str, Tensor]:
    model = Model(WAYS[way].shapes)
    mesh = mesh_of(*WAYS[way].mesh)
    if way == "tensor parallel":
        for key, p in list(model.named_parameters()):
            rows = distribute_tensor(p.detach(), mesh["tensor"], [Shard(0)])
            model.register_parameter(key, nn.Parameter(rows))
    fully_shard(model, mesh=mesh[WAYS[way].takes])
    optimizer = make_optimizer(name, model, mode)
    split = split_twice if way == "tensor parallel" else distributed
    train(model, optimizer, range(STEPS), split)
    return numbers(model, optimizer)


def replicas(mode: str) -> dict[str, Tensor]:
    """Train on another part of the data on each rank."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(67, 70), nn.Tanh(), nn.Linear(70, 1)).bfloat16()
    model = DistributedDataParallel(model)
    optimizer = make_optimizer("AdamW", model, mode)
    data = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 67, generator=data).bfloat16()).square().mean().backward()
        optimizer.step()
    return numbers(model, optimizer)


def zero(mode: str) -> dict[str, Any]:
    """Step parts of the parameters on each rank, with a checkpoint in between."""

    def make(model: nn.Module) -> Any:
        params = list(model.parameters())
        return ZeroRedundancyOptimizer(params, fusedopt.AdamW, **MODES[mode])

    def resume(model: nn.Module, optimizer: Any) -> Any:
        state = [None]
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            state[0] = optimizer.state_dict()
        dist.broadcast_object_list(state)
        resumed = make(model)
        resumed.load_state_dict(state[0])
        return resumed

    trained = []
    for resumes in (False, True):
        model = Model(UNEVEN)
        optimizer = make(model)
        train(model, optimizer, range(STEPS))
        if resumes:
            optimizer = resume(model, optimizer)
        train(model, optimizer, range(STEPS, 2 * STEPS))
        trained.append(dict(model.state_dict()))
    return {"whole": trained[0], "resumed": trained[1]}


def everything() -> dict[str, Any]:
    return {
        "shards": {" ".join(case): shard(*case) for case in CASES},
        "ddp": {mode: replicas(mode) for mode in MODES},
        "zero": {mode: zero(mode) for mode in MODES},
    }


# ---- what has to hold ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("way", "name", "mode"), CASES)
def test_shards_have_the_bits_of_one_process(
    way: str, name: str, mode: str, ranks: list[Any]
) -> None:
    model = Model(WAYS[way].shapes)
    optimizer = make_optimizer(name, model, mode)
    train(model, optimizer, range(STEPS))
    assert optimizer.grad_norm > MAX_NORM  # it clipped
    expected = numbers(model, optimizer)
    for whole in WAYS[way].wholes:
        parts = [ranks[rank]["shards"][f"{way} {name} {mode}"] for rank in whole]
        assert_same(joined(parts), expected)


@pytest.mark.parametrize(
    ("way", "rows"),
    [("one rank", [9] * 4), ("two ranks", [5, 4] * 2), ("four ranks", [3, 3, 3, 0])],
)
def test_some_shards_are_uneven_and_some_empty(way: str, rows: list[int], ranks: list[Any]) -> None:
    shards = [rank["shards"][f"{way} AdamW masters, 8 bits"]["exp_avg of p3"] for rank in ranks]
    assert [shard.shape[0] for shard in shards] == rows


@each_mode
def test_replicas_stay_equal(mode: str, ranks: list[Any]) -> None:
    for rank in ranks:
        assert_same(rank["ddp"][mode], ranks[0]["ddp"][mode])


@each_mode
def test_zero_keeps_replicas_equal_and_resumes(mode: str, ranks: list[Any]) -> None:
    for rank in ranks:
        for run in ("whole", "resumed"):
            assert_same(rank["zero"][mode][run], ranks[0]["zero"][mode]["whole"])


def test_zero_with_masters_has_the_bits_of_one_process(ranks: list[Any]) -> None:
    """Random bits are others: they go by the place among the parameters that a rank steps."""
    mode = "masters, float32 states"
    model = Model(UNEVEN)
    optimizer = fusedopt.AdamW(model.parameters(), **MODES[mode])
    train(model, optimizer, range(2 * STEPS))
    assert_same(ranks[0]["zero"][mode]["whole"], model.state_dict())
