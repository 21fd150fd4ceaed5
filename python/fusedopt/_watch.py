"""What steps find out for statistics: the engine while it updates, operators for all else.

Those are the readable spec of csrc/engine/watch.h, too: `_note_gradient` and `_noting_change`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fusedopt._clipping import Clips
from fusedopt._engine import Scaling
from fusedopt._fallback import FallsBack
from fusedopt._found import GRAD, NONFINITE, PARAM, UNMOVED, UPDATE, Part
from fusedopt._gradients import gradient_of
from fusedopt._norms import sum_of_squares
from fusedopt._shards import local
from fusedopt._stored import HALVES
from fusedopt.statistics import Statistics


class Watches(Clips, FallsBack):
    """Statistics, for `fusedopt._base.Fused`."""

    _statistics: Statistics | None = None
    _watching: Statistics | None = None  # of the step that is being made
    _statistics_requested = False
    _steps_of_statistics = 0

    @property
    def statistics(self) -> Statistics | None:
        """The `Statistics` of the last step that was to have some; None before the first one."""
        found: Statistics | None = vars(self._itself()).get("_statistics")
        return found

    def request_statistics(self) -> None:
        """Let the next step have `statistics`, whatever ``track_statistics`` says."""
        vars(self._itself())["_statistics_requested"] = True

    def _begin_watch(self, scaling: Scaling) -> None:
        """Let what updates are made from here on tell what they do, if it is their turn."""
        every = self.defaults.get("track_statistics", False)
        turn = every and (self._steps_of_statistics + 1) % every == 0
        if not turn and not self._statistics_requested:
            self._watching = None
        elif self._watching is None or not self._watching.has_released:
            self._watching = Statistics(self.param_groups, scaling.unscale)

    def _begin_watch_of_released(self, p: Tensor, scaling: Scaling) -> None:
        """Do so for a parameter that is stepped during backward, ahead of the step."""
        self._begin_watch(scaling)
        if self._watching is not None:
            self._watching.begin_released(p)

    def _end_watch(self, skipped: bool | Tensor) -> None:
        """Count the step; what was found out in it is its statistics."""
        self._steps_of_statistics += 1
        watch, self._watching = self._watching, None
        if watch is None or (self._release is not None and not watch.has_parts):
            return  # (What is asked for after the backward pass has its turn in the next one.)
        self._statistics_requested = False
        if skipped is True:
            watch.forget_parts()
            self._watch_no_step(watch.part_of(self.param_groups))
        self._statistics = watch

    def _watched(self, groups: list[dict[str, Any]]) -> Part | None:
        """Return where the statistics of these groups go, if they are to have any."""
        return None if self._watching is None else self._watching.part_of(groups)

    # ---- the readable spec, for what the engine does not step --------------------------------

    def _fall_back(
        self,
        all_groups: list[dict[str, Any]],
        unsupported: list[tuple[int, Tensor]],
        factor: float | Tensor,
        *,
        warns: bool = True,
    ) -> None:
        with self._watch_change(unsupported, with_gradients=True):
            super()._fall_back(all_groups, unsupported, factor, warns=warns)

    def _watch_change(
        self,
        pairs: Sequence[tuple[int, Tensor]],
        skip: Tensor | None = None,
        *,
        with_gradients: bool = False,
    ) -> AbstractContextManager[None]:
        """Note what the with block does to (group index, parameter) pairs of the part begun last.

        Args:
            pairs: of its groups.
            skip: if this is not 0, it does nothing.
            with_gradients: note their gradients, too.
        """
        if self._watching is None:
            return nullcontext()
        return self._noting_change(self._watching.last_part, pairs, skip, with_gradients)

    @contextmanager
    def _noting_change(
        self,
        part: Part,
        pairs: Sequence[tuple[int, Tensor]],
        skip: Tensor | None,
        with_gradients: bool,
    ) -> Iterator[None]:
        if with_gradients:
            for index, p in pairs:
                _note_gradient(part, index, p)
        with torch.no_grad():
            before = [self._numbers(p).clone() for _, p in pairs]
        yield
        for (index, p), was in zip(pairs, before, strict=True):
            now = self._numbers(p)
            part.put(index, p, PARAM, sum_of_squares(now))
            part.put(index, p, UPDATE, sum_of_squares(now - was))
            if self._may_stay(p):
                unmoved = (now == was).sum()
                part.put(index, p, UNMOVED, unmoved if skip is None else unmoved * (skip == 0))

    def _watch_no_step(self, part: Part) -> None:
        """Note the gradients of a step that was skipped."""
        for index, (params, _) in enumerate(part.groups):
            for p in params:
                if p.grad is None:
                    continue
                _note_gradient(part, index, p)
                part.put(index, p, PARAM, sum_of_squares(self._numbers(p)))
                part.put(index, p, UPDATE, 0.0)
                if self._may_stay(p):
                    part.put(index, p, UNMOVED, 0.0)

    @torch.no_grad()
    def _numbers(self, p: Tensor) -> Tensor:
        """Return what this process has of p as real numbers: its masters where it has them."""
        numbers = local(self._master(p) if self._has_master(p) else p).resolve_neg()
        if numbers.is_complex():
            return torch.view_as_real(numbers.resolve_conj())
        return numbers.float() if numbers.dtype in HALVES else numbers

    def _may_stay(self, p: Tensor) -> bool:
        """Return whether elements of p are counted that an update does not change."""
        return p.dtype in HALVES and not self._has_master(p)


@torch.no_grad()
def _note_gradient(part: Part, index: int, p: Any) -> None:
    gradient = p.grad if p.grad.layout != torch.strided else gradient_of(p)
    if gradient.layout != torch.strided:
        gradient = gradient.coalesce().values() if gradient.is_sparse else gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    part.put(index, p, GRAD, sum_of_squares(gradient))
    part.put(index, p, NONFINITE, (~gradient.isfinite()).sum())
