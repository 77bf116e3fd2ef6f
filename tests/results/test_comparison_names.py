"""A report calls the methods of a comparison as the comparison does, where the files tell, and never two methods the same."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamm_pl.results.comparison import PlannedRun, plan
from fedamm_pl.results.comparison_config import CompareConfig
from fedamm_pl.results.comparison_names import comparison_names
from fedamm_pl.results.report_several import labels, pairs
from fedamm_pl.results.runs import load, load_all
from fedamm_pl.results.tables import as_csv, row
from tests.results.handmade import a_run, a_summary

METHODS = {
    "FedAvg": None,
    "Momentum 0.5": {"class_path": "mine.Server", "beta": 0.5},
    "a/b": {"class_path": "mine.Server", "beta": 0.9},
}


def compared(folder: Path, unfinished: tuple[str, ...] = (), **options: Any) -> list[PlannedRun]:
    """Write a comparison of two seeds; of unfinished methods only the first seed is in the table."""
    config = CompareConfig(**{"base": {"data": {"x": 1}}, "methods": METHODS, "seeds": [0, 1], **options})
    runs = plan(config, folder, lambda whole: (yaml.safe_dump(whole), 3))
    rows = []
    for run in runs:
        name = yaml.safe_load(run.config)["algorithm"]["class_path"].rpartition(".")[2]
        a_run(run.folder, method=name, seed=run.seed)
        (run.folder / "config.yaml").write_text(run.config)
        if run.seed == 0 or run.method not in unfinished:
            rows.append(row(run.method, run.seed, run.setting, a_summary(seed=run.seed)))
    (folder / "results.csv").write_text(as_csv(rows))
    return runs


@pytest.mark.parametrize(
    "grid", [{}, {"data.x": [1, 2.5], "data.partition": ["by shards", "iid"]}, {"data.y": [None, 2]}]
)
def test_names_are_those_of_the_comparison(grid: dict[str, Any], tmp_path: Path) -> None:
    runs = compared(tmp_path, unfinished=("a/b",), grid=grid)
    assert comparison_names([load(run.folder) for run in runs]) == [run.method for run in runs]
    found = labels([load(run.folder) for run in runs])
    for run, label in zip(runs, found, strict=True):
        assert label.split(", ")[0] == run.method
        assert all(str(value) in label for value in run.setting.values())
        assert "beta" not in label
    assert len(set(found)) == len(runs) / 2


def test_pairs_have_these_names(tmp_path: Path) -> None:
    runs = compared(tmp_path)
    (paired,) = pairs([load(run.folder) for run in runs])
    assert paired.reference == "FedAvg"
    assert set(paired.differences["mean_last_10/all"]) == {"Momentum 0.5", "a/b"}


def test_runs_for_tuning_are_left_out_unless_they_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = compared(tmp_path)
    a_run(tmp_path / "tuning" / "FedAvg_lr_0.1" / "seed_100", seed=100)
    with caplog.at_level(logging.INFO):
        assert len(load_all([tmp_path])) == len(runs)
    assert "tuning are left out" in caplog.text
    assert [run.seed for run in load_all([tmp_path / "tuning"])] == [100]
    (paired,) = pairs(load_all([tmp_path]))
    assert paired.differences


def test_a_run_is_named_by_its_own_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = compared(tmp_path)
    monkeypatch.chdir(runs[2].folder)
    assert comparison_names([load(".")]) == ["Momentum 0.5"]


def test_without_a_table_or_in_another_place_nothing_is_guessed(tmp_path: Path) -> None:
    runs = compared(tmp_path / "a", grid={"data.x": [1, 2]})
    os.rename(tmp_path / "a/x_1", tmp_path / "a/x_3")
    assert comparison_names(load_all([tmp_path / "a/x_3"])) == [None] * 6
    (tmp_path / "a/results.csv").unlink()
    assert comparison_names(load_all([tmp_path / "a"])) == [None] * 12
    assert "Server, x 2, beta 0.5" in labels(load_all([tmp_path / "a"]))
    assert len(runs) == 12


@pytest.mark.parametrize(
    "content", ["", "method", "a,b\n1,2\n", 'seed,method\n0,"x', "method,seed\n\n", "method,seed\n" + "M" * 300]
)
def test_a_file_of_something_else_is_passed_over(content: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "M" / "seed_0")
    (tmp_path / "results.csv").write_text(content)
    assert comparison_names([load(run)]) == [None]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    runs = compared(tmp_path / "a")
    os.rename(tmp_path / "a/results.csv", tmp_path / "elsewhere.csv")
    (tmp_path / "a/results.csv").symlink_to(tmp_path / "elsewhere.csv")
    assert comparison_names([load(runs[0].folder)]) == [None]


def test_one_name_of_two_comparisons_does_not_join_what_differs(tmp_path: Path) -> None:
    for folder, beta in (("a", 0.1), ("b", 0.2)):
        compared(tmp_path / folder, methods={"FedAvg": None, "Mine": {"class_path": "mine.Server", "beta": beta}})
    assert set(labels(load_all([tmp_path]))) == {"FedAvg", "Mine, beta 0.1", "Mine, beta 0.2"}
    compared(tmp_path / "c", methods={"Mine": {"class_path": "mine.Other"}})
    assert {"Server, beta 0.1", "Server, beta 0.2", "Other"} <= set(labels(load_all([tmp_path])))
