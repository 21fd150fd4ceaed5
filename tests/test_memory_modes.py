"""Steps in the memory modes, bit for bit: reference() between the codecs' readable spec."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedopt import _codecs, _stored
from fusedopt._base import Fused
from tests.reference import reference_update, same_bits
from tests.registry import CONFIGS, PLAIN_CONFIGS, Config

SHAPES = [(64, 96), (130,), (70, 67), (8, 3, 5, 11), (), (5, 1000)]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=str)
each_plain_config = pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)

MODES: dict[str, dict[str, Any]] = {
    "float32 states": {"state_dtype": torch.float32},
    "bfloat16 states": {"state_dtype": torch.bfloat16},
    "float16 states": {"state_dtype": torch.float16},
    "8 bits": {"state_dtype": "mxfp8"},
    "masters": {"master_weights": True},
    "masters, float32 states": {"master_weights": True, "state_dtype": torch.float32},
    "masters, 8 bits": {"master_weights": True, "state_dtype": "mxfp8"},
    "random": {"stochastic_rounding": True},
    "random, float32 states": {"stochastic_rounding": True, "state_dtype": torch.float32},
    "random, 8 bits": {"stochastic_rounding": True, "state_dtype": "mxfp8", "seed": 3},
}
each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)


def parameters(dtype: torch.dtype, shapes: Any = SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = [torch.randn(s, generator=generator, device="cpu").bfloat16() for s in shapes]
    return [x.to(torch.get_default_device(), dtype).requires_grad_() for x in numbers]


def set_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator("cpu").manual_seed(100 + step)
    for p in params:
        # Of many sizes, and so few digits that each dtype has them.
        grad = torch.randn(p.shape, generator=generator, device="cpu")
        grad *= 2.0 ** -torch.randint(0, 12, p.shape, generator=generator, device="cpu")
        p.grad = grad.bfloat16().to(p.device, p.dtype)


def numbers_of(state: dict[str, Tensor], name: str) -> Tensor:
    value = state[name]
    if value.dtype != torch.uint8:
        return value
    return _codecs.decode(value, state[f"{name}_scale"], _stored.code_of(name))


class Expected:
    """What a parameter and its state are after each step, by the readable spec."""

    def __init__(self, optimizer: Fused, p: Tensor, position: int) -> None:
        self.optimizer, self.t = optimizer, 0
        self.group = optimizer.param_groups[0]
        self.rule = optimizer._rule(self.group)
        self.p = p.detach().clone()
        self.has_master = optimizer.master_weights and p.dtype != torch.float32
        self.at_random = (
            optimizer.stochastic_rounding and p.dtype != torch.float32 and not self.has_master
        )
        self.master = self.p.float()
        self.coded = optimizer.state_dtype == "mxfp8" and _codecs.is_large(p)
        stored: Any = optimizer.state_dtype or p.dtype
        self.stored: torch.dtype = torch.float32 if stored == "mxfp8" else stored
        start = self.group.get("initial_accumulator_value", 0.0)
        self.states = [torch.full_like(self.master, start) for _ in self.rule.states]
        if self.coded:
            code = _stored.code_of(self.rule.states[0] if self.rule.states else "")
            self.states = [
                _codecs.decode(*_codecs.encode_to_nearest(x, code), code) for x in self.states
            ]
        else:
            self.states = [x.to(self.stored) for x in self.states]
        self.key = _codecs.rounding_key(optimizer.seed, position)

    def step(self, grad: Tensor) -> None:
        self.t += 1
        streams = [self.master, grad.float(), *(x.float() for x in self.states)]
        t = self.t if self.rule.counts_steps else min(self.t, 2)
        master, *states = reference_update(self.optimizer, self.group, t, streams)
        u = _codecs.random_bits((self.key << 32) + self.t - 1, master.shape)
        if self.has_master:
            self.master, self.p = master, master.to(self.p.dtype)
            if self.p.dtype == torch.bfloat16:
                self.p = _codecs.split(master).parameter
        elif self.at_random:
            self.p = _codecs.round_at_random(master, self.p.dtype, _codecs.for_parameter(u))
            self.master = self.p.float()
        else:
            self.p = master.to(self.p.dtype)
            self.master = self.p.float()
        for i, (name, x) in enumerate(zip(self.rule.states, states, strict=True)):
            if self.coded:
                code = _stored.code_of(name)
                bits = _codecs.for_signed(u) if code.signed else _codecs.for_unsigned(u)
                self.states[i] = _codecs.decode(*_codecs.encode(x, bits, code), code)
            else:
                self.states[i] = x.to(self.stored)

    def assert_equal(self, p: Tensor) -> None:
        state = self.optimizer.state.get(p, {})
        assert same_bits(p.detach(), self.p)
        if self.has_master:
            assert same_bits(self.optimizer._master(p), self.master)
        for name, x in zip(self.rule.states, self.states, strict=True):
            assert same_bits(numbers_of(state, name), x), name


@each_config
@each_mode
def test_a_step_is_the_reference_between_the_codecs(config: Config, mode: str) -> None:
    check_steps(config, mode, torch.bfloat16)


@each_plain_config
@each_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_so_it_is_with_parameters_of_other_dtypes(
    config: Config, mode: str, dtype: torch.dtype
) -> None:
    check_steps(config, mode, dtype)


def check_steps(config: Config, mode: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    check_against_spec(config.cls(params, **config.kwargs, **MODES[mode]), params, 4)


def check_against_spec(optimizer: Fused, params: list[Tensor], steps: int) -> None:
    """Step params, and compare each step with the readable spec."""
    expected = [Expected(optimizer, p, i) for i, p in enumerate(params)]
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
        for p, e in zip(params, expected, strict=True):
            assert p.grad is not None
            e.step(p.grad)
            e.assert_equal(p)


@each_config
@pytest.mark.parametrize("clip", [None, 0.5])
def test_masters_with_float32_states_are_float32_training(
    config: Config, clip: float | None
) -> None:
    shapes = [(64, 96), (130,), (7, 3, 5)]
    ours, theirs = parameters(torch.bfloat16, shapes), parameters(torch.float32, shapes)
    options = {**config.kwargs, "max_grad_norm": clip}
    optimizer = config.cls(ours, **options, master_weights=True, state_dtype=torch.float32)
    expected = config.cls(theirs, **options)
    gradients = []
    for i in range(37):
        set_gradients(ours, i)
        gradients.append([p.grad for p in ours])
    for step in range(1000):
        for p, q, grad in zip(ours, theirs, gradients[step % len(gradients)], strict=True):
            assert grad is not None
            p.grad, q.grad = grad, grad.float()
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        assert same_bits(optimizer._master(p), q.detach())
        for key, value in expected.state[q].items():
            assert same_bits(optimizer.state[p][key], value)


def layouts(x: Tensor) -> list[Tensor]:
    return [
        x.clone(memory_format=torch.channels_last),
        torch.stack([x, x], dim=-1)[..., 0],
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ]


@each_plain_config
@each_mode
@each_dtype
def test_the_layout_of_a_parameter_changes_no_bit(
    config: Config, mode: str, dtype: torch.dtype
) -> None:
    (start,) = parameters(dtype, [(8, 3, 50, 11)])

    def train(p: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        p = p.requires_grad_()
        optimizer = config.cls([p], **config.kwargs, **MODES[mode])
        for step in range(3):
            set_gradients([p], step)
            optimizer.step()
        return p.detach(), optimizer.state[p]

    expected, expected_state = train(start.detach().clone())
    for other in layouts(start.detach()):
        p, state = train(other)
        assert same_bits(p, expected)
        for key, value in expected_state.items():
            assert same_state(state[key], value), key


def same_state(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point() and a.ndim:
        return same_bits(a, b)
    return torch.equal(a, b)
