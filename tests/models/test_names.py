"""Networks that have a name: MLPs of any widths, the ResNet-8 of CReFF's papers, and torchvision's classifiers."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl.models import MLP, MODELS, ResNetCIFAR, build_model, logits_of, registered
from fedamm_pl.models.names import _torchvision_names


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("asked for weights"))


def size_of(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(part.weight.shape) for part in model.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize(
    ("name", "hidden"), [("mlp", [64]), ("mlp-8", [8]), ("mlp-256-128", [256, 128]), ("mlp-5-5-5", [5, 5, 5])]
)
@pytest.mark.parametrize("inputs", [torch.rand(3, 7), torch.rand(3, 2, 4, 4)])
def test_widths_of_an_mlp_are_part_of_its_name(name: str, hidden: list[int], inputs: Tensor) -> None:
    model = build_model(name, 4, inputs.shape[1])
    assert model(inputs).shape == (3, 4)
    sizes = [inputs[0].numel(), *hidden, 4]
    assert shapes(model) == [(after, before) for before, after in itertools.pairwise(sizes)]


def test_mlp_is_its_formula() -> None:
    model, inputs = MLP(3, 2, (5,)), torch.randn(6, 2, 2, 2)
    logits = model(inputs)
    first, last = model.features[0], model.classifier
    hidden = (inputs.reshape(6, 8) @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(logits, hidden @ last.weight.T + last.bias)


def test_dropout_of_an_mlp_is_in_training_alone() -> None:
    model, inputs = MLP(3, 2, (500,), dropout=0.5), torch.ones(1, 2)
    assert torch.equal(model.eval()(inputs), model(inputs))
    model.train()
    assert not torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("options", [{"hidden": ()}, {"hidden": (3, 0)}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_mlp_that_cannot_be_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^Expected `(hidden|dropout)` to be .*, got "):
        MLP(3, 2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["mlp-0", "mlp-abc", "mlp-", "mlp--8", "mlp-8-", "mlp-08", "mlp-1.5", "mlp-100000", "mlp-٣", "mlp" + "-1" * 21],
)
def test_name_of_an_mlp_that_cannot_be_is_refused_in_one_line(name: str) -> None:
    assert registered(name) is None
    with pytest.raises(ValueError, match=r"^Expected `model` to be one of .*mlp-256-128 .*, got 'mlp-") as caught:
        build_model(name, 3, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("resnt18", "resnet18"), ("Small_CNN", "small_cnn"), ("mobilenet_v3_smal", "mobilenet_v3_small")],
)
def test_a_misspelt_name_is_said_with_the_one_that_is_meant(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}'; did you mean {meant}\?$"):
        build_model(name, 3, 3)


def test_resnet8_has_the_size_of_the_published_one() -> None:
    by_hand = 9 * (3 * 64 + 2 * 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256) + 2 * (
        3 * 64 + 2 * 128 + 2 * 256
    )
    by_hand += 64 * 128 + 2 * 128 + 128 * 256 + 2 * 256  # the projections
    by_hand += 256 * 10 + 10
    model = build_model("resnet8_wide", 10, 3)
    assert size_of(model) == by_hand == 1227594
    widths = [block.conv1.out_channels for block in model.stages]
    assert widths == [64, 128, 256]


def test_projections_take_the_place_of_shortcuts_that_change_the_shape_alone() -> None:
    model = ResNetCIFAR(10, 3, depth=20, width=4, projection=True)
    assert [block.projection is not None for block in model.stages] == [n in (3, 6) for n in range(9)]
    block = model.stages[3].eval()
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    inputs = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(block(inputs), block.projection(inputs).relu())


# torchvision


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("mobilenet_v3_small", 32), ("efficientnet_b0", 32), ("googlenet", 64), ("inception_v3", 96)],
)
def test_networks_of_torchvision_have_the_classes_asked_for(name: str, size: int) -> None:
    with torch.device("meta"):
        model = build_model(name, 7, 3)
        for mode in (True, False):
            assert model.train(mode)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_the_packages_own_networks_go_before_torchvisions() -> None:
    names = _torchvision_names()
    assert {"resnet18", "vgg11", "vit_b_16"} <= set(names)
    assert not any("detection" in name or "rcnn" in name or "quantized" in name or "r3d" in name for name in names)
    for name in MODELS:
        assert registered(name) is MODELS[name]


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "r3d_18", "quantized_resnet18", "fcn_resnet50"])
def test_torchvisions_networks_for_other_tasks_have_no_name_here(name: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected `model` to be one of .*, got '{name}'"):
        build_model(name, 3, 3)


@pytest.mark.parametrize("in_channels", [1, 4, 16])
def test_torchvisions_networks_say_what_to_do_with_images_that_are_not_in_colour(in_channels: int) -> None:
    line = f"Expected `model` to be a network for {in_channels} channels or features, got resnet18 of torchvision, which needs"
    with pytest.raises(
        ValueError, match=f"^{line} images with 3 channels: use one of small_cnn, .*replaces its first layer.$"
    ):
        build_model("resnet18", 3, in_channels)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", _torchvision_names())
def test_every_classifier_of_torchvision_can_be_measured_without_memory(name: str) -> None:
    size = 299 if name == "inception_v3" else 224
    with torch.device("meta"):
        model = build_model(name, 7, 3)
        for mode in (True, False):
            assert logits_of(model.train(mode)(torch.zeros(2, 3, size, size))).shape == (2, 7)
