"""The float features of a table, in each method: trained on, measured and predicted, alone and side by side."""

from typing import Any

import pytest
import torch

from fedamm_pl import FederatedModule, Orchestrator
from fedamm_pl.algorithms import FedYoYo
from fedamm_pl.federation.executors import Executor, Sequential, Vectorized
from fedamm_pl.federation.trainer import TrainerConfig
from tests.algorithms.test_networks_every_method import EVERY, Method, assert_sound
from tests.federation.executors.test_vectorized import TAKEN, assert_near
from tests.federation.small import CPU
from tests.tiny import FEATURES, NUM_CLASSES, TinyTable, tiny_table

VIEWLESS: dict[str, Method] = {"FedYoYo, one view": (FedYoYo, {"strong_view": False, "rotation": 0.0, "warmup": 2})}
TRAINED = {**{name: method for name, method in EVERY.items() if name != "FedYoYo"}, **VIEWLESS}


@pytest.fixture(scope="module")
def data() -> TinyTable:
    return tiny_table()


def federated(method: Method, data: TinyTable, **options: Any) -> Orchestrator:
    """Two rounds on features."""
    torch.manual_seed(0)
    algorithm, own = method
    module = algorithm(NUM_CLASSES, FEATURES, "mlp-12", **{"lr": 0.1, "info": data.info, **own})
    defaults: dict[str, Any] = {"num_rounds": 2, "client_fraction": 1.0, "local_epochs": 2, "trainer": CPU}
    run = Orchestrator(module, data, **{**defaults, **options})
    run.run()
    return run


@pytest.mark.parametrize("method", TRAINED.values(), ids=list(TRAINED))
def test_every_method_learns_from_features(method: Method, data: TinyTable) -> None:
    run = federated(method, data)
    assert_sound(run)
    assert run.state.history[-1]["test/acc"] > 0.4  # by chance 0.25
    chances = run.module.eval().predict_step(data.images.test_images[:])
    assert chances.shape == (len(data.images.test_labels), NUM_CLASSES)
    assert float((chances.argmax(1) == data.images.test_labels).float().mean()) > 0.4


@pytest.mark.parametrize("options", [{}, {"strong_view": False}, {"rotation": 0.0}])
def test_a_method_that_looks_at_images_twice_refuses_features(options: dict[str, Any], data: TinyTable) -> None:
    line = r"^Expected `strong_view` to be false and `rotation` 0 for FedYoYo on features, which have no views .*, got "
    with pytest.raises(ValueError, match=line):
        FedYoYo(NUM_CLASSES, FEATURES, "mlp", info=data.info, **options)


@pytest.mark.parametrize("algorithm", TAKEN)
def test_clients_side_by_side_learn_the_same_from_features(algorithm: type[FederatedModule], data: TinyTable) -> None:
    own: dict[str, Any] = next(options for kind, options in EVERY.values() if kind is algorithm)
    executors: list[Executor] = [Sequential(), Vectorized(group_size=3)]
    double = TrainerConfig("cpu", precision="64-true")
    first, second = (federated((algorithm, own), data, executor=one, trainer=double) for one in executors)
    assert_near(second.state.shared, first.state.shared)
