"""``Holdings``: who holds which examples, by the split that a data module has made."""

import hashlib
from abc import abstractmethod
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.data.description import content_hash, examples_hash
from fedamm_pl.data.loaders import CentralLoaders
from fedamm_pl.data.partitions import SIMULATED
from fedamm_pl.data.partitions.simulated import class_histogram
from fedamm_pl.data.sources import ImageData, ImageInfo
from fedamm_pl.data.sources.source import Source
from fedamm_pl.data.split import FederatedSplit


class Holdings(CentralLoaders):
    """What is asked of a split: clients, their names and counts, the sets apart from theirs, and what nobody holds."""

    _images: ImageData | None
    _split: FederatedSplit
    _client_indices: list[Tensor]
    _info: ImageInfo

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
        return len(self._client_indices[client_id])

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
        """Training examples of each class at each client, shape (K, C)."""
        labels = self.images.train_labels.cpu().numpy()
        return class_histogram(labels, self._split.clients, len(self.images.class_names))
