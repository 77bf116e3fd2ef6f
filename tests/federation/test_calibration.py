"""What is evaluated in place of the trained model: when it is made, of what, that training does not see it, and failures."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.federation.executors import Processes, Sequential, Vectorized
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import State
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
    whole = run(make(Counting, data, broken=1), data, 1)  # one may fail
    assert 0 < int(bias(whole).sum()) < sum(data.info["class_counts"])


def test_what_is_made_must_be_of_the_model() -> None:
    class Odd(Counting):
        def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
            return {"model.other": torch.zeros(1)}

    data = tiny_data()
    with pytest.raises(ValueError, match=r"Expected `calibrate` of Odd to give shared entries, got \['model.other'\]"):
        run(make(Odd, data), data, 1)
