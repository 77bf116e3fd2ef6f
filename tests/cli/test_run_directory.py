"""What a run leaves in its folder, and that a run which was interrupted there ends as if it had not been."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedamm_pl import FedAMM, FedAvg, FederatedModule, __version__
from fedamm_pl.cli.main import main
from fedamm_pl.federation.callbacks import files as run_files
from fedamm_pl.federation.evaluation import Evaluator
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.protocol.messages import ClientTask, State

ROOT = Path(__file__).parent.parent.parent
CLASSES = range(6)
CLASS_COUNTS = [55, 34, 21, 13, 8, 5]  # int(55 * 0.1 ** (i / 5)), 55 = 60 - 5 meta images
SHOT_GROUPS = {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}  # cumulative shares .40 .65 | .81 .90 | .96 1
TEST_COLUMNS = ["test/loss", "test/acc", *(f"test/acc_{name}" for name in SHOT_GROUPS)]
TEST_COLUMNS += [f"test/acc_class_{label}" for label in CLASSES]
CLIENT_COLUMNS = {
    "FedAMM": ["client/loss", "client/loss_std", "client/meta_loss", "client/bytes_received", "client/bytes_sent"],
    "FedAvg": ["client/loss", "client/loss_std", "client/bytes_received", "client/bytes_sent"],
}
ALGORITHMS = {"FedAMM": FedAMM, "FedAvg": FedAvg}
CLIENTS_PER_ROUND, STEPS = 2, 5  # 34 images a client in batches of 8


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def rounds(folder: Path) -> list[int]:
    return [int(row["round"]) for row in rows(folder)]


def values(folder: Path, column: str) -> list[float]:
    """Return a column of metrics.csv without round 0."""
    return [float(row[column]) for row in rows(folder)[1:]]


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("round_")) for path in (folder / "checkpoints").iterdir())


def assert_same_result(folder: Path, expected: Path) -> None:
    """The same metrics byte for byte and the same final weights bit for bit."""
    assert (folder / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    states = [torch.load(run / "final.ckpt", weights_only=True)["state_dict"] for run in (folder, expected)]
    assert states[0].keys() == states[1].keys()
    assert not [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    for key in ("final", "best", "mean_last_10", "bytes_per_round", "num_rounds"):
        assert summary(folder)[key] == summary(expected)[key]


@pytest.fixture(params=["FedAMM", "FedAvg"])
def algorithm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def finished(algorithm: str, request: pytest.FixtureRequest) -> Path:
    """The folder of a finished run of five rounds of the algorithm."""
    return Path(request.getfixturevalue(f"{algorithm.lower()}_run"))


# Files


def test_a_run_leaves_exactly_the_promised_files(finished: Path, algorithm: str) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    best = summary(finished)["best"]["test/acc"]["round"]
    checkpoints = {f"checkpoints/round_{round_num:06d}.ckpt" for round_num in {3, 4, 5, best}}
    assert len(events) == 1
    always = {"config.yaml", "partition.json", "metrics.csv", "diagnostics.json", "summary.json", "final.ckpt", ".lock"}
    names = ["class_counts", "partition", "accuracy", "class_accuracy", "confusion"]
    names += ["weight_mapping", "class_weights"] if algorithm == "FedAMM" else []
    drawn = {f"figures/{name}.{kind}" for name in names for kind in ("pdf", "png")}
    assert files - events == checkpoints | always | drawn | {"hparams.yaml"}


def test_the_newest_checkpoints_and_the_best_are_kept(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # round 0 would be the best: it is left out, as in summary.json, once there is another
    accuracies = [0.9, 0.2, 0.5, 0.3, 0.4, 0.1, 0.2]
    measured = ({"test/loss": 1.0, "test/acc": accuracy} for accuracy in accuracies)
    monkeypatch.setattr(Evaluator, "measure", lambda *_: (next(measured), None))
    options = ("--federation.num_rounds", "6", "--federation.eval_interval", "1", "--output.keep_checkpoints", "2")
    main(command("FedAvg", tmp_path, *options))
    assert summary(tmp_path)["best"]["test/acc"] == {"value": 0.5, "round": 2}
    assert kept(tmp_path) == [2, 5, 6]


def test_a_run_without_logger_leaves_no_log(command: Any, tmp_path: Path) -> None:
    main(command("FedAvg", tmp_path, "--logger", "false", "--federation.num_rounds", "0"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.yaml",
        "partition.json",
        "metrics.csv",
        "diagnostics.json",
        "summary.json",
        "final.ckpt",
        "checkpoints",
        ".lock",
    }


# metrics.csv


def test_metrics_have_a_row_for_each_evaluated_round(finished: Path, algorithm: str) -> None:
    table = rows(finished)
    assert list(table[0]) == ["round", *TEST_COLUMNS, *CLIENT_COLUMNS[algorithm]]
    assert rounds(finished) == [0, 2, 4, 5]
    assert all(value for row in table[1:] for value in row.values())


def test_round_0_has_no_clients(finished: Path, algorithm: str) -> None:
    first = rows(finished)[0]
    assert [name for name, value in first.items() if not value] == CLIENT_COLUMNS[algorithm]


@pytest.mark.parametrize(("interval", "evaluated"), [("1", [0, 1, 2, 3]), ("3", [0, 3]), ("7", [0, 3])])
def test_the_last_round_is_always_evaluated(interval: str, evaluated: list[int], command: Any, tmp_path: Path) -> None:
    main(command("FedAvg", tmp_path, "--federation.num_rounds", "3", "--federation.eval_interval", interval))
    assert rounds(tmp_path) == evaluated


def test_group_accuracies_are_means_over_their_classes(finished: Path) -> None:
    for row in rows(finished):
        per_class = [float(row[f"test/acc_class_{label}"]) for label in CLASSES]
        for name, members in SHOT_GROUPS.items():
            expected = sum(per_class[label] for label in members) / len(members)
            assert float(row[f"test/acc_{name}"]) == pytest.approx(expected, abs=1e-6)
        # 20 test images of each class: the accuracy over all is the mean
        assert float(row["test/acc"]) == pytest.approx(sum(per_class) / len(per_class), abs=1e-6)


def test_training_lowers_the_loss_of_the_clients(finished: Path) -> None:
    after_2, after_4 = values(finished, "client/loss")[:2]
    assert after_4 < after_2 < 1.79  # log 6, that of a guess


# summary.json


def test_summary_has_the_promised_keys(finished: Path, algorithm: str) -> None:
    content = summary(finished)
    assert content["method"] == algorithm
    assert content["dataset"] == "tiny"
    assert content["model"] == "small_cnn"
    assert content["seed"] == 0
    assert content["num_rounds"] == 5
    assert content["class_counts"] == CLASS_COUNTS
    assert content["shot_rule"] == "share"
    assert content["shot_groups"] == SHOT_GROUPS
    assert (content["imbalance_factor"], content["IF"]) == (5 / 55, 11)
    assert content["versions"]["fedamm_pl"] == __version__
    assert content["versions"]["torch"] == version("torch")
    assert "test" in content["best_is"]


def test_summary_agrees_with_the_metrics(finished: Path) -> None:
    content = summary(finished)
    evaluated = rounds(finished)[1:]
    assert list(content["final"]) == list(content["best"]) == list(content["mean_last_10"]) == TEST_COLUMNS
    for column in TEST_COLUMNS:
        numbers = values(finished, column)
        pick = min if column == "test/loss" else max
        assert content["final"][column] == numbers[-1]
        assert content["best"][column]["value"] == pick(numbers)
        assert numbers[evaluated.index(content["best"][column]["round"])] == pick(numbers)
        assert content["mean_last_10"][column] == pytest.approx(sum(numbers) / len(numbers), rel=1e-12)


def test_the_mean_is_over_the_last_ten_evaluated_rounds(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = [0.0, 100.0, 100.0, *range(10)]
    measured = ({"test/loss": 1.0, "test/acc": accuracy} for accuracy in accuracies)
    monkeypatch.setattr(Evaluator, "measure", lambda *_: (next(measured), None))
    main(command("FedAvg", tmp_path, "--federation.num_rounds", "12", "--federation.eval_interval", "1"))
    assert summary(tmp_path)["mean_last_10"]["test/acc"] == 4.5
    assert summary(tmp_path)["best"]["test/acc"] == {"value": 100.0, "round": 1}


def test_seconds_are_told_apart_by_kind(finished: Path, algorithm: str) -> None:
    seconds, clients = summary(finished)["seconds_per_round"], summary(finished)["client_seconds_per_round"]
    assert list(seconds) == ["clients", "evaluate", "other"]
    assert list(clients) == ["train", "meta"]
    assert min(*seconds.values(), clients["train"]) > 0
    assert (clients["meta"] > 0.05 * clients["train"]) == (algorithm == "FedAMM")
    assert sum(clients.values()) <= seconds["clients"]  # one after the other


def test_the_summary_of_a_diverged_run_is_json(command: Any, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(f"JSON has no {constant}")

    # one step a client: the weights stay finite, what they compute does not
    options = ("--algorithm.lr", "1e30", "--data.batch_size", "64", "--federation.num_rounds", "1")
    main(command("FedAvg", tmp_path, *options))
    assert rows(tmp_path)[-1]["test/loss"] == "nan"
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)


# Bytes


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "options", "num_questions"),
    [
        ("FedAvg", [], 0),
        ("FedAMM", [], 1),
        ("FedAMM", ["--algorithm.meta_update", "synchronous"], STEPS),
        # at steps 0, 3; with the second epoch at 6, 9
        (
            "FedAMM",
            [
                *("--algorithm.meta_update", "synchronous", "--algorithm.meta_interval", "3"),
                *("--federation.local_epochs", "2"),
            ],
            4,
        ),
    ],
)
def test_bytes_are_states_questions_and_answers(
    name: str, options: list[str], num_questions: int, command: Any, tmp_path: Path
) -> None:
    """A client receives and sends the state; FedAMM's also sends w_hat and receives g, both of the parameters' size."""
    main(command(name, tmp_path, "--federation.num_rounds", "2", *options))
    module: FederatedModule = ALGORITHMS[name].load_from_checkpoint(tmp_path / "final.ckpt", weights_only=True)
    state = nbytes(module.model.state_dict().values())
    if isinstance(module, FedAMM):
        state += nbytes(module.weight_net.parameters())
    per_client = state + num_questions * nbytes(module.model.parameters())
    assert summary(tmp_path)["bytes_per_round"] == {
        "received": CLIENTS_PER_ROUND * per_client,
        "sent": CLIENTS_PER_ROUND * per_client,
        "received_per_client": per_client,
        "sent_per_client": per_client,
    }
    assert values(tmp_path, "client/bytes_sent") == [per_client]
    assert values(tmp_path, "client/bytes_received") == [per_client]


# config.yaml


def test_the_configuration_starts_the_same_run_anew(finished: Path, tmp_path: Path) -> None:
    main(["--config", str(finished / "config.yaml"), "--output.dir", str(tmp_path / "again")])
    assert_same_result(tmp_path / "again", finished)
    assert (tmp_path / "again/config.yaml").read_text() == (finished / "config.yaml").read_text()


def test_the_configuration_is_resolved_and_without_folder(finished: Path, algorithm: str) -> None:
    content = yaml.safe_load((finished / "config.yaml").read_text())
    assert content["output"] == {"keep_checkpoints": 3, "progress": "auto", "figures": True}
    assert content["algorithm"]["class_path"] == f"fedamm_pl.{algorithm}"
    assert content["algorithm"]["init_args"]["weight_decay"] == 5e-4  # a default
    assert content["data"]["init_args"]["imbalance_factor"] == 0.1  # an option


def test_another_seed_gives_another_run(finished: Path, tmp_path: Path) -> None:
    options = ["--seed", "1", "--federation.num_rounds", "2", "--output.dir", str(tmp_path)]
    main(["--config", str(finished / "config.yaml"), *options])
    assert rows(tmp_path)[1] != rows(finished)[1]


# Interruptions


def in_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in round 3, in the second client."""
    train, seen = Worker.train, []

    def interrupted(worker: Worker, task: ClientTask, kept: State) -> Any:
        assert worker._broadcast is not None
        seen.append(worker._broadcast.round_num)
        if seen.count(3) == 2:
            raise SystemExit(130)  # as on a signal
        return train(worker, task, kept)

    monkeypatch.setattr(Worker, "train", interrupted)


def before_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the process in round 4, when metrics.csv has its row already and there is no checkpoint yet."""
    save = run_files.save_checkpoint

    def killed(folder: Path, state: Any, *others: Any) -> Path:
        if state.round_num == 4:
            raise SystemExit(130)
        return save(folder, state, *others)

    monkeypatch.setattr(run_files, "save_checkpoint", killed)


@pytest.mark.parametrize(
    ("interrupt", "rows_left", "last"), [(in_a_client, [0, 2], 2), (before_a_checkpoint, [0, 2, 4], 3)]
)
def test_an_interrupted_run_ends_as_the_uninterrupted(
    interrupt: Callable[[pytest.MonkeyPatch], None],
    rows_left: list[int],
    last: int,
    algorithm: str,
    finished: Path,
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch)
        with pytest.raises(SystemExit) as stop:
            main(command(algorithm, tmp_path))
    assert stop.value.code == 130
    assert rounds(tmp_path) == rows_left
    assert kept(tmp_path)[-1] == last
    assert not (tmp_path / "final.ckpt").exists()
    main(command(algorithm, tmp_path))
    assert f"continuing after round {last}\n" in capsys.readouterr().out
    assert_same_result(tmp_path, finished)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte])
def test_a_damaged_newest_checkpoint_is_reported_and_passed_over(
    damage: Callable[[Path], None],
    algorithm: str,
    finished: Path,
    command: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage(folder / "checkpoints/round_000005.ckpt")
    main(command(algorithm, folder))
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "round_000005.ckpt" in warning
    assert "is skipped" in warning
    assert "continuing after round 4\n" in capsys.readouterr().out
    assert_same_result(folder, finished)


def test_metrics_are_cut_to_the_round_that_a_run_continues_from(
    fedavg_run: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise SystemExit(130)  # as on a signal

    folder = tmp_path / "run"
    shutil.copytree(fedavg_run, folder)
    truncate(folder / "checkpoints/round_000005.ckpt")
    monkeypatch.setattr(Worker, "train", interrupted)
    with pytest.raises(SystemExit):
        main(command("FedAvg", folder))
    assert rounds(folder) == [0, 2, 4]


def test_a_finished_run_is_left_as_it_is(algorithm: str, finished: Path, command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    main(command(algorithm, folder))
    assert_same_result(folder, finished)
    assert kept(folder) == kept(finished)


def test_more_rounds_continue_a_run(algorithm: str, finished: Path, command: Any, tmp_path: Path) -> None:
    main(command(algorithm, tmp_path, "--federation.num_rounds", "4"))
    main(command(algorithm, tmp_path, "--federation.num_rounds", "5"))
    assert_same_result(tmp_path, finished)


def test_the_interval_of_evaluation_may_change(fedavg_run: Path, command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(fedavg_run, folder)
    main(command("FedAvg", folder, "--federation.num_rounds", "7", "--federation.eval_interval", "1"))
    assert rounds(folder) == [0, 2, 4, 5, 6, 7]
    assert rows(folder)[:4] == rows(fedavg_run)


# TensorBoard


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def steps(accumulator: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in accumulator.Scalars(tag)]


def test_tensorboard_shows_the_metrics_by_round(finished: Path) -> None:
    log = events(finished)
    assert steps(log, "test/acc") == [0, 2, 4, 5]
    assert steps(log, "client/loss") == [1, 2, 3, 4, 5]
    for column, tag in {"test/acc": "test/acc", "test/acc_few": "test/acc_few", "test/loss": "test/loss"}.items():
        logged = [event.value for event in log.Scalars(tag)]
        assert logged == pytest.approx([float(row[column]) for row in rows(finished)], rel=1e-6)
    assert [event.value for event in log.Scalars("test/acc_class_0")] == pytest.approx(
        [float(row["test/acc_class_0"]) for row in rows(finished)], rel=1e-6
    )


def test_tensorboard_has_configuration_and_hyperparameters(finished: Path) -> None:
    log = events(finished)
    (text,) = log.Tensors("config/text_summary")
    assert "dataset: tiny" in text.tensor_proto.string_val[0].decode()
    content = b"".join(log.PluginTagToContent("hparams").values()).decode(errors="replace")
    assert "algorithm.lr" in content
    assert "final/all" in content


def test_tensorboard_shows_each_round_of_a_continued_run_once(
    fedavg_run: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(fedavg_run, folder)
    for round_num in (4, 5):
        (folder / f"checkpoints/round_{round_num:06d}.ckpt").unlink()
    main(command("FedAvg", folder))
    assert len(list(folder.glob("events.*"))) == 2
    assert steps(events(folder), "client/loss") == [1, 2, 3, 4, 5]
    assert steps(events(folder), "test/acc") == [0, 2, 4, 5]


# final.ckpt

ELSEWHERE = """
import json, sys
import numpy as np
import torch
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset
from fedamm_pl import FedAMM

with np.load(sys.argv[2]) as archive:
    images = torch.from_numpy(archive["x_test"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(archive["y_test"])
assert images.dtype == torch.uint8
module = FedAMM.load_from_checkpoint(sys.argv[1], weights_only=True)
trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
(metrics,) = trainer.test(module, dataloaders=DataLoader(TensorDataset(images, labels), batch_size=50), verbose=False)
mean, std = (torch.tensor(module.info[name]).view(3, 1, 1) for name in ("mean", "std"))
with torch.no_grad():
    probabilities = module.eval().predict_step(images)
    by_hand = module.model((images / 255 - mean) / std).softmax(1)
print(json.dumps({
    "metrics": metrics,
    "right": (probabilities.argmax(1) == labels).float().mean().item(),
    "sums": probabilities.sum(1).tolist(),
    "differs": (probabilities - by_hand).abs().max().item(),
    "info": module.info,
}))
"""


def test_the_final_model_gives_its_accuracy_in_another_project(
    command: Callable[..., list[str]], data_root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    main(command("FedAMM", run, "--trainer.precision", "32-true"))  # as a plain Trainer computes
    arguments = [str(run / "final.ckpt"), str(data_root / "tiny.npz")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    last = rows(run)[-1]
    accuracies = [name for name in TEST_COLUMNS if name != "test/loss"]
    assert {name: found["metrics"][name] for name in accuracies} == {name: float(last[name]) for name in accuracies}
    assert found["metrics"]["test/loss"] == pytest.approx(float(last["test/loss"]), rel=1e-5)
    assert found["right"] == float(last["test/acc"])
    assert found["sums"] == pytest.approx([1.0] * 120, abs=1e-5)
    assert found["differs"] < 1e-5
    assert found["info"]["mean"] == summary(run)["normalization"]["mean"]
    assert found["info"]["image_size"] == [12, 12]
    assert found["info"]["class_names"] == ["0", "1", "2", "3", "4", "5"]
    assert found["info"]["class_counts"] == CLASS_COUNTS
    assert found["info"]["shot_groups"] == SHOT_GROUPS


def test_the_final_model_is_the_last_checkpoint(finished: Path, algorithm: str) -> None:
    module = ALGORITHMS[algorithm].load_from_checkpoint(finished / "final.ckpt", weights_only=True)
    saved = torch.load(finished / "checkpoints/round_000005.ckpt", weights_only=True)["state"]["shared"]
    assert module.shared_state().keys() == saved.keys()
    assert not [name for name, value in module.shared_state().items() if not torch.equal(value, saved[name])]
