"""What torch, and the libraries on it, expect of any optimizer, of those with matrices as well."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    set_gradients,
    train,
    values,
)
from tests.muon.common import matrices

OPTION_NAMES = (
    *("max_grad_norm", "skip_nonfinite", "skip_spikes", "amp_scaling"),
    *("state_dtype", "master_weights", "stochastic_rounding", "seed"),
)


def both_kinds(params: list[Parameter], **kwargs: Any) -> Any:
    groups = [
        {"params": params[:5], "use_muon": True},
        {"params": params[5:], "use_muon": False},
    ]
    return fusedopt.MuonWithAuxAdam(groups, **kwargs)


MAKERS: dict[str, Callable[..., Any]] = {"Muon": fusedopt.Muon, "MuonWithAuxAdam": both_kinds}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def test_arguments_are_torchs_and_options() -> None:
    of_torch = inspect.signature(torch.optim.Muon).parameters
    ours = inspect.signature(fusedopt.Muon).parameters
    added = ("ns_dtype", *OPTION_NAMES)
    assert [name for name in ours if name not in added] == list(of_torch)
    assert list(ours)[len(of_torch) :] == list(added)
    for name in of_torch:
        assert ours[name].kind == of_torch[name].kind
        assert ours[name].default == of_torch[name].default
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in added)


def test_group_and_state_keys_are_torchs() -> None:
    made = [cls(matrices()) for cls in (fusedopt.Muon, torch.optim.Muon)]
    first, second = ({**opt.param_groups[0], "params": 0} for opt in made)
    assert first == second
    assert isinstance(made[0], torch.optim.Muon)
    assert made[0].defaults == made[1].defaults


def test_the_name_of_torch_means_fusedopt_inside() -> None:
    torchs = torch.optim.Muon
    with fusedopt.as_torch_optim():
        assert torch.optim.Muon is fusedopt.Muon
        optimizers = [make(matrices()) for make in (torch.optim.Muon, both_kinds)]
        for optimizer in optimizers:
            train(optimizer, [p for g in optimizer.param_groups for p in g["params"]], 1)
    assert torch.optim.Muon is torchs


@each_maker
def test_a_parameter_without_a_gradient_is_left_alone(make: Any) -> None:
    params = matrices()
    optimizer = make(params)
    set_gradients(params, 0)
    params[0].grad = params[-1].grad = None
    optimizer.step()
    assert params[0] not in optimizer.state
    assert_same_bits(params[0].detach(), matrices()[0].detach())
    set_gradients(params, 1)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[params[0]]


@each_maker
def test_without_any_gradient_nothing_happens(make: Any) -> None:
    params = matrices()
    optimizer = make(params, max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    assert not optimizer.state
    assert float(optimizer.grad_norm) == 0


@each_maker
def test_a_closure_is_called_once_with_gradients_enabled(make: Any) -> None:
    params = matrices()
    optimizer = make(params)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = torch.stack([(p * p).sum() for p in params]).sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    before = sum(float((p * p).sum().detach()) for p in params)
    assert optimizer.step(closure) == pytest.approx(before)
    assert calls == [True]


@each_maker
def test_hooks_fire_once(make: Any) -> None:
    params = matrices()
    optimizer = make(params)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    train(optimizer, params, 1)
    assert fired == ["pre", "post"]


@each_maker
def test_lr_of_zero_makes_state_and_moves_nothing(make: Any) -> None:
    params = matrices()
    optimizer = make(params, lr=0.0)
    train(optimizer, params, 2)
    for p, q in zip(params, matrices(), strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert optimizer.state[p]


@each_maker
def test_a_tensor_lr_and_schedulers_change_what_the_next_step_does(make: Any) -> None:
    params, others = matrices(), matrices()
    lr = torch.tensor(0.1, dtype=torch.float64)
    with_tensor, with_number = make(params, lr=lr), make(others, lr=0.1)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        with_tensor.step()
        with_number.step()
        lr.mul_(0.5)
        for group in with_number.param_groups:
            group["lr"] *= 0.5
    assert_same_state(with_tensor, with_number, assert_same_bits)


@each_maker
def test_parameters_and_states_may_be_replaced_between_steps(make: Any) -> None:
    params, plain = matrices(), matrices()
    replaced, same = make(params), make(plain)
    for step in range(3):
        for p in params:
            p.data = p.data.clone()
            for key, value in replaced.state.get(p, {}).items():
                replaced.state[p][key] = value.clone()
        set_gradients(params, step)
        set_gradients(plain, step)
        replaced.step()
        same.step()
    assert_same_state(replaced, same, assert_same_bits)


@each_maker
def test_autograd_learns_that_parameters_have_changed(make: Any) -> None:
    params = matrices()
    optimizer = make(params)
    loss = torch.stack([(p * p).sum() for p in params]).sum()
    set_gradients(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda opt, p: setattr(p, "data", torch.ones(6, 4).double()), "grad of params"),
        (
            lambda opt, p: opt.state[p].update(momentum_buffer=torch.ones(2, 2)),
            "momentum_buffer of",
        ),
        (lambda opt, p: opt.state[p].update(momentum_buffer=[0.0]), "momentum_buffer of"),
    ],
    ids=["shape", "state", "no tensor"],
)
@each_maker
def test_what_is_refused_is_refused_before_anything_changes(
    make: Any, damage: Any, message: str
) -> None:
    params = matrices()
    optimizer = make(params)
    train(optimizer, params, 1)
    set_gradients(params, 1)
    damage(optimizer, params[3])
    kept = [p.detach().clone() for p in params]
    buffer = optimizer.state[params[0]]["momentum_buffer"].clone()
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.step()
    for p, q in zip(params, kept, strict=True):
        assert_same_bits(p.detach(), q)
    assert_same_bits(optimizer.state[params[0]]["momentum_buffer"], buffer)


@pytest.mark.cpu_only("torch's threads")
@each_maker
def test_two_threads_give_what_one_does(make: Any) -> None:
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        params = [Parameter(values((64, 96), seed)) for seed in range(7)]
        optimizer = make(params)
        train(optimizer, params, 2)
        torch.set_num_threads(before)
        found.append(optimizer)
    assert_same_state(found[0], found[1], assert_within)


@each_maker
def test_sparse_gradients_are_refused_as_by_torch(make: Any) -> None:
    params = matrices()
    optimizer = make(params)
    set_gradients(params, 0)
    params[1].grad = torch.eye(5).double().to_sparse()
    kept = [p.detach().clone() for p in params]
    with (
        pytest.raises(RuntimeError, match="Muon does not support sparse gradients"),
        pytest.warns(UserWarning, match="no kernel for sparse gradients"),
    ):
        optimizer.step()
    for p, q in zip(params, kept, strict=True):
        assert_same_bits(p.detach(), q)
    assert not optimizer.state
