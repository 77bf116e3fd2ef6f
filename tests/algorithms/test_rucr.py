"""RUCR: its loss, mixed features and re-trained classifier against slow loops; two rounds by hand; what is deployed and refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl import FedAvg
from fedamm_pl.algorithms import RUCR
from fedamm_pl.algorithms.rectification import rectify, virtual_features
from fedamm_pl.algorithms.rucr import anchor_losses
from fedamm_pl.federation.orchestrator import Orchestrator
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.seeding import derive_seed, torch_generator
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
LR, HIDDEN = 0.1, 6
SMALL: dict[str, Any] = {"num_features": 5, "rectify_epochs": 3, "rectify_batch_size": 8, "rectify_lr": 0.1}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_CLASSES))


def make(algorithm: Any, data: TinyData, network: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, network or mlp(), **{"lr": LR, "momentum": 0.0, "info": data.info, **options})


def uneven() -> TinyData:
    """Clients of different sizes and classes."""
    return tiny_data(num_clients=3, partition="by_dirichlet", dirichlet_alpha=0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The term that draws features to anchors.


@pytest.mark.parametrize("held", [[0, 1, 2, 3], [0, 2], [1]])
@pytest.mark.parametrize("shares", [[0.4, 0.3, 0.2, 0.1], [0.5, 0.5, 0.0, 0.0]])
def test_the_term_is_that_of_a_slow_loop(held: list[int], shares: list[float]) -> None:
    features = torch.randn(8, 5, generator=seeded(), dtype=torch.float64)
    anchors = torch.randn(NUM_CLASSES, 5, generator=seeded(1), dtype=torch.float64)
    labels = torch.tensor(held)[torch.arange(8) % len(held)]
    expected = []
    for z, y in zip(features.numpy(), labels.tolist(), strict=True):
        scores = np.zeros(NUM_CLASSES)
        for c in range(NUM_CLASSES):
            if c in held and shares[c] > 0:
                anchor = anchors[c].numpy()
                scores[c] = z @ anchor / np.linalg.norm(z) / np.linalg.norm(anchor) / 0.9
        if shares[y] == 0:
            expected.append(0.0)
            continue
        scores[y] += np.log(shares[y])
        expected.append(float(-np.log(np.exp(scores[y]) / np.exp(scores).sum())))
    mask = torch.zeros(NUM_CLASSES, dtype=torch.bool).index_fill(0, torch.tensor(held), True)
    moving = features.clone().requires_grad_()
    found = anchor_losses(moving, labels, anchors, torch.tensor(shares, dtype=torch.float64), mask, 0.9)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.grad(found.sum(), moving)[0].isfinite().all()


# Mixed features and the classifier that is trained on them.


@pytest.mark.parametrize(("size", "rescale"), [(40, True), (40, False), (3, True)])
def test_mixed_features_lie_between_directions_and_local_features_of_any_class(size: int, rescale: bool) -> None:
    directions = functional.normalize(torch.randn(3, 5, generator=seeded(), dtype=torch.float64), dim=1)
    own = 4 * torch.rand(size, 5, generator=seeded(1), dtype=torch.float64)
    found = virtual_features(directions, own, 20, 0.35, 0.95, rescale, seeded(2))
    assert found.shape == (3, 20, 5)
    found = found / (own.norm(dim=1).mean() if rescale else 1)
    units, mixes, all_used = own / own.norm(dim=1, keepdim=True), [], []
    for c in range(3):
        used = []
        for feature in found[c]:
            # of each local example: the lambda that comes nearest, and how near
            gaps = directions[c] - units
            ratio = ((feature - units) * gaps).sum(1) / gaps.square().sum(1)
            misses = (units + ratio[:, None] * gaps - feature).norm(dim=1)
            used.append(int(misses.argmin()))
            assert misses.min() < 1e-12
            mixes.append(float(ratio[used[-1]]))
        assert len(set(used)) == 20 or size < 20
        all_used.append(used)
    assert all_used[0] != all_used[1]
    assert all(abs(100 * mix - round(100 * mix)) < 1e-6 for mix in mixes)
    assert min(mixes) >= 0.35 - 1e-9
    assert max(mixes) <= 0.95 + 1e-9
    assert max(mixes) - min(mixes) > 0.4


def test_the_classifier_is_trained_by_plain_sgd_and_other_classes_stay_out() -> None:
    features, classes = torch.randn(3, 7, 5, generator=seeded(), dtype=torch.float64), torch.tensor([0, 1, 3])
    layer = nn.Linear(5, NUM_CLASSES).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    found = rectify(features, classes, weight, bias, 4, 0.1, 6, seeded(3))
    assert torch.equal(weight, layer.weight)  # nothing is changed behind the caller
    optimizer, generator = torch.optim.SGD(layer.parameters(), lr=0.1), seeded(3)
    labels = classes.repeat_interleave(7)
    mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    for _ in range(4):
        order = torch.randperm(21, generator=generator)
        for first in range(0, 21, 6):
            chosen = order[first : first + 6]
            optimizer.zero_grad()
            functional.cross_entropy(layer(features.flatten(0, 1)[chosen]) + mask, labels[chosen]).backward()
            optimizer.step()
    torch.testing.assert_close(found, (layer.weight.detach(), layer.bias.detach()), rtol=1e-10, atol=1e-10)
    assert torch.equal(found[0][2], weight[2])
    assert not torch.equal(found[0][0], weight[0])


# Rounds.


def measured(this: Round, client: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, class means and counts of a client under the received model in evaluation mode."""
    module = this.module().eval()
    module.load_shared_state(this.broadcast.payload)
    (batch,) = this.data.client(client).plain_batches(1000)
    with torch.no_grad():
        features, _ = features_and_logits(module.model, module.prepare(batch[0]))
    means = torch.zeros(NUM_CLASSES, features.shape[1], dtype=features.dtype)
    for c in set(batch[1].tolist()):
        means[c] = features[batch[1] == c].mean(0)
    return features, means, batch[1].bincount(minlength=NUM_CLASSES)


def slow_statistics(this: Round, results: list[ClientResult]) -> State:
    total = torch.zeros(NUM_CLASSES, dtype=torch.int64)
    sums, units = (torch.zeros(NUM_CLASSES, HIDDEN, dtype=torch.float64) for _ in range(2))
    for result in results:
        _, means, counts = measured(this, result.client_id)
        total += counts
        for c in range(NUM_CLASSES):
            if counts[c]:
                sums[c] += counts[c] * means[c]
                units[c] += counts[c] * means[c] / means[c].norm().clamp(min=1e-12)
    held = total.clamp(min=1)[:, None]
    return {"anchors": sums / held, "directions": units / held, "shares": total / total.sum()}


def slow_training(this: Round, client: int, mu: float, temperature: float) -> nn.Module:
    own, module = this.data.client(client), this.module()
    sent = {name: value.double() for name, value in this.broadcast.payload.items()}
    network = mlp().double()
    network.load_state_dict({n.removeprefix("model."): v for n, v in sent.items() if n.startswith("model.")})
    held = own.class_counts(NUM_CLASSES) > 0
    for images, labels in own.train_loader(this.session(client).task.seed):
        features = network[:3](module.prepare(images))
        loss = functional.cross_entropy(network[3](features), labels)
        drawn = anchor_losses(features, labels, sent["anchors"], sent["shares"], held, temperature)
        loss = loss + mu * drawn.mean()
        grads = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for value, grad in zip(network.parameters(), grads, strict=True):
                value -= LR * (grad + 5e-4 * value)
    return network


def test_two_rounds_are_a_slow_loop() -> None:
    data = uneven()
    options: dict[str, Any] = {"mu": 0.5, "temperature": 0.4, "rectify_round": 2, **SMALL}
    module = make(RUCR, data, **options).double()
    first = Round(module, data, DOUBLE)
    assert not first.broadcast.payload["shares"].any()
    results = [first.train(client) for client in range(3)]
    plain = Round(make(FedAvg, data).double(), data, DOUBLE)
    for result in results:
        expected = plain.train(result.client_id).payload
        assert all(torch.equal(result.payload[name], value) for name, value in expected.items())
        assert not any(name.startswith("rectified") for name in result.payload)
    state = first.update(results)
    for name, value in slow_statistics(first, results).items():
        torch.testing.assert_close(state[name].double(), value.double(), rtol=1e-5, atol=1e-6)

    second = Round(module, data, DOUBLE, state=state, round_num=2)
    results = []
    for client in range(3):
        result = second.train(client)
        results.append(result)
        network = slow_training(second, client, 0.5, 0.4)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(result.payload[f"model.{name}"], value, rtol=1e-6, atol=1e-7)
        features, _, _ = measured(second, client)
        directions = second.broadcast.payload["directions"].double()
        known = directions.abs().sum(1).nonzero().flatten()
        generator = torch_generator(derive_seed(second.session(client).task.seed, "rectify"))
        made = virtual_features(directions[known], features, 5, 0.35, 0.95, True, generator)
        weight, bias = network[3].weight.detach(), network[3].bias.detach()
        expected_head = rectify(made, known, weight, bias, 3, 0.1, 8, generator)
        found = (result.payload["rectified.weight"], result.payload["rectified.bias"])
        torch.testing.assert_close(found, expected_head, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[0], weight)
        assert "anchored" in result.metrics
    later = second.update(results)
    sizes = [data.client_size(client) for client in range(3)]
    parts = zip(sizes, results, strict=True)
    average = sum(size * result.payload["rectified.weight"] for size, result in parts) / sum(sizes)
    torch.testing.assert_close(later["rectified.weight"], average)
    deployed = module.deployed(later)
    assert torch.equal(deployed["model.3.weight"], later["rectified.weight"])
    assert torch.equal(deployed["model.3.bias"], later["rectified.bias"])
    assert torch.equal(deployed["model.1.weight"], later["model.1.weight"])


def test_directions_of_a_class_that_nobody_held_stay_and_it_has_no_anchor() -> None:
    data = tiny_data(num_clients=4, partition="by_shards")
    counts = [data.client(client).class_counts(NUM_CLASSES) for client in range(2)]
    only = int(((counts[0] > 0) & (counts[1] == 0)).nonzero()[0])
    module = make(RUCR, data, **SMALL, rectify_round=1)
    first = Round(module, data)
    result = first.train(0)  # there are no directions yet
    assert torch.equal(result.payload["rectified.weight"], result.payload["model.3.weight"])
    assert torch.equal(result.payload["rectified.bias"], result.payload["model.3.bias"])
    state = first.update([result])
    missing = ~(counts[0] > 0)
    assert not state["directions"][missing].any()
    assert not state["shares"][missing].any()
    second = Round(module, data, state=state, round_num=2)
    result = second.train(0)
    trained, rectified = result.payload["model.3.weight"], result.payload["rectified.weight"]
    assert torch.equal(rectified[missing], trained[missing])
    assert not torch.equal(rectified[~missing], trained[~missing])
    later = second.update([second.train(1)])
    assert torch.equal(later["directions"][only], state["directions"][only])
    assert later["shares"][only] == 0
    assert not torch.equal(later["directions"][counts[1] > 0], state["directions"][counts[1] > 0])


def test_training_goes_on_without_what_is_deployed() -> None:
    data = uneven()
    states = []
    for number in (3, 2, 1000):
        module = make(RUCR, data, "tests.tiny.tiny_resnet", rectify_round=number, **SMALL)
        options: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 1, "trainer": CPU}
        run = Orchestrator(module, data, num_rounds=3, **options)
        run.run()
        states.append((run.state.shared, module.shared_state()))
    for shared, _ in states[1:]:
        for name in states[0][0]:
            if name.startswith("model."):
                assert torch.equal(shared[name], states[0][0][name])
    (_, late), (_, early), (_, never) = states
    name = "model.classifier.weight"
    assert torch.equal(late[name], early[name])
    assert not torch.equal(late[name], never[name])
    assert torch.equal(late["model.conv1.weight"], never["model.conv1.weight"])


def test_features_are_measured_in_evaluation_mode_and_are_not_kept() -> None:
    data = uneven()
    module = make(RUCR, data, "tests.tiny.tiny_resnet", **SMALL, rectify_round=1)
    first = Round(module, data)
    state = first.update([first.train(client) for client in range(3)])
    second = Round(module, data, state=state, round_num=2)
    held = second.module()
    result = second.train(0, held)
    _, means, counts = measured(second, 0)
    torch.testing.assert_close(result.payload["class_means"], means, rtol=1e-4, atol=1e-5)
    assert result.payload["class_counts"].tolist() == counts.tolist()
    assert held._features is None
    assert not result.kept


# What is refused.


def spoiled(result: ClientResult, name: str, place: int, value: float) -> ClientResult:
    entry = result.payload[name].clone()
    entry[place] = value
    return dataclasses.replace(result, payload={**result.payload, name: entry})


def test_statistics_that_cannot_be_are_refused() -> None:
    data = tiny_data(num_clients=2, partition="by_num_classes")
    this = Round(make(RUCR, data), data)
    result = this.train(0)
    absent = int((result.payload["class_counts"] == 0).nonzero()[0])
    held = int((result.payload["class_counts"] > 0).nonzero()[0])
    for name, place, value, message in (
        ("class_counts", held, -3, "its class_counts are not those of"),
        ("class_counts", held, 10**6, "its class_counts are not those of"),
        ("class_means", absent, 1.0, "its class_means are of classes that it does not hold"),
        ("class_means", held, 1e30, "its class_means are of length"),
    ):
        with pytest.raises(ValueError, match=message):
            this.server.contribution(spoiled(result, name, place, value))
    this.server.contribution(result)


def test_what_it_takes_beside_fedavg() -> None:
    found = make(RUCR, uneven()).privileges
    assert "counts" in found.revealed
    assert "features" in found.server_state
    assert (found.server, found.client_state) == ("nothing", "nothing")
