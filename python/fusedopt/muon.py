"""Muon."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fusedopt._batches import matrix_reference
from fusedopt._matrices import StepsMatrices
from fusedopt._options import StateDType
from fusedopt._spikes import Spikes

Coefficients = tuple[float, float, float]
_TORCHS = torch.optim.Muon  # also where `as_torch_optim` gives its name to the one below
COEFFICIENTS: Coefficients = (3.4445, -4.775, 2.0315)


def checked_defaults(**arguments: Any) -> dict[str, Any]:
    """Return the defaults that torch makes of the arguments of Muon, or raise its errors."""
    adjust_lr_fn = arguments["adjust_lr_fn"]
    if adjust_lr_fn == "spectral_unclamped":  # which some versions do not know
        arguments["adjust_lr_fn"] = None
    defaults = _TORCHS([torch.zeros(1, 1)], **arguments).defaults
    return {**defaults, "adjust_lr_fn": adjust_lr_fn}


class _AnyMatrices(torch.optim.Muon):
    """Torch's class, without its constructor, which takes two dimensions alone."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        Optimizer.__init__(self, params, defaults)


class Muon(StepsMatrices, _AnyMatrices):
    r"""Fused `torch.optim.Muon`: same arguments, state, errors and checkpoints.

    .. math::
        b &\leftarrow \mu b + (1 - \mu) g \\
        u &= \mu b + (1 - \mu) g \text{ if nesterov else } b \\
        p &\leftarrow p - \gamma \lambda p - \gamma r \, \mathrm{NS}(u)

    with lr :math:`\gamma`, momentum :math:`\mu` and weight decay :math:`\lambda`.
    :math:`\mathrm{NS}` makes a matrix nearly orthogonal: it is divided by its Frobenius norm, at
    least eps, and then ``ns_steps`` times
    :math:`x \leftarrow a x + (b \, x x^T + c \, (x x^T)^2) x` takes its singular values to about 1.
    The ratio :math:`r` depends on the shape. State:
    ``momentum_buffer`` :math:`b`, of the parameter's shape, dtype and strides.

    For hidden matrices of a model: `MuonWithAuxAdam` has AdamW for all else in the same step.
    Parameters: float32, float64, bfloat16, float16, any strides. Those of four dimensions and more
    are kernels of convolutions: a row for each output channel. With three, a param group has to
    say what they are: ``batch_dims=0``, kernels; ``batch_dims=1``, stacks of matrices, each made
    orthogonal by itself. DTensors are made orthogonal as a whole, each on one rank.

    Momentum and update are computed in float32 (float64 for float64), in the same bits on every
    machine. The products are torch's, of many matrices at once, whose bits depend on its libraries.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025,
    arXiv:2502.16982.

    Args:
        params: parameters, named parameters or param groups: matrices.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor.
        weight_decay: decoupled decay :math:`\lambda`.
        momentum: :math:`\mu`.
        nesterov: look ahead by the momentum.
        ns_coefficients: a, b and c.
        eps: the least norm to divide by.
        ns_steps: how many steps of the iteration, less than 100.
        adjust_lr_fn: the ratio :math:`r` of a matrix with so many rows and columns: ``"original"``,
            or None, ``sqrt(max(1, rows / columns))``; ``"match_rms_adamw"``,
            ``0.2 * sqrt(max(rows, columns))``, with which lr and weight_decay are about those of
            AdamW; ``"spectral_unclamped"``, ``sqrt(rows / columns)``.
        ns_dtype: the precision of the iteration; None for float32 on a CPU, bfloat16 on a CUDA
            device, and float64 for float64 parameters. Torch's is bfloat16, always.
        max_grad_norm, skip_nonfinite, skip_spikes, amp_scaling: see `Fused`.
        state_dtype, master_weights, stochastic_rounding, seed: see `Fused`.

    Raises:
        ValueError: an argument is out of its range, or a parameter is no matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: bool | Spikes = False,
        amp_scaling: bool = False,
        state_dtype: StateDType = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        track_statistics: bool | int = False,
    ) -> None:
        defaults = checked_defaults(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            skip_spikes=skip_spikes,
            amp_scaling=amp_scaling,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            track_statistics=track_statistics,
        )
        self.ns_dtype = ns_dtype

    def _steps_matrices_of(self, group: dict[str, Any]) -> bool:
        return True

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """Step parameters without a kernel by `reference`: torch's takes two dimensions alone."""
        self._step_by_operators(groups)

    reference = staticmethod(matrix_reference)
