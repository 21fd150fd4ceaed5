"""RMSprop."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._base import Fused
from fusedopt._engine import Rule, number
from fusedopt._numeric import accumulate, average_square, epsilon, largest, maximum, minimum
from fusedopt._options import StateDType
from fusedopt._spikes import Spikes


class RMSprop(Fused, torch.optim.RMSprop):
    r"""Fused `torch.optim.RMSprop`: same arguments, state, errors and checkpoints.

    .. math::
        g &\leftarrow g + \lambda p \\
        v_t &= \alpha v_{t-1} + (1 - \alpha) g^2 \\
        a_t &= \alpha a_{t-1} + (1 - \alpha) g \quad \text{(centered)} \\
        u &= g / (\sqrt{v_t - a_t^2} + \epsilon) \\
        b_t &= \mu b_{t-1} + u \quad \text{(with momentum, else } b_t = u \text{)} \\
        p &\leftarrow p - \gamma b_t

    with lr :math:`\gamma`, alpha :math:`\alpha`, eps :math:`\epsilon`, momentum :math:`\mu` and
    weight decay :math:`\lambda`; :math:`a = 0` unless ``centered=True``. What rounding leaves of
    :math:`v_t - a_t^2` counts at least as :math:`\alpha (1 - \alpha) (g - a_{t-1})^2 + \varepsilon
    a_t^2` with the :math:`\varepsilon` of the precision, so it is never negative. Gradients are
    negated first with ``maximize=True``. State: ``step`` (0-dim float32, CPU), ``square_avg``
    :math:`v`, ``grad_avg`` :math:`a` if centered, ``momentum_buffer`` :math:`b` with momentum, of
    the parameter's shape, dtype and strides.

    Parameters: float32, float64, bfloat16, float16, any strides; computed in float32 (float64 for
    float64). Source: Hinton 2012, lecture 6e; centered: Graves 2013, arXiv:1308.0850.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor.
        alpha: :math:`\alpha`: how slowly :math:`v` forgets.
        eps: :math:`\epsilon`, which bounds the step where gradients are tiny.
        weight_decay: :math:`\lambda`.
        momentum: :math:`\mu`.
        centered: divide by the standard deviation of the gradients.
        capturable: keep ``step`` on the device, so that CUDA graphs can be captured.
        foreach: accepted as by torch; changes nothing.
        maximize: negate the gradients first.
        differentiable: let autograd see the step, which torch's own implementation makes then.
        max_grad_norm, skip_nonfinite, skip_spikes, amp_scaling: see `Fused`.
        state_dtype, master_weights, stochastic_rounding, seed: see `Fused`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
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
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
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
        decay = bool(group["weight_decay"] != 0)
        centered = bool(group["centered"])
        momentum = bool(group["momentum"] > 0)
        states: tuple[str, ...] = ("square_avg",)
        states += ("grad_avg",) if centered else ()
        states += ("momentum_buffer",) if momentum else ()
        return Rule("rmsprop", (decay, centered, momentum), states, counts_steps=True)

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        alpha = number(group["alpha"])
        return {
            "weight_decay": number(group["weight_decay"]),
            "alpha": alpha,
            "one_minus_alpha": 1 - alpha,
            "eps": number(group["eps"]),
            "one_minus_momentum": 1 - number(group["momentum"]),
            "lr": number(group["lr"]),
        }

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any,
        g: Any,
        v: Any,
        *others: Any,
        weight_decay: float,
        alpha: float,
        one_minus_alpha: float,
        eps: float,
        one_minus_momentum: float,
        lr: float,
        flags: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        decay, centered, has_momentum = flags
        if decay:
            g = g + p * weight_decay
        v = average_square(v, g, one_minus_alpha)
        states: tuple[Any, ...] = (v,)
        variance = v
        if centered:
            mean = others[0]
            deviation = g - mean
            mean = mean + deviation * one_minus_alpha
            square = minimum(mean * mean, largest(mean))
            least = deviation * one_minus_alpha * deviation * alpha
            variance = maximum(v - square, least + square * epsilon(mean))
            states += (mean,)
        update = g / (variance**0.5 + eps)
        if has_momentum:
            update = accumulate(others[-1], update, one_minus_momentum)
            states += (update,)
        return p - update * lr, *states
