"""Memory of CUDA devices, from torch's allocator: for csrc/step/device_queue.cpp.

Devices are numbers; a negative one is the CPU, which plays a device in tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def is_capturing(device: int) -> bool:
    """Return whether the current stream is being captured into a graph."""
    return device >= 0 and torch.cuda.is_current_stream_capturing()
