"""DTensors are stepped as their local shards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from torch.nn import Parameter

from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    each_optimizer,
    parameters,
    run_two_ranks,
    set_gradients,
)
from tests.registry import Config


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of one process that talks to nobody."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        store = tmp_path_factory.mktemp("store") / "file"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


@pytest.mark.parametrize("shard", [False, True])
@each_optimizer
def test_dtensors(config: Config, shard: bool, mesh: Any, gather: str) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    placements = [Shard(0) if shard else Replicate()]
    plain = parameters([(8, 4), (3,), (1,) if shard else ()])
    params = [Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in plain]
    optimizer = config.cls(params, **config.kwargs)
    expected = config.cls(plain, **config.kwargs)
    for step in range(2):
        set_gradients(plain, step)
        for p, q in zip(params, plain, strict=True):
            assert q.grad is not None
            p.grad = distribute_tensor(q.grad, mesh, placements)
            if step == 1 and q.dim() == 2:  # another layout of the local tensor
                transposed: Any = distribute_tensor(q.grad.t().contiguous(), mesh, [Replicate()])
                p.grad = transposed.t().redistribute(placements=placements)
        optimizer.step()
        expected.step()
    for state in optimizer.state.values():
        buffers = [value for key, value in state.items() if key != "step"]
        assert all(isinstance(buffer, DTensor) for buffer in buffers)
        assert all(list(buffer.placements) == placements for buffer in buffers)

    def check(a: Tensor, b: Tensor) -> None:
        assert_same_bits(a.to_local() if isinstance(a, DTensor) else a, b)

    assert_same_state(optimizer, expected, check)


TWO_RANKS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

mesh = init_device_mesh("cpu", (2,))

def stepped(cls, **kwargs):
    # The gradient of a replicated parameter is a sum over ranks, as SequenceParallel leaves it.
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    parts = [[1.0, -2.0, 3.0, -4.0], [-3.0, 1.0, 1.0, 1.0]]
    p.grad = DTensor.from_local(torch.tensor(parts[rank]), mesh, [Partial()])
    cls([p], lr=0.1, **kwargs).step()
    return p.to_local().tolist()

def empty_shard():
    p = torch.nn.Parameter(distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)])
    optimizer = fusedopt.AdamW([p], lr=0.1, weight_decay=0)
    optimizer.step()
    exp_avg = optimizer.state[p]["exp_avg"]
    return [list(exp_avg.shape), list(exp_avg.to_local().shape), p.full_tensor().tolist()]

results = {
    "partial": [stepped(fusedopt.SGD), stepped(fusedopt.AdamW), stepped(fusedopt.Lion)],
    "empty": empty_shard(),
}
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of two processes saw."""
    return run_two_ranks(TWO_RANKS, tmp_path_factory.mktemp("store"))


def test_dtensor_gradients_are_reduced_to_the_placement_of_the_parameter(two_ranks: Any) -> None:
    sgd = [1 + 0.1 * 2, 1 + 0.1 * 1, 1 - 0.1 * 4, 1 + 0.1 * 3]
    sign = [1.1, 1.1, 0.9, 1.1]
    for rank in two_ranks:
        assert rank["partial"][0] == pytest.approx(sgd, rel=1e-6)
        assert rank["partial"][1] == pytest.approx([x - 0.001 for x in sign], rel=1e-6)
        assert rank["partial"][2] == pytest.approx(sign, rel=1e-6)


def test_empty_local_shards_get_state(two_ranks: Any) -> None:
    for rank, local_rows in zip(two_ranks, (1, 0), strict=True):
        global_shape, local_shape, p = rank["empty"]
        assert (global_shape, local_shape) == ([1, 4], [local_rows, 4])
        assert p == [pytest.approx([0.9] * 4)]
