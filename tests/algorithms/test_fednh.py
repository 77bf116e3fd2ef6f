"""FedNH: its first prototypes, whole rounds against a plain loop, what a prototype does, what the server refuses."""

import dataclasses
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms import FedNH
from fedamm_pl.algorithms.fednh import PrototypeHead, first_prototypes, moved_prototypes
from fedamm_pl.federation.trainer import quiet
from tests.algorithms.test_methods_by_hand import DECAY, LR, PlainServer, clients, federate, make
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

SCALE, SMOOTHING = 5.0, 0.7
PROTOTYPES, OF_RESNET = "model.3.prototypes", "model.classifier.prototypes"


def normalised(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)


# Prototypes.


@pytest.mark.parametrize(("num_classes", "size"), [(4, 4), (10, 64), (1, 3)])
def test_first_prototypes_are_orthonormal_where_there_is_room(num_classes: int, size: int) -> None:
    torch.manual_seed(0)
    prototypes = first_prototypes(num_classes, size)
    torch.testing.assert_close(prototypes @ prototypes.T, torch.eye(num_classes), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_classes", "size", "best"), [(3, 2, -0.5), (4, 2, 0.0), (4, 3, -1 / 3), (10, 8, 0.0)])
def test_where_there_is_none_the_nearest_two_are_as_far_apart_as_can_be(
    num_classes: int, size: int, best: float
) -> None:
    """Best known: the corners of a simplex for D + 1 vectors, right angles for up to 2 D."""
    torch.manual_seed(0)
    prototypes = first_prototypes(num_classes, size)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(num_classes))
    assert float((prototypes @ prototypes.T).fill_diagonal_(-2).max()) == pytest.approx(best, abs=1e-3)


def test_a_prototype_moves_to_its_class_and_stays_where_there_is_nowhere_to_go() -> None:
    prototypes = torch.eye(4)
    sums = torch.tensor([[0, 2.0, 0, 0], [0, 0, 0, 0], [0, 0, -3.0, 0], [0, 0, 0, 5.0]])
    # half-way between two axes; no client has the class; opposite; already there
    expected = torch.tensor([[0.5**0.5, 0.5**0.5, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    torch.testing.assert_close(moved_prototypes(prototypes, sums, 0.5), expected)
    assert torch.equal(moved_prototypes(prototypes, sums, 1.0), prototypes)
    torch.testing.assert_close(moved_prototypes(prototypes, sums, 0.0)[2], torch.tensor([0, 0, -1.0, 0]))


def test_logits_are_scaled_cosines() -> None:
    head = PrototypeHead(torch.eye(3)[:2], 4.0)
    torch.testing.assert_close(head(torch.tensor([[3.0, 4.0, 0.0]])), torch.tensor([[2.4, 3.2]]))
    assert head(torch.zeros(1, 3)).tolist() == [[0.0, 0.0]]
    assert [name for name, _ in head.named_parameters()] == ["scale"]


# Rounds.


def plain_rounds(data: TinyData, num_rounds: int, max_grad_norm: float) -> tuple[dict[str, Tensor], Tensor, float]:
    """Rounds of FedNH with nothing but torch.

    Returns:
        Weights without the head, and with the scale; prototypes; the longest gradient.
    """
    module = make(FedNH, data, scale=SCALE)
    server, longest = PlainServer(module, data, 1.0, local_epochs=2), 0.0
    prototypes = module.model[3].prototypes.clone()
    body = {"1.weight", "1.bias"}

    def features(w: dict[str, Tensor], images: Tensor) -> Tensor:
        hidden = functional.linear(server.prepare(images).flatten(1), w["1.weight"], w["1.bias"]).relu()
        return normalised(hidden)

    for round_num in range(1, num_rounds + 1):
        trained, sums = {}, torch.zeros_like(prototypes)
        for client in range(data.num_clients):
            w = dict(server.w)
            for images, labels in server.batches(round_num, client):
                leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
                logits = leaves["3.scale"] * features(leaves, images) @ prototypes.T
                grads = torch.autograd.grad(functional.cross_entropy(logits, labels), list(leaves.values()))
                length = float(torch.cat([grad.flatten() for grad in grads]).norm())
                longest = max(longest, length)
                factor = min(1.0, max_grad_norm / (length + 1e-6))
                for (name, value), grad in zip(w.items(), grads, strict=True):
                    w[name] = value - LR * (factor * grad + (DECAY * value if name in body else 0))
            trained[client] = w
            (images, labels), *_ = data.client(client).plain_batches(1000)
            for label in labels.unique():
                mean = normalised(features(w, images[labels == label]).mean(0))
                sums[label] += int((labels == label).sum()) * mean
        server.w = server.mean_by_examples(trained)
        prototypes = normalised(SMOOTHING * prototypes + (1 - SMOOTHING) * normalised(sums))
    return server.w, prototypes, longest


@pytest.mark.parametrize("max_grad_norm", [0.5, 100.0])
def test_rounds_equal_a_plain_loop(max_grad_norm: float) -> None:
    data = clients()
    w, prototypes, longest = plain_rounds(data, 2, max_grad_norm)
    assert 0.5 < longest < 100
    module = make(FedNH, data, scale=SCALE, smoothing=SMOOTHING, max_grad_norm=max_grad_norm)
    start = module.model[3].prototypes.clone()
    run = federate(module, data, 2, local_epochs=2)
    expected = {**{f"model.{name}": value for name, value in w.items()}, PROTOTYPES: prototypes}
    torch.testing.assert_close(run.state.shared, expected, rtol=1e-8, atol=1e-9)
    assert float((prototypes - start).abs().max()) > 0.05
    assert torch.equal(run.module.model[3].prototypes, run.state.shared[PROTOTYPES])


def test_with_smoothing_1_prototypes_stay_for_ever() -> None:
    data = clients()
    module = make(FedNH, data, smoothing=1.0)
    start = module.model[3].prototypes.clone()
    assert torch.equal(federate(module, data, 2).state.shared[PROTOTYPES], start)


def test_the_server_takes_no_average_of_prototypes_and_a_class_that_nobody_holds_stays() -> None:
    data = tiny_data(num_clients=6, partition="by_shards", shards_per_client=1)
    module = fednh(data)
    round_ = Round(module, data)
    results = [round_.train(client) for client in (0, 1)]
    held = sum(data.client(client).class_counts(NUM_CLASSES) for client in (0, 1)) > 0
    assert 0 < int(held.sum()) < NUM_CLASSES
    assert all(OF_RESNET not in result.payload for result in results)
    after, before = round_.update(results)[OF_RESNET], round_.state[OF_RESNET]
    moved = (after != before).any(1)
    assert moved.tolist() == held.tolist()
    torch.testing.assert_close(after.norm(dim=1), torch.ones(NUM_CLASSES))


def fednh(data: TinyData, **options: Any) -> FedNH:
    torch.manual_seed(0)
    return FedNH(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info, **{"smoothing": 0.5, **options})


def test_what_is_sent_is_of_the_trained_model_in_evaluation_mode() -> None:
    """A ResNet with BatchNorm and one client: with smoothing 0 the prototypes are its class means."""
    data = tiny_data(num_clients=1, partition="iid")
    round_ = Round(fednh(data, smoothing=0.0), data)
    result = round_.train(0)
    state = round_.update([result])
    trained = fednh(data)
    trained.load_shared_state({**state, **result.payload})
    network = trained.model.eval()
    network.classifier = nn.Identity()
    (images, labels), *_ = data.client(0).plain_batches(1000)
    with torch.no_grad():
        hidden = normalised(network(trained.prepare(images)))
    means = torch.stack([normalised(hidden[labels == label].mean(0)) for label in range(NUM_CLASSES)])
    torch.testing.assert_close(state[OF_RESNET], means, rtol=1e-5, atol=1e-5)
    assert result.payload["class_counts"].tolist() == labels.bincount(minlength=NUM_CLASSES).tolist()


# What is refused.


def test_counts_and_means_out_of_their_range_are_refused() -> None:
    data = tiny_data(num_clients=6, partition="by_shards", shards_per_client=1)
    round_ = Round(fednh(data), data)
    result = round_.train(1)
    counts, means = result.payload["class_counts"], result.payload["class_means"]
    absent = int((counts == 0).nonzero()[0])

    def refused(reason: str, **changed: Tensor) -> None:
        with pytest.raises(ValueError, match=reason):
            round_.server.contribution(dataclasses.replace(result, payload={**result.payload, **changed}))

    more, less, moved = counts.clone(), counts.clone(), means.clone()
    more[counts.argmax()] += 1
    less[absent] = -1
    less[counts.argmax()] += 1
    moved[absent, 0] = 1.0
    refused(r"its class_counts add up to \d+, not to its \d+ examples", class_counts=more)
    refused("its class_counts are below 0", class_counts=less)
    refused("its class_means are not of length 1", class_means=1.01 * means)
    refused("its class_means are of classes that it does not hold", class_means=moved)
    silent = dataclasses.replace(result, payload={**result.payload, "class_means": torch.zeros_like(means)})
    assert torch.equal(  # features of nothing but zeros have no direction
        round_.update([silent])[OF_RESNET], round_.state[OF_RESNET]
    )


def test_robust_aggregation_cannot_protect_it() -> None:
    data = tiny_data()
    with pytest.raises(ValueError, match=r"`aggregation` .* for FedNH, got median: .* \(class_means, class_counts\)"):
        federate(fednh(data), data, 1, aggregation="median")


@pytest.mark.parametrize(("option", "expected"), [(None, 0.01), (0.02, 0.02)])
def test_a_trainer_that_clips_itself_has_its_way(option: float | None, expected: float) -> None:
    lengths = []

    class Watching(FedNH):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            if any(parameter.grad is not None for parameter in self.parameters()):
                lengths.append(float(torch.cat([p.grad.flatten() for p in self.parameters()]).norm()))

    data = tiny_data(augmentation="none")
    torch.manual_seed(0)
    module = Watching(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info, max_grad_norm=0.01)
    start = module.head.prototypes.clone()
    with quiet():
        trainer = pl.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=option,
        )
        trainer.fit(module, data.train_dataloader())
    assert max(lengths) == pytest.approx(expected, rel=1e-3)
    assert torch.equal(module.head.prototypes, start)
