"""What a run makes of a validation set and of what clients hold out: rows, the best round, an early end, each client's accuracy."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.algorithms import CReFF, FedRoD
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.checkpoint import load_checkpoint, save_checkpoint
from fedamm_pl.federation.executors import Processes
from fedamm_pl.federation.local_test import client_means, over_clients
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.summary import best_is, stalled, summarize, table
from tests.federation.small import assert_equal, federation
from tests.tiny import tiny_data

SETS: dict[str, Any] = {"num_val_per_class": 5, "local_test_fraction": 0.25, "partition": "iid"}


def run(**options: Any) -> Orchestrator:
    data = tiny_data(**{**SETS, **options.pop("data", {})})
    return federation(options.pop("algorithm", FedAvg), data, options.pop("method", {"lr": 0.05}), **options)


def read(folder: Path, name: str = "summary.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


def lines(folder: Path, name: str = "clients.csv") -> list[list[str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(num_rounds=6, output_dir=folder, keep_checkpoints=1).run()
    return folder


# Choosing the best round: by hand


def row(round_num: int, val: float, test: float, loss: float = 1.0) -> dict[str, float]:
    return {"round": round_num, "val/acc": val, "test/acc": test, "test/loss": loss, "local/acc_mean": test / 2}


HISTORY = [row(0, 0.9, 0.9), row(5, 0.3, 0.5, 0.7), row(10, 0.6, 0.4, 0.9), row(15, 0.6, 0.8, 0.2), row(20, 0.5, 0.7)]
"""Round 0 counts as little as the second of two equals."""


def test_every_best_is_of_the_round_that_validation_chooses() -> None:
    best = summarize(HISTORY)["best"]
    assert {name: entry["round"] for name, entry in best.items()} == dict.fromkeys(best, 10)
    assert (best["test/acc"]["value"], best["test/loss"]["value"], best["local/acc_mean"]["value"]) == (0.4, 0.9, 0.2)
    assert "validation" in best_is(HISTORY[0])
    without = [{name: value for name, value in row.items() if name != "val/acc"} for row in HISTORY]
    assert summarize(without)["best"]["test/acc"] == {"value": 0.8, "round": 15}
    assert "chosen on the test set" in best_is(without[0])


def test_the_table_says_on_what_the_best_was_chosen() -> None:
    assert table(HISTORY).splitlines() == [
        "test accuracy, %           all      val  clients",
        "final                    70.00    50.00    35.00",
        "best (on validation)     40.00    60.00    20.00",
        "mean of last 4           60.00    50.00    30.00",
    ]


@pytest.mark.parametrize(("patience", "rounds"), [(None, None), (1, 15), (2, 20), (3, None)])
def test_patience_by_hand(patience: int | None, rounds: int | None) -> None:
    """The best is that of round 10: round 15 is no better, round 20 the second that is not."""
    ends = [len(part) for part in (HISTORY[:n] for n in range(1, 6)) if stalled(part, patience)]
    assert (HISTORY[ends[0] - 1]["round"] if ends else None) == rounds
    if rounds == 20:
        reason = "val/acc has not risen above the 60.00% of round 10 for 2 evaluations (early_stopping 2)"
        assert stalled(HISTORY, patience) == reason


def test_without_a_validation_set_nothing_stalls() -> None:
    assert stalled([{"round": n, "test/acc": 0.5} for n in range(9)], 1) is None


# Rows and files


def test_each_row_has_what_one_measures_by_hand() -> None:
    orchestrator = run(num_rounds=2)
    history = orchestrator.run()
    module, data = orchestrator.module.eval(), orchestrator.data
    tests = [name for name in history[0] if name.startswith("test/")]
    assert all({name.replace("test/", "val/") for name in tests} <= row.keys() for row in history)
    images, labels = (torch.cat(part) for part in zip(*data.val_dataloader(), strict=True))
    held = []
    with torch.no_grad():
        hits = module(images).argmax(1) == labels
        for mine in data.local_test:
            found = module(data.images.train_images[mine]).argmax(1) == data.images.train_labels[mine]
            held.append(found.double().mean().item())
    assert history[-1]["val/acc"] == pytest.approx(hits.float().mean().item())
    assert history[-1]["val/acc_class_2"] == pytest.approx(hits[labels == 2].float().mean().item())
    assert orchestrator.state.client_accuracies["latest"] == held
    assert history[-1]["local/acc_mean"] == pytest.approx(sum(held) / 4)
    assert history[-1]["local/acc_worst_tenth"] == min(held)
    assert orchestrator.evaluate()["val/acc"] == history[-1]["val/acc"]


def test_means_over_clients_by_hand() -> None:
    """Of 25 clients the worst two, 0.00 and 0.04; clients without examples are left out."""
    accuracies = [number / 25 for number in range(25)]
    found = over_clients([math.nan, *reversed(accuracies)])
    assert found == pytest.approx(
        {"local/acc_mean": 0.48, "local/acc_std": math.sqrt((25**2 - 1) / 12) / 25, "local/acc_worst_tenth": 0.02}
    )
    assert over_clients([math.nan]) == {}
    assert client_means(torch.tensor([1, 0, 1, 1]), [0, 3, 1])[1:] == [pytest.approx(2 / 3), 1.0]


def test_the_files_of_a_run(finished: Path) -> None:
    columns = lines(finished, "metrics.csv")[0]
    kinds = [name.partition("/")[0] for name in columns]
    assert kinds[: kinds.index("local")] == ["round", *["test"] * 9, *["val"] * 9][: kinds.index("local")]
    summary, orchestrator = read(finished), run()
    assert (summary["validation_examples"], summary["clients_without_local_test"]) == (20, 0)
    assert summary["local_test_examples"] == sum(map(len, orchestrator.data.local_test))
    assert len({entry["round"] for entry in summary["best"].values()}) == 1
    header, *rows = lines(finished)
    assert header == ["client", "examples", "local_test_examples", "accuracy", "accuracy_best_round"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [int(row[1]) for row in rows] == [orchestrator.data.client_size(client) for client in range(4)]
    assert [int(row[2]) for row in rows] == [len(mine) for mine in orchestrator.data.local_test]
    for column, kind in ((3, "final"), (4, "best")):
        value = summary[kind]["local/acc_mean"]
        value = value["value"] if kind == "best" else value
        assert sum(float(row[column]) for row in rows) / 4 == pytest.approx(value)
    assert read(finished, "diagnostics.json")["client_accuracies"] == [float(row[3]) for row in rows]


def test_the_best_model_is_delivered_beside_the_last(finished: Path) -> None:
    best = read(finished)["best"]["val/acc"]["round"]
    assert best < 6
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {
        f"round_{number:06d}.ckpt" for number in (best, 6)
    }
    for name, round_num in (("best.ckpt", best), ("final.ckpt", 6)):
        module = FedAvg.load_from_checkpoint(finished / name, map_location="cpu", trust_model=True)
        state = load_checkpoint(finished / f"checkpoints/round_{round_num:06d}.ckpt").state
        assert_equal(module.shared_state(), state.shared)


def test_a_best_round_whose_checkpoint_is_gone_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Removing(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            if record.round_num == 6:
                for path in (tmp_path / "checkpoints").iterdir():
                    path.unlink()

    orchestrator = run(num_rounds=6, output_dir=tmp_path, keep_checkpoints=1, callbacks=[Removing()])
    orchestrator.run()
    assert "best.ckpt is left out: Expected" in caplog.text
    assert not (tmp_path / "best.ckpt").exists()
    assert (tmp_path / "final.ckpt").exists()
    assert_equal(orchestrator.module.shared_state(), orchestrator.state.shared)


def test_without_the_options_nothing_of_it_is_there(tmp_path: Path) -> None:
    federation(output_dir=tmp_path).run()
    assert not any(name.startswith(("val/", "local/")) for name in lines(tmp_path, "metrics.csv")[0])
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {
        *("partition.json", "metrics.csv", "diagnostics.json", "summary.json", "final.ckpt", "checkpoints")
    }
    assert not {"validation_examples", "local_test_examples", "clients_without_local_test"} & set(read(tmp_path))
    assert "client_accuracies" not in read(tmp_path, "diagnostics.json")


def test_a_client_of_one_example_holds_none_out_and_has_no_accuracy(tmp_path: Path) -> None:
    options = {"num_clients": 60, "partition": "by_dirichlet", "dirichlet_alpha": 0.1, "min_client_size": 0}
    orchestrator = run(num_rounds=0, data={**options, "num_val_per_class": 0}, output_dir=tmp_path)
    (row,) = orchestrator.run()
    sizes = [orchestrator.data.client_size(client) for client in range(60)]
    held = [len(mine) for mine in orchestrator.data.local_test]
    assert 1 in sizes
    assert all((size + number <= 1) == (number == 0) for size, number in zip(sizes, held, strict=True))
    found = orchestrator.state.client_accuracies["latest"]
    assert [math.isnan(value) for value in found] == [number == 0 for number in held]
    measured = [value for value in found if not math.isnan(value)]
    assert row["local/acc_mean"] == pytest.approx(sum(measured) / len(measured))
    assert [line[3] == "" for line in lines(tmp_path)[1:]] == [number == 0 for number in held]
    assert read(tmp_path)["clients_without_local_test"] == held.count(0) > 0


def test_callbacks_cannot_take_their_names() -> None:
    class Claiming(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            run.log("val/acc", 1.0)

    with pytest.raises(ValueError, match="Expected `name` to be new in the row of the round, got val/acc"):
        federation(callbacks=[Claiming()]).run()


# The same bits


def test_measuring_more_changes_no_bit_of_the_training() -> None:
    with_all, without = run(num_rounds=2), run(num_rounds=2)
    without.evaluator.measure = lambda state: ({"test/acc": 0.5, "test/loss": 1.0}, None)  # type: ignore[method-assign]
    with_all.run()
    without.run()
    assert_equal(with_all.state.shared, without.state.shared)


@pytest.mark.parametrize("algorithm", [FedAvg, FedRoD])
def test_a_continued_run_writes_the_files_of_an_uninterrupted_one(algorithm: type[FedAvg], tmp_path: Path) -> None:
    options: dict[str, Any] = {"algorithm": algorithm, "early_stopping": 4}
    whole = run(num_rounds=5, output_dir=tmp_path / "whole", **options).run()
    run(num_rounds=3, output_dir=tmp_path / "parts", **options).run()
    (tmp_path / "parts/clients.csv").write_text("mangled")
    assert run(num_rounds=5, output_dir=tmp_path / "parts", **options).run() == whole
    for name in ("metrics.csv", "clients.csv", "best.ckpt", "final.ckpt"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_clients_in_processes_see_the_same_split() -> None:
    with_processes = run(num_rounds=2, executor=Processes(num_workers=2, threads_per_worker=1))
    assert with_processes.run() == run(num_rounds=2).run()


# What clients have of their own


def test_own_logits_are_measured_on_what_is_held_out(tmp_path: Path) -> None:
    orchestrator = run(algorithm=FedRoD, num_rounds=3, local_epochs=2, output_dir=tmp_path)
    history = orchestrator.run()
    assert history[0]["local/acc_own"] == pytest.approx(history[0]["local/acc_mean"])
    own = orchestrator.state.client_accuracies["own"]
    assert history[-1]["local/acc_own"] == pytest.approx(sum(own) / 4)
    assert lines(tmp_path)[0][3:] == ["accuracy", "accuracy_best_round", "accuracy_own"]
    assert own != orchestrator.state.client_accuracies["latest"]


# An early end


def stopped(patience: int | None, num_rounds: int = 30, **options: Any) -> Orchestrator:
    return run(num_rounds=num_rounds, early_stopping=patience, method={"lr": 0.1}, **options)


def test_a_run_ends_early_and_stays_so_until_it_gets_more_patience(tmp_path: Path) -> None:
    folder = {"output_dir": tmp_path / "run"}
    orchestrator = stopped(1, **folder)
    history = orchestrator.run()
    rounds = orchestrator.state.round_num
    assert 1 < rounds < 30
    assert history[-1]["val/acc"] <= max(row["val/acc"] for row in history[1:-1])
    assert read(tmp_path / "run")["ended"] == orchestrator.state.ended
    assert "(early_stopping 1)" in str(orchestrator.state.ended)
    again = stopped(1, **folder)
    assert again.run() == history
    assert (again.state.round_num, read(tmp_path / "run")["resumes"]) == (rounds, 0)
    more, whole = stopped(3, **folder), stopped(3, output_dir=tmp_path / "whole")
    assert more.run() == whole.run()
    assert more.state.ended == whole.state.ended
    assert more.state.round_num > rounds
    assert_equal(more.state.shared, whole.state.shared)
    assert read(tmp_path / "run")["resumes"] == 1


def test_less_patience_ends_a_run_that_has_stalled_before_its_next_round(tmp_path: Path) -> None:
    first = stopped(None, 12, output_dir=tmp_path)
    history = first.run()
    assert stalled(history, 2)
    second = stopped(2, output_dir=tmp_path)
    assert second.run() == history
    assert second.state.ended == stalled(history, 2)


def test_what_a_callback_has_ended_is_not_taken_up_again(tmp_path: Path) -> None:
    class Stopping(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            if record.round_num == 2:
                run.stop("enough")

    stopped(9, output_dir=tmp_path, callbacks=[Stopping()]).run()
    again = stopped(20, output_dir=tmp_path)
    again.run()
    assert (again.state.ended, again.state.round_num) == ("enough", 2)


def test_at_its_last_round_no_run_ends_early() -> None:
    early = stopped(1)
    early.run()
    on_time = stopped(1, early.state.round_num)
    on_time.run()
    assert on_time.state.ended is None
    assert on_time.state.round_num == early.state.round_num


def test_without_a_validation_set_it_is_refused() -> None:
    message = (
        "Expected `num_val_per_class` to be 1 or more, or data with a validation set, for `early_stopping` 3, got none"
    )
    with pytest.raises(ValueError, match=message):
        federation(early_stopping=3)
    with pytest.raises(ValueError, match="Expected `early_stopping` to be 1 or more or null, got 0"):
        run(early_stopping=0)


def test_a_method_that_calibrates_at_the_end_does_so_when_it_ends_early(tmp_path: Path) -> None:
    method = {"match_steps": 2, "retrain_steps": 2, "lr": 0.1}
    orchestrator = run(algorithm=CReFF, method=method, num_rounds=12, early_stopping=1, output_dir=tmp_path)
    history = orchestrator.run()
    best = read(tmp_path)["best"]["val/acc"]
    assert best == {"value": max(row["val/acc"] for row in history[1:]), "round": best["round"]}
    module = CReFF.load_from_checkpoint(tmp_path / "best.ckpt", map_location="cpu", trust_model=True)
    images, labels = (torch.cat(part) for part in zip(*orchestrator.data.val_dataloader(), strict=True))
    with torch.no_grad():
        found = (module.eval()(images).argmax(1) == labels).float().mean().item()
    assert found == pytest.approx(best["value"])


# What a folder holds


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        ({"best": [0.5] * 4}, "its client_accuracies lack the latest"),
        ({"latest": [0.5] * 3}, "the accuracy at each of 4 clients, got another number of them"),
        ({"latest": "high"}, "its client_accuracies is no"),
    ],
)
def test_accuracies_of_other_clients_are_refused(accuracies: Any, message: str, tmp_path: Path) -> None:
    first = run(num_rounds=1, output_dir=tmp_path)
    first.run()
    with first.opened() as seen:
        seen.state.client_accuracies = accuracies
        for path in (tmp_path / "checkpoints").iterdir():
            path.unlink()
        save_checkpoint(tmp_path / "checkpoints", seen.state, seen.fingerprint, seen.environment)
    again = run(num_rounds=2, output_dir=tmp_path)
    with pytest.raises(ValueError, match="Expected") as caught, again.opened():
        pass
    if "another number" in message:
        assert message in str(caught.value)
    else:
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "checkpoints/round_000001.ckpt")
