"""What all optimizers do with all gradients together: clip, unscale, skip."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt import _engine, _norms, clip
from fusedopt._engine import Scaling


class Pending(NamedTuple):
    """What `Fused.clip_grad_norm_` has found out for the next step."""

    coefficient: float | Tensor = 1.0
    norm: float | Tensor | None = None
    mark: tuple[Tensor, Tensor, int] | None = None
    """Whose norm it is: the smallest gradient, its parameter and its version."""


_NOTHING = Pending()


def found_inf(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler has told the optimizer to skip: torch sums it over devices."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and _engine.number(found) != 0


class Clips(Optimizer):
    """Clipping, loss scales and skipped steps, for `fusedopt._base.Fused`."""

    max_grad_norm: float | None
    skip_nonfinite: bool
    amp_scaling: bool

    _norm: float | Tensor | None = None  # what grad_norm returns
    _pending: Pending = Pending()
    _scaler_asks: bool = False  # a fusedopt.GradScaler wants to know of non-finite gradients
    _released: bool = False  # by release_gradients

    # ---- what is asked of a step -------------------------------------------------------------

    def _scaling(self, pending: Pending = _NOTHING) -> Scaling:
        scale = getattr(self, "grad_scale", None)  # what a GradScaler leaves here
        norm = self.max_grad_norm
        scaling = Scaling(
            unscale=1.0 if scale is None else 1.0 / _engine.number_or_device(scale),
            coefficient=pending.coefficient,
            max_norm=None if norm is None else clip.valid_max_norm(norm, "max_grad_norm"),
            skip_nonfinite=self.skip_nonfinite or self._scaler_asks,
            skip=self._unknown_skip(pending),
        )
        # (Tensors first: to compare one would be to wait for it.)
        if self._released and (any(isinstance(x, Tensor) for x in scaling) or scaling != Scaling()):
            self._refuse_if_released()
        return scaling

    def _is_to_skip(self, pending: Pending) -> bool:
        """Return whether it is known before the step that gradients are infinite or NaN."""
        found = not _engine.on_device(getattr(self, "found_inf", None)) and found_inf(self)
        norm = pending.norm
        return found or (
            self.skip_nonfinite and not isinstance(norm, Tensor) and not math.isfinite(norm or 0.0)
        )

    def _unknown_skip(self, pending: Pending) -> Tensor | None:
        """Return what a device knows of that: not 0 if they are; None if none knows anything."""
        found = getattr(self, "found_inf", None)
        skips = [found.double()] if found is not None and _engine.on_device(found) else []
        if self.skip_nonfinite and isinstance(pending.norm, Tensor):
            skips.append((~pending.norm.isfinite()).double())
        return torch.stack([x.reshape(()) for x in skips]).sum() if skips else None

    def _refuse_if_released(self) -> None:
        """Raise an error if gradients are gone before what was asked of them can be known."""
        if self._released:
            raise RuntimeError(
                "release_gradients frees each gradient before those of other parameters exist, but "
                "max_grad_norm, skip_nonfinite, clip_grad_norm_ and gradient scalers need all at "
                "once; do without them, or remove() the release and let step() clip"
            )

    # ---- what users call ---------------------------------------------------------------------

    def _itself(self) -> Clips:
        """Return the optimizer itself.

        Lightning's wrapper takes on the class of what it wraps, so the methods below get it as
        self: what they keep there, the step would never see.
        """
        itself: Clips = vars(self).get("_optimizer", self)
        return itself

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients before clipping, unscaled, that was computed last.

        A 0-dim float32 tensor on the parameters' device; None if nothing asked for the norm of the
        last step: neither ``max_grad_norm``, nor ``skip_nonfinite``, nor `clip_grad_norm_`.
        """
        norm = self._itself()._norm
        return None if norm is None else self._as_tensor(norm)

    def _as_tensor(self, norm: float | Tensor) -> Tensor:
        if isinstance(norm, Tensor):
            return norm.float()
        device = next((p.device for p in self._parameters()), None)
        return torch.tensor(norm, dtype=torch.float32, device=device)

    @_engine.not_compiled
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Compute the norm of all gradients now, and scale them inside the next step.

        `torch.nn.utils.clip_grad_norm_` for the parameters of this optimizer, but for ``p.grad``,
        which is not modified. The factor serves exactly one step; `zero_grad` drops it.

        Args:
            max_norm: the largest norm, 0 or more.
            norm_type: its order, ``inf`` included.
            error_if_nonfinite: raise an error if the norm is infinite or NaN.

        Returns:
            The norm before clipping, a 0-dim float32 tensor.

        Raises:
            ValueError: max_norm is negative or NaN.
            RuntimeError: the norm is infinite or NaN, and ``error_if_nonfinite``; or gradients are
                freed during backward (`release_gradients`).
        """
        itself = self._itself()
        itself._refuse_if_released()
        max_norm = clip.valid_max_norm(max_norm)
        norm_type = float(norm_type)
        pending = itself._still_pending(unchanged=True)
        norm = _norms.total_norm(itself._gradients(), norm_type) * pending.coefficient
        if error_if_nonfinite:
            clip.check_finite(norm, norm_type)
        itself._clip_by(max_norm, norm, pending)
        return itself._as_tensor(norm)

    @_engine.not_compiled
    def clip_grads_with_norm_(self, max_norm: float, total_norm: float | Tensor) -> None:
        """Scale the gradients inside the next step by a norm that was computed elsewhere.

        For a norm over more than this optimizer's parameters: several optimizers, pipeline or
        expert parallelism. The factor serves exactly one step; `zero_grad` drops it. With
        ``skip_nonfinite``, an infinite or NaN norm skips that step.

        Args:
            max_norm: the largest norm, 0 or more.
            total_norm: the norm, a number or a one-element tensor.

        Raises:
            ValueError: max_norm is negative or NaN.
            RuntimeError: gradients are freed during backward (`release_gradients`).
        """
        itself = self._itself()
        itself._refuse_if_released()
        whole = getattr(total_norm, "full_tensor", None)  # of a DTensor
        norm = _engine.number_or_device(whole() if whole else total_norm)
        max_norm = clip.valid_max_norm(max_norm)
        itself._clip_by(max_norm, norm, itself._still_pending(unchanged=True))

    @_engine.not_compiled  # dynamo of torch 2.10 fails where an optimizer sets an attribute
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as torch does, and forget what `clip_grad_norm_` found of them."""
        self._itself()._pending = Pending()
        super().zero_grad(set_to_none)

    def _clip_by(self, max_norm: float, norm: float | Tensor, before: Pending) -> None:
        coefficient = before.coefficient * clip.coefficient(norm, max_norm)
        pairs = [(p, p.grad) for p in self._parameters() if p.grad is not None]
        mark = None
        if pairs:
            p, gradient = min(pairs, key=lambda pair: pair[1].numel())
            mark = (p, gradient, _version(gradient))
        self._pending = Pending(coefficient, norm, mark)
        self._norm = norm

    def _still_pending(self, unchanged: bool = False) -> Pending:
        """Return what waits for this step: nothing once the gradients are others.

        A step that a GradScaler skips does not come here, and model.zero_grad() says nothing.
        """
        if self._pending.mark is not None:
            p, gradient, version = self._pending.mark
            if p.grad is gradient and (not unchanged or _version(gradient) == version):
                return self._pending
        return Pending()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters() if p.grad is not None]

    def _norm_of_gradients(self, scaling: Scaling) -> float | Tensor:
        return _norms.total_norm(self._gradients(), 2) * scaling.unscale

    # Where this is set, a GradScaler leaves the scale of the gradients to `step`.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.amp_scaling or self._scaler_asks

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore what torch's constructors set for ``fused=True``."""


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which counts changes in place
