"""The engine of this process, and what goes into it."""

from __future__ import annotations

import os

from torch import Tensor

from fusedopt import _core

engine = _core.Engine(isa=os.environ.get("FUSEDOPT_ISA", ""))


def number(x: float | Tensor) -> float:
    """Return a hyper-parameter, which may be a one-element tensor, as a float."""
    return float(x.item() if isinstance(x, Tensor) else x)
