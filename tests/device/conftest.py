"""The CPU plays the GPU, unless there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusedopt import _core, _engine, _memory


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let the CPU play a GPU, unless there is one."""
    if request.config.getoption("--device") == "cuda":
        yield "cuda"
        return
    monkeypatch.setattr(_engine, "engine", _core.Engine(device="emulated"))
    yield "emulated"


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps be captured into a graph, as far as they can tell."""
    monkeypatch.setattr(_memory, "is_capturing", lambda _: True)
