"""Holds the source to its floors: a line includes or imports from a lower floor, or from its room.

A room is a folder of csrc/, or a module or package of python/fusedopt/. Rooms on one floor do not
know each other, and no files know each other in a circle, whatever room they are in. With --write,
the floors are drawn into docs/how_a_step_runs.md.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "how_a_step_runs.md"

Floors = tuple[tuple[str, ...], ...]

CPP: Floors = (  # the highest first
    ("module.cpp",),
    ("step",),
    ("cpu", "cuda", "torch"),
    ("engine", "rules"),
    ("numeric",),
)
OPTIMIZERS = "an optimizer a file"  # whatever has no other room and no underscore
PYTHON: Floors = (
    ("__main__", "bench", "integrations"),
    ("__init__",),
    ("amp", "groups", "release", "swap"),
    ("lookahead", "ema"),
    ("_averaged",),
    ("_wrapper",),
    (OPTIMIZERS,),
    ("_matrices",),
    ("_base",),
    ("_watch",),
    ("_clipping", "_fallback", "_from_torch", "_hooked", "_verdict"),
    ("_momentum", "_pending", "_skipping", "clip"),
    ("_exchange", "_gradients", "_norms", "_storage"),
    ("_masters",),
    ("_options",),
    ("_batches", "_engine", "_exchanged", "_ranks", "_stored"),
    ("statistics",),
    ("_found",),
    (
        "_codecs",
        "_core",
        "_followers",
        "_memory",
        "_numeric",
        "_operators",
        "_orthogonal",
        "_shards",
        "_spikes",
    ),
)


class Edge(NamedTuple):
    """A line of one file that names another; paths are relative to the root of both."""

    source: str
    line: int
    text: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.text}  (-> {self.target})"


# ---- what knows what -------------------------------------------------------------------------


def cpp_edges(root: Path) -> list[Edge]:
    """Return the includes of C++ files, and their uses of macros that one other file defines.

    A macro with several definitions is what each includer says of itself.
    """
    files = {
        path.relative_to(root).as_posix(): re.sub(r"//.*", "", path.read_text()).splitlines()
        for path in sorted(root.rglob("*"))
        if path.suffix in {".h", ".cpp", ".cu"}
    }
    defined_in: dict[str, set[str]] = {}
    for name, lines in files.items():
        for line in lines:
            for macro in re.findall(r"^\s*#define (\w+)", line):
                defined_in.setdefault(macro, set()).add(name)
    owner = {macro: min(names) for macro, names in defined_in.items() if len(names) == 1}
    edges = []
    for name, lines in files.items():
        for number, line in enumerate(lines, 1):
            targets = [owner[word] for word in re.findall(r"\w+", line) if word in owner]
            for included in re.findall(r'^\s*#include "(.+)"', line):
                beside = (Path(name).parent / included).as_posix()
                targets += [path for path in (beside, included) if path in files][:1]
            edges += [Edge(name, number, line.strip(), t) for t in dict.fromkeys(targets)]
    return [edge for edge in edges if edge.source != edge.target]


def python_edges(root: Path) -> list[Edge]:
    """Return the imports of the modules of a package by each other, those for types included."""
    package = root.name
    modules: dict[str, str] = {}  # dotted name: path
    for path in sorted([*root.rglob("*.pyi"), *root.rglob("*.py")]):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        modules[".".join(parts).removesuffix(".__init__")] = path.relative_to(root).as_posix()
    edges = []
    for module, name in modules.items():
        text = (root / name).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = node.module or ""
                if node.level:  # relative
                    parts = module.split(".") + ["__init__"] * name.endswith("__init__.py")
                    start = ".".join([*parts[: -node.level], *filter(None, [node.module])])
                both = [(f"{start}.{alias.name}", start) for alias in node.names]
                named = [of if of in modules else start for of, start in both]
            else:
                continue
            line = text.splitlines()[node.lineno - 1].strip()
            targets = dict.fromkeys(modules[target] for target in named if target in modules)
            edges += [Edge(name, node.lineno, line, target) for target in targets]
    return [edge for edge in edges if edge.source != edge.target]


# ---- what is wrong with it -------------------------------------------------------------------


def cpp_room(name: str) -> str:
    return name.split("/", maxsplit=1)[0]


def python_room(name: str) -> str:
    room = name.split("/", maxsplit=1)[0].removesuffix(".pyi").removesuffix(".py")
    known = any(room in floor for floor in PYTHON)
    return room if known or room.startswith("_") or "/" in name else OPTIMIZERS


def not_down(edges: list[Edge], floors: Floors, room_of: Callable[[str], str]) -> Iterator[str]:
    """Yield a line for each edge that leads up or to another room of its floor."""
    floor_of = {room: number for number, floor in enumerate(floors) for room in floor}
    for edge in edges:
        source, target = room_of(edge.source), room_of(edge.target)
        for name, room in ((edge.source, source), (edge.target, target)):
            if room not in floor_of:
                yield f"no floor: {name}: give {room} one in tools/check_layers.py"
                break
        else:
            if source != target and floor_of[source] >= floor_of[target]:
                way = "up" if floor_of[source] > floor_of[target] else "across"
                yield f"{way}: {edge}"


def circles(edges: list[Edge]) -> Iterator[str]:
    """Yield, for each file on a circle that no earlier one has shown, the shortest through it."""
    edges_from: dict[str, list[Edge]] = {}
    for edge in edges:
        edges_from.setdefault(edge.source, []).append(edge)
    shown: set[str] = set()
    for start, first in edges_from.items():
        if start in shown:
            continue
        ways: list[list[Edge]] = [[edge] for edge in first]
        seen = {start}
        for way in ways:  # grows meanwhile
            last = way[-1].target
            if last == start:
                shown.update(edge.source for edge in way)
                yield "round:\n" + "\n".join(f"  {edge}" for edge in way)
                break
            if last not in seen:
                seen.add(last)
                ways += [[*way, edge] for edge in edges_from.get(last, [])]


def faults(cpp: Path, python: Path) -> list[str]:
    """Return what is wrong with two trees of sources, ready to be printed."""
    found: list[str] = []
    of_cpp = (cpp_edges(cpp), CPP, cpp_room)
    of_python = (python_edges(python), PYTHON, python_room)
    for edges, floors, room_of in (of_cpp, of_python):
        found += dict.fromkeys(not_down(edges, floors, room_of))
        found += circles(edges)
    return found


# ---- the drawing -----------------------------------------------------------------------------


def cpp_purpose(root: Path, room: str) -> str:
    """Return the sentence "ROOM/: ..." at the head of one file of a folder."""
    if (root / room).is_file():
        text = (root / room).read_text()
        return re.sub(r"\n// ", " ", re.findall(r"\A// (.*?[.])\n", text, re.DOTALL)[0])
    heads = [
        re.sub(r"\n// ", " ", head)
        for path in sorted((root / room).iterdir())
        for head in re.findall(rf"\A// {room}/: (.*?[.])\s", path.read_text(), re.DOTALL)
    ]
    if len(heads) != 1:
        raise SystemExit(
            f"{root / room} has {len(heads)} files that begin with '// {room}/: ...', what the "
            "folder is for; expected one, its main header"
        )
    return heads[0]


def python_purpose(root: Path, room: str) -> str:
    """Return the first sentence of a module's or package's docstring."""
    if room == OPTIMIZERS:
        return "the class, and reference() right under it."
    paths = [root / f"{room}.py", root / f"{room}.pyi", root / room / "__init__.py"]
    docstring = ast.get_docstring(ast.parse(next(p for p in paths if p.exists()).read_text()))
    return re.split(r"(?<=[.])\s", " ".join((docstring or "").split()))[0]


def floors_as_text(root: Path, floors: Floors, purpose: Callable[[Path, str], str]) -> str:
    """Return the floors of one tree, the highest first, with what each room is for."""
    drawn = []
    for floor in floors:
        lines = []
        for room in floor:
            name = room + "/" if (root / room).is_dir() else room
            text = f"  {name:<20}{purpose(root, room)}"
            lines.append(textwrap.fill(text, width=96, subsequent_indent=" " * 22))
        drawn.append("\n".join(lines) + "\n")
    return f"  {'-' * 94}\n".join(drawn)


def drawing(cpp: Path, python: Path) -> str:
    """Return both trees as text."""
    of_cpp = floors_as_text(cpp, CPP, cpp_purpose)
    of_python = floors_as_text(python, PYTHON, python_purpose)
    return f"csrc/\n{of_cpp}\npython/fusedopt/\n{of_python}"


def with_drawing(page: str, drawn: str) -> str:
    """Return a page with this drawing in its place."""
    begin, end = "<!-- drawn by tools/check_layers.py --write -->\n", "<!-- /drawn -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}```text\n{drawn}```\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="draw the floors into the docs")
    write = parser.parse_args().write
    cpp, python = ROOT / "csrc", ROOT / "python" / "fusedopt"
    found = faults(cpp, python)
    if found:
        sys.exit("\n".join(found))
    page = PAGE.read_text()
    drawn = with_drawing(page, drawing(cpp, python))
    if write:
        PAGE.write_text(drawn)
    elif drawn != page:
        sys.exit(f"{PAGE.relative_to(ROOT)}: its floors are others; tools/check_layers.py --write")


if __name__ == "__main__":
    main()
