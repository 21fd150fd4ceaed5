"""What a step knows of the wrappers around its optimizer, whose weights follow the parameters."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Kind(NamedTuple):
    """Which weights follow the parameters, and how."""

    rule: str
    """As registered in csrc/rules/list.h: of the parameter, any second stream, and the weights."""
    state: str
    """Key of the weights in the state of a parameter."""
    counter: str
    """Key of a param group, which counts the steps: no value that anything else depends on."""


class Follower(Protocol):
    """A `fusedopt.Lookahead` or `fusedopt.EMA` around an optimizer that makes a step."""

    kind: Kind

    def weight_now(self, group: dict[str, Any]) -> float:
        """Return the scalar of the rule in this step for a param group: 0 if nothing moves."""

    def follows(self, p: Tensor) -> bool:
        """Return whether it has weights that follow this parameter."""

    def first(self, p: Tensor) -> Tensor:
        """Return the weights that begin to follow a parameter in this step."""

    def count(self, skipped: bool | Tensor) -> None:
        """Count a step, unless it was skipped."""

    def following(self, params: list[Tensor]) -> AbstractContextManager[None]:
        """Keep the weights for parameters that others step inside the with block."""
