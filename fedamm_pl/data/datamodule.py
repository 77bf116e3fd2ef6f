"""``FederatedDataModule``: a long-tailed data set with its meta set and its clients, as a LightningDataModule."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fedamm_pl.data.client import Batch, ClientData, augmented_batch
from fedamm_pl.data.description import describe, examples_hash
from fedamm_pl.data.holdings import Holdings
from fedamm_pl.data.long_tail import Profile
from fedamm_pl.data.partitions import USED_BY, require_partition
from fedamm_pl.data.sources import NORMALIZATION, ImageData, ReadOptions, image_data, load_images
from fedamm_pl.data.sources.source import is_features
from fedamm_pl.data.split import federated_split
from fedamm_pl.data.transforms import (
    Augmentation,
    draw_augmentation,
    require_suited,
)
from fedamm_pl.metrics import ShotRule
from fedamm_pl.seeding import torch_generator

log = logging.getLogger(__name__)

SET_UP = ("_images", "_split", "_train", "_meta", "_client_indices", "_info", "examples_hash", "partition_hash")
"""Attributes that ``setup`` sets, or that are computed from them."""


class FederatedDataModule(Holdings):
    """A long-tailed training set, split over clients, with a balanced meta set at the server and a test set.

    First the meta set is taken out, then the validation set. Then the tail is cut, the rest is partitioned, and each client holds out its
    local test examples. All of this depends only on the data options and the seed, so every method sees the same split. Images stay uint8;
    augmentation is applied to batches, and normalisation is done by the module. In a plain Trainer the loaders contain the examples of all
    clients, and it validates if there is a validation set. All counts, groups and statistics refer to the images that clients train on;
    examples that a partition leaves over are not used.
    A copy or a pickle contains no images and no split: it creates them again, bit for bit.

    Args:
        dataset: cifar10, cifar100, fashion_mnist, fashion_mnist_mini and digits (both included; digits is a table), image_folder, or the
            name of an npz file, a folder of images, a list of images (.txt) or a table (.csv, .tsv, .parquet) in ``root``.
        root: Folder of the data; downloads go there. A leading ``~`` stands for your home directory.
        label_column: Tables and saved Hugging Face data sets: the column with the labels.
        client_column: Tables and saved Hugging Face data sets: the column that says which client holds an example; empty: none.
        split_column: Tables: the column that says train, val or test; empty: none.
        path_column: Tables: the column with the paths of images, relative to ``root``; empty: the columns are features.
        test_fraction: Fraction of each class that is held out for testing if the data have no test set, in (0, 1).
        image_size: Size of images in files, in pixels: one number, or height and width. Images are scaled to just cover it (bilinear,
            antialiased) and cropped at the centre; null: they all have the same size already.
        in_memory: Whether images in files are decoded once and kept in memory, or decoded each time they are needed; null: kept if they
            take up to 1 GiB. Batches are the same in both cases. With more than 5,000 images that are not kept, normalisation is computed
            from 5,000 of them.
        num_clients: Number of clients K; null: the number in the data or the partition file, else 20.
        partition: How the training set is split over the clients: by_num_classes, by_dirichlet, by_dirichlet_blocks,
            by_dirichlet_balanced, by_local_long_tail, by_shards, iid; by_client (given by the data), from_file (given by
            ``partition_file``); or the import path of your own function f(labels, num_clients, rng).
        partition_file: from_file: a JSON file, either the partition.json of a run or a mapping from clients to the indices of their
            training examples.
        imbalance_factor: Size of the smallest class divided by that of the largest, in (0, 1]; many papers give the reciprocal as IF.
        imbalance_profile: Shape of the tail: exponential, step, or none (all images are kept).
        shuffle_ranks: Assign class sizes to classes at random; otherwise class 0 is the largest.
        ranks_by_size: Rank the classes by their number of images, so the largest stays the largest; for data that are already long-tailed.
        largest_class: Training examples of the largest class of the tail (n_max), over all clients; null: as many as N examples leave for
            each of C classes, (N - (m + v) * C) / C.
        num_meta_per_class: Number m of balanced images per class that only the server holds; 0 for none.
        num_val_per_class: Number of balanced images per class for validation, taken out of the training set; 0 for none, or for the
            validation set of the data.
        local_test_fraction: Fraction of each client's examples that is held out of its training to test the model, in [0, 1); if it is not
            0, at least one example of each client that has two.
        batch_size: Training images per batch.
        test_batch_size: Test images per batch; 250 fit into the caches of a CPU, a GPU can use more.
        min_classes_per_client: by_num_classes: minimum number of classes drawn for a client.
        dirichlet_alpha: by_dirichlet, by_dirichlet_blocks, by_dirichlet_balanced: concentration; smaller values make clients differ more.
        local_imbalance_factor: by_local_long_tail: weight of a client's last-ranked class divided by that of its first.
        min_client_size: by_dirichlet, by_local_long_tail: minimum number of images of a client.
        shards_per_client: by_shards: shards per client.
        shot_rule: How classes are grouped into many, medium and few; see :func:`fedamm_pl.metrics.shot_groups`.
        shot_ranges: Rule index: group name -> first and last class (inclusive).
        augmentation: Training transform: crop_flip (random crop with padding 4 and horizontal flip), crop (only the crop) or none; null:
            crop_flip for images, none for features.
        seed: Seed of the split.

    Raises:
        ValueError: If an option is out of range or the data cannot be found; in ``setup`` if the check needs the data.
    """

    imported_options = ("partition",)

    def __init__(
        self,
        dataset: str = "fashion_mnist_mini",
        root: str = "data",
        label_column: str = ReadOptions.label_column,
        client_column: str = "",
        split_column: str = "",
        path_column: str = "",
        test_fraction: float = ReadOptions.test_fraction,
        image_size: int | tuple[int, int] | None = None,
        in_memory: bool | None = None,
        num_clients: int | None = None,
        partition: str = "by_num_classes",
        partition_file: str = "",
        imbalance_factor: float = 0.01,
        imbalance_profile: Profile = "exponential",
        shuffle_ranks: bool = False,
        ranks_by_size: bool = False,
        largest_class: int | None = None,
        num_meta_per_class: int = 10,
        num_val_per_class: int = 0,
        local_test_fraction: float = 0.0,
        batch_size: int = 64,
        test_batch_size: int = 250,
        min_classes_per_client: int = 2,
        dirichlet_alpha: float = 0.5,
        local_imbalance_factor: float = 0.1,
        min_client_size: int = 10,
        shards_per_client: int = 2,
        shot_rule: ShotRule = "share",
        shot_ranges: dict[str, tuple[int, int]] | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("test_batch_size", test_batch_size)):
            if size < 1:
                raise ValueError(f"Expected `{name}` to be 1 or more, got {size}.")
        if not 0 < imbalance_factor <= 1:
            raise ValueError(f"Expected `imbalance_factor` to be in (0, 1], got {imbalance_factor}.")
        if seed < 0:
            raise ValueError(f"Expected `seed` to be 0 or more, got {seed}.")
        require_partition(partition, partition_file)
        if shot_ranges and shot_rule != "index":
            raise ValueError(f"Expected `shot_rule` to be index for `shot_ranges`, got {shot_rule}.")
        draw_augmentation(0, torch_generator(0), augmentation or "none")  # raises an error if it is unknown
        if not 0 < test_fraction < 1:
            raise ValueError(f"Expected `test_fraction` to be between 0 and 1, got {test_fraction}.")
        if not 0 <= local_test_fraction < 1:
            raise ValueError(f"Expected `local_test_fraction` to be in [0, 1), got {local_test_fraction}.")
        if min(sizes := [image_size] if isinstance(image_size, int) else image_size or [1]) < 1 or len(sizes) > 2:
            raise ValueError(f"Expected `image_size` to be one or two numbers of 1 or more, got {image_size}.")
        self.save_hyperparameters()
        self._images: ImageData | None = None

    def __str__(self) -> str:  # Lightning's version asks each loader for its length and fails
        return f"{type(self).__name__} of {self.dataset_name}"

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name not in SET_UP}
        return {**kept, "_images": None, "trainer": None}

    def load_images(self) -> ImageData:
        """Load the data; override this to load your own.

        The data may have any form that :func:`fedamm_pl.data.sources.image_data` accepts.
        """
        names = [field.name for field in fields(ReadOptions)]
        options = ReadOptions(**{name: self.hparams[name] for name in names})
        return load_images(self.hparams["dataset"], self.hparams["root"], options)

    def prepare_data(self) -> None:
        """Download the images if they are missing."""
        self.setup()

    def setup(self, stage: str = "fit") -> None:
        """Load the images, take out the meta set, cut the tail and split the rest over the clients; only once."""
        if self._images is not None:
            return
        images = image_data(self.load_images())
        require_suited(images.train_images.shape[1:], self.hparams["augmentation"])
        if images.val_labels is not None and self.hparams["num_val_per_class"]:
            raise ValueError(
                f"Expected `num_val_per_class` to be 0 for data that bring {len(images.val_labels)} validation examples, got "
                f"{self.hparams['num_val_per_class']}."
            )
        _warn_of_unused(self.hparams)
        split = federated_split(
            images.train_labels.numpy(),
            images.class_names,
            self.hparams,
            images.clients,
            lambda: examples_hash(images),
        )
        self._split = split
        self._train, self._meta = (torch.from_numpy(part) for part in (split.train, split.meta))
        self._client_indices = [torch.from_numpy(mine) for mine in split.clients]
        published = None if self._has_own_images else NORMALIZATION.get(self.hparams["dataset"])
        self._info = describe(images, self._train, split.class_counts, self.hparams, published)
        self._images = images

    @property
    def _has_own_images(self) -> bool:
        return type(self).load_images is not FederatedDataModule.load_images

    @property
    def dataset_name(self) -> str:
        """Name of the data in a run: the option ``dataset``.

        If a subclass loads its own data and the option has its default value, it is the name of the class.
        """
        default = inspect.signature(FederatedDataModule).parameters["dataset"].default
        own = self._has_own_images and self.hparams["dataset"] == default
        return type(self).__name__ if own else str(self.hparams["dataset"])

    @property
    def images(self) -> ImageData:
        """All images, loaded on first use."""
        self.setup()
        assert self._images is not None
        return self._images

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.images.class_names)

    @property
    def in_channels(self) -> int:
        """Number of image channels (1 grey, 3 colour) or of features."""
        return self.images.train_images.shape[1]

    @property
    def augmentation(self) -> Augmentation:
        """The training transform."""
        chosen: Augmentation | None = self.hparams["augmentation"]
        return chosen or ("none" if is_features(self.images.train_images) else "crop_flip")

    def to(self, device: torch.device) -> None:
        """Keep all images that are in memory on this device, if they fit into half of its free memory."""
        images = self.images
        held = [part for part, _ in images.parts.values() if isinstance(part, Tensor)]
        needed = sum(part.nbytes for part in held)
        if device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0] // 2:
            log.warning("the examples (%d MB) stay on the CPU: they would fill the GPU", needed // 2**20)
            return
        labels_on = device if held else torch.device("cpu")
        self._images = images.with_parts(lambda part: part.to(device) if isinstance(part, Tensor) else part, labels_on)

    def client(self, client_id: int) -> ClientData:
        """Return the data of one client, 0..K - 1."""
        images = self.images
        return ClientData(
            images.train_images,
            images.train_labels,
            self._client_indices[client_id],
            self.hparams["batch_size"],
            self.augmentation,
            len(self._meta),
        )

    def meta_batch(self, seed: int) -> Batch:
        """Return the entire meta set, in fixed order, with the training transform drawn from this seed.

        Raises:
            ValueError: If ``num_meta_per_class`` is 0.
        """
        images = self.images
        self.require_meta_set()
        return augmented_batch(
            images.train_images, images.train_labels, self._meta, self.augmentation, torch_generator(seed)
        )


def _warn_of_unused(options: Mapping[str, Any]) -> None:
    """Warn of options that are set and that the partition does not use."""
    defaults = inspect.signature(FederatedDataModule).parameters
    for name, partitions in USED_BY.items():
        if options["partition"] not in partitions and options[name] != defaults[name].default:
            log.warning("%s %s is not used by partition %s", name, options[name], options["partition"])
