"""docs/memory.md: its numbers are those of live tensors, and its messages those that one reads."""

from __future__ import annotations

import json
import re
import statistics
import sys
from typing import Any

import pytest
import torch

import fusedopt
from examples.train_gpt import MEMORY
from tools import memory_page, memory_quality

TEXT = memory_page.PAGE.read_text()
RESULTS = json.loads(memory_quality.RESULTS.read_text())
each_mode = pytest.mark.parametrize("mode", MEMORY)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.mark.parametrize(
    ("page", "name", "make"), memory_page.BLOCKS, ids=[name for _, name, _ in memory_page.BLOCKS]
)
def test_a_block_is_what_the_tool_makes(page: Any, name: str, make: Any) -> None:
    assert memory_page.block(page, name) == make()


def growth(mode: str) -> tuple[str, str]:
    rows = [cells(line) for line in memory_page.block(memory_page.PAGE, "growth")]
    ((_, tensors, process),) = [row for row in rows if row[0] == f"`{mode}`"]
    return tensors, process


@each_mode
def test_a_process_grew_by_its_tensors(mode: str) -> None:
    tensors, process = growth(mode)
    assert tensors == memory_page.text(memory_page.count("AdamW", mode).kept)
    assert float(process) == pytest.approx(float(tensors), abs=memory_page.GROWTH_WITHIN)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read as in Linux")
@pytest.mark.parametrize("mode", ["exact-mxfp8", "random-mxfp8"])
def test_a_process_grows_by_what_the_page_says(mode: str) -> None:
    grown = memory_page.grow_in_a_process(mode, side=2048)
    assert grown == pytest.approx(float(growth(mode)[1]), abs=memory_page.GROWTH_WITHIN)


def test_the_bytes_that_were_aimed_at() -> None:
    exact = memory_page.count("AdamW", "exact-mxfp8")
    assert exact.kept <= 8.1
    assert exact.kept - exact.gradient <= 6.1
    random = memory_page.count("AdamW", "random-mxfp8")
    assert random.parameter + random.states <= 4.1


def test_bytes_are_of_what_the_state_has() -> None:
    """As counted by hand: masters of 16 bits, two moments of a byte, a scale for 32 of each."""
    n = memory_page.count("AdamW", "exact-mxfp8")
    assert (n.parameter, n.gradient) == (2, 2)
    assert n.states == pytest.approx(2 + 2 * (1 + 1 / 32), abs=1e-4)
    assert n.moved == pytest.approx(2 + 2 * (2 + n.states), abs=1e-4)


# ---- the losses ----------------------------------------------------------------------------------


def last(mode: str) -> list[float]:
    return [run[-1] for run in RESULTS["losses"][mode]]


@pytest.mark.parametrize("mode", [mode for mode in MEMORY if mode != "bfloat16"])
def test_modes_train_as_float32_does(mode: str) -> None:
    apart = statistics.fmean(last(mode)) - statistics.fmean(last("float32"))
    assert abs(apart) < statistics.stdev(last("float32"))


def test_plain_bfloat16_does_not() -> None:
    apart = statistics.fmean(last("bfloat16")) - statistics.fmean(last("float32"))
    assert apart > 2 * statistics.stdev(last("float32"))


@each_mode
def test_losses_are_of_this_code(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of one seed, in each mode: they learn, and stay near float32."""
    monkeypatch.setattr(memory_quality, "STEPS", 10)
    monkeypatch.setattr(memory_quality, "TESTS", 2)
    threads = torch.get_num_threads()
    try:
        losses, expected = (memory_quality.train((each, 0)) for each in (mode, "float32"))
    finally:
        torch.set_num_threads(threads)
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert losses == pytest.approx(expected, abs=0.02)


def test_the_picture_is_drawn(tmp_path: Any) -> None:
    memory_quality.draw(RESULTS, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000


# ---- other libraries' states ---------------------------------------------------------------------


def split_as_transformer_engine_does(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By its rule: the two halves of the bits, the upper plus 1 where the lower is negative."""
    halves = master.contiguous().view(torch.int16).reshape(*master.shape, 2)
    low, high = halves[..., 0], halves[..., 1]
    return (high + (low < 0).to(torch.int16)).view(torch.bfloat16), low.clone()


def test_masters_of_transformer_engine_carry_over_bit_for_bit() -> None:
    torch.manual_seed(0)
    master = torch.randn(64, 96)
    parameter, low = split_as_transformer_engine_does(master)
    moments = {"exp_avg": torch.randn(64, 96), "exp_avg_sq": torch.rand(64, 96)}
    theirs = {
        "param_groups": [{"params": [0], "step": 7}],
        "state": {0: {**moments, "master_param": low}},
    }
    (convert,) = re.findall(r"```python\n(def from_transformer_engine.*?)\n\n\n", TEXT, re.DOTALL)
    known: dict[str, Any] = {"torch": torch}
    exec(convert, known)

    layer = torch.nn.Linear(96, 64, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(parameter)
    optimizer = fusedopt.AdamW(layer.parameters(), master_weights=True, state_dtype=torch.float32)
    states = known["from_transformer_engine"](theirs)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    assert torch.equal(optimizer.master_state_dict(layer)["weight"], master)
    state = optimizer.state[layer.weight]
    assert state["step"] == 7
    assert torch.equal(state["exp_avg"], moments["exp_avg"])


# ---- the messages --------------------------------------------------------------------------------

ERRORS = [cells(line) for line in TEXT.partition("## Errors")[2].splitlines() if line[:3] == "| `"]


@pytest.mark.parametrize(("code", "message"), ERRORS, ids=[code for code, _ in ERRORS])
def test_an_error_reads_as_on_the_page(code: str, message: str) -> None:
    model = torch.nn.Linear(100, 100).bfloat16()
    w, p = model.parameters()
    p.grad, w.grad = torch.zeros_like(p), torch.zeros_like(w)
    known = {
        "AdamW": fusedopt.AdamW,
        "torch": torch,
        "model": model,
        "weights": model.state_dict(),
        "p": p,
        "w": w,
    }
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        eval(code.strip("`"), known)
