"""``fedamm compare``: the whole configuration is checked before the first run starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamm_pl import algorithms
from fedamm_pl.cli.main import main

Planned = Callable[..., list[Any]]
OWN = """
from fedamm_pl import FedAvg
class Fixed(FedAvg):
    def __init__(self, num_classes: int, model: str = "small_cnn"):
        super().__init__(num_classes, 1, model)
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
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda found, jobs: runs.extend(found) or [])
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


def test_folder_is_where_it_is_told(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    planned("--dir", "elsewhere")
    assert capsys.readouterr().out.endswith("results in elsewhere\n")
    assert Path("elsewhere/results.csv").exists()


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
        ({"jobs": 0}, ["--jobs", "1 or more, got 0"]),
        ({"seed": [0]}, ["unknown option seed; did you mean --seeds?"]),
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


def test_help_shows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in ("--config", "--base", "--methods", "--seeds", "--grid", "--dir", "--jobs", "Runs side by side"):
        assert name in shown
