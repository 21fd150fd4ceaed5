"""What is measured: models as lists of shapes, optimizers, and the rows made of the two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusedopt
from fusedopt._base import Fused
from fusedopt._matrices import StepsMatrices

Shapes = list[tuple[int, ...]]


def _gpt2() -> Shapes:
    width, vocabulary, context = 768, 50257, 1024
    block: Shapes = [
        *[(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(vocabulary, width), (context, width), *block * 12, (width,), (width,)]


def _resnet50() -> Shapes:
    def convolution(inputs: int, outputs: int, size: int) -> Shapes:  # and its batch norm
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes, inputs = convolution(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3)
            shapes += convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def _lora_7b() -> Shapes:
    """Of rank 16 beside the seven linear layers of each block of Llama 2 7B (arXiv:2307.09288)."""
    rank, width, hidden = 16, 4096, 11008

    def pair(inputs: int, outputs: int) -> Shapes:
        return [(rank, inputs), (outputs, rank)]

    attention = pair(width, width) * 4
    return [*attention, *pair(width, hidden) * 2, *pair(hidden, width)] * 32


def _yolov8n() -> Shapes:
    """As https://github.com/ultralytics/ultralytics publishes it, with 80 classes."""

    def convolution(inputs: int, outputs: int, size: int) -> Shapes:  # and its batch norm
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    def c2f(inputs: int, outputs: int, blocks: int) -> Shapes:
        half = outputs // 2
        ends = convolution(inputs, outputs, 1) + convolution((2 + blocks) * half, outputs, 1)
        return ends + convolution(half, half, 3) * (2 * blocks)

    def head(inputs: int, width: int) -> Shapes:
        start = convolution(inputs, width, 3) + convolution(width, width, 3)
        return [*start, (width, width, 1, 1), (width,)]

    shapes = convolution(3, 16, 3)
    for inputs, outputs, blocks in ((16, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 1)):
        shapes += convolution(inputs, outputs, 3) + c2f(outputs, outputs, blocks)
    shapes += convolution(256, 128, 1) + convolution(512, 256, 1)  # pooled at three sizes
    shapes += c2f(256 + 128, 128, 1) + c2f(128 + 64, 64, 1)  # to finer maps, and back
    shapes += convolution(64, 64, 3) + c2f(64 + 128, 128, 1)
    shapes += convolution(128, 128, 3) + c2f(128 + 256, 256, 1)
    for width in (64, 80):  # boxes; classes
        shapes += [shape for inputs in (64, 128, 256) for shape in head(inputs, width)]
    return shapes


def uniform(name: str) -> Shapes:
    """Return the shapes of ``10 x 1M``, or ``3 matrices of 16 x 16``, or another such name."""
    if " matrices of " in name:
        count, shape = name.split(" matrices of ")
        return [tuple(map(int, shape.split(" x ")))] * int(count)
    count, size = name.split(" x ")
    units = {"K": 1024, "M": 1_000_000}
    unit = units.get(size[-1], 1)
    return [(int(size.rstrip("KM")) * unit,)] * int(count)


MODELS: dict[str, Shapes] = {
    "GPT-2 124M": _gpt2(),
    "ResNet-50": _resnet50(),
    "LoRA r16 of a 7B model": _lora_7b(),
    "YOLOv8 n": _yolov8n(),
    **{
        name: uniform(name)
        for name in ("1 x 100M", "10 x 1M", "1000 x 1K", "2000 x 1K", "2000 x 16")
    },
}

# The weights of linear layers alone: of a transformer of 4 layers, 128 wide.
MATRICES: dict[str, Shapes] = {
    "96 matrices of 128 x 128": uniform("96 matrices of 128 x 128"),
    "matrices of a small GPT": [(384, 128), (128, 128), (512, 128), (128, 512)] * 4,
}

_ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}

# Spelled out, because the defaults of the peers differ. An optimizer that is not listed here is
# measured with its own defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": _ADAM,
    "AdamW": {**_ADAM, "weight_decay": 0.01},
    "RMSprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8},
    "Adagrad": {"lr": 1e-2, "eps": 1e-10},
    "RAdam": _ADAM,
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.01},
    "Muon": {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1},
}

# The step alone; after clipping to MAX_NORM; after a GradScaler's unscaling and clipping.
MODES = ("plain", "clip", "scaler")
MAX_NORM = 1.0


def optimizers() -> list[str]:
    """Return the names of all optimizers of the package, those with known arguments first.

    But for those that step matrices alone, which have rows of their own.
    """
    found = [
        name
        for name, value in vars(fusedopt).items()
        if isinstance(value, type)
        and issubclass(value, Fused)
        and not issubclass(value, StepsMatrices)
    ]
    known = list(ARGUMENTS)
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))


class Row(NamedTuple):
    """One kind of step on one model."""

    model: str
    optimizer: str
    mode: str = "plain"
    dtype: torch.dtype = torch.float32
    threads: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        parts = [self.model, self.optimizer]
        parts += {"plain": [], "clip": ["clip"], "scaler": ["GradScaler and clip"]}[self.mode]
        parts += [] if self.dtype == torch.float32 else [str(self.dtype).removeprefix("torch.")]
        parts += [f"{self.threads} thread{'s' * (self.threads > 1)}"]
        return ", ".join(parts)

    @property
    def shapes(self) -> Shapes:
        """The shapes of the parameters."""
        return MODELS.get(self.model) or MATRICES.get(self.model) or uniform(self.model)

    @property
    def arguments(self) -> dict[str, Any]:
        """The optimizer's arguments."""
        return ARGUMENTS.get(self.optimizer, {})

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def states(self) -> int:
        """How many state tensors the optimizer keeps for a parameter."""
        return state_count(self.optimizer)

    @property
    def bytes(self) -> int:
        """What has to move: all is read, all but the gradient written, a norm reads it again."""
        streams = 3 + 2 * self.states + (self.mode != "plain")
        return self.numel * streams * self.dtype.itemsize


def state_count(optimizer: str) -> int:
    """Return how many state tensors an optimizer of the package keeps for a parameter."""
    made: Fused = getattr(fusedopt, optimizer)([torch.zeros(1, 1)], **ARGUMENTS.get(optimizer, {}))
    return len(made._rule(made.param_groups[0]).states)


def parameters(row: Row) -> list[Tensor]:
    """Return the parameters of a row with gradients.

    The global norm of the gradients is far above MAX_NORM, so that clipping is not idle; torch
    clips in place, and afterwards finds a norm just above it, again and again. Neither that nor the
    steps themselves lead to subnormal numbers, which would slow processors down.
    """
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 20, generator=generator)

    def values(shape: tuple[int, ...], std: float) -> Tensor:
        flat = torch.empty(math.prod(shape))
        # To draw 100M numbers would take longer than to measure.
        for part in torch.split(flat, len(pool)):
            part.copy_(pool[: len(part)]).mul_(std)
        return flat.view(shape).to(row.device, row.dtype)

    params = []
    for shape in row.shapes:
        p = values(shape, 0.02).requires_grad_()
        p.grad = values(shape, 0.1)
        params.append(p)
    return params


def all_rows(threads: int, device: str) -> Iterator[Row]:
    """Yield every combination."""
    counts = sorted({threads, 1}, reverse=True)
    dtypes = (torch.float32, torch.bfloat16)
    for row in product(MODELS, optimizers(), MODES, dtypes, counts):
        yield Row(*row, device)


def main_rows(threads: int, device: str) -> Iterator[Row]:
    """Yield the rows that say most: every optimizer on every model, and variants of a few of them.

    The variants are of AdamW on every model, and of every optimizer on GPT-2: clipped, with a
    GradScaler, in bfloat16, in bfloat16 and clipped, on one thread.
    """
    plain = ("plain", torch.float32, threads)
    variants = [
        plain,
        ("clip", torch.float32, threads),
        ("scaler", torch.float32, threads),
        ("plain", torch.bfloat16, threads),
        ("clip", torch.bfloat16, threads),
        ("plain", torch.float32, 1),
    ]
    for row in all_rows(threads, device):
        variant = (row.mode, row.dtype, row.threads)
        typical = row.optimizer == "AdamW" or row.model == "GPT-2 124M"
        if variant == plain or (typical and variant in variants):
            yield row


def quick_rows(threads: int, device: str) -> Iterator[Row]:
    """Yield rows that take a few minutes together."""
    for optimizer in optimizers():
        yield Row("10 x 1M", optimizer, threads=threads, device=device)
    for model, mode in (("ResNet-50", "plain"), ("ResNet-50", "clip"), ("1000 x 1K", "plain")):
        yield Row(model, "AdamW", mode, threads=threads, device=device)
    yield Row("1000 x 1K", "AdamW", "clip", threads=threads, device=device)


def memory_rows(threads: int, device: str, *, quick: bool) -> Iterator[Row]:
    """Yield steps for those that keep parameters and states in ways of their own."""
    yield Row("ResNet-50" if quick else "GPT-2 124M", "AdamW", threads=threads, device=device)


def matrix_rows(threads: int, device: str, *, quick: bool) -> Iterator[Row]:
    """Yield steps of Muon, the first of them alone if time is short."""
    for model in list(MATRICES)[: 1 if quick else None]:
        yield Row(model, "Muon", threads=threads, device=device)


def scaling_rows(threads: int, device: str) -> Iterator[Row]:
    """Yield steps of AdamW on one tensor, from 1M to 400M parameters."""
    for millions in (1, 2, 5, 10, 20, 50, 100, 200, 400):
        yield Row(f"1 x {millions}M", "AdamW", threads=threads, device=device)
