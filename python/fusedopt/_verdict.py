"""What the norm of all gradients decides, in plain operators: csrc/engine/verdict.h."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from fusedopt import _engine, _norms, _operators, _spikes, clip
from fusedopt._engine import Scaling
from fusedopt._spikes import Judgement


class Verdict(NamedTuple):
    """What becomes of a step."""

    norm: float | Tensor
    """Of all gradients; NaN if nothing asked for it."""
    decided: Scaling | None
    """What is left to be done to the gradients; None if the step is skipped."""
    judgement: Judgement = Judgement()
    """To be remembered, if there is a watch."""


def decide(groups: list[dict[str, Any]], scaling: Scaling) -> Verdict:
    """Return what the norm of all gradients makes of a step."""
    norm: float | Tensor = math.nan
    skip = scaling.skip
    if scaling.needs_norm():
        found = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = _norms.total_norm(found, 2) * scaling.unscale
    if scaling.skip_nonfinite and isinstance(norm, Tensor):
        infinite = (~norm.isfinite()).double()
        skip = infinite if skip is None else skip + infinite
    elif scaling.skip_nonfinite and not math.isfinite(norm):
        return Verdict(norm, None)
    factor = scaling.unscale * scaling.coefficient
    clipped: float | Tensor = 1.0
    if scaling.max_norm is not None:
        clipped = clip.coefficient(norm * scaling.coefficient, scaling.max_norm)
    judgement = _judge(scaling, norm, skip)
    if judgement.is_spike and scaling.spikes is not None:
        if not scaling.spikes.clips:
            return Verdict(norm, None, judgement)
        of_spike = _engine.number(_norm_of_spikes(scaling, norm) * scaling.coefficient)
        other = clip.reference_clip_coefficient(of_spike, judgement.limit)
        clipped = clipped.clamp(max=other) if isinstance(clipped, Tensor) else min(clipped, other)
    return Verdict(norm, Scaling(coefficient=factor * clipped, skip=skip), judgement)


def _norm_of_spikes(scaling: Scaling, norm: float | Tensor) -> float | Tensor:
    assert scaling.spikes is not None
    known = scaling.spikes.norm
    return norm if known is None else known * scaling.unscale


def _judge(scaling: Scaling, norm: float | Tensor, skip: Tensor | None) -> Judgement:
    """Return what is said of the norm; this waits for one that a device has."""
    watch = scaling.spikes
    if watch is None:
        return Judgement()
    norm = _norm_of_spikes(scaling, norm)
    if any(isinstance(x, Tensor) and _operators.has_no_values(x) for x in (norm, skip)):
        return Judgement()
    if skip is not None and _engine.number(skip) != 0:
        return Judgement()
    return _spikes.judge(watch, watch.norms.tolist(), _engine.number(norm))
