"""Candidates, what is chosen from them, and what is written of it: with made-up runs, nothing is trained."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamm_pl.results.comparison import PlannedRun
from fedamm_pl.results.comparison_config import CompareConfig, TuningConfig
from fedamm_pl.results.comparison_files import write_results, write_tuning
from fedamm_pl.results.tuning import Trial, Tuning, choose, plan_chosen, plan_trials
from fedamm_pl.results.tuning_tables import tuning_cells, tuning_legend
from tests.results.handmade import a_summary

METHODS = {"FedAvg": None, "avg": {"class_path": "FedAvg", "lr": 0.03}, "amm": {"class_path": "FedAMM"}}
CANDIDATES = {"avg": [{"lr": 0.1}, {"lr": 0.3}], "amm": [{}, {"lr": 0.1}]}
GRID = {"data.dataset": ["a", "b"]}


def a_config(**changes: Any) -> CompareConfig:
    tuning = {"seeds": [100, 101], "methods": CANDIDATES, **changes.pop("tuning", {})}
    content = {"base": {}, "methods": METHODS, "seeds": [0, 1], "grid": GRID, **changes}
    return CompareConfig(**content, tuning=TuningConfig(**tuning))


def resolve(options: dict[str, Any]) -> tuple[str, int]:
    return yaml.safe_dump(options), 3


def finished(run: PlannedRun, val: float | None, test: float = 0.5, **changes: Any) -> None:
    """Write the summary of a run."""
    results: dict[str, Any] = {"test/loss": 1.0, "test/acc": test, "val/acc": val}
    best = {name: {"value": value, "round": 3} for name, value in results.items()}
    content = a_summary(final=results, best=best, mean_last_10=results, num_averaged=3, **changes)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "summary.json").write_text(json.dumps(content))


def tried(folder: Path, accuracies: dict[tuple[str, str], list[float]], **changes: Any) -> tuple[CompareConfig, Tuning]:
    """Trials that are finished with these validation accuracies: (method, dataset) -> of each candidate, for all seeds.

    Test accuracies are the better the worse those are: whoever chooses by them is found out.
    """
    config = a_config(**changes)
    trials = plan_trials(config, folder, resolve)
    for trial in trials:
        candidates = CANDIDATES[trial.method]
        value = accuracies[trial.method, trial.run.setting["data.dataset"]][candidates.index(trial.options)]
        if value >= 0:
            finished(trial.run, value + 0.01 * (trial.run.seed - 100), 1 - value)
    assert config.tuning is not None
    return config, choose(trials, config.tuning)


FOUND = {("avg", "a"): [0.5, 0.7], ("avg", "b"): [0.6, 0.5], ("amm", "a"): [0.5, 0.5], ("amm", "b"): [0.5, 0.5]}


def test_trials_are_every_candidate_in_every_setting_with_the_seeds_of_tuning() -> None:
    trials = plan_trials(a_config(), Path("out"), resolve)
    assert len(trials) == 4 * 2 * 2
    first = trials[0]
    assert (first.method, first.options, first.run.seed) == ("avg", {"lr": 0.1}, 100)
    assert first.run.folder == Path("out/tuning/dataset_a/avg_lr_0.1/seed_100")
    assert str(first.run) == "avg: lr 0.1, data.dataset a, seed 100"
    options = yaml.safe_load(first.run.config)
    assert options == {"algorithm": {"class_path": "FedAvg", "init_args": {"lr": 0.1}}, "data": {"dataset": "a"}, "seed": 100}  # fmt: skip
    assert {trial.run.seed for trial in trials} == {100, 101}
    assert plan_trials(CompareConfig({}, {"FedAvg": None}), Path("out"), resolve) == []


@pytest.mark.parametrize("own", [{"lr": 0.3, "mu": 1.0}, {"init_args": {"lr": 0.3, "mu": 1.0}}])
@pytest.mark.parametrize("candidate", [{"lr": 0.5}, {"init_args": {"lr": 0.5}}])
def test_a_candidate_goes_before_the_options_of_its_method(own: dict[str, Any], candidate: dict[str, Any]) -> None:
    config = a_config(methods={"FedProx": own}, grid={}, tuning={"seeds": [9], "methods": {"FedProx": [candidate]}})
    (trial,) = plan_trials(config, Path("out"), resolve)
    assert yaml.safe_load(trial.run.config)["algorithm"] == {
        "class_path": "FedProx",
        "init_args": {"lr": 0.5, "mu": 1.0},
    }


def test_one_choice_for_all_settings_is_by_the_mean_over_them(tmp_path: Path) -> None:
    config, tuning = tried(tmp_path, FOUND)
    assert [(choice.method, choice.setting) for choice in tuning.choices] == [("avg", {}), ("amm", {})]
    average, amm = tuning.choices
    assert [candidate.accuracy for candidate in average.candidates] == pytest.approx([55.5, 60.5])
    assert average.best is average.candidates[1]
    assert amm.best is amm.candidates[0]  # the first of equals
    runs = plan_chosen(config, tmp_path, resolve, tuning)
    found = [(run.method, run.setting["data.dataset"], run.seed) for run in runs]
    assert found == [(method, name, seed) for name in "ab" for method in METHODS for seed in (0, 1)]
    for run in runs:
        arguments = yaml.safe_load(run.config)["algorithm"]["init_args"]
        assert arguments == ({"lr": 0.3} if run.method == "avg" else {})
        assert run.folder == tmp_path / f"dataset_{run.setting['data.dataset']}" / run.method / f"seed_{run.seed}"


def test_each_setting_may_have_its_own_choice(tmp_path: Path) -> None:
    config, tuning = tried(tmp_path, FOUND, tuning={"per_setting": True})
    assert [choice.setting for choice in tuning.choices] == [{"data.dataset": name} for name in "abab"]
    runs = plan_chosen(config, tmp_path, resolve, tuning)
    rates = [yaml.safe_load(run.config)["algorithm"]["init_args"]["lr"] for run in runs if run.method == "avg"]
    assert rates == [0.3, 0.3, 0.1, 0.1]
    chosen = [trial for trial in tuning.trials if trial.method == "avg" and tuning.has_chosen(trial)]
    found = [(trial.options["lr"], trial.run.setting["data.dataset"]) for trial in chosen]
    assert found == [(0.1, "b")] * 2 + [(0.3, "a")] * 2
    assert "dataset a" in str(tuning_cells(tuning))
    assert "all settings" not in tuning_legend(tuning)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"diverged": {"round": 2, "reason": "nan"}}, "diverged"),
        ({"stopped": "3 failed rounds in a row"}, "stopped"),
        ({"num_rounds": 2}, "failed"),
        ({"val": None}, "has no validation accuracy"),
    ],
)
def test_one_bad_run_rules_a_candidate_out_and_is_named(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    config, tuning = tried(tmp_path, FOUND)
    bad = next(trial for trial in tuning.trials if trial.options == {"lr": 0.3} and trial.run.seed == 101)
    finished(bad.run, **{"val": 0.99, **changes})
    assert config.tuning
    again = choose(tuning.trials, config.tuning)
    assert again.choices[0].best == again.choices[0].candidates[0]
    text = write_results(tmp_path, plan_chosen(config, tmp_path, resolve, again), tuning=again)
    assert f"Could not be chosen: avg with lr 0.3 (data.dataset a, seed 101 {fault})." in text


def test_a_method_without_a_candidate_that_can_be_chosen_is_one_line(tmp_path: Path) -> None:
    config, tuning = tried(tmp_path, {**FOUND, ("avg", "b"): [-1, -1]})
    write_tuning(tmp_path, tuning)  # what there is can be looked at
    expected = r"candidate of avg whose runs are whole, got none \(lr 0.1: data.dataset b, seed 100 failed; lr 0.3: "
    with pytest.raises(ValueError, match=expected):
        plan_chosen(config, tmp_path, resolve, tuning)
    assert (tmp_path / "tuning.csv").read_text().count("failed,False") == 4


def test_results_say_what_was_tried_and_chosen(tmp_path: Path) -> None:
    config, tuning = tried(tmp_path, FOUND)
    runs = plan_chosen(config, tmp_path, resolve, tuning)
    for run in runs:
        finished(run, 0.5)
    write_tuning(tmp_path, tuning)
    text = write_results(tmp_path, runs, tuning=tuning)
    assert "| avg | lr 0.3 | 60.5 | 2 | 55.5 to 60.5 |" in text
    assert "| amm | no change | 50.5 | 2 | 50.5 to 50.5 |" in text
    assert "the highest val/acc, averaged over all settings and seeds 100, 101, which are in no table" in text
    assert "over the last 3 evaluations of each run" in text
    assert "Each method was tuned over 2 configurations." in text
    assert r"avg & lr 0.3 & 60.5 & 2" in (tmp_path / "results.tex").read_text()
    with (tmp_path / "tuning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert rows[0] == {"method": "avg", "data.dataset": "a", "options": '{"lr": 0.1}', "seed": "100", "val/acc": "50.0", "state": "finished", "chosen": "False"}  # fmt: skip
    assert [row["options"] for row in rows if row["chosen"] == "True"] == ['{"lr": 0.3}'] * 4 + ["{}"] * 4
    summaries = json.loads((tmp_path / "summaries.json").read_text())
    assert len(summaries) == 12 + 16
    assert summaries["tuning/dataset_a/avg_lr_0.1/seed_100"]["mean_last_10"]["val/acc"] == 0.5
    with (tmp_path / "results.csv").open() as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"0", "1"}
    write_results(tmp_path, runs)  # nothing is tuned any more
    assert not (tmp_path / "tuning.csv").exists()


def test_other_numbers_of_configurations_are_said(tmp_path: Path) -> None:
    more = {"avg": CANDIDATES["avg"], "amm": CANDIDATES["amm"][:1]}
    _, tuning = tried(tmp_path, FOUND, tuning={"methods": more})
    assert tuning_legend(tuning).endswith(
        "The methods were not tuned over the same number of configurations: avg on 2; amm on 1."
    )


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"seeds": [1, 100]}, r"Expected `tuning.seeds` to be others than `seeds`, which are reported, got 1 in both\."),
        ({"seeds": []}, r"Expected `tuning.seeds` and `tuning.methods` to hold something, got one that is empty\."),
        ({"methods": {}}, r"to hold something, got one that is empty\."),
        ({"methods": {"avg": []}}, r"Expected `tuning.methods` to give avg a candidate or more, got none\."),
        ({"methods": {"Avg": [{}]}}, r"to have names that are one of `methods`, FedAvg, avg, amm, got Avg\."),
        ({"methods": {"avg": [{}, {"lr": 0.03}]}}, r"candidates of avg to differ, got no change and lr 0.03, which are the"),
        ({"methods": {"amm": [{"x": "a b"}, {"x": "a_b"}]}}, r"a folder of its own, got two in out/tuning/dataset_a/amm"),
        ({"seeds": [100, 100]}, r"to give each run a folder of its own"),
    ],
)  # fmt: skip
def test_mistakes_are_found_when_it_is_planned(tuning: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_trials(a_config(tuning=tuning), Path("out"), resolve)


def test_wrong_options_of_a_candidate_name_the_candidate() -> None:
    def refuse(options: dict[str, Any]) -> tuple[str, int]:
        if options["algorithm"]["init_args"].get("lr") == 0.3:
            raise ValueError("no such rate")
        return resolve(options)

    with pytest.raises(ValueError, match=r"^avg: lr 0\.3: no such rate$"):
        plan_trials(a_config(), Path("out"), refuse)


def test_a_run_that_is_not_there_has_failed(tmp_path: Path) -> None:
    trial = plan_trials(a_config(), tmp_path, resolve)[0]
    assert isinstance(trial, Trial)
    assert trial.result[1] == "failed"
