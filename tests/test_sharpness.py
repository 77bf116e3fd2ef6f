"""Sharpness-aware SGD: the worst point by hand, the step on a quadratic, the limit case, BatchNorm's statistics, what is logged."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import Scaffold
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import State
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

    optimizer = SharpnessAwareSGD(
        {"weight": weight}, 0.1, 0.0, 0.0, 0.5, adaptive=False, first_pass=nullcontext, second_pass=Second
    )

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


def test_scaffold_corrects_the_gradient_of_the_step_and_not_the_way_to_the_worst_point() -> None:
    data = tiny_data(batch_size=1000, augmentation="none")
    module = make(Scaffold, local_optimizer="sam", rho=0.5, weight_decay=0.0, momentum=0.0).double()
    trained = dict(module.model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    c = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in trained.items()}
    state = {**module.shared_state(), **{f"control.model.{name}": value for name, value in c.items()}}
    round_ = Round(module, data, TrainerConfig("cpu", precision="64-true"), state=state)
    payload = round_.train(1).payload
    session = round_.session(1)
    images, labels = next(iter(session.train_loader(session.data)))
    start = {name: value.detach().clone() for name, value in trained.items()}

    def gradients() -> State:
        loss = module.objective(module(images), labels).mean()
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    module.train()
    first = gradients()
    length = torch.stack([value.norm() for value in first.values()]).norm()
    with torch.no_grad():
        for name, value in trained.items():
            value += 0.5 * first[name] / length
    for name, gradient in gradients().items():
        torch.testing.assert_close(payload[f"model.{name}"], start[name] - 0.05 * (gradient + c[name]))


@pytest.fixture
def silence() -> Iterator[None]:
    with quiet():
        yield


def fit(module: FederatedModule, **options: Any) -> None:
    data = tiny_data(batch_size=1000, augmentation="none")
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    pl.Trainer(max_epochs=1, accelerator="cpu", **off, **options).fit(module, data.train_dataloader())


@pytest.mark.usefixtures("silence")
def test_a_plain_trainer_clips_the_gradient_of_the_step_alone() -> None:
    """Clipped to a tiny value, all of the first pass's gradient would have the same size and lead elsewhere."""
    steps: dict[float | None, Tensor] = {}
    for limit in (None, 1e-4):
        module = make(local_optimizer="sam", rho=0.5, momentum=0.0, weight_decay=0.0).double()
        start = torch.cat([value.detach().flatten().clone() for value in module.model.parameters()])
        fit(module, gradient_clip_val=limit, gradient_clip_algorithm="value")
        steps[limit] = (torch.cat([value.detach().flatten() for value in module.model.parameters()]) - start) / -0.05
    whole, clipped = steps[None], steps[1e-4]
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(clipped, whole.clamp(-1e-4, 1e-4), rtol=1e-6, atol=1e-12)


@pytest.mark.usefixtures("silence")
def test_a_plain_trainer_that_adds_up_batches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `accumulate_grad_batches` to be 1 for .* got 2"):
        fit(make(local_optimizer="sam"), accumulate_grad_batches=2)
    fit(make(local_optimizer="sam", rho=0.0), accumulate_grad_batches=2)


def test_half_precision_weights_are_moved_and_put_back() -> None:
    data = tiny_data()
    bf16 = TrainerConfig("cpu", precision="bf16-true")
    sgd, sam = (Round(make(**options), data, bf16).train(0).payload for options in ({}, {"local_optimizer": "sam"}))
    assert {value.dtype for name, value in sam.items() if name.endswith("weight")} == {torch.bfloat16}
    assert not torch.equal(sgd["model.conv1.weight"], sam["model.conv1.weight"])
    assert (sgd["model.conv1.weight"] - sam["model.conv1.weight"]).abs().max() < 0.2


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
