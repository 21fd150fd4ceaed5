"""What a release is made of agrees with itself: version, changelog, tables, workflows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedopt
from tools import long_description, make_wheels, support_page, test_torches

ROOT = Path(__file__).parent.parent
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)


def changelog_fault(text: str, version: str) -> str:
    """Say what is wrong with a changelog for a package of this version, or nothing."""
    titles = re.findall(r"^## (.*)$", text, re.M)
    if not titles:
        return "no section"
    if titles[0] == "[Unreleased]":
        says = re.search(r"^Will be (.+)\.$", text, re.M)
        if not says or says[1] != version:
            return f"[Unreleased] does not say: Will be {version}."
        titles = titles[1:]
    elif not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", titles[0]):
        return f"the first section is {titles[0]}, expected [{version}] - YYYY-MM-DD"
    for title in titles:
        if not re.fullmatch(r"\[\d+\.\d+\.\d+\S*\] - \d{4}-\d\d-\d\d", title):
            return f"expected [VERSION] - YYYY-MM-DD, got {title}"
    return ""


def test_the_changelog_is_of_this_version() -> None:
    assert VERSION
    assert changelog_fault((ROOT / "CHANGELOG.md").read_text(), VERSION[1]) == ""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("# Changelog\n", "no section"),
        ("## [Unreleased]\n\nWill be 0.9.0.\n", "Will be 1.0.0"),
        ("## [0.9.0] - 2026-01-01\n", "expected [1.0.0]"),
        ("## [1.0.0]\n", "expected [1.0.0] - YYYY"),
        ("## [1.0.0] - 2026-01-01\n## [soon]\n", "got [soon]"),
        ("## [1.0.0] - 2026-01-01\n## [0.9.0] - 2025-01-01\n", ""),
    ],
)
def test_a_changelog_that_is_wrong_is_seen(text: str, fault: str) -> None:
    assert fault in changelog_fault(text, "1.0.0")
    assert bool(fault) == bool(changelog_fault(text, "1.0.0"))


def test_the_version_stands_in_one_place() -> None:
    assert VERSION
    holders = [ROOT / "CMakeLists.txt", ROOT / "CITATION.cff", *(ROOT / "python").rglob("*.py")]
    version = re.compile(rf"(?<![\d.]){re.escape(VERSION[1])}(?![\d.])")
    assert [path for path in holders if version.search(path.read_text())] == []
    assert fusedopt.__version__  # of the installed metadata


def test_the_tables_are_those_of_the_results() -> None:
    page = support_page.PAGE.read_text()
    for name, lines in support_page.blocks().items():
        text = "".join(f"{line}\n" for line in lines)
        assert f"<!-- begin {name} -->\n{text}<!-- end {name} -->" in page


def test_each_minor_version_is_tested_by_its_last_release() -> None:
    versions = ["2.15.0", "2.14.1", "2.14.0", "2.13.0+cpu", "2.13.0", "2.9.1", "2.10.0"]
    expected = ["2.10.0", "2.13.0", "2.14.1", "2.15.0"]
    assert test_torches.last_of_each_minor(versions, test_torches.oldest()) == expected


@pytest.mark.parametrize(
    "name", ["libtorch_cpu.so", "libcudart.so.13", "libomp.so", "libgomp-1.so.1"]
)
def test_a_wheel_is_not_linked_with_what_torch_brings(name: str) -> None:
    assert not make_wheels.MAY_NEED.match(name)
    assert make_wheels.MAY_NEED.match("libgomp.so.1")


README = """![A picture](docs/a.png)

See [the `page`](docs/a.md#part), [elsewhere](https://example.org/a) and [below](#below).
"""


def test_links_on_a_package_index_lead_to_the_tag_of_the_version() -> None:
    home = "https://example.org/us/fusedopt"
    assert long_description.long_description(README, f"{home}/", "v1.2.3") == README.replace(
        "(docs/a.png)", f"({home}/raw/v1.2.3/docs/a.png)"
    ).replace("(docs/a.md", f"({home}/blob/v1.2.3/docs/a.md")


def test_without_a_repository_the_text_stays_and_leads_nowhere() -> None:
    expected = "See the `page`, [elsewhere](https://example.org/a) and [below](#below).\n"
    assert long_description.long_description(README, "", "v1.2.3") == expected


def test_a_build_takes_the_long_description_from_there(tmp_path: Path) -> None:
    hook = "prepare_metadata_for_build_wheel"
    code = f"from scikit_build_core.build import {hook}; {hook}({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (metadata,) = tmp_path.glob("*/METADATA")
    text = metadata.read_text()
    assert "\nDescription-Content-Type: text/markdown\n" in text
    assert "# fusedopt\n" in text
    assert "](docs/" not in text


def test_actions_are_pinned_to_commits() -> None:
    workflows = list((ROOT / ".github" / "workflows").glob("*.yml"))
    uses = [line for path in workflows for line in path.read_text().splitlines() if "uses:" in line]
    assert uses
    for line in uses:
        assert re.search(r"uses: [\w./-]+@[0-9a-f]{40}  # v\d", line), line
