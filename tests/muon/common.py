"""What the tests of Muon share: shapes, options, and who sees operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter
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
