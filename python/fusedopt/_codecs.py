"""How states and parameters are stored where they are not plain numbers: the readable spec.

In plain operators, a whole tensor at a time, beside csrc/numeric/ (codec.h, blocks.h, random.h),
which does the same element by element, bit for bit. Integers that stand for bits are int64 tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_INFINITY = 0x7F800000

# ---- random bits ---------------------------------------------------------------------------------

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_LOW = 0xFFFFFFFF


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of products of 32-bit numbers."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(
    counter: tuple[Tensor, ...], key: tuple[int, int], rounds: int = _ROUNDS
) -> tuple[Tensor, ...]:
    """Return 128 random bits for each counter: Philox4x32, by default of 7 rounds.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Args:
        counter: four int64 tensors of 32-bit numbers.
        key: two 32-bit numbers.
        rounds: 7 is the fewest that pass the tests of randomness there, 10 is their default.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a_high, a_low = _product(_MULTIPLIERS[0], x0)
        b_high, b_low = _product(_MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = b_high ^ x1 ^ k0, b_low, a_high ^ x3 ^ k1, a_low
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return x0, x1, x2, x3


def rounding_key(seed: int, position: int) -> int:
    """Return the key of a parameter's random bits, 31 bits, by its position in the optimizer."""
    zero = torch.zeros((), dtype=torch.int64)
    words = philox((zero + position, zero, zero, zero), (seed & _LOW, (seed >> 32) & _LOW))
    return int(words[0]) >> 1


def random_bits(rounding: int, shape: torch.Size, first: int = 0) -> Tensor:
    """Return 16 random bits for each element of a parameter, or of the part from `first` on.

    32 elements share 16 halves of words: the first 16 have them as they are, and the others with
    their two bytes exchanged.

    Args:
        rounding: key and number of the draw, as the state has them: ``key * 2**32 + draw``.
        shape: of the part.
        first: elements of the whole parameter before it, in C order.
    """
    count = math.prod(shape)
    block = torch.arange(first // 32, (first + count + 31) // 32, dtype=torch.int64)
    counter = torch.stack([2 * block, 2 * block + 1], dim=-1)
    draw = torch.full_like(counter, rounding & _LOW)
    zero = torch.zeros_like(draw)
    words = philox((counter & _LOW, counter >> 32, draw, zero), (rounding >> 32, 0))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    halves = halves.flatten(1)
    both = torch.cat([halves, for_unsigned(halves)], dim=1).flatten()
    return both[first % 32 : first % 32 + count].reshape(shape)


def for_signed(u: Tensor) -> Tensor:
    """Return the bits in the order in which signed states take them."""
    return u


def for_unsigned(u: Tensor) -> Tensor:
    """Return them in the order for unsigned states: bytes exchanged."""
    return (u >> 8) | ((u & 0xFF) << 8)


def for_parameter(u: Tensor) -> Tensor:
    """Return them in the order for parameters, whose upper byte depends on both."""
    return u ^ ((u << 9) & 0xFE00)


# ---- 16-bit parameters ---------------------------------------------------------------------------


def bits_of(x: Tensor) -> Tensor:
    """Return the bits of float32 numbers."""
    return x.contiguous().view(torch.int32).to(torch.int64) & _LOW


def floats_of(bits: Tensor) -> Tensor:
    """Return the float32 numbers that have these bits."""
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def _halves_as(dtype: torch.dtype, bits: Tensor) -> Tensor:
    signed = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
    return signed.to(torch.int16).view(dtype)


class Split(NamedTuple):
    """float32 numbers as bfloat16 and what that lacks of them."""

    parameter: Tensor
    """bfloat16: the nearest, of two as near the one farther from zero."""
    remainder: Tensor
    """int16: ``bits(master) - (bits(parameter) << 16)``."""


def split(master: Tensor) -> Split:
    """Split float32 numbers: nothing is lost, but for which NaN it was.

    To nearest *even* it could not be exact: an even bfloat16 would have 65,537 float32 neighbours.
    """
    bits = torch.where(master.isnan(), 0x7FC00000, bits_of(master))
    parameter = ((bits + 0x8000) & _LOW) >> 16
    return Split(_halves_as(torch.bfloat16, parameter), _halves_as(torch.int16, bits & 0xFFFF))


def join(parameter: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 numbers that `split` was given.

    Of whatever parameter and remainder: a number that rounds to the parameter.
    """
    bits = parameter.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    magnitude = (bits & 0x7FFF) << 16
    any_sum = (magnitude + remainder.to(torch.int64)).clamp(min=0)
    most = magnitude.clamp(min=_INFINITY)
    return floats_of(any_sum.minimum(most) | ((bits & 0x8000) << 16))


def join_float16(parameter: Tensor, master: Tensor) -> Tensor:
    """Return the master, or the parameter where somebody else has written that since."""
    rounded = master.to(torch.float16)
    same = rounded.contiguous().view(torch.int16) == parameter.contiguous().view(torch.int16)
    return torch.where(same, master, parameter.float())


def round_at_random(x: Tensor, dtype: torch.dtype, u: Tensor) -> Tensor:
    """Round float32 numbers up or down, to bfloat16 or float16: up as often as is fair.

    Args:
        x: float32.
        dtype: of the result.
        u: 16 random bits for each, in the order `for_parameter`.
    """
    bits = bits_of(x)
    if dtype == torch.bfloat16:
        rounded = ((bits + u) & _LOW) >> 16
        return _halves_as(torch.bfloat16, torch.where(x.isnan(), 0x7FC0, rounded))
    rebias, smallest_normal = (127 - 15) << 23, (127 - 14) << 23
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - rebias + (u >> 3)) >> 13
    small = floats_of(torch.where(magnitude < smallest_normal, magnitude, 0))
    subnormal = ((small * 2.0**40).to(torch.int64) + u) >> 16
    finite = torch.where(magnitude < smallest_normal, subnormal, normal).clamp(max=0x7BFF)
    at_random = _halves_as(torch.float16, finite | (bits >> 16 & 0x8000))
    return torch.where(x.abs() <= 65504, at_random, x.to(torch.float16))


# ---- 8-bit states --------------------------------------------------------------------------------

BLOCK = 32
SMALLEST = 4096
"""Parameters of fewer elements keep their states in float32."""


class Code(NamedTuple):
    """A format of eight bits, of which three are digits; beside it, a power of two a block."""

    bias: int
    """Of a float32's exponent over the code's."""
    headroom: int
    """In which power of two a block's largest element lies: one below the largest there is."""
    signed: bool
    nan: int


E4M3 = Code(bias=120, headroom=7, signed=True, nan=0x7F)
"""Signed; with its scales a block of OCP's MXFP8 (E4M3 elements, an E8M0 scale)."""
E5M3 = Code(bias=112, headroom=15, signed=False, nan=0xFF)
"""Without a sign, for sums of squares: its bit is one more of the exponent."""


def row_length(p: Tensor) -> int:
    """Return the elements of a row of dimension 0, which blocks do not cross."""
    return math.prod(p.shape[1:])


def scale_shape(p: Tensor) -> tuple[int, int]:
    """Return the shape of the scales of p's states: a row for a row of p."""
    return p.shape[0], -(-row_length(p) // BLOCK)


def is_large(p: Tensor) -> bool:
    """Return whether ``state_dtype="mxfp8"`` holds for p."""
    return p.ndim > 1 and p.numel() >= SMALLEST and row_length(p) >= BLOCK


def _in_blocks(x: Tensor) -> Tensor:
    """Return x as (row, block, element), with zeros where a row's last block has no element."""
    rows, blocks = scale_shape(x)
    padded = x.new_zeros(rows, blocks * BLOCK)
    padded[:, : row_length(x)] = x.reshape(rows, row_length(x))
    return padded.reshape(rows, blocks, BLOCK)


def _out_of_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    row = math.prod(shape[1:])
    return blocks.flatten(1)[:, :row].reshape(shape)


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def encode(x: Tensor, u: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Return codes of x's shape, and the scales of their blocks: both uint8.

    An element is rounded up or down, as often as is fair: to nearest, an average would stick where
    a step of it is shorter than half a digit. A scale byte s stands for ``2**(s - 127)``.

    Args:
        x: float32, of two dimensions at least.
        u: 16 random bits for each element, in the order of the code.
        code: the format.
    """
    bits = _in_blocks(bits_of(x))
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 31
    is_finite = magnitude < _INFINITY
    largest = torch.where(is_finite, magnitude, 0).amax(dim=-1, keepdim=True)
    scale = ((largest >> 23) - code.headroom).clamp(min=0)
    scaled = floats_of(magnitude) * _power_of_two(127 - scale) * 2.0**-code.bias
    rounded = (bits_of(scaled) + (_in_blocks(u) << 4) + 8) >> 20
    codes = torch.where(is_finite, rounded, code.nan)
    if code.signed:
        codes = codes | (sign << 7)
    return _out_of_blocks(codes, x.shape).to(torch.uint8), scale.squeeze(-1).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, code: Code) -> Tensor:
    """Return the float32 numbers that codes and scales stand for."""
    bits = _in_blocks(codes.to(torch.int64))
    magnitude = bits & 0x7F if code.signed else bits
    up = _power_of_two(scale.to(torch.int64).unsqueeze(-1) - 127)
    size = floats_of(magnitude << 20) * 2.0**code.bias * up
    size = torch.where(magnitude == code.nan, math.nan, size)
    x = torch.where(bits >= 0x80, -size, size) if code.signed else size
    return _out_of_blocks(x, codes.shape)


def encode_to_nearest(x: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Return codes and scales of numbers that no step has made: of a checkpoint, say."""
    return encode(x, torch.full(x.shape, 0x7FFF, dtype=torch.int64), code)
