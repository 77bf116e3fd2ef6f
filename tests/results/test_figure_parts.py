"""The parts of the figures: styles, ticks, texts that keep clear of each other."""

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fedamm_pl.results.figures import accuracy, confusion
from tests.results.drawn import across_runs, check_layout, lines


def test_accuracies_that_are_equal_are_written_apart() -> None:
    names = ["all", *"abcdef"]
    (axes,) = accuracy([1, 2], {name: [0.99, 1.0] for name in names}).axes
    heights = sorted(text.xyann[1] for text in axes.texts)  # type: ignore[attr-defined]
    assert np.diff(heights).min() > 5
    assert heights[-1] <= axes.get_ylim()[1]


def test_names_are_no_formulas_and_long_ones_are_shortened() -> None:
    figure = confusion(np.eye(2), ["$a_b$", "x" * 200])
    FigureCanvasAgg(figure).draw()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [r"\$a_b\$", "x" * 23 + "…"]


def test_few_looks_the_same_without_medium() -> None:
    names = ("all", "many", "medium", "few")
    colors = [
        lines(accuracy([1, 2], {name: [0.1, 0.2] for name in shown}).axes[0])["few"].get_color()
        for shown in (names, ("many", "few"))
    ]
    assert colors[0] == colors[1]


def test_figures_leave_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    check_layout(across_runs(2))
    assert dict(mpl.rcParams) == before
