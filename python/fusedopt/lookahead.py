"""Lookahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt._followers import Kind
from fusedopt._numeric import accumulate
from fusedopt._stored import SLOW
from fusedopt._wrapper import Wrapper


class Lookahead(Wrapper):
    r"""Lookahead around any optimizer of fusedopt or torch: k steps forward, one step back.

    .. math::
        \phi &\leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi
        \quad \text{after every } k \text{-th step}

    with the wrapped optimizer's parameters :math:`\theta`, the fast weights, and slow weights
    :math:`\phi`, which begin where a parameter is before its first step. The k-th step of a fused
    optimizer moves both in the same pass; around any other it takes one more pass.

    It has the wrapped optimizer's ``param_groups``, ``state`` and all other attributes, so
    schedulers, clipping and gradient scalers work through it. State: the wrapped optimizer's, and
    ``slow`` :math:`\phi`, of the parameter's shape, dtype and strides; param groups count steps
    in ``lookahead_step``, 0 to k - 1, so that checkpoints have the count. A step that the
    optimizer skips does not count.

    Source: Zhang et al. 2019, arXiv:1907.08610.

    Args:
        optimizer: the optimizer that makes the steps; an `EMA` in it averages the fast weights.
        k: how many steps the fast weights are ahead.
        alpha: how far the slow weights follow, in (0, 1].

    Raises:
        ValueError: k or alpha is out of its range.
        TypeError: optimizer is no optimizer, or has a Lookahead already.
    """

    kind = Kind("lookahead", SLOW, "lookahead_step")
    _own = Wrapper._own | {"k", "alpha"}
    _settings = ("k", "alpha")

    k: int
    alpha: float

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        self._check_wrapped(optimizer)
        self.k = k
        self.alpha = alpha
        super().__init__(optimizer)

    @staticmethod
    def _check_setting(name: str, value: Any) -> None:
        if name == "k" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"Invalid k value: {value}, expected an integer, 1 or more")
        if name == "alpha" and not 0.0 < value <= 1.0:
            raise ValueError(f"Invalid alpha value: {value}, expected one in (0, 1]")

    def count(self, skipped: bool | Tensor) -> None:
        """Count a step that the wrapped optimizer has made, unless it was skipped."""
        if not skipped:
            for group in self.param_groups:
                group["lookahead_step"] = (group.get("lookahead_step", 0) + 1) % self.k

    def weight_now(self, group: dict[str, Any]) -> float:
        """Return how far the slow weights of a group follow in this step: 0 but in every k-th."""
        return self.alpha if group.get("lookahead_step", 0) + 1 >= self.k else 0.0

    def first(self, p: Tensor) -> Tensor:
        """Return slow weights that begin where a parameter is."""
        fused = self._fused_master(p)
        return fused._master(p) if fused else p.detach().clone()

    @torch.no_grad()
    def _move(self, params: list[Tensor], weight: float) -> None:
        rows: list[Sequence[Tensor]] = []
        for p in params:
            slow, fused = self.state[p][SLOW], self._fused_master(p)
            if fused:
                new_slow, new_p = self.reference(fused._master(p), slow, alpha=weight)
                slow.copy_(new_slow)
                fused._set_master(p, new_p)
            else:
                rows.append((p, p, slow))
        for p, _, slow in self._apply(rows, weight):
            wide = torch.promote_types(p.dtype, torch.float32)
            new_slow, new_p = self.reference(p.to(wide), slow.to(wide), alpha=weight)
            slow.copy_(new_slow)
            p.copy_(new_p)
        torch.autograd.graph.increment_version(params)

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any, slow: Any, *, alpha: float
    ) -> tuple[Any, Any]:
        slow = accumulate(slow, p * alpha, alpha)
        return slow, slow
