"""An optimizer that goes on where one of torch's has arrived."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.optim import Optimizer

from fusedopt._options import OPTIONS, check_options
from fusedopt._storage import Stores

T = TypeVar("T", bound="FromTorch")


class FromTorch(Stores):
    """`from_torch`, for `fusedopt._base.Fused`."""

    @classmethod
    def from_torch(
        cls: type[T],
        optimizer: Optimizer,
        **options: Any,
    ) -> T:
        """Take over an optimizer of the torch class of the same name, in mid-run.

        Param groups, state and hooks are shared, not copied: schedulers that were made for the
        other one and handles of hooks keep working, until a checkpoint is loaded, which gives the
        new one groups of its own; make schedulers anew then. With a ``state_dtype``, the states
        that are there are stored in it. Let the other one make no more steps.

        Args:
            optimizer: an optimizer of torch.
            **options: of the constructor, as far as torch's class does not have them.

        Raises:
            TypeError: optimizer is not exactly of the torch class of that name, whose step this
                one replaces.
            ValueError: an option is out of its range.
        """
        parent = next(
            base for base in cls.__mro__ if f"{base.__module__}.".startswith("torch.optim.")
        )
        if parent is Optimizer:
            raise TypeError(f"torch has no {cls.__name__} to take over; use the constructor")
        if type(optimizer) is not parent:
            raise TypeError(
                f"{cls.__name__}.from_torch takes over a torch.optim.{parent.__name__}, got "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}; use its class's own, or "
                "load its state_dict()"
            )
        unknown = options.keys() - OPTIONS.keys()
        if unknown:
            raise TypeError(f"from_torch has no options {sorted(unknown)}, expected {[*OPTIONS]}")
        check_options(options)
        new = cls.__new__(cls)
        shared = {key: value for key, value in vars(optimizer).items() if key.endswith("_hooks")}
        shared.update(state=optimizer.state, param_groups=optimizer.param_groups)
        new.__setstate__({**shared, "defaults": {**optimizer.defaults}})
        for name, value in options.items():
            setattr(new, name, value)
        new._store_what_is_there()
        return new
