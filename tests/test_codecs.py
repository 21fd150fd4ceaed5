"""The readable spec of how parameters and states are stored, held against other definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fusedopt import _codecs
from fusedopt._codecs import E4M3, E5M3

ALL_BITS = torch.arange(1 << 16, dtype=torch.int64)
each_code = pytest.mark.parametrize("code", [E4M3, E5M3], ids=["E4M3", "E5M3"])


def numbers(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


def random_floats(count: int) -> Tensor:
    """Return any bits at all."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


# ---- random bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (7, "00000000 " * 4, "00000000 " * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, "ffffffff " * 4, "ffffffff " * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            7,
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
        (10, "00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, "ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            10,
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    rounds: int, counter: str, key: str, expected: str
) -> None:
    words = [int(word, 16) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    got = _codecs.philox(numbers(*words), (k0, k1), rounds)
    assert [f"{int(word):08x}" for word in got] == expected.split()


def test_the_bits_of_an_element_do_not_depend_on_which_part_it_is_in() -> None:
    rounding = (123 << 32) + 5
    whole = _codecs.random_bits(rounding, torch.Size((50, 3)))
    for first in (1, 2, 7, 9, 16):
        part = _codecs.random_bits(rounding, torch.Size((30,)), first)
        assert torch.equal(part, whole.flatten()[first : first + 30])


def test_the_bits_of_steps_and_parameters_differ() -> None:
    keys = [_codecs.rounding_key(seed, position) for seed in (0, 1) for position in range(3)]
    assert len(set(keys)) == 6
    assert all(0 <= key < 1 << 31 for key in keys)
    draws = [_codecs.random_bits((keys[0] << 32) + n, torch.Size((100,))) for n in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_elements_that_share_bits_have_them_in_other_orders() -> None:
    u = _codecs.random_bits(5 << 32, torch.Size((1000, 32)))
    assert torch.equal(u[:, 16:], _codecs.for_unsigned(u[:, :16]))
    mean = u.double().mean() / 65535
    assert abs(float(mean) - 0.5) < 0.01


@pytest.mark.parametrize("order", [_codecs.for_signed, _codecs.for_unsigned, _codecs.for_parameter])
def test_each_order_of_the_bits_has_every_number_once(order: object) -> None:
    assert callable(order)
    assert torch.equal(order(ALL_BITS).sort().values, ALL_BITS)


def test_two_orders_say_nothing_of_each_other_to_seven_bits() -> None:
    orders = [_codecs.for_signed, _codecs.for_unsigned, _codecs.for_parameter]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            pairs = (one(ALL_BITS) >> 9 << 7) | (other(ALL_BITS) >> 9)
            assert torch.equal(pairs.bincount(), torch.full((1 << 14,), 4))


# ---- 16-bit parameters ---------------------------------------------------------------------------


def test_a_split_float_has_all_its_bits() -> None:
    masters = torch.cat(
        [
            random_floats(1_000_000),
            torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4028235e38, -3.4028235e38, 1e-45]),
        ]
    )
    parameter, remainder = _codecs.split(masters)
    joined = _codecs.join(parameter, remainder)
    same = joined.view(torch.int32) == masters.view(torch.int32)
    assert (same | (joined.isnan() & masters.isnan())).all()
    assert parameter.dtype == torch.bfloat16
    assert remainder.dtype == torch.int16


def test_the_parameter_is_the_nearest_bfloat16() -> None:
    masters = random_floats(1_000_000)
    parameter, _ = _codecs.split(masters)
    nearest = masters.to(torch.bfloat16)
    tie = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert (tie | masters.isnan() | (parameter == nearest)).all()
    # Of two as near, the one farther from zero.
    halfway = torch.tensor([1 + 2.0**-8, -(1 + 2.0**-8)])
    assert torch.equal(
        _codecs.split(halfway).parameter, torch.tensor([1 + 2.0**-7, -(1 + 2.0**-7)]).bfloat16()
    )


@pytest.mark.parametrize("remainder", [-(2**15), -1, 0, 1, 2**15 - 1])
def test_whatever_remainder_is_beside_it_the_parameter_wins(remainder: int) -> None:
    every = ALL_BITS.to(torch.int16).view(torch.bfloat16)
    joined = _codecs.join(every, torch.full(every.shape, remainder, dtype=torch.int16))
    again = _codecs.split(joined).parameter
    both_nan = joined.isnan() & every.isnan()
    assert ((again.view(torch.int16) == every.view(torch.int16)) | both_nan).all()
    assert not (joined.isnan() & ~every.isnan()).any()


def test_a_float16_parameter_wins_over_its_master() -> None:
    master = torch.tensor([1.0001, 1.0001, 70000.0, math.nan])
    parameter = master.half()
    assert torch.equal(_codecs.join_float16(parameter, master)[:3], master[:3])
    parameter[1] = 5.0
    assert _codecs.join_float16(parameter, master)[1] == 5.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x", [1.2345, -3e-5, 1e-7, -5.96e-8, 3.1e-8, 60000.0, 1e-40, 123.456])
def test_rounding_at_random_is_fair(dtype: torch.dtype, x: float) -> None:
    exact = torch.tensor(x)
    rounded = _codecs.round_at_random(exact.expand(1 << 16), dtype, ALL_BITS).double()
    assert len(set(rounded.tolist())) <= 2
    digit = rounded.max() - rounded.min()
    assert (rounded.mean() - exact.double()).abs() <= max(
        float(digit), 2.0**-24 * (dtype == torch.float16)
    ) * 2.0**-12
    assert rounded.min() <= exact <= rounded.max() or digit == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_leaves_what_needs_no_rounding(dtype: torch.dtype) -> None:
    every = ALL_BITS.to(torch.int16).view(dtype)
    for bits in (0, 0x8000, 0xFFFF):
        rounded = _codecs.round_at_random(every.float(), dtype, torch.full_like(ALL_BITS, bits))
        same = rounded.view(torch.int16) == every.view(torch.int16)
        assert (same | (rounded.isnan() & every.isnan())).all()


# ---- 8-bit states --------------------------------------------------------------------------------


def all_codes(code: _codecs.Code, scale: int) -> tuple[Tensor, Tensor]:
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    return codes, torch.full((8, 1), scale, dtype=torch.uint8)


@pytest.mark.parametrize("scale", [0, 1, 60, 127, 134])
def test_signed_codes_are_a_block_of_mxfp8(scale: int) -> None:
    codes, scales = all_codes(E4M3, scale)
    theirs = codes.view(torch.float8_e4m3fn).float() * scales.view(torch.float8_e8m0fnu).float()
    assert torch.equal(
        _codecs.decode(codes, scales, E4M3).nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0)
    )


def test_unsigned_codes_are_what_they_are_defined_to_be() -> None:
    codes, scales = all_codes(E5M3, 127)
    for code, x in zip(
        codes.flatten().tolist(),
        _codecs.decode(codes, scales, E5M3).flatten().tolist(),
        strict=True,
    ):
        exponent, digits = code >> 3, code & 7
        value = digits * 2.0**-17 if exponent == 0 else (8 + digits) * 2.0 ** (exponent - 18)
        assert math.isnan(x) if code == 0xFF else x == value


@each_code
def test_a_code_comes_back_as_it_was(code: _codecs.Code) -> None:
    """If the largest has the place that the scale leaves it; whatever the random bits are."""
    largest = (code.headroom + (7 if code.signed else 15)) << 3  # a number in [2**headroom, ...)
    rows = torch.randint(0, largest + 7, (100, 32), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = largest + 3
    if code.signed:
        rows[:, 1::2] |= 0x80
    codes = rows.to(torch.uint8)
    scale = torch.full((100, 1), 120, dtype=torch.uint8)
    x = _codecs.decode(codes, scale, code)
    for bits in (0, 0x7FFF, 0xFFFF):
        again = _codecs.encode(x, torch.full(x.shape, bits), code)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scale)


@each_code
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-7, 1e-30, 1e30])
def test_coding_is_fair(code: _codecs.Code, size: float) -> None:
    x = torch.full((1 << 16, 32), 0.7 * size)
    x[:, 0] = 600 * size
    x[:, 1] = size
    decoded = _codecs.decode(*_codecs.encode(x, ALL_BITS[:, None].expand(x.shape), code), code)
    for column in (0, 1, 2):
        exact = float(x[0, column])
        digit = float(decoded[:, column].max() - decoded[:, column].min())
        assert digit <= exact / 8
        assert abs(float(decoded[:, column].double().mean()) - exact) <= digit * 2.0**-15


@each_code
def test_the_largest_of_a_block_is_never_cut_off(code: _codecs.Code) -> None:
    x = torch.full((64, 32), 1e-3)
    x[:, 0] = torch.linspace(1, 2, 65)[:-1]
    x[-1, 0] = torch.tensor(2.0).nextafter(torch.tensor(0.0))
    for bits in (0, 0xFFFF):
        decoded = _codecs.decode(*_codecs.encode(x, torch.full(x.shape, bits), code), code)
        assert ((decoded[:, 0] - x[:, 0]).abs() <= x[:, 0] / 8).all()


@each_code
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_leaves_its_neighbours_alone(code: _codecs.Code, bad: float) -> None:
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    u = torch.full(x.shape, 0x1234)
    expected = _codecs.decode(
        *_codecs.encode(x.clone().index_fill(1, torch.tensor([5]), 0.0), u, code), code
    )
    x[:, 5] = bad
    decoded = _codecs.decode(*_codecs.encode(x, u, code), code)
    assert decoded[:, 5].isnan().all()
    decoded[:, 5] = 0
    assert torch.equal(decoded, expected)


@each_code
@pytest.mark.parametrize("row", [(40,), (1,), (5, 7), (32,), (3, 32), (96,)])
def test_blocks_do_not_cross_rows(code: _codecs.Code, row: tuple[int, ...]) -> None:
    x = torch.rand(10, *row, generator=torch.Generator().manual_seed(0))
    length = math.prod(row)
    codes, scale = _codecs.encode(x, _codecs.random_bits(7 << 32, x.shape), code)
    assert scale.shape == _codecs.scale_shape(x) == (10, -(-length // 32))
    u = _codecs.random_bits(7 << 32, x[3:8].shape, first=3 * length)
    part_codes, part_scale = _codecs.encode(x[3:8], u, code)
    assert torch.equal(part_codes, codes[3:8])
    assert torch.equal(part_scale, scale[3:8])
    assert _codecs.decode(codes, scale, code).shape == x.shape


def test_a_parameter_without_rows_has_no_blocks() -> None:
    empty = torch.zeros(0, 64)
    codes, scale = _codecs.encode(empty, torch.zeros(0, 64, dtype=torch.int64), E4M3)
    assert codes.shape == (0, 64)
    assert scale.shape == (0, 2)
    assert _codecs.decode(codes, scale, E4M3).shape == (0, 64)


def average_after(u: object, steps: int, gradient: Tensor, x: Tensor) -> Tensor:
    """Return the average of squares, beta2 = 0.999, after so many steps of a constant gradient."""
    for step in range(steps):
        x = x + (gradient * gradient - x) * 1e-3
        bits = _codecs.random_bits((9 << 32) + step, x.shape) if u is None else u
        assert isinstance(bits, Tensor)
        x = _codecs.decode(*_codecs.encode(x, _codecs.for_unsigned(bits), E5M3), E5M3)
    return x


def test_an_average_in_eight_bits_goes_down_where_the_gradient_does() -> None:
    steps = 8000
    gradient = torch.full((16, 32), 0.01)
    exact = gradient[0, 0] ** 2 + (1 - gradient[0, 0] ** 2) * (1 - 1e-3) ** steps
    start = torch.ones(16, 32)
    fair = average_after(None, steps, gradient, start).sqrt().mean() / exact.sqrt()
    assert 0.9 < fair < 1.1
    nearest = average_after(torch.full((1, 32), 0x7FFF), 2000, gradient[:1], start[:1])
    assert nearest.sqrt().mean() > 2 * (exact**0 * (1 - 1e-3) ** 2000) ** 0.5  # it has not moved


def test_small_elements_of_a_block_keep_their_average() -> None:
    gradient = torch.full((16, 32), 1e-3)
    gradient[:, 0] = 1.0
    v = average_after(None, 4000, gradient, gradient**2)
    assert abs(float(v[:, 1:].sqrt().mean()) / 1e-3 - 1) < 0.05
