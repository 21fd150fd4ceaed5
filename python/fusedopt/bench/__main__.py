"""Time of a step with fusedopt and with its peers, against the limit of this machine's memory."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m fusedopt.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, in a few minutes")
    parser.add_argument("--every", action="store_true", help="all combinations; takes hours")
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="TEXT",
        help="only the row of this name, or else those whose name contains all these texts, with "
        "commas between them, as in 'GPT-2,Lion'; several times for more rows; the overhead and "
        "training have names, too",
    )
    parser.add_argument(
        "--peers",
        default="",
        metavar="TEXT",
        help="only peers whose name contains one of these texts, as in 'fused,deepspeed'",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=int, default=0, help="so many alone; by default all, and 1 for some rows"
    )
    parser.add_argument(
        "--repeats", type=int, default=0, help="rounds of each part; by default, as many as fit"
    )
    parser.add_argument("--scaling", action="store_true", help="also from 1M to 400M parameters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw a picture (with --scaling, a second one beside it)",
    )
    parser.add_argument("--list", action="store_true", help="print the rows, and measure nothing")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    needed = ["rich"] + ["matplotlib"] * (options.plot is not None)
    if lacking := [name for name in needed if importlib.util.find_spec(name) is None]:
        parser.error(f"{' and '.join(lacking)} needed: pip install 'fusedopt[bench]'")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    options = parse(arguments)
    from fusedopt.bench.run import run  # noqa: PLC0415  (it needs what was checked above)

    run(options)


if __name__ == "__main__":
    main()
