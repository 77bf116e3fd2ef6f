"""Data of runs to draw, and what was drawn read back from figures."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fedamm_pl import WeightNet
from fedamm_pl.metrics import shot_groups
from fedamm_pl.results.figures import accuracy_against_bytes, comparison, weight_curves

LOSSES = np.arange(0, 10.01, 0.25)


def lines(axes: Axes) -> dict[str, Line2D]:
    """Return label -> line of those that have a label."""
    return {str(line.get_label()): line for line in axes.get_lines() if not str(line.get_label()).startswith("_")}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def labels(figure: Figure) -> str:
    """Return every title and axis label."""
    return " ".join(f"{a.get_title(loc='left')} {a.get_xlabel()} {a.get_ylabel()}" for a in figure.axes)


def cells(figure: Figure) -> np.ma.MaskedArray[Any, Any]:
    (image,) = figure.axes[0].get_images()
    return np.ma.asarray(image.get_array())


def numbers(axes: Axes) -> dict[tuple[int, int], str]:
    """Return (row, column) -> the number in the cell."""
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}


def grey(color: Any) -> float:
    return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114)))


def run(num_classes: int, num_clients: int, num_rounds: int = 12) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Return history and diagnostics of a FedAMM run with the longest names of Fashion-MNIST or CIFAR-100."""
    generator = np.random.default_rng(0)
    counts = [int(5000 * 0.01 ** (c / (num_classes - 1))) for c in range(num_classes)]
    groups = shot_groups(counts, "share")
    history, rows = [], []
    for round_num in range(num_rounds + 1):
        accuracies = generator.random(num_classes)
        row = {"round": float(round_num), "test/acc": float(accuracies.mean())}
        row |= {f"test/acc_{name}": float(accuracies[members].mean()) for name, members in groups.items()}
        history.append(row | {f"test/acc_class_{c}": float(value) for c, value in enumerate(accuracies)})
        seen: dict[str, Any] = {"weight_curve": (1 / (1 + np.exp(-LOSSES * round_num / 20))).tolist()}
        if round_num > 0:  # nothing is trained in round 0
            weights = generator.random(num_classes) + 0.5
            seen["weight_per_class"] = [None if weight < 0.6 else float(weight) for weight in weights]
            seen["loss_histogram"] = (np.exp(-LOSSES) / np.exp(-LOSSES).sum()).tolist()
        rows.append({"round": round_num, "bytes": 1000 * round_num, "seconds": {"train": 1.0}, **seen})
    names = ["T-shirt/top", "Ankle boot"] * 5 if num_classes == 10 else ["aquarium_fish", "sweet_pepper"] * 50
    return history, {
        "class_names": names,
        "class_counts": counts,
        "shot_groups": groups,
        "client_class_counts": generator.poisson(2, (num_clients, num_classes)).tolist(),
        "losses": LOSSES.tolist(),
        "confusion": generator.integers(0, 50, (num_classes, num_classes)).tolist(),
        "rounds": rows,
    }


def across_runs(num_methods: int, num_settings: int = 1) -> dict[str, Figure]:
    generator = np.random.default_rng(0)
    methods = [f"MetaFineTune † {index}" for index in range(num_methods)]
    rounds = np.arange(30.0)
    panels = {
        f"data.partition by_num_classes {setting}, data.imbalance_factor 0.01, federation.num_clients 100": {
            group: {method: (100 * generator.random(3)).tolist() for method in methods}
            for group in ("all", "many", "medium", "few")
        }
        for setting in range(num_settings)
    }
    curves = {method: [(4e8 * rounds, generator.random(30)) for _ in range(3)] for method in methods}
    return {
        "comparison": comparison(panels),
        "accuracy_against_bytes": accuracy_against_bytes({"": curves}),
        "weight_curves": weight_curves({method: [WeightNet()] for method in methods}),
    }


def shown(texts: Iterable[Text], axes: Iterable[Axes]) -> list[tuple[str, Bbox]]:
    """Return what the drawn ones among the texts say, and their boxes; ticks beyond the ends of an axis are not drawn."""
    ticks = [(axis, tick) for a in axes for axis in (a.xaxis, a.yaxis) for tick in (*axis.majorTicks, *axis.minorTicks)]
    hidden = set()
    for axis, tick in ticks:
        low, high = sorted(axis.get_view_interval())
        if not low <= tick.get_loc() <= high:
            hidden |= {tick.label1, tick.label2}
    drawn = [text for text in texts if text.get_visible() and text.get_text() and text not in hidden]
    return [
        (text.get_text(), Text.get_window_extent(text)) for text in drawn
    ]  # an annotation's own box holds its arrow


def check_layout(figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        FigureCanvasAgg(figure).draw()
        width, height = figure.bbox.size
        for text, box in shown(figure.findobj(Text), figure.axes):
            assert box.x0 >= 0, (name, text)
            assert box.y0 >= 0, (name, text)
            assert box.x1 <= width, (name, text)
            assert box.y1 <= height, (name, text)
        for axes in figure.axes:
            kinds = (axes.texts, axes.xaxis.get_ticklabels(which="both"), axes.yaxis.get_ticklabels(which="both"))
            pairs = [pair for texts in kinds for pair in itertools.combinations(shown(texts, [axes]), 2)]
            assert [(a, b) for (a, box), (b, other) in pairs if box.overlaps(other)] == [], name
