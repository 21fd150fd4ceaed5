"""Lion."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fusedopt._base import Fused
from fusedopt._engine import Rule, number
from fusedopt._numeric import accumulate
from fusedopt._options import StateDType
from fusedopt._spikes import Spikes


class Lion(Fused, Optimizer):
    r"""EvoLved Sign Momentum.

    .. math::
        p &\leftarrow p - \gamma \lambda p - \gamma \,
        \mathrm{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g

    with :math:`\mathrm{sign}(0) = \mathrm{sign}(\mathrm{NaN}) = 0`. State: ``exp_avg`` :math:`m`,
    of the parameter's shape, dtype and strides.

    Parameters: float32, float64, bfloat16, float16, any strides; computed in float32 (float64 for
    float64). Source: Chen et al. 2023, arXiv:2302.06675.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor; a third to a tenth of
            AdamW's.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        weight_decay: decoupled decay :math:`\lambda`; three to ten times AdamW's.
        maximize: negate the gradients first.
        max_grad_norm, skip_nonfinite, skip_spikes, amp_scaling: see `Fused`.
        state_dtype, master_weights, stochastic_rounding, seed: see `Fused`.

    Raises:
        ValueError: an argument is out of its range.
    """

    _without_kernel = "its rule in torch's operators"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: bool | Spikes = False,
        amp_scaling: bool = False,
        state_dtype: StateDType = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
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
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return Rule("lion", (), ("exp_avg",), counts_steps=False)

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        lr = number(group["lr"])
        beta1, beta2 = map(number, group["betas"])
        weight_decay = number(group["weight_decay"])
        return {
            "weight_decay": weight_decay,
            "decay": lr * weight_decay,
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
            "lr": lr,
        }

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any,
        g: Any,
        m: Any,
        *,
        weight_decay: float,
        decay: float,
        one_minus_beta1: float,
        one_minus_beta2: float,
        lr: float,
        flags: tuple[bool, ...] = (),
    ) -> tuple[Any, ...]:
        c = accumulate(m, g * one_minus_beta1, one_minus_beta1)
        one = c**0
        sign = (c > 0) * one - (c < 0) * one
        p = p - (sign * lr + p * decay)
        m = accumulate(m, g * one_minus_beta2, one_minus_beta2)
        return p, m

    @torch.no_grad()
    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """Step parameters without a kernel by `reference`: torch has no Lion."""
        for group in groups:
            if any(p.grad.layout != torch.strided for p in group["params"]):
                raise RuntimeError("Lion does not support sparse gradients")
        for group in groups:
            scalars: dict[str, Any] = self._scalars(group, 1)
            for p in group["params"]:
                state = self.state[p]  # of the parameter, or of what stands in for it
                if state.get("exp_avg") is None:
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                stored = [p, -p.grad if group["maximize"] else p.grad, state["exp_avg"]]
                stored = [torch.view_as_real(x) if x.is_complex() else x for x in stored]
                compute = torch.float64 if stored[0].dtype == torch.float64 else torch.float32
                new_p, new_m = self.reference(*(x.to(compute) for x in stored), **scalars)
                stored[0].copy_(new_p)
                stored[2].copy_(new_m)
