"""Norms of gradients, and clipping by them."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt import _core, _engine, _operators
from fusedopt._norms import moved, total_norm

# ---- the readable spec ---------------------------------------------------------------------------


def reference_total_norm(arrays: Sequence[Any], norm_type: float = 2.0) -> float:
    """Return the norm of all elements of numpy arrays: what the engine computes, bit for bit.

    Element i of an array belongs to lane i % 16 of block i // 4096. Lanes are summed up in float64
    first, then halves of the lanes; so are the blocks of all arrays then, in 256 lanes. The order
    of an array's elements is that in memory.
    """

    def halved(lanes: Any) -> Any:
        while lanes.shape[-1] > 1:
            a, b = np.split(lanes, 2, axis=-1)
            lanes = np.maximum(a, b) if norm_type == math.inf else a + b
        return lanes[..., 0]

    blocks: list[Any] = []
    for array in arrays:
        x = np.ravel(array, order="K").astype(np.float64)
        rows = np.pad(x, (0, -len(x) % 4096)).reshape(-1, 256, 16)
        lanes = np.zeros((len(rows), 16))
        for row in range(256):
            x = rows[:, row]
            if norm_type == 2:
                lanes = lanes + x * x
            elif norm_type == 1:
                lanes = lanes + abs(x)
            else:
                lanes = np.maximum(lanes, abs(x))
        blocks.extend(halved(lanes))
    joined: Any = np.zeros(256)
    for part in np.pad(np.array(blocks), (0, -len(blocks) % 256)).reshape(-1, 256):
        joined = np.maximum(joined, part) if norm_type == math.inf else joined + part
    total = halved(joined)
    return float(np.sqrt(total) if norm_type == 2 else total)


def reference_clip_coefficient(norm: float, max_norm: float) -> float:
    """Return what clipping multiplies gradients of this norm by; NaN if the norm is.

    But 1 for an infinite max_norm, whatever the norm is: that clips nothing.
    """
    if max_norm == math.inf:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1 else coefficient


# ---- the coefficient -----------------------------------------------------------------------------


def coefficient(norm: float | Tensor, max_norm: float) -> float | Tensor:
    """Return what clipping multiplies gradients by."""
    if isinstance(norm, Tensor):
        if max_norm == math.inf:
            return torch.ones_like(norm)
        # (Torch divides a number by a tensor as the product with its reciprocal.)
        return (torch.full_like(norm, max_norm) / (norm + 1e-6)).clamp(max=1.0)
    return _core.clip_coefficient(norm, max_norm)


# ---- arguments, and the functions of torch.nn.utils ----------------------------------------------


def check_finite(norm: Tensor, norm_type: float, wide: float | Tensor = math.inf) -> None:
    """Raise torch's RuntimeError for a norm that is infinite or NaN in the dtype that it has.

    Args:
        norm: the norm as it is to be returned.
        norm_type: its order, for the message.
        wide: the same before it was rounded, for another message.
    """
    if not math.isfinite(norm):
        if math.isfinite(wide):
            raise RuntimeError(
                f"The total norm of order {norm_type}, {float(wide)}, is non-finite in float32, "
                "which this returns: compute a norm of float64 gradients by "
                "fusedopt.get_total_norm, and clip by it with clip_grads_with_norm_"
            )
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )


@_engine.not_compiled
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Return the norm of all elements: `torch.nn.utils.get_total_norm`, in one pass.

    .. math:: \Big( \sum_i |x_i|^p \Big)^{1/p}, \quad \text{or } \max_i |x_i|
        \text{ for } p = \infty

    Args:
        tensors: a tensor, or any number of them: any dtypes, layouts and devices.
        norm_type: the order p, ``inf`` included. 1, 2 and ``inf`` are computed by the engine, and
            have the same bits for any number of threads and any instruction set; others by torch.
        error_if_nonfinite: raise an error if the norm is infinite or NaN.
        foreach: changes nothing here.

    Returns:
        A 0-dim tensor on the first tensor's device, accumulated in float64: of float64 if one of
        the tensors is, else of float32, also for float16 and bfloat16, where torch's overflows
        and loses digits.

    Raises:
        RuntimeError: the norm, in the dtype returned, is infinite or NaN, and
            ``error_if_nonfinite``.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm_type = float(norm_type)
    norm = total_norm(tensors, norm_type)
    wide = any(x.dtype in (torch.float64, torch.complex128) for x in tensors)
    dtype = torch.float64 if wide else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    if isinstance(norm, Tensor):
        rounded = moved(norm, device, dtype)
    else:
        rounded = torch.tensor(norm, dtype=dtype, device=device)
    if error_if_nonfinite:
        check_finite(rounded, norm_type)
    return rounded


@_engine.not_compiled
@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale gradients in place so that their norm is at most max_norm.

    .. math:: g \leftarrow g \, \min\Big(1, \frac{c}{\|g\|_p + 10^{-6}}\Big)

    The same as `torch.nn.utils.clip_grad_norm_`, in one pass for the norm and, unless the factor
    is known to be 1, one for the gradients. An optimizer's ``max_grad_norm`` or
    ``clip_grad_norm_`` spares the second.

    Args:
        parameters: a tensor, or any number of them; those without a gradient do not count.
        max_norm: the largest norm :math:`c`, 0 or more; ``inf`` clips nothing.
        norm_type: the order p, as in `get_total_norm`.
        error_if_nonfinite: raise an error if the norm is infinite or NaN.
        foreach: changes nothing here.

    Returns:
        The norm before clipping, as `get_total_norm` returns it.

    Raises:
        ValueError: max_norm is negative or NaN.
        RuntimeError: the norm, in the dtype returned, is infinite or NaN, and
            ``error_if_nonfinite``.
    """
    if isinstance(parameters, types.GeneratorType) and not (parameters := list(parameters)):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2
        )
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    max_norm = _engine.valid_max_norm(max_norm)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    waits = not (_operators.must_be_seen(grads) or any(_engine.on_device(grad) for grad in grads))
    scale_(grads, coefficient(norm.item() if waits else norm.double(), max_norm))
    return norm


@torch.no_grad()
def scale_(grads: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply gradients, in place."""
    if isinstance(factor, Tensor):
        _scale_without_waiting(grads, factor)
    elif factor != 1:
        pairs = [(grad, grad) for grad in grads]
        for grad, _ in _engine.engine.apply("scale", [factor], pairs, torch.get_num_threads()):
            grad.mul_(factor)
        torch.autograd.graph.increment_version(grads)


def _scale_without_waiting(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients by what only a device knows."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, dtype), some in by_kind.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        there = moved(factor, device, wide)
        if dtype == wide:
            torch._foreach_mul_(some, there)
        else:  # torch would round the factor to 16 bits
            for grad in some:
                grad.copy_(grad.to(wide) * there)
