"""The modes of a row: the step alone, after clipping, and after a GradScaler and clipping.

A scaler's scale is 1 here and never grows: unscaling writes the gradients in place, and with any
other scale they would shrink from step to step until the work was another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

import fusedopt
from fusedopt.bench.rows import MAX_NORM, Row

Step = Callable[[], object]


def torch_step(optimizer: Optimizer, row: Row, params: list[Tensor]) -> Step:
    """Return a step as torch's users write it, with any optimizer."""
    if row.mode == "plain":
        return optimizer.step

    def clip_and_step() -> None:
        clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    if row.mode == "clip":
        return clip_and_step
    scaler = _scaler(torch.amp.GradScaler, row)

    def unscale_clip_and_step() -> None:
        scaler.unscale_(optimizer)
        clip_grad_norm_(params, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return unscale_clip_and_step


def grad_scale_step(optimizer: Any, params: list[Tensor]) -> Step:
    """Return a clipped step of a fused torch optimizer that divides the gradients in its kernel."""

    def step() -> None:
        norm = get_total_norm([p.grad for p in params if p.grad is not None])
        optimizer.grad_scale = ((norm + 1e-6) / MAX_NORM).clamp(min=1.0).float()
        optimizer.step()

    return step


def fusedopt_step(cls: Any, row: Row, params: list[Tensor]) -> Step:
    """Return a step as fusedopt's users write it."""
    if row.mode == "plain":
        optimizer: Optimizer = cls(params, **row.arguments)
        return optimizer.step
    optimizer = cls(params, **row.arguments, max_grad_norm=MAX_NORM)
    if row.mode == "clip":
        return optimizer.step
    package: Any = fusedopt
    return _scaled(optimizer, _scaler(package.GradScaler, row))


def amp_scaling_step(cls: Any, row: Row, params: list[Tensor]) -> Step:
    """Return a step of fusedopt under torch's own scaler, which then leaves the unscaling to it."""
    optimizer = cls(params, **row.arguments, max_grad_norm=MAX_NORM, amp_scaling=True)
    return _scaled(optimizer, _scaler(torch.amp.GradScaler, row))


def _scaled(optimizer: Optimizer, scaler: Any) -> Step:
    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def _scaler(cls: Any, row: Row) -> Any:
    scaler = cls(row.device, init_scale=1.0, growth_interval=2**30)
    scaler.scale(torch.ones((), device=row.device))  # it makes its tensors only now
    return scaler
