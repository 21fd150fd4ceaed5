"""What the rules share, in plain operators: the readable spec of csrc/numeric/average.h.

For numpy arrays and torch tensors of float32 or float64, which is also the precision of all that is
computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def accumulate(sum: Any, x: Any, forget: float) -> Any:
    """Return ``(1 - forget) * sum + x``: an average if x has the weight ``forget``.

    Rounded, ``1 - forget`` would have lost most digits of what little is forgotten, and the sum of
    a constant x would come to rest beside ``x / forget``: so ``forget`` itself is what is rounded.
    """
    return sum - sum * forget + x


def average_square(average: Any, g: Any, weight: float) -> Any:
    """Return ``(1 - weight) * average + weight * g * g``.

    It overflows only where that is itself too large; and an average that did counts as the largest
    number, so that it comes down again. It changes by one difference, rounded once as a part of it.
    """
    finite = minimum(average, largest(average) if _rounded(weight, average) < 1 else 0.0)
    return finite + ((g * weight) * g - finite * weight)


def minimum(x: Any, most: float) -> Any:
    """Return the elementwise minimum, NaN where x is."""
    return x.clip(None, most)


def maximum(a: Any, b: Any) -> Any:
    """Return the elementwise maximum, NaN where either is, and b of two equal ones."""
    larger = b * 1
    take = (a > b) | (a != a)  # noqa: PLR0124  (true for NaN alone)
    larger[take] = a[take]
    return larger


def largest(like: Any) -> float:
    """Return the largest finite number of the precision."""
    return float(_finfo(like).max)


def epsilon(like: Any) -> float:
    """Return what the precision resolves beside 1."""
    return float(_finfo(like).eps)


def _finfo(like: Any) -> Any:
    return torch.finfo(like.dtype) if isinstance(like, torch.Tensor) else np.finfo(like.dtype)


def _rounded(scalar: float, like: Any) -> float:
    """Return a scalar as the precision has it."""
    return float(np.float32(scalar)) if epsilon(like) == np.finfo(np.float32).eps else scalar
