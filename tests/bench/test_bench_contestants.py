"""Contestants: who is there, and who steps when."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from torch import Tensor

from fusedopt.bench import contestants as who
from fusedopt.bench.contestants import OURS, Contestant, contestants
from fusedopt.bench.measure import MOST, measure, turns
from fusedopt.bench.modes import Step
from fusedopt.bench.rows import Row
from tests.bench.common import TINY, TORCH, build, tiny_result


def test_a_peer_that_is_not_installed_is_listed_with_the_reason() -> None:
    peer = who.library("nobody", {"AdamW": ("fusedopt_has_no_such_peer.AdamW", {})})
    assert peer.missing == "ModuleNotFoundError: No module named 'fusedopt_has_no_such_peer'"
    result = measure(TINY, [*TORCH, peer], repeats=2)
    assert "nobody" not in [timing.name for timing in result.timings]


def test_a_peer_that_fails_is_listed_with_the_reason() -> None:
    result = tiny_result("RMSprop")
    failed = {timing.name: timing.failed for timing in result.timings if timing.failed}
    assert list(failed) == ["torch fused"]
    assert failed["torch fused"].endswith("got an unexpected keyword argument 'fused'")
    assert result.find("torch fused") is None


@pytest.mark.parametrize("failing", [3, 6, 11])  # while warming up, twice, and afterwards
def test_a_peer_that_fails_later_is_listed_too(failing: int) -> None:
    def some_step_fails(row: Row, params: list[Tensor]) -> Step:
        step, calls = build("torch fused")(row, params), []

        def counted() -> None:
            calls.append(1)
            if params[0].numel() == 16 and len(calls) == failing:
                raise RuntimeError("out of breath\nand more")
            step()

        return counted

    peer = Contestant("tired", lambda row: True, some_step_fails)
    result = measure(TINY, [*TORCH, peer], repeats=4)
    assert result.timings[-1].failed == "RuntimeError: out of breath"
    assert result.timings[0].samples == 4


@pytest.mark.parametrize(
    ("once", "repeats", "budget", "entered"),
    [
        pytest.param({"a": 0.1, "b": 0.5}, 3, 1.0, (3, 3), id="as asked for"),
        pytest.param({"a": 0.1, "b": 0.5}, 0, 30.0, (50, 50), id="enough time for all"),
        pytest.param({"a": 0.1, "b": 0.5}, 0, 8.1, (30, 10), id="the slow one less often"),
        pytest.param({"a": 0.1, "b": 0.29}, 0, 0.1, (7, 7), id="not slow enough for that"),
        pytest.param({"a": 0.1, "fusedopt": 0.5}, 0, 0.1, (7, 7), id="fusedopt in every round"),
        pytest.param({"a": 0.1, "b": 9.0}, 0, 1.0, (21, 7), id="too slow for the budget"),
        pytest.param({"a": 1e-6, "b": 2e-6}, 0, 9.0, (MOST, MOST), id="no more than needed"),
    ],
)
def test_who_steps_in_a_round(
    once: dict[str, float], repeats: int, budget: float, entered: tuple[int, int]
) -> None:
    rounds = turns(once, repeats, budget, thin=True)
    assert tuple(sum(name in names for names in rounds) for name in once) == entered
    assert all(len(set(names)) == len(names) for names in rounds)


def test_all_step_in_each_round_where_caches_matter() -> None:
    rounds = turns({"a": 0.1, "b": 0.5, "c": 0.5}, 0, 8.1, thin=False)
    assert [sorted(names) for names in rounds] == [["a", "b", "c"]] * 7


def test_contestants_step_in_changing_orders() -> None:
    rounds = turns(dict.fromkeys("abc", 1.0), 60, 0, thin=False)
    first = [names[0] for names in rounds]
    assert min(first.count(name) for name in "abc") > 10
    assert all(names[-1] != following[0] for names, following in pairwise(rounds))


def test_a_small_step_counts_after_the_contestants_own_steps() -> None:
    stepped: list[str] = []

    def emptied(name: str) -> Contestant:
        def build(row: Row, params: list[Tensor]) -> Step:
            def step() -> None:
                if stepped[-1:] != [name]:  # as if all of its memory were out of cache
                    time.sleep(0.005)
                stepped.append(name)

            return step

        return Contestant(name, lambda row: True, build)

    small = measure(TINY, [emptied("a"), emptied("b")], repeats=3)
    for timing in small.timings:
        assert timing.milliseconds < 1
        assert timing.cold_milliseconds is not None
        assert timing.cold_milliseconds > 5
    large = measure(Row("1 x 4M", "SGD"), [emptied("a"), emptied("b")], repeats=3)
    for timing in large.timings:
        assert timing.milliseconds > 5
        assert timing.cold_milliseconds is None


def test_all_take_as_many_turns_where_a_step_is_small() -> None:
    slow = Contestant("slow", lambda row: True, lambda row, params: lambda: time.sleep(0.002))
    fast = Contestant("fast", lambda row: True, lambda row, params: lambda: None)
    small = measure(TINY, [slow, fast], budget=0)
    assert small.timings[0].samples == small.timings[1].samples


def test_peers_are_chosen_by_name() -> None:
    def names(peers: str, quick: bool = False) -> list[str]:
        return [c.name for c in contestants(peers, quick) if not c.name.startswith(OURS)]

    assert names("none") == []
    assert names("LOOP, foreach") == ["torch foreach", "torch loop"]
    assert names("compile", quick=True) == ["torch.compile"]
    assert "torch.compile" not in names("", quick=True)


def test_many_tensors_are_not_compiled() -> None:
    (compiled,) = (c for c in contestants("compile") if c.compiles)
    result = measure(Row("300 x 1", "SGD"), [compiled], repeats=1)
    assert result.timings[0].failed == (
        "NotImplementedError: compiling 300 tensors takes many minutes"
    )


def test_what_is_compiled_in_the_second_step_counts_as_compiling() -> None:
    def build_slowly(row: Row, params: list[Tensor]) -> Step:
        step, pauses = build("torch loop")(row, params), [0.1, 0.2]

        def slow_at_first() -> None:
            time.sleep(pauses.pop() if pauses else 0)
            step()

        return slow_at_first

    slow = Contestant("slow", lambda row: True, build_slowly, compiles=True)
    (timing,) = measure(TINY, [slow], repeats=3).timings
    assert timing.compile_seconds is not None
    assert timing.compile_seconds > 0.25
