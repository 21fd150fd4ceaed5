"""Times what a moving average adds to a step of AdamW: ours, and torch's fused one and averaging.

``python -m tools.ema_cost`` takes a minute and 6 GB, and wants a quiet machine. All steps take
turns on the tensors of GPT-2 124M.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn import Parameter, ParameterList
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from fusedopt.bench.rows import MODELS

MODEL = "GPT-2 124M"
SECONDS, DECAY = 50.0, 0.999

AVERAGED = "fusedopt EMA(AdamW)"
TORCHS = "torch AdamW, fused, and AveragedModel"


def contestants(params: list[Parameter]) -> dict[str, Callable[[], Any]]:
    """Return the steps, by name."""
    torchs = torch.optim.AdamW(params, fused=True)
    model = ParameterList(params)
    average = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]  # of torch
    averaged = AveragedModel(model, multi_avg_fn=average)

    def step_and_average() -> None:
        torchs.step()
        averaged.update_parameters(model)

    return {
        "fusedopt AdamW": fusedopt.AdamW(params).step,
        AVERAGED: fusedopt.EMA(fusedopt.AdamW(params), DECAY).step,
        "torch AdamW, fused": torchs.step,
        TORCHS: step_and_average,
    }


def measure(shapes: list[tuple[int, ...]], seconds: float) -> dict[str, float]:
    """Return the median milliseconds of each, in turn for so many seconds."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 0.1
    steps = contestants(params)
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(some) for name, some in times.items()}


def main() -> None:
    """Print a line for each, and what averages add."""
    ours, averaged, torchs, averaged_by_torch = found = list(
        measure(MODELS[MODEL], SECONDS).items()
    )
    for name, milliseconds in found:
        print(f"{name:40} {milliseconds:8.2f} ms")
    added, added_by_torch = averaged[1] - ours[1], averaged_by_torch[1] - torchs[1]
    print(
        f"an average in the step: {averaged[1] / ours[1]:.2f} x AdamW, {added:.2f} ms; "
        f"torch's takes {added_by_torch:.2f} ms, {added_by_torch / added:.1f} x as long"
    )


if __name__ == "__main__":
    main()
