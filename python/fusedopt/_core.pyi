from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

compiler: str
openmp: bool
piece_bytes: int

def isas() -> tuple[str, ...]: ...
def stream_like_adam(arrays: Sequence[int], n: int, threads: int) -> None: ...

class Engine:
    def __init__(self, isa: str = "", fast_gather: bool = True) -> None: ...
    def step(
        self,
        state: dict[Tensor, Any],
        groups: Sequence[Any],
        threads: int,
        fallback: Callable[[list[tuple[int, Tensor]]], None],
    ) -> None: ...
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
