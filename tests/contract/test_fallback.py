"""What has no kernel, and is stepped by torch's own implementation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_optimizer,
    each_torch_optimizer,
    oracle,
    parameters,
    train,
    values,
)
from tests.registry import Config

FALLS_BACK = "fusedopt.{} has no kernel for {}: "


@each_torch_optimizer
def test_differentiable_falls_back(config: Config) -> None:
    def gradients_through_a_step(cls: Callable[..., Optimizer]) -> list[Tensor]:
        leaf, gradient = Parameter(values((5,), 1)), Parameter(values((5,), 2))
        p = leaf.clone()
        p.grad = gradient.clone()
        cls([p], differentiable=True, **config.kwargs).step()
        # SGD's first momentum is a copy of the gradient without its history.
        through = torch.autograd.grad(
            p.square().sum(), [leaf, gradient], allow_unused=True, materialize_grads=True
        )
        return [p.detach(), *through]

    with pytest.warns(UserWarning, match=FALLS_BACK.format(config.name, "differentiable=True")):
        actual = gradients_through_a_step(config.cls)
    assert actual[1].any()
    for a, b in zip(actual, gradients_through_a_step(config.torch_cls), strict=True):
        assert_same_bits(a, b)


def sparse(rows: list[int], seed: int) -> Tensor:
    """The gradient of an embedding of shape (6, 3), of which these rows were used."""
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values((len(rows), 3), seed), (6, 3), check_invariants=True
    )


@pytest.mark.parametrize(
    "config",
    [Config("SGD", {}), Config("SGD", {"momentum": 0.9}), Config("Adagrad", {"lr_decay": 0.1})],
    ids=str,
)
def test_sparse_gradients_fall_back(config: Config) -> None:
    def trained(cls: Callable[..., Optimizer]) -> Optimizer:
        table, dense = parameters([(6, 3), (4,)])
        optimizer = cls([table, dense], lr=0.1, **config.kwargs)
        # Torch's Adagrad warns where nobody has chosen whether to check.
        with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]  # of torch
            for step in range(3):
                table.grad = sparse([step, 4], step)
                dense.grad = values((4,), 10 + step)
                optimizer.step()
        return optimizer

    message = FALLS_BACK.format(config.name, "sparse gradients")
    with pytest.warns(UserWarning, match=message) as warned:
        actual = trained(config.cls)
    assert len(warned) == 1  # for three steps
    assert_same_state(actual, trained(config.torch_cls), assert_within)


@each_optimizer
def test_complex_parameters_fall_back(config: Config) -> None:
    def parts(real: bool) -> list[Parameter]:
        z = values((5, 2), 1)
        return [Parameter(z if real else torch.view_as_complex(z)), *parameters([(4,)])]

    def trained(make: Callable[..., Optimizer], params: list[Parameter]) -> Optimizer:
        optimizer = make(params, **config.kwargs)
        for step in range(3):
            gradient = values((5, 2), 10 + step)
            complex_gradient = torch.view_as_complex(gradient)
            params[0].grad = complex_gradient if params[0].is_complex() else gradient
            params[1].grad = values((4,), 20 + step)
            optimizer.step()
        return optimizer

    message = FALLS_BACK.format(config.name, "complex parameters")
    with pytest.warns(UserWarning, match=message) as warned:
        actual = trained(config.cls, parts(real=False))
    assert len(warned) == 1
    # Every rule here takes a complex number as two real ones.
    expected = trained(oracle(config), parts(real=True))

    def check(a: Tensor, b: Tensor) -> None:
        assert_within(torch.view_as_real(a) if a.is_complex() else a, b)

    assert_same_state(actual, expected, check)


@each_optimizer
def test_devices_without_a_kernel_fall_back(config: Config) -> None:
    """The meta device, which every torch has, stands for all of them."""
    meta, p = Parameter(torch.ones(3, device="meta")), Parameter(torch.ones(3))
    optimizer = config.cls([p, meta], **config.kwargs)
    meta.grad, p.grad = torch.ones(3, device="meta"), torch.ones(3)
    with pytest.warns(UserWarning, match=FALLS_BACK.format(config.name, "parameters on meta")):
        optimizer.step()
    assert (p < 1).all()
    assert set(optimizer.state[meta]) == set(optimizer.state[p])


def test_each_cause_of_falling_back_warns_once() -> None:
    table, z = parameters([(6, 3), (4,)])
    z.data = z.detach().to(torch.complex128)
    optimizer = fusedopt.SGD([table, z], lr=0.1)
    table.grad = sparse([1], 1)
    z.grad = torch.ones_like(z)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
    causes = sorted(str(warning.message).split(" for ")[1].split(":")[0] for warning in warned)
    assert causes == ["complex parameters", "sparse gradients"]


@each_optimizer
def test_a_parameter_that_torch_negates_lazily_falls_back(config: Config) -> None:
    def trained(make: Callable[..., Optimizer], p: Tensor) -> Optimizer:
        param = Parameter(p)
        optimizer = make([param], **config.kwargs)
        train(optimizer, [param], 2)
        return optimizer

    start = values((5,), 0)
    view = torch.complex(start, -start).conj().imag
    assert view.is_neg()
    cause = "parameters that torch has yet to negate"
    with pytest.warns(UserWarning, match=FALLS_BACK.format(config.name, cause)):
        actual = trained(config.cls, view)
    assert_same_state(actual, trained(oracle(config), start.clone()), assert_within)


@each_torch_optimizer
def test_states_of_a_dtype_of_their_own_fall_back_too(config: Config) -> None:
    """Torch has cast them to the parameter's when it loaded them."""
    (p,) = parameters([(4,)], torch.float32)
    optimizer = config.cls([p], **config.kwargs)
    train(optimizer, [p], 1)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["differentiable"] = True
    for state in state_dict["state"].values():
        state.update({k: v.bfloat16() for k, v in state.items() if k != "step"})

    def continued(cls: Callable[..., Optimizer]) -> Optimizer:
        param = Parameter(p.detach().clone(), requires_grad=False)
        following = cls([param], differentiable=True, **config.kwargs)
        following.load_state_dict(copy.deepcopy(state_dict))
        train(following, [param], 1)
        return following

    with pytest.warns(UserWarning, match=FALLS_BACK.format(config.name, "differentiable=True")):
        actual = continued(config.cls)
    assert_same_state(actual, continued(config.torch_cls), assert_same_bits)
