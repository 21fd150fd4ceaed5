"""What torch wraps around the step of an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fusedopt import _engine


class Hooked(Optimizer):
    """Calls hooks and informs profilers as torch does, but not where there are none.

    What that takes is in no cache after a model's passes, nor after a large step: 50 us.
    """

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step that torch's hooks are called around, and profilers told of."""
        watched = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Hooked, *args: Any, **kwargs: Any) -> Any:
            # (With a closure, hooks may be added on the way.)
            if args or kwargs or self._is_watched():
                return watched(self, *args, **kwargs)
            out = func(self)
            self._optimizer_step_code()  # by its name, profilers of Python find the optimizer
            return out

        return step

    def _is_watched(self) -> bool:
        # With CUDA, always: torch's monitor of it asks for no callback.
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _engine.engine.is_observed()
            or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no types here
        )

    def _patch_step_function(self) -> None:
        super()._patch_step_function()
        # Hooks and all are hidden from dynamo, which warns of them, too.
        cls: Any = type(self)
        if not getattr(cls.step, "hidden_from_dynamo", False):
            cls.step = _engine.not_compiled(cls.step)
            cls.step.hidden_from_dynamo = True
