"""A global model that has diverged is said once and recorded; a healthy one, or one that never learnt, is not."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamm_pl import FedAvg, FederatedModule, Orchestrator
from fedamm_pl.cli.main import main
from fedamm_pl.federation.evaluation import Evaluator
from fedamm_pl.federation.summary import divergence
from fedamm_pl.protocol.messages import State
from tests.faults import faulty
from tests.faults.faulty import CPU, SERVER, Plan
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

CHANCE = 1 / NUM_CLASSES
FAULTY = "tests.faults.faulty"
SAID = "the global model has diverged: "


def rows(*accuracies: float, loss: float = 1.0) -> list[dict[str, float]]:
    """A history with these accuracies and this last loss."""
    losses = [1.0] * (len(accuracies) - 1) + [loss]
    return [
        {"round": number, "test/loss": loss, "test/acc": accuracy}
        for number, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))
    ]


# With chance 0.2 a tenth of the way to 1 is 0.28, and a hundredth 0.208.


@pytest.mark.parametrize(
    ("accuracies", "diverged"),
    [
        ([0.2], False),
        ([0.9], False),
        ([0.2, 0.9], False),
        ([0.9, 0.2], True),
        ([0.9, 0.0], True),
        ([0.9, 0.207], True),
        ([0.9, 0.209], False),
        ([0.9, 0.28], False),
        ([0.281, 0.2], True),
        ([0.279, 0.2], False),
        ([0.2, 0.2, 0.2], False),
        ([0.9, 0.2, 0.9], False),
        ([0.1, 0.9, 0.8, 0.2], True),
        ([0.2, 0.1], False),
    ],
)
def test_an_accuracy_that_falls_back_to_chance_is_divergence(accuracies: list[float], diverged: bool) -> None:
    reason = divergence(rows(*accuracies), 0.2)
    assert (reason is not None) == diverged
    if reason:
        best = max(accuracies)
        expected = f"the test accuracy is {accuracies[-1]:.1%}, that of a constant guess, after {best:.1%} before"
        assert reason == expected


@pytest.mark.parametrize(
    ("best", "error", "diverged"),
    # five errors are more than a tenth of the way to 1 from 0.016 on
    [(0.281, 0.015, True), (0.281, 0.017, False), (0.299, 0.02, False), (0.301, 0.02, True), (0.69, 0.1, False)],
)
def test_what_may_have_been_a_lucky_guess_on_a_small_test_set_is_none(
    best: float, error: float, diverged: bool
) -> None:
    assert (divergence(rows(best, 0.2), 0.2, error) is not None) == diverged


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("accuracies", [[0.2], [0.2, 0.9], [0.9, 0.2]])
def test_a_loss_that_is_not_finite_is_divergence_whatever_the_accuracy(accuracies: list[float], loss: float) -> None:
    assert divergence(rows(*accuracies, loss=loss), 0.2) == f"the test loss is {loss}"


def test_only_the_last_loss_counts() -> None:
    assert divergence([*rows(0.2, loss=math.nan), {"round": 1, "test/loss": 1.0, "test/acc": 0.5}], 0.2) is None


def test_where_a_constant_guess_is_always_right_no_accuracy_is_divergence() -> None:
    assert divergence(rows(1.0, 1.0), 1.0) is None


# Whole runs


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("fedamm_pl")]
    return [record.getMessage() for record in records if SAID in record.getMessage()]


def recorded(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())["diverged"]


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def test_a_learning_rate_that_makes_the_loss_nan_is_said_once_with_its_round(
    command: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # one step a client: the weights stay finite, what they compute does not
    options = ["--algorithm.lr", "1e30", "--data.batch_size", "64", "--federation.eval_interval", "1"]
    options += ["--federation.max_failed_rounds", "99", "--logger", "false"]
    expected = {"round": 1, "reason": "the test loss is nan"}
    main(command("FedAvg", tmp_path, *options, "--federation.num_rounds", "2"))
    assert said(caplog) == [f"round 1: {SAID}the test loss is nan"]
    assert recorded(tmp_path) == expected
    losses = column(tmp_path, "test/loss")
    assert [math.isnan(loss) for loss in losses] == [False, True, True]

    # what is not finite in its history keeps nobody from going on
    main(command("FedAvg", tmp_path, *options, "--federation.num_rounds", "3"))
    assert len(said(caplog)) == 1
    assert recorded(tmp_path) == expected
    assert json.loads((tmp_path / "summary.json").read_text())["resumes"] == 1
    final = torch.load(tmp_path / "final.ckpt", weights_only=True)["state_dict"]
    assert all(bool(value.isfinite().all()) for value in final.values())


def forget(updated: State, old: State) -> State:
    """A classifier that gives every class the same logit."""
    return {name: torch.zeros_like(v) if "classifier" in name else v for name, v in updated.items()}


def forget_in(monkeypatch: pytest.MonkeyPatch, *rounds: int) -> None:
    strikes = {(round_num, SERVER) for round_num in rounds}
    monkeypatch.setattr(faulty, "plan", Plan(lambda *pair: pair in strikes, spoil=forget))


def test_an_accuracy_that_falls_back_to_chance_is_said_once_also_across_resumes(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_in(monkeypatch, 3, 4, 5)
    options = ["--federation.client_fraction", "1", "--federation.eval_interval", "1", "--logger", "false"]
    options += ["--algorithm.model", f"{FAULTY}.network", "--algorithm", f"{FAULTY}.SpoilsTheServer"]
    options += ["--data.imbalance_factor", "1", "--data.augmentation", "none"]
    for num_rounds in (2, 3, 4, 5):
        main(command("FedAvg", tmp_path, *options, "--federation.num_rounds", str(num_rounds)))
        assert len(said(caplog)) == (num_rounds >= 3)
        assert (recorded(tmp_path) is None) == (num_rounds < 3)
    accuracies = column(tmp_path, "test/acc")
    assert accuracies[2] > 0.5
    assert accuracies[3:] == [pytest.approx(1 / 6)] * 3
    reason = f"the test accuracy is 16.7%, that of a constant guess, after {max(accuracies):.1%} before"
    assert said(caplog) == [f"round 3: {SAID}{reason}"]
    assert recorded(tmp_path) == {"round": 3, "reason": reason}


def make(algorithm: type[FederatedModule], data: TinyData, lr: float) -> FederatedModule:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, f"{FAULTY}.network", info=data.info, lr=lr)


def run(algorithm: type[FederatedModule], num_rounds: int, eval_interval: int = 1, lr: float = 0.05) -> Orchestrator:
    data = tiny_data(augmentation="none", batch_size=8, partition="iid")
    options: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 1, "trainer": CPU}
    orchestrator = Orchestrator(
        make(algorithm, data, lr), data, num_rounds=num_rounds, eval_interval=eval_interval, **options
    )
    orchestrator.run()
    return orchestrator


@pytest.mark.parametrize(("best", "diverged"), [(0.49, None), (0.50, 2)])
def test_of_eighty_test_images_half_must_have_been_right(
    best: float, diverged: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chance 0.25 and five standard errors: 0.25 + 5 * sqrt(0.25 * 0.75 / 80) = 0.492."""
    measured = ({"test/loss": 1.0, "test/acc": accuracy} for accuracy in (0.25, best, 0.25))
    monkeypatch.setattr(Evaluator, "measure", lambda *_: (next(measured), None))
    state = run(FedAvg, 2).state
    assert (state.diverged and state.diverged["round"]) == diverged


def test_it_is_seen_when_it_is_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    forget_in(monkeypatch, 3, 4)
    state = run(faulty.SpoilsTheServer, 4, eval_interval=2).state
    assert [row["round"] for row in state.history] == [0, 2, 4]
    assert state.history[1]["test/acc"] > 0.5
    assert state.diverged is not None
    assert state.diverged["round"] == 4
    assert len(said(caplog)) == 1


def test_a_model_that_recovers_stays_on_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_in(monkeypatch, 2, 4)
    state = run(faulty.SpoilsTheServer, 5).state
    accuracies = [row["test/acc"] for row in state.history]
    assert accuracies[2] == accuracies[4] == CHANCE
    assert min(accuracies[1], accuracies[3], accuracies[5]) > 0.5
    assert state.diverged is not None
    assert state.diverged["round"] == 2
    assert len(said(caplog)) == 1


def test_a_healthy_run_is_not_said_to_have_diverged(
    fedavg_run: Path, fedamm_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = run(FedAvg, 3).state
    assert state.history[-1]["test/acc"] > 0.5
    assert state.diverged is None
    assert said(caplog) == []
    assert recorded(fedavg_run) is None
    assert recorded(fedamm_run) is None


def test_a_run_that_never_rose_above_chance_is_not_said_to_have_diverged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_in(monkeypatch, 1, 2, 3)
    for state in (run(FedAvg, 3, lr=1e-9).state, run(faulty.SpoilsTheServer, 3).state):
        assert max(row["test/acc"] for row in state.history) < CHANCE + 0.1 * (1 - CHANCE)
        assert state.diverged is None
    assert said(caplog) == []
