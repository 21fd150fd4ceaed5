"""Models with averages for weights: the one that is trained, for a while, or an AveragedModel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fusedopt._exchanged import exchange
from fusedopt._followers import Kind
from fusedopt._wrapper import layers


class Averages(Protocol):
    """What this takes from a `fusedopt.EMA`."""

    kind: Kind
    decay: float
    every: int
    param_groups: Any
    state: Any
    _loaded: dict[Tensor, Tensor]
    _inside: bool

    def average(self, p: Tensor) -> Tensor | None: ...

    def first(self, p: Tensor) -> Tensor: ...

    def follows(self, p: Tensor) -> bool: ...


# ---- in the model that is trained ----------------------------------------------------------------


def inside(what: str) -> RuntimeError:
    """Return the error of what cannot be done while averages are in the model."""
    return RuntimeError(
        f"{what} inside of swapped(), where the averages are in the model in place of the weights; "
        "leave the with block first"
    )


@contextmanager
def swapped(ema: Averages, model: Module | None) -> Iterator[None]:
    """Keep the averages in the place of the weights inside the with block."""
    if ema._inside:
        raise inside("swapped()")
    with ExitStack() as stack:
        _refuse_what_takes_weights(layers(ema)[-1], stack)
        ema._inside = True
        stack.callback(_set_outside, ema)
        stack.callback(_gather_anew, model)  # once the weights are back
        for p in dict.fromkeys(p for group in ema.param_groups for p in group["params"]):
            average = ema.average(p)
            if average is not None:
                stack.callback(exchange(p, average))
        _gather_anew(model)
        yield


def _set_outside(ema: Averages) -> None:
    ema._inside = False


def _refuse_what_takes_weights(optimizer: Optimizer, stack: ExitStack) -> None:
    """Let an optimizer refuse meanwhile what takes its parameters for the weights."""

    def refusal(what: str) -> Callable[..., Any]:
        def refuse(*_: Any, **__: Any) -> Any:
            raise inside(what)

        return refuse

    for hook in (
        optimizer.register_step_pre_hook(refusal("a step")),
        optimizer.register_state_dict_pre_hook(refusal("a checkpoint of the optimizer")),
        optimizer.register_load_state_dict_pre_hook(refusal("loading a checkpoint")),
    ):
        stack.callback(hook.remove)
    for name, what in (
        ("_update", "a step"),  # which release_gradients makes of its own
        ("master_state_dict", "a checkpoint of master weights"),
        ("load_master_state_dict", "loading master weights"),
    ):
        if hasattr(optimizer, name):
            vars(optimizer)[name] = refusal(what)
            stack.callback(vars(optimizer).pop, name)


def _gather_anew(model: Module | None) -> None:
    """Let the modules of fully_shard forget what they have gathered."""
    for module in model.modules() if model else ():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


# ---- AveragedModel -------------------------------------------------------------------------------


def to_averaged_model(ema: Averages, model: Module) -> AveragedModel:
    """Return a copy of a model with the averages for its weights."""
    if ema._inside:
        raise inside("to_averaged_model()")
    multi_avg_fn = get_ema_multi_avg_fn(ema.decay)  # type: ignore[no-untyped-call]  # of torch
    made = AveragedModel(model, multi_avg_fn=multi_avg_fn)
    with torch.no_grad():
        for p, q in zip(model.parameters(), made.module.parameters(), strict=True):
            average = ema.average(p)
            if average is not None:
                q.copy_(average)
        steps = max(group.get(ema.kind.counter, 0) for group in ema.param_groups)
        made.n_averaged.fill_(steps // ema.every)
    return made


@torch.no_grad()
def load_averaged_model(ema: Averages, averaged: AveragedModel, model: Module) -> None:
    """Take the weights of an AveragedModel for averages."""
    if ema._inside:
        raise inside("load_averaged_model()")
    named, others = dict(model.named_parameters()), dict(averaged.module.named_parameters())
    for name in named.keys() | others.keys():
        shapes = [tuple(some[name].shape) if name in some else None for some in (named, others)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} of the averaged model is "
                f"{'missing' if shapes[1] is None else f'of shape {shapes[1]}'}, expected "
                f"{'none' if shapes[0] is None else f'one of shape {shapes[0]}'}; pass the model "
                "that it was made for"
            )
    own = {p for group in ema.param_groups for p in group["params"]}
    for name, p in named.items():
        if p not in own or not ema.follows(p):
            continue
        average = ema.average(p)
        if average is None:
            average = ema._loaded[p] = ema.first(p)
        average.copy_(others[name])
    for group in ema.param_groups:
        group[ema.kind.counter] = int(averaged.n_averaged) * ema.every
