"""How an optimizer stores its states, and takes them from checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedopt import _codecs
from fusedopt._engine import Rule
from fusedopt._followers import Follower
from fusedopt._masters import Masters
from fusedopt._shards import find_first_element, has_whole_rows
from fusedopt._stored import (
    FOLLOWING,
    HALVES,
    MASTER,
    MXFP8,
    REMAINDER,
    ROUNDING,
    STATE_DTYPES,
    WINDOW,
    as_numbers,
    check_codes,
    check_state_dtype,
    decoded,
    encoded,
    following_dtype,
    from_bytes,
    is_coded,
    is_moment,
    place_of_draws,
    rank,
    scale_key,
    with_remainders_as_bytes,
    zero_scales,
    zeros_like,
)


class Stores(Masters):
    """The memory modes, for `fusedopt._base.Fused`."""

    _made_by_zero: bool
    _followers: tuple[Follower, ...]

    # ---- making states -----------------------------------------------------------------------

    def _stored_as(self, p: Tensor) -> torch.dtype | str:
        """Return how the states of p are to be stored."""
        asked: Any = self.state_dtype
        if asked is None or p.dtype == torch.float64 or p.is_complex():
            return p.dtype
        if asked == MXFP8:
            return MXFP8 if _codecs.is_large(p) and has_whole_rows(p) else torch.float32
        answer: Any = asked if asked in STATE_DTYPES else asked(p)
        check_state_dtype(answer, f"answer of state_dtype for a parameter of {tuple(p.shape)}")
        if answer == MXFP8 and not (p.ndim > 1 and has_whole_rows(p)):
            raise ValueError(
                f'state_dtype returned "mxfp8" for a parameter of shape {tuple(p.shape)}, expected '
                "that for two dimensions and more, split along the first one or not at all; return "
                "torch.float32"
            )
        stored: torch.dtype | str = p.dtype if answer is None else answer
        return stored

    def _check_answers(self, group: dict[str, Any]) -> None:
        """Raise an error if state_dtype is a function with a wrong answer for a new parameter."""
        if callable(self.state_dtype):
            for p in group["params"]:
                if p.grad is not None and not self.state.get(p):
                    self._stored_as(p)

    def _modes(self) -> tuple[bool, bool, bool]:
        """Return master_weights, stochastic_rounding, and whether states may be in 8 bits."""
        given = self.defaults  # where the options are; once a step, and found faster so
        stored = given.get("state_dtype")
        return (
            bool(given.get("master_weights")),
            bool(given.get("stochastic_rounding")),
            stored == MXFP8 or callable(stored),
        )

    def _rounds_at_random(self, p: Tensor) -> bool:
        return self.stochastic_rounding and p.dtype in HALVES and not self._has_master(p)

    def _create_state(self, rule: Rule, p: Tensor, capturable: bool = False) -> None:
        """Add what the rule needs and the state of p lacks, in the order in which it is read."""
        state = self.state[p]
        make: dict[str, Callable[[], Tensor]] = {}
        if rule.counts_steps:
            device = p.device if capturable else "cpu"
            make["step"] = lambda: torch.zeros((), dtype=torch.float32, device=device)
        stored_as = self._stored_as(p)
        coded = [
            name
            for name in rule.states
            if (stored_as == MXFP8 if state.get(name) is None else is_coded(state[name]))
        ]
        for name in rule.states:
            dtype: Any = torch.uint8 if name in coded else stored_as
            make[name] = partial(zeros_like, p, dtype)
        for follower in self._followers:
            if follower.follows(p):
                make[follower.kind.state] = partial(follower.first, p)
        if self._has_master(p) and p.dtype == torch.bfloat16:
            make[REMAINDER] = lambda: zeros_like(p, torch.int16)
        elif self._has_master(p):
            make[MASTER] = lambda: p.detach().float()
        for name in coded:
            make[scale_key(name)] = lambda: zero_scales(p)
        if coded or self._rounds_at_random(p):
            make[ROUNDING] = lambda: self._first_draw(p)
        for key, function in make.items():
            value = state.pop(key, None)
            state[key] = function() if value is None else value

    def _first_draw(self, p: Tensor) -> Tensor:
        position = next(i for i, each in enumerate(self._all_parameters()) if each is p)
        draw = _codecs.rounding_key(self.seed, position) << 32
        return torch.tensor(draw, dtype=torch.int64, device=place_of_draws(p))

    def _first_element(self, p: Tensor) -> int:
        """Return how many elements of the whole parameter come before those of this process."""
        known: dict[Tensor, int] = self.__dict__.setdefault("_first_elements", {})
        if p not in known:
            known[p] = find_first_element(p)
        return known[p]

    # ---- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint as torch does; what 16-bit parameters lack of float32, as bytes.

        So it can be gathered: no process group sends tensors of 16-bit integers.
        """
        if self._made_by_zero:  # which puts what it loads into the states as it is
            return super().state_dict()
        handle = self.register_state_dict_post_hook(with_remainders_as_bytes, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of its torch parent.

        States are stored as this optimizer's ``state_dtype`` says, whatever they were saved as.
        With ``None`` they get their parameter's dtype, as in torch, unless that cannot hold them:
        float32 states of a bfloat16 parameter stay float32, where torch rounds them. So no digit is
        lost, and a checkpoint that was saved in 16 bits goes on in float32.
        """
        saved: dict[str, Any] = {}

        def see(_: Any, seen: dict[str, Any]) -> None:
            self._check_states(seen)
            saved.update(seen)

        handles = [
            # The last of the pre-hooks sees what the others made of the checkpoint.
            self.register_load_state_dict_pre_hook(see),
            # The first of the post-hooks leaves to the others what they expect.
            self.register_load_state_dict_post_hook(
                lambda _: self._restore_states(saved), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def torch_state_dict(self) -> dict[str, Any]:
        """Return `state_dict` in the form that the class of torch loads.

        States are float32 where they are stored in 8 bits. What torch has no place for, masters and
        random bits, is left out: `master_state_dict` has the masters.
        """
        whole: dict[str, Any] = self.state_dict()
        plain = {i: as_numbers(state) for i, state in whole["state"].items()}
        return {**whole, "state": plain}

    def _check_states(self, saved: dict[str, Any]) -> None:
        """Raise an error for what could not be stored, before anything has changed."""
        for p in self._all_parameters():
            self._stored_as(p)
        for state in saved.get("state", {}).values():
            for key, value in state.items():
                if is_moment(key, value):
                    check_codes(state, key)

    def _restore_states(self, saved: dict[str, Any]) -> None:
        """Take from a checkpoint what torch's own loading has cast, in the modes of now."""
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        for p, i in zip(self._all_parameters(), ids, strict=True):
            if i in saved["state"]:
                self._restore_state(p, saved["state"][i])

    def _restore_state(self, p: Tensor, saved: dict[str, Any]) -> None:
        state = self.state[p]
        scales = [key for key in state if key.endswith("_scale")]
        for key in (REMAINDER, MASTER, ROUNDING, WINDOW, *scales):
            state.pop(key, None)
        for name, value in saved.items():
            if is_moment(name, value) and value.shape == p.shape:
                self._store(p, name, saved)
        master = REMAINDER if p.dtype == torch.bfloat16 else MASTER
        for key in (master if self._has_master(p) else None, ROUNDING):
            if key in saved:
                value = from_bytes(p, saved[key]) if key == REMAINDER else saved[key]
                state[key] = value.to(place_of_draws(p) if key == ROUNDING else p.device)
        if self.skip_spikes and WINDOW in saved:
            # A copy, for it changes in place; float64 again, if torch's class had it meanwhile.
            state[WINDOW] = saved[WINDOW].to(place_of_draws(p), torch.float64, copy=True)
        # In the order of _create_state, and of the very strings that the engine looks for.
        for key in sorted(state, key=rank):
            state[sys.intern(key)] = state.pop(key)

    def _store(self, p: Tensor, name: str, saved: dict[str, Any]) -> None:
        """Put a state that was stored in any way into that of p, as it is to be stored there."""
        state, value = self.state[p], saved[name]
        follows = name in FOLLOWING
        stored_as: Any = following_dtype(p, name) if follows else self._stored_as(p)
        if stored_as == MXFP8 and is_coded(value) and scale_key(name) in saved:
            for key in (name, scale_key(name)):
                state[key] = saved[key].to(p.device)
        elif stored_as == MXFP8:
            state.update(encoded(p, decoded(saved, name).to(p.device), name))
        else:
            numbers = decoded(saved, name)
            as_torch_does = self.state_dtype is None or follows
            if as_torch_does and torch.promote_types(numbers.dtype, p.dtype) != p.dtype:
                stored_as = numbers.dtype  # the parameter's cannot hold them
            state[name] = numbers.to(p.device, stored_as)

    def _store_what_is_there(self) -> None:
        """Store the states that the constructor of torch's class has made."""
        if self.state_dtype is None:
            return
        for p in self.state:
            self._stored_as(p)  # or raise an error, before anything has changed
        for p, state in self.state.items():
            for name in [name for name, value in state.items() if is_moment(name, value)]:
                self._store(p, name, dict(state))
