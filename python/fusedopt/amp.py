"""A gradient scaler that leaves the gradients alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from fusedopt import _norms
from fusedopt._wrapper import fused_in

_SCALED = ("grad_scale", "found_inf")  # what a scaler tells an optimizer


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` with one pass less over the gradients of fused optimizers.

    `step` lets the optimizer find infinite and NaN gradients in the pass that computes their norm,
    and unscale and clip them inside the update: for Adam 32 bytes a parameter, where
    ``unscale_``, clipping and a fused step move 48. Scales grow and back off as torch's do. Other
    optimizers, and gradients that `unscale_` has been called for, are treated as by torch.

    Arguments and errors: torch's.
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step the optimizer, unless its gradients are infinite or NaN; see `GradScaler`."""
        fused = fused_in(optimizer)
        if not self._enabled or fused is None or not self._is_ready(optimizer):
            return super().step(optimizer, *args, **kwargs)
        before = {name: vars(fused)[name] for name in _SCALED if name in vars(fused)}
        fused._scaler_asks = True
        try:
            result = super().step(optimizer, *args, **kwargs)
        except BaseException:  # torch would leave them there, and multiply by them the next time
            for name in _SCALED:
                vars(fused).pop(name, None)
            vars(fused).update(before)
            raise
        finally:
            fused._scaler_asks = False
        self._record(optimizer, fused._overflowed)
        return result

    def _is_ready(self, optimizer: Optimizer) -> bool:
        """Return whether nothing was done to this optimizer's gradients since the last update."""
        return self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY

    def _check_inf_per_device(self, optimizer: Optimizer) -> Any:
        """Let torch go on without a pass of its own where the optimizer will do it."""
        fused = fused_in(optimizer)
        if fused is not None and fused._scaler_asks:
            return self._record(optimizer, False)
        return super()._check_inf_per_device(optimizer)

    def _record(
        self, optimizer: Optimizer, skipped: bool | torch.Tensor
    ) -> dict[torch.device, torch.Tensor]:
        assert self._scale is not None
        device = self._scale.device
        if isinstance(skipped, torch.Tensor):
            found = {device: _norms.moved(skipped, device, torch.float32)}
        else:
            found = {device: torch.full((), float(skipped), dtype=torch.float32, device=device)}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found
