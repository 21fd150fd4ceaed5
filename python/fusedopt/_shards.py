"""What this process has of a tensor that several share."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor


def is_distributed(x: Any) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def local(x: Any) -> Tensor:
    """Return what this process has of a tensor, without a gradient."""
    x = x.detach()
    part: Tensor = x.to_local() if is_distributed(x) else x
    return part


def as_part_of(p: Any, part: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor that is split as p is, and of which this process has `part`.

    Args:
        p: a parameter, plain or a DTensor.
        part: what this process has.
        shape: of the whole; that of p if it is not given.
    """
    if not is_distributed(p):
        return part
    whole = torch.empty(p.shape if shape is None else shape, device="meta")
    made: Tensor = sys.modules["torch.distributed.tensor"].DTensor.from_local(
        part,
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made


def has_whole_rows(p: Any) -> bool:
    """Return whether a process has rows of dimension 0, and all of each."""
    if not is_distributed(p):
        return True
    # (The shards of FSDP2 within those of tensor parallelism are no is_shard(0).)
    return all(getattr(each, "dim", 0) == 0 for each in p.placements)


def find_first_element(p: Any) -> int:
    if not is_distributed(p) or not has_whole_rows(p):
        return 0
    utils = sys.modules["torch.distributed.tensor._utils"]  # which DTensors come with
    _, offset = utils.compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return int(offset[0]) * math.prod(p.shape[1:]) if p.ndim else 0
