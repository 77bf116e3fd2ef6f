"""The figures of a run are those that apply to it, and agree with each other."""

from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fedamm_pl.results.run_figures import run_figures
from tests.results.drawn import check_layout, legend, lines, run


def test_run_figures_are_those_that_apply() -> None:
    history, diagnostics = run(10, 5)
    figures = run_figures(history, diagnostics)
    of_all = ["class_counts", "partition", "accuracy", "class_accuracy", "confusion"]
    assert list(figures) == [*of_all, "weight_mapping", "class_weights"]
    of_fedavg = [{key: row[key] for key in ("round", "bytes", "seconds")} for row in diagnostics["rounds"]]
    assert list(run_figures(history, diagnostics | {"rounds": of_fedavg})) == of_all
    assert list(run_figures(history, diagnostics | {"confusion": None, "rounds": []})) == of_all[:-1]
    assert list(run_figures(history, None)) == ["accuracy"]
    assert run_figures([], {}) == {}


def test_run_figures_show_the_run() -> None:
    history, diagnostics = run(10, 5)
    figures = run_figures(history, diagnostics)
    for name, index in (("class_counts", 1), ("partition", 0), ("confusion", 0)):
        ticks = [text.get_text() for text in figures[name].axes[index].get_xticklabels()]
        assert ticks == diagnostics["class_names"], name
    named = diagnostics | {"client_names": [f"site {client}" for client in range(5)]}
    ticks = [text.get_text() for text in run_figures(history, named)["partition"].axes[0].get_yticklabels()]
    assert ticks == named["client_names"]
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
    figures = run_figures(history, diagnostics)
    assert "class_weights" not in figures  # no example has been weighted yet
    assert len(figures["weight_mapping"].axes) == 1
    assert legend(figures["class_accuracy"])[-1] == "round 0"
    for figure in figures.values():
        FigureCanvasAgg(figure).draw()
    figures = run_figures([{"round": 0.0, "test/acc": 0.1}], diagnostics)  # nothing per class or group
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
    figures = run_figures(history, diagnostics)
    found = [looks(figures, name) for name in names]
    assert [len(pairs) for pairs in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3
    assert legend(figures["accuracy"]) == ["all", names[0], names[2]]
    colors = {bar.get_facecolor() for bar in figures["class_counts"].axes[0].patches}
    assert {to_rgb(color) for pairs in found for color, _ in pairs} < {color[:3] for color in colors}


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("num_clients", [5, 100])
def test_no_text_is_cut_or_covered_in_the_figures_of_a_run(num_classes: int, num_clients: int) -> None:
    check_layout(run_figures(*run(num_classes, num_clients)))
