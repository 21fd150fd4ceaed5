"""DistributedDataParallel and ZeroRedundancyOptimizer: the single process on the whole batch."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

with warnings.catch_warnings():  # torch's own import of what torch calls deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

import fusedopt
from tests.ecosystem.common import (
    OPTIMIZERS,
    backward,
    batch,
    each_name,
    make_model,
    part_of_batch,
    train,
)
from tests.ecosystem.ranks import run_ranks
from tests.helpers import assert_same_bits, assert_within
from tests.registry import PLAIN_CONFIGS

STEPS = 4
MAX_NORM = 0.1
PARTS = 2  # of a batch whose gradients are accumulated

# How DDP and ZeRO keep their memory, and whether gradients are clipped.
MODES = ("copies", "views", "clipped", "accumulated")
# ZeroRedundancyOptimizer makes the optimizer from its class: no Lookahead.
# (It cuts groups itself, and those of MuonWithAuxAdam have to say use_muon.)
ZERO = [config.name for config in PLAIN_CONFIGS if config.name != "MuonWithAuxAdam"]


# ---- what the ranks do ---------------------------------------------------------------------------


def data_parallel(model: nn.Module, mode: str) -> Any:
    return DistributedDataParallel(model, gradient_as_bucket_view=mode != "copies")


def stepped(model: Any, optimizer: Any, mode: str) -> list[torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = part_of_batch(step, rank, size).chunk(PARTS if mode == "accumulated" else 1)
        for i, part in enumerate(parts):
            with model.no_sync() if i < len(parts) - 1 else nullcontext():
                backward(model, part)
        if mode == "accumulated":
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= PARTS
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def with_ddp(name: str, mode: str) -> list[torch.Tensor]:
    model = data_parallel(make_model(), mode)
    clip = MAX_NORM if mode == "clipped" else None
    return stepped(model, OPTIMIZERS[name](model.parameters(), max_grad_norm=clip), mode)


def with_zero(name: str, mode: str) -> list[torch.Tensor]:
    """Split the state of three parameters over four ranks: one has none."""
    plain = make_model()
    for p in (*plain[0].parameters(), plain[2].bias):
        p.requires_grad_(False)
    model = data_parallel(plain, mode)
    config = next(config for config in PLAIN_CONFIGS if config.name == name)
    optimizer = ZeroRedundancyOptimizer(
        [p for p in model.parameters() if p.requires_grad],
        config.cls,
        parameters_as_bucket_view=mode != "copies",
        **config.kwargs,
    )
    result = stepped(model, optimizer, mode)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        assert len(optimizer.state_dict()["state"]) == 3
    return result


def groups_of_zero() -> int:
    """Return how many parameters this rank steps."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = ZeroRedundancyOptimizer(params, fusedopt.AdamW)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert all(torch.equal(p, params[0]) for p in params)
    return sum(len(group["params"]) for group in optimizer.optim.param_groups)


def refused_release() -> str:
    model = data_parallel(make_model(), "copies")
    with pytest.raises(TypeError) as error:
        fusedopt.release_gradients(model, fusedopt.AdamW(model.parameters()))
    return str(error.value)


def everything() -> dict[str, Any]:
    results: dict[str, Any] = {"groups": groups_of_zero(), "refused": refused_release()}
    for mode in MODES:
        for name in OPTIMIZERS:
            results[f"ddp {name} {mode}"] = with_ddp(name, mode)
        for name in ZERO if mode != "clipped" else []:
            results[f"zero {name} {mode}"] = with_zero(name, mode)
    return results


# ---- what has to hold ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ddp"))


def assert_ranks_have(ranks: list[Any], key: str, expected: nn.Module) -> None:
    for rank in ranks:
        for p, q, of_first in zip(rank[key], expected.parameters(), ranks[0][key], strict=True):
            # The mean of the gradients is added up in another order.
            assert_within(p, q.detach(), rtol=1e-9)
            assert_same_bits(p, of_first)


@pytest.mark.parametrize("mode", MODES)
@each_name
def test_ddp_is_a_single_process_on_the_whole_batch(name: str, mode: str, ranks: list[Any]) -> None:
    model = make_model()
    clip = MAX_NORM if mode == "clipped" else None
    train(model, OPTIMIZERS[name](model.parameters(), max_grad_norm=clip), STEPS)
    assert_ranks_have(ranks, f"ddp {name} {mode}", model)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "clipped"])
@pytest.mark.parametrize("name", ZERO)
def test_zero_is_a_single_process_too(name: str, mode: str, ranks: list[Any]) -> None:
    model = make_model()
    trained = [model[2].weight, *model[4].parameters()]
    optimizer = OPTIMIZERS[name](trained)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, batch(step))
        optimizer.step()
    assert_ranks_have(ranks, f"zero {name} {mode}", model)


def test_some_rank_of_zero_has_an_empty_group(ranks: list[Any]) -> None:
    assert sorted(rank["groups"] for rank in ranks) == [0, 1, 1, 1]


def test_release_under_ddp_is_refused(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "before DistributedDataParallel has averaged" in rank["refused"]
