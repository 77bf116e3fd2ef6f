"""Methods in groups: in tables, in figures, in the files of a comparison; without groups nothing changes."""

import csv
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fedamm_pl.results.comparison_config import CompareConfig
from fedamm_pl.results.comparison_files import write_results
from fedamm_pl.results.figures import comparison
from fedamm_pl.results.paired_figures import forest, rank_diagram
from fedamm_pl.results.paired_tables import difference_cells, rank_cells, rank_legend
from fedamm_pl.results.pairs import compared, pair, rank_within
from fedamm_pl.results.tables import in_groups, table
from tests.results.drawn import check_layout, labels
from tests.results.test_pairs import a_comparison, rows
from tests.results.test_tables import a_row

FOUND = {"FedAvg": [60.0, 60.1, 60.2], "FedProx": [62.0, 62.1, 62.2], "FedAMM": [70.0, 70.1, 70.2], "Moon": [50.0, 50.1, 50.2]}  # fmt: skip
GROUPS = {"needs | images": ["FedAMM"], "needs nothing": ["Moon", "FedAvg"]}
ORDER = ["FedAMM", "Moon", "FedAvg", "FedProx"]
TITLES = ["needs | images", "needs nothing", "others"]


def firsts(cells: Any) -> list[str]:
    return [line[0][0].removesuffix(" †") for line in cells]


def test_methods_in_no_group_come_last_also_where_a_group_is_called_so() -> None:
    assert in_groups(FOUND, GROUPS) == [("needs | images", ["FedAMM"]), ("needs nothing", ["Moon", "FedAvg"]), ("others", ["FedProx"])]  # fmt: skip
    assert in_groups(["a", "b"], {"others": ["b"]}) == [("others", ["b", "a"])]
    assert in_groups(["a"], {"empty here": ["b"], "full": ["a"]}) == [("full", ["a"])]
    assert in_groups(["b", "a"], {}) == [("", ["b", "a"])]


def test_bold_is_the_leader_of_its_group() -> None:
    found = [a_row(name, seed, value) for name, values in FOUND.items() for seed, value in enumerate(values)]
    cells = table(found, GROUPS)
    assert firsts(cells) == ["method", TITLES[0], "FedAMM", TITLES[1], "Moon", "FedAvg", TITLES[2], "FedProx"]
    assert {len(line) for line in cells} == {len(cells[0])}
    bold = [line[0][0] for line in cells if line[2][1]]
    assert bold == ["FedAvg"]  # alone in its group nobody leads
    assert [line[0] for line in table(found) if line[2][1]] == [("FedAMM †", False)]


def test_differences_have_a_block_for_each_group_and_the_same_numbers() -> None:
    paired = pair(rows(**FOUND), {})
    cells = difference_cells(paired, GROUPS)
    blocks = [f"all, mean of last 10: {title}" for title in TITLES]
    assert firsts(cells)[1:7] == [blocks[0], "FedAMM", blocks[1], "Moon", blocks[2], "FedProx"]
    plain = {tuple(line) for line in difference_cells(paired) if not line[0][1]}
    assert {tuple(line) for line in cells if not line[0][1]} == plain  # Holm's number is that of all methods


def test_ranks_are_within_groups() -> None:
    pairs = [pair(rows(**FOUND), {}, setting=name) for name in "ab"]
    groups = {"three": ["Moon", "FedAMM", "FedAvg"], "one": ["FedProx"]}
    ranks = rank_within(pairs, groups)
    assert list(ranks) == ["three"]
    assert dict(zip(ranks["three"].methods, ranks["three"].ranks["all"], strict=True)) == {"FedAvg": 2, "FedAMM": 1, "Moon": 3}  # fmt: skip
    assert firsts(rank_cells(ranks))[:2] == ["method", "three"]
    assert firsts(rank_cells(ranks))[-1] == "Friedman, p"
    assert "are at least 2.34 (three) apart." in rank_legend(
        ranks
    )  # 2.343 · sqrt(3 · 4 / (6 · 2)), q of 3 as in Demsar
    assert list(rank_within(pairs)) == [""]
    assert "within their group" not in rank_legend(rank_within(pairs))


def ticks(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_figures_have_the_titles_above_the_methods() -> None:
    groups = {**GROUPS, "a title " * 30: ["FedProx"]}
    known = dict.fromkeys(("all", "many", "medium", "few"), FOUND)
    differences = {group: compared(FOUND, "FedAvg") for group in known}
    figures = {
        "accuracies": comparison({"data.dataset a": known, "data.dataset b": known}, groups),
        "forest": forest({"": differences}, {"": "FedAvg"}, groups),
    }
    check_layout(figures)
    assert ticks(figures["accuracies"]) == ORDER
    assert ticks(figures["forest"]) == ["FedAMM", "Moon", "FedProx"]
    axes = figures["accuracies"].axes[0]
    assert [text.get_text() for text in axes.texts][:2] == TITLES[:2]
    assert axes.texts[2].get_text().endswith(" ...")
    assert list(axes.get_yticks()) == [1, 3, 4, 6]
    (means,) = {line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [sum(FOUND["FedProx"]) / 3]}
    assert means == 6


def test_a_diagram_of_ranks_has_panels_for_each_group() -> None:
    pairs = [pair(rows(**FOUND), {}, setting=name) for name in "ab"]
    ranks = rank_within(pairs, {"the first": list(FOUND)[:3], "the second": ["Moon"]}) | {
        "again": rank_within(pairs)[""]
    }
    figure = rank_diagram(ranks)
    check_layout({"ranks": figure})
    assert labels(figure).count("the first\nall: mean rank") == labels(figure).count("again\nfew: mean rank") == 1


def test_the_files_of_a_comparison_show_the_groups(tmp_path: Path) -> None:
    shares = {name: [value / 100 for value in values] for name, values in FOUND.items()}
    grid = {"data.partition": ["iid", "by_shards"]}
    plain = write_results(tmp_path, a_comparison(tmp_path, shares, grid=grid))
    assert "group" not in (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    runs = a_comparison(tmp_path, shares, grid=grid, groups=GROUPS)
    assert [run.method for run in runs[::3]] == ORDER * 2
    text = write_results(tmp_path, runs, groups=GROUPS)
    assert text.count(r"| **needs \| images** |") == text.count("| **others** |") == 3
    assert r"| **all, mean of last 10 or fewer: needs \| images** |" in text
    assert "Bold marks the leader of a group" in text
    assert r"No mean ranks for: needs \| images; needs nothing; others. Ranks need at least 3 methods" in text
    assert "Mean ranks of the methods" not in text
    assert "Bold figures" not in plain
    assert (tmp_path / "results.tex").read_text().count(r"\textbf{needs \textbar{} images}") == 3
    with (tmp_path / "results.csv").open() as file:
        found = {row["method"]: row["group"] for row in csv.DictReader(file)}
    assert found == {"FedAMM": TITLES[0], "Moon": TITLES[1], "FedAvg": TITLES[1], "FedProx": "others"}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["FedAvg"], "b": ["Moon", "FedAvg"]}, r"Expected `groups` to hold each method once, got FedAvg twice\."),
        ({"a": ["Fedavg"]}, r"Expected `groups` to hold one of `methods`, FedAvg, Moon, got Fedavg\."),
        ({"a": []}, r"Expected `groups` to have titles and to hold methods, got 'a', which lacks one\."),
        ({"": ["FedAvg"]}, r"Expected `groups` to have titles and to hold methods, got '', which lacks one\."),
    ],
)
def test_mistakes_are_one_line(groups: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig(base={}, methods={"FedAvg": None, "Moon": None}, groups=groups)
