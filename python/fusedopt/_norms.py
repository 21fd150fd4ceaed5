"""What norms add up: by the engine, over the ranks of DTensors, and for what the engine leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt import _engine, _operators


def total_norm(tensors: Sequence[Tensor], norm_type: float) -> float | Tensor:
    """Return the norm of all elements of all tensors, accumulated in float64.

    A DTensor counts as the whole tensor, on every rank. With tensors on a device the norm is a
    float64 tensor there, which nobody has waited for, if the order is 1, 2 or infinity.
    """
    if _operators.must_be_seen(tensors):
        return _norm_by_operators(tensors, norm_type) if tensors else 0.0
    if norm_type not in (1, 2, math.inf):
        return _norm_of_norms(tensors, norm_type)
    total, others = _engine_sum(tensors, norm_type)
    if others:
        total = _join(norm_type, total, power_sum(others, norm_type))
    if norm_type != 2:
        return total
    return total.sqrt() if isinstance(total, Tensor) else math.sqrt(total)


def _engine_sum(
    tensors: Sequence[Tensor], norm_type: float
) -> tuple[float | Tensor, Sequence[Tensor]]:
    """Return what the engine adds up, and the tensors that it cannot treat."""
    threads = torch.get_num_threads()
    on_cpu, sums, others = _engine.engine.norm(tensors, norm_type, threads)
    total: float | Tensor = on_cpu
    for part in sums:
        total = _join(norm_type, total, part)
    return total, others


@torch.no_grad()
def sum_of_squares(x: Tensor) -> float | Tensor:
    """Return it in float64, of real numbers: with the same bits for any number of threads."""
    if _operators.must_be_seen([x]):
        return x.double().square().sum()
    total, others = _engine_sum([x], 2)
    return total + power_sum(others, 2) if others else total


@torch.no_grad()
def power_sum(tensors: Sequence[Tensor], norm_type: float) -> float | Tensor:
    """Return what the norm adds up over tensors that the engine alone cannot treat."""
    shared: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    plain = []
    for tensor in tensors:
        if hasattr(tensor, "placements"):
            x = _without_partial_sums(tensor)
            dims = tuple(i for i, where in enumerate(x.placements) if not where.is_replicate())
            shared.setdefault((x.device_mesh, dims), []).append(x.to_local())
        else:
            plain.append(tensor)
    total: float | Tensor = _norm_of_norms(plain, norm_type) if plain else 0.0
    total = total * total if norm_type == 2 else total
    for (mesh, dims), parts in shared.items():
        part, others = _engine_sum(parts, norm_type)
        if others:
            part = _join(norm_type, part, power_sum(others, norm_type))
        total = _join(norm_type, total, _reduce_over(mesh, dims, part, norm_type))
    return total


def _without_partial_sums(tensor: Any) -> Any:
    if not any(where.is_partial() for where in tensor.placements):
        return tensor  # which redistribute takes its time to find out
    from torch.distributed.tensor import Replicate  # noqa: PLC0415  (slow, and seldom needed)

    whole = [Replicate() if where.is_partial() else where for where in tensor.placements]
    return tensor.redistribute(placements=whole)


def _reduce_over(
    mesh: Any, dims: tuple[int, ...], part: float | Tensor, norm_type: float
) -> float | Tensor:
    """Join the parts of all ranks along these dimensions of the mesh, one number each."""
    import torch.distributed as dist  # noqa: PLC0415  (not in every build of torch)

    stays = isinstance(part, Tensor)  # on its device
    number_of_all = (
        part.clone()
        if isinstance(part, Tensor)
        else torch.tensor(part, dtype=torch.float64, device=mesh.device_type)
    )
    operation = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
    for dim in dims:
        dist.all_reduce(number_of_all, operation, group=mesh.get_group(dim))
    return number_of_all if stays else number_of_all.item()


def _norm_of_norms(tensors: Sequence[Tensor], norm_type: float) -> float:
    """Return the norm by torch's operators, any tensor and any order."""
    return float(_norm_by_operators(tensors, norm_type, "cpu")) if tensors else 0.0


def _norm_by_operators(
    tensors: Sequence[Tensor], norm_type: float, device: str | None = None
) -> Tensor:
    """Return the same in float64, there or on the first tensor's device."""
    norms = []
    for tensor in tensors:
        x = tensor.detach()
        if hasattr(x, "placements"):
            x = _without_partial_sums(x).full_tensor()
        if x.layout != torch.strided:
            x = x.coalesce().values() if x.is_sparse else x.to_dense()
        if x.numel() == 0:  # which has no largest element
            norms.append(torch.zeros((), dtype=torch.float64, device=x.device))
            continue
        wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
        norms.append(torch.linalg.vector_norm(wide, norm_type))
    there = [norm.to(device or norms[0].device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(there), norm_type)
    return total


def _join(norm_type: float, a: float | Tensor, b: float | Tensor) -> float | Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        b = moved(b, a.device, b.dtype)
    if norm_type != math.inf:
        return a + b
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        there = next(x for x in (a, b) if isinstance(x, Tensor))
        return torch.maximum(
            *(x if isinstance(x, Tensor) else torch.full_like(there, x) for x in (a, b))
        )
    return float(np.maximum(a, b))  # NaN if either is


def moved(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return x there, without waiting unless the CPU is to read it."""
    return x.to(device, dtype, non_blocking=device.type != "cpu")
