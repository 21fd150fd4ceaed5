"""The momentum of matrices, put where they are made orthogonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt import _engine
from fusedopt._batches import Matrix
from fusedopt._engine import number
from fusedopt._gradients import gradient_of
from fusedopt._numeric import accumulate
from fusedopt._shards import local
from fusedopt._stored import decoded_in_parts, is_coded

BUFFER = "momentum_buffer"

_Streams = tuple[Tensor, Tensor, Tensor]  # a place, the gradient and the momentum


def fill(
    places: list[tuple[Matrix, Tensor]],
    states: Mapping[Tensor, dict[str, Any]],
    factor: float | Tensor,
) -> None:
    """Put what is to be made orthogonal into these places.

    Args:
        places: of this process's part of each matrix.
        states: of their parameters, after the momentum has moved.
        factor: that of the gradients of this step.
    """
    alike: dict[Any, list[_Streams]] = {}
    for matrix, place in places:
        group, state = matrix.group, states[matrix.param]
        streams = (place, gradient_of(matrix.param), local(state[BUFFER]))
        forget = 1 - number(group["momentum"]) if group["nesterov"] else None
        key = (forget, bool(group.get("maximize")))
        if is_coded(state[BUFFER]):
            for rows, buffer in decoded_in_parts(state, BUFFER):
                _fill([(place[rows], streams[1][rows], buffer)], factor, *key)
        else:
            alike.setdefault(key, []).append(streams)
    for key, some in alike.items():
        _fill(some, factor, *key)


def _fill(
    some: list[_Streams], factor: float | Tensor, forget: float | None, maximize: bool
) -> None:
    """Fill places with what the momentum is to be after the same gradient again.

    Without a share of it to forget, as without Nesterov's look ahead, with the momentum as it is.
    """
    if forget is None:
        for place, _, buffer in some:
            place.copy_(buffer)
        return
    signed = -factor if maximize else factor
    others: Any = some
    if not isinstance(signed, Tensor):
        threads = torch.get_num_threads()
        others = _engine.engine.apply("muon_nesterov", [signed, forget], some, threads)
    for place, gradient, buffer in others:
        wide = torch.promote_types(place.dtype, torch.float32)
        g = gradient.to(wide) * signed * forget
        place.copy_(accumulate(buffer.to(wide), g, forget))
