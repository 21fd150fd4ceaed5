"""What the tests of Muon share: shapes, options, and torch's Muon in another precision."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import _muon
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import values

# Wide, square, tall, twice one shape, and vectors.
SHAPES: list[tuple[int, ...]] = [(4, 6), (5, 5), (7, 3), (4, 6), (1, 7), (6, 1), (5, 5), (4, 6)]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1},
    {"lr": torch.tensor(0.01)},
    {"weight_decay": 0},
    {"weight_decay": 0.3, "momentum": 0.8},
    {"momentum": 0},
    {"nesterov": False},
    {"ns_steps": 0},
    {"ns_steps": 1},
    {"ns_steps": 6},
    {"ns_coefficients": (3.4, -4.7, 2.0)},
    {"eps": 1e6},
    {"adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw", "lr": 3e-3},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@contextmanager
def torch_in(precision: torch.dtype) -> Iterator[None]:
    """Let torch's Muon iterate in another precision than bfloat16: change its one cast.

    (It divides what the cast returns in place. So that has to be a copy.)
    """

    def cast(x: Tensor) -> Tensor:
        return x.to(precision, copy=True)

    with mock.patch.object(torch.Tensor, "bfloat16", cast):
        yield


class TorchMuon(torch.optim.Muon):
    """Torch's own Muon, iterating in float64, and with the newest torch's way to adjust the lr."""

    def __init__(self, params: Any, adjust_lr_fn: str | None = None, **kwargs: Any) -> None:
        unclamped = adjust_lr_fn == "spectral_unclamped"
        if "lr" in kwargs:  # torch computes with a tensor in the tensor's precision
            kwargs["lr"] = float(kwargs["lr"])
        super().__init__(params, adjust_lr_fn=None if unclamped else adjust_lr_fn, **kwargs)
        for group in self.param_groups:
            group["adjust_lr_fn"] = adjust_lr_fn

    def step(self, closure: Any = None) -> Any:
        def adjust(lr: float, name: str | None, shape: Any) -> float:
            if name == "spectral_unclamped":
                return lr * (shape[0] / shape[1]) ** 0.5
            return own(lr, name, shape)

        own = _muon._adjust_lr
        bare = inspect.unwrap(torch.optim.Muon.step)  # or hooks would fire twice
        changed = mock.patch.object(_muon, "_adjust_lr", adjust)
        with torch.no_grad(), torch_in(torch.float64), changed:
            return bare(self, closure)


def matrices(
    dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[Parameter]:
    return [Parameter(values(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


class Sees(TorchDispatchMode):
    """Is shown all operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
