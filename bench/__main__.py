"""`python -m bench`: run all benchmarks, print the table, write it into docs/PERFORMANCE.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import kernel
from bench.harness import publish, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, docs unchanged")
    parser.add_argument("--results", type=Path, help="also write the raw figures, as JSON lines")
    options = parser.parse_args()
    figures = kernel.run(quick=options.quick)
    print(table(figures))
    if not options.quick:
        publish(figures, results=options.results)


if __name__ == "__main__":
    main()
