"""The page of one run says what its files say."""

from collections.abc import Callable
from pathlib import Path

import yaml

from fedamm_pl.results.report import report
from fedamm_pl.results.runs import load
from tests.results.handmade import a_rich_run, a_run
from tests.results.pages import change, page, summary


def test_the_headline_is_that_of_the_summary(fedamm_run: Path) -> None:
    found, names = summary(fedamm_run), ["test/acc", "test/acc_many", "test/acc_medium", "test/acc_few"]
    assert page(fedamm_run).tables[0] == [
        ["test accuracy, %", "all", "many", "medium", "few"],
        ["final", *(f"{100 * found['final'][name]:.2f}" for name in names)],
        ["best on test", *(f"{100 * found['best'][name]['value']:.2f}" for name in names)],
        ["... in round", *(str(int(found["best"][name]["round"])) for name in names)],
        ["mean of last 3", *(f"{100 * found['mean_last_10'][name]:.2f}" for name in names)],
    ]
    assert "chosen on the test set and is therefore optimistic" in report([load(fedamm_run)])


def test_each_class_has_a_line(fedamm_run: Path) -> None:
    run = load(fedamm_run)
    lines = page(fedamm_run).tables[1]
    assert lines[0] == ["class", "training examples", "group", "round 0, %", "round 5, %"]
    assert [line[1] for line in lines[1:]] == ["55", "34", "21", "13", "8", "5"]
    assert [line[2] for line in lines[1:]] == ["many", "many", "medium", "medium", "few", "few"]
    for label, line in enumerate(lines[1:]):
        column = run.metrics[f"test/acc_class_{label}"].tolist()
        assert line[0] == str(label)
        assert line[3:] == [f"{100 * column[0]:.2f}", f"{100 * column[-1]:.2f}"]


def test_each_client_has_a_line(tmp_path: Path) -> None:
    folder = a_rich_run(tmp_path / "run")  # both clients have 8, 4 and 2 examples of a, b and c
    assert page(folder).tables[2] == [
        ["client", "training examples", "classes", "largest class", "its share, %"],
        ["north", "14", "3", "a", "57.14"],
        ["south", "14", "3", "a", "57.14"],
    ]
    change(folder, "diagnostics.json", client_class_counts=[[0, 3, 1], [0, 0, 0]], client_accuracies=[0.5, None])
    assert page(folder).tables[2][0][-1] == "accuracy on its own examples, %"
    assert page(folder).tables[2][1:] == [["north", "4", "2", "b", "75.00", "50.00"], ["south", "0", "0", "", "", ""]]


def test_clients_beyond_a_thousand_are_counted(tmp_path: Path) -> None:
    folder = a_rich_run(tmp_path / "run")
    change(folder, "diagnostics.json", client_class_counts=[[1, 0, 0]] * 1_200, client_names=None)
    found = page(folder)
    assert len(found.tables[2]) == 1_001
    assert "the first 1,000 of 1,200 clients" in found.texts["summary"]


def test_title_and_facts(fedamm_run: Path) -> None:
    found, content = page(fedamm_run), summary(fedamm_run)
    kilobytes = f"{content['bytes_per_round']['sent_per_client'] / 1e3:,.0f} kB"
    megabytes = (content["bytes_per_round"]["received"] + content["bytes_per_round"]["sent"]) / 1e6
    seconds = content["seconds_per_round"]
    assert found.texts["title"] == found.texts["h1"] == ["FedAMM on tiny"]
    assert found.texts["p"][0] == f"seed 0, imbalance factor 0.0909 (IF 11), {fedamm_run}"
    assert found.facts["Method"] == "FedAMM, uses the server's balanced examples"
    assert found.facts["Model"] == f"small_cnn, {content['num_parameters']:,} parameters"
    assert found.facts["Data"] == "tiny, 136 training examples in 6 classes"
    assert found.facts["Clients"] == "4, 50% of them a round, partition by_num_classes"
    assert found.facts["Rounds"] == "5 rounds, local epochs 1"
    expected = f"a client receives {kilobytes} and sends {kilobytes}, {megabytes:.2f} MB a round in all"
    assert found.facts["Bytes"] == expected
    assert found.facts["Time"].startswith(f"{sum(seconds.values()):.2f} s a round: clients ")
    assert f"evaluate {seconds['evaluate'] / sum(seconds.values()):.0%}" in found.facts["Time"]
    assert found.facts["Time"].endswith(f"meta {content['client_seconds_per_round']['meta']:.2f} s")
    assert "Incidents" not in found.facts
    assert f"torch {content['versions']['torch']}" in found.facts["Versions"]
    assert "accelerator cpu" in found.facts["Hardware"]


def test_what_nobody_uses_and_a_class_without_images_are_said(copied: Callable[..., Path]) -> None:
    folder = copied("FedAMM", "left_over")
    change(folder, "summary.json", unused_images=3, imbalance_factor=0.0, IF=None)
    found = page(folder)
    assert found.texts["p"][0] == f"seed 0, imbalance factor 0 (a class has no examples), {folder}"
    assert found.facts["Data"] == "tiny, 136 training examples in 6 classes, 3 left over by the partition"


def test_configuration_and_command_are_there(fedamm_run: Path) -> None:
    config, command = page(fedamm_run).texts["pre"]
    assert yaml.safe_load(config) == load(fedamm_run).config
    assert command == summary(fedamm_run)["command"]


def test_what_went_wrong_is_said(copied: Callable[..., Path]) -> None:
    folder = copied("FedAvg", "run")
    change(
        folder,
        "summary.json",
        failed_clients=3,
        resumes=1,
        stopped="stopped after round 5: 3 rounds in a row failed",
        diverged={"round": 4, "reason": "the test loss is nan"},
    )
    found = page(folder)
    assert found.facts["Incidents"] == "failed clients 3, resumes 1"
    assert "This run has stopped after round 5: 3 rounds in a row failed" in found.texts["p"]
    assert "The global model has diverged in round 4: the test loss is nan." in found.texts["p"]


def test_an_unfinished_run_is_reported_as_such(copied: Callable[..., Path]) -> None:
    folder = copied("FedAMM", "run")
    whole = page(folder)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[:3]))
    found = page(folder)
    assert "This run is unfinished: what follows is its state after 2 of 5 rounds." in found.texts["p"]
    assert found.tables[0][1][1] == f"{100 * load(folder).metrics['test/acc'].iloc[-1]:.2f}"
    assert [line[:4] for line in found.tables[1][1:]] == [line[:4] for line in whole.tables[1][1:]]
    assert found.facts["Bytes"] == whole.facts["Bytes"]
    assert "s a round: clients" in found.facts["Time"]


def test_a_run_that_is_hardly_begun_is_reported(copied: Callable[..., Path]) -> None:
    folder = copied("FedAMM", "run")
    for name in ("summary.json", "diagnostics.json", "config.yaml"):
        (folder / name).unlink()
    assert page(folder).tables[0][0] == ["test accuracy, %", "all", "many", "medium", "few"]
    (folder / "metrics.csv").write_text("\n")
    assert "No round has been evaluated yet." in page(folder).texts["p"]
    assert page(folder, copied("FedAvg", "other")).tables[1][1] == ["run", "", "0, unfinished", *[""] * 5, folder.name]


def test_wall_time_and_the_time_of_clients_are_told_apart(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    expected = "2.00 s a round: clients 75%, evaluate 12%, other 12%; time of all its clients added up: train 2.50 s, meta 0.50 s"
    assert page(folder).facts["Time"] == expected
    (folder / "summary.json").unlink()
    assert page(folder).facts["Time"] == expected  # the diagnostics of the rounds so far tell as much


def test_an_early_end_is_no_warning(tmp_path: Path) -> None:
    text = report([load(a_run(tmp_path / "run", ended="the <accuracy> has not risen for 3 rounds"))])
    assert "<p>This run has ended early: the &lt;accuracy&gt; has not risen for 3 rounds</p>" in text
    assert 'class="note"' not in text
    assert "ended early" not in report([load(a_run(tmp_path / "other"))])
