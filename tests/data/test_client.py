"""Batches: each example once an epoch, augmented by itself, and the data of one client."""

from typing import Any

import pytest
import torch

from fedamm_pl.data.client import BatchLoader, ClientData
from fedamm_pl.data.transforms import augment
from tests.data.numbered import labels_of, numbered, numbers


def loader_of(count: int, batch_size: int, **options: Any) -> BatchLoader:
    images = torch.from_numpy(numbered(count))[:, None]
    return BatchLoader(images, torch.arange(count), torch.arange(count), batch_size, **options)


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
def test_loader_covers_each_example_once_an_epoch(augmentation: str) -> None:
    loader = loader_of(37, 8, augmentation=augmentation, seed=3)
    epochs = [labels_of(loader) for _ in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("count", "batch_size", "expected"),
    [
        (65, 64, [65]),
        (64, 64, [64]),
        (66, 64, [64, 2]),
        (129, 64, [64, 65]),
        (1, 64, [1]),
        (2, 64, [2]),
        (0, 64, []),
        (3, 1, [1, 1, 1]),
        (3, 2, [3]),
    ],
)
@pytest.mark.parametrize("seed", [None, 0])
def test_last_batch_of_one_joins_the_batch_before(
    count: int, batch_size: int, expected: list[int], seed: int | None
) -> None:
    loader = loader_of(count, batch_size, seed=seed)
    assert [len(labels) for _, labels in loader] == [len(images) for images, _ in loader] == expected
    assert len(loader) == len(expected)


def test_loader_without_a_seed_keeps_the_order_and_the_images() -> None:
    loader = loader_of(10, 4, augmentation="crop_flip")
    assert labels_of(loader) == list(range(10))
    assert [number for images, _ in loader for number in numbers(images)] == list(range(10))


@pytest.mark.parametrize(("augmentation", "flips"), [("crop_flip", (0, 1)), ("crop", (0,))])
def test_loader_augments_each_image_by_itself(augmentation: str, flips: tuple[int, ...]) -> None:
    loader = loader_of(12, 5, augmentation=augmentation, seed=0)
    draws = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.tensor(flips)).view(-1, 2 + 1)
    found = []
    for images, labels in loader:
        for image, label in zip(images, labels, strict=True):
            variants = augment(loader.images[label].expand(len(draws), -1, -1, -1), draws)
            matching = (variants == image).all(dim=(1, 2, 3))
            assert matching.any()
            found.append(int(matching.nonzero()[0, 0]))
    assert len(set(found)) > 6  # 12 images do not share their draws


def test_client_without_examples_has_no_batches_and_an_empty_support() -> None:
    images, labels = torch.zeros(3, 1, 6, 6, dtype=torch.uint8), torch.arange(3)
    client = ClientData(images, labels, torch.tensor([], dtype=torch.int64), 4, "crop_flip", 20)
    assert list(client.train_loader(0)) == []
    assert client.support(0)[0].shape == (0, 1, 6, 6)
    assert client.support(0)[1].shape == (0,)
