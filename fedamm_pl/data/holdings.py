"""``Holdings``: who holds which examples, by the split that a data module has made."""

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
    """What a server has been told of a client whose examples lie on another machine.

    Attributes:
        size: How many it trains on; 0 while it has not been heard of.
        class_counts: How many of each class, by class index; None if it has not told.
    """

    size: int
    class_counts: list[int] | None = None


class Holdings(CentralLoaders):
    """What is asked of a split: clients, their names and counts, the sets apart from theirs, and what nobody holds."""

    _images: ImageData | None
    _split: FederatedSplit
    _client_indices: list[Tensor]
    _info: ImageInfo
    _elsewhere: dict[str, Elsewhere] | None = None

    @abstractmethod
    def setup(self, stage: str = "fit") -> None:
        """Load the examples and split them; once only."""

    @cached_property
    def examples_hash(self) -> str:
        """A short hash of all examples, labels and class names."""
        return examples_hash(self.images)

    @property
    def content_hash(self) -> str:
        """The same with whose each example is, where the data say so."""
        return content_hash(self.examples_hash, self.images.clients)

    @property
    def info(self) -> ImageInfo:
        """What the trained module must know of the images, in primitive types."""
        self.setup()
        return self._info

    @property
    def num_clients(self) -> int:
        """Number of clients K."""
        return len(self.client_names)

    @property
    def client_names(self) -> list[str]:
        """The name of each client; its number where nobody has named it."""
        self.setup()
        return self._split.client_names

    @property
    def partition_json(self) -> bytes:
        """The content of a file by which another run, with from_file, shares out these data alike."""
        images = self.images
        rows = {part: mine.numpy() for part, mine in (images.rows or {}).items()}
        return self._split.partition_json(len(images.train_labels), self.examples_hash, rows)

    @cached_property
    def partition_hash(self) -> str:
        """A short hash of who holds what, where it does not follow from options and data alone; empty where it does."""
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
        """Take it that all examples for training lie with clients on other machines; again when their sizes have changed.

        Meta, validation and test set are what is here. The rest of the training examples here is used by nobody. Class counts and shot
        groups become those of the clients together if all have told theirs, else they stay those of the examples here.

        Args:
            clients: Name -> what is known of the client; all that the federation has, in its order.
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
        """Whether ``class_counts`` are those of the clients, not only of what lies here."""
        return self._elsewhere is None or all(one.class_counts is not None for one in self._elsewhere.values())

    @property
    def imbalance_factor(self) -> float:
        """Smallest over largest class among the images that clients hold; 0 where a class has none."""
        counts = self.info["class_counts"]
        return min(counts) / max(counts)

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation set; the data are not loaded for it, so of data that bring one only after ``setup``."""
        return self.hparams["num_val_per_class"] > 0 or (
            self._images is not None and self._images.val_labels is not None
        )

    @property
    def validation(self) -> tuple[Source, Tensor, Tensor]:
        """Examples, their labels, and the indices of those of the validation set, shape (V,); none where there is no such set."""
        images = self.images
        if images.val_images is not None and images.val_labels is not None:
            return images.val_images, images.val_labels, torch.arange(len(images.val_labels))
        return images.train_images, images.train_labels, torch.from_numpy(self._split.validation)

    @property
    def local_test(self) -> list[Tensor]:
        """Indices of the training examples that each client has held out, K of shape (n_k,); empty where none does."""
        self.setup()
        return [torch.from_numpy(mine) for mine in self._split.local_test]

    @property
    def unused_images(self) -> int:
        """Training images that the partition leaves over, so that nobody uses them."""
        self.setup()
        return sum(self._split.unused)

    @property
    def left_over(self) -> str:
        """The same in words; empty where nothing is left over."""
        self.setup()
        return self._split.left_over

    @property
    def client_class_counts(self) -> npt.NDArray[np.int64]:
        """Training examples of each class at each client, shape (K, C); (0, C) where clients have not told theirs."""
        if self._elsewhere is not None:
            told = [one.class_counts for one in self._elsewhere.values()] if self.knows_class_counts else []
            return np.array(told, dtype=np.int64).reshape(len(told), len(self.images.class_names))
        labels = self.images.train_labels.cpu().numpy()
        return class_histogram(labels, self._split.clients, len(self.images.class_names))
