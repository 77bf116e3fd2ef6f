"""FedLoGe: its sparse simplex, its three heads against a plain loop, and what is evened out for an evaluation."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl import Orchestrator
from fedamm_pl.algorithms import FedLoGe
from fedamm_pl.algorithms.fedloge import even_rows, simplex_slope, sparse_simplex
from tests.algorithms.test_methods_by_hand import HIDDEN, LR, PlainServer, clients, federate, kept_by, make, mlp
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, tiny_data

MOMENTUM, DECAY, EPOCHS, SPARSITY, STEPS = 0.5, 5e-4, 2, 0.5, 300


# The simplex.


def test_without_sparsity_and_steps_it_is_a_simplex_of_unit_rows() -> None:
    rows = sparse_simplex(10, 64, 0.0, 0, 0)
    cosines = torch.full((10, 10), -1 / 9, dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(rows @ rows.T, cosines)


@pytest.mark.parametrize(("num_classes", "size", "zeros"), [(10, 64, 38), (4, 16, 10), (2, 4, 2)])
def test_sparse_rows_come_to_their_length_and_to_the_angles_of_a_simplex(
    num_classes: int, size: int, zeros: int
) -> None:
    rows = sparse_simplex(num_classes, size, 0.6, 10_000, 0)
    assert (rows == 0).sum(1).tolist() == [zeros] * num_classes
    lengths = rows.norm(dim=1)
    assert ((lengths - 0.1).abs() < 0.02).all()
    angles = torch.rad2deg((rows @ rows.T / lengths / lengths[:, None]).clamp(-1, 1).arccos()).fill_diagonal_(180)
    best = np.degrees(np.arccos(-1 / (num_classes - 1)))
    assert float(angles.min()) == pytest.approx(best, abs=0.5)
    started = sparse_simplex(num_classes, size, 0.6, 0, 0)
    before = functional.normalize(started) @ functional.normalize(started).T
    assert float(before.fill_diagonal_(-1).max()) > np.cos(np.radians(best)) + 0.1


def test_it_is_a_function_of_its_seed() -> None:
    made = [sparse_simplex.__wrapped__(4, 16, 0.5, 20, seed) for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_at_least_one_entry_of_a_row_is_left() -> None:
    assert ((sparse_simplex(3, 4, 0.99, 10, 0) != 0).sum(1) == 1).all()


def test_the_slope_is_that_of_autograd() -> None:
    rows = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    lengths = rows.norm(dim=1)
    cosines = rows @ rows.T / lengths / lengths[:, None]
    nearest = cosines.masked_fill(torch.eye(5, dtype=torch.bool), -2).amax(1)
    loss = ((lengths - 0.1) ** 2).sum() - nearest.arccos().mean()
    (slope,) = torch.autograd.grad(loss, rows)
    torch.testing.assert_close(torch.from_numpy(simplex_slope(rows.detach().numpy())), slope)
    assert np.isfinite(simplex_slope(np.array([[1.0, 0.0], [-1.0, 0.0]]))).all()
    assert np.isfinite(simplex_slope(np.array([[1.0, 0.0], [0.0, 0.0]]))).all()


# Rounds.


def fedloge(data: Any, **options: Any) -> FedLoGe:
    options = {"momentum": MOMENTUM, "sparsity": SPARSITY, "simplex_steps": STEPS, **options}
    return make(FedLoGe, data, **options)  # type: ignore[no-any-return]


def rounds_by_hand(module: FedLoGe, data: Any, num_rounds: int) -> tuple[dict[str, Tensor], dict[int, nn.Linear]]:
    """Rounds of three heads with torch's own optimizer for each: the weights, and each client's own head."""
    simplex = sparse_simplex(NUM_CLASSES, HIDDEN, SPARSITY, STEPS, 0)
    server = PlainServer(module, data, 0.67, EPOCHS)
    own = {client: nn.Linear(HIDDEN, NUM_CLASSES).double() for client in range(data.num_clients)}
    for head in own.values():
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    for round_num in range(1, num_rounds + 1):
        trained = {}
        for client in server.sampled(round_num):
            network = mlp().double()
            network.load_state_dict(server.w)
            body, head = network[:3], network[3]
            sgds = [
                torch.optim.SGD(part.parameters(), LR, MOMENTUM, weight_decay=DECAY, nesterov=True)
                for part in (body, head, own[client])
            ]
            for images, labels in server.batches(round_num, client):
                features = body(server.prepare(images))
                fixed = features.detach()
                for sgd, logits in zip(sgds, (features @ simplex.T, head(fixed), own[client](fixed)), strict=True):
                    sgd.zero_grad()
                    functional.cross_entropy(logits, labels).backward()
                    sgd.step()
            trained[client] = network.state_dict()
        server.w = server.mean_by_examples(trained)
    return server.w, own


def own_accuracy(run: Orchestrator, state: dict[str, Tensor], own: dict[int, nn.Linear], realign: bool) -> float:
    """The accuracy of the clients' own logits, written out."""
    images, labels = run.data.images.test_images, run.data.images.test_labels
    hidden = run.server.module.prepare(images).double().flatten(1)
    z = (hidden @ state["1.weight"].T + state["1.bias"]).clamp(min=0)
    weight = state["3.weight"]
    if realign:
        weight = weight / weight.norm(dim=1, keepdim=True) * weight.norm(dim=1).mean()
    g = z @ weight.T + state["3.bias"]
    accuracies = []
    for client, head in own.items():
        counts = torch.from_numpy(run.data.client_class_counts[client])
        local = weight * head.weight.detach().norm(dim=1, keepdim=True) if realign else head.weight.detach()
        logits = z @ local.T + head.bias.detach() + g
        logits[:, counts == 0] = -1e10
        hit = (logits.argmax(1) == labels).double()
        mix = sum(int(counts[c]) * float(hit[labels == c].mean()) for c in range(NUM_CLASSES))
        accuracies.append(mix / int(counts.sum()))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize("realign", [True, False])
def test_rounds_equal_a_plain_loop(realign: bool) -> None:
    data = clients()
    w, own = rounds_by_hand(fedloge(data), data, 3)
    run = federate(fedloge(data, realign=realign), data, 3, client_fraction=0.67, local_epochs=EPOCHS)
    assert run.state.shared.keys() == {f"model.{name}" for name in w}
    expected = {f"model.{name}": value for name, value in w.items()}
    torch.testing.assert_close(run.state.shared, expected, rtol=1e-7, atol=1e-8)
    for client, state in kept_by(run).items():
        mine = {f"own.{name}": value for name, value in own[client].state_dict().items()}
        torch.testing.assert_close(state, mine, rtol=1e-7, atol=1e-8)
    delivered = run.module.shared_state()["model.3.weight"]
    lengths = delivered.norm(dim=1)
    assert (
        float(lengths.max() - lengths.min()) < 1e-12
        if realign
        else torch.equal(delivered, run.state.shared["model.3.weight"])
    )
    assert float(lengths.mean()) == pytest.approx(float(w["3.weight"].norm(dim=1).mean()), rel=1e-6)
    row = run.state.history[-1]
    assert row["personal/acc"] == pytest.approx(own_accuracy(run, w, own, realign), abs=1e-12)
    assert row["personal/acc"] > 0.4


def test_neither_simplex_nor_own_head_is_sent() -> None:
    data = tiny_data()
    module = FedLoGe(NUM_CLASSES, 1, mlp(), info=data.info, simplex_steps=10)
    one = Round(module, data)
    result = one.train(0)
    names = {name for name in module.state_dict() if name.startswith("model.")}
    assert one.broadcast.payload.keys() == result.payload.keys() == names
    assert result.kept.keys() == {"own.weight", "own.bias"}
    assert "simplex" not in module.state_dict()


# Parts and refusals.


def test_rows_are_evened_out_to_their_mean_length_and_zeros_stay() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(even_rows(weight), torch.tensor([[1.2, 1.6], [0.0, 2.0], [0.0, 0.0]]))


def test_more_classes_than_features_are_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, NUM_CLASSES))
    with pytest.raises(ValueError, match="`model` to have 4 features or more for the simplex of 4 classes, got 3"):
        FedLoGe(NUM_CLASSES, 1, network)
    with pytest.raises(ValueError, match="Expected `num_classes` to be a number of 2 or more, got 1"):
        FedLoGe(1, 1, nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 1)))
