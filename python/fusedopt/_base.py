"""What all optimizers share: one step is one call into the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt import _core, _engine, _norms, _operators, _ranks
from fusedopt._clipping import NOTHING
from fusedopt._engine import Group, Rule, Scaling, number, on_device
from fusedopt._from_torch import FromTorch
from fusedopt._hooked import Hooked
from fusedopt._options import OPTIONS, StateDType, check_options, refuse_groups_of_another
from fusedopt._spikes import Spikes, remember
from fusedopt._stored import have_no_sign
from fusedopt._verdict import decide
from fusedopt._watch import Watches

SEE_FUSED = (  # in a class docstring
    "max_grad_norm, skip_nonfinite, skip_spikes, amp_scaling: see `Fused`.\n"
    "        state_dtype, master_weights, stochastic_rounding, seed: see `Fused`."
)


class Fused(Watches, Hooked, FromTorch):
    """Base of the fused optimizers, ahead of the torch class of the same name.

    A subclass says which rule steps a param group (`_rule`) and folds its hyper-parameters into
    the rule's scalars (`_scalars`); `reference` is the same rule in plain operators.

    Args:
        params: parameters, named parameters or param groups.
        *args: the torch class's.
        max_grad_norm: clip the gradients of each step, all groups together, to this 2-norm:
            multiply them by ``min(1, max_grad_norm / (norm + 1e-6))`` inside the update. ``p.grad``
            is not modified. ``inf`` computes `grad_norm`, and leaves finite gradients as they are.
        skip_nonfinite: a step whose gradients have an infinite or NaN norm changes nothing, and
            counts in `skipped_steps`.
        skip_spikes: so does one whose norm is far above those of the steps before: True for six
            standard deviations above the mean of the last 128, once there are 64; or a `Spikes`,
            which says when, and may clip instead. The norm is that before clipping, unscaled; after
            `clip_grad_norm_` or `clip_grads_with_norm_`, theirs. The norms are in the state dict.
        amp_scaling: let `torch.amp.GradScaler` leave the unscaling of gradients to the step.
        state_dtype: how the states of rules are stored: ``None``, as the parameter is;
            ``torch.float32``, ``torch.bfloat16``, ``torch.float16``; ``"mxfp8"``, 8 bits in blocks
            of 32 with a scale each, rounded at random, and float32 for parameters of one dimension,
            of fewer than 4096 elements or of less than 32 a row; or a function of a parameter that
            returns one of these. States that are there already stay as they are.
        master_weights: keep beside each bfloat16 parameter the 16 bits that it lacks of a float32,
            and beside each float16 one its float32: the steps are those of float32 parameters.
        stochastic_rounding: round 16-bit parameters without masters up or down at random, as often
            as is fair, where to nearest an update of less than half a digit is lost.
        seed: of all random bits, which are the same on every machine, and for any number of ranks
            that have rows of a DTensor each.
        track_statistics: let each step find out `statistics` of what it does to each parameter; an
            integer n, every n-th step. ``request_statistics()`` asks for those of the next one.
        **kwargs: the torch class's.

    Raises:
        TypeError: max_grad_norm is no number.
        ValueError: it is negative or NaN, skip_spikes, state_dtype or seed none of these, or
            track_statistics negative: here, and where one is set as an attribute; or a param group
            has one of these options, or was made for another optimizer that has them.
        RuntimeError: ZeroRedundancyOptimizer is to clip or skip by a part of the gradients.
    """

    _overflowed: bool | Tensor = False  # whether the last step was skipped, and by no spike
    _known: tuple[Any, _core.KnownGroups] | None = None  # and for which followers

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: bool | Spikes = False,
        amp_scaling: bool = False,
        state_dtype: StateDType = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        track_statistics: bool | int = False,
        **kwargs: Any,
    ) -> None:
        options = {
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "skip_spikes": skip_spikes,
            "amp_scaling": amp_scaling,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "track_statistics": track_statistics,
        }
        check_options(options)
        refuse_groups_of_another(params, options)
        self._made_by_zero = _ranks.called_by_zero()
        self._asked = options
        super().__init__(params, *args, **kwargs)
        self._asked = None
        for name, value in options.items():
            setattr(self, name, value)
        self._store_what_is_there()
        if self._made_by_zero and (max_grad_norm is not None or skip_nonfinite or skip_spikes):
            self._refuse_if_split()

    def __init_subclass__(cls) -> None:
        """Put the arguments of `Fused` where the docstring of a class refers to them."""
        super().__init_subclass__()
        if cls.__doc__ and Fused.__doc__:
            _, name, rest = Fused.__doc__.partition("max_grad_norm:")
            text = name + rest.partition("**kwargs")[0].rstrip()
            cls.__doc__ = cls.__doc__.replace(SEE_FUSED, text)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_skipped_steps": self.skipped_steps, "_pending": self._pending}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        options = {name: state.pop(name) for name in OPTIONS if name in state}
        super().__setstate__(state)
        # (Pickles may have them beside the defaults.)
        for name in OPTIONS:
            setattr(self, name, options.get(name, getattr(self, name)))

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

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
        scaling = self._scaling(pending)
        self._begin_watch(scaling)
        watch = scaling.spikes
        asked = self._asks_for_norm(scaling)
        norm: float | Tensor
        skipped: bool | Tensor
        if self._is_to_skip(pending):
            norm, skipped = self._norm_of_gradients(scaling) if asked else math.nan, True
        else:
            norm, skipped = self._update(self.param_groups, scaling)
            if watch is not None and skipped is not True:
                self._keep_window(watch)
        for follower in self._followers:
            follower.count(skipped)
        self._norm = norm if asked else pending.norm
        self._pending = NOTHING
        self._overflowed = skipped if watch is None else _is_infinite(norm)
        if self._watching is not None or "track_statistics" in self.defaults:
            self._end_watch(skipped)
        if skipped is not False:
            self._count_skipped(skipped)
        return loss

    def _update(
        self, groups: list[dict[str, Any]], scaling: Scaling
    ) -> tuple[float | Tensor, bool | Tensor]:
        """Step what has a gradient in these groups; return its norm, and whether that skipped."""
        if _operators.must_be_seen(next(filter(None, map(_params_of, groups)), ())):
            return self._update_by_operators(groups, scaling)
        return self._update_by_engine(groups, scaling)

    def _update_by_engine(
        self, groups: list[dict[str, Any]], scaling: Scaling
    ) -> tuple[float | Tensor, bool | Tensor]:
        return self._step_by_engine(groups, scaling)[:2]

    def _step_by_engine(
        self, groups: list[dict[str, Any]], scaling: Scaling
    ) -> tuple[float | Tensor, bool | Tensor, float | Tensor]:
        followers = tuple([follower.kind for follower in self._followers])
        if self._known is None or self._known[0] != followers:
            self._known = (followers, _core.KnownGroups())
        return _engine.engine.step(
            self,
            self._known[1],
            groups,
            torch.get_num_threads(),
            scaling,
            lambda unsupported, factor: self._fall_back(groups, unsupported, factor),
            lambda gradients: _norms.power_sum(gradients, 2),
            self._watched(groups),
        )

    def _update_by_operators(
        self, groups: list[dict[str, Any]], scaling: Scaling
    ) -> tuple[float | Tensor, bool | Tensor]:
        """Do the same where torch's operators are to be seen."""
        with_gradient = [
            (i, p) for i, group in enumerate(groups) for p in group["params"] if p.grad is not None
        ]
        may_skip = scaling.skip_nonfinite or scaling.skip is not None or scaling.spikes is not None
        if may_skip and _operators.is_traced():
            raise RuntimeError(
                "this step is traced into a graph, which cannot leave it out where gradients are "
                "infinite or NaN, or too large: trace with skip_nonfinite=False, skip_spikes=False "
                "and without a gradient scaler"
            )
        norm, decided, judgement = decide(groups, scaling)
        skip = None if decided is None else decided.skip
        is_known = skip is not None and not _operators.has_no_values(skip)
        skipped = decided is None or (is_known and bool(skip))
        if decided is not None and not skipped:
            self._watched(groups)
            self._fall_back(groups, with_gradient, decided.coefficient, warns=False)
        if scaling.spikes is not None:
            remember(scaling.spikes, judgement)
        return norm, skipped

    # ---- groups ------------------------------------------------------------------------------

    def _engine_group(self, group: dict[str, Any]) -> Group:
        """Return what a group asks for: asked anew once a value of it or of `defaults` changes."""
        self._refuse_options_in(group)
        rule = self._rule(group)
        modes = self._modes()
        if modes[2]:
            self._check_answers(group)
        return Group(
            has_kernel=not group.get("differentiable"),
            rule=rule.name,
            flags=_as_bits(rule.flags),
            states=rule.states,
            following=tuple((each.kind.rule, each.kind.state) for each in self._followers),
            counts_steps=rule.counts_steps,
            counts_on_device=bool(group.get("capturable")),
            starts_unlike=bool(group.get("dampening")),
            grad_scale=-1.0 if group.get("maximize") else 1.0,
            unsigned=have_no_sign(rule.states),
            has_master=modes[0],
            rounds_at_random=modes[1],
            may_be_coded=modes[2],
        )

    def _engine_lr(self, group: dict[str, Any]) -> float | Tensor:
        """Return the learning rate of a group as a number, unless a device folds it."""
        lr = group["lr"]
        there = isinstance(lr, Tensor) and _is_read_there(lr)
        return lr if there and on_device(next(iter(group["params"]), None)) else number(lr)


def _is_infinite(norm: float | Tensor) -> bool | Tensor:
    return ~norm.isfinite() if isinstance(norm, Tensor) else not math.isfinite(norm)


_params_of = itemgetter("params")


@cache
def _as_bits(flags: tuple[bool, ...]) -> int:
    return sum(flag << bit for bit, flag in enumerate(flags))


def _is_read_there(lr: Tensor) -> bool:
    """Return whether a device folds this learning rate, so that nobody waits for it."""
    return on_device(lr) and lr.numel() == 1 and lr.dtype in (torch.float32, torch.float64)
