"""``fedamm report``."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from fedamm_pl.cli.parser import Parser, attribute_docstrings
from fedamm_pl.results.report import write_report
from fedamm_pl.results.runs import load_all
from fedamm_pl.terminal import printable, say


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Where the page goes."""

    output: str | None = None
    """The page to write; by default report.html in the given folder, that of a run or a comparison; of several, in the working directory."""


def report(words: Sequence[str]) -> None:
    """Run the sub-command.

    Args:
        words: The command line after ``report``.
    """
    parser = Parser(
        prog="fedamm report",
        description="Shows runs on one HTML page that needs no network: figures, tables, configuration, command, versions.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="Folder of a run, finished or not, or a folder that contains runs, such as that of a comparison.",
    )
    with attribute_docstrings():
        parser.add_class_arguments(ReportConfig, instantiate=False)
    parsed = parser.parse_args(words)
    try:
        runs = load_all(parsed.runs)
    except ValueError as error:
        parser.error(str(error).replace("`path`", "RUN"))
    output = Path(
        os.path.expanduser(parsed.output or Path(parsed.runs[0] if len(parsed.runs) == 1 else "") / "report.html")
    )
    try:
        write_report(runs, output)
    except OSError as error:
        parser.error(f"Expected --output to be a file that can be written, got {output} ({error.strerror}).")
    say(f"report in {printable(str(output))}")
