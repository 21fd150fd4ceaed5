"""Who takes part: fusedopt, torch's own ways to step, and the libraries that are installed."""

from __future__ import annotations

import atexit
import importlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import fusedopt
from fusedopt.bench import modes, oracle
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import Row

Build = Callable[[Row, list[Tensor]], Step]

# torch.compile takes about half a second a tensor.
MOST_COMPILED_TENSORS = 200


class Contestant(NamedTuple):
    """A way to do the step of a row."""

    name: str
    enters: Callable[[Row], bool]
    """Whether it claims to do this row: what it lacks by design is no failure."""
    build: Build
    """Return the step, in the row's mode; raises where the contestant cannot do it."""
    missing: str = ""
    """Why it cannot be tried at all."""
    compiles: bool = False
    """Whether the step is compiled when it is first taken."""
    dtype: torch.dtype | None = None
    """Of its parameters, where that is not the row's."""
    check: Callable[[Build, Row], str] = oracle.mistake
    """Return how its numbers are wrong, or nothing."""
    counted: bool = False
    """Whether it needs other bytes than the row: its own are counted then."""


# ---- fusedopt ------------------------------------------------------------------------------------


def fusedopt_way(row: Row, params: list[Tensor]) -> Step:
    """Return the step of the row's optimizer here."""
    return modes.fusedopt_step(getattr(fusedopt, row.optimizer), row, params)


def _fusedopt_torch_scaler(row: Row, params: list[Tensor]) -> Step:
    return modes.amp_scaling_step(getattr(fusedopt, row.optimizer), row, params)


# ---- torch ---------------------------------------------------------------------------------------


def in_torch(row: Row) -> bool:
    """Return whether torch has the row's optimizer."""
    return hasattr(torch.optim, row.optimizer)


def torch_way(**flags: bool) -> Build:
    """Return how the row's optimizer is built from torch's own class."""

    def build(row: Row, params: list[Tensor]) -> Step:
        cls = getattr(torch.optim, row.optimizer)
        return modes.torch_step(cls(params, **row.arguments, **flags), row, params)

    return build


def _trick(row: Row, params: list[Tensor]) -> Step:
    cls = getattr(torch.optim, row.optimizer)
    return modes.grad_scale_step(cls(params, **row.arguments, fused=True), params)


def _compiled(row: Row, params: list[Tensor]) -> Step:
    if len(row.shapes) > MOST_COMPILED_TENSORS:
        raise NotImplementedError(f"compiling {len(row.shapes)} tensors takes many minutes")
    forget_compiled()
    return torch.compile(torch_way(foreach=True)(row, params))


def forget_compiled() -> None:
    """Let the next step that is compiled take as long as the first one."""
    torch._dynamo.reset()  # or it gives up on compiling one more step
    # With a cache from earlier, it would not compile.
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache


# ---- libraries -----------------------------------------------------------------------------------

# Where each keeps its classes, by the name of the optimizer here, and arguments it alone needs.
Classes = dict[str, tuple[str, dict[str, Any]]]

_DEEPSPEED: Classes = {
    "Adam": ("deepspeed.ops.adam.DeepSpeedCPUAdam", {"adamw_mode": False}),
    "AdamW": ("deepspeed.ops.adam.DeepSpeedCPUAdam", {"adamw_mode": True}),
    "Adagrad": ("deepspeed.ops.adagrad.DeepSpeedCPUAdagrad", {}),
    "Lion": ("deepspeed.ops.lion.DeepSpeedCPULion", {}),
}
_LION_PYTORCH: Classes = {"Lion": ("lion_pytorch.Lion", {})}
_OPTIMI: Classes = {
    name: (f"optimi.{name}", {}) for name in ("SGD", "Adam", "AdamW", "RAdam", "Lion")
}
_BITSANDBYTES: Classes = {
    name: (f"bitsandbytes.optim.{name}", {})
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion")
}
# The others of these that it names are torch's own classes.
_PYTORCH_OPTIMIZER: Classes = {
    name: (f"pytorch_optimizer.{name}", {}) for name in ("RAdam", "Lion")
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries say at their import and first step."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def library(name: str, classes: Classes) -> Contestant:
    """Return the contestant that a library's optimizers make, missing if it cannot be imported."""

    def build(row: Row, params: list[Tensor]) -> Step:
        path, extra = classes[row.optimizer]
        optimizer: Optimizer = _find(path)(params, **row.arguments, **extra)
        return modes.torch_step(optimizer, row, params)

    try:
        with quiet():
            for path, _ in classes.values():
                _find(path)
    except Exception as error:  # whatever a broken library raises
        missing = f"{type(error).__name__}: {error}"
    else:
        missing = ""
    return Contestant(name, lambda row: row.optimizer in classes, build, missing)


# ---- all -----------------------------------------------------------------------------------------

OURS = "fusedopt"

_ALWAYS = [
    Contestant(OURS, lambda row: True, fusedopt_way),
    Contestant("fusedopt + torch scaler", lambda row: row.mode == "scaler", _fusedopt_torch_scaler),
    Contestant("torch fused", in_torch, torch_way(fused=True)),
    Contestant(
        "torch fused + grad_scale", lambda row: in_torch(row) and row.mode == "clip", _trick
    ),
    Contestant("torch foreach", in_torch, torch_way(foreach=True)),
    Contestant("torch loop", in_torch, torch_way(foreach=False)),
    # The step alone: each row costs a minute of compilation.
    Contestant(
        "torch.compile",
        lambda row: in_torch(row) and row.mode == "plain",
        _compiled,
        compiles=True,
    ),
]
_LIBRARIES = {
    "DeepSpeed": _DEEPSPEED,
    "lion-pytorch": _LION_PYTORCH,
    "torch-optimi": _OPTIMI,
    "bitsandbytes": _BITSANDBYTES,
    "pytorch-optimizer": _PYTORCH_OPTIMIZER,
}
_SLOW = ("torch.compile", "DeepSpeed", *("bitsandbytes 8", "pytorch-optimizer Flash", "torchao"))


def contestants(peers: str = "", quick: bool = False) -> list[Contestant]:
    """Return fusedopt and its peers.

    Args:
        peers: parts of names, with commas between them: only these peers; empty for all.
        quick: leave out those that compile first or take seconds, unless they are asked for.
    """
    chosen = [each for each in _ALWAYS if is_wanted(each.name, peers, quick)]
    chosen += [
        library(name, classes)
        for name, classes in _LIBRARIES.items()
        if is_wanted(name, peers, quick)
    ]
    return chosen


def is_wanted(name: str, peers: str, quick: bool) -> bool:
    """Return whether somebody takes part: the arguments are those of `contestants`."""
    parts = [part.strip().lower() for part in peers.split(",") if part.strip()]
    if parts:
        return name.startswith(OURS) or any(part in name.lower() for part in parts)
    return not quick or not name.startswith(_SLOW)
