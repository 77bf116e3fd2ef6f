"""``Holdings``: the clients and their examples, according to the split of a data module."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.data.description import content_hash, examples_hash, grouped
from fedamm_pl.data.loaders import CentralLoaders
from fedamm_pl.data.partitions import SIMULATED
from fedamm_pl.data.partitions.simulated import class_histogram
from fedamm_pl.data.sources import ImageData, ImageInfo
from fedamm_pl.data.sources.source import Source
from fedamm_pl.data.split import FederatedSplit


@dataclass(frozen=True)
class Elsewhere:
    """Information at the server about a client whose examples are on another machine.

    Attributes:
        size: Number of examples on which it trains; 0 until it has reported.
        class_counts: Number of examples of each class, by class index; None if it has not reported them.
    """

    size: int
    class_counts: list[int] | None = None


class Holdings(CentralLoaders):
    """Properties of a split: clients, their names and counts, the separate sets, and the examples left over."""

    _images: ImageData | None
    _split: FederatedSplit
    _client_indices: list[Tensor]
    _info: ImageInfo
    _elsewhere: dict[str, Elsewhere] | None = None

    @abstractmethod
    def setup(self, stage: str = "fit") -> None:
        """Load the examples and split them; later calls do nothing."""

    @cached_property
    def examples_hash(self) -> str:
        """A short hash of all examples, labels and class names."""
        return examples_hash(self.images)

    @property
    def content_hash(self) -> str:
        """A short hash of all examples, and of the client of each example if the data name it."""
        return content_hash(self.examples_hash, self.images.clients)

    @property
    def info(self) -> ImageInfo:
        """Information about the images that the trained module needs, in primitive types."""
        self.setup()
        return self._info

    @property
    def num_clients(self) -> int:
        """Number of clients K."""
        return len(self.client_names)

    @property
    def client_names(self) -> list[str]:
        """The name of each client, or its number if it has no name."""
        self.setup()
        return self._split.client_names

    @property
    def partition_json(self) -> bytes:
        """The content of a file with which another run, with partition from_file, splits these data in the same way."""
        images = self.images
        rows = {part: mine.numpy() for part, mine in (images.rows or {}).items()}
        return self._split.partition_json(len(images.train_labels), self.examples_hash, rows)

    @cached_property
    def partition_hash(self) -> str:
        """A short hash of the partition, or an empty text if the partition follows from options and data alone."""
        if self.hparams["partition"] in SIMULATED:
            return ""
        return hashlib.sha256(self.partition_json).hexdigest()[:16]

    def client_size(self, client_id: int) -> int:
        """Return the number n_k of examples that one client trains on."""
        self.setup()
        if self._elsewhere is not None:
            return self._elsewhere[self.client_names[client_id]].size
        return len(self._client_indices[client_id])

    def hold_elsewhere(self, clients: Mapping[str, Elsewhere]) -> None:
        """Declare that all training examples are on other machines, at clients; call it again when their sizes change.

        The meta, validation and test sets are those on this machine; its other training examples are not used. Class
        counts and shot groups become those of all clients together if every client has reported its counts; otherwise
        they remain those of the examples on this machine.

        Args:
            clients: Name -> information about the client, for all clients of the federation, in its order.
        """
        self.setup()
        before, self._elsewhere, none = self._elsewhere, dict(clients), np.empty(0, dtype=np.int64)
        if before is not None:
            return
        told = [one.class_counts for one in clients.values() if one.class_counts is not None]
        counts = np.sum(told, axis=0).tolist() if len(told) == len(clients) else self._info["class_counts"]
        here = len(self._train)
        self._split = replace(
            self._split,
            clients=[none] * len(clients),
            client_names=list(clients),
            class_counts=counts,
            unused=[int(number) for number in self.images.train_labels[self._train].bincount(minlength=len(counts))],
            left_over=f"{here} of the training examples at the server are used by nobody" if here else "",
            local_test=[],
        )
        self._info = {**self._info, "class_counts": counts, "shot_groups": grouped(counts, self.hparams)}

    @property
    def knows_class_counts(self) -> bool:
        """Whether ``class_counts`` are those of the clients, not of the examples on this machine."""
        return self._elsewhere is None or all(one.class_counts is not None for one in self._elsewhere.values())

    @property
    def imbalance_factor(self) -> float:
        """Smallest class size divided by the largest, among the images that clients hold; 0 if a class has none."""
        counts = self.info["class_counts"]
        return min(counts) / max(counts)

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation set.

        This does not load the data; a validation set that belongs to the data is therefore known only after ``setup``.
        """
        return self.hparams["num_val_per_class"] > 0 or (
            self._images is not None and self._images.val_labels is not None
        )

    @property
    def validation(self) -> tuple[Source, Tensor, Tensor]:
        """Examples, their labels, and the indices of the validation set, shape (V,); no indices if there is none."""
        images = self.images
        if images.val_images is not None and images.val_labels is not None:
            return images.val_images, images.val_labels, torch.arange(len(images.val_labels))
        return images.train_images, images.train_labels, torch.from_numpy(self._split.validation)

    @property
    def local_test(self) -> list[Tensor]:
        """Indices of the training examples that each client has held out, K of shape (n_k,); empty if none has."""
        self.setup()
        return [torch.from_numpy(mine) for mine in self._split.local_test]

    @property
    def unused_images(self) -> int:
        """Number of training images that the partition leaves over and that are not used."""
        self.setup()
        return sum(self._split.unused)

    @property
    def left_over(self) -> str:
        """Description of the unused images; empty if there are none."""
        self.setup()
        return self._split.left_over

    @property
    def client_class_counts(self) -> npt.NDArray[np.int64]:
        """Training examples of each class at each client, shape (K, C); (0, C) if clients have not reported theirs."""
        if self._elsewhere is not None:
            told = [one.class_counts for one in self._elsewhere.values()] if self.knows_class_counts else []
            return np.array(told, dtype=np.int64).reshape(len(told), len(self.images.class_names))
        labels = self.images.train_labels.cpu().numpy()
        return class_histogram(labels, self._split.clients, len(self.images.class_names))
