"""Transformers: let the Trainer's ``max_grad_norm`` clip inside the step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import Trainer

from fusedopt import _norms
from fusedopt.integrations import fused_inside


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
