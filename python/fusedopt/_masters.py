"""What 16-bit parameters lack of float32, and the exchange of float32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fusedopt import _codecs
from fusedopt._options import HasOptions
from fusedopt._shards import as_part_of, local
from fusedopt._stored import HALVES, MASTER, REMAINDER, as_laid_out


class Masters(HasOptions):
    """Float32 masters, for `fusedopt._storage.Stores`."""

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in HALVES

    def _all_parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _master(self, p: Tensor) -> Tensor:
        """Return p in float32, with all digits that the state has of it."""
        state = self.state.get(p, {})
        if REMAINDER in state and p.dtype == torch.bfloat16:
            return as_part_of(p, _codecs.join(local(p), local(state[REMAINDER])))
        if MASTER in state and p.dtype == torch.float16:
            return as_part_of(p, _codecs.join_float16(local(p), local(state[MASTER])))
        return p.detach().float()

    @torch.no_grad()
    def _set_master(self, p: Tensor, master: Tensor) -> None:
        if p.dtype == torch.float16:
            p.copy_(master)
            self.state[p][MASTER] = as_laid_out(master.clone(), p)
            return
        rounded, remainder = _codecs.split(local(master))
        p.copy_(as_part_of(p, rounded))
        self.state[p][REMAINDER] = as_laid_out(as_part_of(p, remainder), p)

    def master_state_dict(self, model: Module) -> dict[str, Any]:
        """Return ``model.state_dict()`` with float32 weights: all digits that the states have.

        Args:
            model: the model whose parameters this optimizer steps.

        Returns:
            A state dict in which each 16-bit parameter is float32: exactly the masters of
            ``master_weights=True``, and the parameter itself where there is none.
        """
        weights = model.state_dict()
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in weights and p.dtype in HALVES:
                weights[name] = self._master(p)
        return weights

    def load_master_state_dict(self, model: Module, state_dict: dict[str, Any]) -> None:
        """Load float32 weights into a 16-bit model: what it lacks of them goes into the states.

        Args:
            model: the model whose parameters this optimizer steps.
            state_dict: of a float32 model, or what `master_state_dict` returned.

        Raises:
            ValueError: this optimizer keeps no masters. Nothing has changed then.
            RuntimeError: ``model.load_state_dict`` refuses names or shapes.
        """
        if not self.master_weights:
            raise ValueError(
                "load_master_state_dict on an optimizer without masters, which would lose what "
                "16 bits cannot hold; make it with master_weights=True, or use "
                "model.load_state_dict()"
            )
        model.load_state_dict(state_dict)  # rounded by torch; and refused, if anything is
        own = set(self._all_parameters())
        for name, p in model.named_parameters(remove_duplicate=False):
            if p in own and p.dtype in HALVES and name in state_dict:
                self._set_master(p, state_dict[name].to(device=p.device, dtype=torch.float32))
