"""Rounds on the tiny problem: what a run computes, what it leaves behind, and how it goes on."""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator, cores
from fedamm_pl.algorithms import Scaffold
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.checkpoint import load_checkpoint
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import Sequential
from fedamm_pl.federation.orchestrator import FederationError
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import ClientResult
from tests.federation.small import CPU, Recorder, assert_equal, federation, make
from tests.tiny import tiny_data

ALGORITHMS = [FedAvg, FedAMM]


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


# Options


def test_options_are_those_of_the_configuration_in_its_place_or_beside_it() -> None:
    data = tiny_data()
    module = make(FedAvg, data)
    assert Orchestrator(module, data, num_rounds=3).config == FederationConfig(3)
    config = FederationConfig(3, local_epochs=2)
    assert Orchestrator(module, data, config).config is not None
    assert Orchestrator(module, data, config).config == config
    assert Orchestrator(module, data, config, num_rounds=4).config == FederationConfig(4, local_epochs=2)
    with pytest.raises(TypeError, match="client_timeout"):
        Orchestrator(module, data, num_rounds=1, client_timeout=5.0)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("seed", -1, "`seed` to be 0 or more, got -1"),
        ("keep_checkpoints", 0, "`keep_checkpoints` to be 1 or more, got 0"),
        ("num_rounds", -1, "`num_rounds` to be 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        federation(**{option: value})


# Constructing and opening


def test_making_one_touches_no_file_and_leaves_the_module_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    data = tiny_data()
    module = make(FedAMM, data)
    before = {name: (value.clone(), value.data_ptr()) for name, value in module.state_dict().items()}
    attributes = set(vars(module))
    for folder in ("run", "new"):
        Orchestrator(
            module, data, num_rounds=1, output_dir=tmp_path / folder, trainer=TrainerConfig("cpu", compile=False)
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "notes.txt"]
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.data_ptr() == before[name][1]
    assert set(vars(module)) == attributes
    assert module.training


def test_a_run_leaves_the_module_untouched_until_its_end() -> None:
    seen: list[bool] = []

    class Watch(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            seen.append(all(torch.equal(value, before[name]) for name, value in module.state_dict().items()))

    run = federation(callbacks=[Watch()])
    module = run.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run.run()
    assert seen == [True] * 3
    assert not torch.equal(module.state_dict()["model.conv1.weight"], before["model.conv1.weight"])


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch has two threads, the process may use one core of eight, and the user has not chosen that."""
    for name in cores.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_core")
def test_more_threads_than_cores_are_one_warning_and_stay(caplog: pytest.LogCaptureFixture) -> None:
    federation(num_rounds=2).run()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "torch has 2 threads, but may use 1 of 8 cores, and is slow for it: OMP_NUM_THREADS or torch.set_num_threads set fewer"
    ]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("one_core")
def test_more_threads_of_all_workers_than_cores_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Several(Sequential):
        workers_here = 3  # type: ignore[assignment]

    federation(num_rounds=1, executor=Several()).run()
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning == (
        "torch has 2 threads in each of 3 processes, but may use 1 of 8 cores, and is slow for it: "
        "OMP_NUM_THREADS or num_workers and threads_per_worker set fewer"
    )


def test_an_open_run_locks_the_folder_and_has_taken_up_what_it_holds(tmp_path: Path) -> None:
    federation(num_rounds=1, output_dir=tmp_path).run()
    run = federation(num_rounds=3, output_dir=tmp_path)
    assert run.state.round_num == 0
    with run.opened() as seen:
        assert run.state is seen.state
        assert seen.state.round_num == 1
        assert seen.state.counts["resumes"] == 1
        with (
            pytest.raises(ValueError, match="a folder that no other run uses"),
            federation(output_dir=tmp_path).opened(),
        ):
            pass
        with run.opened() as again:
            assert again is seen
        run.run()  # does not open it a second time
        assert run.state.counts["resumes"] == 1
        with pytest.raises(ValueError, match="a folder that no other run uses"):
            federation(output_dir=tmp_path).run()
    assert federation(num_rounds=3, output_dir=tmp_path).run() == run.state.history
    assert run.state.round_num == 3


def test_an_error_releases_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), federation(output_dir=tmp_path).opened():
        raise RuntimeError("mine")
    federation(output_dir=tmp_path).run()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = federation(Scaffold)
    run.run()
    assert os.listdir(tmp_path) == []
    assert len(run.state.kept) > 1  # although clients keep something


def test_a_run_that_failed_in_mid_round_starts_the_round_anew() -> None:
    class Interrupt(FederationCallback):
        armed = True

        def on_client_end(self, run: Run, result: ClientResult) -> None:
            if self.armed and run.state.round_num == 1:
                self.armed = False
                raise KeyboardInterrupt

    run, plain = federation(Scaffold, num_rounds=3, callbacks=[Interrupt()]), federation(Scaffold, num_rounds=3)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.state.round_num == 1
    assert run.run() == plain.run()
    assert_equal(run.state.shared, plain.state.shared)
    assert run.state.kept == plain.state.kept


# Going on


@pytest.mark.parametrize("algorithm", [FedAvg, FedAMM, Scaffold])
def test_resumed_run_equals_uninterrupted_run(algorithm: type[FederatedModule], tmp_path: Path) -> None:
    def run(num_rounds: int, folder: str) -> Orchestrator:
        orchestrator = federation(algorithm, num_rounds=num_rounds, eval_interval=2, output_dir=tmp_path / folder)
        orchestrator.run()
        return orchestrator

    whole = run(4, "whole")
    run(2, "halves")
    halves = run(4, "halves")
    assert_equal(halves.state.shared, whole.state.shared)
    assert halves.state.history == whole.state.history
    assert halves.state.kept == whole.state.kept
    assert (tmp_path / "halves/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


class FedAvgM(FedAvg):
    """Server momentum (Hsu et al., 2019): an algorithm whose server remembers more than it sends out."""

    def server_step(self, state: Any, reduced: Any, server: Any) -> Any:
        new = super().server_step(state, reduced, server)
        for name, _ in self.named_parameters():
            velocity = 0.5 * state.get(f"velocity.{name}", torch.zeros_like(state[name])) + new[name] - state[name]
            new[name], new[f"velocity.{name}"] = state[name] + velocity, velocity
        return new


def test_server_may_remember_more_than_it_sends_and_resumes_with_it(tmp_path: Path) -> None:
    for folder, stops in (("whole", [4]), ("halves", [2, 4])):
        for num_rounds in stops:
            run = federation(FedAvgM, num_rounds=num_rounds, output_dir=tmp_path / folder)
            run.run()
    whole = load_checkpoint(tmp_path / "whole/checkpoints/round_000004.ckpt").state
    assert_equal(run.state.shared, whole.shared)
    assert any(name.startswith("velocity.") for name in whole.shared)


def test_run_that_ends_where_another_stopped_is_evaluated_there(tmp_path: Path) -> None:
    class Stop(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            if record.round_num == 4:  # before its checkpoint is written
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation(num_rounds=9, eval_interval=2, output_dir=tmp_path, callbacks=[Stop()]).run()
    history = federation(num_rounds=3, eval_interval=2, output_dir=tmp_path).run()
    assert [row["round"] for row in history] == [0, 2, 3]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 3


# Evaluating after the run


def test_trained_module_can_be_tested_with_gradients_enabled() -> None:
    run = federation(num_rounds=1)
    expected = run.run()[-1]["test/acc"]
    with quiet():
        trainer = pl.Trainer(accelerator="cpu", inference_mode=False, logger=False, enable_progress_bar=False)
        (metrics,) = trainer.test(run.module, datamodule=run.data, verbose=False)
    assert metrics["test/acc"] == expected


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_every_precision_runs(precision: Any) -> None:
    run = federation(FedAMM, num_rounds=1, trainer=TrainerConfig(accelerator="cpu", precision=precision))
    assert run.run()[-1]["client/meta_loss"] < 10
    expected = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert run.state.shared["model.conv1.weight"].dtype == expected
    assert run.module.state_dict()["model.conv1.weight"].dtype == expected


# Clients


def test_callbacks_see_every_stage_and_alter_nothing() -> None:
    recorder = Recorder()
    options: dict[str, Any] = {"client_fraction": 1.0, "eval_interval": 5}
    watched = federation(callbacks=[recorder], **options)
    watched.run()
    clients = [f"client {client}" for client in range(4)]
    assert recorder.calls == ["run_start", "round 0", *clients, "round 1", *clients, "round 2", "run_end"]
    assert [record.evaluated for record in recorder.records] == [True, False, True]
    alone = federation(**options)
    alone.run()
    assert_equal(watched.state.shared, alone.state.shared)


def test_uniform_aggregation_gives_every_client_the_same_weight() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.5, min_client_size=4)
    payloads: list[tuple[Tensor, int]] = []

    class Watched(FedAvg):
        def server_update(self, state: Any, results: Iterable[ClientResult], server: Any) -> Any:
            def seen() -> Iterator[ClientResult]:
                for result in results:
                    payloads.append((result.payload["model.conv1.weight"].double(), result.num_examples))
                    yield result

            return super().server_update(state, seen(), server)

    for aggregation in ("uniform", "num_examples"):
        payloads.clear()
        run = federation(Watched, data, aggregation=aggregation, client_fraction=1.0, num_rounds=1)
        run.run()
        sizes = [size for _, size in payloads]
        assert sizes == [data.client_size(client) for client in range(4)]
        assert len(set(sizes)) > 1
        weights = [1.0] * 4 if aggregation == "uniform" else sizes
        mean = sum((w * value for w, (value, _) in zip(weights, payloads, strict=True)), torch.tensor(0.0)) / sum(
            weights
        )
        torch.testing.assert_close(run.state.shared["model.conv1.weight"], mean.float(), rtol=0, atol=0)


def test_clients_without_examples_are_left_out() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.01, min_client_size=0, num_clients=30)
    empty = [client for client in range(30) if data.client_size(client) == 0]
    assert empty
    recorder = Recorder()
    federation(FedAMM, data, num_rounds=1, client_fraction=1.0, callbacks=[recorder]).run()
    assert [result.client_id for result in recorder.records[1].results] == sorted(set(range(30)) - set(empty))


def test_round_of_empty_clients_fails_and_keeps_the_state() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.01, min_client_size=0, num_clients=30)
    recorder = Recorder()
    run = federation(
        data=data, num_rounds=8, client_fraction=0.03, eval_interval=5, max_failed_rounds=9, callbacks=[recorder]
    )
    with pytest.raises(FederationError, match="after round 8: no round succeeded"):
        run.run()
    idle = [record for record in recorder.records[1:] if not record.results]
    assert {record.failed for record in idle} == {"none of its clients holds examples"}
    assert run.state.counts["failed_rounds"] == len(idle)
    assert all("client/loss" not in record.metrics for record in idle)


def test_client_of_one_example_trains() -> None:
    data = tiny_data(num_clients=50, num_meta_per_class=2, imbalance_factor=0.05)
    assert data.client_size(0) in (1, 2)
    run = federation(FedAMM, data, num_rounds=1)
    assert run.run()[-1]["test/loss"] < float("inf")


def test_nothing_but_the_last_state_of_clients_stays_in_memory() -> None:
    run = federation(Scaffold, data=tiny_data(), num_rounds=6, client_fraction=1.0)
    run.run()
    assert set(vars(run._store)["_states"]) == {(client, 6) for client in range(4)}
