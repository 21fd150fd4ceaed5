"""What all optimizers share: one step is one call into the engine."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt import _core

engine = _core.Engine(isa=os.environ.get("FUSEDOPT_ISA", ""))


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
    """One param group in one step, as csrc/step.cpp reads it."""

    params: list[Tensor]
    names: list[str] | None
    has_kernel: bool
    rule: str
    states: tuple[str, ...]
    counts_steps: bool
    grad_scale: float
    fold: Callable[[float], tuple[int, dict[str, float]]]
    """Flags, as bits, and scalars of the rule for step number t."""
    create_state: Callable[[Tensor], None]


def number(x: float | Tensor) -> float:
    """Return a hyper-parameter, which may be a one-element tensor, as a float."""
    return float(x.item() if isinstance(x, Tensor) else x)


class Fused(Optimizer):
    """Base of the fused optimizers, ahead of the torch class of the same name.

    A subclass says which rule steps a param group (`_rule`) and folds its hyper-parameters into
    the rule's scalars (`_scalars`); `reference` is the same rule in plain operators.
    """

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

    # Gradients are scaled by the loss in `step` only when this is set: GradScaler then unscales.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore what torch's constructors set for ``fused=True``."""

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
        groups = [self._engine_group(group) for group in self.param_groups]
        engine.step(self.state, groups, torch.get_num_threads(), self._fall_back)
        return loss

    def _patch_step_function(self) -> None:
        """Hook `step` as torch does, and hide it from dynamo hooks and all: they make it warn."""
        super()._patch_step_function()
        cls = type(self)
        if not getattr(cls.step, "hidden_from_dynamo", False):
            # The public torch.compiler.disable would import all of dynamo at once.
            cls.step = torch._compile._disable_dynamo(cls.step)  # type: ignore[assignment]
            cls.step.hidden_from_dynamo = True  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of its torch parent.

        Unlike torch, which casts every state tensor to its parameter's dtype, this keeps the dtype
        that was saved, so that a reload changes no bit of the next step.
        """
        saved: dict[str, Any] = {}
        # The last of the pre-hooks sees what the others made of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(lambda _, seen: saved.update(seen))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
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
            states=rule.states,
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

    # ---- parameters without a kernel ---------------------------------------------------------

    def _fall_back(self, unsupported: list[tuple[int, Tensor]]) -> None:
        """Step (group index, parameter) pairs with torch's own implementation."""
        by_group: dict[int, list[Tensor]] = {}
        # Sparse gradients first: a torch class that refuses them then does so before any update.
        for index, p in sorted(unsupported, key=lambda pair: not _is_sparse(pair[1])):
            self._warn_of_fallback(_cause(self.param_groups[index], p))
            by_group.setdefault(index, []).append(p)
        groups = [{**self.param_groups[i], "params": params} for i, params in by_group.items()]
        self._torch_step(groups)

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """Step these groups with the parent class's bare step: its hooks have fired already."""
        step = inspect.unwrap(super().step.__func__)  # type: ignore[attr-defined]
        all_groups = self.param_groups
        self.param_groups = [{**group, "foreach": None, "fused": None} for group in groups]
        try:
            with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
                step(self)
        finally:
            self.param_groups = all_groups

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
    return f"{type(p).__name__} parameters of {p.dtype} with gradients of {p.grad.dtype}"
