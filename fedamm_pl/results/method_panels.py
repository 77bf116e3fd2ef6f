"""Layout of figures that compare methods: a panel for each setting and group of classes, a line for each method."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedamm_pl.results.figure_parts import MEDIUM, SMALL, Style, drawable, group_styles, label_axes, new_figure
from fedamm_pl.results.tables import in_groups


def method_panels(
    panels: Mapping[str, Mapping[str, Mapping[str, Any]]],
    groups: Mapping[str, Sequence[str]] | None,
    draw: Callable[[Axes, Mapping[int, Any], Style], None],
    unit: str,
    inches: tuple[float, float],
) -> Figure:
    """Draw a panel for each setting and group of classes, with a line for each method.

    Args:
        panels: Setting -> group of classes (all, many, ...) -> method -> data to draw.
        groups: Title -> methods, which are then listed below this title. None or empty: no groups.
        draw: Draws a panel, given its axes, line number -> data of the method on this line, and the style of the group
            of classes.
        unit: Label of the horizontal axes.
        inches: Height of a panel without lines, and of a line.
    """
    methods = dict.fromkeys(name for shown in panels.values() for group in shown.values() for name in group)
    lines: list[tuple[str, bool]] = []  # text, and whether it is the title of a group
    for title, members in in_groups(methods, groups or {}):
        lines += [*([(title, True)] if title else []), *((name, False) for name in members)]
    styles = group_styles(list(dict.fromkeys(name for setting in panels.values() for name in setting)))
    width = 2 + 2.2 * len(styles)
    titles = {setting: textwrap.wrap(drawable(setting), int(11 * (width - 2))) for setting in panels}
    height = (inches[0] + inches[1] * len(lines)) * len(panels) + 0.17 * sum(map(len, titles.values()))
    figure, flat = new_figure(width, height, len(panels), len(styles), sharey=True)
    cells = [(setting, group) for setting in panels for group in styles]
    place: dict[str, Any] = {"textcoords": "offset points", "in_layout": False, "weight": "bold"}
    for index, (axes, (setting, group)) in enumerate(zip(flat, cells, strict=True)):
        known = panels[setting].get(group, {})
        draw(
            axes,
            {at: known[text] for at, (text, above) in enumerate(lines) if not above and text in known},
            styles[group],
        )
        for at, (text, above) in enumerate(lines):
            if above:
                axes.axhspan(at - 0.5, at + 0.5, color="0.93", linewidth=0, zorder=2.5)  # above lines, below texts
                if index % len(styles) == 0:  # the title spans the row of panels
                    axes.set_zorder(1)
                    short = textwrap.shorten(drawable(text), int(12 * (width - 2)), placeholder=" ...")
                    axes.annotate(short, (0, at), (4, 0), xycoords=axes.get_yaxis_transform(), fontsize=SMALL, va="center", **place)  # fmt: skip
        over = titles[setting] if index % len(styles) == 0 else []
        # the title of a setting spans the row of panels; as the first panel's own title it would widen this panel, so
        # that title has only empty lines, which reserve the space
        if over:
            axes.annotate(
                "\n".join(over), (0, 1), (0, 18), xycoords="axes fraction", fontsize=MEDIUM + 1, va="bottom", **place
            )
        label_axes(axes, "\n" * len(over) + group, unit if index >= len(cells) - len(styles) else "", "")
        axes.set_ylim(len(lines) - 0.5, -0.5)
        named = {at: drawable(text) for at, (text, above) in enumerate(lines) if not above}
        axes.set_yticks(list(named), list(named.values()))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure
