"""What would fail, or go wrong unseen, in the middle of a run is said before the first round."""

from typing import Any

import pytest
from torch import nn

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.algorithms import CReFF
from fedamm_pl.federation.executors import Executor, Runner, RunSpec
from fedamm_pl.federation.orchestrator import Orchestrator
from tests.federation.small import federation, make
from tests.tiny import NUM_CLASSES, tiny_data


def test_state_that_does_not_travel_is_refused() -> None:
    class Private(FedAvg):
        shared = ("model.conv1.",)

    with pytest.raises(
        ValueError, match=r"`shared` and `personal` of Private to cover the whole state, .* without model.bn1"
    ):
        federation(Private)


def test_state_that_stays_at_a_client_on_purpose_is_taken() -> None:
    class Personal(FedAvg):
        shared = ("model.conv1.",)
        personal = ("model.",)

    federation(Personal)


def test_module_without_normalisation_is_refused() -> None:
    data = tiny_data()
    with pytest.raises(ValueError, match=r"Expected `info` of the module to be data\.info"):
        Orchestrator(FedAvg(NUM_CLASSES, 1, "tests.tiny.tiny_resnet"), data, num_rounds=1)


def test_client_of_one_example_is_refused_where_batchnorm_cannot_train() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.2, min_client_size=1, num_clients=25, seed=1)
    assert any(data.client_size(client) == 1 for client in range(25))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, NUM_CLASSES))
    with pytest.raises(ValueError, match=r"Expected `min_client_size` to be 2 or more .* got client \d+ with one"):
        federation(data=data, method={"model": network})


def test_network_that_does_not_fit_is_refused() -> None:
    colour = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, NUM_CLASSES))
    with pytest.raises(ValueError, match=r"Expected `model` to take images of shape \(1, 8, 8\) .*, got Sequential"):
        federation(method={"model": colour})
    three_classes = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"logits of shape \(B, 4\), got Sequential with \(1, 3\)"):
        federation(method={"model": three_classes})


def test_method_that_needs_a_meta_set_is_refused_without_one() -> None:
    data = tiny_data(num_meta_per_class=0)
    with pytest.raises(ValueError, match="`num_meta_per_class` to be 1 or more for FedAMM, got 0"):
        federation(FedAMM, data)
    federation(FedAvg, data, num_rounds=0).run()


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_a_robust_aggregation_needs_clients_to_outvote(aggregation: str) -> None:
    message = (
        f"`client_fraction` to give 3 or more clients a round for the aggregation {aggregation}, got 0.5 of 4 clients"
    )
    with pytest.raises(ValueError, match=message):
        federation(aggregation=aggregation)
    federation(aggregation=aggregation, client_fraction=0.75)


def test_sums_that_a_robust_aggregation_cannot_protect_are_refused_by_name() -> None:
    message = r"`aggregation` to be num_examples or uniform for CReFF, got median: .* \(class_gradients, present\)"
    with pytest.raises(ValueError, match=message):
        federation(CReFF, aggregation="median", client_fraction=1.0)


def test_an_executor_that_cannot_answer_in_mid_fit_is_refused_for_methods_that_ask_then() -> None:
    class Deaf(Executor):
        can_ask = False

        def open(self, spec: RunSpec) -> Runner:
            raise AssertionError

    synchronous: dict[str, Any] = {"meta_update": "synchronous"}
    with pytest.raises(
        ValueError, match=r"`executor` to be one that answers clients in mid-fit for FedAMM .* got Deaf"
    ):
        federation(FedAMM, method=synchronous, executor=Deaf())
    federation(FedAMM, executor=Deaf())  # asks before the fit


def test_checks_leave_the_mode_of_the_module_alone() -> None:
    data = tiny_data()
    for training in (True, False):
        module = make(FedAvg, data).train(training)
        Orchestrator(module, data, num_rounds=1)
        assert module.training == training
