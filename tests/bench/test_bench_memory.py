"""Who keeps less: their numbers, and their bytes."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt
from fusedopt.bench import memory, modes, oracle, rows, table
from fusedopt.bench.contestants import OURS, Contestant
from fusedopt.bench.measure import measure
from fusedopt.bench.modes import Step
from fusedopt.bench.results import Report, RowResult, machine, read
from fusedopt.bench.rows import Row
from tools import performance_page

HERE = {each.name: each for each in memory.contestants("torch fused")}
HERE_NAMES = list(HERE)
EIGHT_BITS = oracle.Storage(oracle.EIGHT_BITS)
BFLOAT16 = Row("small", "AdamW", dtype=torch.bfloat16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Row:
    monkeypatch.setitem(rows.MODELS, "small", [(64, 96)])
    return Row("small", "AdamW")


def in_mode(**arguments: Any) -> Any:
    def build(row: Row, params: list[Tensor]) -> Step:
        step: Step = fusedopt.AdamW(params, **{**row.arguments, **arguments}).step
        return step

    return build


@pytest.mark.parametrize("name", HERE)
def test_right_numbers_pass(name: str, small: Row) -> None:
    contestant = HERE[name]
    row = small._replace(dtype=contestant.dtype or small.dtype)
    assert contestant.check(contestant.build, row) == ""


@pytest.mark.parametrize(
    "arguments",
    [
        {"master_weights": True, "state_dtype": torch.bfloat16},
        {"stochastic_rounding": True, "state_dtype": torch.float32},
        {"master_weights": True, "state_dtype": torch.float32, "eps": 1.1e-8},
    ],
)
def test_masters_that_are_not_float32_training_are_found(arguments: dict[str, Any]) -> None:
    found = oracle.unlike_float32(in_mode(**arguments), BFLOAT16)
    assert found.endswith(" bits are not those of float32 training")


def test_a_master_that_loses_its_last_bit_once_is_found() -> None:
    def build(row: Row, params: list[Tensor]) -> Step:
        arguments: Any = {"master_weights": True, "state_dtype": torch.float32}
        optimizer = fusedopt.AdamW(params, **row.arguments, **arguments)
        broken = [1]

        class Once(fusedopt.AdamW):
            def step(self, closure: Any = None) -> Any:
                result = super().step(closure)
                state = self.state.get(params[0], {})  # none in the twin
                if broken and state and state["step"] == 7:
                    state["remainder"][0, 0] ^= broken.pop()
                return result

        optimizer.__class__ = Once
        step: Step = optimizer.step
        return step

    assert oracle.unlike_float32(build, BFLOAT16) == "1 bits are not those of float32 training"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [{"lr": 1.7e-3}, {"lr": 0.5e-3}, {"maximize": True}])
def test_eight_bits_do_not_explain_everything(wrong: dict[str, Any], dtype: torch.dtype) -> None:
    build = in_mode(state_dtype="mxfp8", **wrong)
    found = EIGHT_BITS.mistake(build, BFLOAT16._replace(dtype=dtype))
    assert found.startswith("off by ")


def test_a_second_moment_that_loses_its_small_elements_is_wrong() -> None:
    def build(row: Row, params: list[Tensor]) -> Step:
        optimizer = torch.optim.AdamW(params, **row.arguments, foreach=False)

        class Linear(torch.optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                result = super().step(closure)
                for p in params:
                    v = self.state[p]["exp_avg_sq"]
                    unit = v.max() / 255
                    v.copy_((v / unit).round() * unit)
                return result

        optimizer.__class__ = Linear
        return optimizer.step

    assert EIGHT_BITS.mistake(build, Row("small", "AdamW")).startswith("off by ")


BYTES = {  # parameters, gradients, and states, with a scale for each 32 codes
    OURS: 2 * 4 + 4 + 2 * 8,
    f"{OURS} float32, mxfp8 states": 2 * 4 + 4 + 2 * 2 * 33 / 32,
    f"{OURS} bfloat16": 2 * 2 + 2 + 2 * 4,
    f"{OURS} bfloat16, masters, float32 states": 2 * 4 + 2 + 2 * 8,
    f"{OURS} bfloat16, masters, bfloat16 states": 2 * 4 + 2 + 2 * 4,
    f"{OURS} bfloat16, masters, mxfp8 states": 2 * 4 + 2 + 2 * 2 * 33 / 32,
    f"{OURS} bfloat16, stochastic, bfloat16 states": 2 * 2 + 2 + 2 * 4,
    f"{OURS} bfloat16, stochastic, mxfp8 states": 2 * 2 + 2 + 2 * 2 * 33 / 32,
    "torch fused": 2 * 4 + 4 + 2 * 8,
    "torch fused bfloat16": 2 * 2 + 2 + 2 * 4,
}


@pytest.fixture
def result(small: Row) -> RowResult:
    return measure(small, list(HERE.values()), repeats=2)


def test_bytes_are_those_of_the_tensors_that_are_kept(result: RowResult) -> None:
    found = {timing.name: timing.bytes_a_parameter for timing in result.timings}
    # (What all elements of a tensor have in common, a step and a draw, is 24 bytes more.)
    assert found == pytest.approx(BYTES, abs=25 / 6144)
    assert not [timing for timing in result.timings if timing.failed or timing.wrong]


def test_the_rate_is_that_of_a_contestants_own_bytes(result: RowResult) -> None:
    for timing in result.timings:
        assert timing.bytes_a_parameter is not None
        moved = timing.bytes_a_parameter * result.parameters
        assert timing.gigabytes_per_second == pytest.approx(moved / timing.milliseconds / 1e6)


def test_the_table_has_the_bytes_and_other_tables_have_none(result: RowResult) -> None:
    def shown(result: RowResult) -> str:
        console = Console(file=io.StringIO(), width=110)
        console.print(table.row_table(result))
        # (A console has any file; this one is a StringIO.)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    text = shown(result)
    assert text.startswith("Memory modes, small, AdamW, 1 thread: at most ")
    assert "bytes" in text
    assert "14.13" in text
    plain = dataclasses.replace(
        result, timings=[dataclasses.replace(t, bytes_a_parameter=None) for t in result.timings]
    )
    assert "bytes" not in shown(plain)


def test_the_page_has_a_line_for_each(result: RowResult) -> None:
    result.timings[1].wrong = "off by 1"
    result.timings[2].failed = "RuntimeError: no"
    report = Report(machine("cpu"), memory=[result])
    lines = performance_page.memory(report).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        timing.name for timing in result.timings if not timing.failed
    ]
    assert lines[0].split(" | ")[1] == "28.00"
    assert lines[1].endswith("x (wrong) |")
    assert performance_page.peers(report) == (
        f"- {HERE_NAMES[2]} failed in small, AdamW, 1 thread: RuntimeError: no\n"
        f"- {HERE_NAMES[1]} has wrong numbers in small, AdamW, 1 thread: off by 1"
    )


def test_what_a_tensor_of_another_class_is_made_of_counts_and_a_shared_table_once() -> None:
    params = [torch.zeros(100, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    two: Any = TwoTensor
    shared = torch.zeros(256, dtype=torch.uint8)
    for p in params:
        p.grad = torch.zeros(100)
        halves: Any = two(torch.zeros(100), torch.zeros(100))
        optimizer.state[p] = {"both": halves, "table": shared, "step": 3}
    assert modes.bytes_moved(optimizer) == 2 * (2 * 400 + 400 + 2 * 800) + 2 * 256


def test_peers_are_chosen_by_name() -> None:
    def names(peers: str, quick: bool = False) -> list[str]:
        chosen: list[Contestant] = memory.contestants(peers, quick)
        return [each.name for each in chosen if not each.name.startswith(OURS)]

    assert names("none") == []
    assert names("", quick=True) == ["torch fused", "torch fused bfloat16"]
    assert names("torchao", quick=True) == ["torchao 8-bit, stochastic"]
    libraries = {"bitsandbytes 8-bit", "pytorch-optimizer Flash, masters"}
    assert libraries < set(names(""))


def test_a_report_without_memory_modes_can_be_read(tmp_path: Any) -> None:
    path = tmp_path / "report.json"
    Report(machine("cpu")).write(path)
    path.write_text(path.read_text().replace('"memory": []', '"other": []'))
    assert read(path).memory == []
