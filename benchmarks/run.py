"""Measure where the time goes, as ratios inside one run.

    python benchmarks/run.py [--rows round arithmetic ...] [--repeats 5] [--output benchmarks/results.json]

prints a table and a profile and writes both, with every timing, the hardware and the versions, to a file. It takes about a
quarter of an hour on two cores; nothing else should run beside it. Each ratio is the median over pairs that were timed in
turn. The images are noise of the shape of CIFAR-10: no row depends on what they show. On a GPU the same rows run there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)  # instead of the folder of this file

from benchmarks.checkpoints import row_checkpoint
from benchmarks.clients import row_clients, row_data, row_processes
from benchmarks.evaluation import row_evaluation
from benchmarks.machine import hardware
from benchmarks.memory import row_memory
from benchmarks.operators import profile
from benchmarks.program import row_start, row_watching
from benchmarks.rounds import row_arithmetic, row_outside, row_round
from benchmarks.small_clients import profile_small, row_fit, row_together
from benchmarks.timing import Row

ROWS: dict[str, Callable[[int], list[Row]]] = {
    "round": row_round,
    "arithmetic": row_arithmetic,
    "evaluation": row_evaluation,
    "outside": row_outside,
    "start": row_start,
    "memory": row_memory,
    "checkpoint": row_checkpoint,
    "clients": row_clients,
    "fit": row_fit,
    "together": row_together,
    "data": row_data,
    "processes": row_processes,
    "watching": row_watching,
}


def markdown(rows: Iterable[list[str]], head: list[str]) -> str:
    """Format a table as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Measure the rows, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "profile"], default=[*ROWS, "profile"])
    parser.add_argument("--repeats", type=int, default=5, help="pairs of timings a row")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results.json")
    args = parser.parse_args()
    found = hardware()
    print(json.dumps(found), flush=True)
    rows: list[Row] = []
    for name in args.rows:
        for row in ROWS[name](args.repeats) if name in ROWS else []:
            print(" | ".join(row.cells()), flush=True)
            rows.append(row)
    tables = (
        {"where a round's time goes": profile(), "where a small client's time goes": profile_small()}
        if "profile" in args.rows
        else {}
    )
    content = {"hardware": found, "rows": [{**asdict(row), "verdict": row.verdict} for row in rows], "profile": tables}
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print("\n" + markdown([row.cells() for row in rows], ["what", "measured", "bar", "", ""]))
    for head, shares in tables.items():
        print("\n" + markdown([[kind, f"{share:.1f} %"] for kind, share in shares.items()], [head, "share"]))


if __name__ == "__main__":
    main()
