"""Lookahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt import _engine, _operators
from fusedopt._base import Fused
from fusedopt._clipping import found_inf
from fusedopt._hooked import Hooked
from fusedopt._numeric import accumulate
from fusedopt._stored import SLOW

# What belongs to the wrapper; all other attributes are the wrapped optimizer's.
_OWN = {"optimizer", "k", "alpha", "step"}


class Lookahead(Hooked):
    r"""Lookahead around any optimizer of fusedopt or torch: k steps forward, one step back.

    .. math::
        \phi &\leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi
        \quad \text{after every } k \text{-th step}

    with the wrapped optimizer's parameters :math:`\theta`, the fast weights, and slow weights
    :math:`\phi`, which begin where a parameter is before its first step. The k-th step of a fused
    optimizer moves both in the same pass; around any other it takes one more pass.

    It has the wrapped optimizer's ``param_groups``, ``state`` and all other attributes, so
    schedulers, clipping and gradient scalers work through it. State: the wrapped optimizer's, and
    ``slow`` :math:`\phi`, of the parameter's shape, dtype and strides; param groups count steps
    in ``lookahead_step``, 0 to k - 1, so that checkpoints have the count. A step that the
    optimizer skips does not count.

    Source: Zhang et al. 2019, arXiv:1907.08610.

    Args:
        optimizer: the optimizer that makes the steps.
        k: how many steps the fast weights are ahead.
        alpha: how far the slow weights follow, in (0, 1].

    Raises:
        ValueError: k or alpha is out of its range.
        TypeError: optimizer is no optimizer, or a Lookahead already.
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Lookahead):
            raise TypeError(f"Lookahead wraps another optimizer, got {type(optimizer).__name__}")
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"Invalid k value: {k}, expected an integer, 1 or more")
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"Invalid alpha value: {alpha}, expected one in (0, 1]")
        self.optimizer = optimizer
        self.k = k
        self.alpha = alpha
        self.__setstate__({})

    # ---- what is the wrapped optimizer's -------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name.startswith("__"):  # not there yet: while it is unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in _OWN or name.startswith("_"):
            object.__delattr__(self, name)
        else:
            delattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "k": self.k, "alpha": self.alpha}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer = state.get("optimizer") or self.optimizer
        # Hooks of checkpoints are registered where they are called.
        shared = {key: hooks for key, hooks in vars(optimizer).items() if "state_dict_p" in key}
        super().__setstate__({**shared, **state})
        self._count_from_0()

    def __repr__(self) -> str:
        return f"Lookahead (\nk: {self.k}\nalpha: {self.alpha}\noptimizer: {self.optimizer!r}\n)"

    def _count_from_0(self) -> None:
        for group in self.param_groups:
            group.setdefault("lookahead_step", 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, slow weights and counts in it."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of a Lookahead, or one of the wrapped optimizer's class."""
        self.optimizer.load_state_dict(state_dict)
        self._count_from_0()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)
        self._count_from_0()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    # ---- the step ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step the wrapped optimizer; if that was the k-th step, move the slow weights.

        Args:
            closure: passed on.

        Returns:
            What the wrapped optimizer's step returned.
        """
        step = partial(self.optimizer.step, closure) if closure else self.optimizer.step
        if isinstance(self.optimizer, Fused):
            self.optimizer._lookahead = self
            try:
                return step()
            finally:
                self.optimizer._lookahead = None
        params = [p for group in self.param_groups for p in group["params"]]
        # A closure is yet to compute the gradients.
        stepped = params if closure else [p for p in params if p.grad is not None]
        follow = self._begin_to_follow(stepped)

        def count(*_: Any) -> None:
            skipped = found_inf(self.optimizer)
            if not skipped:
                follow()
            self.count(skipped)

        # Ahead of other hooks, behind which an error would leave the step uncounted.
        hook = self.optimizer.register_step_post_hook(count)
        hooks: Any = self.optimizer._optimizer_step_post_hooks  # an OrderedDict
        hooks.move_to_end(hook.id, last=False)
        try:
            return step()
        finally:
            hook.remove()

    def count(self, skipped: bool | Tensor) -> None:
        """Count a step that the wrapped optimizer has made, unless it was skipped."""
        if not skipped:
            for group in self.param_groups:
                group["lookahead_step"] = (group.get("lookahead_step", 0) + 1) % self.k

    def alpha_now(self, group: dict[str, Any]) -> float:
        """Return how far the slow weights of a group follow in this step: 0 but in every k-th."""
        return self.alpha if group.get("lookahead_step", 0) + 1 >= self.k else 0.0

    @contextmanager
    def following(self, params: list[Tensor]) -> Iterator[None]:
        """Keep the slow weights of parameters that others step inside the with block."""
        follow = self._begin_to_follow(params)
        yield
        if not found_inf(self.optimizer):
            follow()

    def _begin_to_follow(self, params: list[Tensor]) -> Callable[[], None]:
        """Return what is to be called once others have stepped these parameters."""
        fresh = {}
        for p in params:
            slow = self.state.get(p, {}).get(SLOW)
            if slow is None:
                fused = self.optimizer if isinstance(self.optimizer, Fused) else None
                fresh[p] = fused._slow(p) if fused else p.detach().clone()
            elif slow.shape != p.shape:
                raise ValueError(
                    f"{SLOW} of a parameter has shape {tuple(slow.shape)}, expected "
                    f"{tuple(p.shape)}; load a checkpoint of this model, or delete it to start anew"
                )
        chosen = set(params)

        def follow() -> None:
            # Not before: torch takes a state that has a key as complete.
            for p, slow in fresh.items():
                if p.grad is not None:
                    self.state[p][SLOW] = slow
            for group in self.param_groups:
                if self.alpha_now(group) != 0:
                    self._move([p for p in group["params"] if p in chosen and p.grad is not None])

        return follow

    @torch.no_grad()
    def _move(self, params: list[Tensor]) -> None:
        if isinstance(self.optimizer, Fused):
            for p in filter(self.optimizer._has_master, params):
                slow, new = self.reference(
                    self.optimizer._master(p), self.state[p][SLOW], alpha=self.alpha
                )
                self.state[p][SLOW].copy_(slow)
                self.optimizer._set_master(p, new)
            params = [p for p in params if not self.optimizer._has_master(p)]
        rows: Sequence[Sequence[Tensor]] = [(p, p, self.state[p][SLOW]) for p in params]
        if not _operators.must_be_seen(params):
            threads = torch.get_num_threads()
            rows = _engine.engine.apply("lookahead", [self.alpha], rows, threads)
        for p, _, slow in rows:
            wide = torch.promote_types(p.dtype, torch.float32)
            new_slow, new_p = self.reference(p.to(wide), slow.to(wide), alpha=self.alpha)
            slow.copy_(new_slow)
            p.copy_(new_p)
        torch.autograd.graph.increment_version(params)

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any, slow: Any, *, alpha: float
    ) -> tuple[Any, Any]:
        slow = accumulate(slow, p * alpha, alpha)
        return slow, slow
