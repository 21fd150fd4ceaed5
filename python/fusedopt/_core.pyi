"""What csrc/module.cpp offers."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

ahead: tuple[int, int]
compiler: str
cuda_archs: str
emulated_device: bool
openmp: bool
piece_bytes: int
tile: int

def clip_coefficient(norm: float, max_norm: float) -> float: ...
def cuda_devices() -> list[str]: ...
def cuda_driver_version() -> int: ...
def isas() -> tuple[str, ...]: ...

probed_ahead: Sequence[int]
probed_line: int

def move_streams(
    arrays: Sequence[int], n: int, reads_first: bool, ahead: int, temporal: bool, threads: int
) -> None: ...

# With emulated_device only:
def elements_of_tile(numel: int, tile: int) -> tuple[int, int]: ...
def item_of_unit(begins: Sequence[int], unit: int) -> int: ...

class KnownGroups: ...

class Engine:
    def __init__(self, isa: str = "", fast_gather: bool = True, device: str = "cuda") -> None: ...
    def step(
        self,
        optimizer: Optimizer,
        known: KnownGroups,
        groups: list[dict[str, Any]],
        threads: int,
        scaling: Any,
        fallback: Callable[[list[tuple[int, Tensor]], float], None],
        outside: Callable[[list[Tensor]], float | Tensor],
        watched: Any = None,
    ) -> tuple[float | Tensor, bool | Tensor, float | Tensor]: ...
    def norm(
        self, tensors: Sequence[Tensor], order: float, threads: int
    ) -> tuple[float, list[Tensor], list[Tensor]]: ...
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
    @property
    def emulated(self) -> bool: ...
    def is_observed(self) -> bool: ...
    def why_not(self, device: int) -> str: ...
