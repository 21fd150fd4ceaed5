"""Time of one optimizer step against torch's own, contestants interleaved in one process.

python -m benchmarks.step_time [--rows TEXT] [--repeats N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import fusedopt
from fusedopt import _base, _core
from tests.registry import SHAPES


class Row(NamedTuple):
    """One optimizer on one set of shapes, and what it has to reach."""

    shapes: str
    optimizer: str
    dtype: torch.dtype = torch.float32
    peers: tuple[str, ...] = ("fused",)
    goal: float = 1.0
    """Times faster than the best of the peers."""
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        suffix = "" if self.dtype == torch.float32 else " bf16"
        return f"{self.shapes}, {self.optimizer}{suffix}"


ROWS = [
    Row("1000 x 1K", "AdamW", goal=7),
    Row("2000 x 16", "AdamW", goal=7),
    Row("10 x 1M", "AdamW"),
    Row("GPT-2 124M", "AdamW", goal=1.1),
    Row("GPT-2 124M", "AdamW", torch.bfloat16, goal=1.25),
    Row("GPT-2 124M", "SGD", kwargs=(("lr", 0.1), ("momentum", 0.9))),
    Row("GPT-2 124M", "RMSprop", peers=("loop", "foreach"), goal=4.5),
    Row("GPT-2 124M", "Adagrad", peers=("fused", "foreach")),
    Row("GPT-2 124M", "RAdam", peers=("loop", "foreach"), goal=5),
    Row("GPT-2 124M", "Lion", peers=("lion-pytorch",), goal=4.5),
]


def make_params(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Return parameters with gradients, values of an ordinary size."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator).mul_(0.02).to(dtype).requires_grad_()
        p.grad = torch.randn(shape, generator=generator).mul_(1e-3).to(dtype)
        params.append(p)
    return params


def make_optimizer(row: Row, contestant: str, params: list[Tensor]) -> torch.optim.Optimizer:
    if contestant == "fusedopt":
        return getattr(fusedopt, row.optimizer)(params, **dict(row.kwargs))
    if contestant == "lion-pytorch":
        from lion_pytorch import Lion  # noqa: PLC0415  (an optional peer)

        return Lion(params, **dict(row.kwargs))
    flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
    return getattr(torch.optim, row.optimizer)(params, **dict(row.kwargs), **flags[contestant])


def assert_same_numbers(row: Row, contestants: list[str]) -> None:
    """A contestant that computes something else is not worth timing."""
    results = []
    for contestant in contestants:
        params = make_params(SHAPES[row.shapes][:3], row.dtype)
        optimizer = make_optimizer(row, contestant, params)
        for _ in range(3):
            optimizer.step()
        results.append(params)
    tolerance = 1e-6 if row.dtype == torch.float32 else 2**-8
    for contestant, params in zip(contestants[1:], results[1:], strict=True):
        for ours, theirs in zip(results[0], params, strict=True):
            if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2):
                print(f"  {row}: the numbers of {contestant} differ from fusedopt's")
                break


def bytes_per_step(row: Row) -> int:
    """Each parameter, gradient and state is read, all but the gradient are written."""
    states = 2 if row.optimizer in ("AdamW", "RAdam") else 1
    numel = sum(math.prod(shape) for shape in SHAPES[row.shapes])
    return numel * (3 + 2 * states) * row.dtype.itemsize


def probe(row: Row) -> Callable[[], None]:
    """Return the memory traffic of a step with next to no arithmetic, on memory of its own."""
    n = bytes_per_step(row) // 28
    arrays = [torch.zeros(n) for _ in range(4)]

    def run() -> None:
        _core.stream_like_adam([x.data_ptr() for x in arrays], n, torch.get_num_threads())

    return run


def measure(row: Row, repeats: int) -> dict[str, Any]:
    """Interleave all contestants and the bandwidth probe; medians in milliseconds."""
    contestants = ["fusedopt", *row.peers]
    assert_same_numbers(row, contestants)
    steps: dict[str, Callable[[], Any]] = {}
    for contestant in contestants:
        optimizer = make_optimizer(row, contestant, make_params(SHAPES[row.shapes], row.dtype))
        steps[contestant] = optimizer.step
    steps["probe"] = probe(row)
    for step in steps.values():  # touches every page
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "row": str(row),
        "milliseconds": medians,
        "spread": {name: _spread(values) for name, values in times.items()},
        "ratio": min(medians[peer] for peer in row.peers) / medians["fusedopt"],
        "goal": row.goal,
        "gigabytes_per_second": bytes_per_step(row) / medians["fusedopt"] / 1e6,
        "share_of_bandwidth": medians["probe"] / medians["fusedopt"],
        "microseconds_per_tensor": medians["fusedopt"] * 1e3 / len(SHAPES[row.shapes]),
    }


def _spread(values: list[float]) -> float:
    """Return the interquartile range over the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def machine() -> dict[str, Any]:
    """Return what a figure is worth nothing without."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "isa": _base.engine.isa,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
    }


def line(row: Row, result: dict[str, Any]) -> str:
    """Return a row of the table."""
    times = result["milliseconds"]
    ours = times["fusedopt"]
    peers = [f"{peer} {times[peer]:.2f} ms = {times[peer] / ours:.2f}x" for peer in row.peers]
    text = (
        f"{row!s:<28}{ours:>8.2f} ms{result['spread']['fusedopt']:>8.0%}"
        f"{result['gigabytes_per_second']:>7.1f}{result['share_of_bandwidth']:>9.0%}"
        f"  {', '.join(peers)} (goal {row.goal}x)"
    )
    if len(SHAPES[row.shapes]) >= 1000:
        text += f"; {result['microseconds_per_tensor']:.2f} us a tensor"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--repeats", type=int, default=0, help="default: by the size of the row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    header = f"{'row':<28}{'fusedopt':>11}{'spread':>8}{'GB/s':>7}{'of limit':>9}"
    print(header + "  peers and ratio to them")
    rows = [row for row in ROWS if arguments.rows in str(row)]
    results = []
    for row in tqdm(rows, leave=False, disable=None):
        repeats = arguments.repeats or max(15, min(300, int(4e9 / bytes_per_step(row))))
        try:
            result = measure(row, repeats)
        except ImportError as error:
            tqdm.write(f"{row!s:<28} skipped: {error}")
            continue
        results.append(result)
        tqdm.write(line(row, result))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": results}, indent=1))


if __name__ == "__main__":
    main()
