"""The benchmark, on rows that take no time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt.bench import __main__ as command
from fusedopt.bench import contestants as who
from fusedopt.bench import oracle, picture, rows, run, table
from fusedopt.bench.contestants import OURS, Contestant, contestants
from fusedopt.bench.measure import MOST, measure, turns
from fusedopt.bench.modes import Step
from fusedopt.bench.overhead import overhead
from fusedopt.bench.results import Report, RowResult, machine, read
from fusedopt.bench.rows import MAX_NORM, Row
from fusedopt.bench.training import Task, train
from tools import count_instructions, measure_page

TORCH = contestants("torch fused,foreach,loop")
TINY = Row("3 x 16", "AdamW", threads=1)


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    """Measuring sets torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def build(name: str) -> Any:
    return next(contestant.build for contestant in TORCH if contestant.name == name)


def tiny_result(optimizer: str = "AdamW") -> RowResult:
    return measure(TINY._replace(optimizer=optimizer), TORCH, repeats=3)


# ---- rows ----------------------------------------------------------------------------------------


def test_models_have_the_tensors_and_parameters_of_their_names() -> None:
    sizes = {name: (len(Row(name, "SGD").shapes), Row(name, "SGD").numel) for name in rows.MODELS}
    assert sizes == {
        "GPT-2 124M": (148, 124_439_808),
        "ResNet-50": (161, 25_557_032),
        "1 x 100M": (1, 100_000_000),
        "10 x 1M": (10, 10_000_000),
        "1000 x 1K": (1000, 1_024_000),
        "2000 x 1K": (2000, 2_048_000),
        "2000 x 16": (2000, 32_000),
    }


def test_every_optimizer_of_the_package_is_found() -> None:
    found = rows.optimizers()
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Lion"} <= set(found)
    assert {row.optimizer for row in rows.main_rows(2, "cpu")} == set(found)
    assert {row.optimizer for row in rows.quick_rows(2, "cpu")} == set(found)


def test_an_optimizer_without_known_arguments_is_measured_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(fusedopt.Lion):
        pass

    monkeypatch.setattr(fusedopt, "Other", Other, raising=False)
    assert rows.optimizers()[-1] == "Other"
    row = TINY._replace(optimizer="Other")
    assert row.states == 1
    result = measure(row, contestants("none"), repeats=2)
    assert [(t.name, t.wrong, t.failed) for t in result.timings] == [(OURS, "", "")]


def test_rows_name_what_differs() -> None:
    names = [str(row) for row in rows.all_rows(2, "cpu")]
    assert len(set(names)) == len(names)
    assert "GPT-2 124M, Lion, GradScaler and clip, bfloat16, 1 thread" in names
    main = [str(row) for row in rows.main_rows(2, "cpu")]
    assert set(main) < set(names)
    assert "1 x 100M, SGD, 2 threads" in main
    assert "ResNet-50, AdamW, clip, bfloat16, 2 threads" in main


@pytest.mark.parametrize(
    ("optimizer", "mode", "each"),
    [("AdamW", "plain", 28), ("AdamW", "clip", 32), ("SGD", "plain", 20), ("Lion", "clip", 24)],
)
def test_bytes(optimizer: str, mode: str, each: int) -> None:
    row = Row("10 x 1M", optimizer, mode)
    assert row.bytes == each * row.numel
    assert row._replace(dtype=torch.bfloat16).bytes == each * row.numel // 2


@pytest.mark.parametrize("model", ["3 x 16", "2 x 3M"])
def test_gradients_are_clipped_at_every_step(model: str) -> None:
    params = rows.parameters(Row(model, "AdamW"))
    grads = [p.grad for p in params if p.grad is not None]
    assert len(grads) == len(params)
    assert all(p.stride() == grad.stride() for p, grad in zip(params, grads, strict=True))
    norm = torch.nn.utils.get_total_norm(grads)
    assert torch.isfinite(norm)
    if model == "2 x 3M":  # the models that are measured have more gradients than 3 x 16
        assert norm > 10 * MAX_NORM


# ---- contestants ---------------------------------------------------------------------------------


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


# ---- the oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", rows.optimizers())
def test_right_numbers_pass(optimizer: str, dtype: torch.dtype) -> None:
    row = Row("3 x 16", optimizer, dtype=dtype)
    for contestant in TORCH:
        if contestant.name in (OURS, "torch loop") and contestant.enters(row):
            assert oracle.mistake(contestant.build, row) == "", contestant.name


@pytest.mark.parametrize("mode", ["clip", "scaler"])
@pytest.mark.parametrize("name", ["torch fused", "torch fused + grad_scale", "torch loop"])
def test_right_numbers_pass_after_clipping(name: str, mode: str) -> None:
    assert oracle.mistake(build(name), Row("3 x 16", "AdamW", mode)) == ""


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("SGD", {"lr": 0.1001}),
        ("AdamW", {"betas": (0.9, 0.998)}),
        ("AdamW", {"weight_decay": 0.02}),
        ("AdamW", {"eps": 1e-6}),
        ("RMSprop", {"alpha": 0.991}),
    ],
)
def test_wrong_numbers_are_found(optimizer: str, arguments: dict[str, Any]) -> None:
    row = Row("3 x 16", optimizer)

    def slightly_wrong(row: Row, params: list[Tensor]) -> Step:
        cls = getattr(torch.optim, optimizer)
        wrong: torch.optim.Optimizer = cls(params, **{**row.arguments, **arguments})
        return wrong.step

    assert oracle.mistake(slightly_wrong, row).startswith("off by ")


def test_a_peer_that_ignores_clipping_or_does_nothing_is_wrong() -> None:
    def does_nothing(row: Row, params: list[Tensor]) -> Step:
        return lambda: None

    def unclipped(row: Row, params: list[Tensor]) -> Step:
        return torch.optim.SGD(params, **row.arguments).step

    assert oracle.mistake(does_nothing, Row("3 x 16", "SGD")) != ""
    assert oracle.mistake(unclipped, Row("3 x 16", "SGD", "clip")) != ""


def test_a_wrong_peer_is_timed_and_marked() -> None:
    def not_a_number(row: Row, params: list[Tensor]) -> Step:
        return lambda: [p.data.fill_(torch.nan) for p in params]

    result = measure(TINY, [*TORCH, Contestant("bad", lambda row: True, not_a_number)], repeats=2)
    bad = result.timings[-1]
    assert (bad.name, bad.wrong, bad.failed) == ("bad", "not finite", "")
    assert bad.milliseconds > 0
    best = table.best_peer(result)
    assert best is not None
    assert best.name != "bad"


# ---- results -------------------------------------------------------------------------------------


def test_figures_of_a_row() -> None:
    result = tiny_result()
    assert (result.tensors, result.parameters, result.bytes) == (3, 48, 28 * 48)
    ours = result.find(OURS)
    assert ours is not None
    assert ours.ratio == 1
    for timing in result.timings:
        assert timing.samples == 3
        rate = result.bytes / timing.milliseconds / 1e6
        assert timing.gigabytes_per_second == pytest.approx(rate)
        limit = result.limit_gigabytes_per_second
        assert timing.share_of_limit == pytest.approx(rate / limit)
        assert timing.ratio == pytest.approx(timing.milliseconds / ours.milliseconds)


def test_the_parts_of_the_overhead_add_up() -> None:
    result = overhead(Row("overhead", "AdamW"), TORCH, tensors=20, repeats=5)
    assert set(result.totals) == {OURS, "torch fused", "torch foreach", "torch loop"}
    parts = result.gather + result.kernel + result.rest
    assert parts == pytest.approx(result.totals[OURS])


def test_training_measures_a_share() -> None:
    from fusedopt.bench.models import GPT, ResNet

    for model in (
        lambda: ResNet(width=4, batch=2, pixels=32),
        lambda: GPT(width=24, layers=1, vocabulary=32, length=8),
    ):
        results = train(Task("tiny", "AdamW", model), TINY, TORCH, repeats=2)
        assert [result.contestant for result in results] == [OURS, "torch fused"]
        assert all(0 < result.share < 1 for result in results)


def test_json_returns_what_was_found(tmp_path: Path) -> None:
    report = Report(machine("cpu"), {"nobody": "not installed"})
    report.rows.append(tiny_result())
    report.scaling.append(tiny_result())
    report.overheads.append(overhead(TINY, TORCH, tensors=5, repeats=2))
    path = tmp_path / "report.json"
    report.write(path)
    assert asdict(read(path)) == asdict(report)
    path.write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="has version 0, expected 2: measure again"):
        read(path)


# ---- the command ---------------------------------------------------------------------------------


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "quick_rows", lambda threads, device: [TINY])
    monkeypatch.setattr(rows, "scaling_rows", lambda *_: [TINY, TINY._replace(model="1 x 1M")])
    missing = who.library("nobody", {"AdamW": ("fusedopt_has_no_such_peer.AdamW", {})})
    monkeypatch.setattr(run, "contestants", lambda *_: [*TORCH, missing])
    monkeypatch.setattr(run, "TENSORS", 8)
    found, drawn = tmp_path / "found.json", tmp_path / "drawn.png"
    command.main(f"--quick --scaling --repeats 2 --threads 1 --json {found} --plot {drawn}".split())
    shown = capsys.readouterr().out
    assert "nobody is missing: ModuleNotFoundError" in shown
    assert "3 x 16, AdamW, 1 thread: 0.001344 MB a step" in shown
    report = read(found)
    assert [len(part) for part in (report.rows, report.scaling, report.overheads)] == [1, 2, 1]
    assert report.missing == {"nobody": missing.missing}
    for path in (drawn, tmp_path / "drawn_scaling.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_rows_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--rows", "1K,clip,float16", "--rows", "training,sgd"]
    command.main(["--list", "--peers", "none", "--threads", "2", *chosen])
    listed = [line for line in capsys.readouterr().out.splitlines() if "," in line]
    assert listed == [
        "1000 x 1K, AdamW, clip, bfloat16, 2 threads",
        "2000 x 1K, AdamW, clip, bfloat16, 2 threads",
        "training: ResNet-18, 8 images of 64 x 64, SGD, plain",
        "training: ResNet-18, 8 images of 64 x 64, SGD, clip",
    ]


def test_a_row_is_chosen_by_its_whole_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = (
        "1000 x 1K, AdamW, 2 threads"  # all parts of which "1000 x 1K, AdamW, clip, 2 threads" has
    )
    command.main(["--list", "--peers", "none", "--threads", "2", "--rows", name])
    assert capsys.readouterr().out.splitlines()[1:] == [name]


def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.parse(["--plot", "x.png"])
    assert "rich and matplotlib needed: pip install 'fusedopt[bench]'" in capsys.readouterr().err


def test_pictures_of_wrong_failed_and_slow_contestants(tmp_path: Path) -> None:
    result = tiny_result()
    result.timings[1].wrong = "off by 1"
    result.timings[2].failed = "RuntimeError: no"
    result.timings[-1].milliseconds = 12345
    path = tmp_path / "rows.png"
    picture.draw_rows([result] * 4, path, machine("cpu"))
    assert path.stat().st_size > 10_000


def test_a_row_that_is_measured_anew_takes_the_place_of_the_old_one() -> None:
    def report(*results: RowResult) -> Report:
        return Report(machine("cpu"), rows=list(results))

    page = report(tiny_result("SGD"), tiny_result("AdamW"))
    anew, more = tiny_result("SGD"), tiny_result("Lion")
    measure_page.merge(page, report(anew, more))
    assert [row.optimizer for row in page.rows] == ["SGD", "AdamW", "Lion"]
    assert page.rows[0] is anew
    page.machine["processor"] = "another"
    with pytest.raises(ValueError, match="the page is of processor another, and this is"):
        measure_page.merge(page, report(more))


@pytest.mark.parametrize("of", measure_page.RUNS.values(), ids=list(measure_page.RUNS))
def test_the_page_has_the_rows_that_are_measured_for_it(of: measure_page.Run) -> None:
    report = read(of.path)
    names = {str(row) for row in rows.main_rows(int(report.machine["threads"]), "cpu")}
    measured = {name for name in names if measure_page.is_on_page(name) and of.has(name)}
    assert {row.row for row in report.rows} == measured


def test_the_page_has_the_figures_of_its_json() -> None:
    done = subprocess.run(
        [sys.executable, "tools/performance_page.py", "--check"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_too_many_instructions_fail_and_name_the_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(count_instructions.DATA.read_text())
    recorded: dict[str, int] = data["instructions_a_tensor"]
    assert set(recorded) == set(count_instructions.OPTIMIZERS)
    monkeypatch.setattr("sys.argv", ["count_instructions.py"])
    monkeypatch.setattr(count_instructions, "environment", lambda: data["environment"])
    for factor, status in ((1.0, 0), (1.1, 1)):
        counts = {name: round(number * factor) for name, number in recorded.items()}
        monkeypatch.setattr(count_instructions, "count", lambda counts=counts: counts)
        assert count_instructions.main() == status
        assert ("TOO MANY" in capsys.readouterr().out) == bool(status)
    # Another Python takes other numbers of instructions, which say nothing.
    monkeypatch.setattr(count_instructions, "environment", lambda: {"python": "4.0"})
    assert count_instructions.main() == 0
    assert "no verdict" in capsys.readouterr().out
