"""The command, and the tools that measure the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt.bench import __main__ as command
from fusedopt.bench import contestants as who
from fusedopt.bench import picture, rows, run
from fusedopt.bench.results import Report, RowResult, machine, read
from tests.bench.common import TINY, TORCH, tiny_result
from tools import count_instructions, measure_page, performance_page


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "quick_rows", lambda threads, device: [TINY])
    monkeypatch.setattr(rows, "scaling_rows", lambda *_: [TINY, TINY._replace(model="1 x 1M")])
    monkeypatch.setattr(rows, "memory_rows", lambda *_, quick: [TINY])
    muon = TINY._replace(model="3 matrices of 16 x 16", optimizer="Muon")
    monkeypatch.setattr(rows, "matrix_rows", lambda *_, quick: [muon])
    missing = who.library("nobody", {"AdamW": ("fusedopt_has_no_such_peer.AdamW", {})})
    monkeypatch.setattr(run, "contestants", lambda *_: [*TORCH, missing])
    monkeypatch.setattr(run, "TENSORS", 8)
    found, drawn = tmp_path / "found.json", tmp_path / "drawn.png"
    command.main(f"--quick --scaling --repeats 2 --threads 1 --json {found} --plot {drawn}".split())
    shown = capsys.readouterr().out
    assert "nobody is missing: ModuleNotFoundError" in shown
    assert "3 x 16, AdamW, 1 thread: 0.001344 MB a step" in shown
    assert "Memory modes, 3 x 16, AdamW, 1 thread: at most" in shown
    assert "3 matrices of 16 x 16, Muon, 1 thread" in shown
    report = read(found)
    parts = report.rows, report.scaling, report.overheads, report.memory
    assert [len(part) for part in parts] == [2, 2, 1, 1]
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


def test_a_name_that_no_row_has_is_said() -> None:
    with pytest.raises(SystemExit, match=r"no row has the name --rows 1K,clp; --list prints them"):
        command.main(["--peers", "none", "--rows", "1K,clp"])


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


# What came after a machine's figures.
LATER = {"intel": ("LoRA r16 of a 7B model,", "YOLOv8 n,", "10 x 1M, AdamW, bfloat16, 2 threads")}


@pytest.mark.parametrize("of", measure_page.RUNS.values(), ids=list(measure_page.RUNS))
def test_the_page_has_the_rows_that_are_measured_for_it(of: measure_page.Run) -> None:
    for first in performance_page.machines():
        report = read(of.path(first.machine))
        later = LATER.get(measure_page.maker(report.machine["processor"]), ())
        names = {str(row) for row in rows.main_rows(int(report.machine["threads"]), "cpu")}
        measured = {name for name in names if measure_page.is_on_page(name) and of.has(name)}
        assert {row.row for row in report.rows} == {
            name for name in measured if not name.startswith(later)
        }


def test_the_page_has_the_figures_of_its_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.performance_page", "--check"],
        cwd=Path(__file__).parent.parent.parent,
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
    assert set(recorded) == set(count_instructions.rows(emulated_device=True))
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
