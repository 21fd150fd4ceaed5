"""What several test files share: models without modules, oracles, comparisons, scripts."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import _core, _engine
from tests.muon.oracle import TorchMuonWithAuxAdam
from tests.registry import CONFIGS, DTYPES, LAYOUTS, PLAIN_CONFIGS, Config

ENGINES = {isa: _core.Engine(isa=isa) for isa in fusedopt.isas()}
if _core.emulated_device:
    ENGINES["device"] = _core.Engine(device="emulated")

each_isa = pytest.mark.parametrize("isa", ENGINES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_config = pytest.mark.parametrize("config", CONFIGS, ids=str)
each_optimizer = pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=lambda config: config.name)
each_torch_optimizer = pytest.mark.parametrize(
    "config",
    [config for config in PLAIN_CONFIGS if config.torch_cls],
    ids=lambda config: config.name,
)

Make = Callable[..., Optimizer]
Clip = Callable[[Any], object]

SHAPES: list[tuple[int, ...]] = [(5,), (3, 4), (), (0, 3), (2, 3, 4)]

# A rule is applied as if to real numbers, once in float64: the two texts differ in the order of
# operations alone, by a few units of 2^-53 for each of a few steps.
RTOL = 1e-9

# ---- parameters and gradients --------------------------------------------------------------------


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers: the same for every dtype, but for rounding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(torch.get_default_device(), dtype)


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64
) -> list[Parameter]:
    return [Parameter(values(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def all_params(optimizer: Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(params: list[Parameter], step: int) -> None:
    """Give every parameter the gradient of this step: the same for equal shapes and dtypes."""
    for i, p in enumerate(params):
        p.grad = values(tuple(p.shape), 1000 * (step + 1) + i, p.dtype)


def squares(params: list[Parameter], factor: float) -> Tensor:
    """Return a loss whose gradient is 2 * factor * p."""
    return torch.stack([(factor * p * p).sum() for p in params]).sum()


def train(optimizer: Optimizer, params: list[Parameter], steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        set_gradients(params, step)
        optimizer.step()


# ---- oracles -------------------------------------------------------------------------------------


class PlainLion(Optimizer):
    """Lion as its paper writes it, in torch operators: torch has none."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(torch.sign(beta1 * m + (1 - beta1) * g), alpha=lr)
                m.mul_(beta2).add_(g, alpha=1 - beta2)
        return loss


def torch_adagrad(params: Any, **kwargs: Any) -> Optimizer:
    """Torch's, which in 2.10 makes states in its constructor alone: an added group has none."""
    optimizer = torch.optim.Adagrad(params, **kwargs)
    add = optimizer.add_param_group

    def add_param_group(group: dict[str, Any]) -> None:
        add(group)
        for p in optimizer.param_groups[-1]["params"]:
            total = torch.full_like(p, optimizer.defaults["initial_accumulator_value"])
            optimizer.state[p] = {"step": torch.tensor(0.0), "sum": total}

    optimizer.add_param_group = add_param_group  # type: ignore[assignment]  # its class is torch's
    return optimizer


def oracle(config: Config) -> Callable[..., Optimizer]:
    """Torch's own implementation of the optimizer, one tensor and one operator at a time."""
    if config.name == "MuonWithAuxAdam":
        return TorchMuonWithAuxAdam
    if config.torch_cls is None:
        return PlainLion
    cls = torch_adagrad if config.name == "Adagrad" else config.torch_cls
    return lambda params, **kwargs: cls(params, foreach=False, **kwargs)


# ---- comparisons ---------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, in which NaN equals itself and -0 differs from 0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    return dense.contiguous().view(integers[dense.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not torch.equal(bits(actual), bits(expected)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        raise AssertionError("the two differ in the sign of a zero or the payload of a NaN")


def assert_within(actual: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)


def assert_same_state(
    actual: Optimizer, expected: Optimizer, check: Callable[[Tensor, Tensor], None]
) -> None:
    """Compare parameters and states of two optimizers, which must have the same keys."""
    for group, expected_group in zip(actual.param_groups, expected.param_groups, strict=True):
        for p, q in zip(group["params"], expected_group["params"], strict=True):
            check(p.detach(), q.detach())
            assert (p in actual.state) == (q in expected.state)
            state, expected_state = actual.state.get(p, {}), expected.state.get(q, {})
            assert set(state) == set(expected_state)
            for key, value in state.items():
                check(value, expected_state[key])


# ---- the engine, and other processes -------------------------------------------------------------


@contextmanager
def slow_gather() -> Iterator[None]:
    """Read tensors through Python attributes, as where the engine finds no C ABI of torch."""
    engine = _engine.engine
    device = "emulated" if engine.emulated else "cuda"
    _engine.engine = _core.Engine(isa=engine.isa, fast_gather=False, device=device)
    try:
        yield
    finally:
        _engine.engine = engine


def run_python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these variables, and no others of ours, in its environment."""
    ours = ("FUSEDOPT_ISA", "FUSEDOPT_AHEAD", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *args],
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_script(code: str, *, warnings: str = "error", **environment: str) -> str:
    """Run code in a Python of its own, from the root of the tree, and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-W", warnings, "-c", code],
        cwd=pathlib.Path(__file__).parent.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


TWO_RANKS = """
import json, os, sys, warnings
import torch, fusedopt
import torch.distributed as dist

rank = 0 if (child := os.fork()) else 1
torch.set_num_threads(1)
store = "file://" + os.environ["STORE"]
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
{body}
everyone = [None, None]
dist.all_gather_object(everyone, results)
dist.destroy_process_group()
if rank == 1:
    os._exit(0)
os.waitpid(child, 0)
print(json.dumps(everyone))
"""


def run_two_ranks(body: str, directory: pathlib.Path) -> Any:
    """Run a script in two processes that talk to each other alone; return what each found.

    It knows its `rank` and leaves what it found, as far as JSON can tell it, in `results`.
    """
    interface = "lo0" if sys.platform == "darwin" else "lo"
    output = run_script(
        TWO_RANKS.replace("{body}", body),
        warnings="ignore",
        STORE=str(directory / "file"),
        GLOO_SOCKET_IFNAME=interface,
    )
    return json.loads(output.splitlines()[-1])


def threads_of_a_step(numel: int) -> int:
    """Count the threads on which a new Python thread steps so many elements; for Linux."""

    def existing() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    def step() -> None:
        optimizer.step()
        used.append(len(existing() - before))

    p = Parameter(torch.ones(numel))
    p.grad = torch.ones(numel)
    optimizer = fusedopt.SGD([p], lr=0.1)
    used: list[int] = []
    before = existing()
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    return used[0]
