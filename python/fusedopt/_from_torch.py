"""An optimizer that goes on where one of torch's has arrived."""

from __future__ import annotations

from typing import TypeVar

from torch.optim import Optimizer

from fusedopt import clip
from fusedopt._options import HasOptions

T = TypeVar("T", bound="FromTorch")


class FromTorch(HasOptions):
    """`from_torch`, for `fusedopt._base.Fused`."""

    @classmethod
    def from_torch(
        cls: type[T],
        optimizer: Optimizer,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
    ) -> T:
        """Take over an optimizer of the torch class of the same name, in mid-run.

        Param groups, state and hooks are shared, not copied: schedulers that were made for the
        other one and handles of hooks keep working, until a checkpoint is loaded, which gives the
        new one groups of its own; make schedulers anew then. Let the other one make no more steps.

        Args:
            optimizer: an optimizer of torch.
            max_grad_norm: as of the constructor.
            skip_nonfinite: as of the constructor.
            amp_scaling: as of the constructor.

        Raises:
            TypeError: optimizer is not exactly of the torch class of that name, whose step this
                one replaces.
            ValueError: max_grad_norm is negative or NaN.
        """
        parent = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))
        if parent is Optimizer:
            raise TypeError(f"torch has no {cls.__name__} to take over; use the constructor")
        if type(optimizer) is not parent:
            raise TypeError(
                f"{cls.__name__}.from_torch takes over a torch.optim.{parent.__name__}, got "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}; use its class's own, or "
                "load its state_dict()"
            )
        if max_grad_norm is not None:
            clip.valid_max_norm(max_grad_norm, "max_grad_norm")
        new = cls.__new__(cls)
        shared = {key: value for key, value in vars(optimizer).items() if key.endswith("_hooks")}
        shared.update(state=optimizer.state, param_groups=optimizer.param_groups)
        new.__setstate__({**shared, "defaults": {**optimizer.defaults}})
        new.max_grad_norm = max_grad_norm
        new.skip_nonfinite = skip_nonfinite
        new.amp_scaling = amp_scaling
        return new
