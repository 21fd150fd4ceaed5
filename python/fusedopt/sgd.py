"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch

from fusedopt._base import Fused, Rule
from fusedopt._engine import number
from fusedopt._numeric import accumulate


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
    """

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
