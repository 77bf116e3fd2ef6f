"""Sharpness-aware SGD: the worst point by hand, the step on a quadratic, the limit case, BatchNorm's statistics, what is logged."""

from typing import Any

import pytest
import torch
from torch import nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import Scaffold
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.sharpness import SharpnessAwareSGD, worst_point_nearby
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, tiny_data

CPU = TrainerConfig(accelerator="cpu", precision="32-true")


def make(algorithm: type[FederatedModule] = FedAvg, **options: Any) -> FederatedModule:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", **{"lr": 0.05, "info": tiny_data().info, **options})


def test_worst_point_by_hand() -> None:
    weights = {"a.weight": torch.tensor([1.0, -3.0]), "a.bias": torch.tensor([2.0])}
    gradients = {"a.weight": torch.tensor([2.0, 1.0]), "a.bias": torch.tensor([2.0])}
    near = worst_point_nearby(weights, gradients, 0.3, adaptive=False)  # |G| = 3
    assert near["a.weight"].tolist() == pytest.approx([0.2, 0.1])
    assert near["a.bias"].tolist() == pytest.approx([0.2])
    adaptive = worst_point_nearby(weights, gradients, 0.3, adaptive=True)
    # T = 1.2, 3.2, and 1 for the bias; T G = 2.4, 3.2, 2
    length = (2.4**2 + 3.2**2 + 2**2) ** 0.5
    assert adaptive["a.weight"].tolist() == pytest.approx([0.3 * 1.2 * 2.4 / length, 0.3 * 3.2 * 3.2 / length])
    assert adaptive["a.bias"].tolist() == pytest.approx([0.3 * 2 / length])


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_gradient_no_step_away(adaptive: bool) -> None:
    eps = worst_point_nearby({"weight": torch.ones(3)}, {"weight": torch.zeros(3)}, 0.5, adaptive=adaptive)
    assert eps["weight"].tolist() == [0, 0, 0]


def test_step_on_a_quadratic_takes_the_gradient_at_the_worst_point() -> None:
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    weight = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
    passes: list[list[float]] = []

    class Second:
        def __enter__(self) -> None:
            passes.append(weight.tolist())

        def __exit__(self, *_: object) -> None:
            pass

    optimizer = SharpnessAwareSGD({"weight": weight}, 0.1, 0.0, 0.0, 0.5, adaptive=False, second_pass=Second)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (curvature * weight**2).sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert optimizer.step(closure).item() == 6.5
    # G = (3, 4), of length 5: w + eps = (3.3, 1.4), where the gradient is (3.3, 5.6)
    assert passes == [pytest.approx([3.3, 1.4])]
    assert weight.tolist() == pytest.approx([3 - 0.33, 1 - 0.56])


@pytest.mark.parametrize("algorithm", [FedAvg, FedAMM])
@pytest.mark.parametrize("local_optimizer", ["sam", "asam"])
def test_with_rho_0_it_is_sgd_bit_for_bit_and_otherwise_not(
    algorithm: type[FederatedModule], local_optimizer: str
) -> None:
    data = tiny_data()
    states = [
        Round(make(algorithm, **options), data).train(0).payload
        for options in ({}, {"local_optimizer": local_optimizer, "rho": 0.0}, {"local_optimizer": local_optimizer})
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["model.conv1.weight"], states[2]["model.conv1.weight"])


def test_a_step_by_hand_with_batchnorm() -> None:
    """Statistics and the logged loss are the first pass's, the gradient is the second's."""
    data = tiny_data(augmentation="none", batch_size=1000)
    round_ = Round(make(local_optimizer="sam", rho=0.5, momentum=0.0, weight_decay=0.0), data)
    result = round_.train(1)
    module = make(momentum=0.0, weight_decay=0.0)
    session = round_.session(1)
    images, labels = next(iter(session.train_loader(session.data)))
    module.train()
    loss = module.objective(module(images), labels).mean()
    parameters = dict(module.model.named_parameters())
    first = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    statistics = {name: value.clone() for name, value in module.model.named_buffers()}
    length = torch.stack([gradient.norm() for gradient in first.values()]).norm()
    start = {name: value.detach().clone() for name, value in parameters.items()}
    with torch.no_grad():
        for name, value in parameters.items():
            value += 0.5 * first[name] / length
    second = torch.autograd.grad(module.objective(module(images), labels).mean(), list(parameters.values()))
    for (name, value), gradient in zip(start.items(), second, strict=True):
        torch.testing.assert_close(result.payload[f"model.{name}"], value - 0.05 * gradient, rtol=1e-4, atol=1e-6)
    for name, value in statistics.items():
        torch.testing.assert_close(result.payload[f"model.{name}"], value)
    assert result.metrics["loss"] == pytest.approx(float(loss.detach()))


@pytest.mark.parametrize(
    ("algorithm", "options"), [(FedAvg, {}), (Scaffold, {"momentum": 0.0}), (FedAMM, {}), (FedAMM, {"meta_lr": 0.1})]
)
def test_learns_with_any_method(algorithm: type[FederatedModule], options: dict[str, Any]) -> None:
    data = tiny_data(num_clients=2, augmentation="none")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))
    module = algorithm(NUM_CLASSES, 1, network, lr=0.1, info=data.info, local_optimizer="sam", **options)
    run = Orchestrator(module, data, num_rounds=3, client_fraction=1.0, local_epochs=2, eval_interval=3, trainer=CPU)
    history = run.run()
    assert history[-1]["test/acc"] > 0.6
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)


def test_tallies_count_each_example_once() -> None:
    data = tiny_data()
    plain, sharp = (
        Round(make(FedAMM, **options), data).train(0).tallies for options in ({}, {"local_optimizer": "asam"})
    )
    assert torch.equal(plain["examples"], sharp["examples"]) if "examples" in plain else plain.keys() == sharp.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_optimizer": "adam"}, "Expected `local_optimizer` to be sgd, sam or asam, got 'adam'"),
        ({"local_optimizer": "sam", "rho": -1.0}, "Expected `rho` to be a number of 0 or more, got -1.0"),
        ({"rho": 0.1}, "Expected `rho` with `local_optimizer` sam or asam, got 0.1 with sgd"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_without_a_closure_it_is_refused() -> None:
    optimizer = make(local_optimizer="sam").configure_optimizers()
    with pytest.raises(ValueError, match="Expected a `closure`"):
        optimizer.step()
