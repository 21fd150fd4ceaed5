"""The oracle for bits: reference() in numpy, in compute precision, rounded by torch's casts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt._base import Fused


def reference_update(
    optimizer: Fused, group: dict[str, Any], t: int, streams: list[Tensor], grad_scale: float = 1.0
) -> list[Tensor]:
    """Return [param, *states] after step number t from [param, grad, *states], as stored."""
    compute = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
    p, g, *states = (x.detach().to(compute).reshape(-1).numpy() for x in streams)
    sign = -1.0 if group["maximize"] else 1.0
    with np.errstate(all="ignore"):  # infinities and NaN are inputs like any other
        updated = optimizer.reference(  # type: ignore[attr-defined]
            p,
            g * (sign * grad_scale),
            *states,
            **optimizer._scalars(group, t),
            flags=optimizer._rule(group).flags,
        )
    stored = [streams[0], *streams[2:]]
    assert all(x.dtype == p.dtype for x in updated), "the reference left compute precision"
    return [
        torch.from_numpy(x).to(old.dtype).reshape(old.shape)
        for x, old in zip(updated, stored, strict=True)
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, every NaN counting as one value."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.detach().contiguous(), b.detach().contiguous()
    equal = (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())
    return bool(equal.all())
