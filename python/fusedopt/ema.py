"""Exponential moving averages of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from fusedopt import _averaged
from fusedopt._followers import Kind
from fusedopt._numeric import accumulate
from fusedopt._stored import AVERAGE, following_dtype
from fusedopt._wrapper import Wrapper

Chosen = Iterable[Tensor] | Callable[[Tensor], bool]


class EMA(Wrapper):
    r"""A moving average of the weights around any optimizer of fusedopt or torch.

    .. math::
        \bar\theta \leftarrow \bar\theta + (1 - d) (\theta - \bar\theta)
        \quad \text{after every step}, \qquad \bar\theta \leftarrow \theta \text{ after the first}

    with the decay :math:`d`. The parameters :math:`\theta` are trained as without it; evaluate and
    save the averages, `swapped` into the model or as an `AveragedModel`. Around a fused optimizer
    they move in the pass of the step, while the parameter is in cache; around any other, and for
    parameters without a kernel, in one more pass.

    It has the wrapped optimizer's ``param_groups``, ``state`` and all other attributes, so
    schedulers, clipping and gradient scalers work through it. State: the wrapped optimizer's, and
    ``ema`` :math:`\bar\theta`, of the parameter's shape and strides, in float32 where that has 16
    bits, and of the exact float32 with ``master_weights``; param groups count steps in
    ``ema_step``, so that checkpoints have the count. A step that the optimizer skips does not count
    and moves nothing.

    The average of a parameter without a gradient rests in that step, as the parameter does: it is
    over the steps that the parameter takes. One whose first gradient comes late has an average
    that begins where it has been all the time. Parameters that never get a gradient have no
    average; they are their own. Buffers are not averaged: `swapped` and `to_averaged_model` leave
    the model's own, as `AveragedModel` does without ``use_buffers``.

    ``warmup`` lets early averages forget sooner what the weights were at the start: the decay of
    the n-th average after the first is at most :math:`(1 + n) / (10 + n)`, as in TensorFlow's
    `ExponentialMovingAverage <https://www.tensorflow.org/api_docs/python/tf/train/
    ExponentialMovingAverage>`_ with ``num_updates``.

    Source: Polyak & Juditsky 1992, doi:10.1137/0330046; Ruppert 1988, Cornell University ORIE
    technical report 781.

    Args:
        optimizer: the optimizer that makes the steps; with a `Lookahead` in it, the weights after
            the slow ones have moved are averaged.
        decay: how much of the average stays in each step, in [0, 1].
        warmup: let the decay rise to that.
        every: average the weights after every so many steps.
        params: which parameters to average: these, or those of which a function is true; all of
            the optimizer's if it is None.

    Raises:
        ValueError: decay or every is out of its range.
        TypeError: optimizer is no optimizer, or has an EMA already.
    """

    kind = Kind("ema", AVERAGE, "ema_step")
    _own = Wrapper._own | {"decay", "warmup", "every"}
    _settings = ("decay", "warmup", "every")

    decay: float
    warmup: bool
    every: int
    _chosen: frozenset[Tensor] | Callable[[Tensor], bool] | None
    _loaded: dict[Tensor, Tensor]
    """Averages of parameters that have yet to be stepped."""
    _inside: bool = False
    """Whether the averages are in the model."""

    def __init__(
        self,
        optimizer: Optimizer,
        decay: float = 0.999,
        *,
        warmup: bool = False,
        every: int = 1,
        params: Chosen | None = None,
    ) -> None:
        self._check_wrapped(optimizer)
        self.decay = decay
        self.warmup = warmup
        self.every = every
        self._chosen = params if params is None or callable(params) else frozenset(params)
        self._loaded = {}
        super().__init__(optimizer)

    @staticmethod
    def _check_setting(name: str, value: Any) -> None:
        if name == "decay" and not 0.0 <= value <= 1.0:
            raise ValueError(f"Invalid decay value: {value}, expected one in [0, 1]")
        if name == "every" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"Invalid every value: {value}, expected an integer, 1 or more")

    def __getstate__(self) -> dict[str, Any]:
        if self._inside:
            raise _averaged.inside("a copy of the optimizer")
        return {**super().__getstate__(), "_chosen": self._chosen, "_loaded": self._loaded}

    # ---- what moves --------------------------------------------------------------------------

    def weight_now(self, group: dict[str, Any]) -> float:
        """Return the share of the weights in a group's averages after this step; 0 at rest."""
        step = group.get("ema_step", 0)
        if (step + 1) % self.every:
            return 0.0
        return 1 - self.decay_of(step // self.every)

    def decay_of(self, n: int) -> float:
        """Return the decay of the n-th average after the first, whose own is 0."""
        if n == 0:
            return 0.0
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    def follows(self, p: Tensor) -> bool:
        """Return whether this parameter is averaged."""
        if self._chosen is None:
            return True
        return bool(self._chosen(p)) if callable(self._chosen) else p in self._chosen

    def first(self, p: Tensor) -> Tensor:
        """Return an average that begins where a parameter is, or as it was loaded."""
        if p in self._loaded:
            return self._loaded[p]
        fused = self._fused_master(p)
        if fused:
            return fused._master(p)
        return p.detach().to(following_dtype(p, AVERAGE), copy=True)

    def count(self, skipped: bool | Tensor) -> None:
        """Count a step that the wrapped optimizer has made, unless it was skipped."""
        super().count(skipped)
        for p in [p for p in self._loaded if AVERAGE in self.state.get(p, {})]:
            del self._loaded[p]

    @torch.no_grad()
    def _move(self, params: list[Tensor], weight: float) -> None:
        rows = []
        for p in params:
            fused = self._fused_master(p)
            x = fused._master(p) if fused else p.detach()
            rows.append((x, x, self.state[p][AVERAGE]))
        for x, _, average in self._apply(rows, weight):
            wide = torch.promote_types(x.dtype, torch.float32)
            average.copy_(self.reference(x.to(wide), average.to(wide), weight=weight))

    # ---- checkpoints -------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of an EMA, or one of the wrapped optimizer's class.

        Averages stay in float32, to which torch's own loading would not hold in a 16-bit model.
        """
        super().load_state_dict(state_dict)
        self._loaded.clear()
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for p, i in zip(params, ids, strict=True):
            saved = state_dict["state"].get(i, {}).get(AVERAGE)
            if saved is None:
                continue
            if self.follows(p):
                self.state[p][AVERAGE] = saved.to(p.device, following_dtype(p, AVERAGE))
            else:
                self.state[p].pop(AVERAGE, None)

    # ---- averages as weights -----------------------------------------------------------------

    def average(self, p: Tensor) -> Tensor | None:
        """Return the average of a parameter; None if there is none yet."""
        found: Tensor | None = self.state.get(p, {}).get(AVERAGE)
        return self._loaded.get(p) if found is None else found

    def swapped(self, model: Module | None = None) -> AbstractContextManager[None]:
        """Return a context in which the averages are in the model, and the weights after it.

        .. code-block:: python

            with ema.swapped():
                evaluate(model)
                torch.save(model.state_dict(), path)

        Each average changes places with its parameter, bit for bit, also after an exception: the
        model's memory stays its own, and no second copy of it is made, but for 2 bytes for each
        element of a float16 parameter, whose digits are too few to take turns. Inside, leave the
        weights as they are.

        Args:
            model: only of `fully_shard` modules, which may have gathered weights before: they are
                told to gather anew.

        Raises:
            RuntimeError: inside: a step, a checkpoint of the optimizer, which would have the two
                the wrong way round, or `swapped` once more.
        """
        return _averaged.swapped(self, model)

    def to_averaged_model(self, model: Module) -> AveragedModel:
        """Return an AveragedModel that goes on from here: a copy of the model with the averages.

        Args:
            model: the model whose parameters the optimizer steps. The copy has its dtypes, to which
                averages are rounded, and its buffers.
        """
        return _averaged.to_averaged_model(self, model)

    def load_averaged_model(self, averaged: AveragedModel, model: Module) -> None:
        """Go on from the averages of an AveragedModel and their number.

        Args:
            averaged: made for this model, or one like it. Its buffers are not looked at.
            model: the model whose parameters the optimizer steps.

        Raises:
            ValueError: the two models differ in their parameters. Nothing has changed then.
        """
        _averaged.load_averaged_model(self, averaged, model)

    @staticmethod
    def reference(  # noqa: D102  (the class docstring has the formula)
        p: Any, average: Any, *, weight: float
    ) -> Any:
        return accumulate(average, p * weight, weight)
