"""Which tensors Muon takes: kernels, stacks, layouts, dtypes and memory modes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt._stored import decoded
from tests.helpers import (
    assert_same_bits,
    assert_within,
    each_dtype,
    set_gradients,
    train,
    values,
)
from tests.muon.common import matrices
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
