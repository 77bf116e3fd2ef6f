"""The clients' learning rate by rounds: what it is in each, also side by side, in other processes, and in what methods make of it."""

from typing import Any

import pytest
import torch

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import Scaffold
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import Executor, Processes, Sequential, Vectorized
from fedamm_pl.federation.trainer import TrainerConfig
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, tiny_data

DOUBLE = TrainerConfig("cpu", precision="64-true")
OPTIONS: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0}


def linear(num_classes: int, in_channels: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, num_classes))


def make(algorithm: type[FederatedModule], lr: float = 0.08, **options: Any) -> Any:
    torch.manual_seed(0)
    network = "tests.federation.test_lr_decay.linear"
    return algorithm(NUM_CLASSES, 1, network, lr=lr, info=tiny_data().info, **{**OPTIONS, **options})


@pytest.mark.parametrize("local_optimizer", ["sgd", "sam"])
def test_the_third_round_trains_with_a_quarter_of_the_learning_rate(local_optimizer: Any) -> None:
    data = tiny_data()
    module = make(FedAvg, local_optimizer=local_optimizer)
    decayed = Round(module, data, DOUBLE, round_num=3, lr_decay=0.5).train(0).payload
    smaller = Round(make(FedAvg, 0.02, local_optimizer=local_optimizer), data, DOUBLE, round_num=3).train(0).payload
    assert all(torch.equal(value, smaller[name]) for name, value in decayed.items())
    constant = Round(module, data, DOUBLE, round_num=3).train(0).payload
    assert not torch.equal(constant["model.1.weight"], decayed["model.1.weight"])


def test_control_variates_of_scaffold_are_measured_by_the_learning_rate_of_the_round() -> None:
    data = tiny_data(batch_size=1000, augmentation="none")
    changes = [
        Round(make(Scaffold), data, DOUBLE, round_num=3, lr_decay=decay).train(0).payload["control.model.1.weight"]
        for decay in (1.0, 0.5)
    ]
    torch.testing.assert_close(*changes)  # one step: the gradient, whatever the step's length


@pytest.mark.parametrize("algorithm", [FedAvg, FedAMM])
@pytest.mark.parametrize("executor", [Processes(2), Vectorized()], ids=lambda made: type(made).__name__)
def test_wherever_clients_train_it_is_the_same(algorithm: type[FederatedModule], executor: Executor) -> None:
    runs = []
    for chosen in (Sequential(), executor):
        run = Orchestrator(
            make(algorithm, meta_lr=1.0) if algorithm is FedAMM else make(algorithm),
            tiny_data(augmentation="none"),
            FederationConfig(3, lr_decay=0.1, local_epochs=1, eval_interval=3),
            trainer=DOUBLE,
            executor=chosen,
        )
        run.run()
        runs.append(run.state.shared)
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-9, atol=1e-10)
