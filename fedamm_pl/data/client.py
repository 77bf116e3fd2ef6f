"""Batches sliced from tensors, and the data of one client."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from fedamm_pl.data.sources.source import Source, stream
from fedamm_pl.data.transforms import Augmentation, augment, draw_augmentation
from fedamm_pl.seeding import derive_seed, torch_generator

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W), or features (B, D), and labels (B,)."""


@dataclass
class BatchLoader:
    """An iterable of (images, labels) batches that are sliced from tensors, without per-image work.

    Each pass shuffles and augments again from one stream of random numbers; two loaders with the same seed yield the
    same batches. A last batch of one example, on which BatchNorm may be undefined, is added to the batch before it.

    When several processes train, each rank takes its part of every batch of ``num_ranks * batch_size`` examples, which
    is drawn and augmented as a whole. All ranks have the same number of batches. With a seed the batches also have
    equal sizes, so up to ``num_ranks - 1`` examples, different ones in each pass, are left out. Without a seed each
    example is visited once.

    Attributes:
        images: The examples, uint8 images (N, C, H, W) or float features (N, D), on any device; the batches are on the
            same device.
        labels: int64 labels (N,).
        indices: The examples to visit, shape (n,), on the CPU.
        batch_size: Number of examples per batch.
        augmentation: The transform of the images, see :mod:`fedamm_pl.data.transforms`.
        seed: Seed of shuffling and augmentation; None visits the examples in order, without augmentation.
        rank: Rank of this process.
        num_ranks: Number of processes.
        balanced: Whether a pass draws its n examples with replacement, with the same probability for each class.

    Raises:
        ValueError: If there are fewer examples than ranks.
    """

    images: Source
    labels: Tensor
    indices: Tensor
    batch_size: int
    augmentation: Augmentation = "none"
    seed: int | None = None
    rank: int = 0
    num_ranks: int = 1
    balanced: bool = False

    def __post_init__(self) -> None:
        self._generator = None if self.seed is None else torch_generator(self.seed)
        if 0 < len(self.indices) < self.num_ranks:
            raise ValueError(
                f"Expected `devices` to be at most the {len(self.indices)} examples of a loader, got {self.num_ranks}."
            )

    @property
    def left_out(self) -> int:
        """Number of examples that no rank visits in a pass."""
        return 0 if self.seed is None else len(self.indices) % self.num_ranks

    def __len__(self) -> int:
        whole, rest = divmod(len(self.indices) - self.left_out, self.batch_size * self.num_ranks)
        return whole + (rest >= 2 * self.num_ranks or (rest > 0 and whole == 0))

    def __iter__(self) -> Iterator[Batch]:
        order, draws = self.indices, None
        if self._generator is not None:
            order = order[self._drawn(self._generator)]
            if self.augmentation != "none":
                draws = draw_augmentation(len(order), self._generator, self.augmentation).to(self.images.device)
        order = order.to(self.images.device)
        size, end = self.batch_size * self.num_ranks, len(order) - self.left_out
        parts = []
        for step in range(len(self)):
            start, stop = step * size, end if step + 1 == len(self) else (step + 1) * size
            share = [start + (stop - start) * rank // self.num_ranks for rank in (self.rank, self.rank + 1)]
            parts.append(slice(*share))
        chunks = [order[part] for part in parts]
        for part, chosen, images in zip(parts, chunks, stream(self.images, chunks), strict=True):
            labels = self.labels[chosen.to(self.labels.device)]
            yield images if draws is None else augment(images, draws[part]), labels

    def _drawn(self, generator: torch.Generator) -> Tensor:
        """Return the positions in ``indices`` that a pass visits, in order."""
        if not self.balanced:
            return torch.randperm(len(self.indices), generator=generator)
        labels = self.labels[self.indices.to(self.labels.device)].cpu()
        weights = 1 / labels.bincount()[labels].double()
        return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


@dataclass(frozen=True)
class Passes:
    """Repeated passes over the batches of a loader, up to a number of batches.

    Attributes:
        loader: Yields the batches.
        length: Number of batches.
    """

    loader: BatchLoader
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return islice(chain.from_iterable(repeat(self.loader)), self.length)


@dataclass(frozen=True)
class ClientData:
    """The data of one client.

    Attributes:
        images: The examples to which the client's indices refer, uint8 images (N, C, H, W) or float features (N, D).
        labels: Labels of shape (N,).
        indices: Indices of the client's examples, shape (n_k,).
        batch_size: Number of examples per training batch.
        augmentation: The training transform.
        support_size: Size m * C of the support batch of FedAMM's virtual step; a client with fewer examples uses all of
            them.
        balanced: Whether training draws n_k examples with replacement, with the same probability for each of the
            client's classes.
    """

    images: Source
    labels: Tensor
    indices: Tensor
    batch_size: int
    augmentation: Augmentation
    support_size: int
    balanced: bool = False

    @property
    def num_examples(self) -> int:
        """Number n_k of the client's examples."""
        return len(self.indices)

    def relabelled(self, labels: Tensor) -> "ClientData":
        """Return the data with other labels.

        Args:
            labels: Labels of the client's examples, in the order of ``indices``, shape (n_k,).
        """
        changed = self.labels.clone()
        changed[self.indices.to(changed.device)] = labels.to(changed)
        return replace(self, labels=changed)

    def class_counts(self, num_classes: int) -> Tensor:
        """Return the number n_c of the client's examples of each class, shape (C,)."""
        return self.labels[self.indices.to(self.labels.device)].bincount(minlength=num_classes)

    def train_loader(self, seed: int) -> BatchLoader:
        """Return shuffled, augmented batches of all examples of the client."""
        return BatchLoader(
            self.images,
            self.labels,
            self.indices,
            self.batch_size,
            self.augmentation,
            seed,
            balanced=self.balanced,
        )

    def plain_batches(self, batch_size: int = 500) -> BatchLoader:
        """Return batches of all examples of the client in order, without augmentation."""
        return BatchLoader(self.images, self.labels, self.indices, batch_size)

    def support(self, seed: int) -> Batch:
        """Draw min(n_k, m * C) examples without replacement, with the training transform."""
        generator = torch_generator(derive_seed(seed, "support"))
        size = min(self.num_examples, self.support_size)
        chosen = self.indices[torch.randperm(self.num_examples, generator=generator)[:size]]
        return augmented_batch(self.images, self.labels, chosen, self.augmentation, generator)


def augmented_batch(
    images: Source, labels: Tensor, chosen: Tensor, augmentation: Augmentation, generator: torch.Generator
) -> Batch:
    """Return chosen examples with the training transform.

    Args:
        images: The examples, on any device; the batch is on the same device.
        labels: Labels (N,).
        chosen: Indices of the examples, shape (B,), on the CPU.
        augmentation: The training transform.
        generator: Source of the transform's draws.
    """
    draws = None if augmentation == "none" else draw_augmentation(len(chosen), generator, augmentation)
    chosen = chosen.to(images.device)
    batch = images[chosen], labels[chosen.to(labels.device)]
    return batch if draws is None else (augment(batch[0], draws.to(images.device)), batch[1])
