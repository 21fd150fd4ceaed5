"""A state of one parameter, as it is stored: its keys, its codes, and what is made of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusedopt import _codecs
from fusedopt._shards import as_part_of, is_distributed, local

SLOW = "slow"  # keys of the state: Lookahead's slow weights,
AVERAGE = "ema"  # moving averages of the weights,
REMAINDER = "remainder"  # what a bfloat16 parameter lacks of its float32 master,
MASTER = "master"  # the float32 that a float16 parameter is rounded from,
ROUNDING = "rounding"  # where its random bits are: key * 2**32 + number of the draw,
WINDOW = "window"  # and, of one parameter, the last norms of all gradients: _spikes.Watch.norms

# Keys of what is no number of the parameter's.
_OTHERS = frozenset({"step", REMAINDER, MASTER, ROUNDING, WINDOW})

MXFP8 = "mxfp8"
PARTS = 16
FOLLOWING = frozenset({SLOW, AVERAGE})  # weights that follow the parameter's
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
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


def zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros with the strides of p; codes, with those of a C array."""
    layout = torch.contiguous_format if dtype == torch.uint8 else torch.preserve_format
    return torch.zeros_like(p, dtype=dtype, memory_format=layout, requires_grad=False)


def place_of_draws(p: Tensor) -> torch.device:
    """Return who counts them: a GPU, which alone may know that a step is skipped, or the CPU."""
    return p.device if p.is_cuda else torch.device("cpu")


def following_dtype(p: Tensor, name: str) -> torch.dtype:
    """Return what weights that follow those of p are stored in, unless they came otherwise."""
    return torch.float32 if name == AVERAGE and p.dtype in HALVES else p.dtype


def zero_scales(p: Tensor) -> Tensor:
    zeros = torch.zeros(_codecs.scale_shape(local(p)), dtype=torch.uint8, device=p.device)
    return as_part_of(p, zeros, _codecs.scale_shape(p))


def is_coded(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def is_moment(key: str, value: object) -> bool:
    """Return whether this is a state of a rule, or weights that follow the parameter's."""
    return (
        isinstance(value, Tensor)
        and key not in _OTHERS
        and not key.endswith("_scale")
        and (value.is_floating_point() or is_coded(value))
    )


def rank(key: str) -> int:
    """Return which keys of a state come first; those of one rank stay as they are."""
    ranks = {"step": 0, **dict.fromkeys(FOLLOWING, 2)}
    ranks |= {REMAINDER: 3, MASTER: 3, ROUNDING: 5, WINDOW: 6}
    return ranks.get(key, 4 if key.endswith("_scale") else 1)


def encoded(p: Tensor, x: Tensor, name: str, u: Tensor | None = None) -> dict[str, Tensor]:
    """Return a state of p in 8 bits; to nearest, if there are no random bits."""
    code, x = code_of(name), local(x).float()
    if u is None:
        codes, scale = _codecs.encode_to_nearest(x, code)
    else:
        order = _codecs.for_signed if code.signed else _codecs.for_unsigned
        codes, scale = _codecs.encode(x, order(u), code)
    shape = _codecs.scale_shape(p)
    return {name: as_part_of(p, codes), scale_key(name): as_part_of(p, scale, shape)}


def check_codes(state: dict[str, Any], name: str) -> None:
    if is_coded(state[name]) and scale_key(name) not in state:
        raise ValueError(
            f"{name} of a checkpoint has 8-bit codes, and there is no {scale_key(name)}; load one "
            "that torch_state_dict() has made"
        )


def decoded(state: dict[str, Any], name: str) -> Tensor:
    """Return a state as numbers."""
    check_codes(state, name)
    value: Tensor = state[name]
    if not is_coded(value):
        return value
    return as_part_of(
        value, _codecs.decode(local(value), local(state[scale_key(name)]), code_of(name))
    )


def decoded_in_parts(state: dict[str, Any], name: str) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows at a time of what this process has of an 8-bit state, as numbers.

    (To decode them takes many times as much memory as they do.)
    """
    check_codes(state, name)
    codes, scale = local(state[name]), local(state[scale_key(name)])
    count = max(1, len(codes) // PARTS)
    for first in range(0, len(codes), count):
        rows = slice(first, first + count)
        yield rows, _codecs.decode(codes[rows], scale[rows], code_of(name))


def as_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without what belongs to the ways of storing."""
    return {
        key: decoded(state, key) if is_moment(key, value) else value
        for key, value in state.items()
        if key == "step" or not (key in _OTHERS or key.endswith("_scale"))
    }


def with_remainders_as_bytes(_: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint that has a last dimension of two bytes where the state has an int16."""
    states = {
        i: {**state, REMAINDER: _as_bytes(state[REMAINDER])} if REMAINDER in state else state
        for i, state in whole["state"].items()
    }
    return {**whole, "state": states}


def _as_bytes(remainder: Tensor) -> Tensor:
    part = local(remainder).unsqueeze(-1).view(torch.uint8)
    return as_part_of(remainder, part, (*remainder.shape, 2))


def from_bytes(p: Tensor, x: Tensor) -> Tensor:
    """Return what `_as_bytes` was given, of which x may be a copy; and an int16 as it is."""
    if x.dtype != torch.uint8:
        return x
    part = local(x).clone(memory_format=torch.contiguous_format).view(torch.int16)
    return as_laid_out(as_part_of(p, part.squeeze(-1)), p)


def as_laid_out(x: Tensor, p: Tensor) -> Tensor:
    """Return x with the strides of p."""
    if is_distributed(p) or x.stride() == p.stride():
        return x
    return torch.empty_like(p, dtype=x.dtype, requires_grad=False).copy_(x)
