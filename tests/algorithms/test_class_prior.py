"""Class counts that the server infers: the estimate, who is counted when, what clients do with it, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedamm_pl import FederatedDataModule, Orchestrator
from fedamm_pl.algorithms import ClassBalanced, FedAvg, LogitAdjusted
from fedamm_pl.algorithms.class_prior import class_shares
from fedamm_pl.federation.trainer import quiet
from fedamm_pl.losses import logit_adjusted_losses
from fedamm_pl.protocol.messages import ClientResult, State
from tests.algorithms.test_methods import fit
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

COUNTS, SEEN = "estimated.counts", "estimated.seen"
estimating = pytest.mark.parametrize("algorithm", [LogitAdjusted, ClassBalanced])


def make(algorithm: Any, data: TinyData, **options: Any) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, NUM_CLASSES))
    return algorithm(NUM_CLASSES, 1, network, **{"lr": 0.1, "momentum": 0.0, "info": data.info, **options})


# The estimate.


def test_shares_are_those_of_the_summed_changes_of_each_row() -> None:
    before, after = torch.randn(2, 6, 9).unbind()
    raised = (after.double() - before.double()).numpy().sum(1)
    raised[raised <= 0] = 1e-5
    np.testing.assert_allclose(class_shares(before, after).numpy(), raised / raised.sum(), rtol=1e-12)


def test_shares_where_no_row_has_risen_are_equal() -> None:
    before = torch.randn(4, 3)
    for after in (before, before - 1):
        assert class_shares(before, after).tolist() == [0.25] * 4


def test_on_real_images_the_estimate_points_where_the_counts_do() -> None:
    data = FederatedDataModule("fashion_mnist_mini", num_clients=3, imbalance_factor=0.1, batch_size=32)
    torch.manual_seed(0)
    module = LogitAdjusted(10, 1, "small_cnn", lr=0.1, info=data.info, counts="estimated")
    one = Round(module, data)
    found = one.update([one.train(client) for client in range(3)])[COUNTS].double()
    true = torch.tensor(data.info["class_counts"]).double()
    assert abs(float(found.sum() - true.sum())) <= 15  # 3 clients, 10 roundings
    assert torch.cosine_similarity(found, true, dim=0) > 0.9
    assert torch.cosine_similarity(torch.ones(10).double(), true, dim=0) < 0.85  # knowing nothing would not do


# Both sides of the protocol.


def counted(one: Round, result: ClientResult) -> list[int]:
    """What the server should count after a client's first update."""
    before, after = (state["model.3.weight"].double().numpy() for state in (one.broadcast.payload, result.payload))
    raised = (after - before).sum(1)
    raised[raised <= 0] = 1e-5
    return np.round(raised / raised.sum() * result.num_examples).astype(int).tolist()  # type: ignore[no-any-return]


@estimating
def test_each_client_is_counted_once_at_its_first_update(algorithm: Any) -> None:
    data = tiny_data(partition="by_dirichlet")
    module = make(algorithm, data, counts="estimated")
    expected, seen = np.zeros(NUM_CLASSES, dtype=int), [0, 0, 0, 0]
    state: State | None = None
    kept: dict[int, State] = {}
    for round_num, clients in enumerate(([0, 2], [2], [2, 3, 0]), start=1):
        one = Round(module, data, state=state, round_num=round_num)
        assert one.broadcast.payload["class_counts"].tolist() == np.maximum(expected, 5).tolist()
        results = [one.train(client, kept=kept.get(client)) for client in clients]
        for result in results:
            assert result.payload.keys() == module.shared_state().keys()  # nothing more is sent
            kept[result.client_id] = result.kept
            if not seen[result.client_id]:
                expected += counted(one, result)
                seen[result.client_id] = 1
        state = one.update(results)
        assert state[COUNTS].tolist() == expected.tolist()
        assert state[SEEN].tolist() == seen
    assert seen == [1, 0, 1, 1]
    assert expected.max() > 20


def test_a_client_trains_first_as_if_classes_were_equal_then_on_what_it_is_sent() -> None:
    data = tiny_data()
    module = make(LogitAdjusted, data, counts="estimated")
    state = {**module.shared_state(), COUNTS: torch.tensor([90, 30, 10, 0]), SEEN: torch.tensor([1, 1, 0, 0])}
    one = Round(module, data, state=state)
    client = one.module()
    first = one.train(0, client)
    assert client.class_counts.tolist() == [1, 1, 1, 1]
    again = one.train(0, client, kept=first.kept)
    assert client.class_counts.tolist() == [90, 30, 10, 5]
    logits, labels = torch.randn(5, NUM_CLASSES), torch.tensor([0, 1, 2, 3, 0])
    expected = logit_adjusted_losses(logits, labels, torch.tensor([90, 30, 10, 5]), 1.0)
    assert torch.equal(client.objective(logits, labels), expected)
    assert not torch.equal(again.payload["model.3.weight"], first.payload["model.3.weight"])


def test_a_round_of_newcomers_is_fedavg_bit_for_bit_in_class_balanced() -> None:
    data = tiny_data()
    mine, theirs = (
        Round(make(algorithm, data, **options), data)
        for algorithm, options in ((ClassBalanced, {"counts": "estimated"}), (FedAvg, {}))
    )
    for client in range(2):
        found, expected = mine.train(client).payload, theirs.train(client).payload
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_refused_client_is_counted_when_it_comes_again() -> None:
    """Its result does not reach the update, so neither does its estimate."""
    data = tiny_data()
    module = make(LogitAdjusted, data, counts="estimated")
    one = Round(module, data)
    results = [one.train(client) for client in range(2)]
    state = one.update(results[:1])
    assert state[SEEN].tolist() == [1, 0, 0, 0]
    later = Round(module, data, state=state, round_num=2)
    assert later.update([later.train(1)])[SEEN].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_estimate_is_made_in_any_arithmetic(precision: Any) -> None:
    data = tiny_data()
    trainer = type(CPU)("cpu", precision=precision)
    run = Orchestrator(
        make(LogitAdjusted, data, counts="estimated"), data, num_rounds=2, client_fraction=1.0, trainer=trainer
    )
    run.run()
    assert run.state.shared[SEEN].tolist() == [1, 1, 1, 1]
    assert run.state.shared[COUNTS].dtype == torch.int64


# In a plain Trainer.


@estimating
def test_in_a_plain_trainer_all_counts_are_those_of_info(algorithm: Any) -> None:
    data = tiny_data()
    states = []
    for counts in ("local", "global", "estimated"):
        module = make(algorithm, data, counts=counts)
        with quiet():
            fit(module, data.train_dataloader(), epochs=1)
        assert module.class_counts.tolist() == data.info["class_counts"]
        states.append(module.shared_state())
    for other in states[1:]:
        assert all(torch.equal(other[name], value) for name, value in states[0].items())


# What is refused.


@estimating
@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_robust_aggregations_are_refused_by_name_with_estimated_counts_alone(algorithm: Any, aggregation: str) -> None:
    data = tiny_data()
    options: dict[str, Any] = {"num_rounds": 1, "client_fraction": 1.0, "aggregation": aggregation, "trainer": CPU}
    message = rf"`aggregation` to be num_examples or uniform for {algorithm.__name__}, got {aggregation}: .*estimated"
    with pytest.raises(ValueError, match=message):
        Orchestrator(make(algorithm, data, counts="estimated"), data, **options)
    Orchestrator(make(algorithm, data, counts="local"), data, **options)


@estimating
def test_a_network_that_ends_in_no_linear_layer_is_refused_with_estimated_counts_alone(algorithm: Any) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, NUM_CLASSES, 8), nn.Flatten())

    with pytest.raises(ValueError, match="Expected `model` to end in a linear layer, got Sequential without any"):
        algorithm(NUM_CLASSES, 1, network(), counts="estimated")
    algorithm(NUM_CLASSES, 1, network(), counts="local")


def test_the_option_belongs_to_one_module_not_to_the_class() -> None:
    data = tiny_data()
    make(LogitAdjusted, data, counts="estimated")
    assert make(LogitAdjusted, data, counts="local").returned == {}


@pytest.mark.parametrize(
    ("counts", "server"), [("local", "nothing"), ("global", "the class counts"), ("estimated", "nothing")]
)
def test_what_is_taken_depends_on_the_option(counts: Any, server: str) -> None:
    privileges = make(LogitAdjusted, tiny_data(), counts=counts).privileges
    assert privileges.server.startswith(server)
    assert ("infers class counts" in privileges.work) == (counts == "estimated")
    assert privileges.revealed == "nothing"
