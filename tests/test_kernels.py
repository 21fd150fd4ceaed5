"""Every kernel against reference(), bit for bit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedopt
from fusedopt import _core, _engine
from tests.helpers import ENGINES, each_config, each_dtype, each_isa
from tests.reference import reference_update, same_bits
from tests.registry import CONFIGS, DTYPES, PLAIN_CONFIGS, Config

SENTINEL = 77.0
PAD = 16


@pytest.fixture(autouse=True)
def torch_on_one_thread() -> Iterator[None]:
    """The oracle's many small operations are faster so; the engine is told its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_optimizer(config: Config, params: list[Tensor] | None = None) -> tuple[Any, Any]:
    optimizer = config.cls(params or [torch.zeros(1, requires_grad=True)], **config.kwargs)
    return optimizer, optimizer.param_groups[0]


def step_numbers(config: Config) -> list[int]:
    """Return a step number for each branch of the rule that steps come to, the last one first."""
    optimizer, group = make_optimizer(config)
    return list({optimizer._scalars(group, t).get("rectified"): t for t in (7, 3)}.values())


@functools.cache
def values(n: int, dtype: torch.dtype, seed: int, positive: bool = False) -> Tensor:
    """Return n values of many magnitudes, among them zeros, subnormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    x *= 10 ** (4 * torch.rand(n, generator=generator, dtype=torch.float64) - 3)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6e-8, 1e30, -1e30, torch.inf, torch.nan])
    chosen = torch.rand(n, generator=generator) < 0.1
    which = torch.randint(len(special), (n,), generator=generator)
    x = torch.where(chosen, special.double()[which], x)
    return (x.abs() if positive else x).to(dtype)


class Padded:
    """A tensor of n elements, `offset` elements past an aligned address, between sentinels."""

    def __init__(self, contents: Tensor, offset: int) -> None:
        n = contents.numel()
        self.buffer = torch.full((PAD + offset + n + PAD,), SENTINEL, dtype=contents.dtype)
        self.tensor = self.buffer[PAD + offset : PAD + offset + n]
        self.tensor.copy_(contents)

    def outside_is_untouched(self) -> bool:
        inside = self.tensor.clone()
        self.tensor.fill_(SENTINEL)
        untouched = bool((self.buffer == SENTINEL).all())
        self.tensor.copy_(inside)
        return untouched


def make_streams(
    optimizer: Any, group: Any, n: int, dtypes: tuple[torch.dtype, ...], offset: int = 0
) -> list[Padded]:
    """Return [param, grad, *states]; dtypes are those of parameter, gradient and states."""
    states = optimizer._rule(group).states
    streams = [Padded(values(n, dtypes[0], 1), offset), Padded(values(n, dtypes[1], 2), offset)]
    for i, name in enumerate(states):
        squares = name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
        streams.append(Padded(values(n, dtypes[2], 3 + i, positive=squares), offset))
    return streams


def check_update(
    isa: str,
    config: Config,
    n: int,
    dtypes: tuple[torch.dtype, ...],
    offset: int,
    threads: int,
    t: int,
) -> None:
    optimizer, group = make_optimizer(config)
    rule = optimizer._rule(group)
    streams = make_streams(optimizer, group, n, dtypes, offset)
    gradient = streams[1].tensor.clone()
    scale = 0.37
    expected = reference_update(optimizer, group, t, [x.tensor for x in streams], scale)
    ENGINES[isa].update(
        rule.name,
        sum(flag << i for i, flag in enumerate(optimizer._rule(group).flags)),
        list(optimizer._scalars(group, t).values()),
        -scale if group["maximize"] else scale,
        [x.tensor for x in streams],
        threads,
    )
    where = f"{n} elements, offset {offset}, {threads} threads"
    written = [streams[0], *streams[2:]]
    for name, stream, correct in zip(("param", *rule.states), written, expected, strict=True):
        assert same_bits(stream.tensor, correct), f"{name}: {where}"
    assert same_bits(streams[1].tensor, gradient), f"the gradient was written: {where}"
    assert all(stream.outside_is_untouched() for stream in streams), where


def sizes_around_a_vector(isa: str, dtype: torch.dtype) -> Iterator[int]:
    """In registers, bfloat16 is as many elements as fit one; others are in compute precision."""
    compute = {torch.float64: 8, torch.bfloat16: 2}.get(dtype, 4)
    lanes = ENGINES[isa].vector_bytes // compute
    yield from (0, 1, lanes - 1, lanes, lanes + 1, 2 * lanes + 3)


@each_isa
@each_dtype
@each_config
def test_every_size_and_alignment(isa: str, dtype: torch.dtype, config: Config) -> None:
    sizes = sizes_around_a_vector(isa, dtype)
    for n, offset, t in itertools.product(sizes, range(4), step_numbers(config)):
        check_update(isa, config, n, (dtype,) * 3, offset, threads=1, t=t)


@each_isa
@each_dtype
@each_config
def test_pieces_and_threads(isa: str, dtype: torch.dtype, config: Config) -> None:
    optimizer, group = make_optimizer(config)
    streams = 2 + len(optimizer._rule(group).states)
    piece = _core.piece_bytes // (streams * dtype.itemsize) // 4096 * 4096
    if isa == "device":
        piece = _core.tile
    sizes, t = (piece - 1, piece, piece + 1, 3 * piece + 5), step_numbers(config)[0]
    for n, threads in zip(sizes, (1, 2, 3, 8), strict=True):
        check_update(isa, config, n, (dtype,) * 3, 1, threads, t)


@each_isa
@pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)
def test_every_mix_of_dtypes(isa: str, config: Config) -> None:
    for *dtypes, t in itertools.product(DTYPES, DTYPES, DTYPES, step_numbers(config)):
        if isa == "device" and not device_takes(dtypes):
            continue
        check_update(isa, config, 300, tuple(dtypes), 1, threads=1, t=t)


@each_isa
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_decoded(isa: str, stored: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    p, g = torch.zeros(2**16), bits.view(stored)
    ENGINES[isa].update("sgd", 0, [0.0, -1.0], 1.0, [p, g], 1)  # p = 0 + g
    assert same_bits(p, 0 + g.float())


@each_isa
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_encoding_rounds_to_nearest_even(isa: str, stored: torch.dtype) -> None:
    # Every pattern of the 16 bits that are kept, with ties, near-ties and random digits below.
    high = torch.arange(2**16, dtype=torch.int64) << 16
    low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000]
    random = torch.randint(2**16, high.shape, generator=torch.Generator().manual_seed(0))
    bits = torch.cat([high + x for x in low] + [high + random])
    g = bits.to(torch.int32).view(torch.float32)
    p = torch.zeros(len(g), dtype=stored)
    ENGINES[isa].update("sgd", 0, [0.0, -1.0], 1.0, [p, g], 1)
    assert same_bits(p, (0 + g).to(stored))


@each_isa
def test_the_larger_of_two_zeros_has_the_sign_of_the_reference(isa: str) -> None:
    config = Config("Adam", {"amsgrad": True})
    optimizer, group = make_optimizer(config)
    zeros = [torch.tensor([a, b] * 20) for a, b in [(0.0, 0.0), (-0.0, 0.0), (0.0, -0.0)]]
    streams = [torch.ones(40), zeros[0].clone(), zeros[0].clone(), -zeros[0], zeros[1].clone()]
    expected = reference_update(optimizer, group, 3, streams)
    scalars = list(optimizer._scalars(group, 3).values())
    ENGINES[isa].update("adam", 0b10, scalars, 1.0, streams, 1)
    for actual, correct in zip([streams[0], *streams[2:]], expected, strict=True):
        assert same_bits(actual, correct)


def device_takes(dtypes: Sequence[torch.dtype]) -> bool:
    """Whether kernels of devices do: float64 is computed among itself alone."""
    return len({dtype == torch.float64 for dtype in dtypes}) == 1


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-dim": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "vector": lambda: torch.randn(33),
    "matrix": lambda: torch.randn(17, 5),
    "transposed": lambda: torch.randn(5, 17).t(),
    "permuted": lambda: torch.randn(3, 1, 4, 5).permute(2, 0, 3, 1),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(20, 12)[::3, 1::2],
    "large": lambda: torch.randn(40_000),
    "large strided": lambda: torch.randn(300, 400)[:, ::2],
}


def step_and_compare(
    optimizer: Any, steps: int, engine: Any, monkeypatch: Any, threads: int
) -> None:
    """Run whole steps; every parameter and state has the bits of reference()."""
    monkeypatch.setattr(_engine, "engine", engine)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(5)
    for t in range(1, steps + 1):
        expected = []
        for group in optimizer.param_groups:
            rule = optimizer._rule(group)
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                stored = optimizer.state.get(p, {})
                states = [stored.get(name, torch.zeros_like(p)) for name in rule.states]
                expected.append(reference_update(optimizer, group, t, [p, p.grad, *states]))
        optimizer.step()
        params = [(p, g) for g in optimizer.param_groups for p in g["params"]]
        for (p, group), correct in zip(params, expected, strict=True):
            states = [optimizer.state[p][name] for name in optimizer._rule(group).states]
            for x, y in zip([p, *states], correct, strict=True):
                assert same_bits(x, y), (p.shape, p.stride(), t)


@each_isa
@each_dtype
@each_config
def test_many_tensors_of_every_layout(
    isa: str, dtype: torch.dtype, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    taken = [name for name in LAYOUTS if isa != "device" or "strided" not in name]
    params = [LAYOUTS[name]().to(dtype).requires_grad_() for name in taken]
    params += [torch.randn(n).to(dtype).requires_grad_() for n in range(40)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.02}]
    optimizer, steps = config.cls(groups, **config.kwargs), step_numbers(config)[0]
    step_and_compare(optimizer, steps, ENGINES[isa], monkeypatch, threads=3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shapes_and_hyper_parameters(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(CONFIGS))
    unit = st.floats(0, 0.9999)
    drawn: dict[str, Any] = {"lr": data.draw(st.floats(0, 10))}
    for name in set(config.kwargs) - {"lr"}:
        drawn[name] = config.kwargs[name]
    if config.name in ("Adam", "AdamW", "RAdam", "Lion"):
        drawn["betas"] = (data.draw(unit), data.draw(unit))
    if config.name in ("Adam", "AdamW", "RAdam", "RMSprop", "Adagrad"):
        drawn["eps"] = data.draw(st.floats(1e-12, 1))
    if "weight_decay" in drawn:
        drawn["weight_decay"] = data.draw(st.floats(0, 2))
    shapes = st.lists(st.integers(0, 9), max_size=4)
    params = []
    for shape in data.draw(st.lists(shapes, min_size=1, max_size=5)):
        p = torch.randn(shape).to(data.draw(st.sampled_from(DTYPES)))
        p = p.permute(data.draw(st.permutations(range(p.dim()))))
        params.append(p.requires_grad_())
    optimizer = config.cls(params, **drawn)
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = ENGINES[data.draw(st.sampled_from(fusedopt.isas()))]
        steps = step_numbers(Config(config.name, drawn))[0]
        step_and_compare(optimizer, steps, engine, monkeypatch, data.draw(st.integers(1, 8)))
