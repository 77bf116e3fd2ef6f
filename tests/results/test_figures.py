"""Each figure shows its data, which are read back from it, and nothing of it is cut or covered."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import FillBetweenPolyCollection, LineCollection

from fedamm_pl import WeightNet
from fedamm_pl.results.figures import (
    accuracy,
    accuracy_against_bytes,
    class_accuracy,
    class_counts,
    class_weights,
    comparison,
    confusion,
    partition,
    weight_curves,
    weight_mapping,
)
from fedamm_pl.results.statistics import t_interval
from tests.results.drawn import LOSSES, across_runs, cells, check_layout, grey, labels, legend, lines, numbers, shown

GROUPS = {"many": [2], "medium": [0], "few": [1]}


def test_curves_are_the_mean_of_the_nets_and_their_range() -> None:
    nets = [WeightNet(), WeightNet()]
    figure = weight_curves({"first": nets, "second": nets[:1]}, largest_loss=5)
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


def test_comparison_shows_seeds_mean_and_interval() -> None:
    panels = {"a": {"all": {"FedAvg": [60.0, 62.0, 67.0], "FedAMM": [50.0]}}, "b": {"few": {"FedAMM": [10.0, 14.0]}}}
    figure = comparison(panels)
    first, empty, also_empty, last = figure.axes
    drawn = [sorted(np.atleast_1d(line.get_xdata()).tolist()) for line in first.get_lines() if line.get_marker() != "|"]
    assert [60.0, 62.0, 67.0] in drawn
    assert [63.0] in drawn
    assert [50.0] in drawn
    (bar,) = [line.get_xdata() for line in first.get_lines() if line.get_marker() == "|"]  # none for one seed
    np.testing.assert_allclose(bar, t_interval([60.0, 62.0, 67.0]))
    assert not empty.get_lines()
    assert not also_empty.get_lines()
    assert last.get_lines()
    assert [text.get_text() for text in first.get_yticklabels()] == ["FedAvg", "FedAMM"]
    assert [axes.texts[0].get_text() for axes in (first, also_empty)] == ["a", "b"]


def test_class_counts_fall_and_ties_go_by_index() -> None:
    figure = class_counts([5, 3, 90, 5], GROUPS | {"none": []}, ["a", "b", "c", "d"])
    linear, log = figure.axes
    for axes in (linear, log):
        bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
        assert bars == {1: 90, 2: 5, 3: 5, 4: 3}
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    assert [text.get_text() for text in log.get_xticklabels()] == ["c", "a", "d", "b"]
    assert legend(figure) == ["many", "medium", "few", "no group"]
    assert len({bar.get_hatch() for bar in linear.patches}) == 4


def test_partition_leaves_zero_cells_empty() -> None:
    figure = partition([[7, 0, 300], [None, 1, 2]], ["a", "b", "c"])
    assert cells(figure).tolist() == [[7, None, 300], [None, 1, 2]]
    assert numbers(figure.axes[0]) == {(0, 0): "7", (0, 2): "300", (1, 1): "1", (1, 2): "2"}
    assert figure.axes[1].get_yscale() == "log"
    assert "examples" in figure.axes[1].get_ylabel()


def test_partition_names_its_clients_and_shortens_long_names() -> None:
    figure = partition([[7, 0], [1, 2], [3, 4]], client_names=["north", "x" * 60, "a$b\x1b"])
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert ticks == ["north", "x" * 23 + "…", r"a\$b\x1b"]
    plain = partition([[7, 0], [1, 2]])
    assert [text.get_text() for text in plain.axes[0].get_yticklabels()] == ["0", "1"]


def test_partition_of_nothing_and_of_many() -> None:
    assert cells(partition([[0, 0]])).mask.all()
    assert not partition(np.ones((21, 3))).axes[0].texts  # no room for numbers
    assert not partition(np.ones((3, 11))).axes[0].texts


def test_weight_mapping_shows_six_rounds_light_to_dark() -> None:
    curves = {round_num: LOSSES / 10 * round_num / 101 for round_num in range(101)}
    figure = weight_mapping(LOSSES, curves)
    drawn = lines(figure.axes[0])
    assert list(drawn) == [f"round {r}" for r in (0, 20, 40, 60, 80, 100)]
    np.testing.assert_allclose(drawn["round 40"].get_ydata(), curves[40])
    shades = [grey(line.get_color()) for line in drawn.values()]
    assert np.diff(shades).max() < -0.05
    assert shades[0] < 0.85  # seen on white


def test_weight_mapping_of_one_round_has_the_histogram_beneath() -> None:
    shares = [0.9, 0.1, None]
    figure = weight_mapping([0, 1, 2], {3: [0.2, 0.3, 0.4]}, shares)
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
    figure = class_weights([1, 2, 3], weights, {"head": [0, 1], "tail": [2]})
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
    figure = class_weights([1], np.geomspace(0.1, 10, 100)[None], {"a": [0], "b": list(range(1, 100))})
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert len(axes.get_lines()) == 3  # no thin ones


def test_accuracy_shows_the_mean_of_the_last_evaluations_without_round_0() -> None:
    figure = accuracy([0, 2, 4], {"all": [0.1, 0.5, 0.6], "few": [None, 0.2, float("nan")]}, last=10)
    (axes,) = figure.axes
    drawn = lines(axes)
    np.testing.assert_allclose(drawn["all"].get_ydata(), [10, 50, 60])
    assert list(drawn["few"].get_xdata()) == [2]
    means = [c.get_segments()[0].tolist() for c in axes.collections if isinstance(c, LineCollection)]
    np.testing.assert_allclose(means, [[[2, 20], [4, 20]], [[2, 55], [4, 55]]])
    assert [text.get_text() for text in axes.texts] == ["few 20.0", "all 55.0"]
    assert "2 evaluations" in labels(figure)


def test_accuracy_of_one_round_and_of_a_group_that_was_not_tested() -> None:
    figure = accuracy([0], {"all": [0.1], "few": [None]})
    FigureCanvasAgg(figure).draw()
    assert [text.get_text() for text in figure.axes[0].texts] == ["all 10.0"]
    assert [text for text, _ in shown(figure.axes[0].get_xticklabels(), figure.axes)] == ["0"]
    assert legend(figure) == ["all"]


def test_class_accuracy_joins_hollow_and_filled_marks() -> None:
    figure = class_accuracy([50, 0, 500], [0.1, 0.2, None], [0.5, 0.1, 0.9], GROUPS, ("before", "after"))
    (axes,) = figure.axes
    marks = [line for line in axes.get_lines() if line.get_marker() == "s"]  # medium is class 0
    assert [(*line.get_xdata(), *line.get_ydata()) for line in marks] == [(50, 10), (50, 50)]
    assert [grey(line.get_markerfacecolor()) > 0.99 for line in marks] == [True, False]
    np.testing.assert_allclose(axes.collections[1].get_segments(), [[[50, 10], [50, 50]]])
    assert axes.get_xscale() == "log"
    assert "0 drawn at 0.5" in axes.get_xlabel()
    assert legend(figure) == ["many", "medium", "few", "before", "after"]


def test_confusion_is_in_percent_of_rows() -> None:
    figure = confusion([[3, 1, 0], [0, 0, 0], [1, 1, 998]], ["a", "b", "c"])
    assert cells(figure).tolist() == [[75, 25, None], [None, None, None], [pytest.approx(0.1)] * 2 + [99.8]]
    assert numbers(figure.axes[0]) == {(0, 0): "75", (0, 1): "25", (2, 2): "100"}
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert not confusion(np.eye(21)).axes[0].texts


def test_bytes_have_the_mean_and_the_range_of_seeds() -> None:
    sent = [1e6, 5e6]
    figure = accuracy_against_bytes({"": {"FedAvg": [(sent, [0.2, 0.4]), (sent, [0.4, 0.5])], "one": [(sent, [0, 1])]}})
    (axes,) = figure.axes
    drawn = lines(axes)
    assert list(drawn["FedAvg"].get_xdata()) == [1, 5]
    np.testing.assert_allclose(drawn["FedAvg"].get_ydata(), [30, 45])
    (band,) = [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    assert {(x, round(y)) for x, y in band.get_paths()[0].vertices.tolist()} == {(1, 20), (1, 40), (5, 40), (5, 50)}
    assert "(MB)" in axes.get_xlabel()
    assert legend(figure) == ["FedAvg", "one"]


def test_seeds_of_different_lengths_are_single_lines() -> None:
    figure = accuracy_against_bytes({"": {"FedAvg": [([1e9, 2e9], [0.2, 0.4]), ([1e9], [0.4])], "none": []}})
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1, 2], [1]]
    assert legend(figure) == ["FedAvg"]
    assert "(GB)" in axes.get_xlabel()


@pytest.mark.parametrize(("num_methods", "num_settings"), [(1, 2), (16, 1), (16, 2)])
def test_no_text_is_cut_or_covered_in_the_figures_across_runs(num_methods: int, num_settings: int) -> None:
    check_layout(across_runs(num_methods, num_settings))
