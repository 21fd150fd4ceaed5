"""Statistics of a step: right for every optimizer, dtype and layout, the same bits everywhere."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import _core, _engine
from tests.helpers import (
    ENGINES,
    all_params,
    assert_same_bits,
    each_config,
    each_dtype,
    each_isa,
    each_layout,
    each_optimizer,
    parameters,
    set_gradients,
    values,
)
from tests.registry import GRADIENT_LAYOUTS, LAYOUTS, Config
from tests.statistics_oracle import assert_are, watched

SHAPES: list[tuple[int, ...]] = [(5,), (64, 96), (), (0, 3), (3, 4097), (7, 5, 3, 2)]
VECTORS = ("grad_norm", "nonfinite", "param_norm", "update_norm", "unmoved")
MODES: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 0.5},
    {"master_weights": True},
    {"stochastic_rounding": True, "max_grad_norm": 0.5},
    {"state_dtype": "mxfp8"},
    {"state_dtype": lambda p: "mxfp8" if p.ndim > 1 else torch.float32, "master_weights": True},
]

each_mode = pytest.mark.parametrize("mode", range(len(MODES)))


def assert_steps_are_watched(optimizer: Any, steps: int = 3) -> None:
    params = all_params(optimizer)
    for step in range(steps):
        set_gradients(params, step)
        assert_are_of_step(optimizer)


def assert_are_of_step(optimizer: Any) -> None:
    expected = watched(optimizer, optimizer.step)
    assert_are(optimizer.statistics, expected)


# ---- right ---------------------------------------------------------------------------------------


@each_dtype
@each_config
def test_of_every_rule(config: Config, dtype: torch.dtype) -> None:
    params = parameters(SHAPES, dtype)
    assert_steps_are_watched(config.cls(params, track_statistics=True, **config.kwargs))


@each_mode
@each_dtype
@each_optimizer
def test_of_every_mode(config: Config, dtype: torch.dtype, mode: int) -> None:
    params = parameters(SHAPES, dtype)
    assert_steps_are_watched(
        config.cls(params, track_statistics=True, **config.kwargs, **MODES[mode])
    )


@each_dtype
@each_layout
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["", "clipped"])
def test_of_every_layout(layout: str, dtype: torch.dtype, max_norm: float | None) -> None:
    params = [Parameter(LAYOUTS[layout](values((5, 6, 7, 20), 1, dtype))) for _ in range(2)]
    optimizer = fusedopt.AdamW(params, track_statistics=True, max_grad_norm=max_norm)
    for step, gradient in enumerate(GRADIENT_LAYOUTS):
        for p in params:
            p.grad = gradient(values(tuple(p.shape), step, dtype))
        assert_are_of_step(optimizer)


def test_of_gradients_and_states_of_other_dtypes() -> None:
    for dtype, state_dtype in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        params = parameters(SHAPES, torch.float32)
        for p in params:
            p.grad_dtype = dtype
            p.grad = values(tuple(p.shape), 3, dtype)
        optimizer = fusedopt.Adam(params, track_statistics=True, state_dtype=state_dtype)
        assert_are_of_step(optimizer)


def test_of_gradients_that_are_not_finite() -> None:
    for max_norm in (None, 1.0):
        params = parameters(SHAPES, torch.float32)
        set_gradients(params, 0)
        big = params[4].grad
        assert big is not None
        big[1, 7] = big[2, 4000] = float("inf")
        big[0, 0] = float("nan")
        optimizer = fusedopt.SGD(params, lr=0.1, track_statistics=True, max_grad_norm=max_norm)
        optimizer.step()
        assert optimizer.statistics is not None
        assert optimizer.statistics.nonfinite.tolist() == [0, 0, 0, 0, 3, 0]


@pytest.mark.parametrize("scale", [1e-22, 1e10])
def test_of_large_numbers_and_of_tiny_ones(scale: float) -> None:
    """Which float32 could not square, or could not add up."""
    p = Parameter(values((5000,), 1, torch.float32) * scale)
    p.grad = values((5000,), 2, torch.float32) * scale
    assert_are_of_step(fusedopt.SGD([p], lr=0.1, track_statistics=True))


def test_unmoved_tells_of_bfloat16_that_stands_still() -> None:
    p, healthy = (Parameter(torch.full((1000,), 256.0, dtype=torch.bfloat16)) for _ in range(2))
    plain = fusedopt.SGD([p], lr=0.125, track_statistics=True)
    for q in (p, healthy):
        q.grad = torch.ones_like(q)
    p.grad[:10] = 100.0  # type: ignore[index]
    plain.step()
    statistics = plain.statistics
    assert statistics is not None
    assert statistics.unmoved.tolist() == [990.0]
    assert statistics.unmoved_share.tolist() == [0.99]
    with_masters = fusedopt.SGD([healthy], lr=0.125, track_statistics=True, master_weights=True)
    with_masters.step()
    assert with_masters.statistics is not None
    assert with_masters.statistics.unmoved.isnan().all()
    torch.testing.assert_close(
        with_masters.statistics.update_norm, torch.tensor([0.125 * 1000**0.5]).double()
    )


# ---- the same bits -------------------------------------------------------------------------------


def bits_of_steps(engine: _core.Engine, threads: int, config: Config, dtype: Any, mode: int) -> Any:
    before, threads_before = _engine.engine, torch.get_num_threads()
    _engine.engine = engine
    torch.set_num_threads(threads)
    try:
        params = parameters([(3, 70001), (5,), (64, 96), (33, 31)], dtype)
        optimizer = config.cls(params, track_statistics=True, **config.kwargs, **MODES[mode])
        found = []
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
            found += [getattr(optimizer.statistics, name) for name in VECTORS]
        return found
    finally:
        _engine.engine = before
        torch.set_num_threads(threads_before)


@pytest.mark.cpu_only("names its engines")
@each_isa
@each_mode
@each_dtype
def test_same_bits_for_any_instruction_set_and_threads(
    isa: str, dtype: torch.dtype, mode: int
) -> None:
    config = Config("AdamW", {"lr": 0.01})
    expected = bits_of_steps(ENGINES["generic"], 1, config, dtype, mode)
    for threads in (1, 2):
        actual = bits_of_steps(ENGINES[isa], threads, config, dtype, mode)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)


def test_same_bits_with_and_without_a_norm() -> None:
    """In a step that clips, the sums of gradients are those of the norm."""
    found = []
    for max_norm in (None, float("inf")):
        params = parameters([(3, 70001), (5,)], torch.float32)
        set_gradients(params, 0)
        optimizer = fusedopt.AdamW(params, track_statistics=True, max_grad_norm=max_norm)
        optimizer.step()
        found.append([getattr(optimizer.statistics, name) for name in VECTORS])
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


@each_optimizer
def test_they_change_no_bit_of_a_step(config: Config) -> None:
    found = []
    for track in (False, True):
        params = parameters([(3, 5001), (5,), (64, 96)], torch.bfloat16)
        optimizer = config.cls(
            params, track_statistics=track, stochastic_rounding=True, **config.kwargs
        )
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        found.append(params)
    for p, q in zip(*found, strict=True):
        assert_same_bits(p, q)


# ---- when ----------------------------------------------------------------------------------------


def test_none_by_default() -> None:
    params = parameters()
    optimizer = fusedopt.Adam(params)
    assert "track_statistics" not in optimizer.defaults
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.statistics is None
    assert all("track_statistics" not in group for group in optimizer.param_groups)


def test_every_nth_step_and_on_request() -> None:
    params = parameters()
    optimizer = fusedopt.Adam(params, track_statistics=3)
    found: list[Any] = []
    for step in range(7):
        if step == 3:
            optimizer.request_statistics()
        set_gradients(params, step)
        optimizer.step()
        found.append(optimizer.statistics)
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert found[3] not in (None, found[2])
    assert found[3] is found[4]
    assert found[5] not in (None, found[4])
    assert found[6] is found[5]


def test_they_are_no_part_of_checkpoints_and_copies() -> None:
    params = parameters()
    optimizer = fusedopt.Adam(params, track_statistics=True)
    plain = fusedopt.Adam(parameters())
    for each in (optimizer, plain):
        set_gradients(all_params(each), 0)
        each.step()
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    for made in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert made.track_statistics is True
        assert made.statistics is None


@pytest.mark.parametrize("every", [-1, 1.5, "often", None])
def test_what_is_no_number_of_steps_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match="track_statistics"):
        fusedopt.SGD(parameters(), lr=0.1, track_statistics=every)


# ---- what they look like -------------------------------------------------------------------------


def named() -> tuple[list[Parameter], Any]:
    params = parameters([(5,), (3, 4), (2,), (6,)], torch.float32)
    names = ["a.bias", "a.weight", "b", "c"]
    groups: list[dict[str, Any]] = [
        {"params": list(zip(names[:2], params[:2], strict=True))},
        {"params": list(zip(names[2:], params[2:], strict=True)), "lr": 0.01},
    ]
    return params, fusedopt.AdamW(groups, track_statistics=True)


def test_names_and_the_order_of_parameters() -> None:
    params, optimizer = named()
    set_gradients(params, 0)
    params[2].grad = None
    optimizer.step()
    assert optimizer.statistics.names == ["a.bias", "a.weight", "c"]
    assert optimizer.statistics.numel.tolist() == [5, 12, 6]
    unnamed = fusedopt.SGD([{"params": params[:2]}, {"params": params[2:]}], track_statistics=True)
    unnamed.step()
    assert unnamed.statistics is not None
    assert unnamed.statistics.names == ["group0.param0", "group0.param1", "group1.param1"]


def test_groups_and_total_are_sums() -> None:
    params, optimizer = named()
    set_gradients(params, 0)
    params[1].data = params[1].data.bfloat16()
    params[1].grad = torch.ones(3, 4, dtype=torch.bfloat16)
    optimizer.step()
    statistics = optimizer.statistics
    groups, total = statistics.groups(), statistics.total()
    assert groups.names == ["group0", "group1"]
    assert groups.numel.tolist() == [17, 8]
    for vector in ("grad_norm", "param_norm", "update_norm"):
        each = getattr(statistics, vector)
        torch.testing.assert_close(
            getattr(groups, vector), torch.stack([each[:2].norm(), each[2:].norm()])
        )
        torch.testing.assert_close(getattr(total, vector), each.norm().reshape(1))
    assert groups.unmoved[0] == statistics.unmoved[1]
    assert groups.unmoved[1].isnan()
    assert groups.unmoved_share[0] == statistics.unmoved[1] / 12
    assert total.groups().names == ["group0"]


def test_a_dict_of_names_to_numbers() -> None:
    params, optimizer = named()
    set_gradients(params, 0)
    optimizer.step()
    found = optimizer.statistics.to_dict("train/")
    assert found["train/grad_norm/a.weight"] == float(optimizer.statistics.grad_norm[1])
    assert found["train/update_ratio/c"] == float(optimizer.statistics.update_ratio[3])
    assert len(found) == 5 * 4
    assert all(isinstance(value, (int, float)) for value in found.values())


def test_without_any_gradient() -> None:
    optimizer = fusedopt.Adam(parameters(), track_statistics=True)
    optimizer.step()
    assert optimizer.statistics is not None
    assert optimizer.statistics.names == []
    assert optimizer.statistics.to_dict() == {}
    assert optimizer.statistics.grad_norm.shape == (0,)


def test_vectors_are_where_the_parameters_are() -> None:
    params, optimizer = named()
    set_gradients(params, 0)
    optimizer.step()
    for name in (*VECTORS, "numel", "unmoved_share", "update_ratio"):
        assert getattr(optimizer.statistics, name).device == params[0].device
