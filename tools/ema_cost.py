"""Times what a moving average adds to a step of AdamW: ours, and torch's fused one and averaging.

``python -m tools.ema_cost`` takes a minute and 12 GB, and wants a quiet machine. All steps take
turns, each on tensors of its own in the shapes of GPT-2 124M.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterList
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from fusedopt.bench.contestants import OURS, Build, Contestant
from fusedopt.bench.measure import measure
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import Row

DECAY = 0.999
AVERAGED, TORCHS, AVERAGED_BY_TORCH = "EMA(AdamW)", "torch fused", "torch fused, AveragedModel"


def averaged_by_torch(row: Row, params: list[Tensor]) -> Step:
    """Return a step of torch's, and then the fastest of its averages."""
    optimizer = torch.optim.AdamW(params, fused=True)
    model = ParameterList([Parameter(p) for p in params])
    average = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]  # of torch
    averaged = AveragedModel(model, multi_avg_fn=average)

    def step() -> None:
        optimizer.step()
        averaged.update_parameters(model)

    return step


WAYS: dict[str, Build] = {
    OURS: lambda row, params: fusedopt.AdamW(params).step,
    AVERAGED: lambda row, params: fusedopt.EMA(fusedopt.AdamW(params), DECAY).step,
    TORCHS: lambda row, params: torch.optim.AdamW(params, fused=True).step,
    AVERAGED_BY_TORCH: averaged_by_torch,
}


def main(model: str = "GPT-2 124M", seconds: float = 50.0) -> None:
    """Print a line for each, and what averages add."""
    row = Row(model, "AdamW", threads=torch.get_num_threads(), device="cpu")
    contestants = [
        # (Whether averages are right is the tests' to say.)
        Contestant(name, lambda row: True, build, check=lambda build, row: "")
        for name, build in WAYS.items()
    ]
    timings = {t.name: t for t in measure(row, contestants, budget=seconds).timings}
    for name, timing in timings.items():
        print(f"{name:28} {timing.milliseconds:8.2f} ms, spread {timing.spread:.0%}")
    ours, averaged, torchs, by_torch = (timings[name].milliseconds for name in WAYS)
    print(
        f"an average in the step: {averaged / ours:.2f} x AdamW, {averaged - ours:.2f} ms; torch's "
        f"takes {by_torch - torchs:.2f} ms, {(by_torch - torchs) / (averaged - ours):.1f} x as long"
    )


if __name__ == "__main__":
    main()
