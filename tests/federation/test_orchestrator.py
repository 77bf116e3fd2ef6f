"""Rounds, executors and callbacks on the tiny problem."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.checkpoint import load_checkpoint
from fedamm_pl.federation.executors import SequentialExecutor
from fedamm_pl.federation.intake import client_metrics
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import Answer, ClientResult, ClientTask, Question
from fedamm_pl.seeding import derive_seed
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

ALGORITHMS = [FedAvg, FedAMM]
CPU = TrainerConfig(accelerator="cpu", precision="32-true")


def make(algorithm: type[FederatedModule], data: TinyData, **options: Any) -> FederatedModule:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, options.pop("model", "tests.tiny.tiny_resnet"), info=data.info, **options)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learns_and_leaves_the_final_weights_in_the_module(algorithm: type[FederatedModule]) -> None:
    data = tiny_data(augmentation="none")
    module = make(algorithm, data, lr=0.05)
    run = Orchestrator(module, data, num_rounds=6, client_fraction=1.0, local_epochs=3, eval_interval=4, trainer=CPU)
    history = run.run()
    assert [row["round"] for row in history] == [0, 4, 6]
    assert history[-1]["test/acc"] > 0.6  # chance is 0.25
    assert_equal(module.shared_state(), run.state.shared)
    assert run.evaluate()["test/acc"] == history[-1]["test/acc"]


def executor_results(
    executor: SequentialExecutor, module: FederatedModule, data: TinyData, clients: Iterable[int]
) -> dict[int, ClientResult]:
    state = make(type(module), data).shared_state()
    tasks = [ClientTask(1, client, derive_seed(0, "client", 1, client), 2, state) for client in clients]

    def answer(question: Question) -> Answer:
        return module.answer(question, data.meta_batch(derive_seed(0, "meta", question.client_id)))

    results = list(executor.run(module, data.client, tasks, answer))
    assert [result.client_id for result in results] == list(clients)
    return {result.client_id: result for result in results}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_order_of_clients_changes_nothing(algorithm: type[FederatedModule]) -> None:
    data, executor = tiny_data(), SequentialExecutor(CPU)
    module = make(algorithm, data)
    forwards = executor_results(executor, module, data, [0, 1, 2, 3])
    backwards = executor_results(executor, module, data, [3, 2, 1, 0])
    for client, result in forwards.items():
        assert_equal(result.payload, backwards[client].payload)
        assert result.metrics == backwards[client].metrics


def test_results_are_detached_and_keep_the_keys_of_the_module() -> None:
    data = tiny_data()
    module = make(FedAMM, data)
    result = executor_results(SequentialExecutor(CPU), module, data, [2])[2]
    assert set(result.payload) == {name for name in module.state_dict() if name.startswith(("model.", "weight_net."))}
    assert not any(value.requires_grad for value in result.payload.values())
    assert set(result.metrics) == {"loss", "meta_loss"}
    assert result.meta_seconds > 0
    assert module.session is None


def test_dropout_is_a_function_of_the_seed_and_leaves_global_randomness_alone() -> None:
    data = tiny_data()
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, NUM_CLASSES))
    module = make(FedAvg, data, model=network)
    state = module.shared_state()
    payloads = []
    for _ in range(2):
        torch.rand(3)
        before = torch.random.get_rng_state()
        task = ClientTask(1, 0, 7, 1, state)
        (result,) = SequentialExecutor(CPU).run(module, data.client, [task], lambda question: Answer({}))
        assert torch.equal(torch.random.get_rng_state(), before)
        payloads.append(result.payload)
    assert_equal(*payloads)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resumed_run_equals_uninterrupted_run(algorithm: type[FederatedModule], tmp_path: Any) -> None:
    data = tiny_data()

    def run(num_rounds: int, folder: str) -> Orchestrator:
        module = make(algorithm, data)
        options: dict[str, Any] = {
            "local_epochs": 1,
            "eval_interval": 2,
            "trainer": CPU,
            "output_dir": tmp_path / folder,
        }
        orchestrator = Orchestrator(module, data, num_rounds=num_rounds, **options)
        orchestrator.run()
        return orchestrator

    whole = run(4, "whole")
    run(2, "halves")
    halves = run(4, "halves")
    assert_equal(halves.state.shared, whole.state.shared)
    assert halves.state.history == whole.state.history
    assert (tmp_path / "halves/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


class FedAvgM(FedAvg):
    """Server momentum (Hsu et al., 2019): an algorithm whose server remembers more than it sends out."""

    def server_update(self, state: Any, results: Iterable[ClientResult], server: Any) -> Any:
        sent = self.broadcast(state, server)
        new = dict(super().server_update(sent, results, server))
        for name, _ in self.named_parameters():
            velocity = 0.5 * state.get(f"velocity.{name}", torch.zeros_like(sent[name])) + new[name] - sent[name]
            new[name], new[f"velocity.{name}"] = sent[name] + velocity, velocity
        return new


def test_server_may_remember_more_than_it_sends_and_resumes_with_it(tmp_path: Any) -> None:
    data = tiny_data()
    for folder, stops in (("whole", [4]), ("halves", [2, 4])):
        for num_rounds in stops:
            options: dict[str, Any] = {"local_epochs": 1, "trainer": CPU, "output_dir": tmp_path / folder}
            run = Orchestrator(make(FedAvgM, data), data, num_rounds=num_rounds, **options)
            run.run()
    whole = load_checkpoint(tmp_path / "whole/checkpoints/round_000004.ckpt").state
    assert_equal(run.state.shared, whole.shared)
    assert any(name.startswith("velocity.") for name in whole.shared)


def test_run_that_ends_where_another_stopped_is_evaluated_there(tmp_path: Any) -> None:
    data = tiny_data()

    class Stop(FederationCallback):
        def on_round_end(self, orchestrator: Orchestrator, record: RoundRecord) -> None:
            if record.round_num == 4:  # before its checkpoint is written
                raise KeyboardInterrupt

    options: dict[str, Any] = {"local_epochs": 1, "eval_interval": 2, "trainer": CPU, "output_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        Orchestrator(make(FedAvg, data), data, num_rounds=9, callbacks=[Stop()], **options).run()
    history = Orchestrator(make(FedAvg, data), data, num_rounds=3, **options).run()
    assert [row["round"] for row in history] == [0, 2, 3]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 3


def test_other_data_of_the_same_options_is_refused(tmp_path: Any) -> None:
    class Other(TinyData):
        pass

    data = tiny_data()
    Orchestrator(make(FedAvg, data), data, num_rounds=1, output_dir=tmp_path, trainer=CPU).run()
    other = Other(**data.hparams)
    with pytest.raises(ValueError, match=r"data is '.*Other' but was 'tests.tiny.TinyData'"):
        Orchestrator(make(FedAvg, data), other, num_rounds=1, output_dir=tmp_path, trainer=CPU)


def test_options_that_are_no_primitives_survive_a_checkpoint(tmp_path: Any) -> None:
    class WithPath(TinyData):
        def __init__(self, folder: Path, **options: Any) -> None:
            super().__init__(**options)

    def run(num_rounds: int) -> None:
        data = WithPath(folder=tmp_path, num_clients=4, num_meta_per_class=2, imbalance_factor=0.2)
        Orchestrator(make(FedAvg, data), data, num_rounds=num_rounds, output_dir=tmp_path, trainer=CPU).run()

    run(1)
    run(2)
    assert (tmp_path / "checkpoints/round_000002.ckpt").exists()


def test_state_that_does_not_travel_is_refused() -> None:
    class Private(FedAvg):
        shared = ("model.conv1.",)

    data = tiny_data()
    with pytest.raises(ValueError, match=r"`shared` of Private to cover the whole state, .* without model.bn1"):
        Orchestrator(make(Private, data), data, num_rounds=1)


def test_module_without_normalisation_is_refused() -> None:
    data = tiny_data()
    with pytest.raises(ValueError, match=r"Expected `info` of the module to be data\.info"):
        Orchestrator(FedAvg(NUM_CLASSES, 1, "tests.tiny.tiny_resnet"), data, num_rounds=1)


def test_trained_module_can_be_tested_with_gradients_enabled() -> None:
    data = tiny_data()
    run = Orchestrator(make(FedAvg, data), data, num_rounds=1, local_epochs=1, trainer=CPU)
    expected = run.run()[-1]["test/acc"]
    with quiet():
        trainer = pl.Trainer(accelerator="cpu", inference_mode=False, logger=False, enable_progress_bar=False)
        (metrics,) = trainer.test(run.module, datamodule=data, verbose=False)
    assert metrics["test/acc"] == expected


class Recorder(FederationCallback):
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.records: list[RoundRecord] = []

    def on_run_start(self, orchestrator: Orchestrator) -> None:
        self.calls.append("run_start")

    def on_client_end(self, orchestrator: Orchestrator, result: ClientResult) -> None:
        self.calls.append(f"client {result.client_id}")
        assert not result.payload

    def on_round_end(self, orchestrator: Orchestrator, record: RoundRecord) -> None:
        self.calls.append(f"round {record.round_num}")
        self.records.append(record)

    def on_run_end(self, orchestrator: Orchestrator) -> None:
        self.calls.append("run_end")


def test_callbacks_see_every_stage_and_alter_nothing() -> None:
    data, recorder = tiny_data(), Recorder()
    options: dict[str, Any] = {"num_rounds": 2, "client_fraction": 1.0, "local_epochs": 1, "trainer": CPU}
    watched = Orchestrator(make(FedAvg, data), data, callbacks=[recorder], **options)
    watched.run()
    clients = [f"client {client}" for client in range(4)]
    assert recorder.calls == ["run_start", "round 0", *clients, "round 1", *clients, "round 2", "run_end"]
    assert [record.evaluated for record in recorder.records] == [True, False, True]
    alone = Orchestrator(make(FedAvg, data), data, **options)
    alone.run()
    assert_equal(watched.state.shared, alone.state.shared)


def test_uniform_aggregation_gives_every_client_the_same_weight() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.5, min_client_size=4)
    weights: dict[str, list[float]] = {}

    class Weights(FedAvg):
        def server_update(self, state: Any, results: Iterable[ClientResult], server: Any) -> Any:
            def seen() -> Iterator[ClientResult]:
                for result in results:
                    weights.setdefault(aggregation, []).append(result.weight)
                    yield result

            return super().server_update(state, seen(), server)

    for aggregation in ("uniform", "num_examples"):
        options: dict[str, Any] = {
            "aggregation": aggregation,
            "client_fraction": 1.0,
            "local_epochs": 1,
            "trainer": CPU,
        }
        Orchestrator(make(Weights, data), data, num_rounds=1, **options).run()
    assert weights["uniform"] == [1.0] * 4
    assert weights["num_examples"] == [data.client_size(client) for client in range(4)]
    assert len(set(weights["num_examples"])) > 1


def test_clients_without_examples_are_left_out() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.01, min_client_size=0, num_clients=30)
    empty = [client for client in range(30) if data.client_size(client) == 0]
    assert empty
    recorder = Recorder()
    options: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 1, "callbacks": [recorder], "trainer": CPU}
    Orchestrator(make(FedAMM, data), data, num_rounds=1, **options).run()
    assert [result.client_id for result in recorder.records[1].results] == sorted(set(range(30)) - set(empty))


def test_round_of_empty_clients_fails_and_keeps_the_state() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.01, min_client_size=0, num_clients=30)
    options: dict[str, Any] = {"client_fraction": 0.03, "local_epochs": 1, "max_failed_rounds": 9, "trainer": CPU}
    run = Orchestrator(make(FedAvg, data), data, num_rounds=8, **options)
    recorder = Recorder()
    run.callbacks.append(recorder)
    run.run()
    idle = [record for record in recorder.records[1:] if not record.results]
    assert {record.failed for record in idle} == {"none of its clients holds examples"}
    assert run.state.counts["failed_rounds"] == len(idle)
    assert all("client/loss" not in record.metrics for record in idle)


def test_client_of_one_example_trains() -> None:
    data = tiny_data(num_clients=50, num_meta_per_class=2, imbalance_factor=0.05)
    assert data.client_size(0) in (1, 2)
    run = Orchestrator(make(FedAMM, data), data, num_rounds=1, local_epochs=1, trainer=CPU)
    assert run.run()[-1]["test/loss"] < float("inf")


def test_client_of_one_example_is_refused_where_batchnorm_cannot_train() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.2, min_client_size=1, num_clients=25, seed=1)
    assert any(data.client_size(client) == 1 for client in range(25))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, NUM_CLASSES))
    with pytest.raises(ValueError, match=r"Expected `min_client_size` to be 2 or more .* got client \d+ with one"):
        Orchestrator(make(FedAvg, data, model=network), data, num_rounds=1)


def test_network_that_does_not_fit_is_refused() -> None:
    data = tiny_data()
    colour = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, NUM_CLASSES))
    with pytest.raises(ValueError, match=r"Expected `model` to take images of shape \(1, 8, 8\) .*, got Sequential"):
        Orchestrator(make(FedAvg, data, model=colour), data, num_rounds=1)
    three_classes = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"logits of shape \(B, 4\), got Sequential with \(1, 3\)"):
        Orchestrator(make(FedAvg, data, model=three_classes), data, num_rounds=1)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_rounds", -1, "`num_rounds` to be 0 or more, got -1"),
        ("client_fraction", 0.0, r"`client_fraction` to be in \(0, 1\], got 0.0"),
        ("client_fraction", 1.1, r"`client_fraction` to be in \(0, 1\], got 1.1"),
        ("local_epochs", 0, "`local_epochs` to be 1 or more, got 0"),
        ("eval_interval", 0, "`eval_interval` to be 1 or more, got 0"),
        ("aggregation", "mode", "`aggregation` to be one of num_examples, uniform, median, trimmed_mean, got 'mode'"),
        ("trim_fraction", 0.6, r"`trim_fraction` to be in \(0, 0.5\], got 0.6"),
        ("max_update_norm", 0.0, "`max_update_norm` to be a number above 0 or null, got 0.0"),
        ("min_success_fraction", 1.1, r"`min_success_fraction` to be in \[0, 1\], got 1.1"),
        ("max_failed_rounds", 0, "`max_failed_rounds` to be 1 or more, got 0"),
        (
            "client_timeout",
            5.0,
            "`client_timeout` to be null with SequentialExecutor, got 5.0: .* cannot stop a client",
        ),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: Any, message: str) -> None:
    data = tiny_data()
    with pytest.raises(ValueError, match=message):
        Orchestrator(make(FedAvg, data), data, **{"num_rounds": 1, option: value})


def test_method_that_needs_a_meta_set_is_refused_without_one() -> None:
    data = tiny_data(num_meta_per_class=0)
    with pytest.raises(ValueError, match="`num_meta_per_class` to be 1 or more for FedAMM, got 0"):
        Orchestrator(make(FedAMM, data), data, num_rounds=1)
    Orchestrator(make(FedAvg, data), data, num_rounds=0).run()


def test_client_metrics_are_weighted_by_examples() -> None:
    results = [
        ClientResult(0, 30, {}, {"loss": 1.0}, bytes_received=10, bytes_sent=4),
        ClientResult(1, 10, {}, {"loss": 3.0}, bytes_received=20, bytes_sent=8),
    ]
    assert client_metrics(results) == {
        "client/loss": 1.5,
        "client/loss_std": 0.75**0.5,  # (30 * 0.5 ** 2 + 10 * 1.5 ** 2) / 40
        "client/bytes_received": 15.0,
        "client/bytes_sent": 6.0,
    }
    assert client_metrics([]) == {}
    some = [ClientResult(0, 30, {}, {"loss": 1.0, "extra": 5.0}), ClientResult(1, 10, {}, {"loss": 1.0})]
    assert client_metrics(some)["client/extra"] == 5.0


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_every_precision_runs(precision: Any) -> None:
    data = tiny_data()
    config = TrainerConfig(accelerator="cpu", precision=precision)
    module = make(FedAMM, data, differentiation="forward")
    run = Orchestrator(module, data, num_rounds=1, local_epochs=1, trainer=config)
    assert run.run()[-1]["client/meta_loss"] < 10
    expected = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert run.state.shared["model.conv1.weight"].dtype == expected
