"""What a moving average lives through: checkpoints, copies, scalers, hooks, other steps."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

import fusedopt
from tests.ecosystem.common import backward, batch, make_model
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_optimizer,
    oracle,
    parameters,
    set_gradients,
    squares,
    train,
    values,
)
from tests.registry import Config
from tests.test_ema import DECAY, HALVES, ema

STEPS = 6
each_module = pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])


def warmed(make: Callable[..., Any], params: Any, **kwargs: Any) -> Any:
    return fusedopt.EMA(make(params, **kwargs), decay=0.5, warmup=True, every=2)


@pytest.mark.parametrize("torchs", [False, True])
@each_optimizer
def test_checkpoints_in_the_middle(config: Config, torchs: bool) -> None:
    make = oracle(config) if torchs else config.cls
    params, expected_params = parameters(), parameters()
    expected = warmed(make, expected_params, **config.kwargs)
    train(expected, expected_params, STEPS)
    optimizer = warmed(make, params, **config.kwargs)
    for step in range(STEPS):
        train(optimizer, params, range(step, step + 1))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer = warmed(make, params, **config.kwargs)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(optimizer, expected, assert_same_bits)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each_module
def test_a_checkpoint_of_a_16_bit_model_keeps_float32_averages(
    module: Any, dtype: torch.dtype
) -> None:
    params, others = (parameters([(70,), (3, 4)], dtype) for _ in range(2))
    optimizer, other = ema(module.AdamW, params), ema(module.AdamW, others)
    train(optimizer, params, 3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert other.state[q]["ema"].dtype == torch.float32
        assert_same_bits(other.state[q]["ema"], optimizer.state[p]["ema"])


@pytest.mark.parametrize("mode", [{"state_dtype": "mxfp8"}, {"master_weights": True}], ids=str)
def test_checkpoints_of_the_memory_modes(mode: dict[str, Any]) -> None:
    def make(params: list[Parameter]) -> Any:
        return ema(fusedopt.AdamW, params, **mode)

    params, expected_params = (parameters([(64, 128)], torch.bfloat16) for _ in range(2))
    optimizer, expected = make(params), make(expected_params)
    train(expected, expected_params, 4)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer = make(params)
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(2, 4))
    assert_same_state(optimizer, expected, assert_same_bits)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@each_module
def test_copies_go_on_like_the_original(module: Any, copied: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = fusedopt.EMA(
        module.AdamW(params), decay=0.5, warmup=True, every=2, params=params[:3]
    )
    train(optimizer, params, 3)
    other_params, other = copied((params, optimizer))
    assert (other.decay, other.warmup, other.every) == (0.5, True, 2)
    train(optimizer, params, range(3, STEPS))
    train(other, other_params, range(3, STEPS))
    assert_same_state(other, optimizer, assert_same_bits)


@each_module
def test_a_run_that_began_without_goes_on(module: Any) -> None:
    params, expected_params = parameters(), parameters()
    expected = module.AdamW(expected_params)
    train(expected, expected_params, 4)
    plain = module.AdamW(params)
    train(plain, params, 3)
    optimizer = fusedopt.EMA(module.AdamW(params), DECAY)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(optimizer, params, range(3, 4))
    for p, q in zip(params, expected_params, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(optimizer.state[p]["ema"], q.detach())


def test_a_checkpoint_has_no_average_of_what_is_not_chosen() -> None:
    params = parameters()
    whole = ema(fusedopt.AdamW, params)
    train(whole, params, 2)
    some = fusedopt.EMA(fusedopt.AdamW(params), DECAY, params=params[:1])
    some.load_state_dict(whole.state_dict())
    assert ["ema" in some.state[p] for p in params] == [True, False, False, False, False]


@each_module
@pytest.mark.parametrize("scaler_of", [torch.amp, fusedopt], ids=["torch", "fusedopt"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scalers_and_skipped_steps(module: Any, scaler_of: Any, fused: bool) -> None:
    """A step that is skipped neither counts nor moves an average."""
    params, plain_params = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    kwargs = {"amp_scaling": fused} if module is fusedopt else {"fused": fused}
    optimizer = warmed(module.AdamW, params, **kwargs)
    plain = warmed(torch.optim.AdamW, plain_params, foreach=False)
    scaler = scaler_of.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, math.inf, 2.0, 3.0, math.nan, 1.0):
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(squares(params, factor)))
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(factor):
            plain.zero_grad()
            torch.autograd.backward(squares(plain_params, factor))
            plain.step()
    assert optimizer.param_groups[0]["ema_step"] == 4
    assert_same_state(optimizer, plain, assert_within)


def test_skip_nonfinite_does_not_count() -> None:
    (p,) = parameters([(4,)])
    optimizer = ema(fusedopt.SGD, [p], lr=0.1, skip_nonfinite=True)
    train(optimizer, [p], 2)
    before = optimizer.state[p]["ema"].clone()
    p.grad = torch.full((4,), math.nan, dtype=torch.float64)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.param_groups[0]["ema_step"] == 2
    assert_same_bits(optimizer.state[p]["ema"], before)


@each_module
def test_schedulers_hooks_and_clipping(module: Any) -> None:
    params, plain_params = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    optimizer = ema(module.SGD, params, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(plain_params, lr=0.1, momentum=0.9, foreach=False)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("outer pre"))
    optimizer.optimizer.register_step_pre_hook(lambda *_: fired.append("inner pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("outer post"))
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=6)
        for opt in (optimizer, plain)
    ]
    for step in range(5):
        set_gradients(params, step)
        set_gradients(plain_params, step)
        torch.nn.utils.clip_grad_norm_(plain_params, 0.5)
        if module is fusedopt:
            optimizer.clip_grad_norm_(0.5)
        else:
            torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(params, plain_params, strict=True):
        assert_within(p.detach(), q.detach())
    assert fired == ["outer pre", "inner pre", "outer post"] * 5


@each_module
def test_closures(module: Any) -> None:
    params, expected_params = parameters(), parameters()
    optimizer, expected = (ema(module.SGD, p, lr=0.1) for p in (params, expected_params))
    train(expected, expected_params, 3)
    step = iter(range(3))

    def closure() -> float:
        set_gradients(params, next(step))
        return 7.0

    assert [optimizer.step(closure) for _ in range(3)] == [7.0] * 3
    assert_same_state(optimizer, expected, assert_same_bits)


@pytest.mark.filterwarnings("ignore:fusedopt.SGD has no kernel")
def test_parameters_without_a_kernel_are_averaged_too() -> None:
    def trained(module: Any) -> Any:
        table, dense = parameters([(6, 3), (4,)])
        optimizer = ema(module.SGD, [table, dense], lr=0.1, momentum=0.9)
        for step in range(4):
            index = torch.tensor([[step % 6, 4]])
            gradient = values((2, 3), step)
            table.grad = torch.sparse_coo_tensor(index, gradient, (6, 3), check_invariants=True)
            dense.grad = values((4,), 10 + step)
            optimizer.step()
        return optimizer

    assert_same_state(trained(fusedopt), trained(torch.optim), assert_within)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_under_a_mode_averages_of_16_bits_are_float32_too(dtype: torch.dtype) -> None:
    (p,) = parameters([(6,)], dtype)
    optimizer = ema(fusedopt.AdamW, [p])
    average = p.detach().float()
    for step in range(3):
        with FlopCounterMode(display=False):  # a mode that sees all operators
            train(optimizer, [p], range(step, step + 1))
        weight = 1 - DECAY if step else 1.0
        average = fusedopt.EMA.reference(p.detach().float(), average, weight=weight)
    assert_same_bits(optimizer.state[p]["ema"], average)


@pytest.mark.parametrize("outside", [None, fusedopt.Lookahead])
def test_released_gradients(outside: Any) -> None:
    def trained(release: bool) -> Any:
        model = make_model()
        optimizer: Any = fusedopt.EMA(fusedopt.AdamW(model.parameters()), DECAY)
        optimizer = outside(optimizer, k=2) if outside else optimizer
        if release:
            fusedopt.release_gradients(model, optimizer)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, batch(step))
            optimizer.step()
        assert optimizer.param_groups[0]["ema_step"] == 4
        return optimizer

    assert_same_state(trained(release=True), trained(release=False), assert_same_bits)


@pytest.mark.parametrize("around", [fusedopt.Muon, fusedopt.SGD])
def test_matrices_are_averaged_once_they_have_moved(around: Any) -> None:
    params = parameters([(8, 4), (4, 6)], torch.float32)
    optimizer = ema(around, params, lr=0.1)
    averages = [p.detach().clone() for p in params]
    for step in range(3):
        train(optimizer, params, range(step, step + 1))
        weight = 1 - DECAY if step else 1.0
        for p, average in zip(params, averages, strict=True):
            average.copy_(fusedopt.EMA.reference(p.detach(), average, weight=weight))
            assert_same_bits(optimizer.state[p]["ema"], average)


@each_module
def test_a_hook_that_fails_leaves_the_step_counted(module: Any) -> None:
    params = parameters()
    optimizer = ema(module.SGD, params, lr=0.1)

    def fail(*_: Any) -> None:
        raise KeyError("hook")

    handle = optimizer.register_step_post_hook(fail)
    set_gradients(params, 0)
    with pytest.raises(KeyError):
        optimizer.step()
    handle.remove()
    assert optimizer.param_groups[0]["ema_step"] == 1


def test_groups_that_are_added() -> None:
    first, second = parameters([(3,), (4,)])
    optimizer = ema(fusedopt.SGD, [first], lr=0.1)
    optimizer.add_param_group({"params": [second]})
    train(optimizer, [first, second], 3)
    assert all(group["ema_step"] == 3 for group in optimizer.param_groups)
    assert "ema" in optimizer.state[second]
