"""The state of a parameter: keys, values, dtypes, strides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    each_config,
    each_layout,
    oracle,
    parameters,
    set_gradients,
    train,
    values,
)
from tests.registry import LAYOUTS, Config


@each_config
def test_state_is_torchs(config: Config) -> None:
    """The same keys in it, for the same parameters, of the same shapes, dtypes and strides."""
    params, torch_params = parameters(), parameters()
    optimizer = config.cls(params, **config.kwargs)
    expected = oracle(config)(torch_params, **config.kwargs)
    train(optimizer, params, 1)
    train(expected, torch_params, 1)

    def same_kind(a: Tensor, b: Tensor) -> None:
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert (a.device, a.requires_grad) == (b.device, b.requires_grad)

    assert_same_state(optimizer, expected, same_kind)


def test_first_momentum_is_the_gradient_without_dampening_for_each_parameter() -> None:
    early, late = parameters([(4,), (4,)])
    optimizer = fusedopt.SGD([early, late], lr=0.1, momentum=0.9, dampening=0.5)
    for first, step in ((early, 0), (late, 1)):
        set_gradients([early, late] if first is late else [early], step)
        optimizer.step()
        assert first.grad is not None
        assert_same_bits(optimizer.state[first]["momentum_buffer"], first.grad)
    assert early.grad is not None
    assert not torch.equal(optimizer.state[early]["momentum_buffer"], early.grad)


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(3, id="int"),
        pytest.param(3.0, id="float"),
        pytest.param(torch.tensor(3), id="int64"),
        pytest.param(torch.tensor(3.0, dtype=torch.float64), id="float64"),
        pytest.param(torch.tensor([3.0]), id="shape-1"),
    ],
)
def test_step_is_read_in_every_form(stored: Any) -> None:
    def continued(step: Any) -> tuple[Parameter, Any]:
        (p,) = parameters([(4,)])
        optimizer = fusedopt.Adam([p])
        train(optimizer, [p], 3)
        optimizer.state[p]["step"] = copy.deepcopy(step)
        train(optimizer, [p], range(3, 5))
        return p, optimizer.state[p]["step"]

    (p, step), (expected, _) = continued(stored), continued(torch.tensor(3.0))
    assert_same_bits(p.detach(), expected.detach())
    assert type(step) is type(stored)
    assert step == 5


def test_adagrad_accumulates_from_the_initial_value() -> None:
    """Also for a parameter that is added later, and where the state was deleted."""
    first, later = parameters([(4,), (4,)])
    optimizer = fusedopt.Adagrad([first], initial_accumulator_value=0.5, lr_decay=0.1)
    assert (optimizer.state[first]["sum"] == 0.5).all()
    optimizer.add_param_group({"params": [later]})
    del optimizer.state[first]
    train(optimizer, [first, later], 1)
    for p in (first, later):
        assert p.grad is not None
        assert_same_bits(optimizer.state[p]["sum"], 0.5 + p.grad * p.grad)
        assert optimizer.state[p]["step"] == 1


def test_adagrads_sums_can_be_shared_with_other_processes() -> None:
    params, alone = parameters(), parameters()
    optimizer, expected = fusedopt.Adagrad(params), fusedopt.Adagrad(alone)
    optimizer.share_memory()
    assert all(state["sum"].is_shared() for state in optimizer.state.values())
    train(optimizer, params, 2)
    train(expected, alone, 2)
    assert all(state["sum"].is_shared() for state in optimizer.state.values())
    assert_same_state(optimizer, expected, assert_same_bits)


@each_layout
@each_config
def test_buffers_have_the_strides_of_zeros_like(config: Config, layout: str) -> None:
    p = Parameter(LAYOUTS[layout](values((2, 3, 4, 5), 1)))
    optimizer = config.cls([p], **config.kwargs)
    train(optimizer, [p], 1)
    expected = torch.zeros_like(p, memory_format=torch.preserve_format).stride()
    buffers = {key: value for key, value in optimizer.state[p].items() if key != "step"}
    assert all(buffer.stride() == expected for buffer in buffers.values())


@pytest.mark.cpu_only("torch steps float64 states of others on devices")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each_config
def test_states_of_another_dtype_are_used_as_they_are(config: Config, dtype: torch.dtype) -> None:
    """One step from moments of another dtype is one from float32 moments, and then rounded."""
    params, same_dtype = (parameters([(40,)], torch.float32) for _ in range(2))
    optimizer = config.cls(params, **config.kwargs)
    expected = config.cls(same_dtype, **config.kwargs)
    train(optimizer, params, 2)
    train(expected, same_dtype, 2)
    stored = {k: v.to(dtype) for k, v in optimizer.state[params[0]].items() if k != "step"}
    optimizer.state[params[0]].update(stored)
    expected.state[same_dtype[0]].update({k: v.float() for k, v in stored.items()})
    train(optimizer, params, range(2, 3))
    train(expected, same_dtype, range(2, 3))
    assert_same_bits(params[0].detach(), same_dtype[0].detach())
    for key, value in stored.items():
        assert optimizer.state[params[0]][key] is value
        assert_same_bits(value, expected.state[same_dtype[0]][key].to(dtype))


@each_config
def test_parameters_without_a_gradient_are_left_alone(config: Config) -> None:
    used, unused = parameters([(4,), (4,)])
    before = unused.detach().clone()
    optimizer = config.cls([used, unused], **config.kwargs)
    made = copy.deepcopy(optimizer.state.get(unused, {}))
    assert set(made) == ({"step", "sum"} if config.name == "Adagrad" else set())
    train(optimizer, [used], 3)
    assert set(optimizer.state.get(unused, {})) == set(made)
    for key, value in made.items():
        assert_same_bits(optimizer.state[unused][key], value)
    assert_same_bits(unused.detach(), before)
    train(optimizer, [used, unused], 1)
    state = copy.deepcopy(optimizer.state.get(unused, {}))
    moved = unused.detach().clone()
    unused.grad = None
    optimizer.step()
    assert_same_bits(unused.detach(), moved)
    for key, value in state.items():
        assert_same_bits(optimizer.state[unused][key], value)


@each_config
def test_a_late_gradient_starts_at_step_1(config: Config) -> None:
    late, alone, other = (Parameter(values((4,), 1)) for _ in range(3))
    optimizer = config.cls([other, late], **config.kwargs)
    train(optimizer, [other], 3)
    fresh = config.cls([alone], **config.kwargs)
    late.grad = alone.grad = values((4,), 7)
    optimizer.step()
    fresh.step()
    assert_same_bits(late.detach(), alone.detach())
    for key, value in fresh.state[alone].items():
        assert_same_bits(optimizer.state[late][key], value)
