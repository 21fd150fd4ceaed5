"""What some libraries need to know of fused optimizers, one module each.

Each module is for those who have the library: fusedopt neither needs nor imports any of them.
"""

from __future__ import annotations

from typing import Any

from fusedopt._base import Fused


def fused_inside(optimizer: Any) -> Fused | None:
    """Return the fused optimizer inside of any wrappers, if one is there."""
    while hasattr(optimizer, "optimizer"):  # of Lookahead, accelerate's and Lightning's wrappers
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, Fused) else None
