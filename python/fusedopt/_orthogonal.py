"""Orthogonal matrices by Newton and Schulz's iteration: its readable spec, and many at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# What is worked on at once: as much as stays in cache, or one matrix.
SLICE_BYTES = 1 << 21


class Iteration(NamedTuple):
    """What torch.optim.Muon calls ns_coefficients, ns_steps and eps."""

    coefficients: tuple[float, float, float]
    steps: int
    eps: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> Iteration:
        """Return that of a param group."""
        return cls(tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"])

    def check(self) -> None:
        """Raise torch's errors, which come with the step."""
        if self.steps >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        if len(self.coefficients) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")


def orthogonalized(x: Any, iteration: Iteration) -> Any:
    """Return the matrices nearly orthogonal, their singular vectors as they were: the spec.

    Each step takes a singular value s to ``a s + b s**3 + c s**5``, from what is 1 at most to
    about 1. The products are those of the shorter side.

    Args:
        x: arrays of numpy, or tensors, of two dimensions or more; the last two are the matrix.
        iteration: coefficients a, b, c, the number of steps, and the least norm to divide by.
    """
    a, b, c = iteration.coefficients
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if is_tall else x
    norm = (x * x).sum(axis=(-2, -1), keepdims=True) ** 0.5
    x = x / norm.clip(iteration.eps, None)
    for _ in range(iteration.steps):
        gram = x @ x.swapaxes(-1, -2)
        x = x * a + (gram * b + (gram @ gram) * c) @ x
    return x.swapaxes(-1, -2) if is_tall else x


def orthogonalize_(x: Tensor, iteration: Iteration) -> None:
    """Do that in place, to a contiguous tensor [matrices, rows, columns].

    Rounds where torch.optim.Muon does, if x has its precision.
    """
    most = min(SLICE_BYTES * len(x) // x.nbytes, len(x) // 4)  # for it takes three times as many
    for part in torch.split(x, max(1, most)):
        _orthogonalize_part_(part, iteration)


def _orthogonalize_part_(x: Tensor, iteration: Iteration) -> None:
    a, b, c = iteration.coefficients
    other = torch.empty_like(x)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=iteration.eps)
    # Each step goes from one tensor to the other, and the last one to x. (With out=, torch.autocast
    # leaves products in their precision.)
    now, then = (other, x) if iteration.steps % 2 else (x, other)
    torch.div(x, norm, out=now)
    del norm
    is_tall = x.shape[1] > x.shape[2]
    side = min(x.shape[1:])
    gram, polynomial = x.new_empty(2, len(x), side, side)
    for _ in range(iteration.steps):
        torch.bmm(*((now.mT, now) if is_tall else (now, now.mT)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        factors = (now, polynomial) if is_tall else (polynomial, now)
        torch.baddbmm(now, *factors, beta=a, out=then)
        now, then = then, now


def step_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """Return by what the shape of a matrix multiplies the learning rate."""
    if adjust_lr_fn in (None, "original"):
        return float(max(1.0, rows / columns) ** 0.5)
    if adjust_lr_fn == "match_rms_adamw":
        return float(0.2 * max(rows, columns) ** 0.5)
    if adjust_lr_fn == "spectral_unclamped":
        return float((rows / columns) ** 0.5)
    return 1.0  # as torch has it
