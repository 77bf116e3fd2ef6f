"""``MeasuredModule``: a LightningModule that returns logits and measures its accuracy by groups of classes."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from fedamm_pl.data.client import Batch
from fedamm_pl.losses import example_losses
from fedamm_pl.metrics import ShotAccuracy
from fedamm_pl.protocol.stored import StoredModule

CONFUSION_CLASSES = 200
"""Maximum number of classes for which a test computes a confusion matrix."""


class MeasuredModule(StoredModule):
    """A module whose ``forward`` maps images to logits, with metrics for validation and test."""

    def make_measures(self, num_classes: int, shot_groups: Mapping[str, Sequence[int]] | None) -> None:
        """Create the metrics.

        Args:
            num_classes: Number of classes C.
            shot_groups: Group of classes -> its classes; None: no groups.
        """
        self.test_accuracy = ShotAccuracy(num_classes, shot_groups)
        self.val_accuracy = ShotAccuracy(num_classes, shot_groups)
        # of the last test; its size is quadratic in the number of classes
        self.test_confusion = (
            MulticlassConfusionMatrix(num_classes, validate_args=False)
            if 2 <= num_classes <= CONFUSION_CLASSES
            else None
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch; this logs ``val/loss`` and the accuracies of :class:`ShotAccuracy`."""
        self._measure(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch; this logs ``test/loss`` and the accuracies of :class:`ShotAccuracy`.

        It also updates ``test_confusion``.
        """
        logits = self._measure(batch, "test", self.test_accuracy)
        if self.test_confusion is not None:
            self.test_confusion.update(logits.argmax(1), batch[1])

    def _measure(self, batch: Batch, stage: str, accuracy: ShotAccuracy) -> Tensor:
        images, labels = batch
        logits: Tensor = self(images)
        accuracy.update(logits, labels)
        self.log(
            f"{stage}/loss",
            example_losses(logits, labels).mean(),
            on_epoch=True,
            batch_size=len(labels),
            sync_dist=True,
        )
        return logits

    def on_test_epoch_start(self) -> None:
        """Reset the confusion matrix of an earlier test."""
        if self.test_confusion is not None:
            self.test_confusion.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation accuracies."""
        self._log_accuracy("val", self.val_accuracy)

    def on_test_epoch_end(self) -> None:
        """Log the test accuracies."""
        self._log_accuracy("test", self.test_accuracy)

    def _log_accuracy(self, stage: str, accuracy: ShotAccuracy) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in accuracy.accuracies().items()}, sync_dist=True)
        accuracy.reset()
