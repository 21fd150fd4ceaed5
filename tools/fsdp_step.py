"""Time of one step on DTensor parameters, as FSDP2 leaves them, against torch's own.

python -m tools.fsdp_step [--params N] [--numel N] [--repeats N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fusedopt


def make_params(count: int, numel: int, mesh: Any) -> list[Any]:
    """Return parameters with gradients: DTensors on a mesh, or plain ones without."""

    def make() -> Any:
        x = torch.randn(numel)
        return x if mesh is None else distribute_tensor(x, mesh, [Shard(0)])

    params: list[Any] = [torch.nn.Parameter(make()) for _ in range(count)]
    for p in params:
        p.grad = make()
    return params


def contestants(count: int, numel: int, mesh: Any) -> dict[str, Callable[[], Any]]:
    params = make_params(count, numel, mesh)
    torchs = torch.optim.AdamW(params, fused=True)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        torchs.step()

    clipping = fusedopt.AdamW(make_params(count, numel, mesh), max_grad_norm=1.0)
    return {
        "fusedopt, plain tensors": fusedopt.AdamW(make_params(count, numel, None)).step,
        "fusedopt": fusedopt.AdamW(make_params(count, numel, mesh)).step,
        "torch fused": torch.optim.AdamW(make_params(count, numel, mesh), fused=True).step,
        "fusedopt, clipping": clipping.step,
        "torch fused, clipping": clip_and_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=500)
    parser.add_argument("--numel", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as directory:
        store = f"file://{Path(directory) / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        steps = contestants(arguments.params, arguments.numel, mesh)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.repeats + 3):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - start) * 1e3)
        dist.destroy_process_group()
    for name, all_times in times.items():
        print(f"{name:24} {statistics.median(all_times[3:]):7.3f} ms")


if __name__ == "__main__":
    main()
