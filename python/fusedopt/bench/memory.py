"""Who takes part where less is kept: the memory modes, and what other libraries have like them.

All step the same model. What they differ in is how many bytes a parameter has, and how much of it
survives a step: so the bytes of each are counted, and each is compared with what its own way of
storing explains. fusedopt itself is the float32 step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt.bench import oracle
from fusedopt.bench.contestants import (
    OURS,
    Build,
    Contestant,
    forget_compiled,
    fusedopt_way,
    in_torch,
    is_wanted,
    library,
    torch_way,
)
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import Row

_FLOAT32, _BFLOAT16 = torch.float32, torch.bfloat16

# ---- fusedopt ------------------------------------------------------------------------------------


def _mode(name: str, dtype: torch.dtype, **arguments: Any) -> Contestant:
    """Return fusedopt in one of its memory modes."""

    def build(row: Row, params: list[Tensor]) -> Step:
        step: Step = getattr(fusedopt, row.optimizer)(params, **row.arguments, **arguments).step
        return step

    states, masters = arguments["state_dtype"], arguments.get("master_weights", False)
    check = oracle.unlike_float32
    if states != _FLOAT32:
        epsilon = oracle.EIGHT_BITS if states == "mxfp8" else torch.finfo(states).eps
        check = oracle.Storage(epsilon, masters).mistake
    return Contestant(f"{OURS} {name}", lambda row: True, build, dtype=dtype, check=check)


_OURS = [
    Contestant(OURS, lambda row: True, fusedopt_way),
    _mode("float32, mxfp8 states", _FLOAT32, state_dtype="mxfp8"),
    Contestant(f"{OURS} bfloat16", lambda row: True, fusedopt_way, dtype=_BFLOAT16),
    *(
        _mode(f"bfloat16, masters, {name} states", _BFLOAT16, master_weights=True, state_dtype=each)
        for name, each in (("float32", _FLOAT32), ("bfloat16", _BFLOAT16), ("mxfp8", "mxfp8"))
    ),
    *(
        _mode(
            f"bfloat16, stochastic, {name} states",
            _BFLOAT16,
            stochastic_rounding=True,
            state_dtype=each,
        )
        for name, each in (("bfloat16", _BFLOAT16), ("mxfp8", "mxfp8"))
    ),
]

# ---- torch, and libraries ------------------------------------------------------------------------

_TORCH = [
    Contestant("torch fused", in_torch, torch_way(fused=True)),
    Contestant("torch fused bfloat16", in_torch, torch_way(fused=True), dtype=_BFLOAT16),
]
# Each with bfloat16 parameters: its AdamW, and arguments that it alone has.
_EIGHT_BIT: dict[str, tuple[str, dict[str, Any]]] = {
    "bitsandbytes 8-bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "pytorch-optimizer Flash": ("pytorch_optimizer.FlashAdamW", {}),
    "pytorch-optimizer Flash, masters": (
        "pytorch_optimizer.FlashAdamW",
        {"master_weight_bits": 32},
    ),
    "torchao 8-bit, stochastic": ("torchao.optim.AdamW8bit", {"bf16_stochastic_round": True}),
}


def _eight_bit(name: str) -> Contestant:
    """Return a library's optimizer with 8-bit moments."""
    peer = library(name, {"AdamW": _EIGHT_BIT[name]})
    peer = peer._replace(dtype=_BFLOAT16, check=oracle.Storage(oracle.EIGHT_BITS).mistake)
    if name.startswith("torchao"):  # it calls torch.compile itself
        peer = peer._replace(build=_compiled_anew(peer.build), compiles=True)
    return peer


def _compiled_anew(build: Build) -> Build:
    def forgetful(row: Row, params: list[Tensor]) -> Step:
        forget_compiled()
        return build(row, params)

    return forgetful


def contestants(peers: str = "", quick: bool = False) -> list[Contestant]:
    """Return fusedopt in its memory modes, and peers; with the arguments of all `contestants`."""
    chosen = [each for each in [*_OURS, *_TORCH] if is_wanted(each.name, peers, quick)]
    chosen += [_eight_bit(name) for name in _EIGHT_BIT if is_wanted(name, peers, quick)]
    return [each._replace(counted=True) for each in chosen]
