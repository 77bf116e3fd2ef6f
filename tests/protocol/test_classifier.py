"""Layouts of images, and compiled networks beside plain ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.federation.trainer import TrainerConfig
from tests.tiny import NUM_CLASSES, tiny_data, tiny_resnet

CPU: dict[str, Any] = {"accelerator": "cpu", "precision": "32-true"}


class Viewing(nn.Module):
    """Flattens by ``view``, which fails on images that lie channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 64, NUM_CLASSES)
        self.fast: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.fast.add(images.is_contiguous(memory_format=torch.channels_last))
        return self.linear(images.view(len(images), -1))


class Fast(Viewing):
    channels_last = True

    def forward(self, images: Tensor) -> Tensor:
        self.fast.add(images.is_contiguous(memory_format=torch.channels_last))
        return self.linear(images.flatten(1))


def images(dtype: torch.dtype) -> Tensor:
    return torch.ones(2, 3, 8, 8, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("network", "fast"), [(Viewing, False), (Fast, True)])
def test_networks_that_say_so_get_images_channels_last_and_others_contiguous(
    network: type[Viewing], fast: bool, dtype: torch.dtype
) -> None:
    module = FedAvg(NUM_CLASSES, 3, network())
    for layout in (torch.contiguous_format, torch.channels_last):
        assert module(images(dtype).contiguous(memory_format=layout)).shape == (2, NUM_CLASSES)
    assert module.model.fast == {fast}


def test_the_packages_networks_get_images_channels_last() -> None:
    for name in ("small_cnn", "resnet20"):
        assert (
            FedAvg(NUM_CLASSES, 3, name).prepare(images(torch.uint8)).is_contiguous(memory_format=torch.channels_last)
        )


@pytest.mark.parametrize(
    ("network", "memory_format", "fast"),
    [
        (Viewing, "auto", False),
        (Fast, "auto", True),
        (Fast, "contiguous_format", False),
        (Viewing, "contiguous_format", False),
    ],
)
def test_a_trainer_sets_another_layout(network: type[Viewing], memory_format: Any, fast: bool) -> None:
    module = FedAvg(NUM_CLASSES, 3, network())
    TrainerConfig(**CPU, memory_format=memory_format).place(module)
    module(images(torch.uint8))
    assert module.model.fast == {fast}


def test_a_network_that_views_fails_where_channels_last_is_asked_for() -> None:
    module = FedAvg(NUM_CLASSES, 3, Viewing())
    TrainerConfig(**CPU, memory_format="channels_last").place(module)
    with pytest.raises(RuntimeError, match="view"):
        module(images(torch.uint8))


def test_what_are_no_images_passes_through() -> None:
    module = FedAvg(NUM_CLASSES, 1, nn.Linear(5, NUM_CLASSES))
    features = torch.randn(3, 5)
    assert torch.equal(module.prepare(features), features)


class FlatView(nn.Module):
    """A network of one's own, as one writes it without a thought of layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3, padding=1)
        self.linear = nn.Linear(2 * 64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.convolution(images).view(len(images), -1))


def test_a_network_of_ones_own_that_views_trains_in_a_federation_by_default() -> None:
    data = tiny_data()
    run = Orchestrator(
        FedAvg(NUM_CLASSES, 1, FlatView(), info=data.info),
        data,
        num_rounds=1,
        local_epochs=1,
        trainer=TrainerConfig(**CPU),
    )
    run.run()
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)


def test_a_compiled_network_is_no_submodule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: nn.Sequential(network))  # as torch's is, a Module around it
    module = FedAvg(NUM_CLASSES, 1, tiny_resnet(NUM_CLASSES, 1))
    names, parts = list(module.state_dict()), [name for name, _ in module.named_modules()]
    TrainerConfig(**CPU, compile=True).place(module)
    assert module.compiled is not None
    assert list(module.state_dict()) == names
    assert [name for name, _ in module.named_modules()] == parts
    images = torch.zeros(2, 1, 8, 8)
    torch.testing.assert_close(module.eval()(images), module.model(images))
    TrainerConfig(**CPU).place(module)
    assert module.compiled is None


def test_logits_are_those_of_the_compiled_network_and_the_network_itself_stays() -> None:
    module = FedAvg(NUM_CLASSES, 1, nn.Sequential(nn.Flatten(), nn.Linear(64, NUM_CLASSES)))
    called: list[Tensor] = []

    def compiled(images: Tensor) -> Tensor:
        called.append(images)
        return module.model(images)

    module.compiled = compiled
    module(torch.zeros(2, 1, 8, 8))
    assert len(called) == 1
    module.model(torch.zeros(2, 1, 8, 8))
    assert len(called) == 1


def test_a_network_that_was_given_compiled_computes_so_and_is_saved_as_itself(fresh_compiler: None) -> None:
    network = tiny_resnet(NUM_CLASSES, 1).eval()
    module = FedAvg(NUM_CLASSES, 1, torch.compile(network, backend="eager")).eval()
    assert module.model is network
    assert list(module.state_dict()) == [f"model.{name}" for name in network.state_dict()]
    torch.testing.assert_close(module(torch.ones(2, 1, 8, 8)), network(torch.ones(2, 1, 8, 8)))


@pytest.mark.parametrize(("num_classes", "in_channels"), [(0, 1), (-1, 1), (3, 0)])
def test_classes_and_channels_that_cannot_be_are_refused(num_classes: int, in_channels: int) -> None:
    with pytest.raises(ValueError, match=r"Expected `(num_classes|in_channels)` to be a number of 1 or more, got"):
        FedAvg(num_classes, in_channels, "small_cnn")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            {"image_size": [8]},
            r"to hold an image_size of a height and a width of 1 or more, or of nothing for features, got \[8\]",
        ),
        ({"image_size": [8, 0]}, r"an image_size of .*, got \[8, 0\]"),
        ({"image_size": [8, 8, 1]}, r"an image_size of .*, got \[8, 8, 1\]"),
        ({"mean": [0.5, 0.5]}, "to hold 1 mean, got 2"),
        ({"class_counts": [1]}, "to hold 4 class_counts, got 1"),
        ({"std": [float("nan")]}, "to hold std above 0, got"),
        ({"shot_groups": {"few": [4]}}, "shot_groups of the classes 0 to 3"),
        ({"shot_groups": {"few": [-1]}}, "shot_groups of the classes 0 to 3"),
    ],
)
def test_what_is_known_of_other_images_is_refused(info: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `info` to hold {message.removeprefix('to hold ')}"):
        FedAvg(NUM_CLASSES, 1, "small_cnn", info=info)


@pytest.mark.parametrize("network", [nn.Flatten, tiny_resnet, None, 3])
def test_what_is_no_network_is_refused(network: Any) -> None:
    with pytest.raises(ValueError, match="Expected `model` to be a name, an import path or a Module, got"):
        FedAvg(NUM_CLASSES, 1, network)


class Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Any:
        return {"logits": self.linear(images.flatten(1))}


def test_logits_are_taken_out_of_what_a_network_returns_everywhere() -> None:
    module, images = FedAvg(NUM_CLASSES, 1, Wrapping()), torch.rand(3, 1, 8, 8)
    logits = module.model(images)["logits"]
    assert torch.equal(module(images), logits)
    assert torch.equal(module.predict_step(images), logits.softmax(1))


class MeanOfTheBatch(FedAvg):
    """Its objective is not by example."""

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().objective(logits, labels).mean()


def test_an_objective_that_is_no_loss_per_example_is_refused() -> None:
    module = MeanOfTheBatch(num_classes=3, in_channels=4, model=nn.Linear(4, 3))
    with pytest.raises(
        ValueError,
        match=r"`objective` of MeanOfTheBatch to return one loss per example, of shape \(5,\), got shape \(\)",
    ):
        module.step_loss(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))
