"""Statistics of a step: what it has done to each parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedopt._found import GRAD, NONFINITE, PARAM, UNMOVED, UPDATE, Part, Rows, listing_of, read


class Statistics:
    r"""What one step has done to each parameter that had a gradient.

    Vectors in float64 on the parameters' device, in the order of the parameters; what is listed
    twice is there twice. They are computed in the pass of the step; nothing is waited for before
    one is read. Of a DTensor they are those of the whole tensor: then reading the first one is
    a collective operation, which every rank has to join. Of parameters that ranks split in another
    way (FSDP1, ZeroRedundancyOptimizer), each rank has statistics of what it steps.

    A skipped step has the statistics of the gradients that it was skipped for, with
    :math:`\|\Delta p\| = 0`, and none is ``unmoved``: no step was taken.

    A step that was captured into a CUDA graph writes its vectors anew in each replay; read them
    from a copy of this object that nobody has read before (``copy.copy``).
    """

    def __init__(self, groups: list[dict[str, Any]], unscale: float | Tensor = 1.0) -> None:
        self._listing = listing_of(groups)
        self._unscale = unscale
        self._parts: list[Part] = []
        self._released: dict[Tensor, list[Part]] = {}
        self._of_released: list[Part] = []
        self._read: Rows | None = None

    # ---- while a step is made ----------------------------------------------------------------

    def part_of(self, groups: list[dict[str, Any]]) -> Part:
        """Return where statistics of some of the parameters go."""
        self._parts.append(Part(groups))
        self._of_released.append(self._parts[-1])
        return self._parts[-1]

    def begin_released(self, p: Tensor) -> None:
        """Let the next parts be those of a parameter that is stepped ahead of the step.

        What was found of it before is forgotten: a backward pass may fail halfway, or be repeated.
        """
        for part in self._released.get(p, ()):
            self._parts.remove(part)
        self._of_released = self._released[p] = []

    @property
    def has_parts(self) -> bool:
        """Whether anything has been stepped."""
        return any(part.tables for part in self._parts)

    @property
    def has_released(self) -> bool:
        """Whether some parameters were stepped ahead of the step."""
        return bool(self._released)

    @property
    def last_part(self) -> Part:
        """What was returned last."""
        return self._parts[-1]

    def forget_parts(self) -> None:
        """Begin anew."""
        self._parts.clear()

    # ---- afterwards --------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Of the parameters: those that the optimizer was given, or ``group0.param3``."""
        return self._rows.names

    @property
    def numel(self) -> Tensor:
        """How many elements each parameter has, int64."""
        return self._rows.numel

    @property
    def grad_norm(self) -> Tensor:
        r""":math:`\|g\|_2`: of the gradient as it arrived, unscaled, before clipping."""
        return self._rows.sums[:, GRAD].sqrt() * self._rows.unscale

    @property
    def nonfinite(self) -> Tensor:
        """How many elements of the gradient are infinite or NaN, int64.

        Of a complex one, how many of its real and imaginary parts.
        """
        return self._rows.sums[:, NONFINITE].long()

    @property
    def param_norm(self) -> Tensor:
        r""":math:`\|p\|_2` after the step; of 16-bit parameters with masters, that of the masters.

        So it is with `update_norm`.
        """
        return self._rows.sums[:, PARAM].sqrt()

    @property
    def update_norm(self) -> Tensor:
        r""":math:`\|\Delta p\|_2`: what the parameter is after the step, minus what it was before.

        Without masters, a 16-bit parameter is as it is stored: what rounding has lost of the update
        is not in it.
        """
        return self._rows.sums[:, UPDATE].sqrt()

    @property
    def update_ratio(self) -> Tensor:
        r""":math:`\|\Delta p\|_2 / \|p\|_2`."""
        return self.update_norm / self.param_norm

    @property
    def unmoved(self) -> Tensor:
        """How many elements of a 16-bit parameter without masters the step has left as they were.

        NaN of any other parameter, in which they are not counted.
        """
        return self._rows.sums[:, UNMOVED]

    @property
    def unmoved_share(self) -> Tensor:
        """`unmoved` over the number of elements, NaN for an empty parameter."""
        return self.unmoved / self._rows.counted

    def groups(self) -> Statistics:
        """Return the statistics of each param group as a whole, ``group0`` and so on."""
        numbers = sorted(set(self._rows.groups))
        places = [numbers.index(number) for number in self._rows.groups]
        return self._joined(places, numbers, [f"group{number}" for number in numbers])

    def total(self) -> Statistics:
        """Return the statistics of all parameters as a whole."""
        return self._joined([0] * len(self.names), [0], ["all"])

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """Return all as numbers: what ``wandb.log`` or TensorBoard's ``add_scalars`` takes.

        Waits for the step.

        Args:
            prefix: of the keys: ``prefix`` + ``grad_norm/layer.weight``. There are grad_norm,
                param_norm, update_norm, update_ratio, nonfinite and, where it is counted,
                unmoved_share.
        """
        vectors = {name: getattr(self, name).tolist() for name in _VECTORS}
        return {
            f"{prefix}{vector}/{name}": value
            for vector, values in vectors.items()
            for name, value in zip(self.names, values, strict=True)
            if vector != "unmoved_share" or not math.isnan(value)
        }

    def __repr__(self) -> str:
        if self._read is None:  # to read them may take all ranks
            return "Statistics, not read yet"
        return f"Statistics of {len(self._read.names)} parameters"

    def _joined(self, places: list[int], groups: list[int], names: list[str]) -> Statistics:
        """Return the sums of what has the same place."""
        rows, joined = self._rows, Statistics([])
        place = torch.tensor(places, dtype=torch.int64, device=rows.sums.device)

        def add(x: Tensor) -> Tensor:
            return x.new_zeros(len(names), *x.shape[1:]).index_add_(0, place, x)

        sums, counted = add(rows.sums), add(rows.counted)
        sums[:, UNMOVED] = add(rows.sums[:, UNMOVED].nan_to_num(0.0)).where(counted > 0, math.nan)
        joined._read = Rows(names, groups, add(rows.numel), counted, sums, rows.unscale)
        return joined

    @property
    def _rows(self) -> Rows:
        if self._read is None:
            self._read = read(self._listing, self._parts, self._unscale)
            self._listing, self._parts = [], []  # which know the parameters
            self._released, self._of_released = {}, []
        return self._read


_VECTORS = (
    "grad_norm",
    "param_norm",
    "update_norm",
    "update_ratio",
    "nonfinite",
    "unmoved_share",
)
