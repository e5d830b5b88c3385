"""Read rows, print the goals and draw two figures a device: ``python -m bench.plot [FILES] [--out DIR]``.

Without rows the goals are printed as not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from bench.cases import CPU_DEFAULT, GPU_DEFAULT
from bench.figure import draw
from bench.goals import summary
from bench.rows import COLUMNS, NAN, RESULTS, Measured, header, read


def main(argv: Iterable[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    p.add_argument("files", nargs="*", type=Path, help="rows; default: all of --out")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="rows and figures; default: bench/results")
    p.add_argument(
        "--ours", default="", help="the provider that speaks for us; default: auto-exact and auto-fast, packed on a CPU"
    )
    p.add_argument("--no-figures", action="store_true")
    args = p.parse_args(None if argv is None else list(argv))
    for path in args.files:
        if header(path) != list(COLUMNS):
            p.error(f"{path}: expected rows of python -m bench.run, with the columns {', '.join(COLUMNS)}")
    # Other tables lie beside the rows: a roofline, occupancies.
    files = args.files or sorted(f for f in args.out.glob("*.csv") if header(f) == list(COLUMNS))
    if not files:
        for device, case in (("a CPU", CPU_DEFAULT), ("a GPU", GPU_DEFAULT)):
            print(summary(Measured(device, {(case.name, "bare"): NAN}), args.ours), end="\n\n")
        print(
            f"No rows in {args.out}. Measure them: python -m bench.run, or bench/gpu_suite.sh for all that needs a GPU."
        )
    for path in files:
        m = read(path)
        print(summary(m, args.ours), end="\n\n")
        for made in [] if args.no_figures else draw(m, args.out):
            print(f"drew {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
