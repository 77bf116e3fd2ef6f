"""FedYoYo: effective numbers and the prior made of them, the loss of two views against a slow loop, its limits and refusals."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl import FedAvg
from fedamm_pl.algorithms import FedYoYo, LogitAdjusted
from fedamm_pl.algorithms.fedyoyo import effective_numbers, moved_numbers
from fedamm_pl.data.views import strong_view, weak_view
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.models import features_and_logits
from fedamm_pl.seeding import derive_seed, torch_generator
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
LR = 0.1


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES))


def make(algorithm: Any, data: TinyData, **options: Any) -> Any:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, mlp(), **{"lr": LR, "momentum": 0.0, "info": data.info, **options}).double()


def uneven() -> TinyData:
    """Clients of different sizes and classes."""
    return tiny_data(num_clients=3, partition="by_dirichlet", dirichlet_alpha=0.5)


# Effective numbers.


def slow_numbers(features: np.ndarray, labels: np.ndarray, batches: list[list[int]]) -> list[float]:
    total = [0.0] * NUM_CLASSES
    for batch in batches:
        for c in range(NUM_CLASSES):
            own = [i for i in batch if labels[i] == c]
            centred = [features[i] - features[labels == c].mean(0) for i in own]
            if len(own) == 1:
                total[c] += 1
            elif own:
                cosines = [a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30) for a in centred for b in centred]
                total[c] += 1 / max(sum(cosines) / len(own) ** 2, 1e-6)
    return total


@pytest.mark.parametrize("size", [1, 4, 7, 30])
def test_effective_numbers_are_those_of_a_slow_loop(size: int) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 5)), rng.choice(3, 30, p=[0.6, 0.3, 0.1])
    batches = [list(range(first, min(first + size, 30))) for first in range(0, 30, size)]
    found = effective_numbers(
        torch.from_numpy(features), torch.from_numpy(labels), map(torch.tensor, batches), NUM_CLASSES
    )
    assert found.tolist() == pytest.approx(slow_numbers(features, labels, batches), rel=1e-6)
    assert found[3] == 0
    if size == 1:
        assert found[:3].tolist() == np.bincount(labels).tolist()


def test_uncorrelated_features_count_one_by_one_and_opposite_ones_for_a_million() -> None:
    features = torch.cat([torch.eye(4), -torch.eye(4), torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])])
    labels = torch.tensor([0] * 8 + [1, 1])  # means of 0
    found = effective_numbers(features, labels, [torch.arange(4), torch.arange(4, 10)], 2)
    assert found.tolist() == pytest.approx([8.0, 1e6])


def test_one_image_counts_for_one() -> None:
    assert effective_numbers(torch.ones(1, 3), torch.tensor([1]), [torch.tensor([0])], 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("before", "found", "expected"),
    [
        (None, [10.0, 20.0, 3.0], [10, 20, 3]),
        (None, [10.0, 20.0, 2e5], [10, 20, 15]),
        (None, [1e5, 2e5, 3e5], [1e5, 2e5, 3e5]),  # nothing to replace them by
        ([10.0, 20.0, 3.0], [20.0, 20.0, 1.0], [11, 20, 2.8]),
        ([10.0, 20.0, 3.0], [1e6, 20.0, 3.0], [1000, 20, 3]),
    ],
)
def test_numbers_move_slowly_and_outliers_are_replaced(before: Any, found: list[float], expected: list[float]) -> None:
    old = None if before is None else torch.tensor(before, dtype=torch.float64)
    assert moved_numbers(old, torch.tensor(found, dtype=torch.float64)).tolist() == pytest.approx(expected)


def measured(this: Round, client: int) -> Tensor:
    """A client's effective numbers, from the received model in evaluation mode."""
    module, own = this.module().eval(), this.data.client(client)
    module.load_shared_state(this.broadcast.payload)
    (batch,) = own.plain_batches(1000)
    with torch.no_grad():
        features, _ = features_and_logits(module.model, module.prepare(batch[0]))
    seed = derive_seed(this.session(client).task.seed, "effective numbers")
    order = torch.randperm(own.num_examples, generator=torch_generator(seed))
    batches = [order[first : first + own.batch_size].tolist() for first in range(0, len(order), own.batch_size)]
    return torch.tensor(slow_numbers(features.numpy(), batch[1].numpy(), batches), dtype=torch.float64)


def test_the_prior_is_last_rounds_estimate_and_uniform_at_first() -> None:
    data = uneven()
    first = Round(make(FedYoYo, data), data, DOUBLE)
    assert first.broadcast.payload["prior"].tolist() == [0.25] * 4
    results = [first.train(client) for client in range(3)]
    numbers = [measured(first, client) for client in range(3)]
    for result, expected in zip(results, numbers, strict=True):
        torch.testing.assert_close(result.payload["effective_numbers"], expected, rtol=1e-6, atol=1e-9)
    state = first.update(results)
    found = moved_numbers(None, 1 + sum(numbers))
    torch.testing.assert_close(state["effective_numbers"], found, rtol=1e-6, atol=1e-9)
    second = Round(make(FedYoYo, data), data, DOUBLE, state=state, round_num=2)
    torch.testing.assert_close(second.broadcast.payload["prior"], (found / found.sum()).float())
    later = second.update([second.train(client) for client in range(3)])
    numbers = [measured(second, client) for client in range(3)]
    expected = moved_numbers(found, 1 + sum(numbers))
    torch.testing.assert_close(later["effective_numbers"], expected, rtol=1e-6, atol=1e-9)


# Training.


def slow_training(this: Round, client: int, prior: list[float], options: dict[str, Any]) -> nn.Module:
    own, session, module = this.data.client(client), this.session(client), this.module()
    network = mlp().double()
    network.load_state_dict({n.removeprefix("model."): v for n, v in this.state.items() if n.startswith("model.")})
    counts = own.class_counts(NUM_CLASSES).tolist()
    shares = [count / sum(counts) for count in counts]
    gamma, tau, temperature = options["gamma"], options["tau"], options["temperature"]
    step, mixed = 0, list(prior)
    plain = dataclasses.replace(own, augmentation="none").train_loader(session.task.seed)
    for _ in range(this.broadcast.local_epochs):
        for images, labels in plain:
            step += 1
            if step == 1 or options["prior_mix"] == "compounding":
                mixed = [(1 - gamma) * p + gamma * q for p, q in zip(mixed, shares, strict=True)]
            generator = torch_generator(derive_seed(session.task.seed, "views", step))
            weak = weak_view(images, own.augmentation, 15.0, generator)
            strong = strong_view(images, own.augmentation, generator)
            shift = torch.tensor([np.log(p**tau + 1e-9) for p in mixed], dtype=torch.float64)
            u_w, u_s = (network(module.prepare(view)) + shift for view in (weak, strong))
            loss = (functional.cross_entropy(u_w, labels) + functional.cross_entropy(u_s, labels)) / 2
            distances = []
            for w, s, y in zip(u_w.detach(), u_s, labels, strict=True):
                if int(w.argmax()) == int(y):
                    p = (w / temperature).softmax(0)
                    distances.append((p * (p.log() - (s / temperature).log_softmax(0))).sum())
            if distances:
                growing = min(this.broadcast.round_num / options["warmup"], 1)
                loss = loss + options["kd_weight"] * growing * torch.stack(distances).mean()
            grads = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for value, grad in zip(network.parameters(), grads, strict=True):
                    value -= LR * (grad + 5e-4 * value)
    return network


@pytest.mark.parametrize("prior_mix", ["once", "compounding"])
def test_a_round_is_a_slow_loop(prior_mix: str) -> None:
    data = uneven()
    options: dict[str, Any] = {"prior_mix": prior_mix, "gamma": 0.3, "tau": 1.2, "temperature": 2.0, "warmup": 4}
    options["kd_weight"] = 3.0
    start = make(FedYoYo, data).shared_state()
    numbers = torch.tensor([40.0, 20.0, 10.0, 2.0], dtype=torch.float64)
    module = make(FedYoYo, data, **options)
    this = Round(module, data, DOUBLE, state={**start, "effective_numbers": numbers}, round_num=3, local_epochs=2)
    for client in range(3):
        result = this.train(client)
        network = slow_training(this, client, (numbers / numbers.sum()).tolist(), options)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(result.payload[f"model.{name}"], value, rtol=1e-5, atol=1e-6)
        assert set(result.metrics) >= {"loss", "distilled"}
        assert not result.kept


def test_both_views_are_one_batch_and_the_same_where_it_is_seen_again() -> None:
    seen: list[tuple[bool, Tensor]] = []

    class Noted(FedYoYo):
        def logits(self, prepared: Tensor) -> Tensor:
            if self.training:
                seen.append((self.sees_again, prepared))
            return super().logits(prepared)

    data = uneven()
    Round(make(Noted, data, local_optimizer="sam"), data, DOUBLE).train(0)
    assert [again for again, _ in seen[:4]] == [False, True, False, True]
    assert len(seen[0][1]) == 2 * 16
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][1], seen[2][1])
    weak, strong = seen[0][1].chunk(2)
    assert not torch.equal(weak, strong)


# Limits.


def test_without_strong_view_and_global_prior_it_is_logit_adjusted_with_local_counts() -> None:
    data = tiny_data(num_clients=2, partition="iid")
    assert all((data.client(client).class_counts(NUM_CLASSES) > 0).all() for client in range(2))
    options: dict[str, Any] = {"gamma": 1.0, "tau": 1.5, "strong_view": False, "rotation": 0.0}
    mine = Round(make(FedYoYo, data, **options), data, DOUBLE, local_epochs=2).train(0)
    theirs = Round(make(LogitAdjusted, data, counts="local", tau=1.5), data, DOUBLE, local_epochs=2).train(0)
    for name, value in theirs.payload.items():
        torch.testing.assert_close(mine.payload[name], value, rtol=1e-5, atol=1e-6)


def test_without_prior_and_distillation_it_is_fedavg_on_two_views() -> None:
    data = uneven()
    this = Round(make(FedYoYo, data, tau=0.0, kd_weight=0.0), data, DOUBLE)
    options: dict[str, Any] = {"prior_mix": "once", "gamma": 0.0, "tau": 0.0, "temperature": 1.0, "warmup": 1}
    network = slow_training(this, 0, [0.25] * 4, {**options, "kd_weight": 0.0})
    for name, value in network.state_dict().items():
        torch.testing.assert_close(this.train(0).payload[f"model.{name}"], value)
    plain = Round(make(FedAvg, data), data, DOUBLE).train(0).payload["model.1.weight"]
    assert not torch.allclose(plain, network[1].weight)


def test_classes_that_a_client_lacks_keep_their_share_of_the_prior() -> None:
    data = tiny_data(num_clients=2, partition="by_num_classes")
    assert (data.client(0).class_counts(NUM_CLASSES) == 0).any()
    result = Round(make(FedYoYo, data, gamma=1.0), data, DOUBLE).train(0)
    assert all(value.isfinite().all() for value in result.payload.values())


# What is sent.


@pytest.mark.parametrize("value", [-0.5, 1e12])
def test_numbers_that_cannot_be_are_refused(value: float) -> None:
    data = uneven()
    this = Round(make(FedYoYo, data), data, DOUBLE)
    result = this.train(0)
    numbers = result.payload["effective_numbers"].clone()
    numbers[1] = value
    spoiled = dataclasses.replace(result, payload={**result.payload, "effective_numbers": numbers})
    with pytest.raises(ValueError, match="its effective_numbers are not all between 0 and"):
        this.server.contribution(spoiled)
    this.server.contribution(result)


def test_what_it_takes_beside_fedavg() -> None:
    found = make(FedYoYo, uneven()).privileges
    assert "class counts" in found.revealed
    assert "class counts" in found.server_state
    assert (found.server, found.client_state) == ("nothing", "nothing")
    assert "two views" in found.work
    assert "views" not in make(FedYoYo, uneven(), strong_view=False).privileges.work
