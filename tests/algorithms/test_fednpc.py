"""FedNPC: its steps against plain formulas, what they keep and where they lead."""

from typing import Any

import numpy as np
import torch
from torch import nn

from fedamm_pl import Orchestrator
from fedamm_pl.algorithms import FedNPC
from fedamm_pl.algorithms.fednpc import trained_on_noise
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data


def make(data: TinyData, **options: Any) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))
    return FedNPC(NUM_CLASSES, 1, network, lr=0.05, info=data.info, **options)


def classifier(num_classes: int = 3, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(num_classes, size, dtype=torch.float64), torch.randn(num_classes, dtype=torch.float64)


def test_steps_are_those_of_a_plain_loop() -> None:
    """The gradient of the mean cross-entropy is (softmax - one-hot)^T z / M; v <- 0.9 v + gradient, W <- W - lr v."""
    weight, bias = classifier()
    joint, v = np.hstack([weight.numpy(), bias.numpy()[:, None]]), 0.0
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        z = np.hstack([torch.randn(50, 5, generator=generator).double().numpy(), np.ones((50, 1))])
        labels = torch.randint(3, (50,), generator=generator).numpy()
        p = np.exp(z @ joint.T)
        p /= p.sum(1, keepdims=True)
        v = 0.9 * v + (p - np.eye(3)[labels]).T @ z / 50
        joint = joint - 0.1 * v
    found = trained_on_noise(weight, bias, 50, 4, 0.1, torch.Generator().manual_seed(7))
    np.testing.assert_allclose(found[0], joint[:, :-1], rtol=1e-10)
    np.testing.assert_allclose(found[1], joint[:, -1], rtol=1e-10)


def test_rows_move_to_their_mean_which_stays() -> None:
    weight, bias = classifier()
    generator = torch.Generator().manual_seed(0)
    for steps in (5, 400):
        moved, moved_bias = trained_on_noise(weight, bias, 5000, steps, 0.1, generator)
        torch.testing.assert_close(moved.mean(0), weight.mean(0))
        torch.testing.assert_close(moved_bias.mean(), bias.mean())
        spread = (moved - moved.mean(0)).norm() / (weight - weight.mean(0)).norm()
        assert spread < (1 if steps == 5 else 0.1)
        assert (moved_bias - bias.mean()).norm() < (bias - bias.mean()).norm()


def test_draws_are_those_of_seed_and_round() -> None:
    data = tiny_data()
    made = [
        Round(make(data), data, seed=seed, round_num=number).server.calibrated(make(data).shared_state(), [])
        for seed, number in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    weights = [state["calibrated.model.3.weight"] for state in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_it_needs_nobodys_data() -> None:
    data = tiny_data(num_meta_per_class=0)
    module = make(data, noise_steps=2)
    run = Orchestrator(module, data, num_rounds=1, local_epochs=1, trainer=CPU)
    run.run()
    assert not any(name.startswith("calibration/") for name in run.state.history[-1])
    assert not torch.equal(module.shared_state()["model.3.weight"], run.state.shared["model.3.weight"])
