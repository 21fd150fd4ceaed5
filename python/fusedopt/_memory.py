"""CUDA devices as torch knows them, and memory from its allocator: for csrc/step/.

Devices are numbers; a negative one is the CPU, which plays a device in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


@cache
def _device(index: int) -> torch.device:
    return torch.device("cpu") if index < 0 else torch.device("cuda", index)


def empty(device: int, size: int) -> Tensor:
    """Return memory of so many bytes."""
    return torch.empty(size, dtype=torch.uint8, device=_device(device))


def scalar(device: int, dtype: str) -> Tensor:
    """Return a 0-dim tensor of unset contents."""
    return torch.empty((), dtype=getattr(torch, dtype), device=_device(device))


def gather(numbers: Sequence[Tensor], device: int) -> Tensor:
    """Return one-element tensors of any devices as a float64 tensor, without waiting for them."""
    at = _device(device)
    there = [x.detach().reshape(()).to(at, torch.float64, non_blocking=True) for x in numbers]
    return torch.stack(there)


def moved(numbers: Tensor, device: int) -> Tensor:
    """Return float64 numbers there; themselves, if they are. Waits for them on the CPU alone."""
    return numbers.to(_device(device), non_blocking=device >= 0)


def without_gaps(x: Tensor) -> Tensor:
    """Return a copy whose elements lie one after the other, in the order of those of x."""
    from_the_last = range(x.ndim - 1, -1, -1)
    order = sorted(from_the_last, key=x.stride)[::-1]  # the innermost dimension last
    back = sorted(range(x.ndim), key=order.__getitem__)
    return x.detach().permute(order).contiguous().permute(back)


def is_capturing(device: int) -> bool:
    """Return whether the device's current stream is being captured into a graph."""
    if device < 0:
        return False
    with torch.cuda.device(device):  # torch asks of the current device alone
        return torch.cuda.is_current_stream_capturing()
