"""MuonWithAuxAdam: the steps of Muon and of AdamW, clipped, skipped and counted together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from tests.helpers import (
    all_params,
    assert_same_bits,
    assert_same_state,
    assert_within,
    set_gradients,
    train,
    values,
)
from tests.muon.common import Sees, matrices
from tests.muon.oracle import TorchMuon

OTHER_SHAPES: list[tuple[int, ...]] = [(5,), (), (3, 4), (0, 3), (2, 3, 4)]
MUON: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.9}
ADAMW: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01}


def others(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(values(shape, 50 + i, dtype)) for i, shape in enumerate(OTHER_SHAPES)]


def make(dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    return fusedopt.MuonWithAuxAdam(
        [
            {"params": matrices(dtype), "use_muon": True, "adjust_lr_fn": None, **MUON},
            {"params": others(dtype), "use_muon": False, **ADAMW},
        ],
        **kwargs,
    )


class Pair:
    """Torch's Muon, in float64, and torch's AdamW, side by side."""

    def __init__(self) -> None:
        self.params = [*matrices(), *others()]
        split = len(matrices())
        self.muon = TorchMuon(self.params[:split], **MUON)
        self.adamw = torch.optim.AdamW(self.params[split:], foreach=False, **ADAMW)

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def assert_is(self, optimizer: Optimizer) -> None:
        for p, q in zip(all_params(optimizer), self.params, strict=True):
            assert_within(p.detach(), q.detach())
            state = {**self.muon.state, **self.adamw.state}[q]
            assert set(optimizer.state[p]) == set(state)
            for key, value in state.items():
                assert_within(optimizer.state[p][key], value)


def test_float64_equals_torchs_two() -> None:
    optimizer, pair = make(), Pair()
    for step in range(5):
        set_gradients(all_params(optimizer), step)
        set_gradients(pair.params, step)
        optimizer.step()
        pair.step()
    pair.assert_is(optimizer)


@pytest.mark.parametrize("how", ["inside", "method"])
def test_one_norm_clips_all_groups(how: str) -> None:
    optimizer, pair = make(max_grad_norm=0.1 if how == "inside" else None), Pair()
    for step in range(3):
        set_gradients(all_params(optimizer), step)
        set_gradients(pair.params, step)
        norm = torch.nn.utils.clip_grad_norm_(pair.params, 0.1)
        if how == "method":
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        pair.step()
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    pair.assert_is(optimizer)


@pytest.mark.parametrize("where", [0, -1], ids=["of a matrix", "of another"])
def test_one_infinite_gradient_skips_all_groups(where: int) -> None:
    optimizer = make(skip_nonfinite=True)
    params = all_params(optimizer)
    train(optimizer, params, 1)
    before = copy.deepcopy((params, optimizer))
    set_gradients(params, 1)
    gradient = params[where].grad
    assert gradient is not None
    gradient.view(-1)[0] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same_state(optimizer, before[1], assert_same_bits)


@pytest.mark.parametrize("amp_scaling", [False, True])
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fusedopt.GradScaler])
def test_gradient_scalers(scaler_class: Any, amp_scaling: bool) -> None:
    plain = make(torch.float32)
    scaled = make(torch.float32, amp_scaling=amp_scaling)
    scaler = scaler_class("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        set_gradients(all_params(plain), step)
        set_gradients(all_params(scaled), step)
        scaler.scale(torch.ones(()))
        for p in all_params(scaled):
            assert p.grad is not None
            p.grad.mul_(1024)
        if step == 2:
            first = next(iter(all_params(scaled))).grad
            assert first is not None
            first.view(-1)[0] = torch.inf
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
        if step == 2:
            scaler.update(1024.0)
    assert_same_state(scaled, plain, assert_same_bits)


def test_it_is_muon_for_some_and_adamw_for_the_others_bit_for_bit() -> None:
    both = make(torch.float32)
    muon = fusedopt.Muon(matrices(torch.float32), **MUON)
    adamw = fusedopt.AdamW(others(torch.float32), **ADAMW)
    params = [*all_params(muon), *all_params(adamw)]
    for step in range(4):
        set_gradients(all_params(both), step)
        set_gradients(params, step)
        for optimizer in (both, muon, adamw):
            optimizer.step()
    for p, q in zip(all_params(both), params, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_both_kinds_may_have_any_dtype_and_masters() -> None:
    optimizer = make(torch.bfloat16, master_weights=True, state_dtype=torch.float32)
    train(optimizer, all_params(optimizer), 3)
    for p in all_params(optimizer):
        assert optimizer.state[p]["remainder"].dtype == torch.int16


def test_all_groups_have_the_same_keys_and_schedulers_see_one_optimizer() -> None:
    optimizer = make()
    first, second = optimizer.param_groups
    assert set(first) == set(second)
    assert (first["eps"], second["eps"]) == (1e-7, 1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=5)
    for step in range(4):
        set_gradients(all_params(optimizer), step)
        optimizer.step()
        schedule.step()


def test_eps_is_each_kinds_own_unless_it_is_given() -> None:
    groups: list[dict[str, Any]] = [
        {"params": matrices(), "use_muon": True},
        {"params": others(), "use_muon": False},
    ]
    optimizer = fusedopt.MuonWithAuxAdam(copy.deepcopy(groups))
    assert [group["eps"] for group in optimizer.param_groups] == [1e-7, 1e-8]
    optimizer = fusedopt.MuonWithAuxAdam(copy.deepcopy(groups), eps=1e-5)
    assert [group["eps"] for group in optimizer.param_groups] == [1e-5, 1e-5]


def test_checkpoints_go_on_bit_for_bit() -> None:
    optimizer = make()
    params = all_params(optimizer)
    train(optimizer, params, 2)
    again = make()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(all_params(again), params, strict=True):
        p.data.copy_(q.data)
    train(optimizer, params, range(2, 4))
    train(again, all_params(again), range(2, 4))
    assert_same_state(again, optimizer, assert_same_bits)


@pytest.mark.parametrize("group", [{}, {"use_muon": None}, {"use_muon": 1}])
def test_a_group_has_to_say_who_steps_it(group: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"use_muon=.*muon_groups\(model\)"):
        fusedopt.MuonWithAuxAdam([{"params": matrices(), **group}])
    with pytest.raises(ValueError, match=r"use_muon=.*muon_groups\(model\)"):
        fusedopt.MuonWithAuxAdam(matrices())


def test_muon_has_to_have_matrices() -> None:
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        fusedopt.MuonWithAuxAdam([{"params": others(), "use_muon": True}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ({"momentum": -0.5}, "momentum should be >= 0 but is: -0.5"),
        ({"weight_decay": -0.5}, "weight decay should be >= 0 but is: -0.5"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"adjust_lr_fn": "x"}, "Adjust learning rate function x is not supported"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
    ],
)
def test_arguments_are_checked_as_torchs_two_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (compared as a whole below)
        make(**arguments)
    assert str(raised.value) == message


def test_what_one_kind_refuses_is_refused_before_the_other_is_stepped() -> None:
    optimizer = make()
    params = all_params(optimizer)
    train(optimizer, params, 1)
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    set_gradients(params, 1)
    optimizer.state[params[-1]]["exp_avg"] = torch.ones(7)
    before["state"][len(params) - 1]["exp_avg"] = torch.ones(7)
    with pytest.raises(ValueError, match="exp_avg of params"):
        optimizer.step()
    for p, weight in zip(params, weights, strict=True):
        assert_same_bits(p.detach(), weight)
    for i, state in before["state"].items():
        for key, value in state.items():
            assert_same_bits(optimizer.state[params[i]][key], value)


def test_operators_see_the_step_of_both_kinds() -> None:
    optimizer, plain = make(), make()
    train(plain, all_params(plain), 2)
    with Sees():
        train(optimizer, all_params(optimizer), 2)
    assert_same_state(optimizer, plain, assert_within)


def test_a_checkpoint_of_another_optimizer_is_refused_before_anything_changes() -> None:
    optimizer = make()
    params = all_params(optimizer)
    train(optimizer, params, 1)
    of_adamw = fusedopt.AdamW([{"params": matrices()}, {"params": others()}])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="group 0 of the checkpoint does not say use_muon"):
        optimizer.load_state_dict(of_adamw.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    train(optimizer, params, 1)
