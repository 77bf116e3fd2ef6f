"""BalanceFL: its covariance, its three terms and its round against plain loops; which limit is FedAvg; what is drawn."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl import FedAvg
from fedamm_pl.algorithms import BalanceFL
from fedamm_pl.algorithms.balancefl import balanced_losses, pooled_covariance, square_root
from fedamm_pl.data.client import ClientData
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.session import ClientSession
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
    return tiny_data(num_clients=3, partition="by_dirichlet", dirichlet_alpha=0.3)


# The noise.


def test_pooled_covariance_is_that_of_numpy_and_0_of_single_examples() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(12, 3)), np.array([0] * 6 + [2] * 5 + [3])
    features[labels == 2] *= 3
    expected = (6 * np.cov(features[:6].T) + 5 * np.cov(features[6:11].T) + 1 * np.zeros((3, 3))) / 12
    order = rng.permutation(12)
    pairs = torch.from_numpy(features[order]), torch.from_numpy(labels[order])
    batches = [(pairs[0][part].float(), pairs[1][part]) for part in (slice(5), slice(5, None))]
    covariance, counts = pooled_covariance(batches, NUM_CLASSES)
    np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-6)
    assert counts.tolist() == [6, 0, 5, 1]
    root = square_root(covariance)
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ root, covariance)


def test_covariance_of_a_single_image_is_0() -> None:
    covariance, counts = pooled_covariance([(torch.ones(1, 3), torch.tensor([2]))], NUM_CLASSES)
    assert not covariance.any()
    assert not square_root(covariance).any()
    assert counts.tolist() == [0, 0, 1, 0]


class Noted(BalanceFL):
    """Keeps labels and noise of each pass over a batch."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.noted: list[tuple[bool, Tensor, Tensor]] = []

    def _eps(self, labels: Tensor, features: Tensor) -> Tensor:
        eps = super()._eps(labels, features)
        self.noted.append((self.sees_again, labels, eps))
        return eps


def test_noise_has_the_covariance_and_meets_rare_classes_the_more() -> None:
    data = uneven()
    this = Round(make(Noted, data), data, DOUBLE, local_epochs=60)
    counts = data.client(0).class_counts(NUM_CLASSES)
    assert counts.max() >= 4 * counts[counts > 0].min()
    module = this.module()
    this.train(0, module)
    labels, eps = (torch.cat([found[place] for found in module.noted]) for place in (1, 2))
    changed = eps.abs().sum(1) > 0
    for c in range(NUM_CLASSES):
        if counts[c]:
            expected = 1 - float(counts[c] / counts.max())
            assert float(changed[labels == c].double().mean()) == pytest.approx(expected, abs=0.05)
    module.load_shared_state(this.broadcast.payload)
    (batch,) = data.client(0).plain_batches(1000)
    with torch.no_grad():
        features = module.model[:3](module.prepare(batch[0]))
    expected_covariance, _ = pooled_covariance([(features, batch[1])], NUM_CLASSES)
    found = torch.from_numpy(np.cov(eps[changed].T.numpy()))
    scale = float(expected_covariance.diagonal().max())
    torch.testing.assert_close(found / scale, expected_covariance / scale, rtol=0, atol=0.1)


def test_noise_is_a_function_of_the_round_and_the_same_where_a_batch_is_seen_again() -> None:
    data = uneven()
    noted = []
    for round_num in (1, 1, 2):
        this = Round(make(Noted, data, local_optimizer="sam"), data, DOUBLE, round_num=round_num)
        module = this.module()
        this.train(0, module)
        noted.append(module.noted)
    passes = [[again for again, _, _ in found] for found in noted]
    assert passes[0][:4] == [False, True, False, True]
    for first, second in zip(noted[0][::2], noted[0][1::2], strict=True):
        assert torch.equal(first[2], second[2])
    assert not torch.equal(noted[0][0][2], noted[0][2][2])  # but other in each step
    assert all(torch.equal(one[2], other[2]) for one, other in zip(noted[0], noted[1], strict=True))
    assert not torch.equal(noted[0][0][2], noted[2][0][2])


# The loss.


def slowly(
    logits: Tensor, noisy: Tensor, teacher: Tensor, labels: Tensor, present: list[int], temperature: float
) -> list[list[float]]:
    absent = [c for c in range(NUM_CLASSES) if c not in present]
    rows = []
    for z, n, t, y in zip(logits.numpy(), noisy.numpy(), teacher.numpy(), labels.tolist(), strict=True):
        exp = np.exp(n[present])
        loss = -np.log(exp[present.index(y)] / exp.sum())
        entropy = np.exp(z[present]) / np.exp(z[present]).sum()
        known, learned = (np.exp(v[absent] / temperature) / np.exp(v[absent] / temperature).sum() for v in (t, z))
        rows.append([loss, -(known * np.log(learned)).sum(), -(entropy * np.log(entropy)).sum()])
    return rows


@pytest.mark.parametrize("present", [[0, 1], [0, 2, 3], [2], [0, 1, 2, 3]])
def test_the_three_terms_are_those_of_a_slow_loop(present: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, noisy, teacher = 3 * torch.randn(3, 9, NUM_CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.tensor(present)[torch.arange(9) % len(present)]
    mask = torch.zeros(NUM_CLASSES, dtype=torch.bool).index_fill(0, torch.tensor(present), True)
    leaves = [value.clone().requires_grad_() for value in (logits, noisy)]
    found = balanced_losses(*leaves, teacher, labels, mask, 2.0)
    expected = torch.tensor(slowly(logits, noisy, teacher, labels, present, 2.0), dtype=torch.float64)
    torch.testing.assert_close(torch.stack(found, 1).detach(), expected, rtol=1e-9, atol=1e-9)
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(sum(found).sum(), leaves))
    if len(present) == 1:
        assert not found[0].any()
        assert not found[2].any()
    if len(present) == NUM_CLASSES:
        assert not found[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_are_finite_at_extreme_logits(dtype: torch.dtype) -> None:
    logits = (1e4 * torch.eye(NUM_CLASSES)).to(dtype).requires_grad_()
    mask = torch.tensor([True, True, False, False])
    labels = torch.tensor([0, 1, 0, 1])
    found = balanced_losses(logits, logits, -logits.detach(), labels, mask, 2.0)
    assert all(term.isfinite().all() for term in found)
    (slope,) = torch.autograd.grad(sum(term.sum() for term in found), logits)
    assert slope.isfinite().all()


@pytest.mark.parametrize("absent", ["batch", "client"])
def test_a_round_without_noise_is_a_bare_loop(absent: str) -> None:
    data = uneven()
    options: dict[str, Any] = {"absent": absent, "kd_weight": 0.7, "temperature": 3.0, "entropy_weight": 0.01}
    this = Round(make(BalanceFL, data, feature_noise=False, **options), data, DOUBLE, local_epochs=2)
    for client in range(3):
        result = this.train(client)
        assert result.payload.keys() == this.state.keys()
        assert not result.kept
        network, teacher, module = mlp().double(), mlp().double(), this.module()
        for one in (network, teacher):
            one.load_state_dict({name.removeprefix("model."): value for name, value in this.state.items()})
        own = dataclasses.replace(data.client(client), balanced=True)
        loader = own.train_loader(this.session(client).task.seed)
        held = set(own.labels[own.indices].tolist())
        for _ in range(2):
            for images, labels in loader:
                present = sorted(held if absent == "client" else set(labels.tolist()))
                others = [c for c in range(NUM_CLASSES) if c not in present]
                logits = network(module.prepare(images))
                places = torch.tensor([present.index(label) for label in labels.tolist()])
                loss = functional.cross_entropy(logits[:, present], places)
                if others:
                    known = (teacher(module.prepare(images))[:, others] / 3).softmax(1).detach()
                    loss = loss + 0.7 * functional.cross_entropy(logits[:, others] / 3, known)
                shares = logits[:, present].softmax(1)
                loss = loss + 0.01 * (shares * shares.log()).sum()
                grads = torch.autograd.grad(loss, list(network.parameters()))
                with torch.no_grad():
                    for value, grad in zip(network.parameters(), grads, strict=True):
                        value -= LR * (grad + 5e-4 * value)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(result.payload[f"model.{name}"], value, rtol=1e-9, atol=1e-9)


class BalancedDraws(FedAvg):
    def local_data(self, session: ClientSession) -> ClientData:
        return dataclasses.replace(session.data, balanced=True)


def test_a_balanced_client_whose_batches_have_all_classes_trains_as_fedavg_on_balanced_draws() -> None:
    data = tiny_data(num_clients=1, partition="iid", imbalance_profile="none", batch_size=60)
    counts = data.client(0).class_counts(NUM_CLASSES)
    assert len(set(counts.tolist())) == 1
    results = []
    for algorithm, options in ((BalanceFL, {"entropy_weight": 0.0}), (BalancedDraws, {}), (FedAvg, {})):
        results.append(Round(make(algorithm, data, **options), data, local_epochs=2).train(0))
    mine, theirs, plain = results
    for name, value in theirs.payload.items():
        assert torch.equal(mine.payload[name], value)
    assert mine.metrics["loss"] == theirs.metrics["loss"]
    assert mine.metrics["distilled"] == 0
    assert not torch.equal(plain.payload["model.1.weight"], theirs.payload["model.1.weight"])


def test_terms_are_measured_for_the_log() -> None:
    data = uneven()
    result = Round(make(BalanceFL, data), data).train(0)
    assert result.metrics.keys() >= {"loss", "distilled", "entropy"}
    assert all(0 <= result.metrics[name] < 3 for name in ("loss", "distilled", "entropy"))


def test_what_it_takes_beside_fedavg() -> None:
    found = make(BalanceFL, uneven()).privileges
    assert (found.server, found.revealed, found.client_state, found.server_state) == ("nothing",) * 4
    assert "received model" in found.work
