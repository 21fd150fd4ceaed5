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


def optimizer_of(step: Step) -> Optimizer:
    """Return whose `step` a plain step is."""
    # (A Callable is not known to be the bound method that it is.)
    optimizer: Optimizer = step.__self__  # type: ignore[attr-defined]
    return optimizer


def bytes_moved(optimizer: Optimizer) -> int:
    """Return what a plain step has to move: all that is kept both ways, and gradients once."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [*params, *(x for p in params for x in optimizer.state[p].values())]
    tensors = {id(x): x for x in kept if isinstance(x, Tensor)}  # a table may be of all parameters
    gradients = [p.grad for p in params if p.grad is not None]
    return 2 * sum(map(_size, tensors.values())) + sum(map(_size, gradients))


def _size(x: Any) -> int:
    """Return the bytes of a tensor, or of those that a tensor of another class is made of."""
    if hasattr(x, "__tensor_flatten__"):
        return sum(_size(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return int(x.numel() * x.element_size())


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
