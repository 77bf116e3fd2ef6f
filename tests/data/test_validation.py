"""The validation set and the local tests of the data module, also as a plain Trainer sees them."""

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import EarlyStopping

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.data import FederatedDataModule, ImageData
from fedamm_pl.federation.trainer import quiet
from tests.federation.small import CPU, make
from tests.tiny import TinyData, tiny_data

PARTITIONS = ("by_num_classes", "by_dirichlet", "by_shards", "iid")


class WithValidation(TinyData):
    """Brings a validation part of its own: the test images from the last to the first."""

    def load_images(self) -> ImageData:
        images = super().load_images()
        part = {"val_images": images.test_images[torch.arange(79, -1, -1)], "val_labels": images.test_labels.flip(0)}
        return ImageData(
            images.train_images, images.train_labels, images.test_images, images.test_labels, images.class_names, **part
        )


def plain_trainer(**options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, **{**quiet, **options})


@pytest.mark.parametrize("partition", PARTITIONS)
def test_all_sets_are_disjoint_and_the_same_for_every_method(partition: str) -> None:
    options = {"num_val_per_class": 3, "local_test_fraction": 0.25, "partition": partition, "min_client_size": 2}
    first, second = tiny_data(**options), tiny_data(**options, batch_size=7, test_batch_size=9)
    for data in (first, second):
        make(FedAvg if data is first else FedAMM, data)
    clients = [first.client(client).indices for client in range(4)]
    sets = [*clients, *first.local_test, first.validation[2], first._meta]
    everything = torch.cat(sets).tolist()
    assert len(set(everything)) == len(everything)
    assert first.images.train_labels[first.validation[2]].bincount().tolist() == [3] * 4
    again = [*(second.client(c).indices for c in range(4)), *second.local_test, second.validation[2], second._meta]
    assert all(torch.equal(one, other) for one, other in zip(sets, again, strict=True))
    assert not torch.equal(first.validation[2], tiny_data(**options, seed=1).validation[2])


def test_counts_are_of_what_is_trained_on() -> None:
    data = tiny_data(local_test_fraction=0.25, partition="iid")
    whole = tiny_data(partition="iid")
    assert data.client_class_counts.sum(0).tolist() == data.info["class_counts"]
    assert sum(data.info["class_counts"]) == sum(data.client_size(client) for client in range(4))
    held = np.concatenate([mine.numpy() for mine in data.local_test])
    counts = np.bincount(data.images.train_labels.numpy()[held], minlength=4)
    assert (np.array(data.info["class_counts"]) + counts).tolist() == whole.info["class_counts"]
    assert data.unused_images == whole.unused_images == 0


def test_without_the_options_there_is_neither() -> None:
    data = tiny_data()
    assert not data.has_validation
    assert data.local_test == []
    assert len(data.validation[2]) == 0


def test_the_batches_are_the_examples_in_order() -> None:
    data = tiny_data(num_val_per_class=5, local_test_fraction=0.3, test_batch_size=7)
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert torch.equal(images, data.images.train_images[data.validation[2]])
    assert labels.tolist() == [label for label in range(4) for _ in range(5)]
    images, labels = (torch.cat(parts) for parts in zip(*data.local_test_dataloader(), strict=True))
    assert torch.equal(images, data.images.train_images[torch.cat(data.local_test)])
    assert torch.equal(labels, data.images.train_labels[torch.cat(data.local_test)])


def test_data_may_bring_their_validation_set() -> None:
    data = WithValidation("tiny", num_clients=4, num_meta_per_class=2, imbalance_factor=0.2)
    data.setup()
    assert data.has_validation
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert torch.equal(images, data.images.test_images[torch.arange(79, -1, -1)])
    assert torch.equal(labels, data.images.test_labels.flip(0))
    again = WithValidation("tiny", num_clients=4, num_meta_per_class=2, imbalance_factor=0.2, num_val_per_class=3)
    with pytest.raises(
        ValueError, match="Expected `num_val_per_class` to be 0 for data that bring 80 validation examples, got 3"
    ):
        again.setup()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `local_test_fraction` to be in \[0, 1\), got"):
        FederatedDataModule(local_test_fraction=fraction)


# A plain Trainer


def test_a_fit_validates_as_usual_and_stops_early() -> None:
    data = tiny_data(num_val_per_class=5)
    module = make(FedAvg, data, lr=0.05)
    stopping = EarlyStopping(monitor="val/acc", mode="max", patience=2)
    trainer = plain_trainer(max_epochs=50, callbacks=[stopping])
    trainer.fit(module, datamodule=data)
    assert stopping.stopped_epoch > 0
    assert float(trainer.callback_metrics["val/acc"]) <= float(stopping.best_score)
    assert {"val/loss", "val/acc", "val/acc_many", "val/acc_class_0"} <= set(trainer.callback_metrics)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    with torch.no_grad():
        assert found["val/acc"] == pytest.approx((module.eval()(images).argmax(1) == labels).float().mean().item())


def test_without_a_validation_set_a_fit_goes_without_and_to_validate_is_refused() -> None:
    data = tiny_data()
    module = make(FedAvg, data)
    trainer = plain_trainer(max_epochs=1)
    with pytest.warns(UserWarning, match="have no `val_dataloader`"):
        trainer.fit(module, datamodule=data)
    assert not any(name.startswith("val/") for name in trainer.callback_metrics)
    with pytest.raises(MisconfigurationException, match="`val_dataloader`"):
        plain_trainer().validate(module, datamodule=data)


def test_the_trainers_of_a_federation_take_no_notice() -> None:
    data = tiny_data(num_val_per_class=5)
    module = make(FedAvg, data)
    trainer = CPU.build(max_epochs=1)
    with quiet():
        trainer.fit(module, data.client(0).train_loader(0))
    assert not any(name.startswith("val/") for name in trainer.callback_metrics)
