"""FedReLa: its gains and draws against slow loops, who is re-labelled when, what is trained then, and where it is the base method."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl import FedAvg
from fedamm_pl.algorithms import FedReLa, LogitAdjusted
from fedamm_pl.algorithms.fedrela import gains, rarity, relabelled
from fedamm_pl.data.client import augmented_batch
from fedamm_pl.federation.executors import Sequential, Vectorized
from fedamm_pl.federation.orchestrator import Orchestrator
from fedamm_pl.federation.sampling import sample_clients
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.seeding import derive_seed, torch_generator
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
OFTEN: dict[str, Any] = {"relabel_round": 1, "rate": 40.0}
"""Options with which some of few examples are re-labelled."""


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES))


def make(algorithm: Any, data: TinyData, network: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, network or mlp(), **{"lr": 0.1, "momentum": 0.0, "info": data.info, **options})


def uneven(**options: Any) -> TinyData:
    """Clients of different sizes and classes."""
    return tiny_data(num_clients=3, partition="by_dirichlet", dirichlet_alpha=0.5, **options)


def own_labels(data: TinyData, client: int) -> Tensor:
    own = data.client(client)
    return own.labels[own.indices]


# The formulas.


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([10, 5, 0], [0, 0.5, 1]), ([8, 4, 4, 2], [0, 2 / 3, 2 / 3, 1]), ([3, 3, 3], [1, 1, 1]), ([1, 0], [0, 1])],
)
def test_rarity(counts: list[int], expected: list[float]) -> None:
    assert rarity(torch.tensor(counts)).tolist() == pytest.approx(expected)


def slow_gains(q: np.ndarray, labels: np.ndarray, rate: float) -> np.ndarray:
    size, num_classes = q.shape
    counts = [int((labels == c).sum()) for c in range(num_classes)]
    span = max(counts) - min(counts)
    d = [1 - (count - min(counts)) / span if span else 1.0 for count in counts]
    z = np.zeros((size, num_classes))
    for i in range(size):
        same = q[labels == labels[i]]
        for c in range(num_classes):
            z[i, c] = (q[i, c] - same[:, c].mean()) / max(same[:, c].std(), 1e-6)
    larger = int(rate / 100 * size)
    found = np.zeros((size, num_classes))
    for c in range(num_classes):
        threshold = sorted(z[:, c])[min(max(size - 1 - larger, 0), size - 1)]
        for i in range(size):
            found[i, c] = np.tanh(z[i, c] - threshold) * max(d[c] - d[labels[i]], 0)
    return found


def problem(size: int, seed: int, num_classes: int = NUM_CLASSES) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(num_classes, size, p=[0.6, 0.25, 0.15, 0.0][:num_classes])
    return rng.dirichlet(np.ones(num_classes), size), labels


@pytest.mark.parametrize("rate", [0.0, 5.0, 33.0, 100.0])
@pytest.mark.parametrize("size", [1, 2, 19, 40])
def test_gains_are_those_of_a_slow_loop(size: int, rate: float) -> None:
    q, labels = problem(size, seed=size)
    found = gains(torch.from_numpy(q), torch.from_numpy(labels), rate)
    np.testing.assert_allclose(found, slow_gains(q, labels, rate), rtol=1e-9, atol=1e-9)


def test_as_many_as_the_rate_says_exceed_the_threshold_of_a_class() -> None:
    q, labels = problem(60, seed=3)
    labels = np.zeros_like(labels)  # d is 1 for all other classes
    found = gains(torch.from_numpy(q), torch.from_numpy(labels), 10.0)
    assert (found[:, 1:] > 0).sum(0).tolist() == [6, 6, 6]
    assert not (found[:, 0] > 0).any()


def test_new_labels_are_those_of_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    gain, draws, labels = rng.normal(size=(50, 4)), rng.random((50, 4)), rng.integers(0, 4, 50)
    expected = []
    for row, drawn, label in zip(gain, draws, labels, strict=True):
        candidates = [c for c in range(4) if row[c] > drawn[c]]
        expected.append(max(candidates, key=lambda c, row=row: row[c]) if candidates else label)
    found = relabelled(torch.from_numpy(gain), torch.from_numpy(labels), torch.from_numpy(draws))
    assert found.tolist() == [int(label) for label in expected]
    assert found.dtype == torch.int64
    assert 0 < (found.numpy() != labels).sum() < 50


@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), rate=st.floats(0, 100))
@settings(deadline=None, derandomize=True, database=None, max_examples=60)
def test_no_label_moves_to_a_class_that_is_as_frequent_or_more(seed: int, size: int, rate: float) -> None:
    q, labels = problem(size, seed)
    before = torch.from_numpy(labels)
    after = relabelled(gains(torch.from_numpy(q), before, rate), before, torch.zeros(size, NUM_CLASSES))
    counts, moved = before.bincount(minlength=NUM_CLASSES), before != after
    assert (counts[after[moved]] < counts[before[moved]]).all()
    if rate == 0 or size == 1:
        assert not moved.any()


def test_classes_that_are_equally_frequent_keep_their_examples() -> None:
    q, _ = problem(40, seed=0)
    labels = torch.arange(40) % NUM_CLASSES
    assert not gains(torch.from_numpy(q), labels, 50.0).any()


def test_the_one_example_of_a_class_stays_unless_the_threshold_is_below_its_mean() -> None:
    q, _ = problem(21, seed=0)
    labels = torch.tensor([0] * 20 + [1])  # class 2 is absent, so rarer than class 1
    for rate, moves in ((5.0, False), (90.0, True)):
        gain = gains(torch.from_numpy(q), labels, rate)[20]
        assert bool(gain[2] > 0) == moves
        assert gain[0] == gain[1] == 0


# Rounds.


def expected_labels(this: Round, client: int, network: nn.Module, num_passes: int, rate: float) -> Tensor:
    """The new labels, from the definition: probabilities of the received model in evaluation mode, averaged over draws."""
    own, session = this.data.client(client), this.session(client)
    generator = torch_generator(derive_seed(session.task.seed, "relabel"))
    network.load_state_dict({name.removeprefix("model."): value for name, value in this.state.items()})
    network.eval()
    module, labels = this.module(), own_labels(this.data, client)
    predicted = []
    with torch.no_grad():
        for _ in range(num_passes):
            images, _ = augmented_batch(own.images, own.labels, own.indices, own.augmentation, generator)
            predicted.append(network(module.prepare(images)).softmax(1))
    gain = slow_gains(torch.stack(predicted).mean(0).double().numpy(), labels.numpy(), rate)
    draws = torch.rand(gain.shape, generator=generator, dtype=torch.float64)
    return relabelled(torch.from_numpy(gain), labels, draws)


def test_clients_relabel_by_the_received_model_in_evaluation_mode() -> None:
    data = uneven()
    module = make(FedReLa, data, "tests.tiny.tiny_resnet", **OFTEN, num_passes=3)
    this = Round(module, data, local_epochs=1)
    changed = 0
    for client in range(3):
        result = this.train(client)
        assert set(result.kept) == {"labels"}
        assert result.kept["labels"].dtype == torch.int64
        expected = expected_labels(this, client, module.model, 3, 40.0)
        assert torch.equal(result.kept["labels"], expected)
        assert result.payload.keys() == this.state.keys()
        share = float((expected != own_labels(data, client)).double().mean())
        assert result.metrics["relabelled"] == pytest.approx(share)
        changed += share > 0
    assert changed >= 2


def test_predictions_are_drawn_by_client_and_round_and_averaged() -> None:
    data = uneven()
    module = make(FedReLa, data, num_passes=4)
    found = []
    for client, round_num in ((0, 1), (0, 1), (0, 2), (1, 1)):
        this = Round(module, data, round_num=round_num)
        held, own = this.module().eval(), data.client(0)
        seed = derive_seed(this.session(client).task.seed, "relabel")
        with torch.no_grad():
            found.append(held._predicted(own, torch_generator(seed)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])
    torch.testing.assert_close(found[0].sum(1), torch.ones(len(found[0])))


def test_training_goes_on_with_the_new_labels_and_a_tenth_of_the_learning_rate() -> None:
    data = uneven()
    this = Round(make(FedReLa, data, **OFTEN).double(), data, DOUBLE, local_epochs=2)
    for client in range(3):
        result = this.train(client)
        own, network = data.client(client).relabelled(result.kept["labels"]), mlp().double()
        network.load_state_dict({name.removeprefix("model."): value for name, value in this.state.items()})
        loader = own.train_loader(this.session(client).task.seed)
        for _ in range(2):
            for images, labels in loader:
                loss = functional.cross_entropy(network(this.module().prepare(images)), labels)
                grads = torch.autograd.grad(loss, list(network.parameters()))
                with torch.no_grad():
                    for value, grad in zip(network.parameters(), grads, strict=True):
                        value -= 0.01 * (grad + 5e-4 * value)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(result.payload[f"model.{name}"], value, rtol=1e-9, atol=1e-9)


def test_labels_are_computed_once() -> None:
    data = uneven()
    module = make(FedReLa, data, **OFTEN)
    first = Round(module, data)
    kept = first.train(0).kept
    later = Round(module, data, state=first.update([first.train(client) for client in range(3)]), round_num=2)
    assert torch.equal(later.train(0, kept=kept).kept["labels"], kept["labels"])
    assert not torch.equal(later.train(0).kept["labels"], kept["labels"])  # were it to compute them anew


def test_clients_relabel_when_they_next_take_part() -> None:
    data = tiny_data(num_clients=8)
    options: dict[str, Any] = {"client_fraction": 0.25, "local_epochs": 1, "seed": 1, "trainer": CPU}
    run = Orchestrator(make(FedReLa, data, relabel_round=3), data, num_rounds=4, **options)
    run.run()
    rounds = [set(sample_clients(8, 0.25, 1, number)) for number in (1, 2, 3, 4)]
    took_part = rounds[2] | rounds[3]
    assert (rounds[0] | rounds[1]) - took_part
    assert rounds[3] - rounds[2]
    with_labels = {client for client, version in run.state.kept.items() if run._store.read(client, version)}
    assert with_labels == took_part


@pytest.mark.parametrize("base", ["cross_entropy", "balanced_softmax"])
def test_side_by_side_clients_relabel_and_slow_down_alike(base: str) -> None:
    data = uneven()
    runs = []
    for executor in (Sequential(), Vectorized()):
        module = make(FedReLa, data, base=base, relabel_round=2, rate=40.0)
        options: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 1, "trainer": DOUBLE}
        runs.append(Orchestrator(module, data, num_rounds=3, executor=executor, **options))
        runs[-1].run()
    first, second = runs
    assert first.state.history[-1]["client/relabelled"] > 0
    for mine, theirs in zip(first.state.history, second.state.history, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    for name, value in first.state.shared.items():
        torch.testing.assert_close(second.state.shared[name], value, rtol=1e-9, atol=1e-9)
    for client, version in first.state.kept.items():
        labels = [run._store.read(client, version)["labels"] for run in runs]
        assert torch.equal(*labels)


# The base methods.


BASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "cross-entropy": (FedAvg, {}, {"base": "cross_entropy"}),
    "balanced softmax": (LogitAdjusted, {"counts": "local"}, {"base": "balanced_softmax"}),
    "balanced softmax, mask": (
        LogitAdjusted,
        {"counts": "local", "absent": "mask"},
        {"base": "balanced_softmax", "absent": "mask"},
    ),
}


@pytest.mark.parametrize("base", BASES.values(), ids=list(BASES))
@pytest.mark.parametrize("options", [{"relabel_round": 2}, {"relabel_round": 1, "rate": 0.0, "lr_factor": 1.0}])
def test_before_it_relabels_it_is_its_base_bit_for_bit(base: Any, options: dict[str, Any]) -> None:
    data, (theirs, their_options, own) = uneven(), base
    first = Round(make(FedReLa, data, **own, **options), data, local_epochs=2)
    second = Round(make(theirs, data, **their_options), data, local_epochs=2)
    for client in range(3):
        found, expected = first.train(client), second.train(client)
        assert all(torch.equal(found.payload[name], value) for name, value in expected.payload.items())
        assert found.metrics["loss"] == expected.metrics["loss"]
        assert found.metrics["relabelled"] == 0


class Noted(FedReLa):
    counts_seen: Tensor

    def on_train_start(self) -> None:
        super().on_train_start()
        self.counts_seen = self.class_counts.clone()


def test_balanced_softmax_counts_the_new_labels() -> None:
    data = uneven()
    this = Round(make(Noted, data, base="balanced_softmax", **OFTEN), data)
    module = this.module()
    labels = this.train(0, module).kept["labels"]
    assert not torch.equal(labels, own_labels(data, 0))
    assert module.counts_seen.tolist() == labels.bincount(minlength=NUM_CLASSES).tolist()


def test_a_plain_trainer_trains_the_base_and_needs_counts_for_balanced_softmax() -> None:
    data = tiny_data()
    module = make(Noted, data, base="balanced_softmax")
    with quiet():
        CPU.build(max_epochs=1).fit(module, data.train_dataloader())
    assert module.counts_seen.tolist() == data.info["class_counts"]
    nameless = make(Noted, data, base="balanced_softmax", info=None)
    with quiet(), pytest.raises(ValueError, match="Expected `info` of Noted to hold class_counts, got none"):
        CPU.build(max_epochs=1).fit(nameless, [(torch.zeros(4, 1, 8, 8), torch.arange(4))])


def test_what_it_takes_beside_fedavg() -> None:
    found = make(FedReLa, uneven()).privileges
    assert (found.server, found.revealed, found.server_state) == ("nothing",) * 3
    assert "labels" in found.client_state
    assert "5 passes" in found.work
