"""Whether a contestant computes what it should: a few steps, compared with the same in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedopt
from fusedopt._base import Fused
from fusedopt.bench.modes import Step, optimizer_of
from fusedopt.bench.rows import MAX_NORM, Row, Shapes

_SHAPES: Shapes = [(1000,), (33, 7), (5,)]
# Libraries keep 8 bits of tensors from 4096 elements on, in blocks of up to 256.
_LARGE: Shapes = [(64, 96), (33, 7), (5,)]

# The gradient of each step is a multiple of one and the same, chosen such that no average of them
# comes close to zero, with or without clipping, where rounding would be all that is left of it.
_MULTIPLES = (1.0, 1.0, 2.0, -1.5, 0.7, -0.7, -0.1)

# What float32 hyper-parameters, which are no mistake, may cost: 1 - 0.999 is wrong by 1e-5 there.
_SLOPPY_SCALARS = 2e-5

EIGHT_BITS = 2.0**-3
"""How far off a state in 8 bits may be, as a share of it: three digits after the leading one."""

# If Adam's moments are off by an eighth of themselves after each step, to the worst side each time,
# the steps with the multiples above lead 2.52 / 8 of the way astray (all sides were tried).
_ASTRAY = 2.6


class Storage(NamedTuple):
    """What the way in which a contestant stores its numbers explains."""

    states: float
    """How far off a state may be after a step, as a share of it."""
    masters: bool = False
    """Whether fusedopt keeps float32 masters: the parameters' rounding explains nothing then."""

    def mistake(self, build: Callable[[Row, list[Tensor]], Step], row: Row) -> str:
        """Return how the numbers of a contestant are wrong, or nothing."""
        return mistake(build, row, self)


def unlike_float32(build: Callable[[Row, list[Tensor]], Step], row: Row) -> str:
    """Return in how many elements fusedopt's masters are not the parameters of float32 training."""
    params = _parameters(row, _LARGE)
    twins = [p.detach().float().requires_grad_() for p in params]
    step = build(row, params)
    optimizer: Any = optimizer_of(step)
    float32_step = type(optimizer)(twins, **row.arguments).step
    for gradients in _gradients(params):
        for p, q, gradient in zip(params, twins, gradients, strict=True):
            p.grad, q.grad = gradient, gradient.float()
        step()
        float32_step()
    pairs = [(optimizer._master(p), q.detach()) for p, q in zip(params, twins, strict=True)]
    pairs += [(p.detach(), q.detach().to(p.dtype)) for p, q in zip(params, twins, strict=True)]
    different = sum(_different_bits(a, b) for a, b in pairs)
    return f"{different} bits are not those of float32 training" if different else ""


def _different_bits(a: Tensor, b: Tensor) -> int:
    changed = a.contiguous().view(torch.uint8) ^ b.contiguous().view(torch.uint8)
    return sum(int((changed >> i & 1).sum()) for i in range(8))


def mistake(
    build: Callable[[Row, list[Tensor]], Step], row: Row, storage: Storage | None = None
) -> str:
    """Return how the numbers of a contestant are wrong, or nothing.

    Args:
        build: makes the step of the contestant.
        row: what it steps.
        storage: how it stores its numbers, if not all of them in the dtype of the row.
    """
    params = _parameters(row, _LARGE if storage else _SHAPES)
    step = build(row, params)
    starts = [p.detach().to("cpu", torch.float64, copy=True) for p in params]
    exact = [start.clone().requires_grad_() for start in starts]
    exact_step = _exact(row.optimizer, exact, row.arguments)
    paths = [torch.zeros_like(start) for start in starts]
    for gradients in _gradients(params):
        for p, q, gradient in zip(params, exact, gradients, strict=True):
            p.grad = gradient
            q.grad = gradient.to("cpu", torch.float64, copy=True)
        step()
        if row.mode != "plain":
            clip_grad_norm_(exact, MAX_NORM)
        before = [q.detach().clone() for q in exact]
        exact_step()
        for path, old, new in zip(paths, before, exact, strict=True):
            path.add_((new.detach() - old).abs())
    if storage and storage.masters:
        optimizer: Any = optimizer_of(step)
        params = [optimizer._master(p) for p in params]
    return _excess(params, exact, starts, paths, storage.states if storage else 0.0)


def _excess(
    params: list[Tensor],
    exact: list[Tensor],
    starts: list[Tensor],
    paths: list[Tensor],
    states: float,
) -> str:
    """Return the largest error beyond rounding, of parameters that went so far in all steps."""
    epsilon = torch.finfo(params[0].dtype).eps
    of_path = max(8 * epsilon, _SLOPPY_SCALARS, _ASTRAY * states)
    worst, text = 1.0, ""
    for p, q, start, path in zip(params, exact, starts, paths, strict=True):
        error = (p.detach().to("cpu", torch.float64) - q.detach()).abs()
        if not bool(torch.isfinite(error).all()):
            return "not finite"
        size = torch.maximum(start.abs(), q.detach().abs()) + path
        allowed = len(_MULTIPLES) * epsilon * size + of_path * path
        excess = error / allowed.clamp(min=torch.finfo(torch.float64).tiny)
        at = int(excess.argmax())
        if float(excess.flatten()[at]) > worst:
            worst = float(excess.flatten()[at])
            text = f"off by {float(error.flatten()[at]):.0e}"
            text += f", where rounding explains {float(allowed.flatten()[at]):.0e}"
    return text


def _parameters(row: Row, shapes: Shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator).mul_(0.02) for shape in shapes]
    return [value.to(row.device, row.dtype).requires_grad_() for value in values]


def _gradients(params: list[Tensor]) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    base = [torch.randn(p.shape, generator=generator).mul_(0.1) for p in params]
    for gradient in base:
        gradient.flatten()[::17] = 0  # no gradient, no update: sign(0) is 0
    for multiple in _MULTIPLES:
        yield [
            (gradient * multiple).to(p.device, p.dtype)
            for gradient, p in zip(base, params, strict=True)
        ]


def _exact(name: str, params: list[Tensor], arguments: dict[str, Any]) -> Step:
    """Return a step in float64: torch's plainest, or the readable rule where torch has none."""
    cls: Any = getattr(torch.optim, name, None)
    if cls is not None:
        optimizer: Optimizer = cls(params, foreach=False, **arguments)
        return optimizer.step
    return _ReferenceStep(getattr(fusedopt, name)(params, **arguments))


class _ReferenceStep:
    """A step by `reference` of an optimizer's class."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer: Fused = optimizer
        (self._group,) = optimizer.param_groups
        self._rule = optimizer._rule(self._group)
        self._states = [
            [torch.zeros_like(p) for _ in self._rule.states] for p in self._group["params"]
        ]
        self._t = 0

    @torch.no_grad()
    def __call__(self) -> None:
        self._t += 1
        t = self._t if self._rule.counts_steps else min(self._t, 2)
        scalars: dict[str, Any] = self._optimizer._scalars(self._group, t)
        # (Every subclass has one, each with arguments of its own.)
        reference: Any = type(self._optimizer).reference  # type: ignore[attr-defined]
        for p, states in zip(self._group["params"], self._states, strict=True):
            new_p, *new_states = reference(p, p.grad, *states, **scalars, flags=self._rule.flags)
            p.copy_(new_p)
            for state, new in zip(states, new_states, strict=True):
                state.copy_(new)
