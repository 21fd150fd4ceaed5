"""Fused drop-in optimizers for PyTorch, the same bits on every machine."""

from importlib.metadata import version as _version

import torch as _torch  # noqa: F401  (first: the engine shares the OpenMP runtime torch has loaded)

from fusedopt import _core
from fusedopt._spikes import Spikes as Spikes
from fusedopt.adagrad import Adagrad as Adagrad
from fusedopt.adam import Adam as Adam
from fusedopt.adam import AdamW as AdamW
from fusedopt.amp import GradScaler as GradScaler
from fusedopt.clip import clip_grad_norm_ as clip_grad_norm_
from fusedopt.clip import get_total_norm as get_total_norm
from fusedopt.ema import EMA as EMA
from fusedopt.groups import decay_groups as decay_groups
from fusedopt.groups import muon_groups as muon_groups
from fusedopt.lion import Lion as Lion
from fusedopt.lookahead import Lookahead as Lookahead
from fusedopt.muon import Muon as Muon
from fusedopt.muon_with_aux_adam import MuonWithAuxAdam as MuonWithAuxAdam
from fusedopt.radam import RAdam as RAdam
from fusedopt.release import GradientRelease as GradientRelease
from fusedopt.release import release_gradients as release_gradients
from fusedopt.rmsprop import RMSprop as RMSprop
from fusedopt.sgd import SGD as SGD
from fusedopt.swap import as_torch_optim as as_torch_optim

__version__ = _version("fusedopt")


def isas() -> tuple[str, ...]:
    """Return the instruction sets with kernels that this machine can run, best first."""
    return _core.isas()
