"""Networks with frozen parts, GroupNorm, dropout or tied weights, in each method."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, Orchestrator
from tests.algorithms.test_methods import METHODS, Method
from tests.federation.small import CPU
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

EVERY: dict[str, Method] = {
    "FedAvg": (FedAvg, {}),
    "FedAMM": (FedAMM, {}),
    "FedAMM, synchronous": (FedAMM, {"meta_update": "synchronous", "meta_interval": 2}),
    **METHODS,
}


def frozen() -> nn.Module:
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, NUM_CLASSES),
    )
    network[1].requires_grad_(False)
    return network


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, NUM_CLASSES))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, NUM_CLASSES))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 16), nn.Linear(64, 16)
        self.two.weight = self.one.weight
        self.last = nn.Linear(16, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.flatten(1)
        logits: Tensor = self.last(self.one(hidden).tanh() * self.two(hidden).relu())
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "frozen": frozen,
    "GroupNorm": group_norm,
    "dropout": dropout,
    "tied": Tied,
}


@pytest.fixture(scope="module")
def data() -> TinyData:
    return tiny_data(batch_size=40)


def federated(method: Method, network: nn.Module, data: TinyData, **options: Any) -> Orchestrator:
    """Two rounds of two clients."""
    algorithm, own = method
    module = algorithm(NUM_CLASSES, 1, network, **{"lr": 0.05, "info": data.info, **own})
    defaults: dict[str, Any] = {"num_rounds": 2, "client_fraction": 0.5, "local_epochs": 1, "trainer": CPU}
    run = Orchestrator(module, data, **{**defaults, **options})
    run.run()
    return run


def assert_sound(run: Orchestrator) -> None:
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    for name, value in {**run.state.shared, **run.module.state_dict()}.items():
        assert not value.is_floating_point() or value.isfinite().all(), name


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", EVERY)
def test_every_method_trains_them_and_leaves_frozen_parts_alone(name: str, network: str, data: TinyData) -> None:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = federated(EVERY[name], model, data)
    assert_sound(run)
    now = {key.removeprefix("model."): value for key, value in run.state.shared.items()}
    fixed = {key for key, value in model.named_parameters() if not value.requires_grad}
    for key in fixed:
        for found in (now[key], run.module.model.state_dict()[key], run.server.module.model.state_dict()[key]):
            assert torch.equal(found, before[key]), key
    moved = [key for key in before.keys() & now.keys() if not torch.equal(now[key], before[key])]
    assert moved
    if network == "tied":  # one tensor, whichever of its names it is called by
        assert torch.equal(now["one.weight"], now["two.weight"])


@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "adam", "yogi"])
def test_a_frozen_layer_stays_as_it_is_whatever_the_servers_optimizer(optimizer: str, data: TinyData) -> None:
    model = frozen()
    before = model[1].weight.clone()
    run = federated((FedAvg, {}), model, data, server_optimizer=optimizer, num_rounds=3)
    assert_sound(run)
    assert torch.equal(run.state.shared["model.1.weight"], before)
