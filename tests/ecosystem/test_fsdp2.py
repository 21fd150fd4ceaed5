"""FSDP2: steps on shards are steps on the whole, for every optimizer, mesh and placement."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedopt
from tests.ecosystem.common import (
    OPTIMIZERS,
    backward,
    batch,
    each_name,
    make_model,
    part_of_batch,
)
from tests.ecosystem.ranks import run_ranks
from tests.helpers import assert_same_bits, assert_within

STEPS = 4
MAX_NORM = 0.1  # of gradients with norms of about 1 to 5


class Sharded(NamedTuple):
    """A model that several processes share, and how to start the same one in a single process."""

    model: nn.Module
    data: tuple[int, int]
    """Which part of the data this rank sees, and of how many."""
    widths: tuple[int, int] = (5, 6)
    plain: tuple[Any, ...] = ()
    """Parameters that every rank has as a whole, and whose gradients it has to average."""


# ---- ways to share a model -----------------------------------------------------------------------


@cache  # each mesh makes groups of processes, with threads and sockets of their own
def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _fully(model: nn.Sequential, mesh: Any, **kwargs: Any) -> Any:
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def one_dimension() -> Sharded:
    size = dist.get_world_size()
    model = _fully(make_model(), mesh_of(size))
    return Sharded(model, (dist.get_rank(), size))


def hybrid() -> Sharded:
    """Shards in pairs, and replicas of the pairs."""
    size = dist.get_world_size()
    mesh = mesh_of(size // 2, 2, names=("replicate", "shard"))
    return Sharded(_fully(make_model(), mesh), (dist.get_rank(), size))


def plain_ones_too() -> Sharded:
    size = dist.get_world_size()
    model = make_model()
    plain: tuple[Any, ...] = (model[2].bias, model[4].weight)
    _fully(model, mesh_of(size), ignored_params=set(plain))
    return Sharded(model, (dist.get_rank(), size), plain=plain)


def tensor_parallel() -> Sharded:
    """Rows are split over one dimension of the mesh, then over the other: strided shards.

    The last layer is shared over the other dimension alone: it has a mesh of its own.
    """
    size = dist.get_world_size()
    mesh = mesh_of(size // 2, 2, names=("data", "tensor"))
    model = make_model(8, 6)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    _fully(model, mesh["data"])
    return Sharded(model, (mesh.get_local_rank("data"), size // 2), widths=(8, 6))


WAYS: dict[str, Callable[[], Sharded]] = {
    way.__name__: way for way in (one_dimension, hybrid, plain_ones_too, tensor_parallel)
}
# Without clipping, with max_grad_norm, with clip_grad_norm_, and stepped during backward.
CASES = [
    *((name, mode) for name in OPTIMIZERS for mode in ("none", "inside", "released")),
    ("AdamW", "method"),
]


# ---- what the ranks do ---------------------------------------------------------------------------


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def make_optimizer(name: str, params: Any, mode: str) -> Any:
    return OPTIMIZERS[name](params, max_grad_norm=MAX_NORM if mode == "inside" else None)


def average(params: tuple[Any, ...]) -> None:
    for p in params:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def trained(way: str, name: str, mode: str) -> dict[str, Any]:
    """Train a shared model, and a copy that is not shared from the same gradients."""
    shared = WAYS[way]()
    params = list(shared.model.parameters())
    optimizer = make_optimizer(name, params, mode)
    copies = [nn.Parameter(whole(p)) for p in params]
    replay = make_optimizer(name, copies, "none")
    if mode == "released":
        fusedopt.release_gradients(shared.model, optimizer)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(shared.model, part_of_batch(step, *shared.data))
        if mode == "released":
            assert all(p.grad is None for p in params)
            optimizer.step()
            continue
        average(shared.plain)
        for p, copy in zip(params, copies, strict=True):
            assert p.grad is not None
            copy.grad = whole(p.grad)
        if mode == "method":
            optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        replay.step()
        norms.append(None if mode == "none" else optimizer.grad_norm)
    return {
        "params": [whole(p) for p in params],
        "replayed": [p.detach() for p in copies],
        "norms": norms,
        "placements": sorted({str(p.placements) for p in params if isinstance(p, DTensor)}),
        "empty": any(p.to_local().numel() == 0 for p in params if isinstance(p, DTensor)),
    }


def everything() -> dict[str, Any]:
    return {
        f"{way} {name} {mode}": trained(way, name, mode)
        for way in WAYS
        for name, mode in CASES
        # The ranks are to average plain gradients after backward, and these are gone by then.
        if (way, mode) != ("plain_ones_too", "released")
    }


# ---- what has to hold ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(everything, request.param, tmp_path_factory.mktemp("fsdp2"))


each_way = pytest.mark.parametrize("way", WAYS)


def in_one_process(name: str, mode: str, widths: tuple[int, int]) -> tuple[Any, list[Any]]:
    model = make_model(*widths)
    optimizer = make_optimizer(name, model.parameters(), mode)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, batch(step))
        if mode == "method":
            optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return model, norms


@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if case[1] != "released"])
@each_way
def test_it_is_a_single_process_on_the_whole_batch(
    way: str, name: str, mode: str, ranks: list[Any]
) -> None:
    widths = (8, 6) if way == "tensor_parallel" else (5, 6)
    model, norms = in_one_process(name, mode, widths)
    for rank in ranks:
        result = rank[f"{way} {name} {mode}"]
        # The mean of the gradients is added up in another order.
        for p, q in zip(result["params"], model.parameters(), strict=True):
            assert_within(p, q.detach(), rtol=1e-9)
        if mode != "none":
            assert min(norms) > MAX_NORM  # it clipped
            for norm, expected in zip(result["norms"], norms, strict=True):
                assert_within(norm, expected, rtol=2.0**-23)


@each_name
@each_way
def test_the_same_gradients_give_the_same_bits(way: str, name: str, ranks: list[Any]) -> None:
    for rank in ranks:
        result = rank[f"{way} {name} none"]
        for p, q in zip(result["params"], result["replayed"], strict=True):
            assert_same_bits(p, q)


@each_name
@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain_ones_too"])
def test_released_gradients_give_the_same_bits(way: str, name: str, ranks: list[Any]) -> None:
    for rank in ranks:
        released, plain = (rank[f"{way} {name} {mode}"] for mode in ("released", "none"))
        for p, q in zip(released["params"], plain["params"], strict=True):
            assert_same_bits(p, q)


@pytest.mark.parametrize("mode", ["inside", "method"])
@each_way
def test_ranks_agree_bit_for_bit(way: str, mode: str, ranks: list[Any]) -> None:
    first, *others = (rank[f"{way} AdamW {mode}"] for rank in ranks)
    for other in others:
        for key in ("norms", "params"):
            for a, b in zip(first[key], other[key], strict=True):
                assert_same_bits(a, b)


def test_every_placement_was_there(ranks: list[Any]) -> None:
    results = [result for rank in ranks for result in rank.values()]
    placements = " ".join(text for result in results for text in result["placements"])
    for placement in ("Replicate()", "_StridedShard(dim=0", "Shard(dim=1)", "(Shard(dim=0),)"):
        assert placement in placements
    assert any(result["empty"] for result in results)
