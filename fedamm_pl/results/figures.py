"""Functions that take data and return a matplotlib Figure. None opens a window or changes matplotlib's global state."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from torch import nn

from fedamm_pl.federation.summary import LAST
from fedamm_pl.results.figure_parts import (
    CLEAR,
    FADING,
    MANY,
    NAMED,
    NATS,
    PERCENT,
    Style,
    as_array,
    draw_band,
    draw_class_bars,
    draw_heat_map,
    draw_legend,
    draw_line,
    draw_means,
    draw_seeds,
    drawable,
    group_members,
    group_styles,
    label_axes,
    label_below,
    mapping_figure,
    new_figure,
    set_class_ticks,
    set_log_axis,
    set_round_axis,
    style_of,
)
from fedamm_pl.results.method_panels import method_panels


def weight_curves(weight_nets: Mapping[str, Sequence[nn.Module]], largest_loss: float = 10.0) -> Figure:
    """Draw the learned mapping loss -> weight V(loss): for each label, the mean over seeds and a band of their range.

    Args:
        weight_nets: Label -> weight nets, one per seed.
        largest_loss: Right end of the axis, in nats of cross-entropy.
    """
    figure, (axes,) = new_figure(5, 3.4)
    losses = torch.linspace(0, largest_loss, 200)
    for index, (label, nets) in enumerate(weight_nets.items()):
        with torch.no_grad():
            curves = torch.stack([net(losses.to(next(net.parameters()))).float().cpu() for net in nets])
        draw_band(axes, losses.numpy(), curves.numpy(), style_of(index), label)
    label_axes(axes, "Learned weight of an example", NATS, "weight V(loss)")
    axes.set(xlim=(0, largest_loss), ylim=(0, 1))
    draw_legend(figure, axes.get_lines() if len(weight_nets) > 1 else [])
    return figure


def comparison(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], groups: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Draw the accuracy of methods: a panel for each setting and group of classes, a line for each method.

    Args:
        panels: Setting -> group (all, many, ...) -> method -> accuracy of each seed, in percent.
        groups: Title -> methods, if they are shown in groups.

    Returns:
        A figure with the seeds as small dots, the mean as a large mark, and its 95 % interval (Student's t) as a bar.
    """

    def draw(axes: Axes, lines: Mapping[int, Sequence[float]], style: Style) -> None:
        for line, values in lines.items():
            draw_seeds(axes, line, as_array(values), style)

    figure = method_panels(panels, groups, draw, PERCENT, (1.0, 0.22))
    label_below(figure, "mean over the seeds with its 95 % interval; small dots: seeds")
    return figure


def class_counts(counts: Sequence[int], groups: Mapping[str, Sequence[int]], class_names: Sequence[str] = ()) -> Figure:
    """Draw the number of training images of each class on a linear and a logarithmic axis.

    Classes are in order of decreasing count, ties by index.

    Args:
        counts: Number of training images, by class index.
        groups: Shot group -> class indices.
        class_names: Names of the classes, by index.
    """
    order = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
    ranks = np.argsort(order) + 1
    figure, (linear, log) = new_figure(6.5, 4.6, 2, sharex=True)
    bars: list[Any] = []
    for name, members, style in group_members(groups, len(counts)):
        heights = [counts[label] for label in members]
        bars += [draw_class_bars(axes, ranks[members], heights, len(counts), name, style) for axes in (linear, log)][:1]
    named = bool(class_names) and len(counts) <= NAMED
    label_axes(linear, "Training examples per class", "", "examples")
    label_axes(log, "", "class" if named else "rank of the class by training examples", "examples (log scale)")
    set_log_axis(log, "y", 0.5, 2 * max(1, *counts))
    linear.set_xlim(0.3, len(counts) + 0.7)
    set_class_ticks(log.xaxis, len(counts), [class_names[label] for label in order] if named else (), first=1)
    draw_legend(figure, bars)
    return figure


def partition(client_counts: ArrayLike, class_names: Sequence[str] = (), client_names: Sequence[str] = ()) -> Figure:
    """Draw the number of training images of each class at each client.

    Args:
        client_counts: Number of images of class c at client k, shape (K, C).
        class_names: Names of the classes, by index.
        client_names: Names of the clients, by index.
    """
    counts = as_array(client_counts)
    num_clients, num_classes = counts.shape
    width, height = np.clip((1.8 + 0.42 * num_classes, 1.8 + 0.22 * num_clients), (4.5, 3), 7)
    figure, (axes,) = new_figure(width, height)
    numbers = num_clients <= NAMED and num_classes <= 10
    draw_heat_map(axes, counts, CLEAR, LogNorm(1, np.nanmax(counts, initial=2)), "examples (log scale)", numbers)
    label_axes(axes, "Training examples of each class at each client", "class", "client")
    set_class_ticks(axes.xaxis, num_classes, class_names)
    set_class_ticks(axes.yaxis, num_clients, client_names)
    return figure


def weight_mapping(losses: ArrayLike, curves: Mapping[int, ArrayLike], histogram: ArrayLike | None = None) -> Figure:
    """Draw how the learned mapping loss -> weight V(loss) changes over the rounds.

    Args:
        losses: Grid of losses in nats, shape (n,).
        curves: Round -> weights on the grid, shape (n,). At most six rounds are drawn, light to dark.
        histogram: Share of the training examples whose loss lies between each value of the grid and the next; the last
            interval has no upper end.
    """
    grid, rounds = as_array(losses), sorted(curves)
    figure, axes = mapping_figure(grid, histogram)
    shown = [rounds[index] for index in np.unique(np.linspace(0, len(rounds) - 1, 6).round().astype(int))]
    for round_num, shade in zip(shown, np.linspace(1, 0, len(shown))[::-1], strict=True):
        axes.plot(grid, as_array(curves[round_num]), color=CLEAR(shade), lw=1.2 + shade, label=f"round {round_num}")
    draw_legend(figure, axes.get_lines())
    return figure


def family_mapping(losses: ArrayLike, curves: Sequence[ArrayLike], histogram: ArrayLike | None = None) -> Figure:
    """Draw the learned mapping of each family of classes, from the smallest classes to the largest.

    See :func:`weight_mapping`.
    """
    figure, axes = mapping_figure(as_array(losses), histogram)
    ends = {0: " (smallest classes)", len(curves) - 1: " (largest classes)"}
    for index, curve in enumerate(curves):
        label = f"family {index + 1}{ends.get(index, '')}"
        draw_line(axes, as_array(losses), as_array(curve), style_of(index), label=label)
    draw_legend(figure, axes.get_lines())
    return figure


def class_weights(rounds: ArrayLike, weights: ArrayLike, groups: Mapping[str, Sequence[int]]) -> Figure:
    """Draw the mean relative weight of the examples of each class and shot group over the rounds.

    Args:
        rounds: Rounds, shape (R,).
        weights: Relative weights, shape (R, C): 1 if examples of the class count as in FedAvg, NaN if none was seen.
        groups: Shot group -> class indices. The line of a group is the mean over its classes.
    """
    x, y = as_array(rounds), as_array(weights)
    figure, (axes,) = new_figure(5.5, 3.6)
    lines: list[Artist] = [axes.axhline(1, color="0.4", linewidth=1, label="as in FedAvg")]
    for name, members, style in group_members(groups, y.shape[1]):
        for label in members if y.shape[1] <= NAMED else ():
            draw_line(axes, x, y[:, label], style, linewidth=0.7, alpha=0.45, marker="")
        mean = np.ma.masked_invalid(y[:, members]).mean(1).filled(np.nan)  # unlike nanmean, silent where all are NaN
        lines += [draw_line(axes, x, mean, style, linewidth=2, label=name)]
    low, high = np.nanmin(y, initial=1), np.nanmax(y, initial=1)
    if 0 < 5 * low < high:
        set_log_axis(axes, "y", low / 1.2, high * 1.2)
    set_round_axis(axes, x)
    label_axes(axes, "Mean weight of the examples of a class", "round", "weight relative to FedAvg")
    draw_legend(figure, lines)
    return figure


def accuracy(rounds: ArrayLike, series: Mapping[str, ArrayLike], last: int = LAST) -> Figure:
    """Draw accuracies over the rounds, and their means over the last evaluations.

    Args:
        rounds: Evaluated rounds, shape (R,).
        series: Name (all, many, ...) -> accuracy in [0, 1], shape (R,).
        last: Number of evaluations that the mean is taken over; round 0 is excluded unless it is the only one.
    """
    x, styles, means = as_array(rounds), group_styles(series), {}
    tail = (np.flatnonzero(x > 0) if (x > 0).any() else np.arange(len(x)))[-last:]
    figure, (axes,) = new_figure(6, 3.8)
    lines: list[Artist] = []
    for name, values in series.items():
        y = 100 * as_array(values)
        if np.isfinite(y).any():
            lines += [draw_line(axes, x, y, styles[name], linewidth=1.1, alpha=0.8, label=name)]
        if np.isfinite(y[tail]).any():
            means[name] = float(np.nanmean(y[tail]))
    top = float(np.clip(1.05 * axes.dataLim.ymax, 10, 102))
    axes.set_ylim(-0.02 * top, top)
    set_round_axis(axes, x)
    draw_means(axes, x[tail], means, styles)
    what = f"mean of the last {len(tail)} evaluations" if len(tail) > 1 else "the last evaluation"
    label_axes(axes, f"Test accuracy; at the right: {what}", "round", PERCENT)
    draw_legend(figure, lines)
    return figure


def class_accuracy(
    counts: ArrayLike,
    first: ArrayLike,
    last: ArrayLike,
    groups: Mapping[str, Sequence[int]],
    labels: tuple[str, str] = ("first", "last"),
) -> Figure:
    """Draw the accuracy of each class against its number of training images, for two evaluations.

    Args:
        counts: Number of training images, by class index.
        first: Accuracy in [0, 1] by class index, NaN if unknown; drawn hollow.
        last: The same for a later evaluation; drawn filled.
        groups: Shot group -> class indices.
        labels: Names of the two evaluations.
    """
    number, before, after = as_array(counts), 100 * as_array(first), 100 * as_array(last)
    x = np.maximum(number, 0.5)  # a logarithmic axis has no 0
    figure, (axes,) = new_figure(5.5, 3.8)
    handles: list[Artist] = []
    for name, members, style in group_members(groups, len(x)):
        many: dict[str, Any] = {"rasterized": True} if len(x) > MANY else {}
        look: dict[str, Any] = {"marker": style.marker, "color": style.color, "linestyle": "", "clip_on": False, **many}
        axes.vlines(x[members], before[members], after[members], color=style.color, linewidth=0.8, alpha=0.6, **many)
        axes.plot(x[members], before[members], markerfacecolor="white", **look)
        handles += axes.plot(x[members], after[members], label=name, **look)
    for label, values, face in zip(labels, (before, after), ("white", "0.3"), strict=True):
        if np.isfinite(values).any():
            handles += [Line2D([], [], marker="o", color="0.3", markerfacecolor=face, linestyle="", label=label)]
    set_log_axis(axes, "x", x.min() / 2, x.max() * 2)
    axes.set_ylim(-2, 102)
    scale = "log scale, 0 drawn at 0.5" if (number == 0).any() else "log scale"
    label_axes(axes, "Test accuracy of each class", f"training examples of the class ({scale})", PERCENT)
    draw_legend(figure, handles)
    return figure


def confusion(matrix: ArrayLike, class_names: Sequence[str] = ()) -> Figure:
    """Draw the confusion matrix, in percent of the test images of the true class.

    Args:
        matrix: Number of test images, rows by true class, columns by predicted class, shape (C, C).
        class_names: Names of the classes, by index.
    """
    counts = as_array(matrix)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    size = float(np.clip(0.34 * len(counts), 2.5, 6))
    figure, (axes,) = new_figure(size + 1.9, size + 1.2)
    draw_heat_map(axes, shares, FADING, Normalize(0, 100), "share of the true class (%)", len(counts) <= NAMED)
    axes.set_aspect("equal")
    label_axes(axes, "Confusion of classes", "predicted class", "true class")
    for axis in (axes.xaxis, axes.yaxis):
        set_class_ticks(axis, len(counts), class_names)
    return figure


def accuracy_against_bytes(panels: Mapping[str, Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]]]) -> Figure:
    """Draw the accuracy against the bytes exchanged so far: the mean over the seeds with a band of their range.

    Args:
        panels: Setting -> label -> (bytes so far, accuracy in [0, 1]) of each seed, both of shape (n,). If n differs
            between seeds, each is drawn as a line without a mean.
    """
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    columns = min(len(panels), 2)
    height = 3.6 * math.ceil(len(panels) / columns) + 0.07 * len(labels)
    figure, flat = new_figure(6.5 if columns == 1 else 9, height, math.ceil(len(panels) / columns), columns)
    handles: dict[str, Artist] = {}
    for axes, (setting, curves) in zip(flat, panels.items(), strict=False):
        seeds = {label: [(as_array(x), 100 * as_array(y)) for x, y in pairs] for label, pairs in curves.items()}
        most = max((x.max(initial=0) for pairs in seeds.values() for x, _ in pairs), default=0.0)
        unit, scale = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
        for label, pairs in seeds.items():
            style = style_of(labels.index(label))
            if len({len(x) for x, _ in pairs}) == 1:
                x = np.mean([x for x, _ in pairs], 0) / scale
                drawn = [draw_band(axes, x, np.stack([y for _, y in pairs]), style, label)]
            else:
                drawn = [draw_line(axes, x / scale, y, style, label=label, linewidth=1) for x, y in pairs]
            if drawn:
                handles[label] = drawn[0]
        axes.set(xlim=(0, None), ylim=(0, None))
        title = drawable(setting) or "Test accuracy against communication"
        label_axes(axes, title, f"exchanged by all clients so far ({unit})", PERCENT)
    for axes in flat[len(panels) :]:
        axes.set_axis_off()
    draw_legend(figure, list(handles.values()))
    return figure
