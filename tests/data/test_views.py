"""Views: turns and holes against torch's and slow loops; what the strong view is made of, and that it is drawn for each image."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from fedamm_pl.data.transforms import augment, draw_augmentation
from fedamm_pl.data.views import SHARING, cut_out, strong_view, turn, weak_view


def noise(number: int, channels: int = 1, height: int = 12, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (number, channels, height, width), generator=generator, dtype=torch.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Turns.


@pytest.mark.parametrize("size", [12, 13])
def test_quarter_turns_are_exact_and_counter_clockwise(size: int) -> None:
    images = noise(4, 3, size, size)
    found = turn(images, torch.tensor([0.0, 90.0, 180.0, -90.0]))
    for quarter, image, one in zip((0, 1, 2, 3), images, found, strict=True):
        assert torch.equal(one, torch.rot90(image, quarter, dims=(1, 2)))
    assert found.dtype == torch.uint8


@pytest.mark.parametrize(("height", "width"), [(28, 28), (20, 31)])
def test_other_turns_are_those_of_torchvision(height: int, width: int) -> None:
    degrees = torch.tensor([3.7, -14.2, 29.9, 77.0])
    images = noise(4, 2, height, width)
    found = turn(images, degrees)
    for image, one, angle in zip(images, found, degrees.tolist(), strict=True):
        expected = v2.functional.rotate(image, angle)
        assert (
            float((one == expected).double().mean()) > 0.995
        )  # where two pixels are equally near, either may be taken
        assert int((one == 0).sum()) == pytest.approx(int((expected == 0).sum()), abs=4)


# Holes.


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 5), (1, 1)])
def test_holes_are_half_as_high_and_wide_and_end_at_the_edge(height: int, width: int) -> None:
    centres = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    images = noise(len(centres), 2, height, width)
    found = cut_out(images, centres)
    tall, wide = height // 2, width // 2
    for image, one, (row, column) in zip(images, found, centres.tolist(), strict=True):
        expected = image.clone()
        top, left = row - tall // 2, column - wide // 2
        expected[:, max(top, 0) : max(top + tall, 0), max(left, 0) : max(left + wide, 0)] = 0
        assert torch.equal(one, expected)
    assert found.dtype == torch.uint8


# Views.


def test_weak_view_is_the_training_transform_and_a_turn() -> None:
    images = noise(40)
    assert weak_view(images, "none", 0, seeded()) is images
    cropped = weak_view(images, "crop_flip", 0, seeded())
    assert torch.equal(cropped, augment(images, draw_augmentation(40, seeded(), "crop_flip")))
    turned = weak_view(images, "crop_flip", 15, seeded())
    generator = seeded()
    draw_augmentation(40, generator, "crop_flip")
    degrees = 15 * (2 * torch.rand(40, generator=generator, dtype=torch.float32) - 1)
    assert torch.equal(turned, turn(cropped, degrees))
    assert degrees.min() < -10
    assert degrees.max() > 10


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_view_has_a_hole_somewhere_else_in_each_image(channels: int) -> None:
    images = torch.full((60, channels, 16, 16), 200, dtype=torch.uint8)
    found = strong_view(images, "none", seeded())
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    black = (found == 0).all(1)
    assert (black.flatten(1).sum(1) >= 4 * 4).all()  # a quarter of it is seen at least
    assert len({tuple(image.flatten().tolist()) for image in black}) > 30


def test_grey_images_turn_and_colour_ones_do_as_the_policy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Noted(v2.AutoAugment):
        def forward(self, *inputs: Any) -> Any:
            seen.append(len(inputs[0]))
            return super().forward(*inputs)

    monkeypatch.setattr(v2, "AutoAugment", Noted)
    strong_view(noise(20, 1), "crop_flip", seeded())
    assert seen == []
    strong_view(noise(20, 3), "crop_flip", seeded())
    assert seen == [SHARING, SHARING, 20 - 2 * SHARING]


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_a_function_of_the_generator_and_leave_the_global_state_alone(channels: int) -> None:
    images = noise(20, channels)
    before, state = images.clone(), torch.get_rng_state()
    first, second, other = (strong_view(images, "crop_flip", seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
