"""The figures: what was drawn is read back from them, and nothing of it is cut or covered."""

import itertools
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fedamm_pl import WeightNet
from fedamm_pl.metrics import shot_groups
from fedamm_pl.results import figures as plotting

LOSSES = np.arange(0, 10.01, 0.25)
GROUPS = {"many": [2], "medium": [0], "few": [1]}


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
        "comparison": plotting.comparison(panels),
        "accuracy_against_bytes": plotting.accuracy_against_bytes(curves),
        "weight_curves": plotting.weight_curves({method: [WeightNet()] for method in methods}),
    }


# What is drawn


def test_curves_are_the_mean_of_the_nets_and_their_range() -> None:
    nets = [WeightNet(), WeightNet()]
    figure = plotting.weight_curves({"first": nets, "second": nets[:1]}, largest_loss=5)
    (axes,) = figure.axes
    first, second = axes.get_lines()
    losses = torch.from_numpy(first.get_xdata())
    assert losses[0] == 0
    assert losses[-1] == 5
    with torch.no_grad():
        curves = torch.stack([net(losses) for net in nets])
    torch.testing.assert_close(torch.from_numpy(first.get_ydata()), curves.mean(0))
    torch.testing.assert_close(torch.from_numpy(second.get_ydata()), curves[0])
    (band,) = axes.collections
    edges = torch.from_numpy(band.get_paths()[0].vertices[:, 1]).float()
    torch.testing.assert_close(edges.min(), curves.min())
    assert legend(figure) == ["first", "second"]
    assert "nats" in axes.get_xlabel()


def test_comparison_shows_seeds_mean_and_deviation() -> None:
    panels = {"a": {"all": {"FedAvg": [60.0, 62.0, 67.0], "FedAMM": [50.0]}}, "b": {"few": {"FedAMM": [10.0, 14.0]}}}
    figure = plotting.comparison(panels)
    first, empty, also_empty, last = figure.axes
    drawn = [sorted(np.atleast_1d(line.get_xdata()).tolist()) for line in first.get_lines() if line.get_marker() != "|"]
    assert [60.0, 62.0, 67.0] in drawn
    assert [63.0] in drawn
    assert [50.0] in drawn
    (bar,) = [c for c in first.collections if isinstance(c, LineCollection)]  # none for the method with one seed
    np.testing.assert_allclose(bar.get_segments()[0][:, 0], [63 - 13**0.5, 63 + 13**0.5])
    assert not empty.get_lines()
    assert not also_empty.get_lines()
    assert last.get_lines()
    assert [text.get_text() for text in first.get_yticklabels()] == ["FedAvg", "FedAMM"]
    assert [axes.texts[0].get_text() for axes in (first, also_empty)] == ["a", "b"]


def test_class_counts_fall_and_ties_go_by_index() -> None:
    figure = plotting.class_counts([5, 3, 90, 5], GROUPS | {"none": []}, ["a", "b", "c", "d"])
    linear, log = figure.axes
    for axes in (linear, log):
        bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
        assert bars == {1: 90, 2: 5, 3: 5, 4: 3}
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    assert [text.get_text() for text in log.get_xticklabels()] == ["c", "a", "d", "b"]
    assert legend(figure) == ["many", "medium", "few", "no group"]
    assert len({bar.get_hatch() for bar in linear.patches}) == 4


def test_partition_leaves_zero_cells_empty() -> None:
    figure = plotting.partition([[7, 0, 300], [None, 1, 2]], ["a", "b", "c"])
    assert cells(figure).tolist() == [[7, None, 300], [None, 1, 2]]
    assert numbers(figure.axes[0]) == {(0, 0): "7", (0, 2): "300", (1, 1): "1", (1, 2): "2"}
    assert figure.axes[1].get_yscale() == "log"
    assert "images" in figure.axes[1].get_ylabel()


def test_partition_of_nothing_and_of_many() -> None:
    assert cells(plotting.partition([[0, 0]])).mask.all()
    assert not plotting.partition(np.ones((21, 3))).axes[0].texts  # no room for numbers
    assert not plotting.partition(np.ones((3, 11))).axes[0].texts


def test_weight_mapping_shows_six_rounds_light_to_dark() -> None:
    curves = {round_num: LOSSES / 10 * round_num / 101 for round_num in range(101)}
    figure = plotting.weight_mapping(LOSSES, curves)
    drawn = lines(figure.axes[0])
    assert list(drawn) == [f"round {r}" for r in (0, 20, 40, 60, 80, 100)]
    np.testing.assert_allclose(drawn["round 40"].get_ydata(), curves[40])
    shades = [grey(line.get_color()) for line in drawn.values()]
    assert np.diff(shades).max() < -0.05
    assert shades[0] < 0.85  # seen on white


def test_weight_mapping_of_one_round_has_the_histogram_beneath() -> None:
    shares = [0.9, 0.1, None]
    figure = plotting.weight_mapping([0, 1, 2], {3: [0.2, 0.3, 0.4]}, shares)
    above, below = figure.axes
    assert list(lines(above)) == ["round 3"]
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in below.patches]
    assert bars[:2] == [(0, 1, 0.9), (1, 1, 0.1)]
    assert np.isnan(bars[2][2])
    assert below.get_yscale() == "log"
    assert above.get_shared_x_axes().joined(above, below)
    assert "share" in below.get_ylabel()
    assert "2 and more" in below.get_xlabel()


def test_class_weights_are_means_over_the_classes_seen() -> None:
    weights = [[1.0, 2.0, None], [None, 4.0, None], [3.0, 5.0, None]]
    figure = plotting.class_weights([1, 2, 3], weights, {"head": [0, 1], "tail": [2]})
    (axes,) = figure.axes
    drawn = lines(axes)
    assert list(drawn) == ["as in FedAvg", "head", "tail"]
    assert list(drawn["as in FedAvg"].get_ydata()) == [1, 1]
    assert list(drawn["head"].get_ydata()) == [1.5, 4, 4]
    assert len(drawn["tail"].get_xdata()) == 0
    thin = [line for line in axes.get_lines() if line.get_linewidth() < 1]
    assert [list(line.get_xdata()) for line in thin] == [[1, 3], [1, 2, 3], []]  # a gap is bridged
    assert axes.get_yscale() == "linear"


def test_class_weights_of_many_classes_and_a_wide_range() -> None:
    figure = plotting.class_weights([1], np.geomspace(0.1, 10, 100)[None], {"a": [0], "b": list(range(1, 100))})
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert len(axes.get_lines()) == 3  # no thin ones


def test_accuracy_shows_the_mean_of_the_last_evaluations_without_round_0() -> None:
    figure = plotting.accuracy([0, 2, 4], {"all": [0.1, 0.5, 0.6], "few": [None, 0.2, float("nan")]}, last=10)
    (axes,) = figure.axes
    drawn = lines(axes)
    np.testing.assert_allclose(drawn["all"].get_ydata(), [10, 50, 60])
    assert list(drawn["few"].get_xdata()) == [2]
    means = [c.get_segments()[0].tolist() for c in axes.collections if isinstance(c, LineCollection)]
    np.testing.assert_allclose(means, [[[2, 20], [4, 20]], [[2, 55], [4, 55]]])
    assert [text.get_text() for text in axes.texts] == ["few 20.0", "all 55.0"]
    assert "2 evaluations" in labels(figure)


def test_accuracies_that_are_equal_are_written_apart() -> None:
    names = ["all", *"abcdef"]
    (axes,) = plotting.accuracy([1, 2], {name: [0.99, 1.0] for name in names}).axes
    heights = sorted(text.xyann[1] for text in axes.texts)  # type: ignore[attr-defined]
    assert np.diff(heights).min() > 5
    assert heights[-1] <= axes.get_ylim()[1]


def test_accuracy_of_one_round_and_of_a_group_that_was_not_tested() -> None:
    figure = plotting.accuracy([0], {"all": [0.1], "few": [None]})
    FigureCanvasAgg(figure).draw()
    assert [text.get_text() for text in figure.axes[0].texts] == ["all 10.0"]
    assert [text for text, _ in shown(figure.axes[0].get_xticklabels(), figure.axes)] == ["0"]
    assert legend(figure) == ["all"]


def test_class_accuracy_joins_hollow_and_filled_marks() -> None:
    figure = plotting.class_accuracy([50, 0, 500], [0.1, 0.2, None], [0.5, 0.1, 0.9], GROUPS, ("before", "after"))
    (axes,) = figure.axes
    marks = [line for line in axes.get_lines() if line.get_marker() == "s"]  # medium is class 0
    assert [(*line.get_xdata(), *line.get_ydata()) for line in marks] == [(50, 10), (50, 50)]
    assert [grey(line.get_markerfacecolor()) > 0.99 for line in marks] == [True, False]
    np.testing.assert_allclose(axes.collections[1].get_segments(), [[[50, 10], [50, 50]]])
    assert axes.get_xscale() == "log"
    assert "0 drawn at 0.5" in axes.get_xlabel()
    assert legend(figure) == ["many", "medium", "few", "before", "after"]


def test_confusion_is_in_percent_of_rows() -> None:
    figure = plotting.confusion([[3, 1, 0], [0, 0, 0], [1, 1, 998]], ["a", "b", "c"])
    assert cells(figure).tolist() == [[75, 25, None], [None, None, None], [pytest.approx(0.1)] * 2 + [99.8]]
    assert numbers(figure.axes[0]) == {(0, 0): "75", (0, 1): "25", (2, 2): "100"}
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert not plotting.confusion(np.eye(21)).axes[0].texts


def test_names_are_no_formulas_and_long_ones_are_shortened() -> None:
    figure = plotting.confusion(np.eye(2), ["$a_b$", "x" * 200])
    FigureCanvasAgg(figure).draw()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [r"\$a_b\$", "x" * 23 + "…"]


def test_bytes_have_the_mean_and_the_range_of_seeds() -> None:
    sent = [1e6, 5e6]
    figure = plotting.accuracy_against_bytes(
        {"FedAvg": [(sent, [0.2, 0.4]), (sent, [0.4, 0.5])], "one": [(sent, [0, 1])]}
    )
    (axes,) = figure.axes
    drawn = lines(axes)
    assert list(drawn["FedAvg"].get_xdata()) == [1, 5]
    np.testing.assert_allclose(drawn["FedAvg"].get_ydata(), [30, 45])
    (band,) = [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    assert {(x, round(y)) for x, y in band.get_paths()[0].vertices.tolist()} == {(1, 20), (1, 40), (5, 40), (5, 50)}
    assert "(MB)" in axes.get_xlabel()
    assert legend(figure) == ["FedAvg", "one"]


def test_seeds_of_different_lengths_are_single_lines() -> None:
    figure = plotting.accuracy_against_bytes({"FedAvg": [([1e9, 2e9], [0.2, 0.4]), ([1e9], [0.4])], "none": []})
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1, 2], [1]]
    assert legend(figure) == ["FedAvg"]
    assert "(GB)" in axes.get_xlabel()


# The figures of a run


def test_run_figures_are_those_that_apply() -> None:
    history, diagnostics = run(10, 5)
    figures = plotting.run_figures(history, diagnostics)
    of_all = ["class_counts", "partition", "accuracy", "class_accuracy", "confusion"]
    assert list(figures) == [*of_all, "weight_mapping", "class_weights"]
    of_fedavg = [{key: row[key] for key in ("round", "bytes", "seconds")} for row in diagnostics["rounds"]]
    assert list(plotting.run_figures(history, diagnostics | {"rounds": of_fedavg})) == of_all
    assert list(plotting.run_figures(history, diagnostics | {"confusion": None, "rounds": []})) == of_all[:-1]
    assert list(plotting.run_figures(history, None)) == ["accuracy"]
    assert plotting.run_figures([], {}) == {}


def test_run_figures_show_the_run() -> None:
    history, diagnostics = run(10, 5)
    figures = plotting.run_figures(history, diagnostics)
    for name, index in (("class_counts", 1), ("partition", 0), ("confusion", 0)):
        ticks = [text.get_text() for text in figures[name].axes[index].get_xticklabels()]
        assert ticks == diagnostics["class_names"], name
    drawn = lines(figures["accuracy"].axes[0])
    for name, metric in (("all", "test/acc"), ("few", "test/acc_few")):
        np.testing.assert_allclose(drawn[name].get_ydata(), [100 * row[metric] for row in history])
    assert legend(figures["class_accuracy"])[-2:] == ["round 1", "round 12"]
    last = [line for line in figures["class_accuracy"].axes[0].get_lines() if line.get_label() == "many"]
    many = diagnostics["shot_groups"]["many"]
    np.testing.assert_allclose(last[0].get_ydata(), [100 * history[-1][f"test/acc_class_{c}"] for c in many])
    assert list(lines(figures["weight_mapping"].axes[0]))[::5] == ["round 0", "round 12"]
    below = [bar.get_height() for bar in figures["weight_mapping"].axes[1].patches]
    np.testing.assert_allclose(below, diagnostics["rounds"][-1]["loss_histogram"])
    assert list(figures["class_weights"].axes[0].get_lines()[0].get_ydata()) == [1, 1]


def test_one_row_is_enough() -> None:
    history, diagnostics = run(10, 5, num_rounds=0)
    figures = plotting.run_figures(history, diagnostics)
    assert "class_weights" not in figures  # no example has been weighted yet
    assert len(figures["weight_mapping"].axes) == 1
    assert legend(figures["class_accuracy"])[-1] == "round 0"
    for figure in figures.values():
        FigureCanvasAgg(figure).draw()
    figures = plotting.run_figures([{"round": 0.0, "test/acc": 0.1}], diagnostics)  # nothing per class or group
    assert legend(figures["accuracy"]) == ["all"]


def looks(figures: dict[str, Figure], name: str) -> set[tuple[Any, Any]]:
    """Return the pairs of colour and marker that stand for a name."""
    found = [
        line for key in ("accuracy", "class_accuracy", "class_weights") for line in figures[key].axes[0].get_lines()
    ]
    return {(line.get_color(), line.get_marker()) for line in found if line.get_label() == name}


@pytest.mark.parametrize("names", [("many", "medium", "few"), ("head", "body", "tail")])
def test_a_group_looks_the_same_in_all_figures(names: tuple[str, ...]) -> None:
    history, diagnostics = run(10, 5)
    for row in history:  # no class of the second group is in the test set
        del row["test/acc_medium"]
        row |= {f"test/acc_{names[0]}": 0.9, f"test/acc_{names[2]}": 0.2}
    diagnostics["shot_groups"] = dict(zip(names, ([0, 1, 2], [3], [4, 5, 6, 7, 8]), strict=True))
    figures = plotting.run_figures(history, diagnostics)
    found = [looks(figures, name) for name in names]
    assert [len(pairs) for pairs in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3
    assert legend(figures["accuracy"]) == ["all", names[0], names[2]]
    colors = {bar.get_facecolor() for bar in figures["class_counts"].axes[0].patches}
    assert {to_rgb(color) for pairs in found for color, _ in pairs} < {color[:3] for color in colors}


def test_few_looks_the_same_without_medium() -> None:
    names = ("all", "many", "medium", "few")
    colors = [
        lines(plotting.accuracy([1, 2], {name: [0.1, 0.2] for name in shown}).axes[0])["few"].get_color()
        for shown in (names, ("many", "few"))
    ]
    assert colors[0] == colors[1]


# The layout


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


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("num_clients", [5, 100])
def test_no_text_is_cut_or_covered_in_the_figures_of_a_run(num_classes: int, num_clients: int) -> None:
    check_layout(plotting.run_figures(*run(num_classes, num_clients)))


@pytest.mark.parametrize(("num_methods", "num_settings"), [(1, 2), (16, 1), (16, 2)])
def test_no_text_is_cut_or_covered_in_the_figures_across_runs(num_methods: int, num_settings: int) -> None:
    check_layout(across_runs(num_methods, num_settings))


def test_figures_leave_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    check_layout(across_runs(2))
    assert dict(mpl.rcParams) == before
