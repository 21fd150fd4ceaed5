"""A small real model of real data: scikit-learn's images of handwritten digits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

BATCH = 32

# An update of SGD with these is rounded once, in torch as here: the two are equal bit for bit.
EXACT: dict[str, Any] = {"lr": 2.0**-4, "momentum": 0.5}


def watch(optimizer: Any, max_norm: float) -> list[float]:
    """Hold each step of a plain SGD in float32 to its formula; return the norms of gradients.

    The norms are those of ``p.grad`` after the step, unscaled: nothing else may have clipped them.
    The factor of clipping and its product with the gradient are rounded, each by 2^-24 of it, and
    so is the parameter.
    """
    before: list[Tensor] = []
    norms: list[float] = []

    def remember(*_: Any) -> None:
        before[:] = [p.detach().double() for p in parameters(optimizer)]

    def compare(*_: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # where a scaler leaves it to the step
        grads = [p.grad.double() / (1 if scale is None else scale) for p in parameters(optimizer)]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])).item()
        norms.append(norm)
        factor = min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 0.0
        lr = optimizer.param_groups[0]["lr"]
        for p, old, g in zip(parameters(optimizer), before, grads, strict=True):
            update = lr * factor * (g if factor else torch.zeros_like(g))
            error = (p.detach() - (old - update)).abs()
            assert (error <= 2.0**-24 * (old - update).abs() * 1.01 + 2.0**-22 * update.abs()).all()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(compare)
    return norms


def parameters(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def make_model(dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> nn.Sequential:
    """Return a classifier, the same each time; with dropout, a run depends on the random state."""
    torch.manual_seed(0)
    layers = (nn.Linear(64, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 10))
    return nn.Sequential(*layers).to(dtype)


def make_loader(batches: int, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    """Return the first so many batches of the images, in their order."""
    digits = load_digits()
    images = torch.tensor(digits.data[: batches * BATCH] / 16, dtype=dtype)
    labels = torch.tensor(digits.target[: batches * BATCH])
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)
