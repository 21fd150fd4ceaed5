"""Spikes: which norms are, and what becomes of the step; against the spec in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import Spikes, _engine, _spikes
from tests.helpers import (
    ENGINES,
    assert_same_bits,
    assert_same_state,
    each_isa,
    each_optimizer,
    parameters,
    set_gradients,
    slow_gather,
    values,
)
from tests.registry import Config

SHORT = Spikes(window=8, warmup=4, patience=3)


def window_of(optimizer: Any) -> Tensor:
    (found,) = [state["window"] for state in optimizer.state.values() if "window" in state]
    assert isinstance(found, Tensor)
    return found


def step_with_norm(optimizer: Any, p: Parameter, norm: float) -> bool:
    """Make a step with a gradient of exactly this norm; return whether it was skipped."""
    p.grad = torch.zeros_like(p)
    p.grad[0] = norm
    before = optimizer.skipped_steps
    optimizer.step()
    return bool(optimizer.skipped_steps != before)


def fill(optimizer: Any, p: Parameter, count: int, seed: int = 0) -> None:
    """Make so many steps with norms around 1."""
    generator = random.Random(seed)
    for _ in range(count):
        assert not step_with_norm(optimizer, p, 1 + 0.1 * generator.random())


def make(skip_spikes: bool | Spikes = SHORT, **kwargs: Any) -> tuple[Parameter, fusedopt.SGD]:
    p = Parameter(torch.ones(3, dtype=torch.float64))
    return p, fusedopt.SGD([p], lr=1e-3, skip_spikes=skip_spikes, **kwargs)


# ---- decisions -----------------------------------------------------------------------------------


def norms_of_a_run(seed: int, steps: int) -> Iterator[float]:
    """Norms that drift, jump to new levels, spike, vanish, and are not finite at times."""
    generator = random.Random(seed)
    level, spread = 1.0, 0.1
    for _ in range(steps):
        if generator.random() < 0.004:
            level *= math.exp(generator.gauss(0, 3))
            spread = generator.choice([0.0, 0.01, 0.1, 0.5])
        norm = level * math.exp(spread * generator.gauss(0, 1))
        chance = generator.random()
        if chance < 0.03:
            norm *= generator.choice([1.2, 2, 10, 1e6])
        elif chance < 0.04:
            norm = generator.choice([0.0, math.inf, math.nan, -math.nan, 1e-300, 1e200])
        yield norm


CASES = {
    "default": Spikes(),
    "short": SHORT,
    "smallest": Spikes(window=2, patience=1),
    "early": Spikes(sigmas=2.5, window=33, warmup=2, patience=5),
    "threshold": Spikes(sigmas=4, window=20, threshold=3.0),
    "threshold alone": Spikes(sigmas=math.inf, window=16, threshold=2),
    "clip": Spikes(window=50, action="clip"),
    "clip by both": Spikes(sigmas=3, window=17, threshold=5.0, action="clip"),
}


@pytest.mark.parametrize("spikes", CASES.values(), ids=CASES.keys())
def test_decisions_are_those_of_the_spec(spikes: Spikes) -> None:
    p, optimizer = make(spikes, skip_nonfinite=True)
    expected = _spikes.watch(spikes, _spikes.zeros(spikes, torch.device("cpu")))
    seen = {"skipped": 0, "made": 0, "anew": 0}
    for norm in norms_of_a_run(1, 3000):
        # What the engine makes of it: 1e200 has no square, and 1e-300 one that is 0.
        computed = math.sqrt(norm * norm)
        judgement = _spikes.judge(expected, expected.norms.tolist(), computed)
        _spikes.remember(expected, judgement)
        skips = not math.isfinite(computed) or (judgement.is_spike and not expected.clips)
        assert step_with_norm(optimizer, p, norm) == skips
        if has_window(optimizer):
            assert_same_bits(window_of(optimizer).cpu(), expected.norms)
        seen["skipped" if judgement.is_spike else "made"] += 1
        seen["anew"] += judgement.begins_anew
    assert seen["skipped"] > 10
    assert seen["made"] > 1000
    assert seen["anew"] > 0 or expected.clips or spikes.sigmas == math.inf


def has_window(optimizer: Any) -> bool:
    return any("window" in state for state in optimizer.state.values())


def test_the_spec_is_mean_and_deviation() -> None:
    """By torch, from the norms themselves."""
    norms = (values((500,), 3).abs() + 0.1).tolist()
    spikes = Spikes(sigmas=2.0, window=40, warmup=10, patience=1000)
    p, optimizer = make(spikes)
    accepted: list[float] = []
    for norm in norms:
        last = torch.tensor(accepted[-40:], dtype=torch.float64)
        is_spike = len(last) >= 10 and norm > float(last.mean() + 2 * last.std())
        assert step_with_norm(optimizer, p, norm) == is_spike
        if not is_spike:
            accepted.append(norm)
    assert 300 < len(accepted) < 450


def test_nothing_is_skipped_before_half_of_the_window_is_there() -> None:
    p, optimizer = make(True)
    for count in range(64):
        assert not step_with_norm(optimizer, p, 1.0 if count % 2 else 1.1)
    assert step_with_norm(optimizer, p, 100.0)
    p, optimizer = make(True)
    for count in range(63):
        assert not step_with_norm(optimizer, p, 1.0 if count % 2 else 1.1)
    assert not step_with_norm(optimizer, p, 100.0)


def test_a_threshold_holds_from_the_first_step_and_is_not_given_up() -> None:
    p, optimizer = make(Spikes(threshold=2.0, patience=3))
    assert all(step_with_norm(optimizer, p, 2.5) for _ in range(20))
    assert not step_with_norm(optimizer, p, 2.0)
    assert optimizer.skipped_steps == 20


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_norms_that_hardly_differ_are_no_spikes(scale: float) -> None:
    """With a deviation of 0, any larger norm would be one, by a last bit."""
    p, optimizer = make(True)
    for _ in range(128):
        assert not step_with_norm(optimizer, p, scale)
    assert not step_with_norm(optimizer, p, math.nextafter(scale, math.inf))
    assert not step_with_norm(optimizer, p, 1.05 * scale)
    assert step_with_norm(optimizer, p, 1.09 * scale)


def test_norms_that_have_moved_for_good_are_accepted_after_a_while() -> None:
    p, optimizer = make(True)
    fill(optimizer, p, 100)
    skipped = [step_with_norm(optimizer, p, 10.0) for _ in range(200)]
    assert skipped == [True] * 16 + [False] * 184
    assert step_with_norm(optimizer, p, 100.0)  # it has learned the new level


def test_a_norm_in_between_is_accepted_and_ends_the_row() -> None:
    p, optimizer = make(SHORT)
    fill(optimizer, p, 8)
    for _ in range(5):  # many spikes, but never four in a row
        assert [step_with_norm(optimizer, p, x) for x in (10, 10, 10, 1.0)] == [True] * 3 + [False]


def test_clipped_norms_follow_a_new_level() -> None:
    p, optimizer = make(Spikes(window=16, action="clip"))
    fill(optimizer, p, 16)
    steps = []
    for _ in range(60):
        before = p.detach().clone()
        assert not step_with_norm(optimizer, p, 10.0)
        steps.append(float((before - p.detach()).norm()) / 1e-3)
    assert steps[0] < 2
    assert steps[-1] == pytest.approx(10, rel=1e-4)
    assert steps == sorted(steps)


@pytest.mark.parametrize("action", ["skip", "clip"])
@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_what_is_not_finite_is_left_to_skip_nonfinite(norm: float, action: str) -> None:
    """And enters no window, which it would spoil for as long as that is."""
    for skips in (True, False):
        p, optimizer = make(Spikes(window=8, action=action), skip_nonfinite=skips)
        fill(optimizer, p, 8)
        before = window_of(optimizer).clone()
        assert step_with_norm(optimizer, p, norm) == skips
        assert_same_bits(window_of(optimizer), before)
        assert bool(p.isfinite().all()) == skips


def test_steps_without_gradients_enter_nothing() -> None:
    p, optimizer = make(SHORT)
    fill(optimizer, p, 8)
    before = window_of(optimizer).clone()
    optimizer.zero_grad()
    optimizer.step()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(window_of(optimizer), before)
    assert optimizer.skipped_steps == 0


# ---- bits ----------------------------------------------------------------------------------------


def windows(steps: int = 12, numel: int = 70_000) -> list[Tensor]:
    params = [Parameter(values((n,), n, torch.float32)) for n in (numel, 5, 4097)]
    optimizer = fusedopt.AdamW(params, skip_spikes=Spikes(window=8, warmup=3))
    found = []
    for step in range(steps):
        set_gradients(params, step)
        if step in (6, 7, 10):
            for p in params:
                p.grad = None if p.grad is None else p.grad * 50
        optimizer.step()
        found.append(window_of(optimizer).cpu().clone())
    assert optimizer.skipped_steps == 3
    return [*found, *(p.detach().cpu() for p in params)]


@each_isa
def test_same_bits_on_every_instruction_set_and_a_device(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = windows()
    monkeypatch.setattr(_engine, "engine", ENGINES[isa])
    for actual, want in zip(windows(), expected, strict=True):
        assert_same_bits(actual, want)


def test_same_bits_for_any_number_of_threads_and_way_of_reading() -> None:
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(windows())
    finally:
        torch.set_num_threads(before)
    with slow_gather():
        runs.append(windows())
    for run in runs[1:]:
        for actual, want in zip(run, runs[0], strict=True):
            assert_same_bits(actual, want)


# ---- what becomes of the step --------------------------------------------------------------------


@each_optimizer
def test_a_skipped_step_changes_nothing(config: Config) -> None:
    params, clean_params = parameters(), parameters()
    optimizer = config.cls(params, skip_spikes=SHORT, **config.kwargs)
    clean = config.cls(clean_params, **config.kwargs)
    for step in range(10):
        set_gradients(params, step)
        if step in (5, 6, 9):
            for p in params:
                assert p.grad is not None
                p.grad *= 100
            versions = [p._version for p in params]
            optimizer.step()
            assert [p._version for p in params] == versions or _engine.engine.emulated
            assert optimizer.grad_norm > 100
            continue
        optimizer.step()
        set_gradients(clean_params, step)
        clean.step()
    assert optimizer.skipped_steps == 3
    optimizer.state[params[0]].pop("window")
    assert_same_state(optimizer, clean, lambda a, b: assert_same_bits(a.cpu(), b.cpu()))


@pytest.mark.parametrize("max_norm", [None, 1e6, 0.01])
@each_optimizer
def test_a_clipped_spike_is_clipped_to_the_limit(config: Config, max_norm: float | None) -> None:
    spikes = Spikes(window=8, warmup=4, action="clip")
    params, clean_params = parameters(), parameters()
    optimizer = config.cls(params, skip_spikes=spikes, max_grad_norm=max_norm, **config.kwargs)
    clean = config.cls(clean_params, max_grad_norm=math.inf, **config.kwargs)
    watch = _spikes.watch(spikes, _spikes.zeros(spikes, torch.device("cpu")))
    clipped = 0
    for step in range(10):
        set_gradients(params, step)
        set_gradients(clean_params, step)
        for p in [*params, *clean_params]:
            assert p.grad is not None
            p.grad *= 100 if step in (5, 6, 9) else 1
        gradients = [p.grad.clone() for p in params if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        judgement = _spikes.judge(watch, watch.norms.tolist(), norm)
        _spikes.remember(watch, judgement)
        clipped += judgement.is_spike
        limit = judgement.limit if judgement.is_spike else math.inf
        clean.max_grad_norm = min(limit, math.inf if max_norm is None else max_norm)
        optimizer.step()
        clean.step()
        for p, gradient in zip(params, gradients, strict=True):
            assert p.grad is not None
            assert_same_bits(p.grad, gradient)
    assert clipped == 3
    assert optimizer.skipped_steps == 0
    optimizer.state[params[0]].pop("window")
    assert_same_state(optimizer, clean, _nearly)


def _nearly(a: Tensor, b: Tensor) -> None:
    # (The limit here is of norms that torch has added up, in another order.)
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-9, atol=1e-12)


def test_without_the_option_nothing_is_kept() -> None:
    p, optimizer = make(False)
    assert not step_with_norm(optimizer, p, 1.0)
    assert "window" not in optimizer.state[p]
    assert optimizer.grad_norm is None
    assert "skip_spikes" not in optimizer.defaults


def test_the_norm_is_there_to_be_read() -> None:
    p, optimizer = make(True)
    step_with_norm(optimizer, p, 3.0)
    assert optimizer.grad_norm == 3.0


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": 0}, "Invalid sigmas: 0, expected a number above 0; inf for the threshold"),
        ({"sigmas": math.nan}, "Invalid sigmas: nan, expected"),
        ({"window": 1}, "Invalid window: 1, expected an integer, 2 or more"),
        ({"window": 8.0}, "Invalid window: 8.0, expected an integer, 2 or more"),
        ({"warmup": 1}, "Invalid warmup: 1, expected an integer from 2 to window=128, or None"),
        ({"warmup": 9, "window": 8}, "Invalid warmup: 9, expected an integer from 2 to window=8"),
        ({"patience": 0}, "Invalid patience: 0, expected an integer, 1 or more"),
        ({"threshold": 0.0}, "Invalid threshold: 0.0, expected a norm above 0, or None"),
        ({"threshold": True}, "Invalid threshold: True, expected a norm above 0"),
        ({"action": "stop"}, 'Invalid action: \'stop\', expected one of "skip" and "clip"'),
    ],
)
def test_bad_spikes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Spikes(**arguments)


@pytest.mark.parametrize("value", [6.0, "yes", None, {"sigmas": 6}])
def test_bad_arguments_are_refused(value: Any) -> None:
    p = Parameter(torch.ones(3))
    message = r"Invalid skip_spikes: .*, expected False, True, or a fusedopt.Spikes; for a fixed"
    with pytest.raises(ValueError, match=message):
        fusedopt.SGD([p], lr=0.1, skip_spikes=value)
    with pytest.raises(ValueError, match=message):
        fusedopt.SGD.from_torch(torch.optim.SGD([p], lr=0.1), skip_spikes=value)
    optimizer = fusedopt.SGD([p], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.skip_spikes = value
    assert optimizer.skip_spikes is False
