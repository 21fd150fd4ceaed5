"""When a step has to be made of torch's operators, because someone is to see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_modes = torch._C._len_torch_dispatch_stack


def must_be_seen(tensors: Sequence[Tensor]) -> bool:
    """Return whether the engine must leave these tensors to torch's operators.

    While a dispatch mode is active (one that traces, counts, or records memory), or of tensors
    without memory: on the meta device, or fake.
    """
    return _modes() > 0 or (len(tensors) > 0 and has_no_values(tensors[0]))


def has_no_values(tensor: Tensor) -> bool:
    """Return whether nobody can ask what the numbers are."""
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


def is_traced() -> bool:
    """Return whether what happens goes into a graph, in which nothing can depend on numbers."""
    if _modes() == 0:
        return False
    from torch.fx.experimental.proxy_tensor import (  # noqa: PLC0415  (slow, and seldom needed)
        get_proxy_mode,
    )

    return get_proxy_mode() is not None


def total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of all elements of all tensors by torch's operators, in float64."""
    filled = [x for x in tensors if x.numel() > 0]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    norms = [torch.linalg.vector_norm(x.detach().double(), norm_type) for x in filled]
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in norms]  # of DTensors
    there = [x.to(whole[0].device) for x in whole]
    total: Tensor = torch.linalg.vector_norm(torch.stack(there), norm_type)
    return total
