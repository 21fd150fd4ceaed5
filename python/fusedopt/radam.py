"""RAdam."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._base import Fused
from fusedopt._engine import Rule, number
from fusedopt._numeric import accumulate, average_square
from fusedopt._options import StateDType
from fusedopt._spikes import Spikes
from fusedopt.adam import decay_and_betas, is_coupled


class RAdam(Fused, torch.optim.RAdam):
    r"""Fused `torch.optim.RAdam`: same arguments, state, errors and checkpoints.

    .. math::
        g &\leftarrow g + \lambda p \quad \text{(or, decoupled: } p \leftarrow p - \gamma \lambda p
        \text{)} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g^2 \\
        \rho_t &= \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        \rho_\infty = \frac{2}{1 - \beta_2} - 1 \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t} \, m_t \cdot
        \begin{cases}
            r_t \sqrt{1 - \beta_2^t} \big/ (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
            1 & \text{otherwise}
        \end{cases} \\
        r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
        {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}

    with lr :math:`\gamma`, betas :math:`\beta`, eps :math:`\epsilon` and weight decay
    :math:`\lambda`, decoupled with ``decoupled_weight_decay=True``. Gradients are negated first
    with ``maximize=True``. State: ``step`` :math:`t` (0-dim float32, CPU), ``exp_avg`` :math:`m`
    and ``exp_avg_sq`` :math:`v`, of the parameter's shape, dtype and strides.

    Parameters: float32, float64, bfloat16, float16, any strides; computed in float32 (float64 for
    float64). Source: Liu et al. 2019, arXiv:1908.03265.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2`: how slowly :math:`m` and :math:`v` forget, each in [0, 1).
        eps: :math:`\epsilon`, which bounds the step where gradients are tiny.
        weight_decay: :math:`\lambda`.
        decoupled_weight_decay: shrink the parameters by it, instead of adding it to the gradients.
        foreach: accepted as by torch; changes nothing.
        maximize: negate the gradients first.
        capturable: keep ``step`` on the device, so that CUDA graphs can be captured.
        differentiable: let autograd see the step, which torch's own implementation makes then.
        max_grad_norm, skip_nonfinite, skip_spikes, amp_scaling: see `Fused`.
        state_dtype, master_weights, stochastic_rounding, seed: see `Fused`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: bool | Spikes = False,
        amp_scaling: bool = False,
        state_dtype: StateDType = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            skip_spikes=skip_spikes,
            amp_scaling=amp_scaling,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )

    def _rule(self, group: dict[str, Any]) -> Rule:
        return Rule("radam", (is_coupled(group),), ("exp_avg", "exp_avg_sq"), counts_steps=True)

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        beta1, beta2 = map(number, group["betas"])
        step_size = number(group["lr"]) / (1 - beta1**t)
        rectification = _rectification(beta2, t)
        if rectification is not None:
            step_size *= rectification * math.sqrt(1 - beta2**t)
        return {
            **decay_and_betas(group),
            "eps": number(group["eps"]),
            "step_size": step_size,
            "rectified": float(rectification is not None),
        }

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any,
        g: Any,
        m: Any,
        v: Any,
        *,
        weight_decay: float,
        decay: float,
        beta1: float,
        one_minus_beta1: float,
        beta2: float,
        one_minus_beta2: float,
        eps: float,
        step_size: float,
        rectified: float,
        flags: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        (coupled,) = flags
        if coupled:
            g = g + p * weight_decay
        m = accumulate(m, g * one_minus_beta1, one_minus_beta1)
        v = average_square(v, g, one_minus_beta2)
        update = m * step_size
        if rectified:
            update = update / (v**0.5 + eps)
        if not coupled:
            update = update + p * decay
        p = p - update
        return p, m, v


def _rectification(beta2: float, t: float) -> float | None:
    """Return r_t, or None as long as too few gradients are averaged for v to mean anything."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho <= 5:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
