"""Stochastic gradient descent."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._base import Fused
from fusedopt._engine import Rule, number
from fusedopt._numeric import accumulate
from fusedopt._options import StateDType
from fusedopt._spikes import Spikes


class SGD(Fused, torch.optim.SGD):
    r"""Fused `torch.optim.SGD`: same arguments, state, errors and checkpoints.

    .. math::
        g &\leftarrow g + \lambda p \\
        b_t &= \mu b_{t-1} + (1 - \tau) g, \qquad b_1 = g \\
        p &\leftarrow p - \gamma \, (g + \mu b_t \text{ if nesterov else } b_t)

    with lr :math:`\gamma`, momentum :math:`\mu`, dampening :math:`\tau` and weight decay
    :math:`\lambda`; without momentum, :math:`p \leftarrow p - \gamma g`. Gradients are negated
    first with ``maximize=True``. State: ``momentum_buffer`` :math:`b`, of the parameter's shape,
    dtype and strides, with momentum only.

    Parameters: float32, float64, bfloat16, float16, any strides; computed in float32 (float64 for
    float64). Source: Sutskever et al. 2013, "On the importance of initialization and momentum in
    deep learning".

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor.
        momentum: :math:`\mu`.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda`.
        nesterov: look ahead by the momentum, which must be positive, without dampening.
        maximize: negate the gradients first.
        foreach: accepted as by torch; changes nothing.
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
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
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

    def _rule(self, group: dict[str, Any]) -> Rule:
        decay = bool(group["weight_decay"] != 0)
        if group["momentum"] == 0:
            return Rule("sgd", (decay,), (), counts_steps=False)
        flags = (decay, bool(group["nesterov"]))
        return Rule("sgd_momentum", flags, ("momentum_buffer",), counts_steps=False)

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        lr = number(group["lr"])
        weight_decay = number(group["weight_decay"])
        momentum = number(group["momentum"])
        if momentum == 0:
            return {"weight_decay": weight_decay, "lr": lr}
        first = t == 1
        return {
            "weight_decay": weight_decay,
            "forget": 1.0 if first else 1 - momentum,
            "grad_weight": 1.0 if first else 1 - number(group["dampening"]),
            "momentum": momentum,
            "lr": lr,
        }

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any,
        g: Any,
        buf: Any = None,
        *,
        weight_decay: float,
        forget: float = 1,
        grad_weight: float = 0,
        momentum: float = 0,
        lr: float,
        flags: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        decay, *nesterov = flags
        if decay:
            g = g + p * weight_decay
        if buf is None:
            return (p - g * lr,)
        buf = accumulate(buf, g * grad_weight, forget)
        g = g + buf * momentum if nesterov[0] else buf
        return p - g * lr, buf
