"""What profilers see of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer

import fusedopt
from fusedopt import _engine
from tests.helpers import (
    each_optimizer,
    parameters,
    train,
)
from tests.registry import Config


@each_optimizer
def test_the_profiler_sees_the_step(config: Config) -> None:
    params = parameters()
    optimizer = config.cls(params, **config.kwargs)
    with torch.autograd.profiler.profile() as profile:
        train(optimizer, params, 1)
    assert f"Optimizer.step#{config.name}.step" in {event.name for event in profile.function_events}


def test_profilers_of_python_find_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a method that does nothing, called between the update and the hooks."""
    params = parameters()
    optimizer = fusedopt.AdamW(params)
    called: list[str] = []
    monkeypatch.setattr(Optimizer, "_optimizer_step_code", lambda _: called.append("code"))
    train(optimizer, params, 1)
    optimizer.register_step_post_hook(lambda *_: called.append("hook"))
    train(optimizer, params, 1)
    assert called == ["code", "code", "hook"]


def test_an_execution_trace_sees_the_step(tmp_path: Path) -> None:
    """Which is no profiler, and on all threads."""
    params = parameters()
    optimizer = fusedopt.AdamW(params)
    observer = torch.profiler.ExecutionTraceObserver()
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    train(optimizer, params, 1)
    observer.stop()
    observer.unregister_callback()
    assert "Optimizer.step#AdamW.step" in (tmp_path / "trace.json").read_text()


@pytest.mark.cpu_only("with CUDA, all steps are recorded")
@pytest.mark.skipif(not _engine.engine.fast_gather, reason="nobody knows whether somebody watches")
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, fusedopt.Lookahead])
def test_a_step_that_nobody_watches_is_not_recorded(
    wrap: Callable[[Optimizer], Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 50 us when what that needs is not in cache."""
    params = parameters()
    optimizer = wrap(fusedopt.AdamW(params))
    monkeypatch.delattr(torch.autograd.profiler, "record_function")
    train(optimizer, params, 1)
    with torch.autograd.profiler.profile(), pytest.raises(AttributeError, match="record_function"):
        train(optimizer, params, 1)
