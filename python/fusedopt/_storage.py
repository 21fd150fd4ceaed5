"""How an optimizer stores its states, and what its 16-bit parameters lack of float32."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fusedopt import _codecs
from fusedopt._engine import Rule
from fusedopt._options import HasOptions
from fusedopt._shards import as_part_of, find_first_element, has_whole_rows, is_distributed, local

SLOW = "slow"  # keys of the state: Lookahead's slow weights,
REMAINDER = "remainder"  # what a bfloat16 parameter lacks of its float32 master,
MASTER = "master"  # the float32 that a float16 parameter is rounded from,
ROUNDING = "rounding"  # and where its random bits are: key * 2**32 + number of the draw

MXFP8 = "mxfp8"
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
# States that have no sign.
UNSIGNED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})


@cache
def have_no_sign(states: tuple[str, ...]) -> tuple[bool, ...]:
    """Return which of these states have no sign."""
    return tuple(state in UNSIGNED for state in states)


def scale_key(state: str) -> str:
    """Return the key of the scales of an 8-bit state, the one string that the engine looks for."""
    return sys.intern(f"{state}_scale")


def code_of(state: str) -> _codecs.Code:
    """Return the format of an 8-bit state."""
    return _codecs.E5M3 if state in UNSIGNED else _codecs.E4M3


def check_state_dtype(value: object, asked: str = "state_dtype") -> None:
    """Raise ValueError for what is no way to store states."""
    if value is None or value in STATE_DTYPES or value == MXFP8:
        return
    raise ValueError(
        f"Invalid {asked}: {value!r}, expected None, torch.float32, torch.bfloat16, torch.float16, "
        '"mxfp8", or a function of a parameter that returns one of these'
    )


def check_seed(seed: object) -> None:
    """Raise ValueError for what is no seed."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"Invalid seed: {seed!r}, expected an integer from 0 to 2**64 - 1")


class Stores(HasOptions):
    """The memory modes, for `fusedopt._base.Fused`."""

    _made_by_zero: bool
    _lookahead: Any

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

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in _HALVES

    def _rounds_at_random(self, p: Tensor) -> bool:
        return self.stochastic_rounding and p.dtype in _HALVES and not self._has_master(p)

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
            if (stored_as == MXFP8 if state.get(name) is None else _is_coded(state[name]))
        ]
        for name in rule.states:
            dtype: Any = torch.uint8 if name in coded else stored_as
            make[name] = partial(_zeros_like, p, dtype)
        if self._lookahead:
            make[SLOW] = lambda: self._slow(p)
        if self._has_master(p) and p.dtype == torch.bfloat16:
            make[REMAINDER] = lambda: _zeros_like(p, torch.int16)
        elif self._has_master(p):
            make[MASTER] = lambda: p.detach().float()
        for name in coded:
            make[scale_key(name)] = lambda: _zero_scales(p)
        if coded or self._rounds_at_random(p):
            make[ROUNDING] = lambda: self._first_draw(p)
        for key, function in make.items():
            value = state.pop(key, None)
            state[key] = function() if value is None else value

    def _slow(self, p: Tensor) -> Tensor:
        if self._has_master(p):
            return self._master(p)
        return p.detach().clone(memory_format=torch.preserve_format)

    def _first_draw(self, p: Tensor) -> Tensor:
        position = next(i for i, each in enumerate(self._all_parameters()) if each is p)
        draw = _codecs.rounding_key(self.seed, position) << 32
        return torch.tensor(draw, dtype=torch.int64, device=_place_of_draws(p))

    def _all_parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _first_element(self, p: Tensor) -> int:
        """Return how many elements of the whole parameter come before those of this process."""
        known: dict[Tensor, int] = self.__dict__.setdefault("_first_elements", {})
        if p not in known:
            known[p] = find_first_element(p)
        return known[p]

    # ---- masters -----------------------------------------------------------------------------

    def _master(self, p: Tensor) -> Tensor:
        """Return p in float32, with all digits that the state has of it."""
        state = self.state.get(p, {})
        if REMAINDER in state and p.dtype == torch.bfloat16:
            return as_part_of(p, _codecs.join(local(p), local(state[REMAINDER])))
        if MASTER in state and p.dtype == torch.float16:
            return as_part_of(p, _codecs.join_float16(local(p), local(state[MASTER])))
        return p.detach().float()

    @torch.no_grad()
    def _set_master(self, p: Tensor, master: Tensor) -> None:
        if p.dtype == torch.float16:
            p.copy_(master)
            self.state[p][MASTER] = _as_laid_out(master.clone(), p)
            return
        rounded, remainder = _codecs.split(local(master))
        p.copy_(as_part_of(p, rounded))
        self.state[p][REMAINDER] = _as_laid_out(as_part_of(p, remainder), p)

    def master_state_dict(self, model: Module) -> dict[str, Any]:
        """Return ``model.state_dict()`` with float32 weights: all digits that the states have.

        Args:
            model: the model whose parameters this optimizer steps.

        Returns:
            A state dict in which each 16-bit parameter is float32: exactly the masters of
            ``master_weights=True``, and the parameter itself where there is none.
        """
        weights = model.state_dict()
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in weights and p.dtype in _HALVES:
                weights[name] = self._master(p)
        return weights

    def load_master_state_dict(self, model: Module, state_dict: dict[str, Any]) -> None:
        """Load float32 weights into a 16-bit model: what it lacks of them goes into the states.

        Args:
            model: the model whose parameters this optimizer steps.
            state_dict: of a float32 model, or what `master_state_dict` returned.

        Raises:
            ValueError: this optimizer keeps no masters. Nothing has changed then.
            RuntimeError: ``model.load_state_dict`` refuses names or shapes.
        """
        if not self.master_weights:
            raise ValueError(
                "load_master_state_dict on an optimizer without masters, which would lose what "
                "16 bits cannot hold; make it with master_weights=True, or use "
                "model.load_state_dict()"
            )
        model.load_state_dict(state_dict)  # rounded by torch; and refused, if anything is
        own = set(self._all_parameters())
        for name, p in model.named_parameters(remove_duplicate=False):
            if p in own and p.dtype in _HALVES and name in state_dict:
                self._set_master(p, state_dict[name].to(device=p.device, dtype=torch.float32))

    # ---- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint as torch does; what 16-bit parameters lack of float32, as bytes.

        So it can be gathered: no process group sends tensors of 16-bit integers.
        """
        if self._made_by_zero:  # which puts what it loads into the states as it is
            return super().state_dict()
        handle = self.register_state_dict_post_hook(_with_remainders_as_bytes, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def torch_state_dict(self) -> dict[str, Any]:
        """Return `state_dict` in the form that the class of torch loads.

        States are float32 where they are stored in 8 bits. What torch has no place for, masters and
        random bits, is left out: `master_state_dict` has the masters.
        """
        whole: dict[str, Any] = self.state_dict()
        plain = {i: _as_numbers(state) for i, state in whole["state"].items()}
        return {**whole, "state": plain}

    def _check_states(self, saved: dict[str, Any]) -> None:
        """Raise an error for what could not be stored, before anything has changed."""
        for p in self._all_parameters():
            self._stored_as(p)
        for state in saved.get("state", {}).values():
            for key, value in state.items():
                if _is_moment(key, value):
                    _check_codes(state, key)

    def _restore_states(self, saved: dict[str, Any]) -> None:
        """Take from a checkpoint what torch's own loading has cast, in the modes of now."""
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        for p, i in zip(self._all_parameters(), ids, strict=True):
            if i in saved["state"]:
                self._restore_state(p, saved["state"][i])

    def _restore_state(self, p: Tensor, saved: dict[str, Any]) -> None:
        state = self.state[p]
        for key in [REMAINDER, MASTER, ROUNDING, *(key for key in state if key.endswith("_scale"))]:
            state.pop(key, None)
        for name, value in saved.items():
            if _is_moment(name, value) and value.shape == p.shape:
                self._store(p, name, saved)
        master = REMAINDER if p.dtype == torch.bfloat16 else MASTER
        for key in (master if self._has_master(p) else None, ROUNDING):
            if key in saved:
                value = _from_bytes(p, saved[key]) if key == REMAINDER else saved[key]
                state[key] = value.to(_place_of_draws(p) if key == ROUNDING else p.device)
        # In the order of _create_state, and of the very strings that the engine looks for.
        for key in sorted(state, key=_rank):
            state[sys.intern(key)] = state.pop(key)

    def _store(self, p: Tensor, name: str, saved: dict[str, Any]) -> None:
        """Put a state that was stored in any way into that of p, as it is to be stored there."""
        state, value = self.state[p], saved[name]
        stored_as: Any = p.dtype if name == SLOW else self._stored_as(p)
        if stored_as == MXFP8 and _is_coded(value) and scale_key(name) in saved:
            for key in (name, scale_key(name)):
                state[key] = saved[key].to(p.device)
        elif stored_as == MXFP8:
            state.update(_encoded(p, decoded(saved, name).to(p.device), name))
        else:
            numbers = decoded(saved, name)
            as_torch_does = self.state_dtype is None or name == SLOW
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
            for name in [name for name, value in state.items() if _is_moment(name, value)]:
                self._store(p, name, dict(state))

    # ---- without a kernel --------------------------------------------------------------------

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
                self.state[q] = _as_numbers(self.state[p])
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
            or any(_is_coded(value) for value in state.values())
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
            if not _is_moment(name, value):
                state[name] = value
            elif stored_as == MXFP8 and name != SLOW:
                state.update(_encoded(p, value, name, u))
            else:
                state[name] = value if name == SLOW else value.to(stored_as)


# ---- states as they are stored -------------------------------------------------------------------


def _zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros with the strides of p; codes, with those of a C array."""
    layout = torch.contiguous_format if dtype == torch.uint8 else torch.preserve_format
    return torch.zeros_like(p, dtype=dtype, memory_format=layout, requires_grad=False)


def _place_of_draws(p: Tensor) -> torch.device:
    """Return who counts them: a GPU, which alone may know that a step is skipped, or the CPU."""
    return p.device if p.is_cuda else torch.device("cpu")


def _zero_scales(p: Tensor) -> Tensor:
    zeros = torch.zeros(_codecs.scale_shape(local(p)), dtype=torch.uint8, device=p.device)
    return as_part_of(p, zeros, _codecs.scale_shape(p))


def _is_coded(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def _is_moment(key: str, value: object) -> bool:
    """Return whether this is a state of a rule, or slow weights."""
    return (
        isinstance(value, Tensor)
        and key not in ("step", REMAINDER, MASTER, ROUNDING)
        and not key.endswith("_scale")
        and (value.is_floating_point() or _is_coded(value))
    )


def _rank(key: str) -> int:
    """Return which keys of a state come first; those of one rank stay as they are."""
    ranks = {"step": 0, SLOW: 2, REMAINDER: 3, MASTER: 3, ROUNDING: 5}
    return ranks.get(key, 4 if key.endswith("_scale") else 1)


def _encoded(p: Tensor, x: Tensor, name: str, u: Tensor | None = None) -> dict[str, Tensor]:
    """Return a state of p in 8 bits; to nearest, if there are no random bits."""
    code, x = code_of(name), local(x).float()
    if u is None:
        codes, scale = _codecs.encode_to_nearest(x, code)
    else:
        order = _codecs.for_signed if code.signed else _codecs.for_unsigned
        codes, scale = _codecs.encode(x, order(u), code)
    shape = _codecs.scale_shape(p)
    return {name: as_part_of(p, codes), scale_key(name): as_part_of(p, scale, shape)}


def _check_codes(state: dict[str, Any], name: str) -> None:
    if _is_coded(state[name]) and scale_key(name) not in state:
        raise ValueError(
            f"{name} of a checkpoint has 8-bit codes, and there is no {scale_key(name)}; load one "
            "that torch_state_dict() has made"
        )


def decoded(state: dict[str, Any], name: str) -> Tensor:
    """Return a state as numbers."""
    _check_codes(state, name)
    value: Tensor = state[name]
    if not _is_coded(value):
        return value
    return as_part_of(
        value, _codecs.decode(local(value), local(state[scale_key(name)]), code_of(name))
    )


def _as_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without what belongs to the ways of storing."""
    return {
        key: decoded(state, key) if _is_moment(key, value) else value
        for key, value in state.items()
        if key not in (REMAINDER, MASTER, ROUNDING) and not key.endswith("_scale")
    }


def _with_remainders_as_bytes(_: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint that has a last dimension of two bytes where the state has an int16."""
    states = {
        i: {**state, REMAINDER: _as_bytes(state[REMAINDER])} if REMAINDER in state else state
        for i, state in whole["state"].items()
    }
    return {**whole, "state": states}


def _as_bytes(remainder: Tensor) -> Tensor:
    part = local(remainder).unsqueeze(-1).view(torch.uint8)
    return as_part_of(remainder, part, (*remainder.shape, 2))


def _from_bytes(p: Tensor, x: Tensor) -> Tensor:
    """Return what `_as_bytes` was given, of which x may be a copy; and an int16 as it is."""
    if x.dtype != torch.uint8:
        return x
    part = local(x).clone(memory_format=torch.contiguous_format).view(torch.int16)
    return _as_laid_out(as_part_of(p, part.squeeze(-1)), p)


def _as_laid_out(x: Tensor, p: Tensor) -> Tensor:
    """Return x with the strides of p."""
    if is_distributed(p) or x.stride() == p.stride():
        return x
    return torch.empty_like(p, dtype=x.dtype, requires_grad=False).copy_(x)
