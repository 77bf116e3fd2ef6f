"""The files of a run directory."""

import csv
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.algorithms.fedamm import LOSS_GRID
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.callbacks.files import diagnostics, summary
from fedamm_pl.federation.contents import Diagnostics, Summary
from fedamm_pl.federation.run import Run
from tests.federation.executors.methods import HalfReadable
from tests.federation.small import Recorder, assert_equal, federation
from tests.tiny import tiny_data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five rounds of FedAMM, of which 0, 2, 4 and 5 are evaluated."""
    folder = tmp_path_factory.mktemp("finished")
    federation(FedAMM, num_rounds=5, eval_interval=2, output_dir=folder).run()
    return folder


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_these_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {".lock"}
    assert names == {"partition.json", "metrics.csv", "diagnostics.json", "summary.json", "final.ckpt", "checkpoints"}
    assert not list(finished.rglob("*.tmp"))


# metrics.csv


@pytest.mark.parametrize(("name", "described"), [("summary", Summary), ("diagnostics", Diagnostics)])
def test_all_fields_of_a_file_are_described(name: str, described: Any, finished: Path) -> None:
    found = read(finished / f"{name}.json").keys()
    assert described.__required_keys__ <= found <= described.__annotations__.keys()
    source = inspect.getsource(described)
    assert source.count('"""') == 2 * (
        1 + len(described.__annotations__)
    )  # each has its sentence, which the reference shows


def test_what_only_some_runs_have_is_described_too(tmp_path: Path) -> None:
    data = tiny_data(num_val_per_class=1, local_test_fraction=0.3)
    federation(FedAMM, data, num_rounds=1, output_dir=tmp_path).run()
    assert read(tmp_path / "summary.json").keys() == Summary.__annotations__.keys()
    assert read(tmp_path / "diagnostics.json").keys() == Diagnostics.__annotations__.keys()


def test_metrics_have_a_row_for_each_evaluated_round(finished: Path) -> None:
    found = rows(finished / "metrics.csv")
    assert [float(row["round"]) for row in found] == [0, 2, 4, 5]
    columns = list(found[0])
    assert columns[0] == "round"
    tests = [name.startswith("test/") for name in columns[1:]]
    assert tests == sorted(tests, reverse=True)
    assert found[0]["client/loss"] == ""  # nobody has trained
    assert 0 <= float(found[-1]["test/acc"]) <= 1
    assert float(found[-1]["client/meta_loss"]) > 0


def test_a_metric_that_comes_late_gets_a_column(tmp_path: Path) -> None:
    class Late(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            if record.round_num == 2:
                run.log("late", 7)

    federation(num_rounds=3, output_dir=tmp_path, callbacks=[Late()]).run()
    assert [row["late"] for row in rows(tmp_path / "metrics.csv")] == ["", "", "7.0", ""]


# Checkpoints


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_checkpoints_and_the_best_are_kept(keep: int, tmp_path: Path) -> None:
    run = federation(num_rounds=6, keep_checkpoints=keep, output_dir=tmp_path)
    history = run.run()
    accuracies = [row["test/acc"] for row in history[1:]]
    best = 1 + accuracies.index(max(accuracies))
    found = {int(path.stem.removeprefix("round_")) for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {best, *range(7 - keep, 7)}


def test_the_final_checkpoint_is_one_of_lightning(finished: Path) -> None:
    module = FedAMM.load_from_checkpoint(finished / "final.ckpt", map_location="cpu", trust_model=True)
    again = federation(FedAMM, num_rounds=5, eval_interval=2)
    again.run()
    assert_equal(dict(module.state_dict()), dict(again.module.state_dict()))
    assert module.info == again.data.info
    assert module.predict_step(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 4)


# summary.json


def test_the_summary_says_what_a_round_costs_in_two_figures(tmp_path: Path) -> None:
    recorder = Recorder()
    run = federation(FedAMM, num_rounds=4, eval_interval=2, output_dir=tmp_path, callbacks=[recorder])
    run.run()
    found = read(tmp_path / "summary.json")
    assert set(found["seconds_per_round"]) == {"clients", "evaluate", "other"}
    assert set(found["client_seconds_per_round"]) == {"train", "meta"}
    assert found["seconds_per_round"] == {name: value / 4 for name, value in run.state.seconds.items()}
    assert found["client_seconds_per_round"]["meta"] == pytest.approx(
        sum(record.client_seconds["meta"] for record in recorder.records) / 4
    )
    assert found["bytes_per_round"]["sent"] == run.state.bytes_total["sent"] / 4
    assert found["bytes_per_round"]["sent_per_client"] == run.state.bytes_total["sent"] / 8
    assert (found["stopped"], found["ended"], found["diverged"]) == (None, None, None)
    assert (found["method"], found["seed"], found["num_rounds"], found["uses_meta_set"]) == ("FedAMM", 0, 4, True)
    assert found["hardware"]["accelerator"] == "cpu"
    assert found["hardware"]["precision"] == "32-true"
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["model"] == "tests.tiny.tiny_resnet"
    assert found["num_parameters"] == sum(value.numel() for value in run.module.model.parameters())
    assert found["class_counts"] == [57, 33, 19, 11]  # of 58, 33, 19, 11, by clients of 30 each
    assert found["imbalance_factor"] == 11 / 57  # of those, not the 0.2 that was asked for
    assert found["IF"] == pytest.approx(57 / 11)
    assert found["unused_images"] == 1
    assert set(found["versions"]) >= {"fedamm_pl", "python", "torch"}


def test_the_summary_counts_what_went_wrong(tmp_path: Path) -> None:
    data = HalfReadable("tiny", num_clients=8, num_meta_per_class=2, imbalance_factor=0.2, partition="iid")
    federation(FedAvg, data, client_fraction=1.0, output_dir=tmp_path).run()
    found = read(tmp_path / "summary.json")
    assert {name: found[name] for name in ("failed_clients", "refused_updates", "failed_rounds", "resumes")} == {
        "failed_clients": 2,
        "refused_updates": 0,
        "failed_rounds": 0,
        "resumes": 0,
    }


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    class Nan(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            run.state.history[-1]["test/loss"] = float("nan")
            run.state.history[-1]["test/acc_few"] = float("inf")

    federation(num_rounds=1, output_dir=tmp_path, callbacks=[Nan()]).run()
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["final"]["test/loss"] is None


def test_a_summary_needs_no_folder() -> None:
    run = federation(num_rounds=0)
    run.run()
    with run.opened() as seen:
        assert summary(seen)["num_rounds"] == 0


def test_a_class_that_nobody_holds_has_no_reciprocal() -> None:
    options = {"num_clients": 40, "partition": "by_shards", "shards_per_client": 1, "imbalance_factor": 0.02, "seed": 5}
    run = federation(data=tiny_data(**options), num_rounds=0)
    run.run()
    with run.opened() as seen:
        found = json.loads(json.dumps(summary(seen), allow_nan=False))
    assert found["class_counts"] == [27, 10, 3, 0]
    assert (found["imbalance_factor"], found["IF"], found["unused_images"]) == (0.0, None, 38)


# diagnostics.json


def test_the_file_describes_data_and_rounds(finished: Path) -> None:
    content = read(finished / "diagnostics.json")
    assert content["class_counts"] == np.array(content["client_class_counts"]).sum(0).tolist()
    assert content["losses"] == pytest.approx(LOSS_GRID)
    assert [row["round"] for row in content["rounds"]] == [0, 2, 4, 5]
    total = read(finished / "summary.json")["bytes_per_round"]
    assert content["rounds"][-1]["bytes"] == pytest.approx(5 * (total["received"] + total["sent"]))
    for row in content["rounds"]:
        assert set(row["seconds"]) == {"clients", "evaluate", "other"}
        assert set(row["client_seconds"]) == {"train", "meta"}
    shown = [set(row) >= {"weight_per_class", "loss_histogram"} for row in content["rounds"]]
    assert shown == [False, True, True, True]


def without_seconds(folder: Path) -> dict[str, Any]:
    content = read(folder / "diagnostics.json")
    for row in content["rounds"]:
        del row["seconds"], row["client_seconds"]
    return content


def test_a_continued_run_writes_the_file_of_an_uninterrupted_one(tmp_path: Path, finished: Path) -> None:
    options: dict[str, Any] = {"eval_interval": 2, "output_dir": tmp_path}
    federation(FedAMM, num_rounds=2, **options).run()
    (tmp_path / "diagnostics.json").write_text("mangled")
    federation(FedAMM, num_rounds=5, **options).run()
    assert without_seconds(tmp_path) == without_seconds(finished)


def test_callbacks_see_the_diagnostics_of_their_round() -> None:
    seen: list[int] = []

    class Watch(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            seen.append(diagnostics(run)["rounds"][-1]["round"])

    federation(FedAvg, num_rounds=3, eval_interval=2, callbacks=[Watch()]).run()
    assert seen == [0, 0, 2, 3]
