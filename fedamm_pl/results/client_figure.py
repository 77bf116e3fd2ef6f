"""Figure of the accuracy at each client."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedamm_pl.federation.local_test import over_clients
from fedamm_pl.results.figure_parts import (
    draw_legend,
    label_axes,
    new_figure,
    set_class_ticks,
    set_log_axis,
    style_of,
    whole_numbers,
)


def client_accuracy(
    accuracies: Sequence[float], names: Sequence[str] = (), sizes: Sequence[int] = (), num_classes: Sequence[int] = ()
) -> Figure:
    """Draw the accuracy at each client, the worst first, with the mean over all clients and over the worst tenth.

    Args:
        accuracies: Accuracies in [0, 1] of the clients that have one.
        names: Names of the same clients; shown if there are only a few.
        sizes: Numbers of training examples of the same clients. If given, two more panels show the accuracies against
            these and against ``num_classes``.
        num_classes: Number of classes that each of these clients holds.
    """
    summary = over_clients(accuracies)
    if sizes:
        figure, (axes, by_size, by_classes) = new_figure(11, 3.4, 1, 3, width_ratios=(5, 3, 3))
        set_log_axis(by_size, "x", max(min(sizes), 0.5) / 1.5, max(*sizes, 1) * 1.5)
        by_classes.xaxis.set_major_locator(whole_numbers())
        for panel, x, below in (
            (by_size, sizes, "training examples of the client (log scale)"),
            (by_classes, num_classes, "classes that the client holds"),
        ):
            panel.plot(x, 100 * np.asarray(accuracies), "o", color=style_of(0).color, alpha=0.6, markersize=5)
            panel.set(ylim=(-2, 102))
            label_axes(panel, "", below, "")
    else:
        figure, (axes,) = new_figure(5.5, 3.4)
    edges = np.arange(len(accuracies) + 1) + 0.5
    order = np.argsort(accuracies, kind="stable")
    axes.stairs(100 * np.asarray(accuracies)[order], edges, fill=True, color=style_of(0).color, alpha=0.75)
    lines = [
        axes.axhline(
            100 * summary[name], color=style.color, linestyle=style.dash, label=f"{label}, {100 * summary[name]:.1f}"
        )
        for name, label, style in (
            ("local/acc_mean", "mean over the clients", style_of(1)),
            ("local/acc_worst_tenth", "mean over the worst tenth", style_of(2)),
        )
    ]
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 102))
    if names:
        set_class_ticks(axes.xaxis, len(names), [names[k] for k in order], 1)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "Accuracy at each client, on what it has held out"
    label_axes(axes, title, f"{len(accuracies)} clients, by accuracy", "accuracy (%)")
    draw_legend(figure, lines)
    return figure
