"""Parameters without a kernel: stepped by the torch class that an optimizer derives from."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedopt import _codecs, _engine
from fusedopt._followers import Follower
from fusedopt._shards import as_part_of, local
from fusedopt._storage import Stores
from fusedopt._stored import FOLLOWING, MXFP8, ROUNDING, as_numbers, encoded, is_coded, is_moment


class FallsBack(Stores):
    """The fallback, for `fusedopt._base.Fused`."""

    # During a step that wrappers make, the innermost first.
    _followers: tuple[Follower, ...] = ()
    _without_kernel = "torch's own implementation"  # what makes a step then

    def _weights_now(self, group: dict[str, Any]) -> tuple[float, ...]:
        """Return the scalars of the followers' rules in this step for a group."""
        return tuple(follower.weight_now(group) for follower in self._followers)

    def _leaves_out(self, index: int, p: Tensor) -> bool:
        """Return whether a follower has nothing to do with p."""
        return not self._followers[index].follows(p)

    def _fall_back(
        self,
        all_groups: list[dict[str, Any]],
        unsupported: list[tuple[int, Tensor]],
        factor: float | Tensor,
        *,
        warns: bool = True,
    ) -> None:
        """Step (group index, parameter) pairs with torch's own implementation.

        Their gradients count times factor.
        """
        params = [p for _, p in unsupported]
        if warns:
            for index, p in unsupported:
                self._warn_of_fallback(_cause(all_groups[index], p, self._modes()))
        with _scaled_gradients(params, factor), ExitStack() as stack:
            for follower in reversed(self._followers):  # the innermost follows first
                stack.enter_context(follower.following(params))
            pairs = stack.enter_context(self._as_floats(unsupported))
            by_group: dict[int, list[Tensor]] = {}
            # Sparse gradients first: a torch class that refuses them then does so before any
            # update.
            for index, p in sorted(pairs, key=lambda pair: not _is_sparse(pair[1])):
                by_group.setdefault(index, []).append(p)
            self._torch_step(
                [{**all_groups[i], "params": params} for i, params in by_group.items()]
            )

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """Step these groups with the parent class's bare step: its hooks have fired already."""
        for group in groups:
            self._use_dtypes_of_params(group["params"])
        # (A bound method has it.)
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
                moves = is_moment(key, value) and key not in FOLLOWING
                if moves and value.dtype != p.dtype:
                    self.state[p][key] = value.to(p.dtype)

    @contextmanager
    def _as_floats(self, pairs: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
        """Let a float32 stand in for each parameter that is stored in more than one tensor."""
        stand_ins: dict[Tensor, Tensor] = {}
        changed = []
        for index, p in pairs:
            if not self._is_in_parts(p):
                changed.append((index, p))
                continue
            q = self._master(p).requires_grad_()
            q.grad = None if p.grad is None else p.grad.float()
            if p in self.state:
                self.state[q] = as_numbers(self.state[p])
            stand_ins[p] = q
            changed.append((index, q))
        try:
            yield changed
            for p, q in stand_ins.items():
                self._take_back(p, q)
        finally:
            for q in stand_ins.values():
                self.state.pop(q, None)

    def _is_in_parts(self, p: Tensor) -> bool:
        state = self.state.get(p, {})
        return (
            self._has_master(p)
            or self._rounds_at_random(p)
            or self._stored_as(p) != p.dtype
            or any(is_coded(value) for value in state.values())
        )

    @torch.no_grad()
    def _take_back(self, p: Tensor, q: Tensor) -> None:
        """Store what torch has made of the stand-in q."""
        state, stored_as = self.state[p], self._stored_as(p)
        takes_bits = stored_as == MXFP8 or self._rounds_at_random(p)
        if takes_bits and ROUNDING not in state:
            state[ROUNDING] = self._first_draw(p)
        u: Any = None
        if takes_bits:
            u = _codecs.random_bits(int(state[ROUNDING]), local(p).shape, self._first_element(p))
            u = u.to(p.device)
            state[ROUNDING] += 1
        if self._has_master(p):
            self._set_master(p, q)
        elif self._rounds_at_random(p):
            bits = _codecs.for_parameter(u)
            p.copy_(as_part_of(p, _codecs.round_at_random(local(q), p.dtype, bits)))
        else:
            p.copy_(q)
        for name, value in self.state.get(q, {}).items():
            if not is_moment(name, value) or name in FOLLOWING:
                state[name] = value
            elif stored_as == MXFP8:
                state.update(encoded(p, value, name, u))
            else:
                state[name] = value.to(stored_as)

    def _warn_of_fallback(self, cause: str) -> None:
        warned = self.__dict__.setdefault("_warned", set())
        if cause in warned:
            return
        warned.add(cause)
        warnings.warn(
            f"fusedopt.{type(self).__name__} has no kernel for {cause}: {self._without_kernel} "
            "steps them, correctly and at its own speed",
            stacklevel=2,
        )


@contextmanager
def _scaled_gradients(params: Sequence[Tensor], factor: float | Tensor) -> Iterator[None]:
    """Let these parameters have other gradients meanwhile: theirs times factor."""
    gradients = [p.grad for p in params]
    try:
        for p, gradient in zip(params, gradients, strict=True):
            if gradient is not None and (isinstance(factor, Tensor) or factor != 1):
                p.grad = gradient * factor
        yield
    finally:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient


def _is_sparse(p: Tensor) -> bool:
    return p.grad is not None and p.grad.layout != torch.strided


def _cause(group: dict[str, Any], p: Tensor, modes: tuple[bool, bool, bool]) -> str:
    """Return why p has no kernel, for a warning."""
    assert p.grad is not None
    device = p.device.type
    why_not = _engine.why_no_kernels(p)
    _, at_random, may_be_coded = modes
    causes = {
        "differentiable=True": group.get("differentiable"),
        f"parameters on {device} ({why_not})": why_not,
        f"parameters on {device}": why_not is None and device != "cpu",
        "sparse gradients": _is_sparse(p),
        "complex parameters": p.is_complex(),
        "parameters that torch has yet to negate": p.is_neg(),
        f"parameters on {device} with gaps between their elements": _engine.on_device(p)
        and torch.empty_like(p, device="meta").stride() != p.stride(),
        f"random rounding or 8-bit states on {device} of parameters that are not contiguous": (
            _engine.on_device(p) and (at_random or may_be_coded) and not p.is_contiguous()
        ),
        f"parameters of {p.dtype} on {device} with states of another precision": _engine.on_device(
            p
        ),
        f"{type(p).__name__} parameters of {p.dtype} with gradients of {p.grad.dtype}": True,
    }
    return next(cause for cause, applies in causes.items() if applies)
