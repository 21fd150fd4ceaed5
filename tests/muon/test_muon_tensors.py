"""Which tensors Muon takes: kernels, stacks, layouts, dtypes, memory modes, and parts of a step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt._storage import decoded
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_dtype,
    set_gradients,
    train,
    values,
)
from tests.muon.common import Sees, TorchMuon, matrices
from tests.registry import LAYOUTS

# ---- kernels, stacks -----------------------------------------------------------------------------


def test_a_kernel_is_a_matrix_with_a_row_for_each_output_channel() -> None:
    kernel, flat = Parameter(values((6, 2, 3, 3), 0)), Parameter(values((6, 2, 3, 3), 0).flatten(1))
    optimizers = [fusedopt.Muon([kernel]), fusedopt.Muon([flat])]
    for step in range(3):
        gradient = values((6, 2, 3, 3), 10 + step)
        kernel.grad, flat.grad = gradient, gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(kernel.detach().flatten(1), flat.detach())


def test_a_stack_is_made_of_matrices() -> None:
    stack = Parameter(values((4, 3, 5), 0))
    each = [Parameter(x.clone()) for x in values((4, 3, 5), 0)]
    together = fusedopt.Muon([{"params": [stack], "batch_dims": 1}])
    apart = fusedopt.Muon(each)
    for step in range(3):
        stack.grad = values((4, 3, 5), 10 + step)
        for p, gradient in zip(each, stack.grad, strict=True):
            p.grad = gradient.clone()
        together.step()
        apart.step()
    assert_within(stack.detach(), torch.stack([p.detach() for p in each]))


def test_what_has_three_dimensions_has_to_be_said_to_be_a_kernel_or_a_stack() -> None:
    p = Parameter(values((4, 3, 5), 0))
    with pytest.raises(ValueError, match=r"only supports 2D parameters.*batch_dims=0 .* kernel"):
        fusedopt.Muon([p])
    kernel = fusedopt.Muon([{"params": [p], "batch_dims": 0}])
    flat = Parameter(values((4, 15), 0))
    optimizer = fusedopt.Muon([flat])
    p.grad = values((4, 3, 5), 1)
    flat.grad = p.grad.flatten(1)
    kernel.step()
    optimizer.step()
    assert_same_bits(p.detach().flatten(1), flat.detach())


@pytest.mark.parametrize("batch_dims", [-1, 2, 3])
def test_a_parameter_with_too_few_dimensions_is_refused(batch_dims: int) -> None:
    optimizer = fusedopt.Muon(matrices())
    with pytest.raises(ValueError, match=rf"batch_dims={batch_dims}, .*\(4, 3, 5\)"):
        optimizer.add_param_group(
            {"params": [Parameter(values((4, 3, 5), 0))], "batch_dims": batch_dims}
        )
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("shape", [(), (3,)])
def test_no_matrix_is_refused_as_by_torch(shape: tuple[int, ...]) -> None:
    for cls in (fusedopt.Muon, torch.optim.Muon):
        with pytest.raises(ValueError, match="only supports 2D parameters whereas we found"):
            cls([Parameter(values(shape, 0))])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_is_done_to_what_has_no_elements(shape: tuple[int, int]) -> None:
    params = [Parameter(values(shape, 0)), *matrices()]
    expected = matrices()
    train(fusedopt.Muon(params), params, 2)
    params_of_expected = fusedopt.Muon(expected)
    for step in range(2):
        for i, p in enumerate(expected):
            p.grad = values(tuple(p.shape), 1000 * (step + 1) + i + 1)
        params_of_expected.step()
    for p, q in zip(params[1:], expected, strict=True):
        assert_within(p.detach(), q.detach())


# ---- layouts, dtypes -----------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, gradient: str, gather: str) -> None:
    p = Parameter(LAYOUTS[layout](values((4, 3, 2, 5), 0)))
    q = Parameter(values((4, 3, 2, 5), 0))
    ours, plain = fusedopt.Muon([p]), fusedopt.Muon([q])
    for step in range(2):
        x = values((4, 3, 2, 5), 1 + step)
        p.grad, q.grad = LAYOUTS[gradient](x), x
        ours.step()
        plain.step()
    assert_same_bits(p.detach(), q.detach())
    assert ours.state[p]["momentum_buffer"].stride() == torch.empty_like(p).stride()


def test_expanded_gradients_and_those_that_are_yet_to_be_negated() -> None:
    for gradient in (
        values((4, 1), 0).expand(4, 6),
        torch.complex(values((4, 6), 0), values((4, 6), 1)).conj().imag,
    ):
        p, q = matrices(shapes=[(4, 6)]), matrices(shapes=[(4, 6)])
        p[0].grad, q[0].grad = gradient, gradient.clone().resolve_neg().contiguous()
        fusedopt.Muon(p).step()
        fusedopt.Muon(q).step()
        assert_same_bits(p[0].detach(), q[0].detach())


@each_dtype
def test_each_dtype_is_computed_in_float32_at_least_and_rounded_once(dtype: torch.dtype) -> None:
    params = matrices(dtype)
    wide = [Parameter(p.detach().to(torch.promote_types(dtype, torch.float32))) for p in params]
    ours, in_wide = fusedopt.Muon(params, lr=0.1), fusedopt.Muon(wide, lr=0.1)
    set_gradients(params, 0)
    for p, q in zip(params, wide, strict=True):
        assert p.grad is not None
        q.grad = p.grad.to(q.dtype)
    ours.step()
    in_wide.step()
    for p, q in zip(params, wide, strict=True):
        assert ours.state[p]["momentum_buffer"].dtype == dtype
        # The buffer that is looked ahead from has been rounded, too.
        bound = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(p.detach().to(q.dtype), q.detach(), rtol=bound, atol=bound)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_dtype
def test_the_momentum_may_be_of_another_dtype(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    params = matrices(dtype)
    optimizer = fusedopt.Muon(params, state_dtype=state_dtype)
    train(optimizer, params, 3)
    stored = torch.float64 if dtype == torch.float64 else state_dtype
    assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {stored}


def test_a_gradient_of_another_dtype_is_there_again_after_the_step() -> None:
    p = Parameter(values((4, 6), 0, torch.float32))
    gradient = p.grad = values((4, 6), 1, torch.float32)
    p.data = p.data.bfloat16()
    fusedopt.Muon([p]).step()
    assert p.grad is gradient
    assert p.dtype == torch.bfloat16


@pytest.mark.cpu_only("devices leave memory modes to torch's operators")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_masters_are_the_weights_of_float32_training(half: torch.dtype) -> None:
    params = matrices(half)
    wide = [Parameter(p.detach().float()) for p in params]
    ours = fusedopt.Muon(params, master_weights=True, state_dtype=torch.float32, lr=0.01)
    in_float32 = fusedopt.Muon(wide, lr=0.01)
    for step in range(5):
        set_gradients(params, step)
        for p, q in zip(params, wide, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        ours.step()
        in_float32.step()
    for p, q in zip(params, wide, strict=True):
        assert_same_bits(ours._master(p), q.detach())
        assert_same_bits(p.detach(), q.detach().to(half))


def test_random_rounding_moves_what_rounding_to_nearest_does_not() -> None:
    p = Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = fusedopt.Muon([p], lr=1e-3, weight_decay=0.0, stochastic_rounding=True)
    for _ in range(20):
        p.grad = values((64, 64), 7, torch.bfloat16)
        optimizer.step()
    moved = p.detach().float() - 1
    assert (moved != 0).float().mean() > 0.1


def test_momentum_in_8_bits_is_near_that_in_float32() -> None:
    params, exact = (matrices(torch.float32, [(64, 96), (96, 64)]) for _ in range(2))
    ours, plain = fusedopt.Muon(params, state_dtype="mxfp8"), fusedopt.Muon(exact)
    train(ours, params, 5)
    train(plain, exact, 5)
    for p, q in zip(params, exact, strict=True):
        assert ours.state[p]["momentum_buffer"].dtype == torch.uint8
        buffer = decoded(ours.state[p], "momentum_buffer")
        error = (buffer - plain.state[q]["momentum_buffer"]).norm() / buffer.norm()
        assert error < 1 / 8  # the unit of their last place: they are rounded at random
        assert (p - q).abs().max() < 0.01


def test_momentum_in_bfloat16_stays_momentum_without_a_look_ahead() -> None:
    """Torch's 2.13 divides the buffer by its norm there: its cast returns the buffer itself."""
    p = Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    optimizer = fusedopt.Muon([p], nesterov=False, momentum=0.5, ns_dtype=torch.bfloat16)
    for expected in (4.0, 6.0, 7.0):
        p.grad = torch.full((8, 8), 8.0, dtype=torch.bfloat16)
        optimizer.step()
        assert (optimizer.state[p]["momentum_buffer"] == expected).all()


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


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.cpu_only("on a device, torch's operators have temporaries of their own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("side", [64, 256])
def test_a_step_takes_no_more_than_two_of_the_largest_batch(
    side: int, count: int, dtype: torch.dtype
) -> None:
    """In the precision of the iteration; of a single matrix it is four."""
    params = matrices(dtype, [(64, side)] * count + [(64, 32)])
    optimizer = fusedopt.Muon(params)
    train(optimizer, params, 1)
    set_gradients(params, 1)
    assert most_allocated(optimizer.step) <= 2 * count * 64 * side * 4


def most_allocated(function: Callable[[], object]) -> int:
    """Return how many bytes of tensors more than before there were at some time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    total = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most
