"""Lookahead around fused optimizers and torch's."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

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
    each_config,
    each_optimizer,
    each_torch_optimizer,
    oracle,
    parameters,
    set_gradients,
    squares,
    train,
    values,
)
from tests.reference import same_bits
from tests.registry import DTYPES, Config

K, ALPHA, STEPS = 3, 0.3, 8


def plainly(make: Callable[..., Optimizer], params: list[Parameter], steps: int) -> Optimizer:
    """Train as the paper writes it, in torch's operators around an optimizer."""
    optimizer = make(params)
    slow = [p.detach().clone() for p in params]
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
        if (step + 1) % K == 0:
            with torch.no_grad():
                for p, q in zip(params, slow, strict=True):
                    q.add_(p - q, alpha=ALPHA)
                    p.copy_(q)
    for p, q in zip(params, slow, strict=True):
        optimizer.state[p]["slow"] = q
    return optimizer


def lookahead(make: Callable[..., Optimizer], params: Any, **kwargs: Any) -> Any:
    return fusedopt.Lookahead(make(params, **kwargs), k=K, alpha=ALPHA)


@each_config
def test_it_is_the_papers(config: Config) -> None:
    params, expected_params = parameters(), parameters()
    optimizer = lookahead(config.cls, params, **config.kwargs)
    train(optimizer, params, STEPS)
    expected = plainly(lambda p: oracle(config)(p, **config.kwargs), expected_params, STEPS)
    assert_same_state(optimizer, expected, assert_within)
    assert optimizer.param_groups[0]["lookahead_step"] == STEPS % K


@each_torch_optimizer
def test_around_torchs_optimizers_it_is_the_papers_too(config: Config) -> None:
    params, expected_params = parameters(), parameters()
    optimizer = lookahead(oracle(config), params, **config.kwargs)
    train(optimizer, params, STEPS)
    expected = plainly(lambda p: oracle(config)(p, **config.kwargs), expected_params, STEPS)
    assert_same_state(optimizer, expected, assert_within)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.clone(),
    lambda x: x.clone(memory_format=torch.channels_last),
    lambda x: x.mT.contiguous().mT,
    lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_optimizer
def test_the_slow_weights_have_the_bits_of_the_reference(
    config: Config, dtype: torch.dtype, two_threads: None
) -> None:
    """The k-th step is one without Lookahead and then reference(), rounded as it is stored."""
    tensors = [arrange(values((2, 3, 40, 50), i, dtype)) for i, arrange in enumerate(LAYOUTS)]
    tensors += [values((70_000,), 9, dtype), values((), 8, dtype), values((0, 3), 7, dtype)]
    params, plain_params = ([Parameter(x.clone()) for x in tensors] for _ in range(2))
    optimizer = lookahead(config.cls, params, **config.kwargs)
    plain = config.cls(plain_params, **config.kwargs)
    train(optimizer, params, K - 1)
    train(plain, plain_params, K - 1)
    slow = [optimizer.state[p]["slow"].clone() for p in params]
    for p, start in zip(slow, tensors, strict=True):
        assert_same_bits(p, start)
    train(optimizer, params, range(K - 1, K))
    train(plain, plain_params, range(K - 1, K))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for p, q, old in zip(params, plain_params, slow, strict=True):
        wide = [x.detach().to(compute).numpy() for x in (q, old)]
        new, _ = fusedopt.Lookahead.reference(*wide, alpha=ALPHA)
        correct = torch.as_tensor(new).to(dtype)
        assert same_bits(p, correct)
        assert same_bits(optimizer.state[p]["slow"], correct)


def test_slow_weights_of_another_layout_than_the_parameter() -> None:
    params = [Parameter(values((40, 30), 0))]
    optimizer = lookahead(fusedopt.SGD, params, lr=0.1)
    train(optimizer, params, 1)
    optimizer.state[params[0]]["slow"] = optimizer.state[params[0]]["slow"].t().contiguous().t()
    train(optimizer, params, range(1, K))
    expected_params = [Parameter(values((40, 30), 0))]
    expected = plainly(lambda p: torch.optim.SGD(p, lr=0.1), expected_params, K)
    assert_same_state(optimizer, expected, assert_within)


@each_optimizer
def test_a_late_gradient_and_a_missing_one(config: Config) -> None:
    first, late = parameters([(5,), (3, 4)])
    optimizer = lookahead(config.cls, [first, late], **config.kwargs)
    start = late.detach().clone()
    train(optimizer, [first], 2)
    assert_same_bits(late.detach(), start)
    train(optimizer, [first, late], range(2, 3))  # the k-th
    assert_same_bits(late.detach(), optimizer.state[late]["slow"])
    moved = late.detach().clone()
    late.grad = None
    for step in range(3, 7):
        set_gradients([first], step)
        optimizer.step()
    assert_same_bits(late.detach(), moved)


# ---- what passes through -------------------------------------------------------------------------


@pytest.mark.parametrize("torchs", [False, True])
@each_torch_optimizer
def test_checkpoints_in_the_middle(config: Config, torchs: bool) -> None:
    make = oracle(config) if torchs else config.cls
    params, expected_params = parameters(), parameters()
    expected = lookahead(make, expected_params, **config.kwargs)
    train(expected, expected_params, STEPS)
    optimizer = lookahead(make, params, **config.kwargs)
    for step in range(STEPS):
        train(optimizer, params, range(step, step + 1))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer = lookahead(make, params, **config.kwargs)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(optimizer, expected, assert_same_bits)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
def test_copies_go_on_like_the_original(module: Any, copied: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = lookahead(module.AdamW, params)
    train(optimizer, params, K + 1)
    other_params, other = copied((params, optimizer))
    assert (other.k, other.alpha) == (K, ALPHA)
    train(optimizer, params, range(K + 1, STEPS))
    train(other, other_params, range(K + 1, STEPS))
    assert_same_state(other, optimizer, assert_same_bits)


@pytest.mark.parametrize("through", ["checkpoint", "wrapped in mid-run"])
@each_torch_optimizer
def test_a_run_that_began_without_goes_on(config: Config, through: str) -> None:
    """Only the slow weights are new: momentum and counts are not."""
    params, expected_params = parameters(), parameters()
    expected = config.cls(expected_params, **config.kwargs)
    train(expected, expected_params, 5)
    plain = config.cls(params, **config.kwargs)
    train(plain, params, 3)
    middle = [p.detach().clone() for p in params]
    optimizer = fusedopt.Lookahead(plain, k=100)
    if through == "checkpoint":
        optimizer = fusedopt.Lookahead(config.cls(params, **config.kwargs), k=100)
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(optimizer, params, range(3, 5))
    for p, q, start in zip(params, expected_params, middle, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(optimizer.state[p]["slow"], start)


def test_hooks_of_checkpoints_fire() -> None:
    params = parameters()
    optimizer = lookahead(fusedopt.SGD, params, lr=0.1)
    fired: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: fired.append("pre"))
    optimizer.register_state_dict_post_hook(lambda *_: fired.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: fired.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: fired.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert fired == ["pre", "post", "load pre", "load post"]


def test_the_wrapped_optimizer_may_load_and_grow_by_itself() -> None:
    first, second = parameters([(3,), (4,)])
    optimizer = lookahead(fusedopt.SGD, [first], lr=0.1)
    plain = fusedopt.SGD([first], lr=0.1)
    optimizer.optimizer.load_state_dict(plain.state_dict())
    optimizer.optimizer.add_param_group({"params": [second]})
    train(optimizer, [first, second], K)
    assert_same_bits(second.detach(), optimizer.state[second]["slow"])


@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
def test_schedulers_and_hooks(module: Any) -> None:
    params, plain_params = parameters(), parameters()
    optimizer = fusedopt.Lookahead(module.SGD(params, lr=0.1, momentum=0.9), k=100)
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
        train(optimizer, params, range(step, step + 1))
        train(plain, plain_params, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    for p, q in zip(params, plain_params, strict=True):
        assert_within(p.detach(), q.detach())
    assert fired == ["outer pre", "inner pre", "outer post"] * 5


def test_slow_weights_that_are_none_are_made_in_the_next_step(gather: str) -> None:
    (p,) = parameters([(4,)])
    optimizer = lookahead(fusedopt.AdamW, [p])
    train(optimizer, [p], 1)
    expected = p.detach().clone()
    optimizer.state[p]["slow"] = None
    train(optimizer, [p], range(1, 2))
    assert_same_bits(optimizer.state[p]["slow"], expected)


def test_clipping_passes_through() -> None:
    params, plain_params = parameters(), parameters()
    optimizer: Any = lookahead(fusedopt.SGD, params, lr=0.1, max_grad_norm=0.5)
    plain = fusedopt.Lookahead(fusedopt.SGD(plain_params, lr=0.1), k=K, alpha=ALPHA)
    for step in range(4):
        set_gradients(params, step)
        set_gradients(plain_params, step)
        if step == 2:
            optimizer.max_grad_norm = None
            optimizer.clip_grad_norm_(0.5)
        torch.nn.utils.clip_grad_norm_([p for p in plain_params if p.numel()], 0.5)
        optimizer.step()
        plain.step()
        if step == 2:
            optimizer.max_grad_norm = 0.5
        assert optimizer.grad_norm.item() > 0.5
    assert optimizer.optimizer.max_grad_norm == 0.5
    assert_same_state(optimizer, plain, assert_within)


@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
@pytest.mark.parametrize("scaler_of", [torch.amp, fusedopt], ids=["torch", "fusedopt"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scalers_and_skipped_steps(module: Any, scaler_of: Any, fused: bool) -> None:
    """A step that is skipped does not count: the third that is made is the k-th."""
    params, plain_params = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    kwargs = {"amp_scaling": fused} if module is fusedopt else {"fused": fused}
    optimizer = lookahead(module.AdamW, params, **kwargs)
    plain = lookahead(torch.optim.AdamW, plain_params, foreach=False)
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
    assert optimizer.param_groups[0]["lookahead_step"] == 1
    assert_same_state(optimizer, plain, assert_within)


def test_skip_nonfinite_does_not_count() -> None:
    (p,) = parameters([(4,)])
    optimizer = lookahead(fusedopt.SGD, [p], lr=0.1, skip_nonfinite=True)
    p.grad = torch.full((4,), math.nan, dtype=torch.float64)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.param_groups[0]["lookahead_step"] == 0
    assert not optimizer.state


@pytest.mark.filterwarnings("ignore:fusedopt.SGD has no kernel")
def test_parameters_without_a_kernel_have_slow_weights_too() -> None:
    def trained(module: Any) -> Any:
        table, dense = parameters([(6, 3), (4,)])
        optimizer = lookahead(module.SGD, [table, dense], lr=0.1, momentum=0.9)
        for step in range(2 * K):
            index = torch.tensor([[step % 6, 4]])
            gradient = values((2, 3), step)
            table.grad = torch.sparse_coo_tensor(index, gradient, (6, 3), check_invariants=True)
            dense.grad = values((4,), 10 + step)
            optimizer.step()
        return optimizer

    assert_same_state(trained(fusedopt), trained(torch.optim), assert_within)


def test_closures() -> None:
    def trained(module: Any) -> Optimizer:
        params, step = parameters(), iter(range(K))
        optimizer: Optimizer = lookahead(module.SGD, params, lr=0.1)

        def closure() -> float:
            set_gradients(params, next(step))
            return 7.0

        assert [optimizer.step(closure) for _ in range(K)] == [7.0] * K
        return optimizer

    expected = plainly(lambda p: torch.optim.SGD(p, lr=0.1), parameters(), K)
    for module in (fusedopt, torch.optim):
        assert_same_state(trained(module), expected, assert_within)


def test_groups_that_are_added() -> None:
    first, second = parameters([(3,), (4,)])
    optimizer = lookahead(fusedopt.SGD, [first], lr=0.1)
    optimizer.add_param_group({"params": [second]})
    train(optimizer, [first, second], K)
    assert all(group["lookahead_step"] == 0 for group in optimizer.param_groups)
    assert_same_bits(second.detach(), optimizer.state[second]["slow"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "Invalid k value: 0, expected an integer, 1 or more"),
        ({"k": 2.5}, ValueError, "Invalid k value: 2.5, expected an integer, 1 or more"),
        ({"alpha": 0.0}, ValueError, "Invalid alpha value: 0.0, expected one in (0, 1]"),
        ({"alpha": -0.1}, ValueError, "Invalid alpha value: -0.1, expected one in (0, 1]"),
        ({"alpha": 1.5}, ValueError, "Invalid alpha value: 1.5, expected one in (0, 1]"),
        ({"alpha": math.nan}, ValueError, "Invalid alpha value: nan, expected one in (0, 1]"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        fusedopt.Lookahead(fusedopt.SGD(parameters(), lr=0.1), **arguments)
    assert str(raised.value) == message
    optimizer = fusedopt.Lookahead(fusedopt.SGD(parameters(), lr=0.1), k=3, alpha=0.25)
    ((name, value),) = arguments.items()
    with pytest.raises(error) as raised:
        setattr(optimizer, name, value)
    assert str(raised.value) == message
    assert (optimizer.k, optimizer.alpha) == (3, 0.25)


def test_it_wraps_optimizers_alone() -> None:
    for other in (parameters(), fusedopt.Lookahead(fusedopt.SGD(parameters(), lr=0.1))):
        with pytest.raises(TypeError, match="Lookahead wraps another optimizer, got"):
            fusedopt.Lookahead(other)  # type: ignore[arg-type]


def test_slow_weights_that_do_not_fit_are_an_error_that_changes_nothing() -> None:
    params = parameters([(3,), (4,)])
    optimizer = lookahead(fusedopt.SGD, params, lr=0.1)
    train(optimizer, params, K - 1)
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["slow"] = torch.ones(5, dtype=torch.float64)
    set_gradients(params, K)
    with pytest.raises(ValueError, match=r"slow of params\[1\] has shape \(5,\), expected \(4,\)"):
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q)
    assert optimizer.param_groups[0]["lookahead_step"] == K - 1


@pytest.mark.filterwarnings("ignore:fusedopt")
def test_slow_weights_that_do_not_fit_change_nothing_in_the_fallback_either() -> None:
    z, p = parameters([(4, 2), (3,)])
    z.data = torch.view_as_complex(z.data)
    optimizer = lookahead(fusedopt.SGD, [z, p], lr=0.1)
    z.grad, p.grad = torch.ones_like(z), torch.ones_like(p)
    optimizer.step()
    optimizer.state[z]["slow"] = torch.ones(5)
    before = [z.detach().clone(), p.detach().clone()]
    with pytest.raises(ValueError, match=r"slow of a parameter has shape \(5,\), expected \(4,\)"):
        optimizer.step()
    assert_same_bits(z.detach(), before[0])
    assert_same_bits(p.detach(), before[1])
