"""Which norms of gradients are spikes, by the norms of the steps before: the readable spec."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LANES = 16
_ACTIONS = ("skip", "clip")


@dataclass(frozen=True)
class Spikes:
    r"""When the norm of a step's gradients is a spike, and what becomes of the step.

    .. math::
        \|g\|_2 > \mu + k \max(\sigma, \mu / 100) \quad \text{or} \quad \|g\|_2 > \tau

    with the mean :math:`\mu` and the standard deviation :math:`\sigma` (of a sample: divided by
    their number less one) of the last norms that were accepted, and the threshold :math:`\tau`. The
    hundredth of the mean is for norms that hardly differ: with six sigmas none is a spike that
    exceeds it by less than 6 %.

    A skipped step changes nothing, and counts in ``skipped_steps``; a norm that is skipped does not
    enter the window. One that is clipped enters as what it was clipped to, so the window follows
    norms that have moved to another level. Where steps are skipped, ``patience`` does that: if so
    many in a row were, the next such norm is accepted, and the window begins anew with it. Norms of
    0 are no spikes, and do not enter. Nor do infinite ones and NaN: those are skipped with
    ``skip_nonfinite=True``, and without it make the step that they make without this.

    Source: the practice of OLMo-core (``SkipStepOptimizer``), MaxText (``skip_step_on_spikes``) and
    Levanter (``SkipStepConfig``): six sigmas over 128 steps, after half of them. They look at the
    loss, too, and let skipped norms enter. A fixed threshold is Megatron's
    ``grad_norm_skip_threshold``; clipping by sigmas is Kumar et al. 2025, arXiv:2504.02507.

    Args:
        sigmas: :math:`k`, how many standard deviations above the mean are too many; ``inf`` leaves
            all to the threshold.
        window: of how many norms mean and deviation are.
        warmup: so many norms have to be in the window before it limits any, 2 or more; None for
            half of the window.
        patience: after so many skipped steps in a row the window begins anew. Steps that the
            threshold skips do not count.
        threshold: :math:`\tau`, which holds from the first step on, and is never given up; None for
            none.
        action: ``"skip"`` leaves the step out; ``"clip"`` scales its gradients down to the limit,
            as ``max_grad_norm`` does.

    Raises:
        ValueError: one of these is out of its range.
    """

    sigmas: float = 6.0
    window: int = 128
    warmup: int | None = None
    patience: int = 16
    threshold: float | None = None
    action: str = "skip"

    def __post_init__(self) -> None:
        expected: dict[str, tuple[bool, str]] = {
            "sigmas": (_is_positive(self.sigmas), "a number above 0; inf for the threshold alone"),
            "window": (_is_count(self.window, 2), "an integer, 2 or more"),
            "warmup": (
                self.warmup is None or (_is_count(self.warmup, 2) and self.warmup <= self.window),
                f"an integer from 2 to window={self.window}, or None for half of the window",
            ),
            "patience": (_is_count(self.patience, 1), "an integer, 1 or more"),
            "threshold": (
                self.threshold is None or _is_positive(self.threshold),
                "a norm above 0, or None for none",
            ),
            "action": (self.action in _ACTIONS, 'one of "skip" and "clip"'),
        }
        for name, (is_right, what) in expected.items():
            if not is_right:
                raise ValueError(f"Invalid {name}: {getattr(self, name)!r}, expected {what}")


def _is_positive(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0


def _is_count(x: Any, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def asked(value: bool | Spikes) -> Spikes | None:
    """Return what an argument skip_spikes asks for.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, Spikes):
        return value
    if isinstance(value, bool):
        return _DEFAULT if value else None
    raise ValueError(
        f"Invalid skip_spikes: {value!r}, expected False, True, or a fusedopt.Spikes; for a fixed "
        "limit, pass fusedopt.Spikes(threshold=...)"
    )


_DEFAULT = Spikes()


# ---- what a step is told -------------------------------------------------------------------------


class Watch(NamedTuple):
    """What a step limits norms by, as csrc/step/watch.h reads it."""

    norms: Tensor
    """Those of the last accepted steps, in a ring; then how many were accepted in all, and how many
    were rejected in a row. In float64."""
    address: int
    """Of these, if the CPU has them."""
    size: int
    """Of the ring."""
    warmup: float
    patience: float
    sigmas: float
    threshold: float
    clips: bool
    norm: float | Tensor | None
    """In place of the 2-norm, before it is unscaled. A tensor is 0-dim, in float64, on a device."""

    def is_of(self, norms: object) -> bool:
        """Return whether these are the norms, where they were."""
        return norms is self.norms and self.address in (0, self.norms.data_ptr())


def zeros(spikes: Spikes, device: torch.device) -> Tensor:
    """Return a window that nothing has entered yet."""
    return torch.zeros(spikes.window + 2, dtype=torch.float64, device=device)


def fits(spikes: Spikes, norms: Any) -> bool:
    """Return whether this is a window for these spikes."""
    return (
        isinstance(norms, Tensor)
        and norms.dtype == torch.float64
        and norms.shape == (spikes.window + 2,)
        and norms.is_contiguous()
    )


def watch(spikes: Spikes, norms: Tensor) -> Watch:
    """Return what a step is to be told."""
    return Watch(
        norms,
        norms.data_ptr() if norms.is_cpu else 0,
        spikes.window,
        float(max(2, spikes.window // 2) if spikes.warmup is None else spikes.warmup),
        float(spikes.patience),
        float(spikes.sigmas),
        math.inf if spikes.threshold is None else float(spikes.threshold),
        spikes.action == "clip",
        None,
    )


# ---- the spec ------------------------------------------------------------------------------------


class Judgement(NamedTuple):
    """What is said of a norm, as csrc/engine/spikes.h has it."""

    limit: float = math.inf
    entry: float = 0.0
    """What enters the ring; 0: nothing does."""
    is_spike: bool = False
    is_rejected: bool = False
    """By the ring: the threshold does not count."""
    begins_anew: bool = False
    """For too many were."""


def judge(watch: Watch, norms: Sequence[float], norm: float) -> Judgement:
    """Return what becomes of a step with gradients of this norm; `norms` are the watch's."""
    if not 0 < norm < math.inf:  # nor NaN
        return Judgement()
    usual = limit_of_ring(watch, norms)
    limit = usual if usual < watch.threshold else watch.threshold
    if norm <= limit:
        return Judgement(limit, entry=norm)
    if watch.clips:
        return Judgement(limit, entry=limit, is_spike=True)
    if norm > watch.threshold:
        return Judgement(limit, is_spike=True)
    if norms[watch.size + 1] >= watch.patience:
        return Judgement(limit, entry=norm, begins_anew=True)
    return Judgement(limit, is_spike=True, is_rejected=True)


def limit_of_ring(watch: Watch, norms: Sequence[float]) -> float:
    """Return the mean plus so many standard deviations; infinity while there are few norms."""
    accepted = norms[watch.size]
    if accepted < watch.warmup:
        return math.inf
    count = min(int(accepted), watch.size)
    mean = _sum_in_lanes(count, lambda i: norms[i]) / count
    squares = _sum_in_lanes(count, lambda i: (norms[i] - mean) * (norms[i] - mean))
    deviation = math.sqrt(squares / (count - 1))
    return mean + watch.sigmas * max(deviation, mean * 0.01)


def _sum_in_lanes(count: int, of: Callable[[int], float]) -> float:
    """Return the sum of so many numbers: every sixteenth one, then halves of those."""
    lanes = [0.0] * _LANES
    for i in range(count):
        lanes[i % _LANES] += of(i)
    half = _LANES // 2
    while half:
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
        half //= 2
    return lanes[0]


def remember(watch: Watch, judgement: Judgement) -> None:
    """Change the norms, once the step is made, or skipped for this reason."""
    norms = watch.norms.tolist()
    size = watch.size
    if judgement.is_rejected:
        norms[size + 1] += 1
    if judgement.entry != 0:
        accepted = 0 if judgement.begins_anew else int(norms[size])
        norms[accepted % size] = judgement.entry
        norms[size:] = [accepted + 1, 0.0]
    watch.norms.copy_(torch.tensor(norms, dtype=torch.float64))
