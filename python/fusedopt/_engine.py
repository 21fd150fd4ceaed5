"""The engine of this process, and what goes into it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fusedopt import _core

engine = _core.Engine(isa=os.environ.get("FUSEDOPT_ISA", ""))

# Dynamo cannot trace the engine, and warns where it meets it. The public torch.compiler.disable
# would import all of dynamo at once.
not_compiled = torch._compile._disable_dynamo


def number(x: float | Tensor) -> float:
    """Return a hyper-parameter, which may be a one-element tensor, as a float."""
    return float(x.item() if isinstance(x, Tensor) else x)
