"""What all optimizers do with all gradients together: clip, unscale, skip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt import _engine, _norms, _ranks, clip
from fusedopt._engine import Scaling
from fusedopt._pending import Pending
from fusedopt._skipping import Skips

NOTHING = Pending()


def found_inf(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler has told the optimizer to skip: torch sums it over devices."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and _engine.number(found) != 0


def _inverse(scale: Any) -> float | Tensor:
    """Return one over a loss scale; of one on a device, whatever its shape, without dimensions."""
    inverse = 1.0 / _engine.number_or_device(scale)
    return inverse.reshape(()) if isinstance(inverse, Tensor) else inverse


class Clips(Skips):
    """Clipping, loss scales and skipped steps, for `fusedopt._base.Fused`."""

    _norm: float | Tensor | None = None  # what grad_norm returns
    _pending: Pending = NOTHING
    _scaler_asks: bool = False  # a fusedopt.GradScaler wants to know of non-finite gradients
    _release: object = None  # what release_gradients has made of it
    _made_by_zero: bool = False
    _split: str | None = None  # what has split the parameters among ranks; None if not looked for

    # ---- what is asked of a step -------------------------------------------------------------

    def _scaling(self, pending: Pending = NOTHING) -> Scaling:
        scale = getattr(self, "grad_scale", None)  # what a GradScaler leaves here
        given = self.defaults  # where the options are; found faster so
        norm, skips = given.get("max_grad_norm"), given.get("skip_nonfinite", False)
        watch = self._watch(pending.norm) if "skip_spikes" in given else None
        scaling = Scaling.__new__(  # as the class does, which makes a dict of these first
            Scaling,
            unscale=1.0 if scale is None else _inverse(scale),
            coefficient=pending.coefficient,
            max_norm=None if norm is None else _engine.valid_max_norm(norm, "max_grad_norm"),
            skip_nonfinite=skips or self._scaler_asks,
            skip=self._unknown_skip(pending),
            spikes=watch,
            says_factor=False,
        )
        if (
            norm is not None
            or self._scaler_asks
            or scale is not None
            or ((skips or watch) and pending.norm is None)
        ):
            self._refuse_if_split()
        # (Tensors first: to compare one would be to wait for it.)
        if self._release is not None and (
            any(isinstance(x, Tensor) for x in scaling) or scaling != Scaling()
        ):
            self._refuse_if_released()
        return scaling

    def _asks_for_norm(self, scaling: Scaling) -> bool:
        """Return whether the norm of this step is to be in `grad_norm`: not for a scaler alone."""
        watch = scaling.spikes
        return (
            scaling.max_norm is not None
            or self.defaults.get("skip_nonfinite", False)
            or (watch is not None and watch.norm is None)
        )

    def _is_to_skip(self, pending: Pending) -> bool:
        """Return whether it is known before the step that gradients are infinite or NaN."""
        found, norm = getattr(self, "found_inf", None), pending.norm
        if found is not None and not _engine.on_device(found) and found_inf(self):
            return True
        if norm is None or isinstance(norm, Tensor):
            return False
        return self.skip_nonfinite and not math.isfinite(norm)

    def _unknown_skip(self, pending: Pending) -> Tensor | None:
        """Return what a device knows of that: not 0 if they are; None if none knows anything."""
        found = getattr(self, "found_inf", None)
        if found is None and not isinstance(pending.norm, Tensor):
            return None
        skips = [found.double()] if found is not None and _engine.on_device(found) else []
        if self.skip_nonfinite and isinstance(pending.norm, Tensor):
            skips.append((~pending.norm.isfinite()).double())
        return torch.stack([x.reshape(()) for x in skips]).sum() if skips else None

    def _refuse_if_released(self) -> None:
        """Raise an error if gradients are gone before what was asked of them can be known."""
        if self._release is not None:
            raise RuntimeError(
                "release_gradients frees each gradient before those of other parameters exist, but "
                "max_grad_norm, skip_nonfinite, skip_spikes, clip_grad_norm_ and gradient scalers "
                "need all at once; do without them, or remove() the release and let step() clip"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does."""
        self._split = None
        super().add_param_group(param_group)

    def _refuse_if_split(self) -> None:
        """Raise an error if the ranks would part, each with the norm of its own gradients."""
        if not _ranks.several():
            return
        if self._split is None:
            self._split = _ranks.who_splits(self._parameters(), self._made_by_zero)
        if self._split:
            clip_model = (
                "clip by fusedopt.clip_grad_norm_(model.parameters(), max_norm)"
                if self._made_by_zero
                else "clip by model.clip_grad_norm_(max_norm), unscale by ShardedGradScaler"
            )
            raise RuntimeError(
                "max_grad_norm, skip_nonfinite, skip_spikes, clip_grad_norm_ and amp_scaling "
                f"decide by the gradients of the optimizer, and {self._split} leaves each rank "
                f"others: the ranks would part. Before the step, {clip_model}; or hand a norm over "
                "all ranks to clip_grads_with_norm_(max_norm, total_norm), which skip_nonfinite "
                "and skip_spikes heed, too"
            )

    # ---- what users call ---------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients before clipping, unscaled, that was computed last.

        A 0-dim float32 tensor on the parameters' device; None if nothing asked for the norm of the
        last step: neither ``max_grad_norm``, ``skip_nonfinite``, ``skip_spikes``, nor
        `clip_grad_norm_`.
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
        which is not modified. The factor serves exactly one step, of the gradients that are there
        now; `zero_grad` drops it. What may happen between the two: docs/integrations.md.

        Args:
            max_norm: the largest norm, 0 or more; ``inf`` clips nothing.
            norm_type: its order, ``inf`` included.
            error_if_nonfinite: raise an error if the norm is infinite or NaN.

        Returns:
            The norm before clipping, a 0-dim float32 tensor.

        Raises:
            ValueError: max_norm is negative or NaN.
            RuntimeError: the norm, in float32, is infinite or NaN, and ``error_if_nonfinite``; or
                gradients are freed during backward (`release_gradients`); or they have been
                changed since they were clipped, without a step, which the next step raises, too; or
                each rank has others (FSDP1, ZeroRedundancyOptimizer).
        """
        itself = self._itself()
        itself._refuse_if_released()
        itself._refuse_if_split()
        max_norm = _engine.valid_max_norm(max_norm)
        norm_type = float(norm_type)
        gradients = itself._gradients()
        before = itself._still_pending(gradients, clips_again=True)
        norm = _norms.total_norm(gradients, norm_type) * before.coefficient
        returned = itself._as_tensor(norm)
        if error_if_nonfinite:
            clip.check_finite(returned, norm_type, wide=norm)
        itself._clip_by(max_norm, norm, gradients, before)
        return returned

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
            RuntimeError: gradients are freed during backward, or have been changed since they were
                clipped, as for `clip_grad_norm_`.
        """
        itself = self._itself()
        itself._refuse_if_released()
        whole = getattr(total_norm, "full_tensor", None)  # of a DTensor
        norm = _engine.number_or_device(whole() if whole else total_norm)
        max_norm = _engine.valid_max_norm(max_norm)
        gradients = itself._gradients()
        before = itself._still_pending(gradients, clips_again=True)
        itself._clip_by(max_norm, norm, gradients, before)

    @_engine.not_compiled  # dynamo of torch 2.10 fails where an optimizer sets an attribute
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as torch does, and forget what `clip_grad_norm_` found of them."""
        self._itself()._pending = NOTHING
        super().zero_grad(set_to_none)

    def _clip_by(
        self,
        max_norm: float,
        norm: float | Tensor,
        gradients: Sequence[Tensor],
        before: Pending,
    ) -> None:
        coefficient = before.coefficient * clip.coefficient(norm, max_norm)
        pending = Pending(coefficient, norm, gradients)
        if not pending.sees_changes():
            clip.scale_(gradients, coefficient)
            pending = Pending(1.0, norm, gradients)
        self._pending = pending
        self._norm = norm

    def _still_pending(
        self, gradients: Sequence[Tensor] | None = None, *, clips_again: bool = False
    ) -> Pending:
        """Return what waits for this step, or for this clip; see `Pending.serves`."""
        pending = self._pending
        if pending is NOTHING:
            return pending
        if gradients is None:
            gradients = self._gradients()
        return (
            pending if pending.serves(gradients, self._name, clips_again=clips_again) else NOTHING
        )

    def _name(self, gradient: Tensor) -> str:
        """Return whose gradient it is, for a message."""
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p.grad is gradient:
                    names = group.get("param_names")
                    return names[j] if names else f"parameter {j} of group {i}"
        raise AssertionError

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [grad for p in self._parameters() if (grad := p.grad) is not None]

    def _norm_of_gradients(self, scaling: Scaling) -> float | Tensor:
        return _norms.total_norm(self._gradients(), 2) * scaling.unscale

    # Where this is set, a GradScaler leaves the scale of the gradients to `step`.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.amp_scaling or self._scaler_asks

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore what torch's constructors set for ``fused=True``."""
