"""Between a clip and its step anything may happen: the numbers are torch's, or there is an error.

The rows are those of the table in docs/integrations.md, and the oracle is torch's function, which
scales at once, with torch's optimizer.
"""

from __future__ import annotations

import copy
import math
import pathlib
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests.helpers import all_params, assert_same_bits, assert_within, set_gradients, values

SHAPES = [(5,), (3, 4), (2,)]
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "integrations.md"


class Loop:
    """A training loop as a user writes it, with either library."""

    def __init__(self, cls: Any, params: Sequence[Tensor] | None = None, **kwargs: Any) -> None:
        if params is None:
            params = [Parameter(values(shape, i)) for i, shape in enumerate(SHAPES)]
        self.params = list(params)
        self.optimizer = cls(self.params, lr=0.1, momentum=0.9, **kwargs)
        self.is_ours = cls is fusedopt.SGD

    def backward(self, seed: int, scale: float = 3.0) -> None:
        """Add gradients to those that are there, as autograd does."""
        for i, p in enumerate(self.params):
            gradient = values(tuple(p.shape), 100 * seed + i) * scale
            if p.grad is None:
                p.grad = gradient
            else:
                p.grad += gradient

    def clip(self, max_norm: float = 0.5) -> None:
        if self.is_ours:
            self.optimizer.clip_grad_norm_(max_norm)
        else:
            torch.nn.utils.clip_grad_norm_(all_params(self.optimizer), max_norm)

    def model_zero_grad(self, set_to_none: bool) -> None:
        for p in self.params:
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    def grad(self, i: int) -> Tensor:
        gradient = self.params[i].grad
        assert gradient is not None
        return gradient

    def step(self) -> None:
        self.optimizer.step()


def clipped(loop: Loop) -> None:
    loop.backward(1)
    loop.clip()


# ---- the rows ------------------------------------------------------------------------------------


def one_is_cancelled(loop: Loop) -> None:
    clipped(loop)
    loop.params[2].grad = None
    loop.step()


def one_is_zeroed(loop: Loop) -> None:
    clipped(loop)
    loop.grad(2).zero_()
    loop.step()


def one_is_replaced(loop: Loop) -> None:
    clipped(loop)
    loop.params[2].grad = loop.grad(2) * 2
    loop.step()


def one_arrives_late(loop: Loop) -> None:
    loop.backward(1)
    loop.params[2].grad = None
    loop.clip()
    loop.params[2].grad = torch.ones_like(loop.params[2])
    loop.step()


def a_group_is_added(loop: Loop) -> None:
    clipped(loop)
    loop.optimizer.add_param_group({"params": [Parameter(values((4,), 9))]})
    loop.step()


def noise_is_added(loop: Loop) -> None:
    clipped(loop)
    loop.grad(0).add_(values((5,), 77))
    loop.step()


def noise_is_added_to_copies(loop: Loop) -> None:
    clipped(loop)
    for p in loop.params:
        p.grad = loop.grad(0).new_ones(p.shape) + (p.grad if p.grad is not None else 0)
    loop.step()


def values_are_repaired(loop: Loop) -> None:
    loop.backward(1)
    loop.grad(0)[1] = math.inf
    loop.clip()
    for i in range(3):
        torch.nan_to_num(loop.grad(i), posinf=1e5, out=loop.grad(i))
    loop.step()


def optimizer_drops(loop: Loop) -> None:
    for set_to_none in (True, False):
        clipped(loop)
        loop.optimizer.zero_grad(set_to_none=set_to_none)
        loop.backward(2)
        loop.step()
        loop.optimizer.zero_grad()


def model_drops(loop: Loop, set_to_none: bool, again: bool) -> None:
    clipped(loop)
    loop.model_zero_grad(set_to_none)
    loop.backward(2)
    if again:
        loop.clip()
    loop.step()


def a_scaler_skips(loop: Loop, set_to_none: bool, again: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for seed in range(3):
        loss = torch.stack([(p * values(tuple(p.shape), seed)).sum() for p in loop.params]).sum()
        torch.autograd.backward(scaler.scale(loss * (math.inf if seed == 1 else 3.0)))
        scaler.unscale_(loop.optimizer)
        if seed != 2 or again:
            loop.clip()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.model_zero_grad(set_to_none)


def scalers_skip(loop: Loop) -> None:
    for set_to_none in (True, False):
        a_scaler_skips(loop, set_to_none, again=True)


def unscaled_after(loop: Loop) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    torch.autograd.backward(scaler.scale(torch.stack([(p * p).sum() for p in loop.params]).sum()))
    loop.clip()
    scaler.step(loop.optimizer)


def each_micro_batch(loop: Loop) -> None:
    for seed in range(2):
        loop.backward(seed)
        loop.clip()
    loop.step()


def a_micro_batch_after(loop: Loop) -> None:
    clipped(loop)
    loop.backward(2)
    loop.step()


def twice(loop: Loop) -> None:
    clipped(loop)
    loop.clip(0.25)
    loop.step()


def two_steps(loop: Loop) -> None:
    clipped(loop)
    loop.step()
    loop.model_zero_grad(set_to_none=False)
    loop.backward(2)
    loop.step()


def nothing_to_clip(loop: Loop) -> None:
    loop.backward(1, scale=1e-3)
    loop.clip()
    loop.backward(2)
    loop.grad(1).mul_(2)
    loop.params[2].grad = loop.grad(2) + 1
    loop.step()


def closure_clips(loop: Loop) -> None:
    def closure() -> float:
        loop.optimizer.zero_grad()
        clipped(loop)
        return 0.0

    loop.optimizer.step(closure)


def closure_follows(loop: Loop) -> None:
    def closure() -> float:
        loop.optimizer.zero_grad()
        loop.backward(2)
        return 0.0

    clipped(loop)
    loop.optimizer.step(closure)


def checkpoint_is_loaded(loop: Loop) -> None:
    clipped(loop)
    loop.step()
    saved = copy.deepcopy(loop.optimizer.state_dict())
    loop.model_zero_grad(set_to_none=True)
    loop.backward(2)
    loop.clip(0.1)
    loop.optimizer.load_state_dict(saved)
    loop.step()


def gradients_swap_places(loop: Loop) -> None:
    loop.params[1].data = values((5,), 3)
    clipped(loop)
    loop.params[0].grad, loop.params[1].grad = loop.grad(1), loop.grad(0)
    loop.step()


def gradients_are_views(loop: Loop) -> None:
    bucket = values((20,), 5) * 3
    for p, view in zip(loop.params, (bucket[1:6], bucket[6:18], bucket[18:]), strict=True):
        p.grad = view.view(p.shape)
    loop.clip()
    loop.params[2].grad = None
    loop.step()


def a_view_is_changed(loop: Loop) -> None:
    bucket = values((20,), 5) * 3
    for p, view in zip(loop.params, (bucket[1:6], bucket[6:18], bucket[18:]), strict=True):
        p.grad = view.view(p.shape)
    loop.clip()
    bucket.mul_(2)
    loop.step()


def inference_mode(loop: Loop) -> None:
    with torch.inference_mode():
        loop.backward(1)
        loop.clip()
        loop.grad(0).add_(1.0)
    loop.step()


TORCHS, ERROR = "as torch", "error"
Row = tuple[str, str, Callable[[Loop], None]]
ROWS: list[Row] = [
    ("some gradients are set to `None`", TORCHS, one_is_cancelled),
    ("some gradients are zeroed in place", TORCHS, one_is_zeroed),
    ("two parameters exchange their gradients", TORCHS, gradients_swap_places),
    ("gradients are views of one buffer", TORCHS, gradients_are_views),
    ("`clip_grad_norm_` once more", TORCHS, twice),
    ("`step()`, `model.zero_grad()`, another batch", TORCHS, two_steps),
    ("`add_param_group`", TORCHS, a_group_is_added),
    ("`load_state_dict`", TORCHS, checkpoint_is_loaded),
    ("`step(closure)`, and the closure clips", TORCHS, closure_clips),
    ("`step(closure)`, and the closure calls `optimizer.zero_grad()`", TORCHS, closure_follows),
    (
        "`optimizer.zero_grad()`, another batch",
        TORCHS,
        optimizer_drops,
    ),
    (
        "a scaler skips, `model.zero_grad()`, another batch, `clip_grad_norm_`",
        TORCHS,
        scalers_skip,
    ),
    ("a scaler's `unscale_`, which belongs before the clip", TORCHS, unscaled_after),
    ("anything, where the norm was at most `max_norm`", TORCHS, nothing_to_clip),
    ("gradients of `torch.inference_mode()` are changed", TORCHS, inference_mode),
    ("a gradient is replaced", ERROR, one_is_replaced),
    ("a gradient arrives that was not there", ERROR, one_arrives_late),
    ("noise is added in place", ERROR, noise_is_added),
    ("noise is added, and the sums replace the gradients", ERROR, noise_is_added_to_copies),
    ("`torch.nan_to_num` in place", ERROR, values_are_repaired),
    ("the buffer of which gradients are views is changed", ERROR, a_view_is_changed),
    ("backward of another micro-batch, `clip_grad_norm_`", ERROR, each_micro_batch),
    ("backward of another micro-batch", ERROR, a_micro_batch_after),
    (
        "`model.zero_grad()`, another batch",
        ERROR,
        lambda loop: model_drops(loop, set_to_none=True, again=False),
    ),
    (
        "`model.zero_grad()`, another batch, `clip_grad_norm_`",
        ERROR,
        lambda loop: model_drops(loop, set_to_none=True, again=True),
    ),
    (
        "`model.zero_grad(set_to_none=False)`, another batch",
        ERROR,
        lambda loop: model_drops(loop, set_to_none=False, again=False),
    ),
    (
        "a scaler skips, `model.zero_grad()`, another batch",
        ERROR,
        lambda loop: a_scaler_skips(loop, set_to_none=False, again=False),
    ),
]


@pytest.mark.parametrize(("name", "outcome", "row"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_clip_is_torchs_or_an_error(name: str, outcome: str, row: Callable[[Loop], None]) -> None:
    loop, torchs = Loop(fusedopt.SGD), Loop(torch.optim.SGD)
    if outcome == ERROR:
        with pytest.raises(
            RuntimeError, match=r"parameter \d of group 0 .*zero_grad\(\) of the op"
        ):
            row(loop)
        return
    row(loop)
    row(torchs)
    for p, q in zip(loop.params, torchs.params, strict=True):
        assert_within(p.detach(), q.detach())


@pytest.mark.parametrize(("name", "outcome", "row"), ROWS, ids=[name for name, *_ in ROWS])
def test_the_page_has_the_row(name: str, outcome: str, row: object) -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [cells[1].strip() for cells in rows if cells[0] == f"| {name}"] == [f"{outcome} |"]


# ---- what an error leaves, and what is kept meanwhile --------------------------------------------


def test_an_error_changes_nothing_and_zero_grad_helps() -> None:
    loop = Loop(fusedopt.SGD)
    clipped(loop)
    before = [p.detach().clone() for p in loop.params]
    loop.grad(1).mul_(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameter 1 of group 0"):
            loop.step()
        with pytest.raises(RuntimeError, match="parameter 1 of group 0"):
            loop.clip()
    for p, q in zip(loop.params, before, strict=True):
        assert_same_bits(p.detach(), q)
    loop.optimizer.zero_grad()
    loop.backward(2)
    loop.step()


def test_the_error_has_the_name_of_the_parameter() -> None:
    p = Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([("head.bias", p)], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.clip_grad_norm_(0.5)
    p.grad += 1
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        optimizer.step()


def test_a_waiting_clip_keeps_no_gradient_alive() -> None:
    loop = Loop(fusedopt.SGD)
    clipped(loop)
    gone = [weakref.ref(loop.grad(i)) for i in range(3)]
    loop.model_zero_grad(set_to_none=True)
    assert [r() for r in gone] == [None] * 3


def test_one_gradient_of_two_parameters_is_scaled_once() -> None:
    """Torch multiplies it twice."""
    params = [Parameter(values((5,), i)) for i in range(2)]
    loop = Loop(fusedopt.SGD, params)
    before = [p.detach().clone() for p in params]
    shared = values((5,), 7) * 9
    for p in loop.params:
        p.grad = shared
    loop.clip(0.5)
    loop.step()
    moved = torch.stack([p.detach() - q for p, q in zip(params, before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-5)


# ---- copies --------------------------------------------------------------------------------------


def plain_tensors() -> list[Tensor]:
    """Return leaves whose copies have copies of their gradients; those of parameters have not."""
    return [values(shape, i).requires_grad_() for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy], ids=["deepcopy", "copy"])
def test_a_copy_keeps_the_clip(duplicate: Callable[[Any], Any]) -> None:
    loop, torchs = Loop(fusedopt.SGD, plain_tensors()), Loop(torch.optim.SGD, plain_tensors())
    copies = []
    for each in (loop, torchs):
        clipped(each)
        copies.append(duplicate(each.optimizer))
        copies[-1].step()
    for p, q in zip(all_params(copies[0]), all_params(copies[1]), strict=True):
        assert_within(p.detach(), q.detach())
    if duplicate is copy.deepcopy:
        loop.step()
        torchs.step()
        for x, y in zip(loop.params, torchs.params, strict=True):
            assert_within(x.detach(), y.detach())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_without_the_gradients_takes_no_others(duplicate: Callable[[Any], Any]) -> None:
    loop = Loop(fusedopt.SGD)
    clipped(loop)
    copied = duplicate(loop.optimizer)
    copied.step()  # of nothing
    copied = duplicate(loop.optimizer)
    set_gradients(all_params(copied), 0)
    with pytest.raises(RuntimeError, match="zero_grad"):
        copied.step()
    copied.zero_grad()
    set_gradients(all_params(copied), 0)
    copied.step()
    loop.step()


def test_a_copy_of_what_has_changed_raises_too() -> None:
    loop = Loop(fusedopt.SGD, plain_tensors())
    clipped(loop)
    loop.grad(0).mul_(2)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        copy.deepcopy(loop.optimizer).step()
