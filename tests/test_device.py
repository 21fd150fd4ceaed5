"""What is a GPU's alone: tables of tensors, scalars folded there, verdicts nobody waits for.

Here the CPU plays the GPU: all but the launches is the text that runs there. With ``--device cuda``
the same tests run on a GPU, and those of tests/gpu with them.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import _core, _engine, _memory, clip
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    parameters,
    set_gradients,
    squares,
    train,
    values,
)
from tests.registry import CONFIGS, PLAIN_CONFIGS, Config

COUNTING = [config for config in CONFIGS if config.torch_cls and config.name != "SGD"]
CAPTURABLE = [config for config in COUNTING if "capturable" in config.cls([torch.ones(1)]).defaults]


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let the CPU play a GPU, unless there is one."""
    if request.config.getoption("--device") == "cuda":
        yield "cuda"
        return
    monkeypatch.setattr(_engine, "engine", _core.Engine(device="emulated"))
    yield "emulated"


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make and step parameters with the kernels of the CPU meanwhile."""
    with pytest.MonkeyPatch.context() as patch, torch.device("cpu"):
        patch.setattr(_engine, "engine", _core.Engine(device="none"))
        yield


def assert_same_everywhere(actual: Optimizer, expected: Optimizer) -> None:
    """Compare the bits of one optimizer on the device with those of one on the CPU."""
    assert_same_state(actual, expected, lambda a, b: assert_same_bits(a.cpu(), b.cpu()))


@contextmanager
def never_waiting() -> Iterator[None]:
    """Fail where the CPU asks for a number of the device."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            if torch.get_default_device().type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            else:
                for name in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu"):
                    patch.setattr(Tensor, name, lambda *_: pytest.fail("waited"))
            yield
        finally:
            if torch.get_default_device().type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat tables as in a graph that is captured: none may be uploaded."""
    monkeypatch.setattr(_memory, "is_capturing", lambda _: True)


# ---- tables and the walk over elements -----------------------------------------------------------


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
    monkeypatch.setattr(_memory, "is_capturing", lambda _: not upload)

    def trained() -> Any:
        params = [Parameter(values((n,), i, torch.float32)) for i, n in enumerate(sizes)]
        spare = Parameter(torch.ones(3))  # an optimizer needs one; it has no gradient
        optimizer = fusedopt.SGD([*params, spare], lr=0.1, momentum=0.9, max_grad_norm=0.1)
        train(optimizer, params, 2)
        return optimizer

    with on_cpu():
        expected = trained()
    actual = trained()
    assert_same_everywhere(actual, expected)
    if sizes:
        assert_same_bits(actual.grad_norm.cpu(), expected.grad_norm)


def test_a_table_of_many_learning_rates_is_cut(capturing: None) -> None:
    """Scalars lie in the arguments too: a group each leaves less space for tensors."""

    def trained() -> Optimizer:
        params = [Parameter(values((3,), i, torch.float32)) for i in range(700)]
        groups = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)]
        optimizer = fusedopt.SGD(groups, momentum=0.9)
        train(optimizer, params, 2)
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


# ---- scalars that the device folds ---------------------------------------------------------------


def assert_close_as_rounded(actual: Tensor, expected: Tensor) -> None:
    """Compare after a few steps whose scalars may differ by a unit of their last digit."""
    unit = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=16 * unit, atol=16 * unit)


def with_lr_on_device(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)


@pytest.mark.parametrize("config", CAPTURABLE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_capturable_steps_have_the_bits_of_others(
    config: Config, dtype: torch.dtype, device: str
) -> None:
    """fold() of each rule is _scalars() of its class; a late parameter has another count."""

    def trained(**options: Any) -> tuple[Optimizer, list[Any]]:
        params = parameters([(5,), (3, 4), (7,)], dtype)
        optimizer = config.cls(params, **{**config.kwargs, **options})
        train(optimizer, params[:2], 3)
        train(optimizer, params, range(3, 9))
        steps = [optimizer.state[p].pop("step") for p in params]
        return optimizer, steps

    (expected, counts), (actual, device_counts) = trained(), trained(capturable=True)
    # (A GPU's pow may differ from the CPU's in its last digit.)
    check = assert_same_bits if device == "emulated" else assert_close_as_rounded
    assert_same_state(actual, expected, check)
    assert [float(x) for x in device_counts] == [float(x) for x in counts] == [9, 9, 6]
    assert all(x.device == actual.param_groups[0]["params"][0].device for x in device_counts)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_learning_rate_on_the_device_gives_the_same_bits(config: Config) -> None:
    def trained(prepare: Callable[[Optimizer], None]) -> Optimizer:
        params = parameters([(5,), (3, 4)], torch.float32)
        optimizer = config.cls(params, **config.kwargs)
        prepare(optimizer)
        train(optimizer, params, 3)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5  # a tensor: in place
        train(optimizer, params, range(3, 8))
        return optimizer

    expected = trained(lambda _: None)
    assert_same_state(trained(with_lr_on_device), expected, assert_same_bits)


def test_a_learning_rate_is_read_when_the_device_gets_there() -> None:
    """Not by the CPU, which would have to wait."""
    params = parameters([(5,)], torch.float32)
    lr = torch.tensor(0.1)
    optimizer = fusedopt.Lion(params, lr=lr)
    set_gradients(params, 0)
    with never_waiting():
        optimizer.step()
    lr.fill_(0.0)
    before = params[0].detach().clone()
    train(optimizer, params, 1)
    assert_same_bits(params[0].detach(), before)


def test_a_step_that_the_cpu_counts_is_not_captured(capturing: None) -> None:
    """It would be the same one at each replay."""
    params = parameters([(5,)], torch.float32)
    set_gradients(params, 0)
    before = params[0].detach().clone()
    for optimizer in (fusedopt.AdamW(params), fusedopt.Adagrad(params)):
        with pytest.raises(RuntimeError, match=r"step of params\[0\].*pass capturable=True"):
            optimizer.step()
    lookahead = fusedopt.Lookahead(fusedopt.SGD(params, lr=0.1))
    with pytest.raises(RuntimeError, match="capture the wrapped optimizer's"):
        lookahead.step()
    assert_same_bits(params[0].detach(), before)
    fusedopt.AdamW(params, capturable=True).step()


def test_counts_that_become_capturable_move_before_the_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["capturable"] = True
    train(optimizer, params, range(1, 2))
    monkeypatch.setattr(_memory, "is_capturing", lambda _: True)
    train(optimizer, params, range(2, 3))
    assert float(optimizer.state[params[0]]["step"]) == 3


# ---- verdicts that nobody waits for --------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "skipping": {"skip_nonfinite": True},
    "both": {"max_grad_norm": 0.5, "skip_nonfinite": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_step_never_waits(config: Config, options: dict[str, Any]) -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = config.cls(params, **config.kwargs, **options)
    starts_unlike = config.kwargs.get("dampening") and "skip_nonfinite" in options
    for step in range(3):
        set_gradients(params, step)
        if starts_unlike and step == 0:  # that verdict is waited for
            optimizer.step()
            continue
        with never_waiting():
            optimizer.step()
    assert optimizer.grad_norm is None if not options else optimizer.grad_norm.dim() == 0


def test_pending_clips_never_wait() -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = fusedopt.AdamW(params, skip_nonfinite=True)
    set_gradients(params, 0)
    with never_waiting():
        norm = optimizer.clip_grad_norm_(0.5)
        optimizer.clip_grads_with_norm_(0.25, norm)
        optimizer.step()
        fusedopt.clip_grad_norm_(params, 0.1)


@pytest.mark.parametrize("special", [math.inf, math.nan])
@pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)
def test_a_skipped_step_changes_and_counts_nothing(config: Config, special: float) -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = config.cls(params, **config.kwargs, skip_nonfinite=True)
    clean_params = parameters([(5,), (3, 4)], torch.float32)
    clean = config.cls(clean_params, **config.kwargs)
    for step in range(5):
        set_gradients(params, step)
        if step in (0, 3):
            assert params[0].grad is not None
            params[0].grad[2] = special
            optimizer.step()
            assert optimizer.grad_norm is not None
            assert not optimizer.grad_norm.isfinite()
            continue
        optimizer.step()
        set_gradients(clean_params, step)
        clean.step()
    assert optimizer.skipped_steps == 2
    assert_same_state(optimizer, clean, lambda a, b: assert_same_bits(a.to(b.device), b))


def test_a_device_that_knows_of_infinities_skips_what_torch_steps() -> None:
    """Sparse gradients alone: the CPU makes the step, and has to wait for the verdict."""
    p = Parameter(torch.ones(4, 2))
    optimizer = fusedopt.SGD([p], lr=1.0, amp_scaling=True)
    p.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=True
    )
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]  # scalers do
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]  # scalers do
    optimizer.step()
    assert (p == 1).all()
    assert optimizer.skipped_steps == 1
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]  # scalers do
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer.step()
    assert (p[1] == 0.75).all()


def test_skipped_steps_are_added_up_in_place() -> None:
    """A graph repeats the addition, and has to find what it left."""
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.SGD(params, lr=0.1, skip_nonfinite=True)
    train(optimizer, params, 1)
    counter = optimizer._skipped_steps
    assert isinstance(counter, Tensor)
    params[0].grad = torch.full_like(params[0], math.nan)
    optimizer.step()
    assert optimizer._skipped_steps is counter
    assert optimizer.skipped_steps == 1


def test_coefficients_have_the_bits_of_the_cpus() -> None:
    norms = values((500,), 0).abs() * 3
    for norm in norms:
        actual = clip.coefficient(norm, 0.7)
        assert isinstance(actual, Tensor)
        assert float(actual) == _core.clip_coefficient(float(norm), 0.7)


def test_counts_move_to_the_device_when_it_may_skip() -> None:
    """And stay as they are."""
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.Adam(params)
    train(optimizer, params, 3)
    optimizer.skip_nonfinite = True
    train(optimizer, params, range(3, 5))
    step = optimizer.state[params[0]]["step"]
    assert (float(step), step.device) == (5.0, params[0].device)
    optimizer.skip_nonfinite = False
    train(optimizer, params, range(5, 6))
    assert float(optimizer.state[params[0]]["step"]) == 6.0

    plain_params = parameters([(5,)], torch.float32)
    plain = fusedopt.Adam(plain_params)
    train(plain, plain_params, 6)
    assert_same_bits(params[0].detach(), plain_params[0].detach())


def test_a_count_stays_where_it_is_if_the_step_fails() -> None:
    params = parameters([(5,), (3,)], torch.float32)
    optimizer = fusedopt.Adam(params)
    train(optimizer, params, 1)
    optimizer.skip_nonfinite = True
    step = optimizer.state[params[0]]["step"]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match="exp_avg of params"):
        train(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] is step


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_has_one_count_that_moves() -> None:
    (p,) = parameters([(5,)], torch.float32)
    optimizer = fusedopt.Adam([p, p])
    train(optimizer, [p], 2)
    optimizer.skip_nonfinite = True
    train(optimizer, [p], range(2, 4))
    assert float(optimizer.state[p]["step"]) == 8

    (q,) = parameters([(5,)], torch.float32)
    plain = fusedopt.Adam([q, q])
    train(plain, [q], 4)
    assert_same_bits(p.detach(), q.detach())


def test_the_first_step_of_dampened_momentum_waits_for_the_verdict() -> None:
    """A skipped one would leave a buffer of zeros, and the next step would not be a first one."""
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True)
    params[0].grad = torch.full_like(params[0], math.inf)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.skipped_steps == 1
    gradient = values((5,), 1, torch.float32)
    params[0].grad = gradient.clone()
    optimizer.step()
    assert_same_bits(optimizer.state[params[0]]["momentum_buffer"], gradient)


def test_messages_name_the_device(device: str) -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = fusedopt.Adam(params, capturable=True)
    train(optimizer, params, 1)
    step = optimizer.state[params[0]]["step"]
    optimizer.state[params[0]]["step"] = step.double()
    before = params[0].detach().clone()
    with pytest.raises(TypeError, match=r"step of params\[0\] is .*float64.*expected a float32"):
        train(optimizer, params, 1)
    assert_same_bits(params[0].detach(), before)


# ---- gradients that are not walked as the parameter is -------------------------------------------

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("arrange", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_gradient_has_the_bits_of_a_contiguous_one(
    arrange: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    p, q = (Parameter(values((6, 50), 0, dtype)) for _ in range(2))
    actual, expected = fusedopt.AdamW([p]), fusedopt.AdamW([q])
    for step in range(2):
        p.grad = arrange(values((6, 50), 1 + step, dtype))
        q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        before = p.grad.clone()
        actual.step()
        expected.step()
        assert_same_bits(p.grad, before)
    assert_same_state(actual, expected, assert_same_bits)


def test_gradients_of_another_precision() -> None:
    """Float64 gradients of float32 parameters, and the other way round: rounded once."""
    for dtype, other in [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)]:
        p, q = (Parameter(values((33,), 0, dtype)) for _ in range(2))
        actual, expected = fusedopt.Adam([p], lr=0.1), fusedopt.Adam([q], lr=0.1)
        gradient = values((33,), 1, other)
        _set_gradient_of_any_dtype(p, gradient)
        q.grad = gradient.to(dtype)
        actual.step()
        expected.step()
        assert_same_state(actual, expected, assert_same_bits)


def _set_gradient_of_any_dtype(p: Parameter, gradient: Tensor) -> None:
    data, p.data = p.data, p.data.to(gradient.dtype)
    p.grad = gradient
    p.data = data


def test_a_loss_goes_down() -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = fusedopt.AdamW(params, lr=0.1, max_grad_norm=1.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = squares(params, 1.0)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
