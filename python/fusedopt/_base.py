"""What all optimizers share: one step is one call into the engine."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt import _core, _engine, clip

if TYPE_CHECKING:
    from fusedopt.lookahead import Lookahead

SLOW = "slow"  # the key of Lookahead's slow weights in the state


def hide_step_from_dynamo(cls: type[Any]) -> None:
    """Hide the step of a class whose step torch has hooked, hooks and all: they warn, too."""
    if not getattr(cls.step, "hidden_from_dynamo", False):
        cls.step = _engine.not_compiled(cls.step)
        cls.step.hidden_from_dynamo = True


class Rule(NamedTuple):
    """Which kernel steps a param group, and which state it keeps for each parameter."""

    name: str
    """As registered in csrc/rules.h."""
    flags: tuple[bool, ...]
    """The bool template parameters of the rule, in order; those that depend on t are last and not
    here: see `Fused._flags`."""
    states: tuple[str, ...]
    """Keys of the state tensors, in the order in which the rule takes them."""
    counts_steps: bool
    """Whether the state holds a ``step``."""


class Group(NamedTuple):
    """One param group in one step, as csrc/plan.cpp reads it."""

    params: list[Tensor]
    names: list[str] | None
    has_kernel: bool
    rule: str
    states: tuple[str, ...]
    has_slow: bool
    alpha: float
    counts_steps: bool
    grad_scale: float
    fold: Callable[[float], tuple[int, dict[str, float]]]
    """Flags, as bits, and scalars of the rule for step number t."""
    create_state: Callable[[Tensor], None]


class Scaling(NamedTuple):
    """What a step does to all gradients before the rules see them, as csrc/step.cpp reads it."""

    unscale: float = 1.0
    """One over the scale of the loss."""
    coefficient: float = 1.0
    """One more factor, from `Fused.clip_grad_norm_`."""
    max_norm: float | None = None
    """Clip to this norm."""
    skip_nonfinite: bool = False
    """Update nothing if the norm is infinite or NaN."""


class Pending(NamedTuple):
    """What `Fused.clip_grad_norm_` has found out for the next step."""

    coefficient: float = 1.0
    norm: float | None = None
    mark: tuple[Tensor, Tensor, int] | None = None
    """Whose norm it is: the smallest gradient, its parameter and its version."""


class Options(TypedDict, total=False):
    """Keyword arguments of every fused optimizer; see `Fused`."""

    max_grad_norm: float | None
    skip_nonfinite: bool
    amp_scaling: bool


class Fused(Optimizer):
    """Base of the fused optimizers, ahead of the torch class of the same name.

    A subclass says which rule steps a param group (`_rule`) and folds its hyper-parameters into
    the rule's scalars (`_scalars`); `reference` is the same rule in plain operators.

    Args:
        *args: the torch class's.
        max_grad_norm: clip the gradients of each step, all groups together, to this 2-norm:
            multiply them by ``min(1, max_grad_norm / (norm + 1e-6))`` inside the update. ``p.grad``
            is not modified. ``inf`` computes `grad_norm`, and leaves finite gradients as they are.
        skip_nonfinite: a step whose gradients have an infinite or NaN norm changes nothing, and
            counts in `skipped_steps`.
        amp_scaling: let `torch.amp.GradScaler` leave the unscaling of gradients to the step.
        **kwargs: the torch class's.

    Raises:
        ValueError: max_grad_norm is negative or NaN.
    """

    # These live on the optimizer: libraries that flatten checkpoints fail on unknown group keys.
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    amp_scaling: bool = False
    skipped_steps: int = 0
    """How many steps were skipped: for non-finite gradients (with ``skip_nonfinite``), or because a
    GradScaler told the step to (with ``amp_scaling``, or a `fusedopt.GradScaler`)."""

    _norm: float | None = None  # what grad_norm returns
    _pending: Pending = Pending()
    _skipped: bool = False  # whether the last step was
    _lookahead: Lookahead | None = None  # during a step that one makes
    _scaler_asks: bool = False  # a fusedopt.GradScaler wants to know of non-finite gradients
    _released: bool = False  # by release_gradients

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
        **kwargs: Any,
    ) -> None:
        if max_grad_norm is not None:
            clip.valid_max_norm(max_grad_norm, "max_grad_norm")
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.amp_scaling = amp_scaling
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_grad_norm", "skip_nonfinite", "amp_scaling", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def _flags(self, group: dict[str, Any], t: float) -> tuple[bool, ...]:
        """Return all flags of the rule for step number t."""
        return self._rule(group).flags

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        """Return the rule's scalars for step number t, in the order of its fields, in double.

        A rule that keeps no count gets t = 1 on a parameter's first step and 2 afterwards.
        """
        raise NotImplementedError

    # ---- the step ----------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, in one pass.

        Args:
            closure: recomputes the loss with gradients enabled, before they are read.

        Returns:
            What the closure returned.

        Raises:
            ValueError, TypeError: a gradient or state does not fit its parameter. Nothing has
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = self._still_pending()
        scaling = self._scaling(pending.coefficient)
        asked = scaling.max_norm is not None or self.skip_nonfinite
        if self._is_to_skip(pending):
            norm, skipped = self._norm_of_gradients(scaling) if asked else math.nan, True
        else:
            norm, skipped = self._update(self.param_groups, scaling)
        self._norm = norm if asked else pending.norm
        self._pending = Pending()
        self._skipped = skipped
        self.skipped_steps += skipped
        return loss

    def _update(self, groups: list[dict[str, Any]], scaling: Scaling) -> tuple[float, bool]:
        """Step what has a gradient in these groups; return its norm, and whether that skipped."""
        return _engine.engine.step(
            self.state,
            [self._engine_group(group) for group in groups],
            torch.get_num_threads(),
            scaling,
            lambda unsupported, factor: self._fall_back(groups, unsupported, factor),
            lambda gradients: clip.power_sum(gradients, 2),
        )

    def _is_to_skip(self, pending: Pending) -> bool:
        """Return whether it is known before the step that gradients are infinite or NaN."""
        found_inf = getattr(self, "found_inf", None)  # what a GradScaler leaves here
        if found_inf is not None and _engine.number(found_inf) != 0:
            return True
        return self.skip_nonfinite and not math.isfinite(pending.norm or 0.0)

    def _scaling(self, coefficient: float = 1.0) -> Scaling:
        scale = getattr(self, "grad_scale", None)  # what a GradScaler leaves here
        norm = self.max_grad_norm
        scaling = Scaling(
            unscale=1.0 if scale is None else 1.0 / _engine.number(scale),
            coefficient=coefficient,
            max_norm=None if norm is None else clip.valid_max_norm(norm, "max_grad_norm"),
            skip_nonfinite=self.skip_nonfinite or self._scaler_asks,
        )
        if scaling != Scaling():
            self._refuse_if_released()
        return scaling

    def _refuse_if_released(self) -> None:
        """Raise an error if gradients are gone before what was asked of them can be known."""
        if self._released:
            raise RuntimeError(
                "release_gradients frees each gradient before those of other parameters exist, but "
                "max_grad_norm, skip_nonfinite, clip_grad_norm_ and gradient scalers need all at "
                "once; do without them, or remove() the release and let step() clip"
            )

    def _patch_step_function(self) -> None:
        super()._patch_step_function()
        hide_step_from_dynamo(type(self))

    # ---- clipping and scaling ----------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients before clipping, unscaled, that was computed last.

        A 0-dim float32 tensor on the parameters' device; None if nothing asked for the norm of the
        last step: neither ``max_grad_norm``, nor ``skip_nonfinite``, nor `clip_grad_norm_`.
        """
        return None if self._norm is None else self._as_tensor(self._norm)

    def _as_tensor(self, norm: float) -> Tensor:
        devices = (p.device for group in self.param_groups for p in group["params"])
        return torch.tensor(norm, dtype=torch.float32, device=next(devices, None))

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
        self._refuse_if_released()
        max_norm = clip.valid_max_norm(max_norm)
        norm_type = float(norm_type)
        pending = self._still_pending(unchanged=True)
        norm = clip.total_norm(self._gradients(), norm_type) * pending.coefficient
        if error_if_nonfinite:
            clip.check_finite(norm, norm_type)
        self._clip_by(max_norm, norm, pending)
        return self._as_tensor(norm)

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
        self._refuse_if_released()
        whole = getattr(total_norm, "full_tensor", None)  # of a DTensor
        norm = _engine.number(whole() if whole else total_norm)
        max_norm = clip.valid_max_norm(max_norm)
        self._clip_by(max_norm, norm, self._still_pending(unchanged=True))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as torch does, and forget what `clip_grad_norm_` found of them."""
        self._pending = Pending()
        super().zero_grad(set_to_none)

    def _clip_by(self, max_norm: float, norm: float, before: Pending) -> None:
        coefficient = before.coefficient * _core.clip_coefficient(norm, max_norm)
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        smallest = min(params, key=lambda p: p.grad.numel(), default=None)
        mark = None
        if smallest is not None and smallest.grad is not None:
            mark = (smallest, smallest.grad, _version(smallest.grad))
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

    def _gradients(self) -> list[Tensor]:
        params = [p for group in self.param_groups for p in group["params"]]
        return [p.grad for p in params if p.grad is not None]

    def _norm_of_gradients(self, scaling: Scaling) -> float:
        return clip.total_norm(self._gradients(), 2) * scaling.unscale

    # Where this is set, a GradScaler leaves the scale of the gradients to `step`.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.amp_scaling or self._scaler_asks

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore what torch's constructors set for ``fused=True``."""

    # ---- groups, states, checkpoints ---------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of its torch parent.

        Unlike torch, which casts every state tensor to its parameter's dtype, this keeps the dtype
        that was saved, so that a reload changes no bit of the next step.
        """
        saved: dict[str, Any] = {}
        handles = [
            # The last of the pre-hooks sees what the others made of the checkpoint.
            self.register_load_state_dict_pre_hook(lambda _, seen: saved.update(seen)),
            # The first of the post-hooks leaves to the others what they expect.
            self.register_load_state_dict_post_hook(
                lambda _: self._restore_dtypes(saved), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore_dtypes(self, saved: dict[str, Any]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        for p, i in zip(params, ids, strict=True):
            for key, value in saved["state"].get(i, {}).items():
                if key == "step" or not isinstance(value, Tensor) or value.is_complex():
                    continue
                if self.state[p][key].dtype != value.dtype:
                    self.state[p][key] = value.to(p.device)

    def _engine_group(self, group: dict[str, Any]) -> Group:
        rule = self._rule(group)

        def fold(t: float) -> tuple[int, dict[str, float]]:
            flags = sum(flag << bit for bit, flag in enumerate(self._flags(group, t)))
            return flags, self._scalars(group, t)

        return Group(
            params=group["params"],
            names=group.get("param_names"),
            has_kernel=not group.get("differentiable"),
            rule=rule.name,
            states=rule.states + ((SLOW,) if self._lookahead else ()),
            has_slow=self._lookahead is not None,
            alpha=self._lookahead.alpha_now(group) if self._lookahead else 0.0,
            counts_steps=rule.counts_steps,
            grad_scale=-1.0 if group["maximize"] else 1.0,
            fold=fold,
            create_state=lambda p: self._create_state(rule, p),
        )

    def _create_state(self, rule: Rule, p: Tensor) -> None:
        """Add what the rule needs and the state of p lacks."""
        state = self.state[p]
        if rule.counts_steps and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for name in rule.states:
            if state.get(name) is None:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if self._lookahead and state.get(SLOW) is None:
            state[SLOW] = p.detach().clone(memory_format=torch.preserve_format)

    # ---- parameters without a kernel ---------------------------------------------------------

    def _fall_back(
        self,
        all_groups: list[dict[str, Any]],
        unsupported: list[tuple[int, Tensor]],
        factor: float,
    ) -> None:
        """Step (group index, parameter) pairs with torch's own implementation.

        Their gradients count times factor.
        """
        by_group: dict[int, list[Tensor]] = {}
        # Sparse gradients first: a torch class that refuses them then does so before any update.
        for index, p in sorted(unsupported, key=lambda pair: not _is_sparse(pair[1])):
            self._warn_of_fallback(_cause(all_groups[index], p))
            by_group.setdefault(index, []).append(p)
        groups = [{**all_groups[i], "params": params} for i, params in by_group.items()]
        params = [p for _, p in unsupported]
        followed = self._lookahead.following(params) if self._lookahead else nullcontext()
        with _scaled_gradients(params, factor), followed:
            self._torch_step(groups)

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """Step these groups with the parent class's bare step: its hooks have fired already."""
        for group in groups:
            self._use_dtypes_of_params(group["params"])
        step = inspect.unwrap(super().step.__func__)  # type: ignore[attr-defined]
        changed = ("param_groups", "grad_scale", "found_inf")
        kept = {name: vars(self)[name] for name in changed if name in vars(self)}
        # The gradients are unscaled, and the parent refuses a scale where it has no fused kernel.
        meanwhile = [{**group, "foreach": None, "fused": None} for group in groups]
        vars(self).update(param_groups=meanwhile, grad_scale=None, found_inf=None)
        try:
            with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
                step(self)
        finally:
            for name in changed:
                del vars(self)[name]
            vars(self).update(kept)

    def _use_dtypes_of_params(self, params: list[Tensor]) -> None:
        """Cast states to the dtype of their parameter, as torch does when it loads them."""
        for p in params:
            for key, value in self.state.get(p, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.dtype != p.dtype:
                    self.state[p][key] = value.to(p.dtype)

    def _warn_of_fallback(self, cause: str) -> None:
        warned = self.__dict__.setdefault("_warned", set())
        if cause in warned:
            return
        warned.add(cause)
        warnings.warn(
            f"fusedopt.{type(self).__name__} has no kernel for {cause}: torch's own "
            "implementation steps them, correctly and at its own speed",
            stacklevel=2,
        )


@contextmanager
def _scaled_gradients(params: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Let these parameters have other gradients meanwhile: theirs times factor."""
    gradients = [p.grad for p in params]
    try:
        for p, gradient in zip(params, gradients, strict=True):
            if factor != 1 and gradient is not None:
                p.grad = gradient * factor
        yield
    finally:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient


def _signature(cls: type[Fused]) -> inspect.Signature:
    """Return what the constructor takes: torch's arguments and those of `Fused`."""
    owner = next(base for base in cls.__mro__ if base is not Fused and "__init__" in vars(base))
    own = inspect.signature(owner.__init__)  # type: ignore[misc]
    params = list(own.parameters.values())[1:]
    passes_on = not issubclass(owner, Fused) or any(p.kind is p.VAR_KEYWORD for p in params)
    if passes_on:
        added = inspect.signature(Fused.__init__).parameters
        params = [p for p in params if p.kind is not p.VAR_KEYWORD]
        params += [added[name] for name in Options.__annotations__]
    return inspect.Signature(params)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which counts changes in place


def _is_sparse(p: Tensor) -> bool:
    return p.grad is not None and p.grad.layout != torch.strided


def _cause(group: dict[str, Any], p: Tensor) -> str:
    """Return why p has no kernel, for a warning."""
    assert p.grad is not None
    if group.get("differentiable"):
        return "differentiable=True"
    if p.device.type != "cpu":
        return f"parameters on {p.device.type}"
    if _is_sparse(p):
        return "sparse gradients"
    if p.is_complex():
        return "complex parameters"
    if p.is_neg():
        return "parameters that torch has yet to negate"
    return f"{type(p).__name__} parameters of {p.dtype} with gradients of {p.grad.dtype}"
