"""Statistics of a step as float64 operators of torch find them: from outside, before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers import all_params

HALVES = (torch.bfloat16, torch.float16)
RTOL = 1e-6

Expected = dict[str, list[float]]


def numbers_of(optimizer: Any, p: Any) -> Tensor:
    """What the rule sees of a parameter, in float64: its master where it has one."""
    if p.dtype == torch.bfloat16 and "remainder" in optimizer.state.get(p, {}):
        high = p.detach().view(torch.int16).to(torch.int32) << 16
        low = optimizer.state[p]["remainder"].to(torch.int32)
        return (high + low).view(torch.float32).double()
    if p.dtype == torch.float16 and "master" in optimizer.state.get(p, {}):
        return optimizer.state[p]["master"].double().clone()
    return (p.detach() * 1).to(torch.complex128 if p.is_complex() else torch.float64)


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) if x.numel() else 0.0


def watched(optimizer: Any, step: Callable[[], object], unscale: float = 1.0) -> Expected:
    """Take a step, and return what is to be the statistics of it."""
    params: list[Any] = [p for p in all_params(optimizer) if p.grad is not None]
    gradients = [p.grad.detach().to_dense() for p in params]
    wide = [g.to(torch.complex128 if g.is_complex() else torch.float64) for g in gradients]
    before = [numbers_of(optimizer, p).clone() for p in params]
    step()
    after = [numbers_of(optimizer, p) for p in params]
    moved = [a - b for a, b in zip(after, before, strict=True)]
    has_master = getattr(optimizer, "master_weights", False)
    counts = [p.dtype in HALVES and not has_master for p in params]
    return {
        "numel": [p.numel() for p in params],
        "grad_norm": [norm(g) * unscale for g in wide],
        "nonfinite": [
            int((~torch.view_as_real(g).isfinite() if g.is_complex() else ~g.isfinite()).sum())
            for g in wide
        ],
        "param_norm": [norm(x) for x in after],
        "update_norm": [norm(x) for x in moved],
        "unmoved": [
            float((a == b).sum()) if counted else float("nan")
            for a, b, counted in zip(after, before, counts, strict=True)
        ],
    }


def assert_are(statistics: Any, expected: Expected) -> None:
    """Compare all vectors."""
    for name, values in expected.items():
        actual = getattr(statistics, name)
        wanted = torch.tensor(values, dtype=actual.dtype)
        torch.testing.assert_close(actual.cpu(), wanted, rtol=RTOL, atol=0, equal_nan=True)
