"""Fused, bit-exact drop-in optimizers for PyTorch."""

from importlib.metadata import version as _version

import torch as _torch  # noqa: F401  (first: the engine shares the OpenMP runtime torch has loaded)

from fusedopt import _core
from fusedopt.adagrad import Adagrad as Adagrad
from fusedopt.adam import Adam as Adam
from fusedopt.adam import AdamW as AdamW
from fusedopt.lion import Lion as Lion
from fusedopt.radam import RAdam as RAdam
from fusedopt.rmsprop import RMSprop as RMSprop
from fusedopt.sgd import SGD as SGD

__version__ = _version("fusedopt")


def isas() -> tuple[str, ...]:
    """Return the instruction sets with kernels that this machine can run, best first."""
    return _core.isas()
