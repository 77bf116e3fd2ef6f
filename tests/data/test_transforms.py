"""Augmentation and normalisation against slow, independent ones."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional

from fedamm_pl.data.transforms import augment, channel_statistics, draw_augmentation, normalize
from fedamm_pl.seeding import torch_generator


def pixels(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch_generator(sum(shape)))


def every_draw() -> Tensor:
    """All 81 offsets, plain and flipped."""
    return torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))


def crop_and_flip(image: np.ndarray, row: int, column: int, flip: int) -> np.ndarray:
    """One image (C, H, W), pixel by pixel: out(y, x) = in(y + row - 4, x + column - 4), black outside, then mirrored."""
    _, height, width = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + row - 4, x + column - 4
            if 0 <= source_y < height and 0 <= source_x < width:
                result[:, y, x] = image[:, source_y, source_x]
    return result[:, :, ::-1] if flip else result


@pytest.mark.parametrize("shape", [(1, 6, 7), (3, 7, 5), (3, 2, 3)])
def test_augment_equals_a_loop_over_the_images(shape: tuple[int, int, int]) -> None:
    draws = every_draw()
    images = pixels(len(draws), *shape)
    result = augment(images, draws)
    expected = [crop_and_flip(image, *draw) for image, draw in zip(images.numpy(), draws.tolist(), strict=True)]
    assert np.array_equal(result, np.stack(expected))
    assert result.dtype == torch.uint8
    assert result.is_contiguous()


def test_centre_offsets_give_the_images_themselves() -> None:
    images = pixels(5, 3, 6, 7)
    assert torch.equal(augment(images, torch.tensor([[4, 4, 0]] * 5)), images)
    assert torch.equal(augment(images, draw_augmentation(5, torch_generator(0), "none")), images)


def test_flip_mirrors_columns() -> None:
    images = pixels(2, 3, 6, 7)
    result = augment(images, torch.tensor([[4, 4, 0], [4, 4, 1]]))
    assert torch.equal(result[0], images[0])
    assert torch.equal(result[1], images[1].flip(-1))


def test_padding_is_black() -> None:
    corner = augment(torch.full((1, 1, 6, 6), 255, dtype=torch.uint8), torch.tensor([[0, 8, 0]]))[0, 0]
    assert corner[4:, :2].eq(255).all()
    assert corner.sum() == 255 * 2 * 2  # everything else came from outside


def test_augment_leaves_its_arguments_alone() -> None:
    images, draws = pixels(4, 1, 6, 6), torch.tensor([[0, 1, 1]] * 4)
    before = images.clone(), draws.clone()
    augment(images, draws)
    assert torch.equal(images, before[0])
    assert torch.equal(draws, before[1])


def test_augment_takes_an_empty_batch() -> None:
    draws = draw_augmentation(0, torch_generator(0), "crop_flip")
    assert augment(pixels(0, 3, 6, 6), draws).shape == (0, 3, 6, 6)


def test_all_offsets_and_both_orientations_are_drawn_about_equally_often() -> None:
    draws = draw_augmentation(8100, torch_generator(0), "crop_flip")
    offsets, frequencies = draws[:, :2].unique(dim=0, return_counts=True)
    assert len(offsets) == 81
    assert offsets.min() == 0
    assert offsets.max() == 8
    assert frequencies.min() > 50  # 100 expected
    assert draws[:, 2].unique().tolist() == [0, 1]
    assert draws[:, 2].double().mean() == pytest.approx(0.5, abs=0.03)


def test_crop_is_crop_flip_without_the_flips() -> None:
    both, crop = (draw_augmentation(50, torch_generator(1), kind) for kind in ("crop_flip", "crop"))  # type: ignore[arg-type]
    assert torch.equal(crop[:, :2], both[:, :2])
    assert crop[:, 2].tolist() == [0] * 50


def test_no_augmentation_is_the_centre() -> None:
    assert draw_augmentation(3, torch_generator(0), "none").tolist() == [[4, 4, 0]] * 3


def test_draws_are_reproducible_and_go_on() -> None:
    first, same, other = (draw_augmentation(20, torch_generator(seed), "crop_flip") for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    generator = torch_generator(0)
    passes = [draw_augmentation(20, generator, "crop_flip") for _ in range(2)]
    assert torch.equal(passes[0], first)
    assert not torch.equal(passes[1], first)


def test_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `augmentation` to be crop_flip, crop or none, got 'flip'"):
        draw_augmentation(1, torch_generator(0), "flip")  # type: ignore[arg-type]


@pytest.mark.parametrize(("mean", "std"), [([0.286], [0.353]), ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])])
def test_normalize_equals_torchvision(mean: list[float], std: list[float]) -> None:
    images = pixels(4, len(mean), 5, 6)
    expected = functional.normalize(images.double() / 255, mean, std)
    result = normalize(images, torch.tensor(mean), torch.tensor(std))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    exact = normalize(images, torch.tensor(mean).double(), torch.tensor(std).double())
    assert exact.dtype == torch.float64


@pytest.mark.parametrize("shape", [(4, 1, 5, 6), (3, 5, 6), (4, 5, 6, 3)])
def test_normalize_refuses_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^Expected images of shape \(B, 3, H, W\), got "):
        normalize(pixels(*shape), torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics_equal_numpy(channels: int) -> None:
    images = pixels(7, channels, 5, 6)
    mean, std = channel_statistics(images)
    scaled = images.numpy() / 255
    assert list(mean) == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert list(std) == pytest.approx(scaled.std((0, 2, 3)).tolist(), rel=1e-12)
    assert all(type(value) is float for value in [*mean, *std])


def test_normalised_images_have_mean_0_and_deviation_1() -> None:
    images = pixels(7, 3, 5, 6)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in channel_statistics(images))
    result = normalize(images, mean, std)
    torch.testing.assert_close(result.mean((0, 2, 3)), torch.zeros(3).double())
    torch.testing.assert_close(result.std((0, 2, 3), correction=0), torch.ones(3).double())


def test_constant_channel_has_deviation_1() -> None:
    levels = torch.arange(256, dtype=torch.uint8)  # one channel a level, so that no rounding of any is missed
    mean, std = channel_statistics(levels.view(1, 256, 1, 1).expand(3, 256, 2, 2))
    assert list(mean) == pytest.approx([level / 255 for level in range(256)])
    assert list(std) == [1.0] * 256


def test_channel_statistics_of_chosen_images_are_those_of_these_images_alone() -> None:
    images, chosen = pixels(7, 3, 6, 5), torch.tensor([1, 2, 5])
    assert channel_statistics(images, chosen) == channel_statistics(images[chosen])


def test_channel_statistics_of_many_large_images_equal_numpy() -> None:
    images = pixels(9, 2, 1024, 1024)  # read in parts
    mean, std = channel_statistics(images)
    scaled = images.numpy() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)), rel=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3)), rel=1e-12)
