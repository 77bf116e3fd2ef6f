"""What is evaluated in place of the trained model: when it is made, of what, that training does not see it, and failures."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.executors import Processes, Sequential, Vectorized
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

CPU = TrainerConfig(accelerator="cpu", precision="32-true")
BIAS = "model.1.bias"


class Counting(FedAvg):
    """Evaluates a model whose bias is the number of examples of each class that clients hold.

    Args:
        every: Whether at each evaluation, not only at the last.
        broken: Clients that fail.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {"counts": "sum"}

    def __init__(self, *args: Any, every: bool = False, broken: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.every, self.broken = every, broken

    def calibrates(self, last: bool) -> bool:
        return last or self.every

    def statistics(self, session: ClientSession) -> State:
        assert not self.training
        assert not torch.is_grad_enabled()
        if session.task.client_id < self.broken:
            raise RuntimeError("no statistics")
        return {"counts": session.data.class_counts(NUM_CLASSES)}

    def expected_payload(self, sent: State) -> State:
        return {name: value for name, value in sent.items() if name.startswith("model.")}

    def expected_statistics(self, sent: State) -> State:
        return {"counts": torch.zeros(NUM_CLASSES, dtype=torch.int64)}

    def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
        assert not any(name.startswith("calibrated.") for name in state)
        return {BIAS: statistics["counts"].to(state[BIAS])}


def linear(num_classes: int, in_channels: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, num_classes))


def make(kind: type[FedAvg], data: TinyData, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(NUM_CLASSES, 1, "tests.federation.test_calibration.linear", lr=0.05, info=data.info, **options)


def run(module: Any, data: TinyData, num_rounds: int = 3, **options: Any) -> Orchestrator:
    options = {"client_fraction": 0.5, "local_epochs": 1, "eval_interval": 1, "trainer": CPU, **options}
    orchestrator = Orchestrator(module, data, num_rounds=num_rounds, **options)
    orchestrator.run()
    return orchestrator


def bias(orchestrator: Orchestrator) -> Tensor:
    return orchestrator.module.shared_state()[BIAS]


@pytest.mark.parametrize("executor", [Sequential(), Processes(2), Vectorized()], ids=lambda made: type(made).__name__)
def test_all_clients_are_measured_at_the_end_and_training_does_not_see_it(executor: Any) -> None:
    data = tiny_data()
    theirs = run(make(FedAvg, data), data)
    mine = run(make(Counting, data), data, executor=executor)
    assert bias(mine).tolist() == data.info["class_counts"]
    for name, value in theirs.state.shared.items():
        torch.testing.assert_close(mine.state.shared[name], value)
    before, after = mine.state.history[:-1], mine.state.history[-1]
    assert [row["test/acc"] for row in before] == [row["test/acc"] for row in theirs.state.history[:-1]]
    assert after["test/loss"] != theirs.state.history[-1]["test/loss"]
    assert after["calibration/bytes_sent"] == 8 * NUM_CLASSES
    assert after["calibration/bytes_received"] == 4 * (64 * NUM_CLASSES + NUM_CLASSES)
    assert mine.evaluate()["test/loss"] == after["test/loss"]
    assert mine.state.counts == dict.fromkeys(mine.state.counts, 0)
    assert mine.state.clients_total == theirs.state.clients_total + 4
    for way, size in (("received", 4 * (64 * NUM_CLASSES + NUM_CLASSES)), ("sent", 8 * NUM_CLASSES)):
        assert mine.state.bytes_total[way] == theirs.state.bytes_total[way] + 4 * size


def test_each_evaluation_if_the_method_says_so_and_a_longer_run_goes_on_from_the_trained_model(tmp_path: Path) -> None:
    data = tiny_data()
    whole = run(make(Counting, data, every=True), data, 4, eval_interval=2)
    assert [("calibration/bytes_sent" in row) for row in whole.state.history] == [False, True, True]
    run(make(Counting, data, every=True), data, 2, eval_interval=2, output_dir=tmp_path / "run")
    longer = run(make(Counting, data, every=True), data, 4, eval_interval=2, output_dir=tmp_path / "run")
    assert longer.state.history == whole.state.history
    assert longer.state.shared.keys() == whole.state.shared.keys()
    assert all(torch.equal(value, whole.state.shared[name]) for name, value in longer.state.shared.items())


def test_too_few_clients_leave_the_trained_model_which_is_said(caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_data()
    with caplog.at_level(logging.WARNING):
        failed = run(make(Counting, data, broken=3), data, 1)
    assert "the model is evaluated as it was trained, its calibration failed: 1 of 4 clients succeeded" in caplog.text
    assert torch.equal(bias(failed), failed.state.shared[BIAS])
    assert failed.state.counts["failed_clients"] == 3
    assert failed.state.counts["failed_rounds"] == 0
    whole = run(make(Counting, data, broken=1), data, 1)  # one may fail
    assert 0 < int(bias(whole).sum()) < sum(data.info["class_counts"])


@pytest.mark.parametrize(("name", "size"), [("model.other", 1), (BIAS, 1)])
def test_what_is_made_must_be_of_the_model(name: str, size: int) -> None:
    class Odd(Counting):
        def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
            return {name: torch.zeros(size)}

    data = tiny_data()
    message = rf"Expected `calibrate` of Odd to give shared entries in their shapes, got \['{name}'\]"
    with pytest.raises(ValueError, match=message):
        run(make(Odd, data), data, 1)


class Lying(Counting):
    """One client's counts are none; the server refuses them."""

    def statistics(self, session: ClientSession) -> State:
        sent = super().statistics(session)
        return {"counts": -sent["counts"]} if session.task.client_id == 2 else sent

    def accepted_statistics(self, result: ClientResult, server: ServerSession) -> State:
        assert server.sent.keys() == {"model.1.weight", BIAS}
        if (result.payload["counts"] < 0).any():
            raise ValueError("its counts are below 0")
        return {"counts": 2 * result.payload["counts"]}


def test_statistics_that_cannot_be_cost_one_client(caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_data()
    with caplog.at_level(logging.WARNING):
        lying = run(make(Lying, data), data, 1)
    assert "round 1: the update of client 2 is refused: its counts are below 0" in caplog.text
    assert lying.state.counts["refused_updates"] == 1
    others = sum(data.client(client).class_counts(NUM_CLASSES) for client in (0, 1, 3))
    assert torch.equal(bias(lying), 2.0 * others)


@pytest.mark.parametrize("kind", ["no decomposition", "infinite", "arithmetic"])
def test_numbers_of_which_nothing_can_be_made_leave_the_trained_model(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Counting):
        def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
            if kind == "no decomposition":
                torch.linalg.cholesky(-torch.eye(2))
            if kind == "arithmetic":
                raise ArithmeticError("no class is there")
            return {BIAS: torch.full((NUM_CLASSES,), 1e300, dtype=torch.float64)}

    data = tiny_data()
    with caplog.at_level(logging.WARNING):
        failed = run(make(Failing, data), data, 1)
    assert "the model is evaluated as it was trained, its calibration failed: " in caplog.text
    assert torch.equal(bias(failed), failed.state.shared[BIAS])
    assert failed.state.shared.keys() == {"model.1.weight", BIAS}


class StopAt(FederationCallback):
    """Ends the run after a round."""

    def __init__(self, round_num: int) -> None:
        self.round_num = round_num

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        if record.round_num == self.round_num:
            run.stop("enough")


def test_a_run_that_a_callback_ends_is_calibrated_too(tmp_path: Path) -> None:
    data = tiny_data()
    whole = run(make(Counting, data), data, 2)
    ended = run(make(Counting, data), data, 4, callbacks=[StopAt(2)], output_dir=tmp_path / "run")
    assert ended.state.history[-1] == whole.state.history[-1]
    assert torch.equal(bias(ended), bias(whole))
    assert "calibration/bytes_sent" in (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    again = run(make(Counting, data), data, 4, output_dir=tmp_path / "run")
    assert again.state.history == ended.state.history
    assert torch.equal(bias(again), bias(whole))


class Refusing(Counting):
    """Refuses what all clients have trained from the third round on."""

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        if server.round_num > 2:
            raise ValueError("not today")
        return super().contribution(result, server)


def test_of_an_earlier_calibration_nothing_is_left_after_a_failed_round(tmp_path: Path) -> None:
    data = tiny_data()
    run(make(Refusing, data), data, 2, output_dir=tmp_path / "run")
    longer = run(make(Refusing, data), data, 4, output_dir=tmp_path / "run", max_failed_rounds=9)
    plain = run(make(FedAvg, data), data, 2)
    calibrated, trained, end = longer.state.history[2:]
    assert trained["test/loss"] == plain.state.history[-1]["test/loss"] != calibrated["test/loss"]
    assert end["test/loss"] == calibrated["test/loss"]


def test_the_module_is_in_evaluation_mode_and_afterwards_as_before() -> None:
    modes = []

    class Looking(Counting):
        def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
            modes.append(self.training)
            return super().calibrate(state, statistics, server)

    data = tiny_data()
    made = run(make(Looking, data), data, 2)
    assert modes == [False]
    assert made.server.module.training
