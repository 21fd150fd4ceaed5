"""Norms, clipping and skipping: one more read of the gradients, and no write."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedopt
from fusedopt import _engine
from fusedopt.clip import reference_clip_coefficient, reference_total_norm
from tests.helpers import (
    ENGINES,
    all_params,
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_config,
    each_dtype,
    each_optimizer,
    oracle,
    parameters,
    set_gradients,
    train,
    values,
)
from tests.reference import reference_update, same_bits
from tests.registry import FILLED_SHAPES, MAX_NORMS, NORM_TYPES, Config

each_max_norm = pytest.mark.parametrize("max_norm", MAX_NORMS)


def as_arrays(tensors: list[Tensor]) -> list[Any]:
    return [x.to(torch.float64).numpy() for x in tensors]


# ---- clipping inside the step --------------------------------------------------------------------

Make = Callable[..., Optimizer]
Clip = Callable[[Any], object]


def clipped_training(make: Make, clip: Clip, **kwargs: Any) -> Optimizer:
    """Two groups, a parameter that misses a gradient now and then, one that gets it late."""
    params = parameters(FILLED_SHAPES)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    optimizer = make(groups, **kwargs)
    for step in range(5):
        set_gradients(params, step)
        if step == 3:
            params[0].grad = None
        if step < 2:
            params[-1].grad = None
        clip(optimizer)
        optimizer.step()
    return optimizer


@each_max_norm
@each_optimizer
def test_max_grad_norm_is_torchs_clipping_and_a_step(config: Config, max_norm: float) -> None:
    norms, expected_norms = [], []
    expected = clipped_training(
        oracle(config),
        lambda opt: expected_norms.append(clip_grad_norm_(all_params(opt), max_norm).item()),
        **config.kwargs,
    )
    actual = clipped_training(
        lambda params, **kwargs: config.cls(params, max_grad_norm=max_norm, **kwargs),
        lambda opt: norms.append(opt.grad_norm),
        **config.kwargs,
    )
    assert_same_state(actual, expected, assert_within)
    assert norms[0] is None
    norms.append(actual.grad_norm)  # type: ignore[attr-defined]
    assert [norm.item() for norm in norms[1:]] == pytest.approx(expected_norms, rel=2.0**-23)


@each_config
def test_max_grad_norm_in_every_variant(config: Config) -> None:
    expected = clipped_training(
        oracle(config), lambda opt: clip_grad_norm_(all_params(opt), 0.7), **config.kwargs
    )
    actual = clipped_training(config.cls, lambda _: None, max_grad_norm=0.7, **config.kwargs)
    assert_same_state(actual, expected, assert_within)


@pytest.mark.parametrize("order", NORM_TYPES)
@each_max_norm
@each_optimizer
def test_the_method_is_torchs_clipping(config: Config, max_norm: float, order: float) -> None:
    expected = clipped_training(
        oracle(config),
        lambda opt: clip_grad_norm_(all_params(opt), max_norm, order),
        **config.kwargs,
    )
    actual = clipped_training(
        config.cls, lambda opt: opt.clip_grad_norm_(max_norm, order), **config.kwargs
    )
    assert_same_state(actual, expected, assert_within)


@each_dtype
@each_config
def test_a_clipped_step_has_the_bits_of_the_references(config: Config, dtype: torch.dtype) -> None:
    """The coefficient is a factor of the gradient, rounded once to compute precision."""
    params = parameters([(5,), (300, 40), (), (70_000,)], dtype)
    optimizer = config.cls(params, max_grad_norm=0.3, **config.kwargs)
    (group,) = optimizer.param_groups
    names = optimizer._rule(group).states
    for t in range(1, 4):
        set_gradients(params, t)
        grads = [p.grad for p in params if p.grad is not None]
        kept = [grad.clone() for grad in grads]
        norm = reference_total_norm(as_arrays(grads))
        factor = reference_clip_coefficient(norm, 0.3)
        expected = []
        for p, grad in zip(params, grads, strict=True):
            states = [optimizer.state[p].get(name, torch.zeros_like(p)) for name in names]
            expected.append(reference_update(optimizer, group, t, [p, grad, *states], factor))
        optimizer.step()
        assert optimizer.grad_norm.item() == np.float32(norm)
        for p, correct in zip(params, expected, strict=True):
            states = [optimizer.state[p][name] for name in names]
            assert all(same_bits(x, y) for x, y in zip([p, *states], correct, strict=True))
        for grad, before in zip(grads, kept, strict=True):
            assert_same_bits(grad, before)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@each_optimizer
def test_gradients_that_are_not_finite_give_what_torch_gives(
    config: Config, special: float
) -> None:
    def with_special(opt: Optimizer) -> None:
        grad = all_params(opt)[1].grad
        assert grad is not None
        grad[0, 0] = special

    def clip(opt: Any) -> None:
        with_special(opt)
        clip_grad_norm_(all_params(opt), 1.0)

    expected = clipped_training(oracle(config), clip, **config.kwargs)
    actual = clipped_training(config.cls, with_special, max_grad_norm=1.0, **config.kwargs)
    check = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=0, equal_nan=True)  # noqa: E731
    assert_same_state(actual, expected, check)


@each_optimizer
def test_same_bits_on_every_isa_and_any_number_of_threads(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(5,), (300, 40), (0,), (100_000,), (17, 33)]

    def trained(isa: str, threads: int) -> Optimizer:
        monkeypatch.setattr(_engine, "engine", ENGINES[isa])
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        params = parameters(shapes, torch.float32)
        params[1].data = params[1].data.t().contiguous().t()
        optimizer = config.cls(params, max_grad_norm=0.1, **config.kwargs)
        train(optimizer, params, 3)
        return optimizer

    expected = trained("generic", 1)
    for isa, threads in itertools.product(ENGINES, (1, 2, 3, 8)):
        assert_same_state(trained(isa, threads), expected, assert_same_bits)


def test_parameters_that_share_memory_are_stepped_in_their_order() -> None:
    """Also where clipping walks backwards, and on one thread as on two."""

    def trained(make: Make, clip: Clip, **kwargs: Any) -> Optimizer:
        x = values((60_000,), 0)
        params = [Parameter(view) for view in (x[:40_000], x[20_000:], x[::2])]
        optimizer = make(params, lr=0.1, momentum=0.9, **kwargs)
        for step in range(2):
            set_gradients(params, step)
            clip(optimizer)
            optimizer.step()
        return optimizer

    expected = trained(torch.optim.SGD, lambda opt: clip_grad_norm_(all_params(opt), 1.0))
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        actual = trained(fusedopt.SGD, lambda _: None, max_grad_norm=1.0)
        torch.set_num_threads(before)
        assert_same_state(actual, expected, assert_within)


# ---- a factor that waits -------------------------------------------------------------------------


def one_step(clip: Clip | None = None, **kwargs: Any) -> Tensor:
    params = parameters([(5,)])
    optimizer = fusedopt.SGD(params, lr=0.1, **kwargs)
    set_gradients(params, 0)
    if clip:
        clip(optimizer)
    optimizer.step()
    return params[0].detach()


def test_a_factor_serves_one_step() -> None:
    params, twice = parameters([(5,)]), parameters([(5,)])
    set_gradients(params, 0)
    set_gradients(twice, 0)
    optimizer, plain = (fusedopt.SGD(p, lr=0.1) for p in (params, twice))
    optimizer.clip_grad_norm_(0.0)
    optimizer.step()
    optimizer.step()
    plain.step()
    assert_same_bits(params[0].detach(), twice[0].detach())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_the_factor(set_to_none: bool) -> None:
    def dropped(optimizer: Any) -> None:
        optimizer.clip_grad_norm_(0.0)
        optimizer.zero_grad(set_to_none)
        set_gradients(all_params(optimizer), 0)

    assert_same_bits(one_step(dropped), one_step())


def test_a_step_that_fails_keeps_the_factor() -> None:
    def failing(optimizer: Any) -> None:
        (p,) = all_params(optimizer)
        optimizer.clip_grad_norm_(0.5)
        kept = p.data
        p.data = torch.ones(2, dtype=torch.float64)
        with pytest.raises(ValueError, match="has shape"):
            optimizer.step()
        p.data = kept

    assert_same_bits(one_step(failing), one_step(lambda opt: opt.clip_grad_norm_(0.5)))


def test_clipping_twice_is_clipping_by_the_smaller() -> None:
    norms = []

    def twice(optimizer: Any) -> None:
        norms.append(optimizer.clip_grad_norm_(0.5).item())
        norms.append(optimizer.clip_grad_norm_(0.25).item())

    assert_within(one_step(twice), one_step(lambda opt: opt.clip_grad_norm_(0.25)), rtol=1e-5)
    assert norms[1] == pytest.approx(0.5, rel=1e-5)
    both = one_step(lambda opt: opt.clip_grad_norm_(0.5), max_grad_norm=0.25)
    assert_within(both, one_step(max_grad_norm=0.25), rtol=1e-5)


def test_two_optimizers_share_a_norm() -> None:
    params, expected_params = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    set_gradients(params, 0)
    set_gradients(expected_params, 0)
    norm = fusedopt.get_total_norm([p.grad for p in params if p.grad is not None])
    for p, given in zip(params, (norm, norm.item()), strict=True):
        optimizer = fusedopt.SGD([p], lr=0.1)
        optimizer.clip_grads_with_norm_(0.5, given)
        optimizer.step()
        optimizer.step()  # without
    clip_grad_norm_(expected_params, 0.5)
    expected = torch.optim.SGD(expected_params, lr=0.1)
    expected.step()
    set_gradients(expected_params, 0)
    expected.step()
    for p, q in zip(params, expected_params, strict=True):
        assert_within(p.detach(), q.detach())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("scaler_of", [torch.amp, fusedopt], ids=["torch", "fusedopt"])
def test_a_factor_of_gradients_that_are_gone_serves_no_step(
    scaler_of: Any, bad: float, set_to_none: bool
) -> None:
    """A scaler that skips does not call step(), and the model's zero_grad() tells nobody."""

    def trained(module: Any, clip: Clip) -> Tensor:
        model = torch.nn.Linear(3, 1, bias=False).double()
        torch.nn.init.constant_(model.weight, 0.5)
        optimizer = module.SGD(model.parameters(), lr=0.1)
        scaler = scaler_of.GradScaler("cpu", init_scale=4.0)
        for factor in (1.0, bad, 2.0, 3.0):
            loss = model(torch.full((2, 3), 1.0, dtype=torch.float64)).square().sum() * factor
            torch.autograd.backward(scaler.scale(loss))
            scaler.unscale_(optimizer)
            clip(optimizer)
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none)
        return model.weight.detach()

    expected = trained(torch.optim, lambda opt: clip_grad_norm_(all_params(opt), 0.5))
    assert_within(trained(fusedopt, lambda opt: opt.clip_grad_norm_(0.5)), expected)


def test_a_first_group_without_parameters() -> None:
    (p,) = parameters([(5,)])
    set_gradients([p], 0)
    optimizer = fusedopt.SGD([{"params": []}, {"params": [p]}], lr=0.1, max_grad_norm=0.5)
    norm = optimizer.clip_grad_norm_(0.5)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert_same_bits(optimizer.grad_norm, norm)


class Wrapper:
    """What Lightning puts around an optimizer: an object of its class that has nothing of it."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def step(self) -> None:
        self._optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@pytest.mark.parametrize(
    "clip",
    [lambda opt: opt.clip_grad_norm_(0.5), lambda opt: opt.clip_grads_with_norm_(0.5, 2.0)],
    ids=["clip_grad_norm_", "clip_grads_with_norm_"],
)
def test_a_wrapper_that_takes_on_the_class(clip: Clip) -> None:
    def trained(wrap: Callable[[Any], Any]) -> Any:
        params = parameters()
        optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=100.0, skip_nonfinite=True)
        wrapped = wrap(optimizer)
        assert isinstance(wrapped, fusedopt.SGD)
        for step in range(3):
            set_gradients(params, step)
            clip(wrapped)
            if step == 1:
                wrapped.zero_grad()
                set_gradients(params, step)
            wrapped.step()
        params[0].grad = torch.full_like(params[0], math.nan)
        wrapped.step()
        assert wrapped.skipped_steps == 1
        assert wrapped.max_grad_norm == 100.0
        assert wrapped.skip_nonfinite
        assert wrapped.grad_norm is not None
        assert math.isnan(wrapped.grad_norm)
        return optimizer

    assert_same_state(trained(Wrapper), trained(lambda opt: opt), assert_same_bits)


# ---- skipping ------------------------------------------------------------------------------------


@pytest.mark.cpu_only("on devices, a first step that is skipped makes states")
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("special", [math.inf, math.nan])
@each_optimizer
def test_skip_nonfinite_changes_nothing(
    config: Config, special: float, max_norm: float | None
) -> None:
    params, clean_params = parameters(), parameters()
    optimizer = config.cls(params, skip_nonfinite=True, max_grad_norm=max_norm, **config.kwargs)
    clean = config.cls(clean_params, max_grad_norm=max_norm, **config.kwargs)
    versions = []
    for step in range(4):
        set_gradients(params, step)
        if step in (0, 2):
            assert params[1].grad is not None
            params[1].grad[0, 0] = special
            versions.append([p._version for p in params])
            before = len(optimizer.state)
            optimizer.step()
            versions.append([p._version for p in params])
            assert len(optimizer.state) == before
            assert not optimizer.grad_norm.isfinite()
            continue
        optimizer.step()
        set_gradients(clean_params, step)
        clean.step()
    assert optimizer.skipped_steps == 2
    assert versions[0] == versions[1]
    assert versions[2] == versions[3]
    assert_same_state(optimizer, clean, assert_same_bits)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_skip_nonfinite_heeds_a_norm_from_elsewhere(norm: float) -> None:
    """As where another rank has the bad gradient: all ranks must skip."""
    (p,) = parameters([(4,)])
    before = p.detach().clone()
    optimizer = fusedopt.AdamW([p], skip_nonfinite=True)
    set_gradients([p], 0)
    optimizer.clip_grads_with_norm_(1.0, norm)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not optimizer.state
    assert_same_bits(p.detach(), before)
    optimizer.step()
    assert optimizer.skipped_steps == 1


def test_a_plain_step_count_waits_too() -> None:
    (p,) = parameters([(4,)])
    optimizer = fusedopt.Adam([p], skip_nonfinite=True)
    train(optimizer, [p], 1)
    optimizer.state[p]["step"] = 1
    p.grad = torch.full((4,), math.nan, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    train(optimizer, [p], 1)
    assert optimizer.state[p]["step"] == 2


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@each_optimizer
def test_options_live_on_the_optimizer_and_survive_copies(
    config: Config, copied: Callable[[Any], Any]
) -> None:
    options = {"max_grad_norm": 0.25, "skip_nonfinite": True, "amp_scaling": True}
    optimizer = config.cls(parameters(), **config.kwargs, **options)
    plain = config.cls(parameters(), **config.kwargs)
    optimizer.skipped_steps = 3
    assert optimizer.defaults.keys() == plain.defaults.keys()
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    again = copied(optimizer)
    again.load_state_dict(plain.state_dict())  # which has none of them
    for name, value in {**options, "skipped_steps": 3}.items():
        assert getattr(optimizer, name) == value
        assert getattr(again, name) == value


def test_a_pickle_without_the_options_has_their_defaults() -> None:
    state = fusedopt.SGD(parameters([(3,)]), lr=0.1).__getstate__()
    old = {name: state[name] for name in ("defaults", "state", "param_groups")}
    optimizer = fusedopt.SGD.__new__(fusedopt.SGD)
    optimizer.__setstate__(old)
    set_gradients(all_params(optimizer), 0)
    optimizer.step()
    assert (optimizer.max_grad_norm, optimizer.grad_norm, optimizer.skipped_steps) == (
        None,
        None,
        0,
    )


def test_max_grad_norm_may_change() -> None:
    (p,) = parameters([(5,)])
    optimizer = fusedopt.SGD([p], lr=0.1)
    set_gradients([p], 0)
    before = p.detach().clone()
    optimizer.max_grad_norm = 0.0
    optimizer.step()
    assert_same_bits(p.detach(), before)


# ---- gradients that the engine cannot read -------------------------------------------------------


def mixed(dense: bool) -> list[Parameter]:
    """A table with sparse gradients and plain parameters; dense, for torch."""
    params = parameters([(6, 3), (5,), (300, 100)])
    index = torch.tensor([[1, 4, 1]])
    table = torch.sparse_coo_tensor(index, values((3, 3), 7), (6, 3), check_invariants=True)
    set_gradients(params, 0)
    params[0].grad = table.to_dense() if dense else table
    return params


@pytest.mark.filterwarnings("ignore:fusedopt.SGD has no kernel")
def test_the_norm_covers_sparse_gradients() -> None:
    params, expected_params = mixed(dense=False), mixed(dense=True)
    optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=0.5)
    kept = params[0].grad
    optimizer.step()
    expected = clip_grad_norm_(expected_params, 0.5)
    assert optimizer.grad_norm is not None
    assert_within(optimizer.grad_norm.double(), expected, rtol=2.0**-24)
    torch.optim.SGD(expected_params, lr=0.1).step()
    for p, q in zip(params, expected_params, strict=True):
        assert_within(p.detach(), q.detach())
    assert params[0].grad is kept
    total = fusedopt.get_total_norm([p.grad for p in params if p.grad is not None])
    assert_within(total, expected)


@pytest.mark.filterwarnings("ignore:fusedopt")
@each_optimizer
def test_the_norm_covers_complex_gradients(config: Config) -> None:
    def trained(make: Make, clip: Clip, real: bool) -> Optimizer:
        z = values((5, 2), 1)
        params = [Parameter(z if real else torch.view_as_complex(z)), *parameters([(4,)])]
        optimizer = make(params, **config.kwargs)
        for step in range(3):
            gradient = values((5, 2), 10 + step)
            params[0].grad = gradient if real else torch.view_as_complex(gradient)
            params[1].grad = values((4,), 20 + step)
            clip(optimizer)
            optimizer.step()
        return optimizer

    expected = trained(oracle(config), lambda opt: clip_grad_norm_(all_params(opt), 0.5), real=True)
    clipped = lambda params, **kwargs: config.cls(params, max_grad_norm=0.5, **kwargs)  # noqa: E731
    actual = trained(clipped, lambda _: None, real=False)

    def check(a: Tensor, b: Tensor) -> None:
        assert_within(torch.view_as_real(a) if a.is_complex() else a, b)

    assert_same_state(actual, expected, check)


@pytest.mark.filterwarnings("ignore:fusedopt.SGD has no kernel")
def test_a_skipped_step_skips_the_fallback() -> None:
    params = mixed(dense=False)
    before = [p.detach().clone() for p in params]
    optimizer = fusedopt.SGD(params, lr=0.1, skip_nonfinite=True)
    assert params[0].grad is not None
    params[0].grad._values()[0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q)


def test_an_error_in_the_fallback_leaves_gradients_and_factor() -> None:
    params = mixed(dense=False)
    optimizer = fusedopt.Adam(params)
    optimizer.clip_grad_norm_(0.1)
    pending = optimizer._pending
    assert pending.coefficient < 1
    kept = [p.grad for p in params]
    with pytest.raises(RuntimeError, match="sparse"), pytest.warns(UserWarning, match="fusedopt"):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(params, kept, strict=True))
    assert optimizer._pending == pending
