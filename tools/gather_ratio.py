"""Prints as JSON what fusedopt sees of torch, and how much longer a step by attributes takes."""

from __future__ import annotations

import json
import time

import torch

import fusedopt
from fusedopt import _core, _engine

TENSORS, STEPS = 1000, 30


def seconds(optimizer: fusedopt.AdamW, fast: bool) -> float:
    before = _engine.engine
    _engine.engine = _core.Engine(fast_gather=fast)
    began = time.perf_counter()
    optimizer.step()
    took = time.perf_counter() - began
    _engine.engine = before
    return took


def main() -> None:
    torch.set_num_threads(1)
    params = [torch.zeros(8, requires_grad=True) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedopt.AdamW(params)
    seconds(optimizer, True)
    times = [(seconds(optimizer, True), seconds(optimizer, False)) for _ in range(STEPS)]
    fast, slow = (min(column) for column in zip(*times, strict=True))
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "fast_gather": _engine.engine.fast_gather,
                "times_slower_by_attributes": round(slow / fast, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
