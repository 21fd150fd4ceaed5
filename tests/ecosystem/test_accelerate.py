"""accelerate: every optimizer trains as torch's does there; nothing is needed but the class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim.lr_scheduler import ExponentialLR

import fusedopt
from tests.ecosystem.common import OPTIMIZERS, each_name, torchs
from tests.ecosystem.digits import EXACT, loss_of, make_loader, make_model, watch
from tests.helpers import assert_same_bits, assert_same_state, assert_within

BATCHES, ACCUMULATE = 12, 2
MAX_NORM = 0.1  # each step is clipped

Make = Callable[[Any], Any]


class Run(NamedTuple):
    accelerator: Any
    model: Any
    optimizer: Any  # accelerate's, around what is tested
    scheduler: Any
    loader: Any

    @property
    def inside(self) -> Any:
        return self.optimizer.optimizer


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Forget what the last Accelerator left for all the next ones."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def start(
    make: Make,
    *,
    dtype: torch.dtype = torch.float64,
    scaler: Any = None,
    precision: str = "no",
    gamma: float = 0.5,
) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATE, mixed_precision=precision
    )
    if scaler:  # which accelerate has for float16 on a GPU alone; torch has it on a CPU, too
        accelerator.native_amp, accelerator.scaler = True, scaler
    model = make_model(dtype)
    optimizer = make(model.parameters())
    scheduler = ExponentialLR(optimizer, gamma)
    return Run(
        accelerator, *accelerator.prepare(model, optimizer, scheduler, make_loader(BATCHES, dtype))
    )


def train(run: Run, batches: range = range(BATCHES), *, clip: bool = False) -> list[Any]:
    """Train on these batches; return the loss of each, and what there is to know of each step."""
    found: list[Any] = []
    run.model.train()
    loader = run.accelerator.skip_first_batches(run.loader, batches.start)
    for _, batch in zip(batches, loader, strict=False):
        with run.accelerator.accumulate(run.model):
            loss = loss_of(run.model, batch)
            run.accelerator.backward(loss)
            if clip and run.accelerator.sync_gradients:
                run.accelerator.clip_grad_norm_(run.model.parameters(), MAX_NORM)
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()
        found.append((loss.item(), run.optimizer.step_was_skipped, run.scheduler.get_last_lr()))
    return found


def losses(found: list[Any]) -> torch.Tensor:
    return torch.tensor([loss for loss, *_ in found], dtype=torch.float64)


# ---- torch's numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["accelerator clips", "the step clips"])
@each_name
def test_losses_are_those_of_torchs(name: str, inside: bool) -> None:
    """In float64, where the two texts of a rule differ by roundings of 2^-53 alone."""
    options = {"max_grad_norm": MAX_NORM} if inside else {}
    actual = start(lambda params: OPTIMIZERS[name](params, **options))
    found = train(actual, clip=not inside)
    expected = start(lambda params: torchs(name, params))
    torch_found = train(expected, clip=True)
    assert_within(losses(found), losses(torch_found))
    assert_same_state(actual.inside, expected.inside, assert_within)
    assert actual.scheduler.get_last_lr() == expected.scheduler.get_last_lr()
    assert expected.scheduler.get_last_lr()[0] < expected.inside.defaults["lr"]


def test_the_step_clips_once_for_all_that_was_accumulated() -> None:
    norms = []
    run = start(lambda params: fusedopt.SGD(params, lr=0.1, max_grad_norm=MAX_NORM))
    run.inside.register_step_post_hook(lambda optimizer, *_: norms.append(optimizer.grad_norm))
    train(run)
    assert len(norms) == BATCHES // ACCUMULATE
    assert min(norms) > MAX_NORM


def test_in_bfloat16_it_has_torchs_bits() -> None:
    def trained(cls: Any) -> Any:
        run = start(lambda params: cls(params, **EXACT), dtype=torch.float32, precision="bf16")
        return train(run), run.inside

    (found, optimizer), (torch_found, expected) = trained(fusedopt.SGD), trained(torch.optim.SGD)
    assert found == torch_found
    assert_same_state(optimizer, expected, assert_same_bits)


# ---- float16 -------------------------------------------------------------------------------------


def scaled(
    make: Make, scaler: Any = torch.amp.GradScaler, *, clip: bool = False, gamma: float = 0.5
) -> Any:
    """Train with a scale at which gradients overflow now and then; it is a power of two."""
    scaling = scaler("cpu", init_scale=2.0**22, growth_interval=2)
    run = start(make, dtype=torch.float32, scaler=scaling, precision="fp16", gamma=gamma)
    found = train(run, clip=clip)
    return run, found, scaling.get_scale()


def test_skipped_steps_are_told_and_not_scheduled() -> None:
    run, found, scale = scaled(lambda params: fusedopt.SGD(params, **EXACT))
    expected, torch_found, torch_scale = scaled(lambda params: torch.optim.SGD(params, **EXACT))
    assert found == torch_found
    assert {skipped for _, skipped, _ in found} == {False, True}
    assert scale == torch_scale
    assert_same_state(run.inside, expected.inside, assert_same_bits)


def test_the_accelerators_clipping_has_torchs_bits() -> None:
    run, found, scale = scaled(lambda params: fusedopt.SGD(params, **EXACT), clip=True)
    expected, torch_found, torch_scale = scaled(
        lambda params: torch.optim.SGD(params, **EXACT), clip=True
    )
    assert (found, scale) == (torch_found, torch_scale)
    assert_same_state(run.inside, expected.inside, assert_same_bits)


SCALERS = [torch.amp.GradScaler, fusedopt.GradScaler]
each_scaler = pytest.mark.parametrize("scaler", SCALERS, ids=["torch", "fusedopt"])


@each_scaler
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_the_step_clips_what_is_unscaled(amp_scaling: bool, scaler: Any) -> None:
    watched: list[list[float]] = []

    def make(params: Any) -> Any:
        optimizer = fusedopt.SGD(
            params, lr=2.0**-4, max_grad_norm=MAX_NORM, amp_scaling=amp_scaling
        )
        watched.append(watch(optimizer, MAX_NORM))
        return optimizer

    scaled(make, scaler)
    finite = [norm for norm in watched[0] if math.isfinite(norm)]
    assert len(finite) > 2
    assert min(finite) > MAX_NORM


@each_scaler
def test_a_skip_inside_the_step_is_counted_there(scaler: Any) -> None:
    """accelerate calls a step skipped if the scaler has not called it: here it has."""
    run, found, scale = scaled(
        lambda params: fusedopt.SGD(params, **EXACT, amp_scaling=True), scaler, gamma=1.0
    )
    expected, torch_found, torch_scale = scaled(
        lambda params: torch.optim.SGD(params, **EXACT), gamma=1.0
    )
    assert scale == torch_scale
    assert_same_bits(losses(found), losses(torch_found))
    assert_same_state(run.inside, expected.inside, assert_same_bits)
    skipped = [skipped for _, skipped, _ in torch_found[ACCUMULATE - 1 :: ACCUMULATE]]
    assert run.inside.skipped_steps == sum(skipped) > 0
    assert not any(skipped for _, skipped, _ in found)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@each_name
def test_a_resumed_run_has_the_bits_of_the_whole(name: str, precision: str, tmp_path: Path) -> None:
    def begin(seed: int) -> Run:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22) if precision == "fp16" else None
        run = start(
            lambda params: OPTIMIZERS[name](params, max_grad_norm=MAX_NORM),
            dtype=torch.float32,
            scaler=scaler,
            precision=precision,
        )
        torch.manual_seed(seed)
        return run

    middle = BATCHES // 2
    whole = begin(1)
    train(whole, range(middle))
    whole.accelerator.save_state(tmp_path)
    expected = train(whole, range(middle, BATCHES))
    resumed = begin(2)
    resumed.accelerator.load_state(tmp_path)
    assert train(resumed, range(middle, BATCHES)) == expected
    assert_same_state(resumed.inside, whole.inside, assert_same_bits)
