"""A run that is read back is what its files say, and what is no run or mangled is named."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedamm_pl.results.runs import Run, load, load_all
from tests.results.handmade import a_run


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "*.ckpt", "events.*")))


def test_metrics_are_those_of_the_file(fedamm_run: Path) -> None:
    run = load(fedamm_run)
    with (fedamm_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(run.metrics) == list(rows[0])
    assert run.metrics["round"].tolist() == [0, 2, 4, 5]
    for name, column in run.metrics.items():
        assert column.dtype == np.float64
        np.testing.assert_array_equal(column, [float(row[name] or "nan") for row in rows])


def test_what_a_round_lacks_is_nan_in_the_columns_and_absent_in_the_rows(fedamm_run: Path) -> None:
    run = load(str(fedamm_run))
    assert np.isnan(run.metrics["client/loss"]).tolist() == [True, False, False, False]
    assert ["client/loss" in row for row in run.history] == [False, True, True, True]


def test_a_measured_nan_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("round,test/acc,test/loss,client/loss\n0,0.5,nan,\n")
    (row,) = load(tmp_path).history
    assert list(row) == ["round", "test/acc", "test/loss"]
    assert np.isnan(row["test/loss"])


def test_the_other_files_are_there_as_they_are(fedamm_run: Path) -> None:
    run = load(fedamm_run)
    assert run.path == fedamm_run
    assert run.config == yaml.safe_load((fedamm_run / "config.yaml").read_text())
    assert run.summary == json.loads((fedamm_run / "summary.json").read_text())
    assert run.diagnostics == json.loads((fedamm_run / "diagnostics.json").read_text())
    assert (run.method, run.dataset, run.seed, run.name) == ("FedAMM", "tiny", 0, "FedAMM, tiny, seed 0")


def test_results_are_those_of_the_summary(fedamm_run: Path, tmp_path: Path) -> None:
    finished, folder = load(fedamm_run), copied(fedamm_run, tmp_path / "run")
    (folder / "summary.json").unlink()
    unfinished = load(folder)
    assert unfinished.summary is None
    for kind in ("final", "best", "mean_last_10"):
        assert unfinished.results[kind] == finished.results[kind]
    assert unfinished.name == finished.name


def test_the_summary_of_fewer_rounds_is_not_that_of_a_run_that_goes_on(fedavg_run: Path, tmp_path: Path) -> None:
    folder = copied(fedavg_run, tmp_path / "run")
    last = (folder / "metrics.csv").read_text().splitlines()[-1]
    with (folder / "metrics.csv").open("a") as file:
        file.write(f"7{last.removeprefix('5')}\n")
    run = load(folder)
    assert run.history[-1]["round"] == 7
    assert run.summary is None


def test_a_run_from_python_has_no_configuration(fedavg_run: Path, tmp_path: Path) -> None:
    folder = copied(fedavg_run, tmp_path / "run")
    (folder / "config.yaml").unlink()
    assert load(folder).config == {}
    assert load(folder).name == "FedAvg, tiny, seed 0"
    (folder / "summary.json").unlink()
    assert load(folder).name == "run"


def test_a_run_that_has_just_begun_has_no_rounds(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("\n")
    run = load(tmp_path)
    assert (run.history, run.summary, run.diagnostics) == ([], None, None)
    assert run.metrics.empty


def test_figures_are_those_of_the_method(fedamm_run: Path, fedavg_run: Path) -> None:
    shared = {"class_counts", "partition", "accuracy", "class_accuracy", "confusion"}
    assert set(load(fedavg_run).figures()) == shared
    assert set(load(fedamm_run).figures()) == shared | {"weight_mapping", "class_weights"}


def test_figures_show_the_numbers_of_the_files(fedamm_run: Path) -> None:
    run = load(fedamm_run)
    assert run.diagnostics is not None
    figures, metrics = run.figures(), run.metrics
    curves = {line.get_label(): line for line in figures["accuracy"].axes[0].get_lines()}
    for name, column in {
        "all": "test/acc",
        **{group: f"test/acc_{group}" for group in ("many", "medium", "few")},
    }.items():
        assert np.array(curves[name].get_xdata()) == pytest.approx(metrics["round"].to_numpy())
        assert np.array(curves[name].get_ydata()) == pytest.approx(100 * metrics[column].to_numpy())
    per_class = [100 * metrics[f"test/acc_class_{label}"].iloc[-1] for label in range(6)]
    shares = figures["confusion"].axes[0].images[0].get_array()
    assert shares is not None
    assert np.diag(np.ma.filled(shares, 0)) == pytest.approx(per_class)
    partition = figures["partition"].axes[0].images[0].get_array()
    assert partition is not None
    assert np.ma.filled(partition, 0).sum(0) == pytest.approx(run.diagnostics["class_counts"])
    last = next(line for line in figures["weight_mapping"].axes[0].get_lines() if line.get_label() == "round 5")
    assert np.array(last.get_ydata()) == pytest.approx(run.diagnostics["rounds"][-1]["weight_curve"])


@pytest.mark.parametrize(("name", "found"), [("nowhere", "nothing there"), ("empty", "a folder"), ("file", "a file")])
@pytest.mark.parametrize("read", [load, lambda path: load_all([path])])
def test_what_is_no_run_is_named(name: str, found: str, read: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    wanted = rf"^Expected `path` to be the folder of a run, with metrics.csv, got {tmp_path / name} \({found}"
    with pytest.raises(ValueError, match=wanted):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", "round,test/acc\n0,0.5,1\n"),
        ("metrics.csv", "round,test/acc\n0\n"),
        ("metrics.csv", "round,test/acc\n0,good\n"),
        ("metrics.csv", "epoch,test/acc\n0,0.5\n"),
        ("metrics.csv", 'round,test/acc\n0,"0.5\n'),
        ("config.yaml", "a: [1"),
        ("config.yaml", "- a"),
        ("config.yaml", "a: &a\n  b: *a\n"),
        ("config.yaml", "\xff\x00"),
        ("summary.json", '{"final": '),
        ("summary.json", "{}"),
        ("summary.json", "[]"),
        ("diagnostics.json", "3"),
        ("diagnostics.json", "{}"),
        ("diagnostics.json", "[" * 100_000),
        ("diagnostics.json", '{"class_names": [], "class_counts": [], "shot_groups": {}, "rounds": [{"round": 1}]}'),
    ],
)
def test_a_mangled_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(
        ValueError, match=rf"^Expected {folder / name} to be .*, got a file that cannot be read: ."
    ) as info:
        load(folder)
    assert "\n" not in str(info.value)


def test_runs_below_a_folder_are_found_once_each(fedamm_run: Path, fedavg_run: Path, tmp_path: Path) -> None:
    copies = [copied(fedavg_run, tmp_path / name) for name in ("all/b/seed_0", "all/a/seed_1", "all/a/seed_0")]
    runs: list[Run] = load_all([fedamm_run, tmp_path / "all", tmp_path / "all/a", fedamm_run])
    assert [run.path for run in runs] == [fedamm_run, *reversed(copies)]


def test_what_a_logger_has_left_in_a_run_is_no_run(fedavg_run: Path, tmp_path: Path) -> None:
    folder = copied(fedavg_run, tmp_path / "all/run")
    (folder / "csv").mkdir()
    (folder / "csv/metrics.csv").write_text("epoch,step\n0,0\n")
    assert [run.path for run in load_all([tmp_path / "all"])] == [folder]


FILES = ["metrics.csv", "config.yaml", "summary.json", "diagnostics.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("read", [load, lambda path: load_all([path.parent])])
def test_nothing_is_read_through_a_link(name: str, read: Any, tmp_path: Path) -> None:
    whole, folder = a_run(tmp_path / "whole"), a_run(tmp_path / "all/run")
    (folder / name).unlink()
    for target in (whole / name, tmp_path / "nowhere"):
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=rf"^Expected {folder / name} to be .*, got .*: it is a link$"):
            read(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_waited_for(name: str, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"^Expected {folder / name} to be .*, got .*: it is not a regular file$"):
        load(folder)


def test_reading_runs_loads_nothing_that_draws(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    code = f"""
import sys
import fedamm_pl
before = set(sys.modules)
from fedamm_pl.results.runs import load
run = load({str(folder)!r})
loaded = set(sys.modules) - before
assert not [name for name in loaded if name.startswith("matplotlib") or "figure" in name], loaded
assert list(run.figures()) == ["class_counts", "accuracy", "class_accuracy"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_row_that_is_being_written_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_run(tmp_path) / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole[:-4])

    def finish(_: float) -> None:
        path.write_text(whole)

    monkeypatch.setattr("fedamm_pl.results.reading.time.sleep", finish)
    assert load(tmp_path).history[-1]["test/acc_few"] == 0.25


def test_a_file_without_a_last_line_break_is_read(tmp_path: Path) -> None:
    path = a_run(tmp_path) / "metrics.csv"
    path.write_text(path.read_text().rstrip())
    assert load(tmp_path).history[-1]["test/acc_few"] == 0.25


def test_runs_of_an_earlier_version_tell_what_was_averaged_by_their_rows(tmp_path: Path) -> None:
    run = load(a_run(tmp_path))
    assert run.summary is not None
    assert "num_averaged" not in run.summary
    assert run.num_averaged == 3
    assert load(a_run(tmp_path, num_averaged=2)).num_averaged == 2
