"""torch.compile around training steps and models: right, silent, and nothing flipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from tests.ecosystem.common import OPTIMIZERS, backward, batch, each_name, loss_of, make_model
from tests.helpers import assert_same_bits, assert_same_state

STEPS = 5

# What one training step does between zero_grad and step.
LOOPS: dict[str, Callable[[Any], object]] = {
    "plain": lambda optimizer: None,
    "clip_grad_norm_": lambda optimizer: optimizer.clip_grad_norm_(0.1),
    "clip_grad_norm_ of the module": lambda optimizer: fusedopt.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], 0.1
    ),
}


@contextmanager
def silence() -> Iterator[None]:
    """Fail if anything is logged as a warning; warnings are errors in all tests."""

    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    log = Log(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("torch", "torch._dynamo", "torch._inductor")]
    for logger in loggers:
        logger.addHandler(log)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(log)
    assert messages == []


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    torch._dynamo.reset()


def trained(name: str, loop: str, *, compiled: bool, **options: Any) -> Any:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters(), **options)

    def train_step(x: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        LOOPS[loop](optimizer)
        optimizer.step()

    step = torch.compile(train_step, backend="eager") if compiled else train_step
    for i in range(STEPS):
        step(batch(i))
    return optimizer


def assert_compiling_changes_nothing(name: str, loop: str, **options: Any) -> None:
    expected = trained(name, loop, compiled=False, **options)
    with silence():
        actual = trained(name, loop, compiled=True, **options)
    assert_same_state(actual, expected, assert_same_bits)


@each_name
def test_a_compiled_training_step(name: str) -> None:
    assert_compiling_changes_nothing(name, "plain")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["AdamW", "Lookahead"])
def test_a_compiled_training_step_that_clips(name: str, loop: str) -> None:
    options = {"max_grad_norm": 0.1} if loop == "plain" else {}
    assert_compiling_changes_nothing(name, loop, **options)


@pytest.mark.parametrize("release", [False, True])
@each_name
def test_a_compiled_model_with_an_eager_step(name: str, release: bool) -> None:
    def run(compiled: bool) -> Any:
        model = make_model()
        optimizer = OPTIMIZERS[name](model.parameters())
        if release:
            fusedopt.release_gradients(model, optimizer)
        forward: Any = torch.compile(model, backend="aot_eager") if compiled else model
        for i in range(STEPS):
            optimizer.zero_grad()
            backward(forward, batch(i))
            optimizer.step()
        return optimizer

    expected = run(compiled=False)
    with silence():
        actual = run(compiled=True)
    assert_same_state(actual, expected, assert_same_bits)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "RAdam"])
def test_capturable_is_left_alone(name: str) -> None:
    optimizer = trained(name, "plain", compiled=True)
    assert [group["capturable"] for group in optimizer.param_groups] == [False]
    assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())
