"""Torch's Muon in another precision, and with torch's AdamW for what is no matrix."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer, _muon

import fusedopt


@contextmanager
def torch_in(precision: torch.dtype) -> Iterator[None]:
    """Let torch's Muon iterate in another precision than bfloat16: change its one cast.

    (It divides what the cast returns in place. So that has to be a copy. Since 2.15 it says so
    itself, by ``to(dtype=torch.bfloat16, copy=True)``.)
    """
    convert = torch.Tensor.to

    def cast(x: Tensor) -> Tensor:
        return convert(x, precision, copy=True)

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") is torch.bfloat16:
            kwargs["dtype"] = precision
        return convert(x, *args, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "bfloat16", cast),
        mock.patch.object(torch.Tensor, "to", to),
    ):
        yield


class TorchMuon(torch.optim.Muon):
    """Torch's own Muon, iterating in float64, and with the newest torch's way to adjust the lr."""

    def __init__(self, params: Any, adjust_lr_fn: str | None = None, **kwargs: Any) -> None:
        unclamped = adjust_lr_fn == "spectral_unclamped"
        if "lr" in kwargs:  # torch computes with a tensor in the tensor's precision
            kwargs["lr"] = float(kwargs["lr"])
        super().__init__(params, adjust_lr_fn=None if unclamped else adjust_lr_fn, **kwargs)
        for group in self.param_groups:
            group["adjust_lr_fn"] = adjust_lr_fn

    def step(self, closure: Any = None) -> Any:
        def adjust(lr: float, name: str | None, shape: Any) -> float:
            if name == "spectral_unclamped":
                return lr * (shape[0] / shape[1]) ** 0.5
            return own(lr, name, shape)

        own = _muon._adjust_lr
        bare = inspect.unwrap(torch.optim.Muon.step)  # or hooks would fire twice
        changed = mock.patch.object(_muon, "_adjust_lr", adjust)
        with torch.no_grad(), torch_in(torch.float64), changed:
            return bare(self, closure)


_OWN_OF_MUON = {"momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"}

# ---- both kinds of groups, for tests of all optimizers -------------------------------------------


def split(params: Any) -> list[dict[str, Any]]:
    """Return groups of matrices and of all else: any parameters, in the order that they have."""
    given = list(params)
    if not given or not isinstance(given[0], dict):
        given = [{"params": given}]
    return [some for group in given for some in _split_group(group)]


def _split_group(group: dict[str, Any]) -> list[dict[str, Any]]:
    if "use_muon" in group:
        return [group]
    return [
        {**group, "params": list(some), "use_muon": use_muon}
        for use_muon, some in groupby(_as_list(group["params"]), _is_matrix)
    ]


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _is_matrix(param: Any) -> bool:
    p = param[1] if isinstance(param, tuple) else param
    return bool(p.ndim == 2)


class _TakesAnyParameters(Optimizer):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for group in split([param_group]):
            super().add_param_group(group)


class MuonWithAuxAdam(_TakesAnyParameters, fusedopt.MuonWithAuxAdam):
    __doc__ = fusedopt.MuonWithAuxAdam.__doc__

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(split(params), *args, **kwargs)


class TorchMuonWithAuxAdam(_TakesAnyParameters):
    """Torch's Muon and torch's AdamW, as one."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        **kwargs: Any,
    ) -> None:
        muon = torch.optim.Muon([torch.zeros(1, 1)], adjust_lr_fn="match_rms_adamw")
        defaults = {**muon.defaults, "lr": lr, "weight_decay": weight_decay, "betas": betas}
        super().__init__(split(params), {**defaults, "eps": None, **kwargs})

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                self._step(p, group)
        return loss

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        names = {"lr", "weight_decay", "eps"}
        names |= _OWN_OF_MUON if group["use_muon"] else {"betas"}
        options = {name: group[name] for name in names}
        if options["eps"] is None:
            options["eps"] = 1e-7 if group["use_muon"] else 1e-8
        cls: Any = TorchMuon if group["use_muon"] else torch.optim.AdamW
        optimizer = cls([p], **options)
        optimizer.state = self.state
        optimizer.step()
