"""Muon against torch's, whose iteration is in float64 here: its one cast is changed for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fusedopt
from fusedopt._batches import matrix_reference
from fusedopt._orthogonal import Iteration, step_ratio
from tests.helpers import all_params, assert_same_state, assert_within, set_gradients, values
from tests.muon.common import OPTIONS, SHAPES, each_option, matrices
from tests.muon.oracle import TorchMuon, torch_in

STEPS = 6
(INFO,) = (info for info in optim_db if info.name == "Muon")  # torch's own cases


def trained(cls: Any, params: list[Parameter], **options: Any) -> Any:
    """Step an optimizer whose first parameter misses a gradient and whose last gets it late."""
    optimizer = cls(
        [{"params": params[:3]}, {"params": params[3:], "lr": 0.02, "weight_decay": 0.05}],
        **options,
    )
    for step in range(STEPS):
        for i, p in enumerate(params):
            absent = (p is params[0] and step == 3) or (p is params[-1] and step < 2)
            p.grad = None if absent else values(tuple(p.shape), 100 * (step + 1) + i, p.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS,
        {"adjust_lr_fn": "spectral_unclamped"},
        *(case.kwargs for case in INFO.optim_inputs_func("cpu", torch.float64)),
    ],
    ids=str,
)
def test_float64_equals_torch(options: dict[str, Any]) -> None:
    actual = trained(fusedopt.Muon, matrices(), **options)
    assert_same_state(actual, trained(TorchMuon, matrices(), **options), assert_within)


@each_option
def test_it_is_the_readable_rule(options: dict[str, Any]) -> None:
    params, copies = matrices(), [p.detach() for p in matrices()]
    optimizer = fusedopt.Muon(params, **options)
    buffers = [torch.zeros_like(p) for p in copies]
    (group,) = optimizer.param_groups
    for step in range(STEPS):
        set_gradients(params, step)
        optimizer.step()
        for i, p in enumerate(params):
            lr, decay = float(group["lr"]), group["weight_decay"]
            ratio = step_ratio(group["adjust_lr_fn"], *p.shape)
            assert p.grad is not None
            copies[i], buffers[i] = matrix_reference(
                copies[i],
                p.grad,
                buffers[i],
                forget=1 - group["momentum"],
                weight_decay=decay,
                ratio=ratio,
                decay=lr * decay,
                step_size=lr * ratio,
                nesterov=group["nesterov"],
                iteration=Iteration.of(group),
            )
    for p, copy, buffer in zip(params, copies, buffers, strict=True):
        assert_within(p.detach(), copy)
        assert_within(optimizer.state[p]["momentum_buffer"], buffer)


def test_the_readable_rule_takes_numpy_as_well() -> None:
    iteration = Iteration((3.4445, -4.775, 2.0315), 5, 1e-7)
    scalars: dict[str, Any] = {
        **{"forget": 0.05, "weight_decay": 0.1, "ratio": 1.0, "decay": 0.01, "step_size": 0.1},
        **{"nesterov": True, "iteration": iteration},
    }
    streams = [values((5, 3), seed) for seed in range(3)]
    of_torch = matrix_reference(*streams, **scalars)
    of_numpy = matrix_reference(*(x.numpy() for x in streams), **scalars)
    for a, b in zip(of_torch, of_numpy, strict=True):
        assert_within(a, torch.from_numpy(b))


@pytest.mark.parametrize("shape", [(48, 64), (32, 96), (96, 32)])
def test_singular_values_go_to_about_one(shape: tuple[int, int]) -> None:
    p = Parameter(torch.zeros(shape))
    p.grad = values(shape, 0, torch.float32)
    optimizer = fusedopt.Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0)
    optimizer.param_groups[0]["adjust_lr_fn"] = "none"  # as in torch: the lr as it is
    optimizer.step()
    singular = torch.linalg.svdvals(p.detach())
    assert float(singular.min()) > 0.3
    assert float(singular.max()) < 1.3


def test_bfloat16_rounds_where_torch_does() -> None:
    """The same precision: what is left is in which order its libraries add up."""
    shapes: list[tuple[int, ...]] = [(32, 48), (48, 48), (48, 32), (32, 48)]
    params, copies = matrices(torch.float32, shapes), matrices(torch.float32, shapes)
    ours = fusedopt.Muon(params, lr=1.0, weight_decay=0.0, ns_dtype=torch.bfloat16)
    torchs: Any = torch.optim.Muon(copies, lr=1.0, weight_decay=0.0)
    exact = matrices(torch.float64, shapes)
    in_float64 = fusedopt.Muon(exact, lr=1.0, weight_decay=0.0)
    for optimizer in (ours, torchs, in_float64):
        set_gradients(all_params(optimizer), 0)
        optimizer.step()
    for p, q, r in zip(params, copies, exact, strict=True):
        apart = (p - q).norm() / q.norm()
        torch_errs = (q.double() - r).norm() / r.norm()
        assert apart < torch_errs / 2, (apart, torch_errs)


def test_float32_is_nearer_to_float64_than_torchs_bfloat16() -> None:
    params, exact = matrices(torch.float32, [(48, 48)]), matrices(torch.float64, [(48, 48)])
    for ps in (params, exact):
        optimizer = fusedopt.Muon(ps, lr=1.0, weight_decay=0.0)
        set_gradients(ps, 0)
        optimizer.step()
    error = (params[0].double() - exact[0]).norm() / exact[0].norm()
    assert error < 1e-5


@pytest.mark.parametrize("error", INFO.optim_error_inputs_func("cpu", torch.float64))
def test_errors_are_torchs(error: Any) -> None:
    given = error.optimizer_error_input
    if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            fusedopt.Muon(given.params, **given.kwargs)
        return
    optimizer = fusedopt.Muon(given.params, **given.kwargs)
    before = [p.detach().clone() for p in all_params(optimizer)]
    with (
        pytest.raises(error.error_type, match=error.error_regex),
        pytest.warns(UserWarning, match="no kernel for"),
    ):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(all_params(optimizer), before, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"lr": torch.ones(2)}, {"momentum": -0.1}, {"weight_decay": -1.0}],
    ids=str,
)
def test_messages_are_torchs(options: dict[str, Any]) -> None:
    said = []
    for cls in (fusedopt.Muon, torch.optim.Muon):
        with pytest.raises(ValueError) as raised:  # noqa: PT011  (compared as a whole below)
            cls(matrices(), **options)
        said.append(str(raised.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("options", [{"ns_steps": 100}, {"ns_coefficients": (1.0, 2.0)}], ids=str)
def test_what_torch_refuses_at_the_step_is_refused_before_anything_changes(
    options: dict[str, Any],
) -> None:
    said = []
    for cls in (fusedopt.Muon, torch.optim.Muon):
        params = matrices(shapes=SHAPES[:1])
        optimizer: Any = cls(params, **options)
        set_gradients(params, 0)
        with pytest.raises(ValueError) as raised:  # noqa: PT011  (compared as a whole below)
            optimizer.step()
        said.append(str(raised.value))
        if cls is fusedopt.Muon:
            assert not optimizer.state
            assert torch.equal(params[0], matrices(shapes=SHAPES[:1])[0])
    assert said[0] == said[1]


def test_torch_iterates_in_bfloat16_unless_told_otherwise() -> None:
    """Or the oracle of these tests would be none."""
    found = []
    for precision in (None, torch.float64):
        params = matrices(shapes=SHAPES[:1])
        set_gradients(params, 0)
        optimizer: Any = torch.optim.Muon(params)
        if precision is None:
            optimizer.step()
        else:
            with torch_in(precision):
                optimizer.step()
        found.append(params[0].detach())
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=1e-3)
