"""What callbacks see of a run, and what they may do to it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.checkpoint import save_checkpoint
from fedamm_pl.federation.orchestrator import FederationError
from fedamm_pl.federation.run import Run
from fedamm_pl.protocol.messages import ClientResult
from tests.federation.small import CPU, Recorder, assert_equal, federation
from tests.tiny import TinyData, tiny_data


class On(FederationCallback):
    """Calls functions at the hooks."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for hook, act in hooks.items():
            setattr(self, f"on_{hook}", act)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read(folder: Path, name: str = "summary.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


def test_it_shows_what_the_run_is_made_of(tmp_path: Path) -> None:
    seen: list[Run] = []
    orchestrator = federation(FedAMM, seed=3, output_dir=tmp_path, callbacks=[On(run_end=lambda run: seen.append(run))])
    orchestrator.run()
    (run,) = seen
    assert (run.config, run.seed, run.data) == (orchestrator.config, 3, orchestrator.data)
    assert run.trainer == CPU.resolved()
    assert run.output_dir == tmp_path
    assert run.state is orchestrator.state
    assert run.options["algorithm"] == "FedAMM"
    assert run.options["federation.num_rounds"] == 2
    assert run.module is not orchestrator.module  # the server has one of its own
    assert_equal(run.module.shared_state(), orchestrator.module.shared_state())


def test_the_module_holds_what_was_evaluated() -> None:
    measured: list[float] = []

    def measure(run: Run, record: RoundRecord) -> None:
        correct = [
            (run.module.eval()(images).argmax(1) == labels).float().mean()
            for images, labels in run.data.test_dataloader()
        ]
        measured.append(float(sum(correct)) / len(correct))

    history = federation(callbacks=[On(round_end=measure)]).run()
    assert measured == pytest.approx([row["test/acc"] for row in history])


# Numbers of one's own


def test_a_number_is_in_the_row_of_the_round_and_in_the_record_of_later_callbacks(tmp_path: Path) -> None:
    recorder = Recorder()
    own = On(
        client_end=lambda run, result: run.log(f"own/client_{result.client_id}", result.num_examples),
        round_end=lambda run, record: run.log("own/round", record.round_num * 10),
    )
    run = federation(num_rounds=3, eval_interval=2, client_fraction=1.0, output_dir=tmp_path, callbacks=[own, recorder])
    history = run.run()
    assert [record.metrics["own/round"] for record in recorder.records] == [0, 10, 20, 30]
    assert [row["own/round"] for row in history] == [0, 20, 30]
    assert [row["own/round"] for row in rows(tmp_path)] == ["0.0", "20.0", "30.0"]
    assert "own/client_0" not in history[0]
    assert [row["own/client_3"] for row in history[1:]] == [run.data.client_size(3)] * 2
    assert all(record.metrics["own/client_3"] == run.data.client_size(3) for record in recorder.records[1:])


@pytest.mark.parametrize("change", [{"model.classifier.bias": torch.zeros(9)}, {}])
def test_a_run_does_not_go_on_from_the_state_of_another_network(change: dict[str, Any], tmp_path: Path) -> None:
    run = federation(FedAvg, num_rounds=1, output_dir=tmp_path)
    run.run()
    with run.opened() as seen:
        seen.state.round_num = 2
        seen.state.shared.pop("model.classifier.bias")
        seen.state.shared.update(change)
        save_checkpoint(tmp_path / "checkpoints", seen.state, seen.fingerprint, seen.environment)
    with pytest.raises(
        ValueError, match=r"`output_dir` .* state of FedAvg, got one in which model\.classifier\.bias is missing"
    ):
        federation(FedAvg, num_rounds=3, output_dir=tmp_path).run()


def test_numbers_of_ones_own_survive_a_resume(tmp_path: Path) -> None:
    own = On(round_end=lambda run, record: run.log("own", record.round_num))
    for num_rounds in (2, 4):
        history = federation(num_rounds=num_rounds, output_dir=tmp_path, callbacks=[own]).run()
    assert [row["own"] for row in history] == [0, 1, 2, 3, 4]
    assert [row["own"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "3.0", "4.0"]


@pytest.mark.parametrize("name", ["own", "test/acc", "client/loss", "round"])
def test_a_name_is_taken_once_a_round(name: str) -> None:
    def log(run: Run, record: RoundRecord) -> None:
        run.log("own", 1)
        if record.round_num:
            with pytest.raises(ValueError, match=f"`name` to be new in the row of the round, got {name}"):
                run.log(name, 2.0)

    history = federation(callbacks=[On(round_end=log)]).run()
    assert [row["own"] for row in history] == [1.0] * 3
    assert [row["round"] for row in history] == [0, 1, 2]


@pytest.mark.parametrize("name", ["test/acc", "client/loss", "round"])
def test_a_name_of_the_run_is_refused_also_before_the_run_has_used_it(name: str) -> None:
    def log(run: Run, result: ClientResult) -> None:
        run.log(name, 77.0)

    with pytest.raises(ValueError, match=f"`name` to be new in the row of the round, got {name}"):
        federation(client_fraction=0.25, callbacks=[On(client_end=log)]).run()


# A good end


@pytest.mark.parametrize("hook", ["round_end", "client_end"])
@pytest.mark.parametrize("eval_interval", [1, 2, 10])
def test_a_run_is_ended_well_after_the_round(hook: str, eval_interval: int, tmp_path: Path) -> None:
    def stop(run: Run, of_round: Any) -> None:
        number = run.state.round_num + (hook == "client_end")
        if number == 3:
            run.stop("accurate enough")

    def run(callbacks: list[FederationCallback]) -> list[dict[str, float]]:
        orchestrator = federation(
            num_rounds=9, eval_interval=eval_interval, output_dir=tmp_path, callbacks=[*callbacks, recorder]
        )
        history = orchestrator.run()
        assert orchestrator.state.round_num == 3
        assert_equal(orchestrator.module.shared_state(), orchestrator.state.shared)
        return history

    recorder = Recorder()
    history = run([On(**{hook: stop})])
    assert recorder.calls[-1] == "run_end"
    expected = {1: [0, 1, 2, 3], 2: [0, 2, 3], 10: [0, 3]}[eval_interval]
    assert [row["round"] for row in history] == expected
    assert history[-1]["test/acc"] >= 0
    written = {name: (tmp_path / name).read_bytes() for name in ("metrics.csv", "final.ckpt")}
    assert [float(row["round"]) for row in rows(tmp_path)] == expected
    summary = read(tmp_path)
    assert (summary["ended"], summary["stopped"], summary["num_rounds"]) == ("accurate enough", None, 3)
    assert summary["resumes"] == 0
    recorder.calls.clear()
    assert run([]) == history  # ended it stays
    assert recorder.calls == ["run_start", "run_end"]
    assert (tmp_path / "metrics.csv").read_bytes() == written["metrics.csv"]
    assert read(tmp_path)["ended"] == "accurate enough"
    assert read(tmp_path)["final"] == summary["final"]
    assert read(tmp_path)["resumes"] == 0


def test_a_round_that_ends_the_run_in_its_middle_is_completed() -> None:
    recorder = Recorder()
    stop = On(client_end=lambda run, result: run.stop("enough"))
    federation(num_rounds=5, client_fraction=1.0, callbacks=[stop, recorder]).run()
    assert recorder.calls == [
        "run_start",
        "round 0",
        *(f"client {client}" for client in range(4)),
        "round 1",
        "run_end",
    ]


def test_a_run_may_end_at_round_0() -> None:
    history = federation(num_rounds=5, callbacks=[On(round_end=lambda run, record: run.stop("enough"))]).run()
    assert [row["round"] for row in history] == [0]


# Going on with what a folder holds


def test_more_rounds_than_asked_for_are_refused(tmp_path: Path) -> None:
    federation(num_rounds=3, output_dir=tmp_path).run()
    with pytest.raises(ValueError, match=f"`num_rounds` to be 3 or more, the rounds that {tmp_path} holds, got 2"):
        federation(num_rounds=2, output_dir=tmp_path).run()


def test_other_data_of_the_same_options_is_refused(tmp_path: Path) -> None:
    class Other(TinyData):
        pass

    data = tiny_data()
    federation(data=data, num_rounds=1, output_dir=tmp_path).run()
    other = Other(**data.hparams)
    with pytest.raises(ValueError, match=r"data is '.*Other' but was 'tests.tiny.TinyData'"):
        federation(data=other, num_rounds=1, output_dir=tmp_path).run()


def test_other_libraries_cost_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fedamm_pl.federation.executors import worker
    from fedamm_pl.federation.fingerprint import versions

    federation(num_rounds=1, output_dir=tmp_path).run()
    monkeypatch.setattr(worker, "versions", lambda: {**versions(), "numpy": "9.9"})
    federation(num_rounds=2, output_dir=tmp_path).run()
    assert "numpy is '9.9' but was" in caplog.text
    assert "from here on results may differ in their last digits" in caplog.text


def test_a_run_that_too_many_failed_rounds_stopped_gets_a_new_chance(tmp_path: Path) -> None:
    from tests.federation.executors.methods import HalfReadable

    def run(num_rounds: int, max_failed_rounds: int) -> Any:
        data = HalfReadable("tiny", num_clients=8, num_meta_per_class=2, imbalance_factor=0.2, partition="iid")
        options: dict[str, Any] = {"client_fraction": 1.0, "min_success_fraction": 1.0, "output_dir": tmp_path}
        return federation(FedAvg, data, num_rounds=num_rounds, max_failed_rounds=max_failed_rounds, **options)

    first = run(9, 2)
    with pytest.raises(FederationError, match="stopped after round 2: 2 rounds in a row failed, `max_failed_rounds`"):
        first.run()
    summary = read(tmp_path)
    assert summary["stopped"] == first.state.stopped
    assert summary["ended"] is None
    assert summary["failed_rounds"] == 2
    second = run(9, 3)
    with pytest.raises(FederationError, match="stopped after round 5: 3 rounds in a row failed"):
        second.run()
    assert read(tmp_path)["resumes"] == 1
