"""Parameters that are listed twice, and counts that are one: as torch's for-loop has them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests.helpers import (
    all_params,
    assert_same_state,
    assert_within,
    each_config,
    oracle,
    set_gradients,
    values,
)
from tests.registry import Config


def make(make_optimizer: Any, config: Config, one_group: bool) -> Any:
    """Return an optimizer of three parameters, of which the second is listed twice."""
    params = [Parameter(values((6,), seed)) for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of the same group
        if one_group:
            return make_optimizer([params[0], params[1], params[2], params[1]], **config.kwargs)
        optimizer = make_optimizer(
            [{"params": params[:2]}, {"params": params[2:]}], **config.kwargs
        )
    optimizer.param_groups[1]["lr"] *= 0.5
    optimizer.param_groups[1]["params"].append(params[1])
    return optimizer


def counts_as_numbers(optimizer: Any) -> None:
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = float(state["step"])


@pytest.mark.parametrize("one_group", [True, False], ids=["one-group", "two-groups"])
@each_config
def test_it_is_stepped_twice_as_by_torch(config: Config, one_group: bool, gather: str) -> None:
    ours = make(config.cls, config, one_group)
    torch_s = make(oracle(config), config, one_group)
    for step in range(4):
        for optimizer in (ours, torch_s):
            set_gradients(list(dict.fromkeys(all_params(optimizer))), step)
            optimizer.step()
        assert_same_state(ours, torch_s, assert_within)


@pytest.mark.cpu_only("devices count in tensors")
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "RAdam", "Adagrad"])
def test_a_plain_number_counts_both_steps_where_a_state_is_missing(name: str) -> None:
    optimizer = make(getattr(fusedopt, name), Config(name, {}), one_group=True)
    p = optimizer.param_groups[0]["params"][1]
    set_gradients(all_params(optimizer), 0)
    optimizer.step()
    counts_as_numbers(optimizer)
    missing = next(key for key in optimizer.state[p] if key != "step")
    del optimizer.state[p][missing]
    optimizer.step()
    assert optimizer.state[p]["step"] == 4.0


@pytest.mark.parametrize("far", [False, True], ids=["neighbours", "apart"])
@pytest.mark.parametrize("name", ["Adam", "RAdam", "Adagrad"])
def test_parameters_with_one_count_are_counted_one_after_the_other(
    name: str, far: bool, gather: str
) -> None:
    """As torch's for-loop counts them: the second finds what the first has counted."""
    found = []
    for cls, kwargs in (
        (getattr(fusedopt, name), {}),
        (getattr(torch.optim, name), {"foreach": False}),
    ):
        params = [Parameter(values((6,), seed)) for seed in range(5)]
        optimizer = cls(params, lr=0.1, **kwargs)
        set_gradients(params, 0)
        optimizer.step()
        second = params[4] if far else params[1]
        optimizer.state[second]["step"] = optimizer.state[params[0]]["step"]
        for step in range(1, 4):
            set_gradients(params, step)
            optimizer.step()
        found.append(optimizer)
    assert float(found[0].state[all_params(found[0])[0]]["step"]) == 7
    assert_same_state(found[0], found[1], assert_within)


def test_the_norm_counts_the_gradient_as_often_as_the_parameter_is_listed() -> None:
    """As torch's function does of such a list."""
    optimizer = make(fusedopt.SGD, Config("SGD", {"lr": 0.1, "momentum": 0.9}), one_group=False)
    params = all_params(optimizer)
    set_gradients(params[:3], 0)
    expected = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    optimizer.max_grad_norm = 1e9
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(float(expected), rel=1e-6)


def test_what_the_second_group_refuses_is_refused_before_the_first_is_stepped() -> None:
    optimizer = make(fusedopt.Adam, Config("Adam", {}), one_group=False)
    params = all_params(optimizer)
    set_gradients(params[:3], 0)
    optimizer.param_groups[1]["eps"] = "small"
    optimizer.param_groups[1]["params"] = [params[1]]
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="small"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert not any(optimizer.state[p] for p in params if p in optimizer.state)


@pytest.mark.cpu_only("a device's counts are its own")
def test_a_count_that_torch_has_yet_to_negate_has_its_own_sign(gather: str) -> None:
    p = Parameter(values((6,), 0))
    optimizer = fusedopt.Adam([p])
    p.grad = values((6,), 1)
    optimizer.step()
    negated: Tensor = torch.complex(torch.tensor(0.0), torch.tensor(-3.0)).conj().imag
    assert negated.is_neg()
    assert float(negated) == 3
    optimizer.state[p]["step"] = negated
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 4
