"""Spikes beside clips, scalers, Lookahead, and parameters without a kernel."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

import fusedopt
from fusedopt import Spikes, _engine
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    parameters,
    set_gradients,
    squares,
    train,
)

SPIKES = Spikes(window=8, warmup=4, patience=3)
CLIPS = Spikes(window=8, warmup=4, action="clip")


def scale_gradients(params: list[Parameter], factor: float) -> None:
    for p in params:
        assert p.grad is not None
        p.grad *= factor


def entries(optimizer: Any) -> list[float]:
    """Return the norms in the window, the oldest first, as long as it is not full."""
    (window,) = [state["window"] for state in optimizer.state.values() if "window" in state]
    found: list[float] = window.tolist()
    return found[: int(found[-2])]


# ---- clips that wait -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf, 3.0])
def test_after_a_clip_its_norm_is_what_counts(norm_type: float) -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES)
    norms = []
    for step in range(8):
        set_gradients(params, step)
        if step == 6:
            scale_gradients(params, 100)
        norms.append(float(optimizer.clip_grad_norm_(0.01, norm_type)))
        optimizer.step()
        assert optimizer.grad_norm == norms[-1]
    assert optimizer.skipped_steps == 1  # though all were clipped to the same norm
    expected = [norm for step, norm in enumerate(norms) if step != 6]
    assert entries(optimizer) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("spikes", [SPIKES, CLIPS])
def test_a_norm_from_elsewhere_decides(spikes: Spikes) -> None:
    """As where ranks have a part of the gradients each."""
    params = parameters()
    optimizer = fusedopt.SGD(params, lr=1.0, skip_spikes=spikes)
    for step in range(7):
        set_gradients(params, step)
        before = params[1].detach().clone()
        optimizer.clip_grads_with_norm_(math.inf, 3.0 if step != 6 else 50.0)
        optimizer.step()
    assert params[1].grad is not None
    if spikes is SPIKES:
        assert entries(optimizer) == [3.0] * 6
        assert optimizer.skipped_steps == 1
        assert_same_bits(params[1].detach(), before)
    else:
        limit = 3 + 6 * 0.03
        assert entries(optimizer) == pytest.approx([3.0] * 6 + [limit])
        moved = before - params[1].detach()
        torch.testing.assert_close(moved, params[1].grad * (limit / 50), rtol=1e-6, atol=1e-12)


def test_a_clip_and_max_grad_norm_clip_both() -> None:
    params, clean_params = parameters(), parameters()
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=0.5, skip_spikes=SPIKES)
    clean = fusedopt.SGD(clean_params, lr=1.0, max_grad_norm=0.5)
    for step in range(6):
        for each, of_each in ((optimizer, params), (clean, clean_params)):
            set_gradients(of_each, step)
            each.clip_grad_norm_(2.0)
            each.step()
    assert len(entries(optimizer)) == 6
    optimizer.state[params[0]].clear()
    clean.state.setdefault(clean_params[0], {})
    for p, q in zip(params, clean_params, strict=True):
        assert_same_bits(p.detach(), q.detach())


# ---- scalers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "amp_scaling", "fusedopt"])
def test_the_norm_is_that_of_unscaled_gradients(kind: str) -> None:
    """A spike is no overflow: the scale stays."""
    device = torch.get_default_device().type
    params, clean_params = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES, amp_scaling=kind == "amp_scaling")
    clean = fusedopt.AdamW(clean_params, skip_spikes=SPIKES)
    scalers = fusedopt.GradScaler if kind == "fusedopt" else torch.amp.GradScaler
    scaler = scalers(device, init_scale=2.0**10, growth_interval=4)
    scales = []
    for step in range(9):
        factor = 30.0 if step == 6 else 1 + step / 100
        optimizer.zero_grad()
        clean.zero_grad()
        scaler.scale(squares(params, factor)).backward()  # type: ignore[no-untyped-call]
        squares(clean_params, factor).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        clean.step()
        scales.append(scaler.get_scale())
    assert optimizer.skipped_steps == clean.skipped_steps == 1
    assert scales == [1024.0] * 3 + [2048.0] * 4 + [4096.0] * 2
    assert_same_state(optimizer, clean, assert_same_bits)


@pytest.mark.parametrize("kind", ["torch", "amp_scaling", "fusedopt"])
def test_a_step_that_a_scaler_skips_enters_nothing(kind: str) -> None:
    device = torch.get_default_device().type
    params = parameters(dtype=torch.float32)
    optimizer = fusedopt.AdamW(params, skip_spikes=SPIKES, amp_scaling=kind == "amp_scaling")
    scalers = fusedopt.GradScaler if kind == "fusedopt" else torch.amp.GradScaler
    scaler = scalers(device, init_scale=4.0)
    for step in range(6):
        optimizer.zero_grad()
        factor = math.inf if step == 5 else 1.0
        scaler.scale(squares(params, factor)).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0
    assert len(entries(optimizer)) == 5


# ---- Lookahead, released gradients ---------------------------------------------------------------


def test_a_spike_does_not_count_for_lookahead() -> None:
    params, clean_params = parameters(), parameters()
    optimizer = fusedopt.Lookahead(fusedopt.AdamW(params, skip_spikes=SPIKES), k=3)
    clean = fusedopt.Lookahead(fusedopt.AdamW(clean_params), k=3)
    for step in range(10):
        set_gradients(params, step)
        if step in (5, 8):
            scale_gradients(params, 100)
            optimizer.step()
            continue
        optimizer.step()
        set_gradients(clean_params, step)
        clean.step()
    assert optimizer.skipped_steps == 2
    assert [g["lookahead_step"] for g in optimizer.param_groups] == [8 % 3]
    assert optimizer.state[params[0]].pop("window")[-2] == 8
    assert_same_state(optimizer, clean, assert_same_bits)


def test_released_gradients_are_refused() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1, skip_spikes=True)
    with pytest.raises(RuntimeError, match="max_grad_norm, skip_nonfinite, skip_spikes"):
        fusedopt.release_gradients(model, optimizer)
    optimizer.skip_spikes = False
    with fusedopt.release_gradients(model, optimizer):
        optimizer.skip_spikes = True
        with pytest.raises(RuntimeError, match="skip_spikes"):
            model(torch.ones(2, 3)).sum().backward()


# ---- without a kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize("spikes", [SPIKES, CLIPS])
@pytest.mark.parametrize("alone", [False, True])
def test_parameters_without_a_kernel_are_judged_with_the_others(
    alone: bool, spikes: Spikes
) -> None:
    """A sparse one, which torch steps."""

    def run(*, sparse: bool) -> tuple[Any, list[Parameter]]:
        params = parameters([(4, 2)] if alone else [(4, 2), (5,)])
        optimizer = fusedopt.SGD(params, lr=0.1, skip_spikes=spikes)
        for step in range(8):
            set_gradients(params, step)
            scale_gradients(params, 100 if step == 6 else 1)
            if sparse:
                assert params[0].grad is not None
                params[0].grad = params[0].grad.to_sparse()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                optimizer.step()
        return optimizer, params

    optimizer, params = run(sparse=True)
    expected, expected_params = run(sparse=False)
    assert optimizer.skipped_steps == expected.skipped_steps == (spikes is SPIKES)
    assert entries(optimizer) == pytest.approx(entries(expected), rel=1e-12)
    for p, q in zip(params, expected_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spikes", [SPIKES, CLIPS])
def test_steps_of_torchs_operators_decide_alike(spikes: Spikes) -> None:
    params, expected_params = parameters(), parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=spikes, max_grad_norm=5.0)
    expected = fusedopt.AdamW(expected_params, skip_spikes=spikes, max_grad_norm=5.0)
    for step in range(10):
        for each, of_each in ((optimizer, params), (expected, expected_params)):
            set_gradients(of_each, step)
            scale_gradients(of_each, 100 if step in (5, 8) else 1)
            if each is optimizer and step % 2:
                with FlopCounterMode(display=False):
                    each.step()
            else:
                each.step()
    assert optimizer.skipped_steps == expected.skipped_steps == 2 * (spikes is SPIKES)
    assert entries(optimizer) == pytest.approx(entries(expected), rel=1e-12)
    for p, q in zip(params, expected_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_graph_of_a_step_is_refused() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    params = parameters()
    optimizer = fusedopt.SGD(params, lr=0.1, skip_spikes=True)
    train(optimizer, params, 1)

    def step(gradient: torch.Tensor) -> torch.Tensor:
        params[0].grad = gradient
        optimizer.step()
        return params[0].detach()

    with pytest.raises(RuntimeError, match="skip_spikes=False"):
        make_fx(step)(torch.ones(5, dtype=torch.float64))


def test_parameters_without_values_take_steps() -> None:
    p = Parameter(torch.ones(3, device="meta"))
    optimizer = fusedopt.SGD([p], lr=0.1, skip_spikes=True)
    p.grad = torch.ones(3, device="meta")
    optimizer.step()
    assert optimizer.skipped_steps == 0


# ---- matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spikes", [SPIKES, CLIPS])
@pytest.mark.parametrize("twice", [False, True])
def test_muon_skips_and_clips(twice: bool, spikes: Spikes) -> None:
    """Without momentum a clip cannot be seen in orthogonal matrices: with it, in the mixture."""
    params, clean_params = parameters([(4, 6)]), parameters([(4, 6)])
    arguments: dict[str, Any] = {"lr": 0.1, "nesterov": True}
    listed = [params, clean_params]
    if twice:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = [[params[0], params[0]], [clean_params[0], clean_params[0]]]
            optimizer = fusedopt.Muon(groups[0], skip_spikes=spikes, **arguments)
            clean = fusedopt.Muon(groups[1], max_grad_norm=math.inf, **arguments)
    else:
        optimizer = fusedopt.Muon(params, skip_spikes=spikes, **arguments)
        clean = fusedopt.Muon(clean_params, max_grad_norm=math.inf, **arguments)
    for step in range(8):
        spiky = step == 6
        for of_each in listed:
            set_gradients(of_each, step)
            scale_gradients(of_each, 50 if spiky else 1)
        optimizer.step()
        if spiky and spikes is CLIPS:
            clean.max_grad_norm = entries(optimizer)[6]
        if not spiky or spikes is CLIPS:
            clean.step()
        clean.max_grad_norm = math.inf
    assert optimizer.skipped_steps == (spikes is SPIKES)
    torch.testing.assert_close(params[0], clean_params[0], rtol=1e-9, atol=1e-9)


def test_a_first_step_beyond_the_threshold_makes_no_state() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params, skip_spikes=Spikes(threshold=1e-3))
    train(optimizer, params, 1)
    assert optimizer.skipped_steps == 1
    assert not optimizer.state or _engine.engine.emulated
    assert not any("window" in s and s["window"].any() for s in optimizer.state.values())
