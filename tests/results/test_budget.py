"""Methods compared at the same bytes instead of the same rounds."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedamm_pl.federation.summary import curve, summarize, within
from fedamm_pl.results.budget import at_equal_bytes
from fedamm_pl.results.comparison import PlannedRun, plan
from fedamm_pl.results.comparison_config import CompareConfig
from fedamm_pl.results.comparison_files import finished, write_results
from fedamm_pl.results.content import check_summary
from tests.results.handmade import a_summary


def a_history(rounds: int, seed: int) -> list[dict[str, float]]:
    draw = np.random.default_rng(seed).random
    return [
        {"round": number, **{name: draw() for name in ("test/acc", "test/acc_few", "val/acc")}}
        for number in range(rounds + 1)
    ]


def spent(rounds: int, each: float) -> list[dict[str, float]]:
    return [{"round": number, "bytes": number * each} for number in range(rounds + 1)]


@pytest.mark.parametrize("stop", [1, 4, 12, 20])
def test_a_part_of_a_run_is_the_run_that_ended_there(stop: int) -> None:
    history = a_history(20, 0)
    whole = {
        **summarize(history),
        "num_averaged": 10,
        "num_rounds": 20,
        "seed": 5,
        "curve": curve(history, spent(20, 7.0)),
    }
    part = within(whole, 7.0 * stop + 6.9)
    assert part == {
        **summarize(history[: stop + 1]),
        "num_averaged": min(10, stop),
        "num_rounds": stop,
        "seed": 5,
        "curve": whole["curve"],
    }
    assert within(whole, 6.9) is None  # the evaluation before the first round is not one


def test_rounds_whose_bytes_are_unknown_are_not_in_the_curve() -> None:
    history = a_history(3, 0)
    found = curve(history, spent(3, 5.0)[2:])
    assert found["round"] == [2, 3]
    assert found["bytes"] == [10.0, 15.0]
    assert found["test/acc_few"] == [row["test/acc_few"] for row in history[2:]]
    assert curve(history, []) == {"round": [], "bytes": []}


def compared(folder: Path, each: dict[str, float], grid: dict[str, list[Any]] | None = None) -> list[PlannedRun]:
    """Return finished runs of 12 rounds on two seeds, of methods that exchange so many bytes a round."""
    config = CompareConfig(base={}, methods=dict.fromkeys(each), seeds=[0, 1], grid=grid or {})
    runs = plan(config, folder, lambda options: ("{}", 12))
    for run in runs:
        history = a_history(12, run.seed + 10 * len(run.method))
        mine = curve(history, spent(12, each[run.method]))
        run.folder.mkdir(parents=True)
        content = a_summary(**summarize(history), num_rounds=12, num_averaged=10, seed=run.seed, curve=mine)
        (run.folder / "summary.json").write_text(json.dumps(content))
    return runs


def test_tables_at_the_same_bytes_stand_beside_those_at_the_same_rounds(tmp_path: Path) -> None:
    runs = compared(tmp_path, {"FedAvg": 1e6, "FedAMM": 2e6, "Scaffold": 5e6}, {"data.partition": ["iid", "by_shards"]})
    write_results(tmp_path, runs)
    before = (tmp_path / "results.md").read_bytes()
    text = write_results(tmp_path, runs, budget="bytes")
    assert (tmp_path / "results.md").read_bytes() == before
    assert (tmp_path / "results_bytes.md").read_text() == text
    assert "Mean number of rounds until then: FedAvg 12.0, FedAMM 6.0, Scaffold 2.0." in text
    assert "all, mean of last 2 to 10" in text
    with (tmp_path / "results_bytes.csv").open() as file:
        lines = list(csv.DictReader(file))
    for run, line in zip(runs, lines, strict=True):
        last = {"FedAvg": 12, "FedAMM": 6, "Scaffold": 2}[run.method]
        history = a_history(12, run.seed + 10 * len(run.method))[1 : last + 1]
        assert float(line["final/all"]) == pytest.approx(100 * history[-1]["test/acc"])
        assert float(line["mean_last_10/all"]) == pytest.approx(
            100 * np.mean([row["test/acc"] for row in history[-10:]])
        )
        assert int(line["num_rounds"]) == last
    for name in ("", "_paired", "_curves"):
        for kind in ("pdf", "png"):
            assert (tmp_path / f"results_bytes{name}.{kind}").stat().st_size > 1000


def test_the_budget_is_that_of_the_same_seed(tmp_path: Path) -> None:
    runs = compared(tmp_path, {"FedAvg": 1e6, "FedAMM": 2e6})
    path = runs[1].folder / "summary.json"  # FedAvg's clients of seed 1 hold less
    content = json.loads(path.read_text())
    content["curve"]["bytes"] = [value / 2 for value in content["curve"]["bytes"]]
    path.write_text(json.dumps(content))
    found = {str(run): part["num_rounds"] for run, part in at_equal_bytes(finished(runs))}
    assert found == {"FedAvg, seed 0": 12, "FedAvg, seed 1": 12, "FedAMM, seed 0": 6, "FedAMM, seed 1": 3}


def test_a_seed_at_which_a_run_is_not_finished_is_left_out_and_named(tmp_path: Path) -> None:
    runs = compared(tmp_path, {"FedAvg": 1e6, "FedAMM": 2e6, "Scaffold": 4e6})
    (runs[1].folder / "summary.json").unlink()
    text = write_results(tmp_path, runs, budget="bytes")
    assert "Left out at the same bytes, since a run is not finished there: seed 1." in text
    assert "Mean number of rounds until then: FedAvg 12.0, FedAMM 6.0, Scaffold 3.0." in text
    for run in runs[::2]:
        assert f"| {run.method} | 1 |" in text or f"| {run.method} † | 1 |" in text


def test_a_run_that_ended_early_is_named(tmp_path: Path) -> None:
    runs = compared(tmp_path, {"FedAvg": 1e6, "FedAMM": 2e6})
    path = runs[2].folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ended": "no better for 5 evaluations"}))
    text = write_results(tmp_path, runs, budget="bytes")
    assert "These runs ended early, which may lower the budget of their seed: FedAMM, seed 0." in text


def test_what_cannot_be_compared_at_the_same_bytes_is_refused(tmp_path: Path) -> None:
    runs = compared(tmp_path / "dear", {"FedAvg": 1e6, "Scaffold": 13e6})
    with pytest.raises(
        ValueError,
        match=r"within 12.00 MB.* got Scaffold, seed 0, which is not. Use a smaller `federation.eval_interval`",
    ):
        write_results(tmp_path, runs, budget="bytes")
    path = runs[2].folder / "summary.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "curve"})
    )
    with pytest.raises(ValueError, match=r"Expected all runs to tell their bytes .* got Scaffold, seed 0 without them"):
        write_results(tmp_path, runs, budget="bytes")
    assert not (tmp_path / "results_bytes.md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test/acc": [0.5]}, "curve.test/acc should be as long as curve.round, 2, got 1"),
        ({"round": [2, 1]}, "curve.round should rise"),
        ({"bytes": [1, "many"]}, "curve.bytes\\[1\\] should be a number"),
        ({"test/acc": [0.5, 1.5]}, "curve.test/acc\\[1\\] should be a number from 0 to 1"),
        ({"what": []}, "curve"),
    ],
)
def test_a_curve_is_checked_when_it_is_read(change: dict[str, Any], message: str) -> None:
    good = {"round": [0, 1], "bytes": [0, 9], "test/acc": [0.1, 0.5]}
    check_summary(a_summary(curve=good))
    with pytest.raises(ValueError, match=message):
        check_summary(a_summary(curve={**good, **change}))
