"""The memory modes through the life of an optimizer: checkpoints, exchange, and who else writes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import _codecs, _core, _engine
from tests.reference import same_bits
from tests.registry import Config
from tests.test_memory_modes import (
    MODES,
    Expected,
    check_against_spec,
    each_mode,
    each_plain_config,
    numbers_of,
    parameters,
    same_state,
    set_gradients,
)

SHAPES = [(64, 96), (130,), (70, 67)]
HALVES = [torch.bfloat16, torch.float16]


def train(optimizer: Any, params: list[Tensor], begin: int, end: int) -> None:
    for step in range(begin, end):
        set_gradients(params, step)
        optimizer.step()


def assert_alike(optimizer: Any, params: list[Tensor], other: Any, others: list[Tensor]) -> None:
    for p, q in zip(params, others, strict=True):
        assert same_bits(p.detach(), q.detach())
        state, expected = optimizer.state.get(p, {}), other.state.get(q, {})
        assert list(state) == list(expected)
        for key in state:
            assert same_state(state[key], expected[key]), key


def through_a_file(state_dict: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- pieces and threads --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
@pytest.mark.parametrize("mode", ["masters, 8 bits", "random, 8 bits", "masters"])
@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_and_threads_change_no_bit(name: str, mode: str, threads: int) -> None:
    params = parameters(torch.bfloat16, [(301, 1003), (333, 1024), (7, 40000), (20000, 33)])
    optimizer = getattr(fusedopt, name)(params, **MODES[mode])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_against_spec(optimizer, params, 2)
    finally:
        torch.set_num_threads(before)


@each_mode
@pytest.mark.parametrize("isa", fusedopt.isas())
def test_each_instruction_set_has_the_same_bits(
    mode: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_engine, "engine", _core.Engine(isa=isa))
    params = parameters(torch.bfloat16, [(64, 96), (70, 67), (300,), (4, 200, 32)])
    optimizer = fusedopt.AdamW(params, **MODES[mode])
    check_against_spec(optimizer, params, 3)


@each_mode
@pytest.mark.parametrize("special", [float("nan"), float("inf"), 3e38, 1e20, 1e-30, 0.0])
def test_special_gradients_are_the_reference_too(mode: str, special: float) -> None:
    params = parameters(torch.bfloat16, [(64, 96)])
    optimizer = fusedopt.AdamW(params, **MODES[mode])
    expected = Expected(optimizer, params[0], 0)
    for step in range(3):
        set_gradients(params, step)
        assert params[0].grad is not None
        params[0].grad[5, 3:60:7] = special
        optimizer.step()
        expected.step(params[0].grad)
        expected.assert_equal(params[0])


# ---- checkpoints ---------------------------------------------------------------------------------


@each_plain_config
@each_mode
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_resumed_run_goes_on_with_the_same_bits(
    config: Config, mode: str, dtype: torch.dtype
) -> None:
    params, others = parameters(dtype, SHAPES), parameters(dtype, SHAPES)
    whole = config.cls(params, **config.kwargs, **MODES[mode])
    train(whole, params, 0, 6)
    first = config.cls(others, **config.kwargs, **MODES[mode])
    train(first, others, 0, 3)
    resumed = config.cls(others, **config.kwargs, **MODES[mode])
    resumed.load_state_dict(through_a_file(first.state_dict()))
    train(resumed, others, 3, 6)
    assert_alike(resumed, others, whole, params)


@each_mode
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_with_the_same_bits(mode: str, way: str) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params, **MODES[mode])
    train(optimizer, params, 0, 2)
    copied = (
        copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    )
    others = copied.param_groups[0]["params"]
    for each, some in ((optimizer, params), (copied, others)):
        train(each, some, 2, 4)
    assert_alike(copied, others, optimizer, params)


@each_plain_config
@pytest.mark.parametrize("saved", MODES)
@pytest.mark.parametrize("loaded", MODES)
def test_any_mode_loads_a_checkpoint_of_any_other(config: Config, saved: str, loaded: str) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = config.cls(params, **config.kwargs, **MODES[saved])
    train(optimizer, params, 0, 3)
    others = [p.detach().clone().requires_grad_() for p in params]
    other = config.cls(others, **config.kwargs, **MODES[loaded])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params, others, strict=True):
        for name in optimizer._rule(optimizer.param_groups[0]).states:
            expected, got = numbers_of(optimizer.state[p], name), numbers_of(other.state[q], name)
            if MODES[loaded].get("state_dtype") == "mxfp8" and _codecs.is_large(p):
                assert other.state[q][name].dtype == torch.uint8
            # Half a digit, and what is least in a block, or in float16.
            size = expected.float().abs()
            allowed = size / 16 + size.max() * 2.0**-17 + 2.0**-24
            assert ((expected.float() - got.float()).abs() <= allowed).all(), name
        if MODES[loaded].get("master_weights") and MODES[saved].get("master_weights"):
            assert same_bits(other._master(q), optimizer._master(p))
    train(other, others, 3, 5)
    assert all(q.isfinite().all() for q in others)


@each_plain_config
@each_mode
def test_torch_goes_on_where_a_mode_was_and_back(config: Config, mode: str) -> None:
    if config.torch_cls is None:
        pytest.skip("torch has no optimizer of this name")
    params = parameters(torch.float32, SHAPES)
    optimizer = config.cls(params, **config.kwargs, **MODES[mode])
    train(optimizer, params, 0, 3)
    others = [p.detach().clone().requires_grad_() for p in params]
    torchs = config.torch_cls(others, **config.kwargs)
    torchs.load_state_dict(through_a_file(optimizer.torch_state_dict()))
    for p, q in zip(params, others, strict=True):
        assert set(torchs.state[q]) == {"step"} & set(torchs.state[q]) | set(
            optimizer._rule(optimizer.param_groups[0]).states
        )
        for name in optimizer._rule(optimizer.param_groups[0]).states:
            assert torch.equal(numbers_of(optimizer.state[p], name).float(), torchs.state[q][name])
    train(torchs, others, 3, 4)
    optimizer.load_state_dict(torchs.state_dict())
    train(optimizer, params, 4, 5)


def test_codes_without_their_scales_are_refused() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params, state_dtype="mxfp8")
    train(optimizer, params, 0, 1)
    broken = optimizer.state_dict()
    for state in broken["state"].values():
        state.pop("exp_avg_scale", None)
    others = parameters(torch.bfloat16, SHAPES)
    plain = fusedopt.AdamW(others)
    train(plain, others, 0, 1)
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(
        ValueError, match="exp_avg of a checkpoint has 8-bit codes, and there is no"
    ):
        plain.load_state_dict(broken)
    for i, state in plain.state_dict()["state"].items():
        assert all(same_state(value, before["state"][i][key]) for key, value in state.items())


# ---- masters and float32 models ------------------------------------------------------------------


def models() -> tuple[nn.Module, nn.Module]:
    """Return a float32 model, and the same in bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70), nn.LayerNorm(70), nn.Linear(70, 3))
    return model, copy.deepcopy(model).bfloat16()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_checkpoint_begins_a_model_with_masters(dtype: torch.dtype) -> None:
    model, _ = models()
    half = copy.deepcopy(model).to(dtype)
    options: dict[str, Any] = {"state_dtype": torch.float32, "master_weights": True}
    optimizer = fusedopt.AdamW(half.parameters(), **options)
    optimizer.load_master_state_dict(half, model.state_dict())
    expected = fusedopt.AdamW(model.parameters())
    for step in range(4):
        set_gradients(list(half.parameters()), step)
        for p, q in zip(model.parameters(), half.parameters(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.float()
        optimizer.step()
        expected.step()
    weights = optimizer.master_state_dict(half)
    for name, value in model.state_dict().items():
        assert same_bits(weights[name], value)


def test_masters_need_an_optimizer_that_keeps_them() -> None:
    model, half = models()
    optimizer = fusedopt.AdamW(half.parameters())
    before = copy.deepcopy(half.state_dict())
    with pytest.raises(ValueError, match="make it with master_weights=True"):
        optimizer.load_master_state_dict(half, model.state_dict())
    assert all(torch.equal(half.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("write", ["zero", "clamp", "load", "infinity"])
def test_what_somebody_else_writes_counts(dtype: torch.dtype, write: str) -> None:
    (p,) = parameters(dtype, [(64, 96)])
    optimizer = fusedopt.SGD([p], lr=0.0, momentum=0.9, master_weights=True)
    train(optimizer, [p], 0, 2)
    with torch.no_grad():
        if write == "zero":
            p.zero_()
        elif write == "clamp":
            p.clamp_(-0.5, 0.5)
        elif write == "load":
            p.copy_(parameters(dtype, [(64, 96)], seed=7)[0])
        else:
            p.fill_(float("inf"))
    written = p.detach().clone()
    train(optimizer, [p], 2, 3)
    assert same_bits(p.detach(), written)
    master = optimizer._master(p)
    assert not master.isnan().any()
    digit = torch.finfo(dtype).eps
    assert (
        (master - written.float()).nan_to_num().abs() <= written.float().abs() * digit
    ).all() or (write == "zero" and master.abs().max() < 1e-38)


# ---- steps that are left out, wrapped, or taken otherwise ----------------------------------------


@each_mode
def test_a_skipped_step_changes_nothing(mode: str) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params, skip_nonfinite=True, **MODES[mode])
    train(optimizer, params, 0, 2)
    expected = copy.deepcopy(optimizer)
    set_gradients(params, 2)
    assert params[0].grad is not None
    params[0].grad[3, 3] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_alike(optimizer, params, expected, expected.param_groups[0]["params"])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lookahead_with_masters_is_that_of_float32(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype, SHAPES), parameters(torch.float32, SHAPES)
    options: dict[str, Any] = {"state_dtype": torch.float32, "master_weights": True}
    optimizer = fusedopt.Lookahead(fusedopt.AdamW(ours, **options), k=2)
    expected = fusedopt.Lookahead(fusedopt.AdamW(theirs), k=2)
    for step in range(5):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        assert same_bits(optimizer._master(p), q.detach())
        assert same_bits(optimizer.state[p]["slow"], expected.state[q]["slow"])


@each_mode
def test_late_gradients_and_new_groups_are_stepped(mode: str) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = fusedopt.AdamW(params[:1], **MODES[mode])
    train(optimizer, params[:1], 0, 1)
    optimizer.add_param_group({"params": params[1:]})
    set_gradients(params, 1)
    params[2].grad = None
    optimizer.step()
    set_gradients(params, 2)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 2, 1]
    expected = Expected(optimizer, parameters(torch.bfloat16, SHAPES)[2], 2)
    assert params[2].grad is not None
    expected.step(params[2].grad)
    expected.assert_equal(params[2])


@each_mode
def test_gradients_are_released(mode: str) -> None:
    model = nn.Linear(96, 64).bfloat16()
    optimizer = fusedopt.AdamW(model.parameters(), **MODES[mode])
    handle = fusedopt.release_gradients(model, optimizer)
    model(torch.randn(4, 96).bfloat16()).sum().backward()
    assert model.weight.grad is None
    assert int(optimizer.state[model.weight]["step"]) == 1
    handle.remove()


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["fp8", torch.float64, torch.int8, 8])
def test_other_state_dtypes_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid state_dtype: .*, expected None, torch\.float32"):
        fusedopt.AdamW(parameters(torch.bfloat16), state_dtype=wrong)


@pytest.mark.parametrize("wrong", [-1, 1 << 64, 0.5, None])
def test_other_seeds_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid seed: .*, expected an integer"):
        fusedopt.AdamW(parameters(torch.bfloat16), seed=wrong)


def test_a_function_chooses_for_each_parameter() -> None:
    params = parameters(torch.bfloat16, [(64, 96), (10, 64), (64,)])
    optimizer = fusedopt.AdamW(params, state_dtype=lambda p: "mxfp8" if p.ndim > 1 else None)
    train(optimizer, params, 0, 2)
    dtypes = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert dtypes == [torch.uint8, torch.uint8, torch.bfloat16]


@pytest.mark.parametrize("answer", ["fp8", "mxfp8"])
def test_a_function_with_a_wrong_answer_is_refused(answer: str) -> None:
    params = parameters(torch.bfloat16, [(64,)])
    optimizer = fusedopt.AdamW(params, state_dtype=lambda _: answer)
    before = params[0].detach().clone()
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=r"state_dtype .*\(64,\)"):
        optimizer.step()
    assert torch.equal(params[0].detach(), before)
    assert not optimizer.state


def test_a_wrong_answer_comes_before_what_torch_steps() -> None:
    left_to_torch = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    params = [left_to_torch, *parameters(torch.bfloat16, [(64,)])]
    optimizer = fusedopt.AdamW(params, state_dtype=lambda p: "fp8" if p.shape == (64,) else None)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"state_dtype .*\(64,\)"):
        optimizer.step()
    assert torch.equal(left_to_torch, torch.ones(3, dtype=torch.complex64))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("remainder", torch.zeros(3, dtype=torch.int16), "expected an int16 tensor of shape"),
        ("remainder", torch.zeros(64, 96), "expected an int16 tensor of shape"),
        (
            "exp_avg_scale",
            torch.zeros(64, 2, dtype=torch.uint8),
            r"uint8 tensor of shape \(64, 3\)",
        ),
        ("exp_avg_sq_scale", torch.zeros(64, 3), r"expected a uint8 tensor of shape \(64, 3\)"),
        ("rounding", torch.zeros(()), "expected an int64 tensor on cpu with one element"),
        ("exp_avg", torch.zeros(64, 96, dtype=torch.int16), "expected a strided float32"),
    ],
)
def test_parts_of_another_kind_are_refused(key: str, value: Tensor, message: str) -> None:
    params = parameters(torch.bfloat16, [(64, 96)])
    optimizer = fusedopt.AdamW(params, master_weights=True, state_dtype="mxfp8")
    train(optimizer, params, 0, 1)
    optimizer.state[params[0]][key] = value
    before = params[0].detach().clone()
    set_gradients(params, 1)
    with pytest.raises((ValueError, TypeError), match=rf"^{key} of params\[0\] is .*{message}"):
        optimizer.step()
    assert torch.equal(params[0].detach(), before)


@pytest.mark.parametrize("key", ["remainder", "exp_avg_scale", "rounding"])
def test_parts_that_are_missing_are_made(key: str) -> None:
    params = parameters(torch.bfloat16, [(64, 96)])
    optimizer = fusedopt.AdamW(params, master_weights=True, state_dtype="mxfp8")
    train(optimizer, params, 0, 1)
    del optimizer.state[params[0]][key]
    train(optimizer, params, 1, 2)
    assert key in optimizer.state[params[0]]
