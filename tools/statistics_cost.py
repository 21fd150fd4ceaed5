"""What the statistics of a step cost: in turn, in one run, beside a pass of their own.

A row a model: AdamW that clips, the same with `track_statistics=True`, and the same followed by
what a loop without them does: torch's foreach norms of gradients, parameters and of the difference
to a copy that was made before the step (the copy's time included), nothing of it waited for.

    python -m tools.statistics_cost [--rounds 20] [--threads 2] [--model "GPT-2 124M"]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.bench.rows import MODELS

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "masters": (torch.bfloat16, {"master_weights": True, "state_dtype": torch.float32}),
}
_REPEATED = 64_000_000  # bytes: a turn of less is several steps, of which the last one counts


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    params: list[Tensor] = [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def watching_by_hand(params: list[Tensor], step: Callable[[], object]) -> None:
    gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]  # all have one
    before = [torch.empty_like(p) for p in params]
    with torch.no_grad():
        torch._foreach_copy_(before, params)
        step()
        torch._foreach_norm(gradients)
        torch._foreach_norm(params)
        torch._foreach_norm(torch._foreach_sub(params, before))


def measure(shapes: list[tuple[int, ...]], mode: str, rounds: int) -> dict[str, list[float]]:
    dtype, options = MODES[mode]
    params = parameters(shapes, dtype)
    plain, watched, by_hand = (
        fusedopt.AdamW(params, max_grad_norm=1.0, track_statistics=track, **options)
        for track in (False, True, False)
    )
    contestants: dict[str, Callable[[], object]] = {
        "clipped": plain.step,
        "with statistics": watched.step,
        "and foreach": lambda: watching_by_hand(params, by_hand.step),
    }
    repeats = 4 if sum(p.nbytes for p in params) * 4 < _REPEATED else 1
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds + 2):
        for name in names[turn % 3 :] + names[: turn % 3]:
            for _ in range(repeats):
                began = time.perf_counter()
                contestants[name]()
                seconds = time.perf_counter() - began
            if turn >= 2:
                times[name].append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--mode", action="append", choices=MODES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, {fusedopt.isas()[0]}; medians of {args.rounds}, in ms")
    for model in args.model or ["GPT-2 124M", "1000 x 1K"]:
        for mode in args.mode or ["float32"]:
            times = measure(MODELS[model], mode, args.rounds)
            base = times["clipped"]
            for name, found in times.items():
                ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
                print(
                    f"{model:<12} {mode:<9} {name:<16} {1e3 * statistics.median(found):9.3f}  "
                    f"best {1e3 * min(found):9.3f}  {100 * (ratio - 1):+6.1f} %",
                    flush=True,
                )


if __name__ == "__main__":
    main()
