"""A step of Muon among others: copies, checkpoints, Lookahead, released gradients, memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    set_gradients,
    train,
    values,
)
from tests.muon.common import Sees, matrices
from tests.muon.oracle import TorchMuon

# ---- parts of a step -----------------------------------------------------------------------------


def test_gradients_stay_the_tensors_that_they_are() -> None:
    params = matrices()
    optimizer = fusedopt.Muon(params)
    set_gradients(params, 0)
    kept = [(p.grad, p.grad.clone()) for p in params if p.grad is not None]
    optimizer.step()
    for p, (gradient, values_of_it) in zip(params, kept, strict=True):
        assert p.grad is gradient
        assert_same_bits(gradient, values_of_it)
        assert gradient._version == 0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deep", "pickle"]
)
def test_copies_go_on_like_the_original(copied: Callable[[Any], Any]) -> None:
    params = matrices(torch.float32)
    optimizer = fusedopt.Muon(params, ns_dtype=torch.bfloat16)
    train(optimizer, params, 2)
    other_params, other = copied((params, optimizer))
    assert other.ns_dtype == torch.bfloat16
    train(optimizer, params, range(2, 4))
    train(other, other_params, range(2, 4))
    assert_same_state(other, optimizer, assert_same_bits)


@pytest.mark.parametrize("to", [fusedopt.Muon, TorchMuon])
@pytest.mark.parametrize("of", [fusedopt.Muon, TorchMuon])
def test_checkpoints_go_both_ways_in_mid_run(of: Any, to: Any, tmp_path: Any) -> None:
    params, straight = matrices(), matrices()
    first, plain = of(params, lr=0.01), TorchMuon(straight, lr=0.01)
    train(plain, straight, 6)
    train(first, params, 3)
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    second = to(params, lr=0.5)
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    train(second, params, range(3, 6))
    assert_same_state(second, plain, assert_within)
    assert second.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


def test_it_takes_over_torchs_in_mid_run() -> None:
    params, straight = matrices(), matrices()
    torchs, plain = TorchMuon(straight, lr=0.01), torch.optim.Muon(params, lr=0.01)
    ours = fusedopt.Muon.from_torch(plain)
    train(ours, params, 2)
    train(torchs, straight, 2)
    assert_same_state(ours, torchs, assert_within)


def test_a_matrix_that_is_listed_twice_is_stepped_twice_as_by_torch() -> None:
    made = []
    for cls in (fusedopt.Muon, TorchMuon):
        params = matrices()
        optimizer: Any = cls(params, lr=0.05)
        optimizer.param_groups[0]["params"].append(params[1])
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        made.append(optimizer)
    assert_same_state(made[0], made[1], assert_within)


def test_a_matrix_that_is_listed_twice_counts_twice_in_the_norm() -> None:
    params = matrices()
    optimizer = fusedopt.Muon(params, max_grad_norm=0.5, skip_nonfinite=True)
    optimizer.param_groups[0]["params"].append(params[1])
    set_gradients(params, 0)
    gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
    optimizer.step()
    assert optimizer.grad_norm is not None
    expected = torch.nn.utils.get_total_norm(gradients)
    assert float(optimizer.grad_norm) == pytest.approx(float(expected), rel=1e-6)
    assert params[1].grad is not None
    params[1].grad.fill_(torch.nan)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("by_operators", [False, True])
def test_a_group_that_maximizes_goes_the_other_way(nesterov: bool, by_operators: bool) -> None:
    params, plain = matrices(), matrices()
    up, down = (fusedopt.Muon(ps, lr=0.1, nesterov=nesterov) for ps in (params, plain))
    up.param_groups[0]["maximize"] = True
    with Sees() if by_operators else nullcontext():
        for step in range(3):
            set_gradients(params, step)
            set_gradients(plain, step)
            for q in plain:
                assert q.grad is not None
                q.grad.neg_()
            up.step()
            down.step()
    assert_same_state(up, down, assert_same_bits)


def test_slow_weights_follow_the_matrices() -> None:
    params, fast = matrices(), matrices()
    optimizer = fusedopt.Lookahead(fusedopt.Muon(params, lr=0.1), k=3, alpha=0.5)
    around_torchs = fusedopt.Lookahead(TorchMuon(fast, lr=0.1), k=3, alpha=0.5)
    train(optimizer, params, 7)
    train(around_torchs, fast, 7)
    for p, q in zip(params, fast, strict=True):
        assert_within(p.detach(), q.detach())
        assert_within(optimizer.state[p]["slow"], around_torchs.state[q]["slow"])


def test_released_gradients() -> None:
    def model() -> Any:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(3)]
        return torch.nn.Sequential(*layers)

    plain, released = model(), model()
    one, other = (fusedopt.Muon(m.parameters(), lr=0.1) for m in (plain, released))
    fusedopt.release_gradients(released, other)
    for step in range(3):
        for m, optimizer in ((plain, one), (released, other)):
            m(values((5, 6), step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(plain.parameters(), released.parameters(), strict=True):
        assert_within(q.detach(), p.detach())


@pytest.mark.parametrize("by_operators", [False, True])
def test_a_step_inside_autocast_keeps_its_precision(by_operators: bool) -> None:
    params, plain = matrices(torch.float32), matrices(torch.float32)
    one, other = fusedopt.Muon(params), fusedopt.Muon(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), Sees() if by_operators else nullcontext():
        train(one, params, 2)
    with Sees() if by_operators else nullcontext():
        train(other, plain, 2)
    assert_same_state(one, other, assert_same_bits)


def test_operators_see_the_step_where_they_have_to() -> None:
    params, plain = matrices(), matrices()
    one, other = fusedopt.Muon(params), fusedopt.Muon(plain)
    with Sees() as sees:
        train(one, params, 2)
    train(other, plain, 2)
    assert any("mm" in name for name in sees.seen)
    assert_same_state(one, other, assert_within)


@pytest.mark.parametrize("ns_dtype", [torch.float16, "float32", torch.int8])
def test_other_precisions_are_refused(ns_dtype: Any) -> None:
    with pytest.raises(ValueError, match="Invalid ns_dtype"):
        fusedopt.Muon(matrices(), ns_dtype=ns_dtype)


def test_the_precision_is_the_optimizers() -> None:
    optimizer = fusedopt.Muon(matrices(), ns_dtype=torch.float32)
    assert "ns_dtype" not in optimizer.param_groups[0]
    with pytest.raises(ValueError, match="has ns_dtype, expected that on the optimizer"):
        optimizer.add_param_group({"params": matrices(), "ns_dtype": torch.float32})
    plain = fusedopt.Muon(matrices())
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
