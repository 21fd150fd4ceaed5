"""The engine of this process, and what goes into it."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt import _core, _memory
from fusedopt._spikes import Watch

engine = _core.Engine(isa=os.environ.get("FUSEDOPT_ISA", ""))

# Dynamo cannot trace the engine, and warns where it meets it. The public torch.compiler.disable
# would import all of dynamo at once.
not_compiled = torch._compile._disable_dynamo


def number(x: float | Tensor) -> float:
    """Return a hyper-parameter, which may be a one-element tensor, as a float."""
    if type(x) is float:  # found faster so
        return x
    if not isinstance(x, Tensor):
        return float(x)
    if on_device(x) and _memory.is_capturing(-1 if x.is_cpu else x.device.index):
        raise RuntimeError(
            f"a graph cannot capture a step that waits for a number on {x.device}, here a "
            "hyper-parameter, which each replay would repeat; pass a number, or a tensor on cpu: "
            "of those on a device, only lr is read there"
        )
    return float(x.item())


def on_device(x: object) -> bool:
    """Return whether x is a tensor that the engine's device kernels work on."""
    return isinstance(x, Tensor) and why_no_kernels(x) == ""


def why_no_kernels(x: Tensor) -> str | None:
    """Return why the device of x has no kernels, empty if it has; None if it needs none."""
    if engine.emulated:
        return engine.why_not(0) if x.is_cpu else None
    return engine.why_not(x.device.index) if x.is_cuda else None


def number_or_device(x: float | Tensor) -> float | Tensor:
    """Return a number, or a tensor on a device as float64: nobody waits for that."""
    return x.detach().double() if isinstance(x, Tensor) and on_device(x) else number(x)


def valid_max_norm(max_norm: float | Tensor, name: str = "max_norm") -> float:
    """Return max_norm as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or NaN.
    """
    try:
        value = number(max_norm)
    except (TypeError, ValueError):
        raise TypeError(
            f"Invalid {name} value: {max_norm!r}, expected a number, 0 or more; inf clips nothing"
        ) from None
    if not value >= 0:
        raise ValueError(f"Invalid {name} value: {value}, expected 0 or more; inf clips nothing")
    return value


class Rule(NamedTuple):
    """Which kernel steps a param group, and which state it keeps for each parameter."""

    name: str
    """As registered in csrc/rules/list.h."""
    flags: tuple[bool, ...]
    """The bool template parameters of the rule, in order."""
    states: tuple[str, ...]
    """Keys of the state tensors, in the order in which the rule takes them."""
    counts_steps: bool
    """Whether the state holds a ``step``."""


class Group(NamedTuple):
    """What a param group asks for, but for parameters and lr, as csrc/step/group.h reads it."""

    has_kernel: bool
    rule: str
    flags: int
    states: tuple[str, ...]
    following: tuple[tuple[str, str], ...]
    """Rules that run after that one, and the key of the state that each has."""
    counts_steps: bool
    counts_on_device: bool
    starts_unlike: bool
    grad_scale: float
    unsigned: tuple[bool, ...]
    """Of each state of the rule, whether it has no sign: in 8 bits, that makes a difference."""
    has_master: bool
    """Whether 16-bit parameters have what they lack of a float32 in their state."""
    rounds_at_random: bool
    """Whether 16-bit parameters without that are rounded at random."""
    may_be_coded: bool
    """Whether the state of some parameter may be in 8 bits."""


class Scaling(NamedTuple):
    """What a step does to all gradients first, as csrc/step/interface.cpp reads it.

    Tensors are 0-dim float64 ones on a device.
    """

    unscale: float | Tensor = 1.0
    """One over the scale of the loss."""
    coefficient: float | Tensor = 1.0
    """One more factor, from `Fused.clip_grad_norm_`."""
    max_norm: float | None = None
    """Clip to this norm."""
    skip_nonfinite: bool = False
    """Update nothing if the norm is infinite or NaN."""
    skip: Tensor | None = None
    """Update nothing if this is not 0."""
    spikes: Watch | None = None
    """Update nothing, or by less, if the norm is one of these."""
    says_factor: bool = False
    """Return what all gradients were multiplied by."""

    def needs_norm(self) -> bool:
        """Return whether it takes the 2-norm of all gradients."""
        watch = self.spikes
        looks = watch is not None and watch.norm is None
        return self.max_norm is not None or self.skip_nonfinite or looks
