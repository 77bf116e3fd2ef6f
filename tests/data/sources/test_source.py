"""A source need not be a tensor: what is read when it is needed gives the same batches, and the same run."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedamm_pl.data import ImageData
from fedamm_pl.data.client import BatchLoader, ClientData, augmented_batch
from fedamm_pl.data.sources.source import Source, content, is_features, stream, subset
from fedamm_pl.data.transforms import channel_statistics, feature_statistics
from fedamm_pl.seeding import torch_generator
from tests.data.numbered import same
from tests.federation.small import assert_equal, federation
from tests.tiny import TinyData


class Counting:
    """A source that holds no tensor of its own kind and notes what it is asked for."""

    device = torch.device("cpu")

    def __init__(self, values: Tensor, chunks_at_once: bool = False) -> None:
        self.values = values
        self.asked: list[int] = []
        if chunks_at_once:
            self.stream = self.streamed

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, indices: Any) -> Tensor:
        taken = self.values[indices]
        self.asked.append(len(taken))
        return taken

    def streamed(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        for chunk in chunks:
            self.asked.append(-len(chunk))
            yield self.values[chunk]

    def subset(self, indices: Tensor) -> "Counting":
        return Counting(self.values[indices])

    @property
    def fingerprint(self) -> str:
        return f"{len(self)} counted"


def pixels(count: int = 30) -> Tensor:
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("at_once", [False, True])
def test_batches_are_those_of_a_tensor_and_nothing_else_is_read(seed: int | None, at_once: bool) -> None:
    images, labels, mine = pixels(), torch.arange(30) % 4, torch.arange(3, 25)
    lazy = Counting(images, at_once)
    assert isinstance(lazy, Source)
    loaders = [BatchLoader(source, labels, mine, 8, "crop_flip", seed) for source in (images, lazy)]
    first, second = (list(loader) for loader in loaders)
    assert same(first, second)
    assert [abs(size) for size in lazy.asked] == [8, 8, 6]
    assert all((size < 0) == at_once for size in lazy.asked)


def test_a_batch_is_read_when_it_is_asked_for() -> None:
    lazy = Counting(pixels())
    batches = iter(BatchLoader(lazy, torch.zeros(30, dtype=torch.int64), torch.arange(30), 5, "none", 0))
    assert lazy.asked == []
    next(batches)
    assert lazy.asked == [5]


def test_support_and_chosen_batches_are_those_of_a_tensor() -> None:
    images, labels, mine = pixels(), torch.arange(30) % 4, torch.arange(3, 25)
    one, other = (ClientData(source, labels, mine, 8, "crop_flip", 12) for source in (images, Counting(images)))
    assert same([one.support(5)], [other.support(5)])
    drawn = [augmented_batch(source, labels, mine, "crop", torch_generator(1)) for source in (images, Counting(images))]
    assert same(drawn[:1], drawn[1:])


def test_parts_and_content() -> None:
    images = pixels()
    chosen = torch.tensor([4, 2, 9])
    part = subset(Counting(images), chosen)
    assert isinstance(part, Counting)
    assert torch.equal(part[:], subset(images, chosen)[:])
    assert bytes(content(Counting(images))) == b"30 counted"
    assert bytes(content(images)) == images.numpy().tobytes()
    assert [chunk.tolist() for chunk in stream(torch.arange(5), [torch.tensor([1]), torch.tensor([0, 4])])] == [
        [1],
        [0, 4],
    ]


def test_statistics_are_those_of_a_tensor() -> None:
    images, mine = pixels(), torch.arange(3, 25)
    assert channel_statistics(Counting(images), mine) == channel_statistics(images, mine)


def test_a_source_without_a_fingerprint_is_told_from_others_by_all_its_examples() -> None:
    class Plain(Counting):
        fingerprint = None  # type: ignore[assignment]

    values = torch.zeros(1203, 2)
    other = values.clone()
    other[1202, 1] = 1
    assert content(Plain(values)) == content(Plain(values.clone()))
    assert content(Plain(values)) != content(Plain(other))


def test_a_deviation_that_is_zero_in_float32_is_that_of_a_constant() -> None:
    column = torch.zeros(1000, 1)
    column[3] = 1e-45  # the least number above zero
    _, std = feature_statistics(column, torch.arange(1000))
    assert std == (1,)


def test_features_are_standardised_by_their_own_statistics() -> None:
    rows = np.array([[1.0, 5.0, 3.3], [3.0, 5.0, 3.3], [100.0, -9.0, 0.0]], dtype=np.float32)
    mean, std = feature_statistics(torch.from_numpy(rows), torch.tensor([0, 1]))
    np.testing.assert_allclose(mean, [2, 5, 3.3], rtol=1e-6)
    assert std == (1.0, 1.0, 1.0)  # of the first by chance, of the others because they are constant
    everything = torch.from_numpy(np.random.default_rng(0).normal(1e4, 1, (5000, 3)).astype(np.float32))
    mean, std = feature_statistics(everything, torch.arange(5000))
    np.testing.assert_allclose(mean, everything.double().mean(0))
    np.testing.assert_allclose(std, everything.double().std(0, correction=0), rtol=1e-9)
    assert is_features(everything)
    assert not is_features(pixels())


class LazyTiny(TinyData):
    """The tiny data, read when they are needed."""

    def load_images(self) -> ImageData:
        data = super().load_images()
        lazy = Counting(torch.as_tensor(data.train_images)), Counting(torch.as_tensor(data.test_images))
        return dataclasses.replace(data, train_images=lazy[0], test_images=lazy[1])


def test_a_run_is_that_of_a_tensor_bit_for_bit() -> None:
    options: dict[str, Any] = {
        "dataset": "tiny",
        "num_clients": 4,
        "num_meta_per_class": 2,
        "imbalance_factor": 0.2,
        "batch_size": 16,
    }
    runs = [federation(data=kind(**options)) for kind in (TinyData, LazyTiny)]
    histories = [run.run() for run in runs]
    assert histories[0] == histories[1]
    assert_equal(runs[0].state.shared, runs[1].state.shared)
    assert runs[0].data.content_hash != runs[1].data.content_hash
