"""The server's side: a module of its own, and draws that are functions of the seed."""

from typing import Any

import pytest
import torch

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.algorithms import Scaffold
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.server import Server
from fedamm_pl.protocol.messages import ClientResult, Question
from tests.federation.small import CPU, assert_equal, make
from tests.tiny import tiny_data


def server(algorithm: Any = FedAvg, seed: int = 0, **options: Any) -> Server:
    data = tiny_data()
    return Server(make(algorithm, data), data, CPU, seed, FederationConfig(1, **options))


def results(first: Server, **scales: float) -> list[ClientResult]:
    state = first.module.shared_state()
    return [
        ClientResult(client, size, {name: (value * factor).to(value.dtype) for name, value in state.items()})
        for client, (size, factor) in enumerate([(1, 1.0), (3, 5.0)])
    ]


def test_it_averages_by_examples_and_leaves_the_last_state_alone() -> None:
    found = server()
    state = found.module.shared_state()
    before = {name: value.clone() for name, value in state.items()}
    found.broadcast(state, 1, 1)
    new = found.update(state, results(found))
    assert_equal(state, before)
    torch.testing.assert_close(new["model.conv1.weight"], 4 * before["model.conv1.weight"])
    assert found.session.num_results == 2


def test_a_method_may_work_in_place() -> None:
    class InPlace(FedAvg):
        def server_step(self, state: Any, reduced: Any, server: Any) -> Any:
            for name, value in state.items():
                value.copy_(reduced[name])
            return state

    found = server(InPlace)
    state = found.module.shared_state()
    before = {name: value.clone() for name, value in state.items()}
    found.broadcast(state, 1, 1)
    found.update(state, results(found))
    assert_equal(state, before)


def test_uniform_and_robust_aggregations_know_no_examples() -> None:
    for aggregation, factor in (("uniform", 3.0), ("num_examples", 4.0), ("median", 3.0)):
        found = server(aggregation=aggregation)
        state = found.module.shared_state()
        found.broadcast(state, 1, 1)
        new = found.update(state, results(found))
        torch.testing.assert_close(new["model.conv1.weight"], factor * state["model.conv1.weight"])


def test_nobody_is_no_state() -> None:
    found = server()
    found.broadcast(found.module.shared_state(), 1, 1)
    with pytest.raises(ValueError, match="total weight above 0"):
        found.update(found.module.shared_state(), [])


def test_what_a_client_must_send_back_follows_from_the_broadcast() -> None:
    found = server(Scaffold)
    broadcast = found.broadcast(found.module.shared_state(), 4, 2)
    assert (broadcast.round_num, broadcast.local_epochs) == (4, 2)
    expected = found.expected_payload()
    assert set(expected) == set(broadcast.payload)
    assert any(name.startswith("control.") for name in expected)
    assert found.session.sent is broadcast.payload


def test_another_server_answers_with_the_same_bits() -> None:
    first, second = server(FedAMM), server(FedAMM)
    for value in second.module.state_dict().values():
        value.zero_()  # all that it knows is the broadcast
    broadcast = first.broadcast(first.module.shared_state(), 3, 1)
    second.begin(broadcast)
    virtual = {name: value.detach() * 1.1 for name, value in first.module.model.named_parameters()}
    question = Question(3, 2, 0, {f"model.{name}": value for name, value in virtual.items()})
    answers = [one.answer(question) for one in (first, second, first)]
    for answer in answers[1:]:
        assert_equal(answer.payload, answers[0].payload)
        assert_equal(answer.metrics, answers[0].metrics)
    other = first.answer(Question(3, 1, 0, question.payload))  # another client, another draw of the transform
    assert any(not torch.equal(other.payload[name], value) for name, value in answers[0].payload.items())


def test_its_draws_are_functions_of_seed_round_and_purpose() -> None:
    def draw(seed: int, round_num: int, purpose: str) -> list[float]:
        found = server(seed=seed)
        found.broadcast(found.module.shared_state(), round_num, 1)
        return [float(torch.rand(1, generator=found.session.generator(purpose))), float(found.session.meta(0)[0].sum())]

    assert draw(0, 1, "a") == draw(0, 1, "a")
    assert len({draw(seed, round_num, purpose)[0] for seed in (0, 1) for round_num in (1, 2) for purpose in "ab"}) == 8
    assert len({draw(seed, round_num, "a")[1] for seed in (0, 1) for round_num in (1, 2)}) == 4


def test_a_contribution_takes_the_place_of_the_payload() -> None:
    class Halves(FedAvg):
        def contribution(self, result: ClientResult, server: Any) -> Any:
            assert server.round_num == 1
            return {name: value / 2 for name, value in result.payload.items()}

    found = server(Halves)
    found.broadcast(found.module.shared_state(), 1, 1)
    (result, _) = results(found)
    contributed = found.contribution(result)
    assert torch.equal(contributed.payload["model.conv1.weight"], result.payload["model.conv1.weight"] / 2)
    assert contributed.num_examples == result.num_examples
