"""Style of all figures, and the parts that they share."""

import io
import logging
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from fedamm_pl.metrics import GROUPS
from fedamm_pl.results.statistics import t_interval
from fedamm_pl.terminal import printable

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

COLORS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "black")  # Okabe and Ito, without yellow
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "os^DvPX"
HATCHES = ("", "////", "xxxx", "....", "----", "||||", "++++")
SHADES = colormaps["viridis_r"](np.linspace(0, 1, 256))
CLEAR = ListedColormap(SHADES[32:])  # even the lightest differs from white paper
FADING = ListedColormap(1 - np.linspace(0, 1, 256)[:, None] ** 0.3 * (1 - SHADES[:, :3]))  # white at 0
NO_GROUP = "no group"
MANY = 1000  # with more classes than this, a figure has no bars
NAMED = 20  # up to this many classes or clients, each has a tick
SMALL, MEDIUM = 8, 9  # points
NATS = "cross-entropy of the example (nats)"
PERCENT = "test accuracy (%)"


class Style(NamedTuple):
    """Look of a line, point or bar: distinct in colour, in greyscale and for colour-blind readers."""

    color: str
    dash: Any
    marker: str
    hatch: str


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of a size in inches, and its axes row by row."""
    figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07))
    flat = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=SMALL, length=3, color="0.5")
    return figure, flat


def rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    """Return a figure as the content of a file of kind pdf, png or svg; the caller writes it."""
    figure.savefig(buffer := io.BytesIO(), format=kind, **options)
    return buffer.getvalue()


def label_axes(axes: Axes, title: str, below: str, left: str) -> None:
    """Set the title and the labels of both axes."""
    axes.set_title(title, fontsize=MEDIUM + 1, loc="left")
    axes.set_xlabel(below, fontsize=MEDIUM)
    axes.set_ylabel(left, fontsize=MEDIUM)


@cache
def characters() -> set[int]:
    """Return the code points of the characters in the fonts of the figures."""
    paths = [font_manager.findfont(FontProperties(family=[family])) for family in FontProperties().get_family()]
    return {character for path in paths for character in font_manager.get_font(path).get_charmap()}


@cache
def drawable(text: str) -> str:
    r"""Return a name as it can be drawn: without formulas, and with codes for characters that the font lacks.

    Such codes are logged once.

    Example:
        >>> print(drawable("a\tb"), drawable("$x$"), drawable("_x"))
        a\tb \$x\$  _x
    """
    plain = printable(text)
    shown = "".join(
        c if ord(c) in characters() or not c.isprintable() else c.encode("unicode_escape").decode() for c in plain
    )
    if shown != plain:
        warn_of_font(plain, shown)
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib hides labels that begin with "_" from a legend


said: set[str] = set()  # the first name that was drawn with codes; not empty once the warning is logged


def warn_of_font(name: str, shown: str) -> None:
    """Log once per process that names are drawn with codes."""
    if not said:
        said.add(name)
        log.warning("figures: the font lacks characters of some names; they are drawn as codes, %s as %s", name, shown)


def draw_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Draw a legend below all panels, in as many columns as fit."""
    for handle in handles:
        handle.set_label(drawable(str(handle.get_label())))
    columns = int(72 * figure.get_figwidth() / (38 + 4.8 * max((len(str(h.get_label())) for h in handles), default=0)))
    look: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "handlelength": 2.6, "columnspacing": 1}
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, columns), **look)


def label_below(figure: Figure, text: str) -> None:
    """Write a text below all panels."""
    figure.supxlabel("\n".join(textwrap.wrap(text, int(14 * figure.get_figwidth()))), fontsize=SMALL)


def style_of(index: int) -> Style:
    """Return the style of the line, point or bar with this index."""
    # 7 colours and 5 dashes give 35 different pairs
    return Style(COLORS[index % 7], DASHES[index % 5], MARKERS[index % 7], HATCHES[index % 7])


def group_styles(names: Collection[str]) -> dict[str, Style]:
    """Return name -> style; many, medium and few keep their styles even if one of them is absent."""
    groups = [name for name in names if name != "all"]
    order = GROUPS if set(groups) <= set(GROUPS) else groups
    return {name: Style("black", "-", "o", "") if name == "all" else style_of(order.index(name)) for name in names}


def group_members(groups: Mapping[str, Sequence[int]], num_classes: int) -> Iterator[tuple[str, list[int], Style]]:
    """Yield name, classes and style of each group that has classes, and of the classes without a group."""
    styles = group_styles(groups)
    for name, members in groups.items():
        if members:
            yield name, list(members), styles[name]
    if rest := sorted(set(range(num_classes)).difference(*groups.values())):
        yield NO_GROUP, rest, Style("0.55", DASHES[3], "D", "....")


def as_array(values: Any) -> Array:
    """Return values as an array, with NaN for those that are missing or infinite."""
    array = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def draw_line(axes: Axes, x: Array, y: Array, style: Style, **options: Any) -> Line2D:
    """Draw a line through the finite values, with about eight markers."""
    seen = np.isfinite(y)
    look: dict[str, Any] = {"color": style.color, "linestyle": style.dash, "marker": style.marker, "markersize": 4}
    return axes.plot(x[seen], y[seen], **{**look, "markevery": max(1, seen.sum() // 8), **options})[0]


def draw_band(axes: Axes, x: Array, curves: Array, style: Style, label: str) -> Line2D:
    """Draw the mean of curves, shape (seeds, n), and their range if there are several."""
    if len(curves) > 1:
        axes.fill_between(x, curves.min(0), curves.max(0), color=style.color, alpha=0.18, linewidth=0)
    return draw_line(axes, x, curves.mean(0), style, label=label)


def draw_seeds(axes: Axes, line: int, values: Array, style: Style) -> None:
    """Draw the mean of a method's seeds; with several seeds, also each seed and the 95 % interval of the mean."""
    if len(values) > 1:
        axes.plot(values, [line + 0.25] * len(values), ".", color="0.5", markersize=4)
        axes.plot(t_interval(values.tolist()), [line, line], "|-", color=style.color, linewidth=1.5)
    if len(values):
        axes.plot(values.mean(), line, style.marker, color=style.color, markersize=5)


def draw_heat_map(axes: Axes, values: Array, colors: Colormap, norm: Normalize, unit: str, numbers: bool) -> None:
    """Draw a heat map with numbers in its cells if ``numbers`` is true; cells of 0 and NaN are empty."""
    shown = np.ma.masked_invalid(np.where(values > 0, values, np.nan))
    # with "none", the pixels in a vector file are not resampled
    image = axes.imshow(shown, cmap=colors, norm=norm, aspect="auto", interpolation="none")
    axes.grid(False)
    axes.spines[:].set_visible(True)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, format="{x:g}")
    if isinstance(norm, LogNorm):
        bar.locator = log_locator(norm.vmin or 1, norm.vmax or 1)
    bar.minorticks_off()
    bar.set_label(unit, fontsize=MEDIUM)
    bar.ax.tick_params(labelsize=SMALL, length=3, color="0.5")
    for (row, column), value in np.ndenumerate(values) if numbers else ():
        if value >= 0.5:
            color = "white" if norm(value) > 0.5 else "black"
            axes.text(column, row, f"{value:.0f}", color=color, fontsize=SMALL - 1, ha="center", va="center")


def set_class_ticks(axis: Axis, count: int, names: Sequence[str] = (), first: int = 0) -> None:
    """Label each class with its name; if there are many classes, label only some, with their numbers."""
    texts = [name if len(name) <= 24 else name[:23] + "…" for name in map(str, names or range(first, first + count))]
    upright = axis is axis.axes.xaxis and max(map(len, texts)) > 3
    if count <= NAMED:
        axis.set_ticks(range(first, first + count), list(map(drawable, texts)), rotation=90 if upright else 0)
    else:
        axis.set_major_locator(whole_numbers())


def draw_class_bars(
    axes: Axes, ranks: NDArray[Any], heights: Sequence[int], count: int, label: str, style: Style
) -> Any:
    """Draw the bars of a group of classes; ``count`` is the number of classes in all groups."""
    if count > MANY:  # separate bars take a millisecond each
        width = 500 / count  # points
        return axes.vlines(ranks, 0, heights, style.color, linewidth=width, label=label, rasterized=True)
    # many bars touch each other, since gaps would make them look grey; white hatches keep the colour of the group
    look: dict[str, Any] = {"color": style.color, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0}
    return axes.bar(ranks, heights, 0.8 if count <= NAMED else 1, label=label, **look)


def draw_loss_bars(axes: Axes, grid: Array, shares: Array) -> None:
    """Draw a histogram of losses, with one bar from each value of the grid to the next."""
    widths = np.diff(grid, append=2 * grid[-1] - grid[-2])
    axes.bar(grid, shares, widths, align="edge", color="0.6", edgecolor="white", linewidth=0.4)
    set_log_axis(axes, "y", min(shares[shares > 0], default=0.1) / 2, 1)
    axes.set_xlim(grid[0], grid[-1] + widths[-1])
    label_axes(axes, "", f"{NATS}; last bar: {grid[-1]:g} and more", "share of\ntraining examples")


def set_round_axis(axes: Axes, rounds: Array) -> None:
    """Extend the axis a little beyond the rounds, and put ticks at whole numbers only."""
    room = 0.02 * np.ptp(rounds) or 0.5
    axes.set_xlim(rounds.min() - room, rounds.max() + room)
    axes.xaxis.set_major_locator(whole_numbers())


def whole_numbers() -> MaxNLocator:
    """Return a locator of ticks at whole numbers."""
    return MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def set_log_axis(axes: Axes, name: str, low: float, high: float) -> None:
    """Make the axis ``x`` or ``y`` logarithmic, with plain numbers as tick labels."""
    axes.set(**{f"{name}lim": (low, high), f"{name}scale": "log"})  # in this order, so that no limit is sought in zeros
    axis: Axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(log_locator(low, high))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def log_locator(low: float, high: float) -> LogLocator:
    """Return a locator of ticks at powers of ten, and between them if the range is short."""
    return LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,))


def draw_means(axes: Axes, rounds: Array, means: Mapping[str, float], styles: Mapping[str, Style]) -> None:
    """Draw the means over the last rounds, and write their values at the right margin without overlap."""
    top = axes.get_ylim()[1]
    gap = 0.06 * top  # height of a line of text
    heights: list[float] = []
    ordered = sorted(means.items(), key=lambda item: item[1])
    for _, mean in ordered:
        heights.append(max(mean, heights[-1] + gap) if heights else mean)
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], top - gap * (len(heights) - 1 - index))
    right = axes.get_yaxis_transform()
    for (name, mean), height in zip(ordered, heights, strict=True):
        axes.hlines(mean, rounds[0], rounds[-1], color=styles[name].color, linewidth=2.5)
        arrow = {"arrowstyle": "-", "color": styles[name].color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        text = f"{drawable(name)} {mean:.1f}"
        axes.annotate(text, (1, mean), (1.03, height), right, right, arrow, fontsize=SMALL, va="center")


def mapping_figure(grid: Array, histogram: ArrayLike | None) -> tuple[Figure, Axes]:
    """Return a figure with axes for V(loss), above the histogram of the losses if there is one."""
    rows = 1 if histogram is None else 2
    figure, (axes, *below) = new_figure(5, 2.3 + 1.1 * rows, rows, sharex=True, height_ratios=(3, 1)[:rows])
    axes.set(xlim=(grid[0], grid[-1]), ylim=(0, 1))
    label_axes(axes, "Learned weight of an example", "" if below else NATS, "weight V(loss)")
    for panel in below:
        draw_loss_bars(panel, grid, as_array(histogram))
    return figure, axes
