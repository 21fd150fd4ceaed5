"""What Lookahead and EMA share: an optimizer around another one, with weights that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt import _engine, _operators
from fusedopt._base import Fused
from fusedopt._clipping import found_inf
from fusedopt._followers import Kind
from fusedopt._hooked import Hooked


class Wrapper(Hooked):
    """An optimizer around another one, whose parameters have weights that follow them.

    It has the wrapped optimizer's ``param_groups``, ``state`` and all other attributes. Around a
    fused optimizer the weights move in the pass of its steps, and else in one of their own.
    """

    kind: Kind
    # What belongs to the wrapper; all other attributes are the wrapped optimizer's.
    _own: ClassVar[frozenset[str]] = frozenset({"optimizer", "step"})
    _settings: ClassVar[tuple[str, ...]] = ()  # those of them that it was made with

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.__setstate__({})

    @classmethod
    def _check_wrapped(cls, optimizer: object) -> None:
        """Raise TypeError for what this cannot be around."""
        keys = [each.kind.state for each in layers(optimizer) if isinstance(each, Wrapper)]
        has_one = cls.kind.state in keys
        if not isinstance(optimizer, Optimizer) or has_one:
            raise TypeError(
                f"{cls.__name__} wraps another optimizer, got {type(optimizer).__name__}"
                + (f", which has weights of its own in {cls.kind.state!r}" if has_one else "")
            )

    @staticmethod
    def _check_setting(name: str, value: Any) -> None:
        """Raise ValueError for a setting that is out of its range."""

    # ---- what moves --------------------------------------------------------------------------

    def weight_now(self, group: dict[str, Any]) -> float:
        """Return the scalar of the rule in this step for a param group: 0 if nothing moves."""
        raise NotImplementedError

    def follows(self, p: Tensor) -> bool:
        """Return whether there are weights that follow this parameter."""
        return True

    def first(self, p: Tensor) -> Tensor:
        """Return the weights that begin to follow a parameter in this step."""
        raise NotImplementedError

    def _move(self, params: list[Tensor], weight: float) -> None:
        """Move the weights of these parameters, in a pass of its own."""
        raise NotImplementedError

    def count(self, skipped: bool | Tensor) -> None:
        """Count a step that the wrapped optimizer has made, unless it was skipped."""
        if not skipped:
            for group in self.param_groups:
                group[self.kind.counter] = group.get(self.kind.counter, 0) + 1

    # ---- what is the wrapped optimizer's -----------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in self._own or name.startswith("__"):  # not there yet: while it is unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settings:
            self._check_setting(name, value)
        if name in self._own or name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._own or name.startswith("_"):
            object.__delattr__(self, name)
        else:
            delattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("optimizer", *self._settings)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer = state.get("optimizer") or self.optimizer
        # Hooks of checkpoints are registered where they are called.
        shared = {key: hooks for key, hooks in vars(optimizer).items() if "state_dict_p" in key}
        super().__setstate__({**shared, **state})
        self._count_from_0()

    def __repr__(self) -> str:
        settings = "".join(f"{name}: {getattr(self, name)}\n" for name in self._settings)
        return f"{type(self).__name__} (\n{settings}optimizer: {self.optimizer!r}\n)"

    def _count_from_0(self) -> None:
        for group in self.param_groups:
            group.setdefault(self.kind.counter, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, with the weights and counts that are in it."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of such a wrapper, or one of the wrapped optimizer's class."""
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

    # ---- the step ----------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step the wrapped optimizer, and move the weights that follow.

        Args:
            closure: passed on.

        Returns:
            What the wrapped optimizer's step returned.
        """
        step = partial(self.optimizer.step, closure) if closure else self.optimizer.step
        fused = fused_in(self)
        if fused is not None:
            around = fused._followers
            fused._followers = (self, *around)
            try:
                return step()
            finally:
                fused._followers = around
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

    @contextmanager
    def following(self, params: list[Tensor]) -> Iterator[None]:
        """Keep the weights for parameters that others step inside the with block."""
        follow = self._begin_to_follow(params)
        yield
        if not found_inf(self.optimizer):
            follow()

    def _begin_to_follow(self, params: list[Tensor]) -> Callable[[], None]:
        """Return what is to be called once others have stepped these parameters."""
        key, fresh = self.kind.state, {}
        params = [p for p in params if self.follows(p)]
        for p in params:
            weights = self.state.get(p, {}).get(key)
            if weights is None:
                fresh[p] = self.first(p)
            elif weights.shape != p.shape:
                raise ValueError(
                    f"{key} of a parameter has shape {tuple(weights.shape)}, expected "
                    f"{tuple(p.shape)}; load a checkpoint of this model, or delete it to start anew"
                )
        chosen = set(params)

        def follow() -> None:
            # Not before: torch takes a state that has a key as complete.
            for p, weights in fresh.items():
                if p.grad is not None:
                    self.state[p][key] = weights
            for group in self.param_groups:
                weight = self.weight_now(group)
                if weight != 0:
                    moved = [p for p in group["params"] if p in chosen and p.grad is not None]
                    self._move(moved, weight)

        return follow

    def _apply(self, rows: Sequence[Sequence[Tensor]], weight: float) -> list[Sequence[Tensor]]:
        """Apply the rule to rows of streams; return those that the engine leaves to operators."""
        if _operators.must_be_seen([row[0] for row in rows]):
            return list(rows)
        threads = torch.get_num_threads()
        return _engine.engine.apply(self.kind.rule, [weight], rows, threads)

    def _fused_master(self, p: Tensor) -> Fused | None:
        """Return the fused optimizer that has a float32 master of p, if one does."""
        fused = fused_in(self)
        return fused if fused is not None and fused._has_master(p) else None


def layers(optimizer: Any) -> list[Any]:
    """Return an optimizer, and what wrappers of fusedopt are around, to the innermost."""
    found = [optimizer]
    while isinstance(found[-1], Wrapper):
        found.append(found[-1].optimizer)
    return found


def fused_in(optimizer: Any) -> Fused | None:
    """Return the fused optimizer inside of any wrappers of fusedopt, if it is one."""
    inner = layers(optimizer)[-1]
    return inner if isinstance(inner, Fused) else None


def wrappers_of(optimizer: Any) -> tuple[Wrapper, ...]:
    """Return the wrappers of fusedopt around an optimizer, the innermost first."""
    return tuple(each for each in reversed(layers(optimizer)) if isinstance(each, Wrapper))
