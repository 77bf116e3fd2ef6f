"""Networks: sizes known from the literature, images of every kind, and networks chosen by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedamm_pl.models import MODELS, ResNetCIFAR, SmallCNN, WeightNet, build_model
from fedamm_pl.models.resnet_cifar import BasicBlock


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def resnet_parameters(depth: int, num_classes: int, in_channels: int) -> int:
    """Counted by hand: 3x3 convolutions without bias, two numbers a channel in BatchNorm, one linear layer."""
    total, before = 9 * in_channels * 16 + 2 * 16, 16
    for channels in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            total += 9 * before * channels + 9 * channels * channels + 2 * 2 * channels
            before = channels
    return total + 64 * num_classes + num_classes


@pytest.mark.parametrize(("depth", "expected"), [(20, 269722), (32, 464154), (44, 658586), (56, 853018)])
def test_resnets_have_the_published_sizes(depth: int, expected: int) -> None:
    # He et al. (CVPR 2016), table 6: 0.27, 0.46, 0.66 and 0.85 million
    assert num_parameters(build_model(f"resnet{depth}", 10, 3)) == expected == resnet_parameters(depth, 10, 3)


@pytest.mark.parametrize(("num_classes", "in_channels"), [(2, 1), (10, 1), (100, 3), (7, 4)])
def test_resnet_sizes_follow_classes_and_channels(num_classes: int, in_channels: int) -> None:
    assert num_parameters(build_model("resnet20", num_classes, in_channels)) == resnet_parameters(
        20, num_classes, in_channels
    )


def test_small_cnn_has_about_94000_parameters() -> None:
    by_hand = 9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 10 + 10
    assert num_parameters(build_model("small_cnn", 10, 3)) == by_hand == 94762


@pytest.mark.parametrize("name", ["small_cnn", "resnet20"])
@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize(("num_classes", "in_channels"), [(2, 1), (10, 3), (101, 3)])
def test_networks_map_images_to_logits(name: str, size: int, num_classes: int, in_channels: int) -> None:
    logits = build_model(name, num_classes, in_channels)(torch.rand(2, in_channels, size, size))
    assert logits.shape == (2, num_classes)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build_model(name, 4, 1)
    model(torch.rand(3, 1, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(("name", "smallest"), [("small_cnn", 4), ("resnet20", 1)])
def test_one_image_of_the_smallest_size_gets_through(name: str, smallest: int) -> None:
    model = build_model(name, 5, 3).eval()
    assert model(torch.rand(1, 3, smallest, smallest)).shape == (1, 5)


def test_resnet_halves_the_image_twice() -> None:
    shapes = []
    model = ResNetCIFAR(10, 3, depth=20).eval()
    for block in model.stages:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.rand(1, 3, 32, 32))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


@pytest.mark.parametrize(("before", "after", "stride"), [(4, 4, 1), (4, 8, 2), (3, 6, 2), (3, 6, 1), (1, 2, 2)])
def test_shortcut_subsamples_and_pads_with_zeros(before: int, after: int, stride: int) -> None:
    block = BasicBlock(before, after, stride).eval()
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    inputs = torch.rand(2, before, 6, 6) + 0.1
    result = block(inputs)
    first = (after - before) // 2
    assert result.shape == (2, after, 6 // stride, 6 // stride)
    assert torch.equal(result[:, first : first + before], inputs[:, :, ::stride, ::stride])
    assert torch.count_nonzero(result) == 2 * before * (6 // stride) ** 2


@pytest.mark.parametrize("depth", [2, 7, 18, 21, 34])
def test_depth_other_than_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"Expected `depth` to be 6n \+ 2 with n >= 1, got {depth}"):
        ResNetCIFAR(10, 3, depth=depth)


def test_networks_are_initialised_from_the_global_random_state() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(nn.utils.parameters_to_vector(build_model("resnet20", 3, 1).parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_resnet_weights_start_as_in_kaiming_normal() -> None:
    torch.manual_seed(0)
    model = ResNetCIFAR(10, 3, depth=20)
    convolution = model.stages[-1].conv2  # fan-in 9 * 64
    assert float(convolution.weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_model_can_be_an_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(build_model("fedamm_pl.models.cnn.SmallCNN", 3, 1), SmallCNN)
    (tmp_path / "network_of_ones_own.py").write_text(
        "import torch\n\n\ndef tiny(num_classes, in_channels):\n    return torch.nn.Linear(in_channels, num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build_model("network_of_ones_own.tiny", 3, 1)
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (1, 3)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("resnet33", "got 'resnet33'"),
        ("", "got ''"),
        ("no_such_package.Net", r"No module named 'no_such_package'"),
        ("fedamm_pl.models.Missing", "has no attribute 'Missing'"),
        ("./network.Net", r"got '\./network\.Net'"),
        ("os.path", "cannot be called like this"),
        ("torch.nn.ReLU", "cannot be called like this"),
        ("builtins.max", "returned int"),
    ],
)
def test_name_that_builds_no_network_is_refused(name: str, problem: str) -> None:
    known = r"Expected `model` to be one of small_cnn, resnet20, .* or an import path of a callable"
    with pytest.raises(ValueError, match=rf"{known}.*{problem}"):
        build_model(name, 10, 3)


@pytest.mark.parametrize("size", [0, 1, 17])
def test_weight_net_maps_losses_to_weights_between_0_and_1(size: int) -> None:
    weights = WeightNet()(torch.linspace(0, 20, size))
    assert weights.shape == (size,)
    assert ((weights > 0) & (weights < 1)).all()


@pytest.mark.parametrize("hidden", [1, 100])
def test_weight_net_equals_its_formula(hidden: int) -> None:
    net, losses = WeightNet(hidden), torch.linspace(0, 10, 9)
    parameters = [parameter.detach().double().numpy() for parameter in net.parameters()]
    assert [parameter.shape for parameter in parameters] == [(hidden, 1), (hidden,), (1, hidden), (1,)]
    first, first_bias, second, second_bias = parameters
    expected = [
        1 / (1 + np.exp(-(second @ np.maximum(first[:, 0] * loss + first_bias, 0) + second_bias)[0]))
        for loss in losses.tolist()
    ]
    assert net(losses).tolist() == pytest.approx(expected, rel=1e-5)


def test_weight_net_weighs_each_example_by_its_own_loss() -> None:
    net, losses = WeightNet(), torch.tensor([0.1, 3.0, 0.7])
    together = net(losses)
    assert torch.allclose(together, torch.cat([net(loss[None]) for loss in losses]))
    assert len(set(together.tolist())) == 3


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", ["small_cnn", "resnet20"])
def test_networks_ask_for_channels_last_compute_in_it_and_agree_with_the_plain_layout(
    name: str, in_channels: int
) -> None:
    model, images = build_model(name, 10, in_channels).double(), torch.rand(4, in_channels, 28, 28).double()
    assert model.channels_last
    layouts: list[bool] = []
    channels_last = torch.channels_last
    last = [part for part in model.modules() if isinstance(part, nn.Conv2d)][-1]
    last.register_forward_hook(lambda _, __, out: layouts.append(out.is_contiguous(memory_format=channels_last)))
    plain, fast = model(images), model(images.to(memory_format=channels_last))
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    assert layouts == [False, True]
