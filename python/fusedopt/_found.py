"""What a step finds out for statistics, as it is found, and put together: a row a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import _memory
from fusedopt._shards import is_distributed

# What a row has, all in float64 (csrc/engine/schedule.h: Sums): sums of squares, and counts.
GRAD, NONFINITE, PARAM, UPDATE, UNMOVED = range(5)
_COLUMNS = 5

Listing = list[tuple[Sequence[Tensor], Sequence[str] | None]]


def listing_of(groups: list[dict[str, Any]]) -> Listing:
    """Return parameters and names of each group, which may have others when they are read."""
    return [(list(group["params"]), group.get("param_names")) for group in groups]


class Part:
    """Statistics of one call into the engine: a row for each parameter that is listed.

    What has not been stepped has a row of NaN.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = listing_of(groups)
        self.tables: dict[torch.device, Tensor] = {}
        self._rows: dict[tuple[int, int], list[int]] | None = None

    def table(self, place: int) -> Tensor:
        """Return the rows on a device, for csrc/step/watched.h, which fills them."""
        return self._table_on(_memory.device_of(place))

    def put(self, index: int, p: Tensor, column: int, value: float | Tensor) -> None:
        """Put a number, which nobody waits for, into the rows of p in the group of this index."""
        table = self._table_on(p.device)
        for row in self._rows_of(index, p):
            table[row, column] = value

    def _table_on(self, device: torch.device) -> Tensor:
        table = self.tables.get(device)
        if table is None:
            count = sum([len(params) for params, _ in self.groups])
            table = torch.full((count, _COLUMNS), math.nan, dtype=torch.float64, device=device)
            self.tables[device] = table
        return table

    def _rows_of(self, index: int, p: Tensor) -> list[int]:
        if self._rows is None:
            self._rows = {}
            row = 0
            for i, (params, _) in enumerate(self.groups):
                for each in params:
                    self._rows.setdefault((i, id(each)), []).append(row)
                    row += 1
        return self._rows[index, id(p)]


class Rows(NamedTuple):
    """What was found of the parameters that had a gradient."""

    names: list[str]
    groups: list[int]
    """The number of each one's group."""
    numel: Tensor
    counted: Tensor
    """How many of these elements are counted if they do not move."""
    sums: Tensor
    unscale: float | Tensor


def read(listing: Listing, parts: list[Part], unscale: float | Tensor) -> Rows:
    """Put the rows of all parts together, in the order of the listing."""
    places: dict[int, list[tuple[int, int, str]]] = {}
    count = 0
    for number, (params, given) in enumerate(listing):
        names = given if given is not None and len(given) == len(params) else None
        names = names or [f"group{number}.param{i}" for i in range(len(params))]
        for p, name in zip(params, names, strict=True):
            places.setdefault(id(p), []).append((count, number, name))
            count += 1
    found: list[tuple[tuple[int, int, str], Tensor, Tensor]] = []
    for part in parts:
        params = [p for some, _ in part.groups for p in some]
        for table in part.tables.values():
            filled = (~table[:, NONFINITE].isnan()).tolist()
            for p, row, is_filled in zip(params, table.unbind(), filled, strict=True):
                if is_filled:  # the first place of several comes first
                    at = places[id(p)]
                    found.append((at.pop(0) if len(at) > 1 else at[0], p, row))
    found.sort(key=lambda each: each[0][0])
    params = [p for _, p, _ in found]
    device = params[0].device if params else None
    sums = (
        torch.stack([row.to(device) for _, _, row in found])
        if found
        else torch.zeros(0, _COLUMNS, dtype=torch.float64)
    )
    _reduce(params, sums)
    numel = torch.tensor([p.numel() for p in params], dtype=torch.int64, device=device)
    return Rows(
        names=[name for (_, _, name), _, _ in found],
        groups=[number for (_, number, _), _, _ in found],
        numel=numel,
        counted=numel.where(~sums[:, UNMOVED].isnan(), 0),
        sums=sums,
        unscale=unscale.to(device) if isinstance(unscale, Tensor) else unscale,
    )


def _reduce(params: list[Any], sums: Tensor) -> None:
    """Add up what the ranks have found of their parts of DTensors."""
    shared: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for i, p in enumerate(params):
        if is_distributed(p):
            dims = tuple(d for d, where in enumerate(p.placements) if not where.is_replicate())
            shared.setdefault((p.device_mesh, dims), []).append(i)
    if not shared:
        return
    import torch.distributed as dist  # noqa: PLC0415  (not in every build of torch)

    for (mesh, dims), rows in shared.items():
        of_all = sums[rows]
        for dim in dims:
            dist.all_reduce(of_all, group=mesh.get_group(dim))
        sums[rows] = of_all
