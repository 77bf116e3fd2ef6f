"""The HTML page of a report: templates filled with the content of runs, in one file that loads nothing else."""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedamm_pl.results.figure_parts import rendered
from fedamm_pl.results.tables import Cells, is_heading
from fedamm_pl.terminal import printable

WIDE = 7  # inches; a wider figure is alone in its row


@dataclass(frozen=True)
class Picture:
    """A figure inside the page.

    Attributes:
        data: The SVG file, in base64.
        title: Title of the figure.
        caption: Text that explains how to read it.
        wide: Whether it is alone in its row.
    """

    data: str
    title: str
    caption: str
    wide: bool


def picture(figure: Figure, title: str, caption: str) -> Picture:
    """Convert a figure for the page."""
    # text as outlines looks the same on every machine; with a fixed salt the same figure always gives the same bytes
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "fedamm"}):
        data = base64.b64encode(rendered(figure, "svg", metadata={"Date": None})).decode()
    return Picture(data, title, caption, figure.get_figwidth() > WIDE)


def render(template: str, **content: Any) -> str:
    """Fill a template.

    Args:
        template: File name in ``templates``.
        content: Variables of the template. All texts are escaped, and their control characters shown as codes.

    Returns:
        A complete page. Its only script sorts the tables; the page's content security policy allows no other.
    """
    style, script = (_source(name) for name in ("report.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template(template)
    return page.render(style=Markup(style), script=Markup(script), digest=digest, **content)


def blocks(cells: Cells) -> Iterator[tuple[str, Cells]]:
    """Yield the blocks of a table: the heading above each block, empty if it has none, and its rows."""
    title, rows = "", list[Any]()
    for row in cells[1:]:
        if not is_heading(row):
            rows.append(row)
            continue
        if title or rows:
            yield title, rows
        title, rows = row[0][0], []
    yield title, rows


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedamm_pl.results"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["blocks"] = lambda cells: list(blocks(cells))
    return environment


def _without_control_characters(value: Any) -> Any:
    return printable(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].strip()
