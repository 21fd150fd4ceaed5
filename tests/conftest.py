"""Fixtures that several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fusedopt import _core, _engine
from tests.helpers import slow_gather
from tests.registry import NOT_FOR

torch.set_warn_always(True)  # or a test would pass because an earlier one has used up a warning


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "emulated", "cuda"],
        default="cpu",
        help="where parameters are: cuda makes new tensors there, emulated lets the CPU play a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(why): not a test of what devices do")
    device = config.getoption("--device")
    if device == "emulated":
        _engine.engine = _core.Engine(device="emulated")
    if device == "cuda":
        torch.set_default_device("cuda")
        # What switching on the check for waiting warns of, in tests that do.
        config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode:UserWarning")
    if device != "cpu":
        # There, torch steps what is not an array; the numbers are still to be right.
        config.addinivalue_line("filterwarnings", "ignore:fusedopt.* has no kernel for:UserWarning")


def _is_for_its_optimizer(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    optimizer = getattr(params.get("config"), "name", params.get("name", ""))
    return getattr(item, "originalname", item.name) not in NOT_FOR.get(optimizer, {})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = filter(_is_for_its_optimizer, items)
    if config.getoption("--device") == "cpu":
        return
    others = [item for item in items if item.get_closest_marker("cpu_only")]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if not item.get_closest_marker("cpu_only")]


@pytest.fixture(params=["fast", "slow"])
def gather(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with both ways in which the engine reads tensors."""
    if request.param == "fast":
        yield request.param
        return
    with slow_gather():
        yield request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Step on two threads, as far as the work is enough for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
