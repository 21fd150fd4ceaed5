"""release_gradients: the bits of the plain run, without its gradients in memory."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from tests.ecosystem.common import OPTIMIZERS, backward, batch, each_name, make_model, train
from tests.helpers import assert_same_bits, assert_same_state, bits, run_script

STEPS = 5


def tied_model() -> nn.Sequential:
    """Return a model with a weight that gets its gradient from two layers."""
    model = make_model(5, 5)
    model.insert(3, nn.Linear(5, 5, dtype=torch.float64))
    model[3].weight = model[2].weight
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return weights and biases apart, with names."""
    apart: list[list[tuple[str, nn.Parameter]]] = [[], []]
    for name, p in model.named_parameters():
        apart[p.dim() == 1].append((name, p))
    return [{"params": apart[0]}, {"params": apart[1], "lr": 0.02}]


@each_name
def test_it_has_the_bits_of_the_plain_run(name: str) -> None:
    model, expected_model = tied_model(), tied_model()
    optimizer = OPTIMIZERS[name](groups(model))
    expected = OPTIMIZERS[name](groups(expected_model))
    fusedopt.release_gradients(model, optimizer)
    scheduler, expected_scheduler = (
        torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, expected)
    )
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        train(expected_model, expected, range(step, step + 1))
        scheduler.step()
        expected_scheduler.step()
    assert_same_state(optimizer, expected, assert_same_bits)


@each_name
def test_gradients_are_gone_and_step_changes_nothing(name: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    fusedopt.release_gradients(model, optimizer)
    backward(model, batch(0))
    assert all(p.grad is None for p in model.parameters())
    moved = [p.detach().clone() for p in model.parameters()]
    assert not any(torch.equal(p, q) for p, q in zip(moved, before, strict=True))
    optimizer.step()
    for p, q in zip(model.parameters(), moved, strict=True):
        assert_same_bits(p.detach(), q)


def test_each_is_stepped_while_backward_goes_on() -> None:
    model: Any = make_model()
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1)
    last, before = model[4].weight, model[4].weight.detach().clone()
    fusedopt.release_gradients(model, optimizer)
    seen = []

    def look(p: Tensor) -> None:
        seen.append((last.grad is None, torch.equal(last, before)))

    model[0].weight.register_post_accumulate_grad_hook(look)
    backward(model, batch(0))
    assert seen == [(True, False)]


# ---- the rest of a training loop -----------------------------------------------------------------


def test_removing_it_lets_gradients_stay() -> None:
    model, expected_model = make_model(), make_model()
    optimizer = fusedopt.AdamW(model.parameters())
    expected = fusedopt.AdamW(expected_model.parameters())
    with fusedopt.release_gradients(model, optimizer):
        train(model, optimizer, 2)
    train(model, optimizer, range(2, 4))
    assert all(p.grad is not None for p in model.parameters())
    train(expected_model, expected, 4)
    assert_same_state(optimizer, expected, assert_same_bits)
    fusedopt.release_gradients(model, optimizer).remove()
    optimizer.clip_grad_norm_(1.0)


def test_a_checkpoint_is_loaded_in_the_middle() -> None:
    model, expected_model = make_model(), make_model()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.5)
    expected = fusedopt.AdamW(expected_model.parameters())
    train(expected_model, expected, 2)
    fusedopt.release_gradients(model, optimizer)
    model.load_state_dict(expected_model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    train(model, optimizer, range(2, 4))
    train(expected_model, expected, range(2, 4))
    assert_same_state(optimizer, expected, assert_same_bits)


@pytest.mark.parametrize("name", ["AdamW", "Lookahead"])
def test_a_closure_makes_the_update(name: str) -> None:
    def trained(release: bool) -> Any:
        model = make_model()
        optimizer = OPTIMIZERS[name](model.parameters())
        if release:
            fusedopt.release_gradients(model, optimizer)
        for step in range(STEPS):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                return backward(model, batch(step))

            assert torch.is_tensor(optimizer.step(closure))
        return optimizer

    assert_same_state(trained(release=True), trained(release=False), assert_same_bits)


@pytest.mark.parametrize("name", ["AdamW", "Lookahead"])
def test_what_is_not_the_models_or_frozen_waits_for_step(name: str) -> None:
    def trained(release: bool) -> Any:
        model: Any = make_model()
        temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
        frozen = model[0].weight.requires_grad_(False)
        optimizer = OPTIMIZERS[name]([*model.parameters(), temperature])
        if release:
            fusedopt.release_gradients(model, optimizer)
        frozen.requires_grad_(True)
        for step in range(STEPS):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = backward(lambda x: model(x) * temperature, batch(step))
                assert frozen.grad is not None
                assert temperature.grad is not None
                assert (model[2].weight.grad is None) == release
                return loss

            optimizer.step(closure)
        return optimizer

    assert_same_state(trained(release=True), trained(release=False), assert_same_bits)


def test_what_has_no_kernel_is_released_too() -> None:
    def trained(release: bool) -> Any:
        torch.manual_seed(0)
        table = nn.Embedding(5, 2, sparse=True)
        optimizer = fusedopt.SGD(table.parameters(), lr=0.1)
        if release:
            fusedopt.release_gradients(table, optimizer)

        def step() -> None:
            optimizer.zero_grad()
            torch.autograd.backward(table(torch.tensor([0, 3])).square().sum())
            assert (table.weight.grad is None) == release
            optimizer.step()

        with pytest.warns(UserWarning, match="sparse gradients"):
            step()
        step()
        return optimizer

    assert_same_state(trained(release=True), trained(release=False), assert_same_bits)


# ---- what cannot be ------------------------------------------------------------------------------

NEEDS_ALL = "release_gradients frees each gradient .* need all at once"


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_norm_of_all_gradients_is_refused(options: dict[str, Any], wrapped: bool) -> None:
    model = make_model()
    optimizer: Any = fusedopt.AdamW(model.parameters(), **options)
    if wrapped:
        optimizer = fusedopt.Lookahead(optimizer)
    with pytest.raises(RuntimeError, match=NEEDS_ALL):
        fusedopt.release_gradients(model, optimizer)
    train(model, optimizer, 1)
    assert all(p.grad is not None for p in model.parameters())


LATER: dict[str, Callable[[Any], Any]] = {
    "max_grad_norm": lambda optimizer: setattr(optimizer, "max_grad_norm", 1.0),
    "skip_nonfinite": lambda optimizer: setattr(optimizer, "skip_nonfinite", True),
    "clip_grad_norm_": lambda optimizer: optimizer.clip_grad_norm_(1.0),
    "clip_grads_with_norm_": lambda optimizer: optimizer.clip_grads_with_norm_(1.0, 2.0),
    "GradScaler": lambda optimizer: _scaled_step(fusedopt.GradScaler("cpu"), optimizer),
}


def _scaled_step(scaler: Any, optimizer: Any) -> None:
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


@pytest.mark.parametrize("later", LATER)
def test_asking_for_all_gradients_later_changes_nothing(later: str) -> None:
    model = make_model()
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.release_gradients(model, optimizer)
    before = [bits(p).clone() for p in model.parameters()]

    def ask() -> None:
        LATER[later](optimizer)
        backward(model, batch(0))

    with pytest.raises(RuntimeError, match=NEEDS_ALL):
        ask()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(bits(p), q)


def test_it_is_refused_twice_and_for_other_optimizers() -> None:
    model = make_model()
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.release_gradients(model, optimizer)
    with pytest.raises(RuntimeError, match="released already"):
        fusedopt.release_gradients(model, optimizer)
    for other in (
        torch.optim.AdamW(model.parameters()),
        fusedopt.Lookahead(torch.optim.AdamW(model.parameters())),
    ):
        with pytest.raises(TypeError, match="optimizers of fusedopt, got AdamW"):
            fusedopt.release_gradients(model, other)


# ---- memory --------------------------------------------------------------------------------------

PEAK = """
import pathlib, re, torch, fusedopt

torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(40)))
optimizer = fusedopt.SGD(model.parameters(), lr=0.1)
if RELEASE:
    fusedopt.release_gradients(model, optimizer)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
# Not ru_maxrss, which a process inherits from the one that has started it.
status = pathlib.Path("/proc/self/status").read_text()
print(re.search("VmHWM:[ \\t]+([0-9]+) kB", status)[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_lower_by_the_gradients() -> None:
    # With a fixed threshold, glibc returns what is freed to the system instead of keeping some.
    environment = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    plain, released = (
        int(run_script(PEAK.replace("RELEASE", str(release)), **environment)) * 1024
        for release in (False, True)
    )
    gradients = 40 * 1024 * 1024 * 4
    # All but the one or two that backward holds at a time.
    assert 0.9 * gradients < plain - released < 1.05 * gradients
