"""What only a GPU can show: the bits of the CPU, streams, graphs, several devices, scalers.

Run by ``make gpu-check``, with ``--device cuda``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import _core, _engine
from tests.helpers import assert_same_bits, assert_same_state
from tests.registry import CONFIGS, DTYPES, PLAIN_CONFIGS, Config

SIZES = [0, 1, 3, 255, 4095, 4096, 4097, 100_003, 0]

each_config = pytest.mark.parametrize("config", CONFIGS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_optimizer = pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)


def normal(n: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(n, generator=generator, device="cpu").to(device, dtype)


def trained(
    make: Callable[..., Any],
    device: str,
    dtype: torch.dtype,
    steps: int = 7,
    grad_dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Return an optimizer of fresh parameters on the device, after a few steps."""
    params = [Parameter(normal(n, i, dtype, device)) for i, n in enumerate(SIZES)]
    with torch.device(device):  # where torch's Adagrad puts its counts
        optimizer = make(params, **options)
    for step in range(steps):
        set_gradients(params, step, grad_dtype or dtype)
        optimizer.step()
    return optimizer


def set_gradients(params: list[Parameter], step: int, dtype: torch.dtype | None = None) -> None:
    for i, p in enumerate(params):
        gradient = normal(p.numel(), 100 * (step + 1) + i, dtype or p.dtype, str(p.device))
        data, p.data = p.data, p.data.to(gradient.dtype)  # or torch refuses another dtype
        p.grad = gradient
        p.data = data


def same_as_on_cpu(a: Tensor, b: Tensor) -> None:
    assert_same_bits(a.cpu(), b.cpu())


def close_to_cpu(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)


# ---- the same bits -------------------------------------------------------------------------------


def test_the_kernels_are_there() -> None:
    assert _engine.engine.why_not(0) == ""
    assert _core.cuda_archs
    assert _core.cuda_devices()


@each_config
@each_dtype
def test_same_bits_as_on_the_cpu(config: Config, dtype: torch.dtype) -> None:
    actual, expected = (
        trained(config.cls, device, dtype, **config.kwargs) for device in ("cuda", "cpu")
    )
    assert_same_state(actual, expected, same_as_on_cpu)


@each_optimizer
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_with_gradients_of_another_dtype(
    config: Config, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    actual, expected = (
        trained(config.cls, device, dtype, grad_dtype=grad_dtype, **config.kwargs)
        for device in ("cuda", "cpu")
    )
    assert_same_state(actual, expected, same_as_on_cpu)


@each_optimizer
@each_dtype
def test_same_bits_clipped(config: Config, dtype: torch.dtype) -> None:
    """By a norm that each device computes itself: its bits are the same, too."""
    actual, expected = (
        trained(config.cls, device, dtype, max_grad_norm=0.3, **config.kwargs)
        for device in ("cuda", "cpu")
    )
    assert_same_state(actual, expected, same_as_on_cpu)
    same_as_on_cpu(actual.grad_norm, expected.grad_norm)


@each_dtype
@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_norms_have_the_same_bits(dtype: torch.dtype, order: float) -> None:
    tensors = [normal(n, i, dtype, "cpu") for i, n in enumerate([*SIZES, 3_000_001])]
    expected = fusedopt.get_total_norm(tensors, order)
    actual = fusedopt.get_total_norm([x.cuda() for x in tensors], order)
    assert actual.is_cuda
    same_as_on_cpu(actual, expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_conversions_are_the_cpus(stored: torch.dtype) -> None:
    """The GPU has instructions for them. Every value, and ties, near-ties and digits below."""
    high = torch.arange(2**16, dtype=torch.int64, device="cpu") << 16
    low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000]
    g = torch.cat([high + x for x in low]).to(torch.int32).view(torch.float32)
    for gradient in (g, torch.arange(2**16, device="cpu").to(torch.int16).view(stored)):
        p = torch.zeros(len(gradient), dtype=stored, device="cpu")
        expected, actual = p.clone(), p.cuda()
        _core.Engine(device="none").update("sgd", 0, [0.0, -1.0], 1.0, [expected, gradient], 1)
        _engine.engine.update("sgd", 0, [0.0, -1.0], 1.0, [actual, gradient.cuda()], 1)
        equal = (actual.cpu().view(torch.int16) == expected.view(torch.int16)) | expected.isnan()
        assert equal.all()
        assert torch.equal(actual.cpu().isnan(), expected.isnan())


def test_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("needs 13 GB of memory")
    p = Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    p.grad[-1] = 3
    fusedopt.SGD([p], lr=0.5).step()
    assert float(p[0].detach()) == float(p[2**31 + 1].detach()) == 0.5
    assert float(p[-1].detach()) == -0.5


# ---- streams, threads, devices -------------------------------------------------------------------


def test_work_is_in_the_current_stream() -> None:
    """A step in a stream that waits for a slow one sees what that one writes."""
    p = Parameter(torch.zeros(1000, device="cuda"))
    p.grad = torch.zeros(1000, device="cuda")
    optimizer = fusedopt.SGD([p], lr=1.0)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # of torch
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]  # of torch
        p.grad.fill_(1.0)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    assert (p == -1).all()


def on_several(places: tuple[str, str]) -> Optimizer:
    params = [Parameter(normal(5000, i, torch.float32, place)) for i, place in enumerate(places)]
    optimizer = fusedopt.AdamW(params, max_grad_norm=0.3)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    return optimizer


def test_a_parameter_on_the_cpu_and_one_on_a_gpu() -> None:
    """The sums of two places are joined in another order than the blocks of one."""
    expected = on_several(("cpu", "cpu"))
    assert_same_state(on_several(("cpu", "cuda:0")), expected, close_to_cpu)


def test_two_devices_in_one_optimizer() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = on_several(("cpu", "cpu"))
    assert_same_state(on_several(("cuda:0", "cuda:1")), expected, close_to_cpu)
    assert torch.cuda.current_device() == 0


# ---- nobody waits --------------------------------------------------------------------------------


@each_optimizer
def test_no_step_waits_for_the_gpu(config: Config) -> None:
    options: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.3}, {"skip_nonfinite": True}]
    for option in options:
        params = [Parameter(normal(n, i, torch.float32, "cuda")) for i, n in enumerate(SIZES)]
        params += [Parameter(torch.ones(7, device="cuda")) for _ in range(1200)]  # a long table
        optimizer = config.cls(params, **config.kwargs, **option)
        set_gradients(params, 0)
        for _ in range(3):
            try:
                torch.cuda.set_sync_debug_mode("error")
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


# ---- graphs --------------------------------------------------------------------------------------


def _has_capturable(config: Config) -> bool:
    return "capturable" in config.cls([torch.ones(1)]).defaults


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Return a graph of the step, taken after three in a stream of their own, as torch wants."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # of torch
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


CAPTURABLE = [
    config for config in PLAIN_CONFIGS if config.name in ("SGD", "Lion") or _has_capturable(config)
]


@pytest.mark.parametrize("tensors", [3, 1000])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("config", CAPTURABLE, ids=str)
def test_a_captured_training_step(config: Config, clip: float | None, tensors: int) -> None:
    """Forward, backward and step in one graph, against the same steps without one."""
    kwargs: dict[str, Any] = {**config.kwargs, "max_grad_norm": clip}
    if _has_capturable(config):
        kwargs["capturable"] = True
    x = torch.zeros(8, device="cuda")

    def make() -> tuple[list[Parameter], Optimizer]:
        params = [Parameter(normal(8, i, torch.float32, "cuda")) for i in range(tensors)]
        return params, config.cls(params, **kwargs)

    def train_step(params: list[Parameter], optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([(p * x).square().sum() for p in params]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()

    def fill(step: int) -> None:
        x.copy_(normal(8, 1000 + step, torch.float32, "cuda"))

    fill(0)
    captured, plain = make(), make()
    graph = capture(lambda: train_step(*captured))
    for _ in range(3):
        train_step(*plain)
    for step in range(1, 6):
        fill(step)
        graph.replay()
        train_step(*plain)
    assert_same_state(captured[1], plain[1], same_as_on_cpu)


def test_a_captured_step_draws_anew_at_each_replay() -> None:
    def make() -> tuple[list[Tensor], Any]:
        params = [
            normal(n, i, torch.bfloat16, "cuda").view(-1, 64).requires_grad_()
            for i, n in enumerate((6400, 64))
        ]
        for p in params:
            p.grad = torch.ones_like(p)
        options: dict[str, Any] = {"stochastic_rounding": True, "state_dtype": "mxfp8"}
        return params, fusedopt.AdamW(params, capturable=True, **options)

    captured, plain = make(), make()
    graph = capture(captured[1].step)
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        plain[1].step()
    assert_same_state(captured[1], plain[1], same_as_on_cpu)


def test_a_captured_step_reads_the_learning_rate() -> None:
    lr = torch.tensor(0.0, device="cuda")
    p = Parameter(torch.zeros(5, device="cuda"))
    p.grad = torch.ones(5, device="cuda")
    graph = capture(fusedopt.SGD([p], lr=lr).step)
    lr.fill_(2.0)
    graph.replay()
    assert (p == -2).all()


# ---- scalers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
@each_optimizer
def test_scalers(config: Config, own: bool) -> None:
    """Torch's scaler with amp_scaling, and fusedopt's, against torch's and its own unscaling."""

    def run(ours: bool) -> tuple[Optimizer, Any]:
        scaler = (fusedopt if ours and own else torch.amp).GradScaler("cuda", init_scale=2.0**10)
        params = [Parameter(normal(n, i, torch.float32, "cuda")) for i, n in enumerate(SIZES)]
        optimizer = config.cls(params, **config.kwargs, amp_scaling=ours and not own)
        for step in range(8):
            set_gradients(params, step)
            for p in params:
                assert p.grad is not None
                p.grad *= scaler.scale(torch.ones((), device="cuda"))
            if step in (2, 5):
                assert params[4].grad is not None
                params[4].grad[17] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return optimizer, scaler

    (actual, scaler), (expected, torch_scaler) = run(True), run(False)
    assert scaler.get_scale() == torch_scaler.get_scale()
    assert actual.skipped_steps == 2  # type: ignore[attr-defined]  # a fused one
    assert_same_state(actual, expected, close_to_cpu)


# ---- checkpoints ---------------------------------------------------------------------------------


@each_optimizer
def test_checkpoints_go_between_devices(config: Config) -> None:
    on_gpu = trained(config.cls, "cuda", torch.float32, **config.kwargs)
    saved = copy.deepcopy(on_gpu.state_dict())
    params = [Parameter(p.detach().cpu()) for p in on_gpu.param_groups[0]["params"]]
    on_cpu = config.cls(params, **config.kwargs)
    on_cpu.load_state_dict(saved)
    for optimizer in (on_gpu, on_cpu):
        set_gradients(optimizer.param_groups[0]["params"], 50)
        optimizer.step()
    assert_same_state(on_gpu, on_cpu, same_as_on_cpu)
