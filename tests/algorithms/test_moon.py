"""MOON's projection head: what it computes, what is compared, and the networks that get one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.algorithms import Moon
from fedamm_pl.algorithms.moon import ProjectionHead
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.models import SmallCNN, deep_copy, features_and_logits
from fedamm_pl.protocol.messages import State
from fedamm_pl.seeding import derive_seed
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
LR, DECAY, MU, TEMPERATURE = 0.1, 5e-4, 1.5, 0.4


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, NUM_CLASSES))


def make(data: TinyData, algorithm: Any = Moon, network: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    own = {"mu": MU, "temperature": TEMPERATURE, "projection": 5} if algorithm is Moon else {}
    return algorithm(
        NUM_CLASSES, 1, network or mlp(), **{"lr": LR, "momentum": 0.0, "info": data.info, **own, **options}
    )


def test_the_head_is_two_layers_and_a_classifier() -> None:
    head, features = ProjectionHead(7, 5, 3), torch.randn(4, 7)
    w = head.state_dict()
    hidden = (features @ w["hidden.weight"].T + w["hidden.bias"]).clamp(min=0)
    projected = hidden @ w["projection.weight"].T + w["projection.bias"]
    torch.testing.assert_close(head(features), projected @ w["classifier.weight"].T + w["classifier.bias"])
    assert [tuple(w[f"{name}.weight"].shape) for name in ("hidden", "projection", "classifier")] == [
        (7, 7),
        (5, 7),
        (3, 5),
    ]


def test_what_is_compared_is_what_the_projection_gives() -> None:
    data = tiny_data()
    module = make(data)
    images = module.prepare(data.images.test_images[:6])
    features, logits = features_and_logits(module.model, images)
    head = module.model[3]
    torch.testing.assert_close(features, head.projection(head.hidden(module.model[:3](images)).relu()))
    torch.testing.assert_close(logits, head.classifier(features))
    assert (features < 0).any()


def test_the_last_layer_alone_is_replaced_by_the_papers_head() -> None:
    network = SmallCNN(10, 1)
    extractor = network.features
    module = Moon(10, 1, network)
    assert module.model.features is extractor
    head = module.model.classifier
    assert isinstance(head, ProjectionHead)
    assert (head.hidden.weight.shape, head.projection.weight.shape) == ((128, 128), (256, 128))
    assert head.classifier.weight.shape == (10, 256)
    grown = sum(value.numel() for value in module.model.parameters()) - sum(
        value.numel() for value in SmallCNN(10, 1).parameters()
    )
    assert grown == 128 * 129 + 256 * 129 + 10 * (256 - 128)  # as the docstring says


def test_without_a_projection_the_network_stays_as_it_is() -> None:
    network = mlp()
    assert Moon(NUM_CLASSES, 1, network, projection=None).model is network
    assert type(network[3]) is nn.Linear


def test_with_mu_0_it_is_fedavg_of_the_network_with_that_head_bit_for_bit() -> None:
    data = tiny_data(partition="by_dirichlet")
    ends: list[State] = []
    for algorithm in (Moon, FedAvg):
        moon = make(data, mu=0.0)
        module = moon if algorithm is Moon else make(data, FedAvg, deep_copy(moon.model))
        run = Orchestrator(module, data, num_rounds=2, client_fraction=1.0, local_epochs=1, trainer=CPU)
        run.run()
        ends.append(run.state.shared)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_a_client_takes_the_steps_of_a_bare_loop_on_projections() -> None:
    data = tiny_data()
    module = make(data)
    other = make(data)
    with torch.no_grad():  # as if it came out of an earlier round
        for value in other.parameters():
            value += 0.3 * torch.randn_like(value)
    previous: Any = other.model.double()
    one = Round(module, data, DOUBLE)
    found = one.train(1, kept={f"model.{name}": value for name, value in previous.state_dict().items()})

    bare = make(data).double()
    start = deep_copy(bare.model)

    def projected(network: Any, images: Tensor) -> Tensor:
        features: Tensor = network[3].projection(network[3].hidden(network[:3](images)).relu())
        return features

    optimizer = torch.optim.SGD(bare.model.parameters(), LR, weight_decay=DECAY)
    for images, labels in data.client(1).train_loader(derive_seed(0, "client", 1, 1)):
        prepared = bare.prepare(images)
        z = projected(bare.model, prepared)
        with torch.no_grad():
            near, far = projected(start, prepared), projected(previous, prepared)
        cosines = torch.stack([functional.cosine_similarity(z, other) for other in (near, far)], 1)
        contrast = functional.cross_entropy(cosines / TEMPERATURE, torch.zeros(len(z), dtype=torch.int64))
        optimizer.zero_grad()
        (functional.cross_entropy(bare.model[3].classifier(z), labels) + MU * contrast).backward()
        optimizer.step()
    for name, value in bare.shared_state().items():
        torch.testing.assert_close(found.payload[name], value, rtol=1e-9, atol=1e-10)
    assert found.metrics["contrast"] > 0


def test_a_network_that_is_a_linear_layer_gets_a_head_too() -> None:
    network = nn.Linear(8, NUM_CLASSES)
    assert isinstance(Moon(NUM_CLASSES, 1, network, projection=6).model, ProjectionHead)


def test_the_head_has_the_type_of_the_layer_that_it_replaces() -> None:
    module = Moon(NUM_CLASSES, 1, mlp().double())
    assert {value.dtype for value in module.model.parameters()} == {torch.float64}


def test_a_saved_module_is_loaded_with_its_head(tmp_path: Path) -> None:
    data = tiny_data()
    run = Orchestrator(
        make(data, network="small_cnn"), data, num_rounds=1, client_fraction=0.25, trainer=CPU, output_dir=tmp_path
    )
    run.run()
    loaded = Moon.load_from_checkpoint(tmp_path / "final.ckpt")
    assert loaded.hparams["projection"] == 5
    assert loaded.model.classifier.classifier.weight.shape == (NUM_CLASSES, 5)
    for name, value in run.module.shared_state().items():
        assert torch.equal(loaded.shared_state()[name], value)


@pytest.mark.parametrize("name", ["hidden", "projection", "classifier"])
def test_every_layer_of_the_head_is_trained_and_averaged(name: str) -> None:
    data = tiny_data()
    one = Round(make(data), data)
    results = [one.train(client) for client in range(2)]
    state, entry = one.update(results), f"model.3.{name}.weight"
    total = sum(result.num_examples for result in results)
    mean = sum(result.num_examples / total * result.payload[entry].double() for result in results)
    torch.testing.assert_close(state[entry].double(), mean, rtol=1e-6, atol=1e-7)
    assert not torch.equal(state[entry], one.broadcast.payload[entry])
