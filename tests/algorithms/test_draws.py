"""What is drawn, at clients and at the server, follows from the seed of the run and from nothing else; what is out of range is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedamm_pl.algorithms
from fedamm_pl import FederatedModule, Orchestrator
from fedamm_pl.algorithms import Climb, CReFF, FedNova
from fedamm_pl.protocol.messages import ClientResult, Question, State
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

SHIPPED = sorted(fedamm_pl.algorithms.__all__)
every_shipped_method = pytest.mark.parametrize("name", SHIPPED)
OPTIONS: dict[str, dict[str, Any]] = {
    "CReFF": {"num_features": 5, "match_steps": 3, "retrain_steps": 5},
    "FEDIC": {"finetune_steps": 3, "calibration_steps": 3, "distill_steps": 3, "num_draws": 2},
    "Scaffold": {"momentum": 0.0},
}


def make(name: str, data: TinyData, dropout: float = 0.3) -> FederatedModule:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, NUM_CLASSES))
    algorithm = getattr(fedamm_pl.algorithms, name)
    module: FederatedModule = algorithm(NUM_CLASSES, 1, network, lr=0.1, info=data.info, **OPTIONS.get(name, {}))
    return module


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@every_shipped_method
def test_one_seed_gives_equal_bits_whatever_was_drawn_before_and_another_seed_others(name: str) -> None:
    data, states = tiny_data(), []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        module = make(name, data)
        torch.manual_seed(before)
        run = Orchestrator(module, data, num_rounds=2, local_epochs=1, trainer=CPU, seed=seed)
        run.run()
        assert run.state.counts == dict.fromkeys(run.state.counts, 0)
        states.append(run.state)
    assert same(states[0].shared, states[1].shared)
    assert states[0].history == states[1].history
    assert not same(states[0].shared, states[2].shared)


DRAWS = {"CReFF": "update", "FEDIC": "update", "MetaFineTune": "update", "RatioLoss": "broadcast", "FedAMM": "answer"}
"""Where a method's server draws, beside sampling: at the other methods, and in the other hooks, it does not."""


@every_shipped_method
def test_the_servers_own_draws_follow_from_its_seed(name: str) -> None:
    """The same clients' results, and the same question, at servers of two seeds."""
    data = tiny_data()
    results: list[ClientResult] = []
    outcomes = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        one = Round(make(name, data, dropout=0.0), data, seed=seed)
        results = results or [one.train(client) for client in range(3)]
        torch.manual_seed(before)
        outcome = {"broadcast": one.broadcast.payload, "update": one.update(results)}
        if name == "FedAMM":
            payload = {f"model.{key}": value.detach() for key, value in one.server.module.model.named_parameters()}
            outcome["answer"] = one.server.answer(Question(1, 0, 0, payload)).payload
        outcomes.append(outcome)
    for hook, found in outcomes[0].items():
        assert same(found, outcomes[1][hook]), hook
        assert same(found, outcomes[2][hook]) == (DRAWS.get(name) != hook), hook


def test_artificial_features_and_classifiers_of_creff_start_from_the_seed() -> None:
    data, states = tiny_data(), []
    module = make("CReFF", data)
    module.hparams.update(match_steps=0, retrain_steps=0)
    for seed, round_num in ((0, 1), (0, 1), (1, 1), (0, 2)):
        one = Round(module, data, seed=seed, round_num=round_num)
        states.append(one.update([one.train(0)]))
    first, again, other_seed, other_round = states
    for entry in ("features", "retrained.weight"):
        assert torch.equal(first[entry], again[entry])
        assert not torch.equal(first[entry], other_seed[entry])
        assert not torch.equal(first[entry], other_round[entry])
    assert float(first["features"].std()) == pytest.approx(1, abs=0.2)


# Numbers that a method's clients cannot send.


@pytest.mark.parametrize(
    ("algorithm", "entry", "value", "problem"),
    [
        (FedNova, "num_steps", torch.tensor(0), "its num_steps is 0, expected 1 to"),
        (FedNova, "num_steps", torch.tensor(-3), "its num_steps is -3, expected 1 to"),
        (FedNova, "num_steps", torch.tensor(10**6), "its num_steps is 1000000, expected 1 to"),
        (
            Climb,
            "global_loss",
            torch.tensor(-0.5, dtype=torch.float64),
            r"its global_loss is -0\.5, a cross-entropy is 0",
        ),
        (CReFF, "present", torch.tensor([0, 1, 2, 1]), "present holds other values than 0 and 1"),
        (CReFF, "present", torch.tensor([0, 1, -1, 1]), "present holds other values than 0 and 1"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(
    algorithm: type[FederatedModule], entry: str, value: Tensor, problem: str
) -> None:
    data = tiny_data()
    one = Round(make(algorithm.__name__, data), data)
    result = one.train(0)
    assert result.payload[entry].dtype == value.dtype
    one.server.contribution(result)
    with pytest.raises(ValueError, match=problem):
        one.server.contribution(dataclasses.replace(result, payload={**result.payload, entry: value}))


@every_shipped_method
def test_clients_send_what_is_expected_of_them(name: str) -> None:
    data = tiny_data()
    one = Round(make(name, data), data)
    expected, result = one.server.expected_payload(), one.train(0)
    assert {key: (value.dtype, value.shape) for key, value in result.payload.items()} == {
        key: (value.dtype, value.shape) for key, value in expected.items()
    }
