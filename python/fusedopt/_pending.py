"""A clip that waits for the step, and the gradients that it is of.

`clip_grad_norm_` scales in the step what torch's function scales at once. The two are the same only
while every gradient is the tensor that was clipped, with the values that it had. Where it is not,
nobody can tell afterwards what the factor belongs to: `Pending.serves` then raises an error.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor

# It changes with every change in place; None of tensors of inference mode, which do not count them.
Version = int | tuple[int, int] | None


class Pending:
    """What clipping has found out for the next step; by default, nothing.

    Gradients are held by weak references, for a batch that is dropped is to be freed.
    """

    __slots__ = ("_gradients", "_versions", "coefficient", "norm")

    def __init__(
        self,
        coefficient: float | Tensor = 1.0,
        norm: float | Tensor | None = None,
        gradients: Sequence[Tensor] = (),
    ) -> None:
        self.coefficient = coefficient
        self.norm = norm
        self._gradients = list(map(ref, gradients))
        self._versions = _versions(gradients)

    def sees_changes(self) -> bool:
        """Return whether all gradients count their changes in place."""
        return None not in self._versions

    def serves(
        self, gradients: Sequence[Tensor], name: Callable[[Tensor], str], *, clips_again: bool
    ) -> bool:
        """Return whether the coefficient is one of these gradients: all that there are.

        Some may be gone. False is the answer only if it makes no difference, or if all those that
        were clipped are certain to be gone.

        Raises:
            RuntimeError: nobody can tell.
        """
        if self.norm is None or not gradients:
            return False
        if len(gradients) == len(self._gradients):
            clipped = [gradient() for gradient in self._gradients]
            if all(map(operator.is_, clipped, gradients)) and self._versions == _versions(
                gradients
            ):
                return True
        changed = self._changed(gradients)
        if not changed:
            return True
        if self.coefficient == 1:
            return False
        # A scaler skips such a batch, and the next one is clipped by its own norm.
        if clips_again and len(changed) == len(gradients) and not math.isfinite(self.norm):
            return False
        raise RuntimeError(
            f"the gradient of {name(changed[0])} was replaced, or changed in place, after it was "
            f"clipped: clip_grad_norm_ of the optimizer leaves the factor, {self.coefficient:.3g}, "
            "to the next step, which expects the gradients that were clipped. If they were "
            "dropped, call zero_grad() of the optimizer, for it does not hear of the model's; to "
            "change them, or to add to them, clip after that, or by "
            "fusedopt.clip_grad_norm_(parameters, max_norm), which scales at once"
        )

    def _changed(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return those that are no longer what was clipped: a zero is, times any factor."""
        versions = dict(zip(map(id, self._live()), self._versions, strict=True))
        now = _versions(gradients)
        return [
            gradient
            for gradient, version in zip(gradients, now, strict=True)
            if versions.get(id(gradient)) != version
            and not (id(gradient) in versions and not _local(gradient).any())
        ]

    def _live(self) -> list[Tensor | None]:
        return [gradient() for gradient in self._gradients]

    def __deepcopy__(self, memo: dict[int, Any]) -> Pending:
        """Copy an optimizer's, whose tensors have been copied: gradients of plain tensors too."""
        unchanged = [
            gradient
            for gradient, version in zip(self._live(), self._versions, strict=True)
            if gradient is not None and _version(gradient) == version
        ]
        return Pending(
            self.coefficient, self.norm, [memo[i] for i in map(id, unchanged) if i in memo]
        )

    def __reduce__(self) -> Any:
        return Pending, (self.coefficient, self.norm)  # gradients are not pickled


def _versions(gradients: Sequence[Tensor]) -> list[Version]:
    try:
        return [g._version if type(g) is Tensor else _version(g) for g in gradients]
    except RuntimeError:  # of inference mode
        return [_version(g) for g in gradients]


def _version(gradient: Tensor) -> Version:
    if gradient.is_inference():
        return None
    local = _local(gradient)  # which FSDP2 adds to by itself
    return gradient._version if local is gradient else (gradient._version, local._version)


def _local(gradient: Tensor) -> Tensor:
    """Return this rank's part of a DTensor."""
    local: Tensor = getattr(gradient, "_local_tensor", gradient)
    return local
