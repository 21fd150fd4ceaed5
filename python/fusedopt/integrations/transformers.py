"""Transformers: the Trainer's ``max_grad_norm`` inside the step, and statistics of steps logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from fusedopt import _norms
from fusedopt.integrations import fused_inside
from fusedopt.statistics import Statistics


class FusedClipping(Trainer):  # type: ignore[misc]  # mypy does not see transformers
    r"""A `transformers.Trainer` that does not rewrite gradients to clip them.

    .. math:: g \leftarrow g \, \min\Big(1, \frac{c}{\|g\|_2 + 10^{-6}}\Big)

    with ``args.max_grad_norm`` :math:`c` and the gradients of all the model's parameters, as the
    Trainer clips, but inside the step of the optimizer. The norm before clipping is logged as
    ``grad_norm``, also where ``max_grad_norm`` is 0, which clips nothing. Other optimizers than
    fused ones, and FSDP, DeepSpeed, Megatron-LM, XLA and parameters on several device meshes, are
    left to the Trainer.

    It is a Trainer, and a mixin for others: ``class MyTrainer(FusedClipping, Seq2SeqTrainer)``.

    Arguments: the Trainer's.
    """

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self._clips_in_step(model):
            return super()._clip_grad_norm(model)
        return self._clip_in_step(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._clips_in_step(model):
            grad_norm = self._clip_in_step(model, math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _clips_in_step(self, model: Any) -> bool:
        kind = self.accelerator.distributed_type.value
        plain = kind == "NO" or kind.startswith("MULTI_")  # one process, or data-parallel ones
        return (
            plain
            and fused_inside(self.optimizer) is not None
            and not self._has_mixed_mesh_grads(model)
        )

    def _clip_in_step(self, model: Any, max_norm: float) -> float | Tensor:
        optimizer = fused_inside(self.optimizer)
        assert optimizer is not None
        self.accelerator.unscale_gradients()  # those of float16; others are as they are
        norm = _norms.total_norm([p.grad for p in model.parameters() if p.grad is not None], 2.0)
        optimizer.clip_grads_with_norm_(max_norm, norm)
        return norm


class StatisticsCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not see transformers
    """A callback that hands on the statistics of steps that have some (``track_statistics``).

    With ``log=lambda numbers, step: trainer.log(numbers)``, they go where the Trainer reports.

    Args:
        log: takes a dict of names to numbers, and the number of the step: ``wandb.log``, say.
        prefix: of the names.
    """

    def __init__(
        self, log: Callable[[dict[str, float], int], object], prefix: str = "statistics/"
    ) -> None:
        self._log = log
        self._prefix = prefix
        self._seen: Statistics | None = None

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Log what the step has found out; called by the Trainer after each one."""
        fused = fused_inside(optimizer)
        statistics = None if fused is None else fused.statistics
        if statistics is not None and statistics is not self._seen:
            self._seen = statistics
            self._log(statistics.to_dict(self._prefix), state.global_step + 1)
