"""What a rule leaves as it is, no kernel stores: it may lie in memory that nobody can write to."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import ENGINES, bits, each_dtype, run_script

# Rules, their scalars, and the stream that they leave as it is.
KEPT = [("muon_momentum", [0.05], 0), ("muon_nesterov", [0.4, 0.05], 2), ("ema", [0.1], 0)]

# The stream lies in pages for reading alone, where a store ends the process.
STEPS = """
import mmap, torch
from tests.helpers import ENGINES
from tests.test_kept_streams import KEPT

N = 70_000  # some pieces, and an end
memory = mmap.mmap(-1, 8 * N, prot=mmap.PROT_READ)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    kept = torch.frombuffer(memory, dtype=dtype, count=N)
    others = [dtype] if dtype == torch.float64 else [dtype, torch.float32]
    for engine in ENGINES.values():
        for rule, scalars, place in KEPT:
            for other in others:
                streams = [torch.ones(N, dtype=other) for _ in range(3)]
                streams[place] = kept
                engine.update(rule, 0, scalars, 1.0, streams, 2)
                if engine.why_not(0) != "" or not engine.emulated:
                    wide = [x.view(100, 700) for x in streams]
                    wide[1] = wide[1].t().contiguous().t()
                    engine.update(rule, 0, scalars, 1.0, wide, 2)
print("done")
"""


def test_nothing_is_stored_where_a_rule_changes_nothing() -> None:
    assert run_script(STEPS, warnings="ignore") == "done"


@pytest.mark.parametrize(("rule", "scalars", "place"), KEPT, ids=lambda x: x)
@pytest.mark.parametrize("isa", ENGINES)
@each_dtype
def test_what_is_kept_keeps_even_the_payload_of_a_nan(
    dtype: torch.dtype, isa: str, rule: str, scalars: list[float], place: int
) -> None:
    streams = [torch.ones(37, dtype=dtype) for _ in range(3)]
    special = torch.tensor([0.0, -0.0, 1e-40, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    streams[place][:6] = special
    before = bits(streams[place]).clone()
    before[5] += 3  # a NaN with a payload
    streams[place].view(before.dtype).copy_(before)
    ENGINES[isa].update(rule, 0, scalars, 1.0, streams, 1)
    assert torch.equal(bits(streams[place]), before)


def test_what_a_rule_does_not_look_at_may_be_anything() -> None:
    nan = torch.full((37,), torch.nan)
    momentum, average, place = torch.ones(37), torch.ones(37), nan.clone()
    engine = ENGINES["generic"]
    engine.update("muon_momentum", 0, [0.5], 1.0, [nan, torch.zeros(37), momentum], 1)
    engine.update("muon_nesterov", 0, [1.0, 0.5], 1.0, [place, torch.ones(37), momentum], 1)
    engine.update("ema", 0, [0.5], 1.0, [torch.zeros(37), nan, average], 1)
    for x, expected in ((momentum, 0.5), (place, 0.75), (average, 0.5)):
        assert torch.equal(x, torch.full((37,), expected))
