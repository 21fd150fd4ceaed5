"""Stepping each parameter during the backward pass, so that no gradient need be kept."""

from __future__ import annotations

from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fusedopt._base import Fused
from fusedopt._followers import Follower
from fusedopt._wrapper import fused_in, layers, wrappers_of

# Where a parameter is listed: its names there, by the index of a group.
Places = dict[int, list[str | None]]


class GradientRelease:
    """What `release_gradients` returns; `remove`, or the end of a with block, undoes it."""

    def __init__(self, optimizer: Fused, followers: tuple[Follower, ...]) -> None:
        self._optimizer = optimizer
        self._followers = followers
        self._handles: list[Any] = []
        # The hooks know it weakly: the collector does not see what torch holds for them, and would
        # never free the model. So that it lives as long as the optimizer does, that has it.
        optimizer._release = self

    def remove(self) -> None:
        """Let gradients stay until `step` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizer._release = None

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _add(self, p: Tensor, places: Places) -> None:
        """Step p during backward, wherever it is listed."""
        weakly = ref(self)

        def step_and_free(p: Tensor) -> None:
            release = weakly()
            if release is None:
                raise RuntimeError(
                    "the optimizer that was to step this parameter during backward is gone: keep "
                    "it, or what release_gradients returned, while the model is trained"
                )
            release._step(p, places)
            p.grad = None

        # (Torch leaves it untyped.)
        hook = p.register_post_accumulate_grad_hook(step_and_free)  # type: ignore[no-untyped-call]
        self._handles.append(hook)

    def _step(self, p: Tensor, places: Places) -> None:
        optimizer = self._optimizer
        scaling = optimizer._scaling()
        # By their indices: loading a checkpoint replaces the groups.
        groups = []
        for index, names in places.items():
            group = {**optimizer.param_groups[index], "params": [p] * len(names)}
            if names[0] is not None:
                group["param_names"] = names
            groups.append(group)
        around = optimizer._followers  # a step with a closure may be under way
        optimizer._followers = self._followers
        optimizer._begin_watch_of_released(p, scaling)
        try:
            optimizer._update(groups, scaling)
        finally:
            optimizer._followers = around


def release_gradients(model: torch.nn.Module, optimizer: Optimizer) -> GradientRelease:
    r"""Step each parameter as soon as its gradient is complete, and free the gradient.

    The backward pass then never holds the gradients of the whole model, only those that it is
    about to use. The numbers have the bits of the plain run: an update needs no other parameter.

    The rest of the training loop may stay as it is. ``optimizer.step()`` finds no gradients, or
    those of parameters that are not the model's; schedulers and hooks of `step` count it, and a
    `Lookahead` or an `EMA` needs it to count. A closure passed to `step` works: its backward pass
    makes the update. Hyper-parameters are read when a parameter is stepped, so each backward pass
    is one step, and gradients cannot be accumulated over several. Keep the optimizer, or what this
    returns. A gradient scaler does not go with it, and cannot be refused in time: a scaled loss
    looks like any other, and has stepped the parameters before ``scaler.step`` raises an error.

    Args:
        model: its parameters are stepped, as far as the optimizer has them and they require a
            gradient now. Those of `fully_shard` are stepped after their gradient is reduced.
        optimizer: a fused optimizer, or a `Lookahead` or an `EMA` around one.

    Returns:
        A handle to undo it.

    Raises:
        RuntimeError: max_grad_norm, skip_nonfinite, skip_spikes or ``clip_grad_norm_`` ask for the
            norm of all gradients, here or later; or the optimizer's gradients are released already.
        TypeError: optimizer is not one of fusedopt's, or the model is a DistributedDataParallel,
            which reduces gradients only after they have been accumulated.
    """
    fused = fused_in(optimizer)
    if fused is None:
        inner = type(layers(optimizer)[-1]).__name__
        raise TypeError(
            f"release_gradients steps optimizers of fusedopt, got {inner}; use the fusedopt class "
            "of that name"
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise TypeError(
            "release_gradients would step before DistributedDataParallel has averaged the "
            "gradients, and its replicas would drift apart; use fully_shard instead"
        )
    if fused._release is not None:
        raise RuntimeError("the gradients of this optimizer are released already")
    release = GradientRelease(fused, wrappers_of(optimizer))
    try:
        fused._scaling()
    except (RuntimeError, ValueError):
        release.remove()
        raise
    places: dict[Tensor, Places] = {}
    for index, group in enumerate(fused.param_groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for p, name in zip(group["params"], names, strict=True):
            places.setdefault(p, {}).setdefault(index, []).append(name)
    of_model = set(model.parameters())
    for p, where in places.items():
        if p in of_model and p.requires_grad:
            release._add(p, where)
    return release
