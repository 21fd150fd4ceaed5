"""Fused, bit-exact drop-in optimizers for PyTorch."""

from importlib.metadata import version

import torch  # first: the engine must find torch's own OpenMP runtime loaded

from fusedopt import _core
from fusedopt.adam import Adam, AdamW
from fusedopt.lion import Lion
from fusedopt.rmsprop import RMSprop
from fusedopt.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion", "RMSprop", "isas"]
__version__ = version("fusedopt")

del torch


def isas() -> tuple[str, ...]:
    """Return the instruction sets with kernels that this machine can run, best first."""
    return _core.isas()
