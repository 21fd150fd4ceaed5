"""Who takes part where matrices are made orthogonal: Muon here, and torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fusedopt._batches import matrix_reference
from fusedopt._orthogonal import Iteration, step_ratio
from fusedopt.bench import modes
from fusedopt.bench.contestants import OURS, Build, Contestant, fusedopt_way, is_wanted
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import MAX_NORM, Row, Shapes

_SHAPES: Shapes = [(48, 64), (64, 48), (48, 48), (48, 64)]
_STEPS = 3

# How far off the way of all steps may lead, as a share of it. Torch's products have three digits,
# and there are fifteen in a step.
_OFF = 0.05


def _torch(row: Row, params: list[Tensor]) -> Step:
    cls: Any = getattr(torch.optim, row.optimizer)
    optimizer: Optimizer = cls(params, **row.arguments)
    return modes.torch_step(optimizer, row, params)


def contestants(peers: str = "", quick: bool = False) -> list[Contestant]:
    """Return fusedopt and torch, those that are wanted: see `fusedopt.bench.contestants`."""
    both = [
        Contestant(OURS, lambda row: True, fusedopt_way, check=mistake),
        Contestant("torch", lambda row: True, _torch, check=mistake),
    ]
    return [each for each in both if is_wanted(each.name, peers, quick)]


def mistake(build: Build, row: Row) -> str:
    """Return how the numbers of a contestant are wrong, or nothing."""
    generator = torch.Generator().manual_seed(1)
    params = [
        torch.randn(shape, generator=generator).to(row.device, row.dtype).requires_grad_()
        for shape in _SHAPES
    ]
    step = build(row, params)
    starts = [p.detach().to("cpu", torch.float64, copy=True) for p in params]
    exact = [start.clone().requires_grad_() for start in starts]
    buffers = [torch.zeros_like(start) for start in starts]
    for _ in range(_STEPS):
        for p, q in zip(params, exact, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(row.device, row.dtype)
            q.grad = p.grad.to("cpu", torch.float64, copy=True)
        step()
        if row.mode != "plain":
            clip_grad_norm_(exact, MAX_NORM)
        for i, q in enumerate(exact):
            buffers[i] = _exact_step(q, buffers[i], row.arguments)
    off = 0.0
    for p, q, start in zip(params, exact, starts, strict=True):
        way = (q.detach() - start).norm()
        off = max(off, float((p.detach().to("cpu", torch.float64) - q.detach()).norm() / way))
    return "" if off <= _OFF else f"off by {off:.0%} of the way, where rounding explains {_OFF:.0%}"


@torch.no_grad()
def _exact_step(p: Tensor, buffer: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Step a matrix by the readable rule, and return its momentum."""
    lr, decay = arguments["lr"], arguments["weight_decay"]
    ratio = step_ratio(None, *p.shape)
    new_p, new_buffer = matrix_reference(
        p,
        p.grad,
        buffer,
        forget=1 - arguments["momentum"],
        weight_decay=decay,
        ratio=ratio,
        decay=lr * decay,
        step_size=lr * ratio,
        nesterov=True,
        iteration=Iteration((3.4445, -4.775, 2.0315), 5, 1e-7),
    )
    p.copy_(new_p)
    kept: Tensor = new_buffer
    return kept
