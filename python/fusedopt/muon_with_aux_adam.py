"""Muon for matrices and AdamW for all else, in one optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fusedopt._batches import matrix_reference
from fusedopt._engine import Rule
from fusedopt._matrices import StepsMatrices
from fusedopt._options import StateDType
from fusedopt._spikes import Spikes
from fusedopt.adam import AdamW, adam_rule, adam_scalars
from fusedopt.muon import COEFFICIENTS, checked_defaults

_TORCHS = torch.optim.AdamW  # also where `as_torch_optim` gives its name to that of fusedopt
_ADAM_EPS = 1e-8


class MuonWithAuxAdam(StepsMatrices, Optimizer):
    r"""`Muon` for some param groups, `AdamW` for the others: one optimizer, and one step.

    Each param group says by ``use_muon`` who steps it; `muon_groups` makes such groups of a model.
    All options of `Fused` are of all groups together: one norm clips them, one infinite gradient
    skips them. Schedulers, gradient scalers and checkpoints see one optimizer.

    Formulas, state and dtypes: see `Muon` and `AdamW`. All groups have the keys of both.

    Args:
        params: param groups, each with ``use_muon``, and whatever else is its own.
        lr: learning rate :math:`\gamma`, a float or a one-element tensor. The default of
            adjust_lr_fn makes one that is good for AdamW good for both.
        weight_decay: decoupled decay :math:`\lambda`.
        momentum: Muon's :math:`\mu`.
        nesterov: let Muon look ahead by the momentum.
        ns_coefficients: a, b and c of Muon's iteration.
        eps: of a group, the least norm that Muon divides by, or what bounds AdamW's step; None for
            1e-7 and 1e-8.
        ns_steps: how many steps of Muon's iteration, less than 100.
        adjust_lr_fn: how Muon's steps depend on the shape of a matrix: see `Muon`.
        betas: AdamW's :math:`\beta_1, \beta_2`, each in [0, 1).
        ns_dtype: the precision of Muon's iteration: see `Muon`.
        max_grad_norm, skip_nonfinite, skip_spikes, amp_scaling: see `Fused`.
        state_dtype, master_weights, stochastic_rounding, seed: see `Fused`.

    Raises:
        ValueError: an argument is out of its range, a group does not say ``use_muon``, or one that
            does has a parameter that is no matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float | None = None,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
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
        for_both: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        muon = checked_defaults(
            **for_both,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=1e-7 if eps is None else eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        adamw = _TORCHS(
            [torch.zeros(1)], **for_both, betas=betas, eps=_ADAM_EPS if eps is None else eps
        )
        super().__init__(
            params,
            {**muon, "eps": eps, "betas": adamw.defaults["betas"]},
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, which has to say ``use_muon``.

        Raises:
            ValueError: it does not, or has a parameter that is no matrix though it does.
        """
        if not isinstance(param_group.get("use_muon"), bool):
            raise ValueError(
                f"a param group has use_muon={param_group.get('use_muon')!r}, expected True for "
                "matrices, which Muon steps, or False for all else, which AdamW does; "
                "fusedopt.muon_groups(model) makes such groups"
            )
        super().add_param_group(param_group)
        if param_group["eps"] is None:
            param_group["eps"] = 1e-7 if param_group["use_muon"] else _ADAM_EPS

    def _steps_matrices_of(self, group: dict[str, Any]) -> bool:
        return bool(group["use_muon"])

    def _rule(self, group: dict[str, Any]) -> Rule:
        return super()._rule(group) if group["use_muon"] else adam_rule(_as_adamw(group))

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        if group["use_muon"]:
            return super()._scalars(group, t)
        return adam_scalars(_as_adamw(group), t)

    def _check_states(self, saved: dict[str, Any]) -> None:
        for i, group in enumerate(saved.get("param_groups", ())):
            if "use_muon" not in group:
                raise ValueError(
                    f"group {i} of the checkpoint does not say use_muon, so nobody knows who steps "
                    "it; load a checkpoint of a MuonWithAuxAdam"
                )
        super()._check_states(saved)

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """Step parameters without a kernel: matrices by `reference`, others by torch's AdamW."""
        self._step_by_operators([group for group in groups if group["use_muon"]])
        others = [group for group in groups if not group["use_muon"]]
        if not others:
            return
        for group in others:
            self._use_dtypes_of_params(group["params"])
        keys = ("params", "lr", "betas", "eps", "weight_decay")
        adamw = _TORCHS(
            [{key: group[key] for key in keys} for group in others],
            maximize=bool(others[0].get("maximize")),
        )
        adamw.state = self.state
        with torch.no_grad():
            inspect.unwrap(_TORCHS.step)(adamw)

    muon_reference = staticmethod(matrix_reference)
    adamw_reference = AdamW.reference


def _as_adamw(group: dict[str, Any]) -> dict[str, Any]:
    return {**group, "decoupled_weight_decay": True, "amsgrad": False}
