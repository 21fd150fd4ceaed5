"""Ranks that have a part of the gradients each, and would clip or skip by that part alone.

DTensors say what they are a part of. The tensors of FullyShardedDataParallel (FSDP1) and of
ZeroRedundancyOptimizer do not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def several() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def who_splits(params: Iterable[Tensor], made_by_zero: bool) -> str:
    """Return what has split these parameters among ranks, or an empty string."""
    if made_by_zero:
        return "ZeroRedundancyOptimizer"
    split = any(hasattr(p, "_fsdp_flattened") for p in params)
    return "FullyShardedDataParallel" if split else ""


def called_by_zero() -> bool:
    """Return whether ZeroRedundancyOptimizer is making the optimizer under construction."""
    if _ZERO not in sys.modules or not several():
        return False
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_globals.get("__name__") == _ZERO:
            return True
    return False
