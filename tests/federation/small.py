"""Federations small enough to run in a second, and what the tests of their parts have in common."""

from typing import Any

import torch
from torch import Tensor

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.executors import RunSpec
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientResult
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

CPU = TrainerConfig(accelerator="cpu", precision="32-true")


def make(algorithm: type[FederatedModule], data: TinyData, **options: Any) -> Any:
    """A module with the same initial weights each time."""
    torch.manual_seed(0)
    model = options.pop("model", "tests.tiny.tiny_resnet")
    return algorithm(NUM_CLASSES, 1, model, info=data.info, **options)


def federation(
    algorithm: type[FederatedModule] = FedAvg,
    data: TinyData | None = None,
    method: dict[str, Any] | None = None,
    **options: Any,
) -> Orchestrator:
    """Two rounds of an epoch, each evaluated, unless told otherwise; ``method`` has the options of the algorithm."""
    data = data or tiny_data()
    forward = {"differentiation": "forward"} if issubclass(algorithm, FedAMM) else {}
    module = make(algorithm, data, **{**forward, **(method or {})})
    defaults: dict[str, Any] = {"num_rounds": 2, "local_epochs": 1, "eval_interval": 1, "trainer": CPU}
    return Orchestrator(module, data, **{**defaults, **options})


def spec(module: FederatedModule, data: TinyData, trainer: TrainerConfig = CPU) -> RunSpec:
    """What workers build module and data from."""
    return RunSpec(module, data, trainer.resolved(), seed=0, threads=1)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Check that two states hold the same names and bits."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class Recorder(FederationCallback):
    """Remembers what it was called with, and in which order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.records: list[RoundRecord] = []

    def on_run_start(self, run: Run) -> None:
        self.calls.append("run_start")

    def on_client_end(self, run: Run, result: ClientResult) -> None:
        self.calls.append(f"client {result.client_id}")
        assert not result.payload
        assert not result.kept

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        self.calls.append(f"round {record.round_num}")
        self.records.append(record)

    def on_run_end(self, run: Run) -> None:
        self.calls.append("run_end")
