"""The cases that tests and benchmarks share: data only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import fusedopt


class Config(NamedTuple):
    """An optimizer with arguments that reach one variant of its rule."""

    name: str
    kwargs: dict[str, Any]

    @property
    def cls(self) -> type[Any]:
        return getattr(fusedopt, self.name)

    @property
    def torch_cls(self) -> type[torch.optim.Optimizer] | None:
        return getattr(torch.optim, self.name, None)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.kwargs.items())])


def _configs(name: str, *variants: dict[str, Any]) -> list[Config]:
    return [Config(name, kwargs) for kwargs in variants]


# Every rule with every combination of its flags, and every option that changes its scalars.
CONFIGS = [
    *_configs(
        "SGD",
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "maximize": True},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
    *_configs(
        "Adam",
        {},
        {"amsgrad": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    *_configs(
        "AdamW",
        {},
        {"amsgrad": True},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "maximize": True},
    ),
    *_configs(
        "RMSprop",
        *(
            {"weight_decay": decay, "centered": centered, "momentum": momentum}
            for decay in (0, 0.1)
            for centered in (False, True)
            for momentum in (0, 0.9)
        ),
        {"lr": 0.003, "alpha": 0.9, "eps": 1e-6, "maximize": True},
    ),
    *_configs(
        "Lion",
        {},
        {"lr": 1e-3, "betas": (0.95, 0.98), "weight_decay": 0.3, "maximize": True},
    ),
]

# One configuration for each optimizer, where the variant does not matter.
PLAIN_CONFIGS = [
    Config("SGD", {"lr": 0.1, "momentum": 0.9}),
    Config("Adam", {}),
    Config("AdamW", {}),
    Config("RMSprop", {}),
    Config("Lion", {}),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _gpt2_shapes() -> list[tuple[int, ...]]:
    width, vocabulary, context = 768, 50257, 1024
    block = [
        *[(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(vocabulary, width), (context, width), *block * 12, (width,), (width,)]


# Parameter shapes of the benchmark rows.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "GPT-2 124M": _gpt2_shapes(),
    "1 x 100M": [(100_000_000,)],
    "10 x 1M": [(1_000_000,)] * 10,
    "1000 x 1K": [(1024,)] * 1000,
    "2000 x 16": [(16,)] * 2000,
}
