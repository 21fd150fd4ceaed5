"""Memory modes on a device: the readable spec, and the bits of the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import _codecs, _memory
from tests.device.common import never_waiting
from tests.device.test_device_tables import on_cpu
from tests.registry import CONFIGS, PLAIN_CONFIGS, Config
from tests.test_memory_modes import (
    MODES,
    check_against_spec,
    each_dtype,
    each_mode,
    numbers_of,
    parameters,
    same_state,
    set_gradients,
)

SHAPES = [(64, 96), (130,), (70, 67), (8, 3, 5, 11), (), (5, 1000), (0, 40), (20, 320)]
RANDOM = [mode for mode in MODES if "random" in mode or "8 bits" in mode]


def assert_same_everywhere(
    actual: Any, params: list[Tensor], expected: Any, others: list[Tensor]
) -> None:
    for p, q in zip(params, others, strict=True):
        assert same_state(p.detach().cpu(), q.detach())
        state, theirs = actual.state.get(p, {}), expected.state.get(q, {})
        assert list(state) == list(theirs)
        for key in state:
            assert same_state(state[key].cpu(), theirs[key]), key


def assert_bits_are_the_cpus(trained: Callable[[], tuple[Any, list[Tensor]]]) -> None:
    with on_cpu():
        expected = trained()
    assert_same_everywhere(*trained(), *expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@each_mode
def test_a_step_is_the_reference_between_the_codecs(config: Config, mode: str) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    check_against_spec(config.cls(params, **config.kwargs, **MODES[mode]), params, 3)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "skipping": {"skip_nonfinite": True},
}


@pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@each_mode
@each_dtype
def test_the_bits_are_those_of_the_cpu(
    config: Config, options: dict[str, Any], mode: str, dtype: torch.dtype
) -> None:
    """Of parameters, states, scales, remainders and draws, also after steps that were skipped."""

    def trained() -> tuple[Any, list[Tensor]]:
        params = parameters(dtype, SHAPES)
        optimizer = config.cls(params, **{**config.kwargs, **options}, **MODES[mode])
        for step in range(4):
            set_gradients(params, step)
            if options.get("skip_nonfinite") and step in (1, 2):
                assert params[0].grad is not None
                params[0].grad[0, 3] = math.inf
            optimizer.step()
        for state in optimizer.state.values():
            state.pop("step", None)
        return optimizer, params

    assert_bits_are_the_cpus(trained)


@each_mode
def test_a_scaler_that_finds_infinities_skips_the_draws_too(mode: str) -> None:
    def trained() -> tuple[Any, list[Tensor]]:
        params = parameters(torch.bfloat16, SHAPES)
        optimizer = fusedopt.Lion(params, lr=0.01, amp_scaling=True, **MODES[mode])
        for step, found in enumerate([0.0, 1.0, 0.0]):
            set_gradients(params, step)
            scaled: Any = optimizer
            scaled.grad_scale, scaled.found_inf = torch.tensor(4.0), torch.tensor(found)
            optimizer.step()
        return optimizer, params

    assert_bits_are_the_cpus(trained)


@pytest.mark.parametrize("mode", RANDOM)
def test_draws_are_counted_where_nobody_waits(mode: str) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params, skip_nonfinite=True, **MODES[mode])
    set_gradients(params, 0)
    optimizer.step()
    for step in (1, 2):
        set_gradients(params, step)
        if step == 2:
            params[0].grad = torch.full_like(params[0], math.nan)
        with never_waiting():
            optimizer.step()
    draws = {int(s["rounding"]) & 0xFFFFFFFF for s in optimizer.state.values() if "rounding" in s}
    assert draws == {2}
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("mode", RANDOM)
def test_a_graph_has_the_draws(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step is not refused: the device counts its draw, so each replay is another one."""
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params, capturable=True, **MODES[mode])
    for step in range(3):
        monkeypatch.setattr(_memory, "is_capturing", lambda _, step=step: step == 2)
        set_gradients(params, step)
        with never_waiting() if step else nullcontext():
            optimizer.step()
    draws = {int(s["rounding"]) & 0xFFFFFFFF for s in optimizer.state.values() if "rounding" in s}
    assert draws == {3}


@each_mode
def test_lookahead_has_bits_of_its_own(mode: str) -> None:
    def trained() -> tuple[Any, list[Tensor]]:
        params = parameters(torch.bfloat16, SHAPES)
        optimizer = fusedopt.Lookahead(fusedopt.AdamW(params, **MODES[mode]), k=2)
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
        return optimizer, params

    assert_bits_are_the_cpus(trained)


@each_mode
def test_streams_that_are_not_aligned(mode: str) -> None:
    """Each in a way of its own: elements then go one by one."""

    def trained() -> tuple[Any, list[Tensor]]:
        whole = parameters(torch.bfloat16, [(64 * 96 + 40,)])[0].detach()
        params = [whole[3 : 3 + 64 * 96].view(64, 96).requires_grad_()]
        optimizer = fusedopt.AdamW(params, **MODES[mode])
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        for key, value in optimizer.state[params[0]].items():
            if value.ndim:
                room = torch.zeros(value.numel() + 5, dtype=value.dtype, device=value.device)
                moved = room[3 : 3 + value.numel()].view(value.shape)
                optimizer.state[params[0]][key] = moved.copy_(value)
        for step in range(3, 6):
            set_gradients(params, step)
            optimizer.step()
        return optimizer, params

    assert_bits_are_the_cpus(trained)


@each_mode
@pytest.mark.parametrize("special", [math.nan, math.inf, 3e38, 1e20, 1e-30, 0.0])
def test_special_gradients(mode: str, special: float) -> None:
    def trained() -> tuple[Any, list[Tensor]]:
        params = parameters(torch.bfloat16, [(64, 96), (70, 67)])
        optimizer = fusedopt.AdamW(params, **MODES[mode])
        for step in range(3):
            set_gradients(params, step)
            for p in params:
                assert p.grad is not None
                p.grad[5, 3:60:7] = special
            optimizer.step()
        return optimizer, params

    assert_bits_are_the_cpus(trained)


@pytest.mark.parametrize("mode", RANDOM)
def test_numbered_elements_in_another_order_are_torchs(mode: str) -> None:
    """Random bits and blocks go by the order of a C array; the numbers are still right."""
    start = parameters(torch.bfloat16, [(16, 3, 10, 12)])[0].detach()
    p = start.clone(memory_format=torch.channels_last).requires_grad_()
    q = start.float().requires_grad_()
    optimizer = fusedopt.AdamW([p], **MODES[mode])
    set_gradients([p], 0)
    assert p.grad is not None
    q.grad = p.grad.float()
    with pytest.warns(UserWarning, match="random rounding or 8-bit states on .* not contiguous"):
        optimizer.step()
    theirs = torch.optim.AdamW([q])
    theirs.step()
    u = _codecs.random_bits(_codecs.rounding_key(optimizer.seed, 0) << 32, p.shape).to(p.device)
    state = optimizer.state[p]
    assert int(state["rounding"]) & 0xFFFFFFFF == 1
    if optimizer.stochastic_rounding:
        expected = _codecs.round_at_random(q.detach(), p.dtype, _codecs.for_parameter(u))
        assert torch.equal(p.detach(), expected)
    if state["exp_avg"].dtype == torch.uint8:
        moment = theirs.state[q]["exp_avg"]
        expected = _codecs.decode(*_codecs.encode(moment, u, _codecs.E4M3), _codecs.E4M3)
        assert torch.equal(numbers_of(state, "exp_avg"), expected)


def test_messages_name_the_device(device: str) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params, stochastic_rounding=True)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["rounding"] = torch.zeros((), dtype=torch.float32)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"rounding of params\[0\].* expected an int64 .*cuda:0"):
        optimizer.step()
    assert torch.equal(params[0].detach(), before)
