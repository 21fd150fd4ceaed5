"""Adagrad."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._base import Fused
from fusedopt._engine import Rule, number
from fusedopt._options import StateDType
from fusedopt._spikes import Spikes


class Adagrad(Fused, torch.optim.Adagrad):
    r"""Fused `torch.optim.Adagrad`: same arguments, state, errors and checkpoints.

    .. math::
        g &\leftarrow g + \lambda p \\
        s_t &= s_{t-1} + g^2, \qquad s_0 = \tau \\
        p &\leftarrow p - \frac{\gamma}{1 + (t - 1) \eta} \, g \Big/ (\sqrt{s_t} + \epsilon)

    with lr :math:`\gamma`, lr_decay :math:`\eta`, weight decay :math:`\lambda`,
    initial_accumulator_value :math:`\tau` and eps :math:`\epsilon`. Gradients are negated first
    with ``maximize=True``. State, made in the constructor: ``step`` :math:`t` (0-dim float32, CPU)
    and ``sum`` :math:`s`, of the parameter's shape, dtype and strides.

    Parameters: float32, float64, bfloat16, float16, any strides; computed in float32 (float64 for
    float64). Source: Duchi, Hazan & Singer 2011, "Adaptive subgradient methods for online learning
    and stochastic optimization", JMLR 12:2121.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor.
        lr_decay: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        initial_accumulator_value: :math:`\tau`, where the sums begin.
        eps: :math:`\epsilon`, which bounds the step where gradients are tiny.
        foreach: accepted as by torch; changes nothing.
        maximize: negate the gradients first.
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
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
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
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
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
        return Rule("adagrad", (bool(group["weight_decay"] != 0),), ("sum",), counts_steps=True)

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        return {
            "weight_decay": number(group["weight_decay"]),
            "eps": number(group["eps"]),
            "lr_decay": number(group["lr_decay"]),
            "step_size": number(group["lr"]) / (1 + (t - 1) * number(group["lr_decay"])),
        }

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any,
        g: Any,
        sum: Any,
        *,
        weight_decay: float,
        eps: float,
        lr_decay: float,
        step_size: float,
        flags: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        (decay,) = flags
        if decay:
            g = g + p * weight_decay
        sum = sum + g * g
        p = p - g / (sum**0.5 + eps) * step_size
        return p, sum

    def _create_state(self, rule: Rule, p: Tensor, capturable: bool = False) -> None:
        """Make the sum start where the constructor's argument says, as torch does."""
        absent = self.state[p].get("sum") is None
        super()._create_state(rule, p, capturable)
        if absent:
            self._start(p)

    def _start(self, p: Tensor) -> None:
        start = self.defaults["initial_accumulator_value"]
        if start != 0:
            wide = torch.promote_types(p.dtype, torch.float32)
            total = torch.full_like(p, start, dtype=wide, requires_grad=False)
            self._store(p, "sum", {"sum": total})

    def _store_what_is_there(self) -> None:
        super()._store_what_is_there()
        if self.state_dtype is not None:
            for p in self.state:
                self._start(p)

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """Refuse what torch refuses before it has counted a step."""
        for group in groups:
            sparse = any(p.grad.layout != torch.strided for p in group["params"])
            if sparse and group["weight_decay"] != 0:
                raise RuntimeError("weight_decay option is not compatible with sparse gradients")
        super()._torch_step(groups)
