"""Figures of differences between methods: a forest plot, and Demsar's diagram of mean ranks (JMLR 7, 2006)."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedamm_pl.results.figure_parts import MEDIUM, SMALL, drawable, group_styles, label_axes, new_figure
from fedamm_pl.results.pairs import ALPHA, LEVEL, Difference, Ranks
from fedamm_pl.results.statistics import cliques, critical_difference


def forest(panels: Mapping[str, Mapping[str, Mapping[str, Difference]]], references: Mapping[str, str]) -> Figure:
    """Draw differences from a reference: a panel for each setting and group of classes, a line for each method.

    Args:
        panels: Setting -> group (all, many, ...) -> method -> difference in points.
        references: Setting -> the method that is subtracted.

    Returns:
        A figure with the seeds as small dots, the mean as a large mark with its 95 % interval, a line at no difference, and a grey
        band of half a point to its sides.
    """
    methods = list(dict.fromkeys(name for groups in panels.values() for group in groups.values() for name in group))
    styles = group_styles(list(dict.fromkeys(name for setting in panels.values() for name in setting)))
    width = 2 + 2.2 * len(styles)
    titles = {setting: textwrap.wrap(drawable(setting), int(11 * (width - 2))) for setting in panels}
    height = (1.1 + 0.25 * len(methods)) * len(panels) + 0.17 * sum(map(len, titles.values()))
    figure, flat = new_figure(width, height, len(panels), len(styles), sharey=True)
    cells = [(setting, group) for setting in panels for group in styles]
    for index, (axes, (setting, group)) in enumerate(zip(flat, cells, strict=True)):
        axes.axvspan(-LEVEL, LEVEL, color="0.85", linewidth=0)
        axes.axvline(0, color="0.4", linewidth=1)
        for line, method in enumerate(methods):
            if found := panels[setting].get(group, {}).get(method):
                axes.plot(found.values, [line + 0.3] * len(found.values), ".", color="0.5", markersize=4)
                axes.plot(found.interval, [line, line], "|-", color=styles[group].color, linewidth=1.5)
                axes.plot(found.mean, line, styles[group].marker, color=styles[group].color, markersize=5)
        above = titles[setting] if index % len(styles) == 0 else []
        if above:  # over the whole row: its title only keeps the room, lest the layout widens the first panel
            place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "in_layout": False}
            axes.annotate("\n".join(above), (0, 1), (0, 18), fontsize=MEDIUM + 1, weight="bold", va="bottom", **place)
        last = index >= len(cells) - len(styles)
        label_axes(axes, "\n" * len(above) + group, "points" if last else "", "")
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_yticks(range(len(methods)), list(map(drawable, methods)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    names = " or ".join(dict.fromkeys(drawable(references[setting]) for setting in panels))
    band = f"test accuracy minus that of {names}: mean, 95 % interval, seeds; grey: less than half a point"
    figure.supxlabel("\n".join(textwrap.wrap(band, int(14 * width))), fontsize=SMALL)
    return figure


def rank_diagram(ranks: Ranks) -> Figure:
    """Draw the mean ranks of methods, the best at the left, a panel for each group; bars join those that Nemenyi's test does not tell apart."""
    difference = critical_difference(len(ranks.methods), ranks.num_settings, ALPHA)
    depth = (len(ranks.methods) + 1) // 2
    figure, flat = new_figure(7, (1.2 + 0.24 * depth) * len(ranks.ranks), len(ranks.ranks))
    for axes, (group, found) in zip(flat, ranks.ranks.items(), strict=True):
        bars = cliques(found, difference)
        axes.set_title(f"{group}: mean rank (Friedman p {ranks.friedman[group]:.2g})", fontsize=MEDIUM + 1, loc="left")
        _draw_axis(axes, len(found), difference)
        for level, (low, high) in enumerate(bars, 1):
            axes.plot([low - 0.03, high + 0.03], [0.35 * level] * 2, color="0.35", linewidth=3, solid_capstyle="butt")
        _draw_methods(axes, ranks.methods, found, 0.35 * len(bars) + 0.7)
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
    end = min(1 + difference, num_methods)  # a longer one than the axis goes out of it
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
