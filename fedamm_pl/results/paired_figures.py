"""Figures of differences between methods: a forest plot, and the diagram of mean ranks by Demsar (JMLR 7, 2006)."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedamm_pl.results.figure_parts import MEDIUM, SMALL, Style, drawable, label_below, new_figure
from fedamm_pl.results.method_panels import method_panels
from fedamm_pl.results.pairs import ALPHA, LEVEL, Difference, Ranks
from fedamm_pl.results.statistics import cliques, critical_difference


def forest(
    panels: Mapping[str, Mapping[str, Mapping[str, Difference]]],
    references: Mapping[str, str],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Draw differences from a reference: a panel for each setting and group of classes, a line for each method.

    Args:
        panels: Setting -> group (all, many, ...) -> method -> difference in points.
        references: Setting -> the method that is subtracted.
        groups: Title -> methods, if they are shown in groups.

    Returns:
        A figure with the seeds as small dots, the mean as a large mark with its 95 % interval, a line at no difference,
        and a grey band of half a point on both sides of this line.
    """

    def draw(axes: Axes, lines: Mapping[int, Difference], style: Style) -> None:
        axes.axvspan(-LEVEL, LEVEL, color="0.85", linewidth=0)
        axes.axvline(0, color="0.4", linewidth=1)
        for line, found in lines.items():
            axes.plot(found.values, [line + 0.3] * len(found.values), ".", color="0.5", markersize=4)
            axes.plot(found.interval, [line, line], "|-", color=style.color, linewidth=1.5)
            axes.plot(found.mean, line, style.marker, color=style.color, markersize=5)

    figure = method_panels(panels, groups, draw, "points", (1.1, 0.25))
    names = " or ".join(dict.fromkeys(drawable(references[setting]) for setting in panels))
    label_below(
        figure, f"test accuracy minus that of {names}: mean, 95 % interval, seeds; grey: less than half a point"
    )
    return figure


def rank_diagram(ranks: Mapping[str, Ranks]) -> Figure:
    """Draw the mean ranks of methods, the best at the left; bars join methods that do not differ by Nemenyi's test.

    Args:
        ranks: Title of a group of methods -> the ranks in it, drawn with a panel for each group of classes. Without
            groups, there is one entry with an empty title.
    """
    panels = [(title, mine, group) for title, mine in ranks.items() for group in mine.ranks]
    depths = [(len(mine.methods) + 1) // 2 for _, mine, _ in panels]
    heights = [1.2 + 0.24 * depth for depth in depths]
    figure, flat = new_figure(7, sum(heights), len(panels), height_ratios=heights)
    for axes, (title, mine, group), depth in zip(flat, panels, depths, strict=True):
        found = mine.ranks[group]
        difference = critical_difference(len(mine.methods), mine.num_settings, ALPHA)
        bars = cliques(found, difference)
        above = "\n".join(
            [*textwrap.wrap(drawable(title), 60), f"{group}: mean rank (Friedman p {mine.friedman[group]:.2g})"]
        )
        axes.set_title(above, fontsize=MEDIUM + 1, loc="left")
        _draw_axis(axes, len(found), difference)
        for level, (low, high) in enumerate(bars, 1):
            axes.plot([low - 0.03, high + 0.03], [0.35 * level] * 2, color="0.35", linewidth=3, solid_capstyle="butt")
        _draw_methods(axes, mine.methods, found, 0.35 * len(bars) + 0.7)
        axes.set_ylim(0.35 * len(bars) + 0.7 + depth, -1.4)
    return figure


def _draw_axis(axes: Axes, num_methods: int, difference: float) -> None:
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.xaxis.set_ticks(())
    axes.set_xlim(*_edges(num_methods))
    axes.plot([1, num_methods], [0, 0], color="black", linewidth=1, clip_on=False)
    for tick in range(1, num_methods + 1):
        axes.plot([tick, tick], [0, -0.15], color="black", linewidth=1, clip_on=False)
        axes.text(tick, -0.25, str(tick), fontsize=SMALL, ha="center", va="bottom")
    end = min(1 + difference, num_methods)  # a bar longer than the axis is cut, and has no end mark
    axes.plot(
        [1, end], [-1.15, -1.15], "|-" if end == 1 + difference else "-", color="0.35", linewidth=1.5, clip_on=False
    )
    axes.annotate(f"critical difference {difference:.2f}", (end, -1.15), (6, 0), textcoords="offset points", fontsize=SMALL, va="center")  # fmt: skip


def _draw_methods(axes: Axes, methods: Sequence[str], ranks: Sequence[float], top: float) -> None:
    order = [int(index) for index in np.argsort(ranks, kind="stable")]
    half = (len(order) + 1) // 2
    for left, side in ((True, order[:half]), (False, order[half:][::-1])):
        near, far = _edges(len(order))
        edge, offset, where = (near, -4, "right") if left else (far, 4, "left")
        for depth, index in enumerate(side):
            rank, height = ranks[index], top + depth
            axes.plot([rank, rank, edge], [0, height, height], color="black", linewidth=0.8, clip_on=False)
            axes.annotate(f"{drawable(methods[index])}  {rank:.2f}", (edge, height), (offset, 0), textcoords="offset points", fontsize=SMALL, ha=where, va="center")  # fmt: skip


def _edges(num_methods: int) -> tuple[float, float]:
    room = 0.03 * (num_methods - 1)
    return 1 - room, num_methods + room
