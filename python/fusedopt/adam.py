"""Adam and AdamW."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._base import Fused
from fusedopt._engine import Rule, number
from fusedopt._numeric import accumulate, average_square, maximum
from fusedopt._options import StateDType
from fusedopt._spikes import Spikes


def is_coupled(group: dict[str, Any]) -> bool:
    """Return whether weight decay is added to the gradients of a param group."""
    return bool(group["weight_decay"] != 0) and not group["decoupled_weight_decay"]


def decay_and_betas(group: dict[str, Any]) -> dict[str, float]:
    """Return the scalars with which the rules of Adam's family begin."""
    weight_decay = number(group["weight_decay"])
    beta1, beta2 = map(number, group["betas"])
    return {
        "weight_decay": weight_decay,
        "decay": 0.0 if is_coupled(group) else number(group["lr"]) * weight_decay,
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
    }


def adam_rule(group: dict[str, Any]) -> Rule:
    """Return what steps a param group of Adam's family."""
    amsgrad = bool(group["amsgrad"])
    states = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if amsgrad else ())
    return Rule("adam", (is_coupled(group), amsgrad), states, counts_steps=True)


def adam_scalars(group: dict[str, Any], t: float) -> dict[str, float]:
    """Return the scalars of that rule in step t."""
    scalars = decay_and_betas(group)
    return {
        **scalars,
        "inv_sqrt_bias2": 1 / math.sqrt(1 - scalars["beta2"] ** t),
        "eps": number(group["eps"]),
        "step_size": number(group["lr"]) / (1 - scalars["beta1"] ** t),
    }


class Adam(Fused, torch.optim.Adam):
    r"""Fused `torch.optim.Adam`: same arguments, state, errors and checkpoints.

    .. math::
        g &\leftarrow g + \lambda p \quad \text{(or, decoupled: } p \leftarrow p - \gamma \lambda p
        \text{)} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t} \, m_t \Big/
        \left( \frac{\sqrt{v_t}}{\sqrt{1 - \beta_2^t}} + \epsilon \right)

    with lr :math:`\gamma`, betas :math:`\beta`, eps :math:`\epsilon` and weight decay
    :math:`\lambda`; ``amsgrad=True`` divides by the largest :math:`v` so far. Gradients are negated
    first with ``maximize=True``. State: ``step`` :math:`t` (0-dim float32, CPU), ``exp_avg``
    :math:`m`, ``exp_avg_sq`` :math:`v` and, with amsgrad, ``max_exp_avg_sq``, of the parameter's
    shape, dtype and strides.

    Parameters: float32, float64, bfloat16, float16, any strides; computed in float32 (float64 for
    float64). Source: Kingma & Ba 2014, arXiv:1412.6980; Reddi et al. 2018, arXiv:1904.09237.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2`: how slowly :math:`m` and :math:`v` forget, each in [0, 1).
        eps: :math:`\epsilon`, which bounds the step where gradients are tiny.
        weight_decay: :math:`\lambda`.
        amsgrad: divide by the largest :math:`v` so far.
        foreach: accepted as by torch; changes nothing.
        maximize: negate the gradients first.
        capturable: keep ``step`` on the device, so that CUDA graphs can be captured.
        differentiable: let autograd see the step, which torch's own implementation makes then.
        fused: accepted as by torch; changes nothing.
        decoupled_weight_decay: shrink the parameters by it, instead of adding it to the gradients.
        max_grad_norm, skip_nonfinite, skip_spikes, amp_scaling: see `Fused`.
        state_dtype, master_weights, stochastic_rounding, seed: see `Fused`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
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
        return adam_rule(group)

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        return adam_scalars(group, t)

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any,
        g: Any,
        m: Any,
        v: Any,
        v_max: Any = None,
        *,
        weight_decay: float,
        decay: float,
        beta1: float,
        one_minus_beta1: float,
        beta2: float,
        one_minus_beta2: float,
        inv_sqrt_bias2: float,
        eps: float,
        step_size: float,
        flags: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        coupled, amsgrad = flags
        if coupled:
            g = g + p * weight_decay
        m = accumulate(m, g * one_minus_beta1, one_minus_beta1)
        v = average_square(v, g, one_minus_beta2)
        second = v
        if amsgrad:
            second = v_max = maximum(v_max, v)
        update = m * step_size / (second**0.5 * inv_sqrt_bias2 + eps)
        if not coupled:
            update = update + p * decay
        p = p - update
        return (p, m, v, v_max) if amsgrad else (p, m, v)


class AdamW(Adam, torch.optim.AdamW):
    r"""Fused `torch.optim.AdamW`: `Adam` with decoupled weight decay, 0.01 by default.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \lambda p - \frac{\gamma}{1 - \beta_1^t} \, m_t \Big/
        \left( \frac{\sqrt{v_t}}{\sqrt{1 - \beta_2^t}} + \epsilon \right)

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101. State and dtypes: see `Adam`.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2`: how slowly :math:`m` and :math:`v` forget, each in [0, 1).
        eps: :math:`\epsilon`, which bounds the step where gradients are tiny.
        weight_decay: decoupled decay :math:`\lambda`.
        amsgrad: divide by the largest :math:`v` so far.
        maximize: negate the gradients first.
        foreach: accepted as by torch; changes nothing.
        capturable: keep ``step`` on the device, so that CUDA graphs can be captured.
        differentiable: let autograd see the step, which torch's own implementation makes then.
        fused: accepted as by torch; changes nothing.
        max_grad_norm, skip_nonfinite, skip_spikes, amp_scaling: see `Fused`.
        state_dtype, master_weights, stochastic_rounding, seed: see `Fused`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: bool | Spikes = False,
        amp_scaling: bool = False,
        state_dtype: StateDType = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        # Past that of Adam: torch's AdamW says by itself that the decay is decoupled.
        super(Adam, self).__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            skip_spikes=skip_spikes,
            amp_scaling=amp_scaling,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )
