"""Clipping in several processes: every rank sees the same norm, and the replicas stay equal."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from tests.helpers import run_two_ranks

REPLICAS = """
import hashlib
from torch.nn.parallel import DistributedDataParallel

def trained(cls, **kwargs):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(
        torch.nn.Linear(33, 60), torch.nn.Tanh(), torch.nn.Linear(60, 5)
    ))
    optimizer = cls(model.parameters(), max_grad_norm=0.1, **kwargs)
    data = torch.Generator().manual_seed(1 + rank)
    norms = []
    for step in range(100):
        x = torch.randn(8, 33, generator=data)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
    parts = [p.detach().numpy().tobytes() for p in model.parameters()]
    return [hashlib.sha256(b"".join(parts)).hexdigest(), norms]

results = {
    "SGD": trained(fusedopt.SGD, lr=0.1, momentum=0.9),
    "AdamW": trained(fusedopt.AdamW, lr=0.01),
    "Lion": trained(fusedopt.Lion, lr=0.001),
}
"""

DTENSORS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

mesh = init_device_mesh("cpu", (2,))
square = init_device_mesh("cpu", (1, 2))

def tensors(seed):
    # Uneven and empty shards, a mesh of two dimensions, replicas, and a plain tensor.
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 4), (1, 3), (6,), (4, 4), (7,)]
    return [torch.randn(shape, generator=generator) for shape in shapes]

def shared(xs):
    where = [
        (mesh, [Shard(0)]), (mesh, [Shard(0)]), (mesh, [Replicate()]),
        (square, [Replicate(), Shard(1)]),
    ]
    return [distribute_tensor(x, *at) for x, at in zip(xs, where)] + xs[len(where):]

def trained(cls, split, clip, **kwargs):
    params = [torch.nn.Parameter(x) for x in split(tensors(0))]
    optimizer = cls(params, max_grad_norm=0.5 if clip == "inside" else None, **kwargs)
    for step in range(3):
        for p, g in zip(params, split(tensors(1 + step))):
            p.grad = g
        if clip == "method":
            optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in params]
    return [optimizer.grad_norm.item(), [x.detach().flatten().tolist() for x in whole]]

def partial_norms():
    # Each rank has a part of the sum: the norm is of the sum.
    parts = [DTensor.from_local(torch.full((4,), 1.0 + 2 * rank), mesh, [Partial()])]
    return [fusedopt.get_total_norm(parts, order).item() for order in (1, 2, float("inf"), 3)]

results = {
    clip: {
        cls.__name__: [trained(cls, split, clip, lr=0.1) for split in (shared, list)]
        for cls in (fusedopt.SGD, fusedopt.AdamW, fusedopt.Lion)
    }
    for clip in ("inside", "method")
}
results["partial"] = partial_norms()
results["orders"] = [
    [fusedopt.get_total_norm(split(tensors(0)), order).item() for order in (1, 2, float("inf"), 3)]
    for split in (shared, list)
]
"""


@pytest.fixture(scope="module")
def dtensors(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_two_ranks(DTENSORS, tmp_path_factory.mktemp("store"))


def test_replicas_stay_bit_identical_with_clipping(tmp_path: pathlib.Path) -> None:
    first, second = run_two_ranks(REPLICAS, tmp_path)
    assert first == second
    for _, norms in first.values():
        assert max(norms) > 0.1  # it clipped


@pytest.mark.parametrize("clip", ["inside", "method"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_clipping_shards_is_clipping_the_whole(dtensors: Any, name: str, clip: str) -> None:
    first, second = dtensors
    assert first[clip] == second[clip]
    (norm, params), (whole_norm, whole_params) = first[clip][name]
    assert norm == pytest.approx(whole_norm, rel=2.0**-23)
    for p, q in zip(params, whole_params, strict=True):
        assert p == pytest.approx(q, rel=1e-5, abs=1e-7)  # the last digit of the factor


def test_norms_of_shards_are_norms_of_the_whole(dtensors: Any) -> None:
    for rank in dtensors:
        shared, whole = rank["orders"]
        assert shared == pytest.approx(whole, rel=2.0**-23)
        assert rank["partial"] == pytest.approx([16, 8, 4, (4 * 4**3) ** (1 / 3)])
