"""The loaders for a plain Lightning Trainer; if several processes train (DDP), each gets its part of every batch."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.trainer.states import TrainerStatus
from torch import Tensor

from fedamm_pl.data.client import BatchLoader, Passes
from fedamm_pl.data.sources import ImageData
from fedamm_pl.data.sources.source import Source
from fedamm_pl.data.transforms import Augmentation
from fedamm_pl.seeding import derive_seed
from fedamm_pl.stored import StoredData

log = logging.getLogger(__name__)


class CentralLoaders(StoredData):
    """Loaders over the union of all clients, the meta set, the validation set and the test set.

    While a Trainer with several processes runs, each process gets its part of every batch. Otherwise the loaders return
    entire batches.
    """

    _train: Tensor
    _meta: Tensor

    @property
    @abstractmethod
    def images(self) -> ImageData:
        """All images; this also sets the indices ``_train`` and ``_meta``."""

    @property
    @abstractmethod
    def augmentation(self) -> Augmentation:
        """The training transform."""

    def train_dataloader(self) -> BatchLoader | dict[str, BatchLoader | Passes]:
        """Return the union of all clients, together with the meta set for a module that trains on it.

        With ``overfit_batches`` the batches are always the same, in order and unaugmented.
        """
        images, augmentation, place = self.images, self.augmentation, place_among_ranks(self.trainer)
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0

        def loader(indices: Tensor, purpose: str, batch_size: int) -> BatchLoader:
            seed = None if overfits else derive_seed(self.hparams["seed"], purpose)
            return BatchLoader(
                images.train_images, images.train_labels, indices, batch_size, augmentation, seed, *place
            )

        train = loader(self._train, "centralized", self.hparams["batch_size"])
        _say_left_out(train, "training")
        if not getattr(self.trainer and self.trainer.lightning_module, "trains_on_meta_set", False):
            return train
        self.require_meta_set()
        meta = loader(self._meta, "meta", len(self._meta))
        _say_left_out(meta, "meta")
        return {
            "train": train,
            "meta": Passes(meta, len(train)),
        }  # equally long, so that a fraction of the batches is the same fraction of both

    @property
    @abstractmethod
    def validation(self) -> tuple[Source, Tensor, Tensor]:
        """Examples, their labels, and the indices of the examples in the validation set."""

    @property
    @abstractmethod
    def local_test(self) -> list[Tensor]:
        """Indices of the training examples that each client has held out."""

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether there is a validation set."""

    @property
    def val_dataloader(self) -> Callable[[], Any]:
        """A function that returns the validation set in order; without one Lightning's own, so that a fit skips it."""
        return self._validation_loader if self.has_validation else super().val_dataloader

    def _validation_loader(self) -> BatchLoader:
        examples, labels, indices = self.validation
        place = place_among_ranks(self.trainer)
        return BatchLoader(examples, labels, indices, self.hparams["test_batch_size"], "none", None, *place)

    def local_test_dataloader(self) -> BatchLoader:
        """Return the examples that the clients have held out, client by client, in order."""
        images, indices = self.images, torch.cat(self.local_test)
        return BatchLoader(images.train_images, images.train_labels, indices, self.hparams["test_batch_size"])

    def test_dataloader(self) -> BatchLoader:
        """Return the test set in order."""
        images, place = self.images, place_among_ranks(self.trainer)
        order, size = torch.arange(len(images.test_labels)), self.hparams["test_batch_size"]
        return BatchLoader(images.test_images, images.test_labels, order, size, "none", None, *place)

    def predict_dataloader(self) -> BatchLoader:
        """Return the test set in order."""
        return self.test_dataloader()

    def require_meta_set(self) -> None:
        """Check that there is a meta set.

        Raises:
            ValueError: If ``num_meta_per_class`` is 0.
        """
        if not len(self._meta):
            raise ValueError("Expected `num_meta_per_class` to be 1 or more for a meta set, got 0.")


def place_among_ranks(trainer: pl.Trainer | None) -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) if no Trainer is running."""
    state = getattr(trainer, "state", None)
    if trainer is None or state is None or state.status is not TrainerStatus.RUNNING:
        return 0, 1
    return trainer.global_rank, trainer.world_size


def _say_left_out(loader: BatchLoader, name: str) -> None:
    """Log how many images a pass leaves out, so that all processes get the same number of images."""
    if loader.left_out:
        rank_zero_only(log.warning)(
            "%d of %d %s examples, others in each epoch, are left out, so that all %d processes get equally many",
            loader.left_out,
            len(loader.indices),
            name,
            loader.num_ranks,
        )
