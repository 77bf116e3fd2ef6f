"""Runs with a validation set and local tests, from the command line to tables, figures and the report."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedamm_pl.cli.main import main
from fedamm_pl.results.client_figure import client_accuracy
from fedamm_pl.results.content import check_diagnostics, check_history
from fedamm_pl.results.runs import load
from fedamm_pl.results.tables import row, table, titles
from tests.results.handmade import a_run, a_summary
from tests.results.pages import change, page

Command = Callable[..., list[str]]
SETS = ["--data.num_val_per_class", "4", "--data.local_test_fraction", "0.2"]


@pytest.fixture(scope="module")
def validated(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "validated"
    main(command("FedAvg", folder, *SETS, "--output.figures", "true"))
    return folder


def test_it_is_read_back(validated: Path) -> None:
    run = load(validated)
    assert run.summary is not None
    best = run.results["best"]
    assert len({entry["round"] for entry in best.values()}) == 1
    accuracies = dict(zip(run.metrics["round"], run.metrics["val/acc"], strict=True))
    assert best["val/acc"]["value"] == max(value for number, value in accuracies.items() if number)
    assert {"client_accuracy", "accuracy"} <= set(run.figures())
    labels = [line.get_label() for line in run.figures()["accuracy"].axes[0].get_lines()]
    assert "validation" in labels


def test_the_report_says_on_what_the_best_was_chosen(validated: Path, fedavg_run: Path) -> None:
    alone = page(validated)
    head, _, best, *_ = alone.tables[0]
    assert head == ["test accuracy, %", "all", "many", "medium", "few", "val", "clients", "worst 10%"]
    assert best[0] == "best on validation"
    assert any("highest accuracy on the validation set" in text for text in alone.texts["p"])
    assert "24 for validation" in alone.facts["Data"]
    assert "held out by clients" in alone.facts["Data"]
    several = page(validated, fedavg_run)
    assert "best on test or validation" in [line[0] for line in several.tables[0]]
    assert any("does not compare with the other" in text for text in several.texts["p"])


def test_loggers_get_all_of_it(validated: Path) -> None:
    log = EventAccumulator(str(validated))
    log.Reload()
    tags = set(log.Tags()["scalars"])
    assert {"val/acc", "val/loss", "val/acc_many", "val/acc_class_3", "test/acc_many"} <= tags
    assert {"local/acc_mean", "local/acc_std", "local/acc_worst_tenth"} <= tags
    layout = log.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"val/acc$" in layout
    assert b"local/acc_worst_tenth" in layout


def test_the_terminal_shows_it(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        command("FedAvg", tmp_path / "run", *SETS, "--federation.early_stopping", "1", "--federation.num_rounds", "40")
    )
    shown = capsys.readouterr().out
    assert "beside the test set: 24 validation examples, " in shown
    assert " examples held out by 4 clients for local tests\n" in shown
    assert re.search(r"  val \d+\.\d%  .*  worst 10% \d+\.\d%", shown)
    assert "best (on validation)" in shown
    assert "ended after round " in shown
    assert ": val/acc has not risen above the " in shown
    main(command("FedAvg", tmp_path / "none", *SETS, "--dry_run"))
    shown = capsys.readouterr().out
    assert "an evaluation of up to 120 test examples (beside the test set: 24 validation examples, " in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--federation.early_stopping", "3"],
            "--data.num_val_per_class to be 1 or more, or data with a validation set",
        ),
        ([*SETS, "--federation.early_stopping", "0"], "--federation.early_stopping to be 1 or more or null, got 0"),
        (["--data.num_val_per_class", "-1"], "--data.num_val_per_class to be 0 or more, got -1"),
        (
            ["--data.num_val_per_class", "55"],
            "at least num_meta_per_class + num_val_per_class + 1 = 61 training examples",
        ),
        (["--data.local_test_fraction", "1"], "--data.local_test_fraction to be in [0, 1), got 1"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(command("FedAvg", tmp_path / "run", *options))
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 2
    assert not (tmp_path / "run" / "metrics.csv").exists()


# Tables


def with_validation(**changes: Any) -> dict[str, Any]:
    plain = a_summary()
    more = {"final": {**plain["final"], "val/acc": 0.5}, "mean_last_10": {**plain["mean_last_10"], "val/acc": 0.5}}
    best = {**plain["best"], "val/acc": {"value": 0.5, "round": 3}}
    return {**plain, **more, "best": best, "num_averaged": 3, **changes}


def test_titles_say_on_which_sets_the_best_is_chosen() -> None:
    assert titles([3])["best"] == titles([3], ["test", "test"])["best"] == "best on test"
    assert titles([3], ["validation"])["best"] == "best on validation"
    assert titles([3], ["validation", "test"])["best"] == "best on test or validation"


def test_a_row_says_so_where_it_is_the_validation_set() -> None:
    plain, chosen = row("a", 0, {}, a_summary(num_averaged=3)), row("b", 0, {}, with_validation())
    assert "best_on" not in plain
    assert chosen["best_on"] == "validation"
    assert "all, best on validation" in [text for text, _ in table([chosen])[0]]
    assert "all, best on test or validation" in [text for text, _ in table([plain, chosen])[0]]


# Files of strangers


def test_what_is_no_accuracy_is_refused(tmp_path: Path) -> None:
    content = json.loads((a_run(tmp_path) / "diagnostics.json").read_text())
    check_diagnostics({**content, "client_accuracies": [0.5, None, 1.0]})
    for wrong in ([2.0], ["a"], {}, 1):
        with pytest.raises(ValueError, match="client_accuracies"):
            check_diagnostics({**content, "client_accuracies": wrong})
    with pytest.raises(ValueError, match="val/acc in row 1"):
        check_history(["round", "test/acc", "val/acc"], [{"round": 0.0, "test/acc": 0.5, "val/acc": 1e9}])


def test_a_best_round_that_lacks_a_metric_is_reported(tmp_path: Path) -> None:
    summary = with_validation()
    summary["final"]["personal/acc"] = 0.75
    folder = a_run(tmp_path)
    change(folder, "summary.json", **summary)
    head, final, best, rounds, last = page(folder).tables[0]
    assert (head[-1], final[-1], best[-1], rounds[-1], last[-1]) == ("personal", "75.00", "", "", "")


# The figure


@pytest.mark.parametrize("number", [1, 2, 20, 5000])
def test_the_clients_are_drawn_by_accuracy(number: int) -> None:
    figure = client_accuracy([(index * 7 % number) / number for index in range(number)])
    (axes,) = figure.axes
    (stairs,) = axes.patches
    heights = stairs.get_data().values  # type: ignore[attr-defined]
    assert len(heights) == number
    assert list(heights) == sorted(heights)
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels[0] == f"mean over the clients, {100 * (number - 1) / 2 / number:.1f}"


def test_few_clients_are_drawn_by_their_names() -> None:
    (axes,) = client_accuracy([0.9, 0.1, 0.5], ["north", "south", "east"]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["south", "east", "north"]
    (axes,) = client_accuracy([0.5] * 30, [f"client {k}" for k in range(30)]).axes
    assert len(axes.get_xticks()) < 30


def test_the_accuracy_of_clients_is_drawn_against_their_size_and_number_of_classes() -> None:
    figure = client_accuracy([0.9, 0.1, 0.5], ["a", "b", "c"], [400, 20, 100], [5, 1, 3])
    _, by_size, by_classes = figure.axes
    for axes, expected in ((by_size, [400, 20, 100]), (by_classes, [5, 1, 3])):
        (points,) = axes.get_lines()
        assert list(points.get_xdata()) == expected
        assert list(points.get_ydata()) == pytest.approx([90, 10, 50])
    assert by_size.get_xscale() == "log"


def test_clients_file_is_one_that_other_programs_read(validated: Path) -> None:
    with (validated / "clients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["client"] for row in rows] == ["0", "1", "2", "3"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
