"""Names of torch, for libraries that take no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusedopt.adagrad import Adagrad
from fusedopt.adam import Adam, AdamW
from fusedopt.muon import Muon
from fusedopt.radam import RAdam
from fusedopt.rmsprop import RMSprop
from fusedopt.sgd import SGD


@contextmanager
def as_torch_optim() -> Iterator[None]:
    """Let the classes of torch.optim be those of fusedopt inside the with block.

    For libraries that look an optimizer up by its name in ``torch.optim`` when they make it. It
    reaches all threads of the process, but nobody who imported a class itself before. Optimizers
    that were made inside stay what they are.
    """
    kept = {cls.__name__: getattr(torch.optim, cls.__name__) for cls in _CLASSES}
    try:
        for cls in _CLASSES:
            setattr(torch.optim, cls.__name__, cls)
        yield
    finally:
        for name, cls in kept.items():
            setattr(torch.optim, name, cls)


_CLASSES = (SGD, Adam, AdamW, RMSprop, Adagrad, RAdam, Muon)
