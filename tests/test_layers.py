"""tools/check_layers.py, on made-up trees and on this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_layers


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Two trees that keep to the floors."""
    files = {
        "csrc/module.cpp": '// The module.\n#include "step/plan.h"\n',
        "csrc/step/plan.h": '// step/: plans.\n#include "cpu/table.h"\n#include "torch/abi.h"\n',
        "csrc/cpu/table.h": '// cpu/: kernels.\n#include "engine/job.h"\n',
        "csrc/cuda/table.h": "// cuda/: kernels.\n",
        "csrc/torch/abi.h": "// torch/: tensors.\n#define FUSEDOPT_ABI 1\n",
        "csrc/engine/job.h": '// engine/: jobs.\n#include "list.h"\n#include <vector>\n',
        "csrc/engine/list.h": "",
        "csrc/numeric/vec.h": "// numeric/: vectors.\n",
        "csrc/rules/adam.h": "// rules/: rules.\n",
        "fusedopt/__init__.py": "from fusedopt.adam import Adam\nfrom fusedopt import _core\n",
        "fusedopt/_core.pyi": "",
        "fusedopt/_base.py": "from fusedopt import _core\n",
        "fusedopt/adam.py": "from fusedopt._base import Fused\nfrom typing import Any\n",
        "fusedopt/radam.py": "from fusedopt.adam import decay\n",
        "fusedopt/bench/__init__.py": "",
        "fusedopt/bench/rows.py": "import fusedopt\n",
        "fusedopt/bench/run.py": "from fusedopt.bench import rows\nimport fusedopt.adam\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def faults(house: Path) -> list[str]:
    return check_layers.faults(house / "csrc", house / "fusedopt")


def test_a_house_in_order_has_no_faults(house: Path) -> None:
    assert faults(house) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("csrc/engine/job.h", '#include "cpu/table.h"', "up: engine/job.h:4"),
        ("csrc/numeric/vec.h", '#include "engine/list.h"', "up: numeric/vec.h:2"),
        ("csrc/cuda/table.h", '#include "cpu/table.h"', "across: cuda/table.h:2"),
        ("csrc/engine/list.h", "int x = FUSEDOPT_ABI;", "up: engine/list.h:1"),
        ("fusedopt/_base.py", "from fusedopt.adam import Adam", "up: _base.py:2"),
        ("fusedopt/_base.py", "from .adam import Adam", "up: _base.py:2"),
        ("fusedopt/_base.py", "def f():\n    import fusedopt.adam", "up: _base.py:3"),
        ("fusedopt/adam.py", "import fusedopt", "up: adam.py:3"),
        ("fusedopt/adam.py", "if TYPE_CHECKING:\n    import fusedopt.bench.run", "up: adam.py:4"),
    ],
)
def test_a_line_that_leads_up_or_across_is_shown(
    house: Path, file: str, line: str, fault: str
) -> None:
    with (house / file).open("a") as out:
        out.write(line + "\n")
    shown = f"{fault}: {line.splitlines()[-1].strip()}"
    assert any(each.startswith(shown) for each in faults(house))


def test_a_room_without_a_floor_is_shown(house: Path) -> None:
    (house / "fusedopt" / "_wheel.py").write_text("from fusedopt import _core\n")
    (house / "csrc" / "wheel.h").write_text('#include "engine/job.h"\n')
    assert [each.split(":")[1] for each in faults(house)] == [" wheel.h", " _wheel.py"]


@pytest.mark.parametrize(
    ("file", "line", "round_trip"),
    [
        ("csrc/engine/list.h", '#include "engine/job.h"', ["engine/job.h:2", "engine/list.h:1"]),
        ("fusedopt/adam.py", "import fusedopt.radam", ["adam.py:3", "radam.py:1"]),
        (
            "fusedopt/bench/rows.py",
            "def f():\n    from fusedopt.bench import run",
            ["bench/rows.py:3", "bench/run.py:1"],
        ),
    ],
)
def test_a_circle_within_a_room_is_shown_whole(
    house: Path, file: str, line: str, round_trip: list[str]
) -> None:
    with (house / file).open("a") as out:
        out.write(line + "\n")
    (found,) = faults(house)
    first, *rest = found.splitlines()
    assert first == "round:"
    assert sorted(each.split(": ")[0].strip() for each in rest) == round_trip


def test_a_macro_is_an_include_unless_each_includer_defines_its_own(house: Path) -> None:
    (house / "csrc/cuda/device.h").write_text('#define TWICE(x) x x\n#include "cuda/access.h"\n')
    access = house / "csrc/cuda/access.h"
    access.write_text("TWICE(int x;)\n")
    (found,) = faults(house)
    assert found.startswith("round:\n")
    assert "cuda/access.h:1: TWICE(int x;)  (-> cuda/device.h)" in found

    (house / "csrc/cpu/kernel.cpp").write_text("#define TWICE(x) x\n")
    assert faults(house) == []


def test_a_folder_says_once_what_it_is_for(house: Path) -> None:
    def drawn() -> list[str]:
        floors, purpose = check_layers.CPP, check_layers.cpp_purpose
        return check_layers.floors_as_text(house / "csrc", floors, purpose).splitlines()

    assert drawn()[:3] == [
        "  module.cpp          The module.",
        "  " + "-" * 94,
        "  step/               plans.",
    ]
    (house / "csrc/step/other.h").write_text("// step/: something else.\n")
    with pytest.raises(SystemExit, match="step has 2 files that begin with '// step/: "):
        drawn()


def test_this_house_is_in_order_and_drawn_as_it_is() -> None:
    cpp, python = check_layers.ROOT / "csrc", check_layers.ROOT / "python" / "fusedopt"
    assert check_layers.faults(cpp, python) == []
    page = check_layers.PAGE.read_text()
    assert page == check_layers.with_drawing(page, check_layers.drawing(cpp, python))
