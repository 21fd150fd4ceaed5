"""Muon with FSDP2: matrices are made orthogonal as a whole, each on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedopt
from fusedopt import _batches
from tests.ecosystem.common import backward, batch, part_of_batch
from tests.ecosystem.ranks import run_ranks
from tests.helpers import assert_same_bits, assert_within, values

STEPS = 4
MAX_NORM = 0.1
WIDTHS = (8, 6)


def make_model() -> nn.Sequential:
    """Return a model that, split over 2 or 4 ranks, has uneven shards and empty ones."""
    torch.manual_seed(0)
    first, second = WIDTHS
    layers = [nn.Linear(7, first), nn.Linear(first, second), nn.Linear(second, second)]
    layers += [nn.Linear(second, 2), nn.Linear(2, 1)]
    return nn.Sequential(
        *(each for layer in layers[:-1] for each in (layer, nn.Tanh())), layers[-1]
    ).double()


def make_optimizer(model: nn.Module, **kwargs: Any) -> fusedopt.MuonWithAuxAdam:
    groups = fusedopt.muon_groups(model, choose=lambda _, p: True if p.ndim == 2 else None)
    return fusedopt.MuonWithAuxAdam(groups, lr=0.05, **kwargs)


def replicated() -> nn.Module:
    model = make_model()
    for p in model.parameters():
        dist.broadcast(p.detach(), 0)
    return model


def fully(mesh: Any, model: Any = None, **kwargs: Any) -> nn.Module:
    model = make_model() if model is None else model
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def one_dimension() -> nn.Module:
    return fully(init_device_mesh("cpu", (dist.get_world_size(),)))


def columns() -> nn.Module:
    """Even columns: what FSDP2 asks for."""
    size = dist.get_world_size()

    def place(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p.ndim == 2 and p.shape[1] % size == 0 else None

    return fully(init_device_mesh("cpu", (size,)), shard_placement_fn=place)


def hybrid() -> nn.Module:
    shape = (dist.get_world_size() // 2, 2)
    return fully(init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def tensor_parallel() -> nn.Module:
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    model = make_model()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully(mesh["data"], model)


WAYS = {way.__name__: way for way in (one_dimension, columns, hybrid, tensor_parallel)}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": MAX_NORM},
    "without a look ahead": {"nesterov": False},
    "one matrix a wave": {},
}


def data(way: str) -> tuple[int, int]:
    size, rank = dist.get_world_size(), dist.get_rank()
    if way == "tensor_parallel":
        return rank // 2, size // 2
    return rank, size


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def trained(way: str, mode: str) -> dict[str, Any]:
    model = WAYS[way]()
    optimizer = make_optimizer(model, **MODES[mode])
    most = _batches.CHUNK_BYTES
    _batches.CHUNK_BYTES = 1 if mode == "one matrix a wave" else most
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, part_of_batch(step, *data(way)))
        optimizer.step()
    _batches.CHUNK_BYTES = most
    buffers = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    return {
        "params": [whole(p) for p in model.parameters()],
        "norm": optimizer.grad_norm,
        "split": [isinstance(b, DTensor) for b in buffers if b is not None],
    }


def everything() -> dict[str, Any]:
    return {f"{way} {mode}": trained(way, mode) for way in WAYS for mode in MODES}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(everything, request.param, tmp_path_factory.mktemp("muon"))


def in_one_process(mode: str) -> tuple[nn.Module, Any]:
    model = make_model()
    optimizer = make_optimizer(model, **MODES[mode])
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, batch(step))
        optimizer.step()
    return model, optimizer.grad_norm


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_a_single_process_on_the_whole_batch(way: str, mode: str, ranks: list[Any]) -> None:
    model, norm = in_one_process(mode)
    for rank in ranks:
        result = rank[f"{way} {mode}"]
        for p, q in zip(result["params"], model.parameters(), strict=True):
            # The mean of the gradients is added up in another order.
            assert_within(p, q.detach(), rtol=1e-9)
        assert any(result["split"])
        if mode == "clipped":
            assert norm > MAX_NORM
            assert_within(result["norm"], norm, rtol=2.0**-23)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_agree_bit_for_bit(way: str, mode: str, ranks: list[Any]) -> None:
    first, *others = (rank[f"{way} {mode}"] for rank in ranks)
    for other in others:
        for a, b in zip(first["params"], other["params"], strict=True):
            assert_same_bits(a, b)


# ---- memory modes --------------------------------------------------------------------------------

MEMORY: dict[str, dict[str, Any]] = {
    "masters": {"master_weights": True, "state_dtype": torch.float32},
    "momentum in bfloat16": {"master_weights": True},
    "momentum in 8 bits": {"master_weights": True, "state_dtype": "mxfp8"},
    "rounded at random": {"stochastic_rounding": True},
}


def stepped_as_a_whole_and_in_parts(options: dict[str, Any]) -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = [(72, 64), (64, 72), (9, 33), (72, 64)]
    plain = [nn.Parameter(values(s, i, torch.bfloat16)) for i, s in enumerate(shapes)]
    parts = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    found = []
    optimizers = [fusedopt.Muon(params, lr=0.02, **options) for params in (plain, parts)]
    for step in range(STEPS):
        for i, (p, q) in enumerate(zip(plain, parts, strict=True)):
            gradient = values(shapes[i], 100 * (step + 1) + i, torch.bfloat16)
            p.grad, q.grad = gradient, distribute_tensor(gradient.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for optimizer, params in zip(optimizers, (plain, parts), strict=True):
        found.append([whole(optimizer._master(p)) for p in params])
    return found


def all_memory_modes() -> dict[str, Any]:
    return {mode: stepped_as_a_whole_and_in_parts(options) for mode, options in MEMORY.items()}


@pytest.fixture(scope="module")
def in_memory_modes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(all_memory_modes, 2, tmp_path_factory.mktemp("muon_memory"))


@pytest.mark.parametrize("mode", MEMORY)
def test_memory_modes_on_ranks_are_those_of_one_process(mode: str, in_memory_modes: Any) -> None:
    for rank in in_memory_modes:
        for p, q in zip(*rank[mode], strict=True):
            assert not torch.equal(p, torch.zeros_like(p))
            torch.testing.assert_close(q, p, rtol=0, atol=1e-6)
