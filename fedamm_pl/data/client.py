"""Batches sliced from tensors, and the data of one client."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedamm_pl.data.transforms import Augmentation, augment, draw_augmentation
from fedamm_pl.seeding import derive_seed, torch_generator

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,)."""


@dataclass
class BatchLoader:
    """An iterable of (images, labels) batches sliced from tensors, without per-image work.

    Each pass shuffles and augments anew from one stream of random numbers; two loaders made with the same seed yield
    the same batches. A last batch of one example, on which BatchNorm may be undefined, joins the batch before it.

    Attributes:
        images: uint8 images (N, C, H, W), on any device; batches come from there.
        labels: int64 labels (N,).
        indices: The examples to visit, shape (n,), on the CPU.
        batch_size: Examples a batch.
        augmentation: What to do to the images, see :mod:`fedamm_pl.data.transforms`.
        seed: Seed of shuffling and augmentation; None visits the examples in order, unaugmented.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    batch_size: int
    augmentation: Augmentation = "none"
    seed: int | None = None

    def __post_init__(self) -> None:
        self._generator = None if self.seed is None else torch_generator(self.seed)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (rest > 1 or (rest == 1 and whole == 0))

    def __iter__(self) -> Iterator[Batch]:
        order, draws = self.indices, None
        if self._generator is not None:
            order = order[torch.randperm(len(order), generator=self._generator)]
            if self.augmentation != "none":
                draws = draw_augmentation(len(order), self._generator, self.augmentation).to(self.images.device)
        order = order.to(self.images.device)
        for step in range(len(self)):
            last = step + 1 == len(self)
            chosen = slice(step * self.batch_size, None if last else (step + 1) * self.batch_size)
            images, labels = self.images[order[chosen]], self.labels[order[chosen]]
            yield images if draws is None else augment(images, draws[chosen]), labels


@dataclass(frozen=True)
class ClientData:
    """What one client holds.

    Attributes:
        images: uint8 images that the client's indices point into, shape (N, C, H, W).
        labels: Labels of shape (N,).
        indices: The client's own examples, shape (n_k,).
        batch_size: Examples a training batch.
        augmentation: The training transform.
        support_size: Size m * C of the support batch of FedAMM's virtual step, before the client's own size bounds it.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    batch_size: int
    augmentation: Augmentation
    support_size: int

    @property
    def num_examples(self) -> int:
        """Number n_k of the client's examples."""
        return len(self.indices)

    def class_counts(self, num_classes: int) -> Tensor:
        """Return the number n_c of the client's examples of each class, shape (C,)."""
        return self.labels[self.indices.to(self.labels.device)].bincount(minlength=num_classes)

    def train_loader(self, seed: int) -> BatchLoader:
        """Return shuffled, augmented batches of all the client's examples."""
        return BatchLoader(self.images, self.labels, self.indices, self.batch_size, self.augmentation, seed)

    def plain_batches(self, batch_size: int = 500) -> BatchLoader:
        """Return batches of all the client's examples in order, without augmentation."""
        return BatchLoader(self.images, self.labels, self.indices, batch_size)

    def support(self, seed: int) -> Batch:
        """Draw min(n_k, m * C) examples without replacement, with the training transform."""
        generator = torch_generator(derive_seed(seed, "support"))
        size = min(self.num_examples, self.support_size)
        chosen = self.indices[torch.randperm(self.num_examples, generator=generator)[:size]]
        return augmented_batch(self.images, self.labels, chosen, self.augmentation, generator)


def augmented_batch(
    images: Tensor, labels: Tensor, chosen: Tensor, augmentation: Augmentation, generator: torch.Generator
) -> Batch:
    """Return chosen examples with the training transform.

    Args:
        images: uint8 images (N, C, H, W), on any device; the batch comes from there.
        labels: Labels (N,).
        chosen: Indices of the examples, shape (B,), on the CPU.
        augmentation: The training transform.
        generator: Source of its draws.
    """
    draws = draw_augmentation(len(chosen), generator, augmentation).to(images.device)
    chosen = chosen.to(images.device)
    return augment(images[chosen], draws), labels[chosen]
