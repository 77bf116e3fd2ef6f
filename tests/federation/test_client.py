"""One client's round: a function of what it received, of its task and of what it kept."""

from typing import Any

import pytest
import torch

from fedamm_pl import FedAMM, FedAvg, FederatedModule
from fedamm_pl.federation.client import attempt, one_line_reason, train_client
from fedamm_pl.federation.server import Server
from fedamm_pl.federation.trainer import quiet
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, payload_bytes
from fedamm_pl.protocol.session import ClientSession
from tests.federation.small import CPU, assert_equal, make
from tests.tiny import tiny_data


def session(module: FederatedModule, client: int, seed: int = 7, kept: Any = None, epochs: int = 1) -> ClientSession:
    data = tiny_data()
    server = Server(make(type(module), data), data, CPU, seed=0)
    broadcast = Broadcast(1, epochs, server.module.shared_state())
    server.begin(broadcast)
    return ClientSession(broadcast, ClientTask(client, seed), data.client, server.answer, kept)


def trained(module: FederatedModule, client: int, **options: Any) -> ClientResult:
    with quiet():
        return train_client(module, session(module, client, **options), CPU)


@pytest.mark.parametrize("algorithm", [FedAvg, FedAMM])
def test_order_of_clients_changes_nothing(algorithm: type[FederatedModule]) -> None:
    module = make(algorithm, tiny_data())
    forwards = {client: trained(module, client) for client in (0, 1, 2, 3)}
    backwards = {client: trained(module, client) for client in (3, 2, 1, 0)}
    for client, result in forwards.items():
        assert_equal(result.payload, backwards[client].payload)
        assert result.metrics == backwards[client].metrics


def test_the_seed_makes_the_draws() -> None:
    module = make(FedAvg, tiny_data())
    first, other = (trained(module, 0, seed=seed).payload["model.conv1.weight"] for seed in (1, 2))
    assert not torch.equal(first, other)


def test_results_are_copies_and_have_the_names_of_the_module() -> None:
    module = make(FedAMM, tiny_data())
    result = trained(module, 2)
    assert set(result.payload) == {name for name in module.state_dict() if name.startswith(("model.", "weight_net."))}
    assert not any(value.requires_grad for value in result.payload.values())
    before = {name: value.clone() for name, value in result.payload.items()}
    trained(module, 1)
    assert_equal(result.payload, before)
    assert set(result.metrics) == {"loss", "meta_loss"}
    assert result.num_examples == tiny_data().client_size(2)
    assert result.meta_seconds > 0
    assert module.session is None


def test_bytes_are_those_of_the_tensors_that_pass() -> None:
    module = make(FedAvg, tiny_data())
    result = trained(module, 0)
    assert result.bytes_received == result.bytes_sent == payload_bytes(module.shared_state())
    module = make(FedAMM, tiny_data())
    model = payload_bytes({name: value for name, value in module.named_parameters() if name.startswith("model.")})
    result = trained(module, 0)
    assert result.bytes_sent == payload_bytes(module.shared_state()) + model  # w_hat
    assert result.bytes_received == payload_bytes(module.shared_state()) + model  # the meta gradient


def test_what_arrived_is_not_changed_by_training() -> None:
    module = make(FedAvg, tiny_data())
    opened = session(module, 0)
    before = {name: value.clone() for name, value in opened.broadcast.payload.items()}
    with quiet():
        train_client(module, opened, CPU)
    assert_equal(opened.broadcast.payload, before)


def test_a_failure_is_named_with_its_stage_and_the_next_client_is_as_ever() -> None:
    class Fails(FedAvg):
        def on_train_end(self) -> None:
            assert self.session is not None
            if self.session.task.client_id == 0:
                raise ValueError("one\ntwo")

    module = make(Fails, tiny_data())
    failure = attempt(module, session(module, 0), CPU)
    assert isinstance(failure, ClientFailure)
    assert (failure.client_id, failure.stage) == (0, "training")
    assert failure.reason.startswith("ValueError: one (test_client.py, line ")
    assert module.session is None
    result = attempt(module, session(module, 1), CPU)
    assert isinstance(result, ClientResult)
    assert_equal(result.payload, trained(make(FedAvg, tiny_data()), 1).payload)


def test_what_is_no_exception_of_a_client_passes() -> None:
    class Interrupted(FedAvg):
        def on_train_end(self) -> None:
            raise SystemExit

    module = make(Interrupted, tiny_data())
    with pytest.raises(SystemExit):
        attempt(module, session(module, 0), CPU)


def test_a_reason_is_one_line_whatever_the_error() -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    for error in (SilentError(), ValueError("x" * 1000 + "\nmore"), KeyError()):
        try:
            raise error
        except Exception as caught:
            reason = one_line_reason(caught)
        assert reason.startswith(type(error).__name__)
        assert "\n" not in reason
        assert len(reason) < 300
        assert "(test_client.py, line " in reason


def test_training_with_a_global_seed_leaves_it_as_it_was() -> None:
    module = make(FedAMM, tiny_data())
    opened = session(module, 0)
    before = torch.random.get_rng_state()
    with quiet():
        train_client(module, opened, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
