"""Tables of tensors, and the walk over their elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import _core, _engine, _memory
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    train,
    values,
)
from tests.registry import PLAIN_CONFIGS, Config


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make and step parameters with the kernels of the CPU meanwhile."""
    with pytest.MonkeyPatch.context() as patch, torch.device("cpu"):
        patch.setattr(_engine, "engine", _core.Engine(device="none"))
        yield


def assert_same_everywhere(actual: Optimizer, expected: Optimizer) -> None:
    """Compare the bits of one optimizer on the device with those of one on the CPU."""
    assert_same_state(actual, expected, lambda a, b: assert_same_bits(a.cpu(), b.cpu()))


@pytest.mark.parametrize(("size", "width"), [(4, 4), (8, 2), (2, 8), (4, 8)])
def test_every_element_is_visited_once(size: int, width: int) -> None:
    tile = _core.tile
    for numel in (1, width - 1, width, width + 1, tile - 1, tile, tile + 1, 3 * tile + width + 1):
        for misaligned in range(width + 1):
            address = 1 << 40 | misaligned * size
            ranges = [
                bounds
                for number in range(math.ceil(numel / tile))
                for bounds in _core.ranges_of_tile(address, size, width, numel, number)
            ]
            assert ranges[0][0] == 0
            assert ranges[-1][1] == numel
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
            # Whole groups lie at multiples of 16 bytes, and so can be accessed at once.
            whole = [first for first, end in ranges if end - first == width]
            assert all((address + first * size) % 16 == 0 for first in whole)
            assert len(whole) >= numel // width - 1 - 2 * math.ceil(numel / tile)


def test_more_elements_than_32_bits_count() -> None:
    numel = 3 * 2**32 + 5
    last = (numel - 1) // _core.tile
    ranges = _core.ranges_of_tile(1 << 40, 4, 4, numel, last)
    assert ranges[0][0] == last * _core.tile
    assert ranges[-1][1] == numel
    begins = [0, last + 1, 2 * (last + 1), 2**40]
    units = [0, last, last + 1, 2 * last + 2, 2**40 - 1, 2**40]
    assert [_core.item_of_unit(begins, unit) for unit in units] == [0, 0, 1, 2, 2, 3]


def test_items_without_elements_are_never_found() -> None:
    """Empty tensors first, twice in the middle, and last: they begin where the next one does."""
    begins = [0, 0, 3, 3, 3, 7]  # the items of 0, 3, 0, 0, 4 and 0 tiles
    assert [_core.item_of_unit(begins, unit) for unit in range(7)] == [1, 1, 1, 4, 4, 4, 4]


SIZES: dict[str, list[int]] = {
    "none": [],
    "one": [7],
    "empty alone": [0],
    "empty first and last": [0, 5, 0, 0, 4097, 3, 0],
    "a page of arguments": [3] * 50,
    "all arguments": [3] * 400,
    "uploaded": [n % 9 for n in range(2000)],
    "ten thousand": [1] * 10_000,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("upload", [True, False])
def test_any_number_of_tensors(
    sizes: list[int], upload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a norm and an update of each, against the same step on the CPU."""

    def trained() -> Any:
        monkeypatch.setattr(_memory, "is_capturing", lambda _: False)
        params = [Parameter(values((n,), i, torch.float32)) for i, n in enumerate(sizes)]
        spare = Parameter(torch.ones(3))  # an optimizer needs one; it has no gradient
        optimizer = fusedopt.SGD([*params, spare], lr=0.1, momentum=0.9, max_grad_norm=0.1)
        train(optimizer, params, 1)
        monkeypatch.setattr(_memory, "is_capturing", lambda _: not upload)
        train(optimizer, params, range(1, 3))
        return optimizer

    with on_cpu():
        expected = trained()
    actual = trained()
    assert_same_everywhere(actual, expected)
    if sizes:
        assert_same_bits(actual.grad_norm.cpu(), expected.grad_norm)


def test_a_table_of_many_learning_rates_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalars lie in the arguments too: a group each leaves less space for tensors."""

    def trained() -> Optimizer:
        params = [Parameter(values((3,), i, torch.float32)) for i in range(700)]
        groups = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)]
        optimizer = fusedopt.SGD(groups, momentum=0.9)
        monkeypatch.setattr(_memory, "is_capturing", lambda _: False)
        train(optimizer, params, 1)
        monkeypatch.setattr(_memory, "is_capturing", lambda _: True)
        train(optimizer, params, range(1, 3))
        return optimizer

    with on_cpu():
        expected = trained()
    assert_same_everywhere(trained(), expected)


@pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)
def test_parameters_that_share_memory_are_updated_in_their_order(config: Config) -> None:
    def trained() -> Optimizer:
        x = values((20_000,), 0, torch.float32)
        views = [x[:12_000], x[8_000:], x.view(-1, 4), x[5:9_000]]
        params = [Parameter(view) for view in views]
        optimizer = config.cls(params, **config.kwargs)
        train(optimizer, params, 2)
        return optimizer

    with on_cpu():
        expected = trained()
    assert_same_everywhere(trained(), expected)
