"""``OwnData``: the data of one client in a federation of several machines, read from the client's files."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from fedamm_pl.data.client import ClientData
from fedamm_pl.data.sources import ReadOptions, load_images
from fedamm_pl.data.sources.reading import some
from fedamm_pl.data.sources.source import is_features
from fedamm_pl.data.transforms import Augmentation


class OwnData:
    """All training examples in a client's files, with the server's numbering of the classes.

    The files may lack some classes. They need no test set, and nothing is held out. If they mark examples for
    validation or testing, the client does not train on these. Classes are matched by their names. Features are too if
    both sides know their names, as for tables, otherwise by their order.

    Args:
        options: Options of :class:`~fedamm_pl.data.datamodule.FederatedDataModule` for reading the data and for the
            batches.
        class_names: The server's classes.
        shape: The server's shape of an example, (C, H, W) or (D,).
        feature_names: The server's features; None: not known.

    Raises:
        ValueError: If the files cannot be read, or hold a class that the server does not know, other features, or
            examples of another shape.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        class_names: Sequence[str],
        shape: Sequence[int],
        feature_names: Sequence[str] | None = None,
    ) -> None:
        reading = {field.name: options[field.name] for field in fields(ReadOptions)}
        images = load_images(options["dataset"], options["root"], ReadOptions(**{**reading, "test_fraction": 0.0}))
        order = _order(feature_names, images.feature_names) if feature_names and images.feature_names else None
        if tuple(images.train_images.shape[1:]) != tuple(shape):
            raise ValueError(
                f"Expected examples of shape {tuple(shape)}, as the server has, got {tuple(images.train_images.shape[1:])}."
            )
        number = {name: place for place, name in enumerate(class_names)}
        if unknown := [name for name in images.class_names if name not in number]:
            raise ValueError(f"Expected classes that the server knows, got {some(unknown)}.")
        numbers = torch.tensor([number[name] for name in images.class_names])
        self._images, self._labels = images.train_images, numbers[images.train_labels]
        if order is not None:
            self._images = self._images[torch.arange(len(self._images))][:, order]
        self._support_size = options["num_meta_per_class"] * len(class_names)
        self._options = options

    @property
    def num_examples(self) -> int:
        """Number n of the client's examples."""
        return len(self._labels)

    def to(self, device: torch.device) -> None:
        """Keep the examples on a device, if they are in memory."""
        if isinstance(self._images, torch.Tensor):
            self._images, self._labels = self._images.to(device), self._labels.to(device)

    def client(self, client_id: int) -> ClientData:
        """Return the data, which are the same for any client id."""
        default: Augmentation = "none" if is_features(self._images) else "crop_flip"
        return ClientData(
            self._images,
            self._labels,
            torch.arange(self.num_examples),
            self._options["batch_size"],
            self._options["augmentation"] or default,
            self._support_size,
        )


def _order(wanted: Sequence[str], got: Sequence[str]) -> list[int] | None:
    """Return where each wanted feature is among a client's; None if they are in that order already."""
    missing, more = [name for name in wanted if name not in got], [name for name in got if name not in wanted]
    if missing or more:
        found = f"none called {some(missing)}" if missing else f"{some(more)} too"
        raise ValueError(f"Expected the features that the server has, got {found}.")
    return None if list(wanted) == list(got) else [got.index(name) for name in wanted]
