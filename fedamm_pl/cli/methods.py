"""``fedamm methods``: what each method needs, reveals and costs, as declared by its class and as measured."""

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Sequence
from typing import Literal

from fedamm_pl.algorithms import FedAvg
from fedamm_pl.cli.help import entry, option_texts, plain, summary, wrapped
from fedamm_pl.cli.options import GROUPS, OFFERED, find_class
from fedamm_pl.cli.parser import Parser, attribute_docstrings, in_one_line
from fedamm_pl.federation.costs import IMAGE_SIZE, NETWORK, NUM_CLASSES, Costs, GeneratedImages, measure
from fedamm_pl.hints import similar
from fedamm_pl.protocol.privileges import NOTHING
from fedamm_pl.results.tables import as_csv, as_markdown
from fedamm_pl.results.tables import plain as not_bold
from fedamm_pl.terminal import say

Measured = dict[str, Costs]
"""Name of a method -> its costs with default options."""

WIDTH = 100
"""Width of the table in columns if the width of the terminal is unknown."""
GAP = 2
WHOLE = 12
"""Cells with at most this many characters are not broken."""
SMALL = 0.01
"""Additional bytes below this fraction of the model are shown in bytes."""
TITLES = {
    "server": "needed at the server",
    "revealed": "revealed besides the model",
    "received": "sent to a client",
    "sent": "sent by a client",
    "client_state": "kept at a client",
    "server_state": "kept at the server",
    "work": "extra work",
}
COMBINED = {"server_optimizer": "federation", "local_optimizer": "algorithm"}
"""Option that every method has -> its group."""


@dataclasses.dataclass(frozen=True)
class MethodsConfig:
    """How the table is printed."""

    format: Literal["text", "markdown", "csv", "json"] = "text"
    """text for a terminal, markdown for a page, csv and json with exact byte counts for other programs."""


def methods(words: Sequence[str]) -> None:
    """Run the sub-command.

    Args:
        words: The command line after ``methods``.
    """
    parser = Parser(
        prog="fedamm methods",
        description="What each method needs, reveals and costs beyond FedAvg, with its default options.",
        allow_abbrev=False,
    )
    text = "Names or import paths of methods to show in full; by default, a table of all methods."
    parser.add_argument("methods", metavar="METHOD", nargs="*", default=[], help=text)
    with attribute_docstrings():
        parser.add_class_arguments(MethodsConfig, instantiate=False)
    parsed = parser.parse_args(words)
    try:
        chosen = [chosen_class(name) for name in parsed.methods]
        with in_one_line():
            measured = measure_all(chosen or OFFERED["algorithm"])
    except ValueError as error:
        parser.error(str(error))
    model = measure(FedAvg, GeneratedImages()).sent
    if parsed.format == "text" and chosen:
        say("\n\n".join(block(kind, measured[kind.__name__], model) for kind in chosen))
    elif parsed.format == "text":
        say("\n".join([*as_text(table(measured, model), width()), "", wrapped(legend(model)), "", *options_as_text()]))
    elif parsed.format == "markdown":
        say(markdown(measured, model, options=not chosen))
    else:
        records = [record(name, costs) for name, costs in measured.items()]
        say(json.dumps(records, indent=1) if parsed.format == "json" else as_csv(records).rstrip("\n"))


def chosen_class(name: str) -> type:
    """Find a method by its name or import path.

    Raises:
        ValueError: If there is none.
    """
    try:
        return find_class("algorithm", name)
    except ValueError as error:
        names = [kind.__name__ for kind in OFFERED["algorithm"]]
        meant = similar(name, names)
        raise ValueError(
            f"Expected METHOD to be one of {', '.join(names)} or the import path of your own, got {error}"
            + (f"; did you mean {meant}?" if meant else "")
        ) from error


def measure_all(kinds: Sequence[type]) -> Measured:
    """Measure methods, FedAvg first and the others by name.

    Raises:
        ValueError: If one cannot be made with the defaults of its options.
    """
    data = GeneratedImages()
    ordered = sorted(kinds, key=lambda kind: (kind is not FedAvg, kind.__name__.lower()))
    return {kind.__name__: measure(kind, data) for kind in ordered}


def width() -> int:
    """Return the width of the terminal in columns."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def legend(model: int) -> str:
    """Return the explanation of the numbers."""
    return (
        f"Sent to and by a client: tensor bytes per round as a multiple of FedAvg's ({model:,} in each direction: {NETWORK}, "
        f"{NUM_CLASSES} classes, images of {IMAGE_SIZE}x{IMAGE_SIZE}); additions of less than {SMALL:.0%} are given in bytes. A hyphen means no "
        "more than FedAvg. All options have their defaults."
    )


def amount(number: int, model: int) -> str:
    """Format a number of bytes as a multiple of the model; a small remainder is given in bytes.

    Example:
        >>> amount(1000, 1000), amount(1500, 1000), amount(1008, 1000)
        ('1', '1.50', '1 + 8 B')
    """
    whole, rest = divmod(number, model)
    if rest < SMALL * model:
        return f"{whole} + {rest:,} B" if rest else str(whole)
    return f"{number / model:.2f}"


def cells(costs: Costs, model: int) -> list[str]:
    """Return the cells of a method, without its name, in the order of the titles."""
    words = {
        name: "-" if value == NOTHING else str(value) for name, value in dataclasses.asdict(costs.privileges).items()
    }
    sent = amount(costs.sent, model)
    if costs.statistics:
        sent += f"; to calibrate {costs.statistics / model:.2f}"
    shown = {**words, "received": amount(costs.received, model), "sent": sent}
    return [shown[name] for name in TITLES]


def table(measured: Measured, model: int) -> list[list[str]]:
    """Return the lines of the table; the first has the titles."""
    return [["method", *TITLES.values()], *([name, *cells(costs, model)] for name, costs in measured.items())]


def as_text(lines: Sequence[Sequence[str]], most: int) -> list[str]:
    """Lay out a table for a terminal: long cells are wrapped, and a rule separates the titles from the rest.

    Args:
        lines: Lines of the table; the first has the titles.
        most: Width of the terminal in columns; the table is wider if its longest words need more.
    """
    columns = list(zip(*lines, strict=True))
    sizes = [
        max(len(part) for cell in column for part in ([cell] if len(cell) <= WHOLE else cell.split()))
        for column in columns
    ]
    longest = [max(map(len, column)) for column in columns]
    for _ in range(most - sum(sizes) - GAP * (len(sizes) - 1)):  # one more column for the cells that are cut most
        place = max(range(len(sizes)), key=lambda place: longest[place] / sizes[place])
        if sizes[place] < longest[place]:
            sizes[place] += 1
    found = []
    for line in lines:
        parts = [textwrap.wrap(cell, size) for cell, size in zip(line, sizes, strict=True)]
        for row in range(max(map(len, parts))):
            texts = [part[row] if row < len(part) else "" for part in parts]
            found.append((" " * GAP).join(text.ljust(size) for text, size in zip(texts, sizes, strict=True)).rstrip())
        if line is lines[0]:
            found.append((" " * GAP).join("-" * size for size in sizes))
    return found


def block(kind: type, costs: Costs, model: int) -> str:
    """Return the summary and all costs of a method as text."""
    lines = dict(zip(TITLES.values(), cells(costs, model), strict=True))
    lines[TITLES["received"]] = f"{costs.received:,} bytes per round, {costs.received / model:.2f} times the model"
    lines[TITLES["sent"]] = f"{costs.sent:,} bytes per round, {costs.sent / model:.2f} times the model"
    if costs.statistics:
        lines[TITLES["sent"]] += f"; {costs.statistics:,} before an evaluation with calibration"
    size = max(map(len, lines)) + 1
    shown = (
        wrapped(NOTHING if text == "-" else text, f"  {title + ':':{size}}  ", " " * (size + 4))
        for title, text in lines.items()
    )
    return "\n".join([kind.__name__, wrapped(summary(kind), "  ", "  "), *shown])


def options() -> list[tuple[str, str]]:
    """Return the heading and the help text of each option that every method has."""
    owners = {"algorithm": FedAvg}
    found = []
    for name, group in COMBINED.items():
        texts = option_texts(group, owners.get(group, GROUPS[group]))
        if name in texts:
            given, text = texts[name]
            found.append((given, " ".join(plain(text).split())))
    return found


def options_as_text() -> list[str]:
    """Return these options as text for a terminal."""
    return ["Options of every method:", *(entry(given, text) for given, text in options())]


def markdown(measured: Measured, model: int, options: bool) -> str:
    """Return the table as Markdown."""
    lines = [*as_markdown(not_bold(table(measured, model))), "", legend(model)]
    return "\n".join(lines + (options_as_markdown() if options else []))


def options_as_markdown() -> list[str]:
    """Return the options that every method has as Markdown."""
    return ["", "Options of every method:", "", *(f"- `{given}`: {text}" for given, text in options())]


def record(name: str, costs: Costs) -> dict[str, str | int]:
    """Return the costs of a method as a record for CSV or JSON."""
    words = dataclasses.asdict(costs.privileges)
    return {"method": name, "received": costs.received, "sent": costs.sent, "statistics": costs.statistics, **words}
