"""Steps that were skipped, and the norms of those that were not, by which a spike is known."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fusedopt import _norms, _spikes
from fusedopt._options import HasOptions
from fusedopt._stored import WINDOW, place_of_draws

T = TypeVar("T", bound="Skips")


class Skips(HasOptions):
    """Counting skipped steps, and `fusedopt.Spikes`, for `fusedopt._clipping.Clips`."""

    _skipped_steps: int | Tensor = 0
    _holder: Tensor | None = None  # the parameter whose state has the window of norms
    _last_watch: tuple[bool | _spikes.Spikes, _spikes.Watch] | None = None

    def _itself(self: T) -> T:
        """Return the optimizer itself.

        Lightning's wrapper takes on the class of what it wraps, so methods that users call get it
        as self: what they keep there, the step would never see. It has no groups of its own.
        """
        mine = vars(self)
        itself: T = self if "param_groups" in mine else mine.get("_optimizer", self)
        return itself

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped; waits for the device that counts them, if one does.

        For non-finite gradients (with ``skip_nonfinite``), for spikes (with ``skip_spikes``), or
        because a GradScaler told the step to (with ``amp_scaling``, or a `fusedopt.GradScaler`).
        """
        return int(vars(self._itself()).get("_skipped_steps", 0))

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        vars(self._itself())["_skipped_steps"] = value

    def _count_skipped(self, skipped: bool | Tensor) -> None:
        """Add to `skipped_steps`; what a device counts, in place, as a graph repeats it."""
        if isinstance(self._skipped_steps, Tensor):
            if isinstance(skipped, Tensor):
                skipped = _norms.moved(skipped, self._skipped_steps.device, torch.float32)
            self._skipped_steps += skipped
        elif isinstance(skipped, Tensor):
            self._skipped_steps = skipped + self._skipped_steps
        else:
            self._skipped_steps += skipped

    # ---- spikes ------------------------------------------------------------------------------

    # The window is in the state of a parameter. Only there does every kind of checkpoint take it
    # along: distributed ones drop other keys than state and groups, and flattened ones compare the
    # values of groups, which tensors cannot be.

    def _watch(self, norm: float | Tensor | None) -> _spikes.Watch | None:
        """Return by what a step is to know spikes, of this norm if there is one."""
        given = self.defaults.get("skip_spikes", False)  # found faster so
        state: Any = self.state.get(self._holder) if self._holder is not None else None
        norms = state.get(WINDOW) if state else None
        last = self._last_watch
        if last is not None and last[0] is given and last[1].is_of(norms):
            return last[1] if norm is None else last[1]._replace(norm=norm)
        spikes = _spikes.asked(given)
        if spikes is None:
            return None
        watch = _spikes.watch(spikes, self._find_window(spikes))
        self._last_watch = given, watch
        return watch if norm is None else watch._replace(norm=norm)

    def _find_window(self, spikes: _spikes.Spikes) -> Tensor:
        """Return the window that is there, or a new one."""
        p = self._holder = self._place_of_window()
        norms: Any = None if p is None else self.state.get(p, {}).get(WINDOW)
        if _spikes.fits(spikes, norms):
            found: Tensor = norms
            return found
        return _spikes.zeros(spikes, torch.device("cpu") if p is None else place_of_draws(p))

    def _place_of_window(self) -> Tensor | None:
        """Return the parameter that has a window, or is to get one: the first to be trained."""
        params = [p for group in self.param_groups for p in group["params"]]
        found = (p for p in params if WINDOW in self.state.get(p, ()))
        return next(found, next((p for p in params if p.requires_grad), None))

    def _keep_window(self, watch: _spikes.Watch) -> None:
        """Put the window of a step that was made where checkpoints find it, behind all else."""
        if self._holder is None:
            return
        state = self.state[self._holder]
        if state.get(WINDOW) is not watch.norms or next(reversed(state)) != WINDOW:
            state.pop(WINDOW, None)
            state[WINDOW] = watch.norms
