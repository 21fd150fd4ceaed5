"""Lightning: the Trainer's ``gradient_clip_val`` inside the step, and statistics of steps logged.

Nothing of Lightning is imported: this is for ``lightning.pytorch`` and ``pytorch_lightning``.
"""

from __future__ import annotations

from typing import Any

from fusedopt.integrations import fused_inside
from fusedopt.statistics import Statistics

# Precision plugins that clip by torch's function. Those of FSDP, DeepSpeed and others do not.
_PLAIN = {"Precision", "DoublePrecision", "HalfPrecision", "MixedPrecision"}


class FusedClipping:
    r"""A mixin ahead of LightningModule that does not rewrite gradients to clip them.

    .. math:: g \leftarrow g \, \min\Big(1, \frac{c}{\|g\|_2 + 10^{-6}}\Big)

    with ``Trainer(gradient_clip_val=c)`` and the gradients of the optimizer, as Lightning clips,
    but inside the step. The norm before clipping is the optimizer's ``grad_norm``. Left to
    Lightning are other optimizers than fused ones, clipping by value, precisions that clip in
    their own way (FSDP, DeepSpeed), and ``amp_scaling=True``, with which Lightning refuses to clip
    in mixed precision: set ``max_grad_norm`` on the optimizer instead.

    Write ``class Model(FusedClipping, LightningModule)``.
    """

    trainer: Any  # LightningModule's

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer; called by Lightning before each of its steps."""
        fused = fused_inside(optimizer)
        max_norm = gradient_clip_val or 0.0
        if (
            fused is None
            or fused._step_supports_amp_scaling
            or max_norm <= 0
            or gradient_clip_algorithm not in (None, "norm")
            or type(self.trainer.precision_plugin).__name__ not in _PLAIN
        ):
            super().configure_gradient_clipping(  # type: ignore[misc]  # of LightningModule
                optimizer,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm,
            )
        else:
            fused.clip_grad_norm_(max_norm)


class LogsStatistics:
    """A mixin ahead of LightningModule that logs statistics of steps (``track_statistics``).

    They go to the Trainer's loggers, each as ``statistics/`` and a name, at the Trainer's
    ``global_step``; with several fused optimizers, as ``statistics/0/`` and so on. A step that has
    none, and an optimizer that is not of fusedopt, log nothing.

    Write ``class Model(LogsStatistics, LightningModule)``.
    """

    trainer: Any  # LightningModule's
    _seen_statistics: tuple[Statistics | None, ...] = ()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the steps of this batch have found out; called by Lightning."""
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]  # of LightningModule
        all_fused = filter(None, map(fused_inside, self.trainer.optimizers))
        found = tuple(fused.statistics for fused in all_fused)
        for number, statistics in enumerate(found):
            if statistics is not None and all(
                statistics is not old for old in self._seen_statistics
            ):
                prefix = f"statistics/{number}/" if len(found) > 1 else "statistics/"
                numbers = statistics.to_dict(prefix)
                for logger in self.trainer.loggers:
                    logger.log_metrics(numbers, step=self.trainer.global_step)
        self._seen_statistics = found
