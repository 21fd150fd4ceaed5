from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

compiler: str
openmp: bool
piece_bytes: int

def clip_coefficient(norm: float, max_norm: float) -> float: ...
def isas() -> tuple[str, ...]: ...

class Engine:
    def __init__(self, isa: str = "", fast_gather: bool = True) -> None: ...
    def step(
        self,
        state: dict[Tensor, Any],
        groups: Sequence[Any],
        threads: int,
        scaling: Any,
        fallback: Callable[[list[tuple[int, Tensor]], float], None],
        outside: Callable[[list[Tensor]], float],
    ) -> tuple[float, bool]: ...
    def norm(
        self, tensors: Sequence[Tensor], order: float, threads: int
    ) -> tuple[float, list[Tensor]]: ...
    def apply(
        self, rule: str, scalars: Sequence[float], rows: Sequence[Sequence[Tensor]], threads: int
    ) -> list[Sequence[Tensor]]: ...
    def update(
        self,
        rule: str,
        flags: int,
        scalars: Sequence[float],
        grad_scale: float,
        tensors: Sequence[Tensor],
        threads: int,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def vector_bytes(self) -> int: ...
    @property
    def fast_gather(self) -> bool: ...
