"""Steps of matrices as a whole: momentum, what makes it orthogonal, and the update.

A step is one call into the engine for all param groups, which checks, clips, skips, and steps what
is no matrix; of matrices it moves the momentum alone. Then come the matrices, some at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from fusedopt import _core, _engine, _exchange, _momentum
from fusedopt._base import Fused
from fusedopt._batches import (
    Batch,
    Matrix,
    Workspace,
    alike,
    chunks,
    matrix_reference,
    shape_of,
)
from fusedopt._engine import Rule, Scaling, number
from fusedopt._exchange import Places
from fusedopt._gradients import gradients
from fusedopt._momentum import BUFFER
from fusedopt._operators import without_autocast
from fusedopt._options import Option
from fusedopt._orthogonal import Iteration, step_ratio
from fusedopt._spikes import remember
from fusedopt._verdict import decide

_MOMENTUM = Rule("muon_momentum", (), (BUFFER,), counts_steps=False)
_STEP = Rule("muon_step", (), (), counts_steps=False)
_SHAPE = "rows and columns"  # key of a group while its matrices move

_PRECISIONS = (None, torch.float32, torch.bfloat16, torch.float64)


def _check_ns_dtype(value: Any) -> None:
    if value not in _PRECISIONS:
        raise ValueError(
            f"Invalid ns_dtype: {value!r}, expected None, torch.float32, torch.bfloat16 or "
            "torch.float64"
        )


class StepsMatrices(Fused):
    """What the optimizers share that make updates orthogonal."""

    ns_dtype = Option[torch.dtype | None](None, _check_ns_dtype)

    _without_kernel = "its rule in torch's operators"
    _left: frozenset[Tensor] = frozenset()  # of this step: what the engine has left to those

    def _steps_matrices_of(self, group: dict[str, Any]) -> bool:
        """Return whether the parameters of a group are matrices to be made orthogonal."""
        raise NotImplementedError

    def _precision(self, p: Tensor) -> torch.dtype:
        """Return in which the matrices of p are made orthogonal."""
        if self.ns_dtype is not None:
            return self.ns_dtype
        if p.dtype == torch.float64:
            return torch.float64
        return torch.bfloat16 if p.device.type == "cuda" else torch.float32

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch does.

        Raises:
            ValueError: it has an option that is the optimizer's, or a parameter that is no matrix.
        """
        if "ns_dtype" in param_group:
            raise ValueError(
                "a param group has ns_dtype, expected that on the optimizer: pass ns_dtype= to the "
                "constructor, or set optimizer.ns_dtype, and delete it from the group"
            )
        super().add_param_group(param_group)
        param_group.pop("ns_dtype", None)  # of the defaults
        try:
            if self._steps_matrices_of(param_group):
                for p in param_group["params"]:
                    shape_of(p, param_group.get("batch_dims"))
        except ValueError:
            self.param_groups.pop()
            raise

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _STEP if _SHAPE in group else _MOMENTUM

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        if _SHAPE not in group:
            return {"forget": 1 - number(group["momentum"])}
        lr, weight_decay = number(group["lr"]), number(group["weight_decay"])
        ratio = step_ratio(group["adjust_lr_fn"], *group[_SHAPE])
        return {
            "weight_decay": weight_decay,
            "ratio": ratio,
            "decay": lr * weight_decay,
            "step_size": lr * ratio,
        }

    # ---- one step ----------------------------------------------------------------------------

    def _update(
        self, groups: list[dict[str, Any]], scaling: Scaling
    ) -> tuple[float | Tensor, bool | Tensor]:
        for group in filter(self._steps_matrices_of, groups):
            Iteration.of(group).check()
        return super()._update(groups, scaling)

    def _update_by_engine(
        self, groups: list[dict[str, Any]], scaling: Scaling
    ) -> tuple[float | Tensor, bool | Tensor]:
        rounds = self._rounds(groups)
        if len(rounds) == 1:
            return self._update_once(groups, scaling)
        # A parameter that is listed twice is stepped twice, from where the first step has led.
        norm, decided, judgement = decide(groups, scaling)
        skipped: bool | Tensor = True
        if decided is not None:
            for once in rounds:
                _, skipped = self._update_once(once, decided)
        if scaling.spikes is not None:
            remember(scaling.spikes, judgement)
        return norm, skipped

    def _update_once(
        self, groups: list[dict[str, Any]], scaling: Scaling
    ) -> tuple[float | Tensor, bool | Tensor]:
        self._left = frozenset()
        norm, skipped, factor = self._step_by_engine(groups, scaling._replace(says_factor=True))
        if skipped is not True:
            skip = skipped.double() if isinstance(skipped, Tensor) else None
            with torch.no_grad():
                self._step_matrices(groups, factor, skip)
        self._left = frozenset()
        return norm, skipped

    def _rounds(self, groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Return these groups, more than once if a matrix is listed twice, but never with both."""
        of_matrices = [self._steps_matrices_of(group) for group in groups]
        listed = [id(p) for group in compress(groups, of_matrices) for p in group["params"]]
        if len(set(listed)) == len(listed):
            return [groups]
        rounds = [[{**group, "params": [], "param_names": None} for group in groups]]
        seen: Counter[Tensor] = Counter()
        for index, group in enumerate(groups):
            if not of_matrices[index]:
                rounds[0][index] = group
                continue
            for p in group["params"]:
                if seen[p] == len(rounds):
                    rounds.append([{**each, "params": []} for each in rounds[0]])
                rounds[seen[p]][index]["params"].append(p)
                seen[p] += 1
        return rounds

    def _fall_back(
        self,
        all_groups: list[dict[str, Any]],
        unsupported: list[tuple[int, Tensor]],
        factor: float | Tensor,
        *,
        warns: bool = True,
    ) -> None:
        self._left = frozenset(p for _, p in unsupported)
        super()._fall_back(all_groups, unsupported, factor, warns=warns)

    def _weights_now(self, group: dict[str, Any]) -> tuple[float, ...]:
        if self._steps_matrices_of(group) and _SHAPE not in group:
            return (0.0,) * len(self._followers)  # which follow once the matrices have moved
        return super()._weights_now(group)

    # ---- its matrices ------------------------------------------------------------------------

    def _step_matrices(
        self, groups: list[dict[str, Any]], factor: float | Tensor, skip: Tensor | None
    ) -> None:
        def fill(places: Places) -> None:
            _momentum.fill(places, self.state, factor)

        def move(places: Places) -> None:
            self._move(places, skip)

        plain: list[Matrix] = []
        split: list[Matrix] = []
        for matrix in self._matrices(groups):
            (split if _exchange.is_split(matrix.param) else plain).append(matrix)
        workspace = Workspace()
        for some in alike(plain):
            for chunk in chunks(some):
                batch = Batch(chunk, workspace)
                fill(batch.places)
                batch.orthogonalize()
                move(batch.places)
                del batch  # before there is memory for another
        if split:
            _exchange.step(split, fill, move)

    def _matrices(self, groups: list[dict[str, Any]]) -> Iterator[Matrix]:
        """Yield what has a gradient, and is not left to torch's operators."""
        for index, group in enumerate(groups):
            if not self._steps_matrices_of(group):
                continue
            batch_dims = group.get("batch_dims")
            for p in group["params"]:
                if p.grad is not None and p.numel() and p not in self._left:
                    yield Matrix(index, group, p, self._precision(p), *shape_of(p, batch_dims))

    def _move(self, places: Places, skip: Tensor | None) -> None:
        """Move the parameters by what is in these places."""
        groups: dict[Any, dict[str, Any]] = {}
        for matrix, _ in places:
            shape = (matrix.rows, matrix.columns)
            group = groups.setdefault(
                (matrix.group_index, *shape),
                {**matrix.group, "params": [], "param_names": None, "maximize": False},
            )
            group[_SHAPE] = shape
            group["params"].append(matrix.param)
        pairs = [(matrix.group_index, matrix.param) for matrix, _ in places]
        with self._watch_change(pairs, skip), gradients(places):
            _engine.engine.step(
                self,
                _core.KnownGroups(),
                list(groups.values()),
                torch.get_num_threads(),
                Scaling(skip=skip),
                _nothing_is_left,
                lambda gradients: 0.0,  # no norm is asked for
            )

    # ---- without a kernel --------------------------------------------------------------------

    def _step_by_operators(self, groups: list[dict[str, Any]]) -> None:
        """Step matrices by `reference`."""
        for p in (p for group in groups for p in group["params"]):
            if p.is_complex():
                raise RuntimeError("Muon does not support complex parameters")
            if p.grad.layout != torch.strided:
                raise RuntimeError("Muon does not support sparse gradients")
        for group in groups:
            for p in group["params"]:
                if p.numel():
                    self._step_one_by_operators(p, group)

    @torch.no_grad()
    def _step_one_by_operators(self, p: Any, group: dict[str, Any]) -> None:
        buffer = self.state[p].get(BUFFER)
        if buffer is None:
            buffer = torch.zeros_like(p, memory_format=torch.preserve_format)
            self.state[p][BUFFER] = buffer
        shape = shape_of(p, group.get("batch_dims"))
        wide = torch.promote_types(p.dtype, torch.float32)
        g = -p.grad if group.get("maximize") else p.grad
        scalars: dict[str, Any] = {
            **self._scalars(group, 1),
            **self._scalars({**group, _SHAPE: shape[1:]}, 1),
        }
        with without_autocast(p.device.type):
            new_p, new_buffer = matrix_reference(
                *(x.to(wide).reshape(shape) for x in (p, g, buffer)),
                **scalars,
                nesterov=group["nesterov"],
                iteration=Iteration.of(group),
            )
        p.copy_(new_p.reshape(p.shape))
        buffer.copy_(new_buffer.reshape(p.shape))


# ---- what a step is made of ----------------------------------------------------------------------


def _nothing_is_left(unsupported: Any, factor: float) -> None:
    raise AssertionError("the engine has taken these parameters before")
