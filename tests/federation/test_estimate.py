import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from fedamm_pl import FedAMM, FedAvg, FederatedModule
from fedamm_pl.algorithms import CCVR, FedRoD
from fedamm_pl.data.client import BatchLoader
from fedamm_pl.federation.estimate import estimate, surveyed
from fedamm_pl.federation.executors.sequential import SequentialRunner
from fedamm_pl.federation.orchestrator import FederationError
from tests.federation.executors.methods import Scripted
from tests.federation.small import federation
from tests.tiny import tiny_data


@pytest.mark.parametrize("algorithm", [FedAvg, FedAMM])
def test_the_estimate_counts_the_bytes_of_a_round_and_leaves_the_run_alone(
    algorithm: type[FederatedModule], tmp_path: Path
) -> None:
    run = federation(algorithm, tiny_data(partition="iid"), num_rounds=1, output_dir=tmp_path / "run")
    plain = federation(algorithm, tiny_data(partition="iid"), num_rounds=1)
    cost = estimate(run)
    assert list(tmp_path.iterdir()) == []
    assert run.run() == plain.run()
    assert cost.received == run.state.bytes_total["received"]
    assert cost.sent == run.state.bytes_total["sent"]
    assert all(getattr(cost, name) > 0 for name in ("train", "evaluate"))
    assert (cost.meta > 0) == (algorithm is FedAMM)


def test_the_cost_of_evaluating_is_spread_over_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedamm_pl.federation import estimate as module

    run = federation(eval_interval=10)
    monkeypatch.setattr(module.time, "perf_counter", iter(range(0, 1000, 5)).__next__)
    assert estimate(run).evaluate == 0.5


def test_a_client_without_examples_costs_nothing() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.01, min_client_size=0, num_clients=30)
    sizes = [data.client_size(client) for client in range(30)]
    run = federation(data=data, client_fraction=1.0)
    assert 0 in sizes
    per_client = sum(value.nbytes for value in run.state.shared.values())
    assert estimate(run).sent == pytest.approx(per_client * sum(size > 0 for size in sizes))


def test_personal_state_is_what_a_client_begins_with() -> None:
    run = federation(Scripted)
    estimate(run)
    assert int(run.module.own.visits) == 10  # type: ignore[union-attr, arg-type]


def test_the_estimate_says_why_a_client_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    run = federation(FedAvg)
    monkeypatch.setattr(FedAvg, "training_step", fail)
    with pytest.raises(FederationError, match=r"client \d failed \(training\): RuntimeError: no memory"):
        estimate(run)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("update", ["asynchronous", "synchronous"])
def test_more_epochs_than_are_measured_are_calculated(update: str) -> None:
    data = tiny_data(partition="iid")
    run = federation(FedAMM, data, {"meta_update": update}, num_rounds=1, local_epochs=5)
    cost = estimate(run)
    assert cost.epochs == 2
    run.run()
    assert (cost.received, cost.sent) == (run.state.bytes_total["received"], run.state.bytes_total["sent"])


def test_of_a_method_without_questions_one_epoch_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    train = SequentialRunner.run

    def watched(runner: Any, broadcast: Any, *args: Any) -> Any:
        epochs.append(broadcast.local_epochs)
        return train(runner, broadcast, *args)

    monkeypatch.setattr(SequentialRunner, "run", watched)
    cost = estimate(federation(FedAvg, local_epochs=5))
    assert (set(epochs), cost.epochs) == ({1}, 1)


def test_what_is_measured_beside_the_test_set_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 test, 20 validation and the held-out images, the first and the last once more for the clients' own models."""
    data = {"num_val_per_class": 5, "local_test_fraction": 0.25, "partition": "iid"}
    run = federation(FedRoD, tiny_data(**data), eval_interval=1)
    held = sum(map(len, run.data.local_test))
    passes: list[int] = []
    visit = BatchLoader.__iter__

    def counted(loader: BatchLoader) -> Any:
        passes.append(len(loader.indices))
        return visit(loader)

    monkeypatch.setattr(BatchLoader, "__iter__", counted)
    estimate(run)
    assert passes[-3:] == [held, 80, held]
    assert {80, 20} <= set(passes[:-3])
    monkeypatch.setattr("fedamm_pl.federation.estimate.QUICK", 0.0)
    monkeypatch.setattr("fedamm_pl.federation.estimate.time.perf_counter", iter(range(1000)).__next__)
    assert estimate(run).evaluate == pytest.approx((80 + 20 + held + 80 + held) / 80)


def test_the_statistics_of_all_clients_are_counted_where_each_evaluation_takes_them() -> None:
    costs = [
        estimate(federation(CCVR, method={"calibrate": when}, eval_interval=1)).evaluate
        for when in ("end", "evaluations")
    ]
    run = federation(CCVR, method={"calibrate": "evaluations"})
    with run.executor.open(run.spec()) as runner:
        assert surveyed(run, runner) > 0
    assert all(cost > 0 for cost in costs)


def test_of_a_test_set_that_takes_long_a_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedamm_pl.federation.estimate.QUICK", 0.0)
    run = federation(data=tiny_data(test_batch_size=1))
    monkeypatch.setattr(run.evaluator, "measure", lambda *_: pytest.fail("it measures all of them"))
    cost, images = estimate(run), len(run.data.images.test_labels)
    assert cost.test_images == -(-images // 10) < images
    assert cost.evaluate > 0
