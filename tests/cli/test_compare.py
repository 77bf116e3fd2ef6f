"""``fedamm compare``: the whole configuration is checked before the first run starts."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamm_pl import algorithms
from fedamm_pl.cli.main import main
from fedamm_pl.results.comparison import PlannedRun
from tests.results.handmade import ACCURACIES, a_summary

Planned = Callable[..., list[Any]]
OWN = """
from fedamm_pl import FedAvg
class Fixed(FedAvg):
    def __init__(self, num_classes: int, model: str = "small_cnn"):
        super().__init__(num_classes, 1, model)
class PerClass(FedAvg):
    def __init__(self, num_classes: int, in_channels: int, weights: list[float], info=None, model: str = "mlp"):
        super().__init__(num_classes, in_channels, model, info=info)
        if len(weights) != len(info["class_names"]):
            raise ValueError(f"Expected `weights` to be {len(info['class_names'])} numbers, got {len(weights)}.")
        assert "Conv2d" not in str(self.model)
class Open(FedAvg):
    def __init__(self, **others):
        super().__init__(**others)
"""
BASE = {"algorithm": {"model": "small_cnn"}, "federation": {"num_rounds": 3}, "executor": "Processes"}


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The runs that a comparison would start."""
    runs: list[Any] = []

    def planned(*words: str, **changes: Any) -> list[Any]:
        content = {"base": BASE, "methods": {"FedAvg": None, "FedAMM": {"meta_lr": 0.1}}, "seeds": [0, 1], **changes}
        (tmp_path / "table.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        main(["compare", "--config", "table.yaml", *words])
        return runs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda found, *_, **__: runs.extend(found) or [])
    return planned


def test_runs_have_whole_configurations(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    runs = planned()
    configs = [yaml.safe_load(run.config) for run in runs]
    assert [config["algorithm"]["class_path"] for config in configs] == ["fedamm_pl.FedAvg"] * 2 + [
        "fedamm_pl.FedAMM"
    ] * 2
    assert [config["seed"] for config in configs] == [0, 1, 0, 1]
    assert configs[2]["algorithm"]["init_args"]["meta_lr"] == 0.1
    for config in configs:
        assert config["executor"]["class_path"] == "fedamm_pl.federation.executors.Processes"
        assert config["federation"]["local_epochs"] == 5
    assert [run.num_rounds for run in runs] == [3] * 4
    assert capsys.readouterr().out.endswith(f"results in {Path('runs/table')}\n")


def test_every_method_may_be_compared(planned: Planned) -> None:
    fixed = {"class_path": "FedAMM", "families": "fixed"}  # by the shot groups, which the data say
    runs = planned(methods={**dict.fromkeys(algorithms.__all__), "class-aware": fixed}, seeds=[0])
    assert len(runs) == len(algorithms.__all__) + 1


def test_class_of_ones_own_need_not_take_what_the_data_say(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_method.py").write_text(OWN)
    monkeypatch.syspath_prepend(Path.cwd())
    assert len(planned(methods={"own_method.Fixed": None, "own_method.Open": {"lr": 0.1}}, seeds=[0])) == 2


def test_class_of_ones_own_is_checked_with_the_real_data(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(".")
    base = {**BASE, "algorithm": {}, "data": {"dataset": "digits", "num_clients": 2}}
    assert len(planned(base=base, methods={"mine.PerClass": {"weights": [1.0] * 10}}, seeds=[0])) == 1
    with pytest.raises(SystemExit):
        planned(base=base, methods={"mine.PerClass": {"weights": [1.0] * 7}}, seeds=[0])
    assert "Expected --algorithm.weights to be 10 numbers, got 7." in capsys.readouterr().err


def test_an_explicit_null_reaches_the_run(planned: Planned) -> None:
    methods = {"without a head": {"class_path": "Moon", "projection": None}, "Moon": None}
    configs = [yaml.safe_load(run.config)["algorithm"]["init_args"] for run in planned(methods=methods, seeds=[0])]
    assert [config["projection"] for config in configs] == [None, 256]


def test_runs_follow_the_groups(planned: Planned) -> None:
    runs = planned(groups={"with images": ["FedAMM"]})
    assert [run.method for run in runs] == ["FedAMM"] * 2 + ["FedAvg"] * 2


def test_folder_is_where_it_is_told(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    planned("--dir", "elsewhere")
    assert capsys.readouterr().out.endswith("results in elsewhere\n")
    assert Path("elsewhere/results.csv").exists()


VALIDATED = {**BASE, "data": {"num_val_per_class": 5}}
TUNING = {"seeds": [100], "methods": {"FedAMM": [{"meta_lr": 0.2}, {"meta_lr": 0.3}]}}


def made_up(runs: list[PlannedRun], jobs: int, metric: str = "", begin: Any = None) -> list[PlannedRun]:
    """Write the summaries of runs; the first to try candidates has failed."""
    for run in runs[bool(metric) :]:
        results = {**ACCURACIES, "val/acc": 0.5}
        run.folder.mkdir(parents=True)
        (run.folder / "summary.json").write_text(json.dumps(a_summary(final=results, mean_last_10=results)))
    return runs[: bool(metric)]


def test_tuned_methods_run_with_what_was_chosen(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", made_up)
    with pytest.raises(SystemExit) as stop:
        planned(base=VALIDATED, tuning=TUNING)
    printed = capsys.readouterr()
    assert printed.out.startswith("2 tuning runs, then 4 reported runs\nFedAMM: meta_lr 0.3\n")
    assert (stop.value.code, printed.err) == (1, "fedamm: error: 1 of 6 runs failed: FedAMM: meta_lr 0.2, seed 100\n")
    assert "Could not be chosen: FedAMM with meta_lr 0.2 (seed 100 failed)." in printed.out
    assert Path("runs/table/tuning.csv").read_text().count("True") == 1
    shutil.rmtree("runs/table/FedAMM")
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda runs, *_, **__: found.extend(runs) or [])
    found: list[PlannedRun] = []
    planned(base=VALIDATED, tuning=TUNING)
    rates = [yaml.safe_load(run.config)["algorithm"]["init_args"].get("meta_lr") for run in found]
    assert rates == [0.2, 0.3, None, None, 0.3, 0.3]


def test_a_candidate_that_stopped_by_itself_is_not_tried_again(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers: list[int] = []

    def stopping(runs: list[PlannedRun], *words: Any, **more: Any) -> list[PlannedRun]:
        numbers.append(len(runs))
        failed = made_up([run for run in runs if not run.finished], *words, **more)
        for run in failed:
            run.folder.mkdir(parents=True)
            (run.folder / "summary.json").write_text(json.dumps(a_summary(stopped="3 failed rounds in a row")))
        return failed

    monkeypatch.setattr("fedamm_pl.cli.compare.execute", stopping)
    planned(base=VALIDATED, tuning=TUNING)
    assert "Could not be chosen: FedAMM with meta_lr 0.2 (seed 100 stopped)." in capsys.readouterr().out
    planned(base=VALIDATED, tuning=TUNING)
    assert "Could not be chosen: FedAMM with meta_lr 0.2 (seed 100 stopped)." in capsys.readouterr().out
    assert numbers == [2, 4, 1, 4]


def test_nothing_is_run_where_no_candidate_can_be_chosen(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda runs, *_, **__: ran.append(len(runs)) or runs)
    with pytest.raises(SystemExit) as stop:
        planned(base=VALIDATED, tuning=TUNING)
    error = capsys.readouterr().err
    assert (stop.value.code, ran, error.count("\n")) == (2, [2], 1)
    assert "candidate of FedAMM whose runs are whole, got none (meta_lr 0.2: seed 100 failed; meta_lr 0.3: " in error


def test_data_may_bring_the_validation_set(planned: Planned) -> None:
    Path("data").mkdir()
    lines = [f"{row % 7}.5,{row},{row % 2},{part}" for part in ("train", "val", "test") for row in range(40)]
    Path("data/mine.csv").write_text("\n".join(["a,b,label,part", *lines, ""]))
    data = {
        "dataset": "mine.csv",
        "split_column": "part",
        "num_clients": 2,
        "num_meta_per_class": 2,
        "imbalance_factor": 1,
    }
    with pytest.raises(SystemExit):  # it has got as far as to choose among runs that the fixture does not run
        planned(base={**BASE, "data": data}, tuning=TUNING)
    assert Path("runs/table/tuning.csv").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"methods": {"FedAvg": {"meta_lr": 0.1}}}, ["FedAvg has no option meta_lr"]),
        ({"methods": {"fedamm": None}}, ["--algorithm", "did you mean FedAMM?"]),
        ({"methods": {"A": {"class_path": "FedAvg", "lr": 0}}}, ["A: Expected --algorithm.lr to be"]),
        ({"methods": {"FedAvg": {"lr": None}}}, ["--algorithm.lr", "null"]),
        ({"methods": {}}, ["--methods"]),
        ({"grid": {"federation.client_fraction": [0.5, 3]}}, ["FedAvg: Expected --federation.client_fraction to be"]),
        ({"grid": {"federation.client_timeout": [3]}}, ["client_timeout; did you mean --executor.client_timeout?"]),
        ({"grid": {"executor.num_workers": [0]}}, ["num_workers"]),
        ({"grid": {"data.imbalance_factor": [2]}}, ["FedAvg: Expected --data.imbalance_factor to be in (0, 1], got 2.0."]),
        ({"grid": {"trainer.devices": [3]}}, ["FedAvg: Expected --trainer.devices to be"]),
        ({"jobs": -1}, ["--jobs", "0 or more, got -1"]),
        ({"seed": [0]}, ["unknown option seed; did you mean --seeds?"]),
        ({"grid": {"seed": [5, 6]}}, ["Expected --seeds to give the seeds of all settings, got --seed in the grid."]),
        ({"grid": {"data.seed": [5, 6]}}, ["--seed in place of --data.seed"]),
        ({"grid": {"algorithm.num_classes": [5, 6]}}, ["--algorithm.num_classes to be left to the data"]),
        ({"grid": {"output.dir": ["a", "b"]}}, ["the grid to give FedAvg other options", "output.dir a, seed 0 and output.dir b, seed 0"]),
        ({"grid": {"algorithm.lr": [0.1, 0.2]}, "methods": {"FedAvg": {"lr": 0.05}}}, ["the grid to give FedAvg other options in each"]),
        ({"groups": {"a": ["FedAvg"], "b": ["FedAvg"]}}, ["Expected --groups to hold each method once, got FedAvg twice."]),
        ({"groups": {"a": ["FedProx"]}}, ["Expected --groups to hold one of --methods, FedAvg, FedAMM, got FedProx."]),
        ({"groups": {"a": "FedAvg"}}, ["Expected --groups to be"]),
        ({"tuning": TUNING}, ["--data.num_val_per_class to be 1 or more, or data with a validation set, for", "got none"]),
        ({"base": VALIDATED, "tuning": TUNING, "seeds": [100]}, ["`tuning.seeds` to be others than --seeds", "100 in both"]),
        ({"base": VALIDATED, "tuning": {**TUNING, "methods": {"A": [{}]}}}, ["one of --methods, FedAvg, FedAMM, got A."]),
        ({"base": VALIDATED, "tuning": {**TUNING, "methods": {"FedAMM": [{"lr": -1}]}}}, ["FedAMM: lr -1: Expected --algorithm.lr to be a number above 0"]),
        ({"base": VALIDATED, "tuning": {**TUNING, "methods": {"FedAvg": [{"mu": 1}]}}}, ["FedAvg has no option mu"]),
        ({"base": VALIDATED, "tuning": {**TUNING, "methods": {"FedAMM": [{"lr": 1}, {"lr": 1.0}]}}}, ["lr 1 and lr 1.0, which are the same"]),
        ({"base": VALIDATED, "tuning": {"seeds": [9]}}, ["required, but not given: --tuning.methods"]),
        ({"base": VALIDATED, "tuning": {**TUNING, "seed": [9]}}, ["unknown option seed; did you mean --tuning.seeds?"]),
        ({"base": VALIDATED, "tuning": [1]}, ["--tuning"]),
        ({"base": VALIDATED, "tuning": {"seeds": ["a"], "methods": {"FedAMM": [{}]}}}, ["Expected --tuning.seeds to be int, got a"]),
        ({"base": VALIDATED, "tuning": {"seeds": [9], "methods": {"FedAMM": {}}}}, ["Expected --tuning.methods to be list"]),
        ({"base": VALIDATED, "tuning": {"seeds": [9], "methods": {"FedAMM": [{"init_args": 3}]}}}, ["FedAMM: Expected options of an"]),
        ({"methods": {"FedAvg": {"init_args": 3}}}, ["FedAvg: Expected options of an algorithm to be a mapping, got {'init_args': 3}"]),
        ({"base": {"algorithm": "FedAvg"}}, ["FedAvg: Expected options of an algorithm to be a mapping, got 'FedAvg'"]),
    ],
)  # fmt: skip
def test_mistake_is_found_before_the_first_run(
    changes: dict[str, Any], parts: list[str], planned: Planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        planned(**changes)
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith("fedamm: error: ")
    for part in parts:
        assert part in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["table.yaml"]


@pytest.mark.parametrize(("count", "end"), [(5, "seed 4\n"), (7, "seed 4; and 2 more\n")])
def test_many_unfinished_runs_are_counted(
    count: int, end: str, planned: Planned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda found, *_, **__: list(found))
    with pytest.raises(SystemExit):
        planned("--jobs", "0", methods={"FedAvg": None}, seeds=list(range(count)))
    error = capsys.readouterr().err
    assert error.startswith(f"fedamm: error: {count} of {count} runs are not finished: FedAvg, seed 0; ")
    assert error.endswith(end)


def test_a_stopped_comparison_says_how_to_go_on(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fedamm_pl.cli.compare.execute", execute)
    with pytest.raises(SystemExit) as stop:
        planned()
    assert stop.value.code == 130
    assert "stopped by SIGINT; the same command continues: " in capsys.readouterr().err


def test_help_shows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in (
        "--config",
        "--base",
        "--methods",
        "--seeds",
        "--grid",
        "--dir",
        "--jobs",
        "--tuning",
        "Number of runs at the same time",
    ):
        assert name in shown
