"""Batches: each example once an epoch, augmented by itself, and the data of one client."""

from typing import Any

import pytest
import torch

from fedamm_pl.data.client import BatchLoader, ClientData, Passes
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


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch_size"), [(37, 4), (48, 4), (49, 4), (12, 2), (7, 20), (3, 1), (64, 8)])
def test_ranks_share_the_batches_of_one_loader(count: int, batch_size: int, num_ranks: int) -> None:
    options: dict[str, Any] = {"augmentation": "crop_flip", "seed": 3}
    ranks = [loader_of(count, batch_size, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)]
    alone = loader_of(count, batch_size * num_ranks, **options)
    for _ in range(2):
        parts = list(zip(*ranks, strict=True))  # equally many batches
        assert len(parts) == len(ranks[0])
        joint = [[torch.cat(values) for values in zip(*part, strict=True)] for part in parts]
        assert all(len({len(labels) for _, labels in part}) == 1 for part in parts)  # equally large ones
        expected = [torch.cat(values)[: count - ranks[0].left_out] for values in zip(*alone, strict=True)]
        assert torch.equal(torch.cat([images for images, _ in joint]), expected[0])
        assert torch.equal(torch.cat([labels for _, labels in joint]), expected[1])
        assert all(len(labels) > 1 for part in parts for _, labels in part) or count < 2 * num_ranks or batch_size == 1
    assert ranks[0].left_out == count % num_ranks


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize(("count", "batch_size"), [(37, 4), (48, 4), (25, 4), (4, 20), (26, 3)])
def test_ranks_visit_each_example_once_without_a_seed(count: int, batch_size: int, num_ranks: int) -> None:
    ranks = [list(loader_of(count, batch_size, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    found = [int(label) for batches in ranks for _, labels in batches for label in labels]
    assert sorted(found) == list(range(count))
    assert all(len(labels) for batches in ranks for _, labels in batches)


def test_fewer_examples_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="`devices` to be at most the 3 examples of a loader, got 4"):
        loader_of(3, 2, num_ranks=4)


def test_passes_go_on_with_the_draws_of_the_loader() -> None:
    expected = loader_of(6, 6, seed=1)
    passes = Passes(loader_of(6, 6, seed=1), 3)
    assert len(passes) == 3
    for _ in range(2):
        found = [labels.tolist() for _, labels in passes]
        assert found == [labels_of(expected) for _ in range(3)]


def test_client_without_examples_has_no_batches_and_an_empty_support() -> None:
    images, labels = torch.zeros(3, 1, 6, 6, dtype=torch.uint8), torch.arange(3)
    client = ClientData(images, labels, torch.tensor([], dtype=torch.int64), 4, "crop_flip", 20)
    assert list(client.train_loader(0)) == []
    assert client.support(0)[0].shape == (0, 1, 6, 6)
    assert client.support(0)[1].shape == (0,)


# Drawn in balance, and with other labels.


def uneven(seed: int = 0, **options: Any) -> ClientData:
    """A client that holds 60, 12 and 3 examples of the classes 0, 2 and 3, and none of class 1, among those of others."""
    labels = torch.tensor([0, 1, 2, 3]).repeat(30).repeat_interleave(2)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    wanted = {0: 60, 2: 12, 3: 3}
    indices = torch.cat([order[labels[order] == label][:count] for label, count in wanted.items()])
    images = torch.arange(len(labels)).to(torch.uint8)[:, None, None, None].expand(-1, 1, 6, 6).contiguous()
    return ClientData(images, labels, indices, 8, "none", 20, **options)


def test_balanced_draws_take_each_class_of_the_client_equally_often() -> None:
    data = uneven(balanced=True)
    loader, counts, visited = data.train_loader(3), torch.zeros(4), set()
    for _ in range(60):
        drawn = 0
        for images, labels in loader:
            assert torch.equal(labels, data.labels[images[:, 0, 0, 0].long()])
            counts += labels.bincount(minlength=4)
            visited |= set(images[:, 0, 0, 0].tolist())
            drawn += len(labels)
        assert drawn == data.num_examples == 75  # as many as there are
    share = counts / counts.sum()
    # 4500 draws: three standard deviations of a share of a third are 0.02
    torch.testing.assert_close(share, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]), rtol=0, atol=0.03)
    assert visited == set(data.indices.tolist())


def test_balanced_draws_are_a_function_of_the_seed_and_other_in_each_pass() -> None:
    first, second, other = (uneven(balanced=True).train_loader(seed) for seed in (3, 3, 4))
    passes = [labels_of(loader) for loader in (first, first, second, second, other)]
    assert passes[:2] == passes[2:4]
    assert passes[0] != passes[1]
    assert passes[0] != passes[4]


def test_only_training_draws_in_balance() -> None:
    plain, balanced = uneven(), uneven(balanced=True)
    assert labels_of(balanced.plain_batches()) == labels_of(plain.plain_batches())
    assert torch.equal(balanced.support(0)[0], plain.support(0)[0])
    assert balanced.class_counts(4).tolist() == [60, 0, 12, 3]


def test_relabelled_data_have_the_new_labels_everywhere_and_the_old_ones_stay() -> None:
    data = uneven()
    before = data.labels.clone()
    new = torch.arange(data.num_examples) % 4
    changed = data.relabelled(new)
    assert torch.equal(data.labels, before)
    assert torch.equal(changed.labels[data.indices], new)
    others = torch.ones(len(before), dtype=torch.bool)
    others[data.indices] = False
    assert torch.equal(changed.labels[others], before[others])
    assert changed.labels.dtype == before.dtype
    assert changed.class_counts(4).tolist() == new.bincount().tolist()
    expected = dict(zip(data.indices.tolist(), new.tolist(), strict=True))
    for batches in (changed.train_loader(0), changed.plain_batches(), [changed.support(0)]):
        for images, labels in batches:
            assert [expected[int(number)] for number in images[:, 0, 0, 0]] == labels.tolist()
