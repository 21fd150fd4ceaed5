"""Memory modes where kernels lack them: torch's own implementation steps float32 stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import _codecs
from fusedopt._storage import code_of
from tests.registry import PLAIN_CONFIGS, Config
from tests.test_memory_modes import MODES, numbers_of, parameters, set_gradients

SHAPES = [(64, 96), (130,), (70, 67)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [c for c in PLAIN_CONFIGS if c.torch_cls], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:fusedopt.* has no kernel for:UserWarning")
def test_a_first_step_is_torchs_and_then_stored(
    config: Config, mode: str, dtype: torch.dtype
) -> None:
    params, theirs = parameters(dtype, SHAPES), parameters(torch.float32, SHAPES)
    optimizer = config.cls(params, **config.kwargs, **MODES[mode])
    if not any(optimizer._modes()):
        pytest.skip("a device's kernels have this mode")
    torchs = config.torch_cls(theirs, **config.kwargs)
    set_gradients(params, 0)
    for p, q in zip(params, theirs, strict=True):
        assert p.grad is not None
        q.grad = p.grad.float()
    optimizer.step()
    torchs.step()
    for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
        master = q.detach()
        u = _codecs.random_bits(_codecs.rounding_key(optimizer.seed, i) << 32, p.shape)
        if optimizer.master_weights:
            assert torch.equal(optimizer._master(p), master)
        elif optimizer.stochastic_rounding:
            rounded = _codecs.round_at_random(master, dtype, _codecs.for_parameter(u))
            assert torch.equal(p.detach(), rounded)
        else:
            assert torch.equal(p.detach(), master.to(dtype))
        for name in optimizer._rule(optimizer.param_groups[0]).states:
            expected = torchs.state[q][name]
            if optimizer.state[p][name].dtype == torch.uint8:
                code = code_of(name)
                bits = _codecs.for_signed(u) if code.signed else _codecs.for_unsigned(u)
                expected = _codecs.decode(*_codecs.encode(expected, bits, code), code)
            stored = numbers_of(optimizer.state[p], name)
            assert torch.equal(stored, expected.to(stored.dtype)), name


def test_it_is_said_once_why() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params, master_weights=True)
    set_gradients(params, 0)
    with pytest.warns(UserWarning, match="master weights, random rounding or 8-bit states on"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:fusedopt.* has no kernel for:UserWarning")
def test_masters_are_kept_and_the_random_bits_go_on() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params, master_weights=True, state_dtype="mxfp8")
    start = [optimizer._master(p).clone() for p in params]
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    state: dict[str, Tensor] = optimizer.state[params[0]]
    assert set(state) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "remainder",
        "exp_avg_scale",
        "exp_avg_sq_scale",
        "rounding",
    }
    assert int(state["rounding"]) & 0xFFFFFFFF == 2
    assert int(state["step"]) == 2
    assert all(
        ((optimizer._master(p) - s).abs() > 1e-5).any() for p, s in zip(params, start, strict=True)
    )


@pytest.mark.filterwarnings("ignore:fusedopt.* has no kernel for:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lookahead_moves_masters_to_the_slow_weights(dtype: torch.dtype) -> None:
    params = parameters(dtype, SHAPES)
    options: dict[str, Any] = {"master_weights": True, "state_dtype": torch.float32}
    optimizer = fusedopt.Lookahead(fusedopt.AdamW(params, **options), k=2)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    for p in params:
        assert optimizer.state[p]["slow"].dtype == torch.float32
        assert torch.equal(optimizer._master(p), optimizer.state[p]["slow"])
