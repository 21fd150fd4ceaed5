"""Statistics where a step takes another way: skipped, without kernels, wrapped, in parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import Linear, Parameter, Sequential

import fusedopt
from tests.helpers import each_dtype, each_optimizer, parameters, set_gradients, values
from tests.registry import Config
from tests.statistics_oracle import assert_are, norm, watched

SHAPES: list[tuple[int, ...]] = [(5,), (64, 96), (), (0, 3), (3, 4097)]


def assert_are_of_step(optimizer: Any, unscale: float = 1.0) -> None:
    expected = watched(optimizer, optimizer.step, unscale)
    assert_are(optimizer.statistics, expected)


# ---- skipped, clipped, scaled --------------------------------------------------------------------


@each_optimizer
def test_a_skipped_step_has_those_of_its_gradients(config: Config) -> None:
    params = parameters([(5,), (64, 96), (3, 4)], torch.bfloat16)
    optimizer = config.cls(params, skip_nonfinite=True, track_statistics=True, **config.kwargs)
    for step in range(3):
        set_gradients(params, step)
        if step != 1:
            assert params[1].grad is not None
            params[1].grad[3, 5] = math.inf
        optimizer.step()
        statistics = optimizer.statistics
        assert statistics.nonfinite.tolist() == [0, int(step != 1), 0]
        assert params[0].grad is not None
        torch.testing.assert_close(statistics.grad_norm[0], params[0].grad.double().norm())
        torch.testing.assert_close(statistics.param_norm[1], params[1].detach().double().norm())
        if step != 1:
            assert statistics.update_norm.tolist() == [0, 0, 0]
            assert statistics.unmoved.tolist() == [0, 0, 0]
        else:
            assert statistics.update_norm.max() > 0


def test_so_has_one_that_a_scaler_skips() -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer: Any = fusedopt.SGD(params, lr=0.1, track_statistics=True)
    optimizer.step()
    set_gradients(params, 0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    statistics = optimizer.statistics
    assert statistics is not None
    assert statistics.update_norm.tolist() == [0, 0]
    assert params[0].grad is not None
    torch.testing.assert_close(statistics.grad_norm[0], params[0].grad.double().norm())


def test_gradients_are_unscaled_and_before_clipping() -> None:
    params = parameters(SHAPES, torch.float32)
    optimizer: Any = fusedopt.Adam(
        params, max_grad_norm=0.01, amp_scaling=True, track_statistics=True
    )
    set_gradients(params, 0)
    optimizer.grad_scale = torch.tensor(1024.0)
    assert_are_of_step(optimizer, 1 / 1024)
    optimizer.grad_scale = None
    optimizer.max_grad_norm = None
    set_gradients(params, 1)
    optimizer.clip_grad_norm_(0.01)
    assert_are_of_step(optimizer)


# ---- without kernels, or seen by others ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*has no kernel for")
@each_optimizer
def test_of_parameters_that_torch_steps(config: Config) -> None:
    if config.name in ("MuonWithAuxAdam", "Lion"):
        pytest.skip("no complex parameters")
    plain, other = parameters([(5,), (64, 96)], torch.float32)
    complex_one = Parameter(torch.complex(values((3, 4), 1), values((3, 4), 2)))
    optimizer = config.cls([plain, complex_one, other], track_statistics=True, **config.kwargs)
    for step in range(2):
        set_gradients([plain, other], step)
        complex_one.grad = torch.complex(values((3, 4), step), values((3, 4), 5))
        assert_are_of_step(optimizer)


@pytest.mark.filterwarnings("ignore:.*has no kernel for")
def test_of_sparse_gradients() -> None:
    p, q = parameters([(6, 3), (5,)], torch.float32)
    optimizer = fusedopt.SGD([p, q], lr=0.1, track_statistics=True)
    p.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 4, 1]]), torch.ones(3, 3), (6, 3), check_invariants=True
    )
    q.grad = torch.ones(5)
    assert_are_of_step(optimizer)


@pytest.mark.filterwarnings("ignore:.*has no kernel for")
@each_dtype
def test_of_steps_that_are_differentiable(dtype: torch.dtype) -> None:
    leaves = parameters([(5,), (3, 4)], dtype)
    params: list[Any] = [p.clone() for p in leaves]
    optimizer = fusedopt.SGD(params, lr=0.1, differentiable=True, track_statistics=True)
    set_gradients(params, 0)
    assert_are_of_step(optimizer)
    assert optimizer.statistics is not None
    assert not optimizer.statistics.param_norm.requires_grad


def test_of_steps_that_a_dispatch_mode_sees() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    params = parameters(SHAPES, torch.float32)
    optimizer = fusedopt.AdamW(params, max_grad_norm=0.5, track_statistics=True)
    set_gradients(params, 0)

    def step() -> None:
        with FlopCounterMode(display=False):
            optimizer.step()

    expected = watched(optimizer, step)
    assert_are(optimizer.statistics, expected)


# ---- parameters that are there twice, or freed ---------------------------------------------------


def test_what_is_listed_twice_has_a_row_for_each_step() -> None:
    p, q = parameters([(40,), (5,)], torch.float32)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fusedopt.SGD([p, p, q], lr=0.1, track_statistics=True)
    set_gradients([p, q], 0)
    assert p.grad is not None
    before = p.detach().clone()
    optimizer.step()
    statistics = optimizer.statistics
    assert statistics is not None
    assert statistics.names == ["group0.param0", "group0.param1", "group0.param2"]
    torch.testing.assert_close(statistics.update_norm[:2], (0.1 * p.grad.double().norm()).expand(2))
    halfway, end = (before - 0.1 * k * p.grad for k in (1, 2))
    torch.testing.assert_close(
        statistics.param_norm[:2], torch.stack([halfway.double().norm(), end.double().norm()])
    )


def test_of_released_gradients() -> None:
    torch.manual_seed(0)
    model = Sequential(Linear(7, 9), Linear(9, 4))
    optimizer = fusedopt.AdamW(model.named_parameters(), track_statistics=2)
    fusedopt.release_gradients(model, optimizer)
    x = torch.randn(3, 7)
    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        model(x).square().sum().backward()
        optimizer.step()
        if step % 2 == 0:
            continue
        statistics = optimizer.statistics
        assert statistics is not None
        assert statistics.names == [name for name, _ in model.named_parameters()]
        moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        for vector, tensors in (
            ("grad_norm", gradients),
            ("update_norm", moved),
            ("param_norm", list(model.parameters())),
        ):
            norms = torch.tensor([norm(x.detach().double()) for x in tensors]).double()
            torch.testing.assert_close(getattr(statistics, vector), norms, rtol=1e-6, atol=0)


def test_of_matrices_that_are_listed_twice() -> None:
    p = Parameter(values((8, 6), 0, torch.float32))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fusedopt.Muon([p, p], track_statistics=True)
    p.grad = values((8, 6), 1, torch.float32)
    optimizer.step()
    statistics = optimizer.statistics
    assert statistics is not None
    assert statistics.names == ["group0.param0", "group0.param1"]
    torch.testing.assert_close(statistics.grad_norm, p.grad.double().norm().expand(2))
    assert statistics.update_norm.min() > 0
    torch.testing.assert_close(statistics.param_norm[1], p.detach().double().norm())


# ---- wrapped -------------------------------------------------------------------------------------


@each_dtype
def test_of_lookahead(dtype: torch.dtype) -> None:
    """In every k-th step, parameters go back: that is in the update."""
    params = parameters(SHAPES, dtype)
    optimizer: Any = fusedopt.Lookahead(fusedopt.AdamW(params, track_statistics=True), k=2)
    for step in range(4):
        set_gradients(params, step)
        assert_are_of_step(optimizer)


def test_reading_waits_for_nothing_before() -> None:
    """Vectors are made when they are read, of what was found in the step, not of what is now."""
    p = Parameter(torch.full((4,), 2.0))
    optimizer = fusedopt.SGD([p], lr=1.0, track_statistics=True)
    p.grad = torch.ones(4)
    optimizer.step()
    with torch.no_grad():
        p.zero_()
    p.grad = None
    assert optimizer.statistics is not None
    assert optimizer.statistics.param_norm.tolist() == [2.0]
    assert optimizer.statistics.grad_norm.tolist() == [2.0]


def test_an_error_leaves_the_last_ones() -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = fusedopt.Adam(params, track_statistics=True)
    set_gradients(params, 0)
    optimizer.step()
    before = optimizer.statistics
    params[1].data = torch.ones(2)
    with pytest.raises(ValueError, match="shape"):
        optimizer.step()
    assert optimizer.statistics is before
    del params[1].grad
    params[1].grad = torch.ones(2)
    optimizer.state.pop(params[1])
    optimizer.step()
    assert optimizer.statistics is not None
    assert len(optimizer.statistics.names) == 2


# ---- lists that change, and released gradients that do not come as planned -----------------------


def test_lists_that_change_before_they_are_read() -> None:
    a, b = parameters([(3,), (4,)], torch.float32)
    optimizer = fusedopt.AdamW([("a", a), ("b", b)], track_statistics=True)
    set_gradients([a, b], 0)
    for change in (list.reverse, list.clear, lambda params: params.append(a)):
        optimizer.param_groups[0]["params"][:] = [a, b]
        optimizer.step()
        statistics = optimizer.statistics
        assert statistics is not None
        change(optimizer.param_groups[0]["params"])
        assert statistics.numel.tolist() == [3, 4]
        assert statistics.names == ["a", "b"]


def released() -> tuple[Sequential, fusedopt.AdamW, fusedopt.GradientRelease]:
    torch.manual_seed(0)
    model = Sequential(Linear(7, 9), Linear(9, 4))
    optimizer = fusedopt.AdamW(model.named_parameters(), track_statistics=True)
    return model, optimizer, fusedopt.release_gradients(model, optimizer)


def test_a_backward_pass_that_is_repeated_counts_once() -> None:
    model, optimizer, _ = released()
    first: Any = model[0]
    hook = first.weight.register_hook(lambda grad: grad / (1 // 0))
    x = torch.randn(3, 7)
    with pytest.raises(ZeroDivisionError):
        model(x).square().sum().backward()
    hook.remove()
    for _ in range(2):
        model(x).square().sum().backward()
    optimizer.step()
    assert optimizer.statistics is not None
    assert optimizer.statistics.names == [name for name, _ in model.named_parameters()]
    assert int(optimizer.statistics.total().numel) == sum(p.numel() for p in model.parameters())


def test_a_request_after_the_backward_pass_is_for_the_next_one() -> None:
    model, optimizer, _ = released()
    optimizer.track_statistics = False
    x = torch.randn(3, 7)
    model(x).square().sum().backward()
    optimizer.request_statistics()
    optimizer.step()
    assert optimizer.statistics is None
    model(x).square().sum().backward()
    optimizer.step()
    assert optimizer.statistics is not None
    assert len(optimizer.statistics.names) == 4


def test_gradients_that_are_no_longer_released_before_the_step() -> None:
    model, optimizer, release = released()
    model(torch.randn(3, 7)).square().sum().backward()
    release.remove()
    optimizer.step()
    assert optimizer.statistics is not None
    assert len(optimizer.statistics.names) == 4


def test_showing_them_does_not_read_them() -> None:
    p = Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([p], track_statistics=True)
    p.grad = torch.ones(3)
    optimizer.step()
    statistics = optimizer.statistics
    assert repr(statistics) == "Statistics, not read yet"
    assert statistics is not None
    assert statistics.names
    assert repr(statistics) == "Statistics of 1 parameters"
