"""Accuracy of the clients' own models, each on test images weighted by the class proportions of the client."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedamm_pl.data.client import BatchLoader
from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.data.partitions.natural import shown_client
from fedamm_pl.federation.checkpoint import RunState
from fedamm_pl.federation.executors.base import Kept
from fedamm_pl.federation.local_test import client_means
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.terminal import line

log = logging.getLogger(__name__)


def is_personal(module: FederatedModule) -> bool:
    """Return whether a method's clients have personal logits."""
    return type(module).personal_logits is not FederatedModule.personal_logits


@dataclass(frozen=True)
class PersonalEvaluation:
    """Measures the clients' personal logits on the test set. Its features are computed once for all clients.

    A test image of class c counts n_kc / (test images of class c) for client k, as if the client had test images in the
    proportions of its training images; a class without test images is left out. Clients that have not taken part yet
    use their initial personal state. In a federation of several machines the clients would measure this themselves, so
    no bytes are counted.

    Attributes:
        module: The server's module.
        data: Provides the test set and the class counts of the clients.
        trainer: Sets the precision.
        kept: A run's state -> a function that returns the private state of a client at that time.
    """

    module: FederatedModule
    data: FederatedDataModule
    trainer: TrainerConfig
    kept: Callable[[RunState], Kept]

    def __call__(self, state: RunState) -> dict[str, float]:
        """Measure the personal logits of all clients; before and after, the module holds the deployed state.

        Returns:
            ``personal/acc``, the mean over the clients of the accuracy of their personal logits;
            ``personal/acc_global``, the same for the deployed model; ``local/acc_own``, the mean accuracy of their
            personal logits on the examples that they have held out, which is also stored for each client in the state.
            Empty if clients have no personal logits, or none could be measured.
        """
        if not is_personal(self.module):
            return {}
        module, read, mode, start = self.module, self.kept(state), self.module.training, self.module.personal_state()
        counts = torch.from_numpy(self.data.client_class_counts)
        measured, names, at_clients = [], self.data.client_names, [math.nan] * len(counts)
        try:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                module.eval()
                features, logits, labels = self._outputs(self.data.test_dataloader())
                in_general, held = class_accuracies(logits, labels), self._held_out()
                for client, own in enumerate(counts):
                    if not own.any():
                        continue
                    try:
                        module.load_personal_state({**start, **read(client)})
                        found = module.personal_logits(features, logits, own.to(module.device))
                        if held and len(held[client][2]):
                            at_clients[client] = self._own_accuracy(held[client], own)
                    except (OSError, RuntimeError, ValueError) as error:  # private state may be of any kind
                        text, name = "round %d: client %s is left out of personal/acc: %s", shown_client(client, names)
                        log.warning(text, state.round_num, name, line(str(error)))
                        continue
                    accuracies = torch.stack([class_accuracies(found, labels), in_general])
                    measured.append(expected_accuracy(accuracies, own))
        finally:
            module.load_personal_state(start)
            module.train(mode)
        if held:
            state.client_accuracies = {**state.client_accuracies, "own": at_clients}
        if not measured or not (whole := torch.stack(measured)).isfinite().any():
            return {}
        own_mean, global_mean = whole.nanmean(0).tolist()
        local = [value for value in at_clients if not math.isnan(value)]
        return {
            "personal/acc": own_mean,
            "personal/acc_global": global_mean,
            **({"local/acc_own": sum(local) / len(local)} if local else {}),
        }

    def _own_accuracy(self, held: tuple[Tensor, Tensor, Tensor], own: Tensor) -> float:
        """Return the accuracy of the client whose personal state is loaded, on the examples that it has held out."""
        features, logits, labels = held
        found = self.module.personal_logits(features, logits, own.to(self.module.device))
        return client_means(found.argmax(1) == labels, [len(labels)])[0]

    def _held_out(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return features, logits and labels of each client's held-out examples; empty if no client holds out any."""
        sizes = [len(mine) for mine in self.data.local_test]
        if not any(sizes):
            return []
        outputs = self._outputs(self.data.local_test_dataloader())
        features, logits, labels = (torch.split(part, sizes) for part in outputs)
        return list(zip(features, logits, labels, strict=True))

    def _outputs(self, loader: BatchLoader) -> tuple[Tensor, Tensor, Tensor]:
        """Return features, logits and labels of a loader's examples."""
        module, parts = self.module, []
        for images, labels in loader:
            features, logits = features_and_logits(module.model, module.prepare(images))
            parts.append((features, logits, labels.to(module.device)))
        features, logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return features, logits, labels


def class_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy on each class.

    Args:
        logits: Shape (N, C).
        labels: Shape (N,).

    Returns:
        Shape (C,), on the CPU, in float64; NaN for a class without examples.
    """
    num_classes = logits.shape[1]
    hits = labels[logits.argmax(1) == labels].bincount(minlength=num_classes)
    return hits.cpu().double() / labels.bincount(minlength=num_classes).cpu()


def expected_accuracy(accuracies: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of class accuracies, weighted by a client's class counts; classes with NaN are left out.

    Args:
        accuracies: Shape (..., C).
        counts: Shape (C,).

    Returns:
        Shape (...); NaN if no class is left.

    Example:
        >>> expected_accuracy(torch.tensor([0.5, 1.0, torch.nan]), torch.tensor([30, 10, 7]))
        tensor(0.6250)
    """
    weights = counts.to(accuracies) * ~accuracies.isnan()
    return (accuracies.nan_to_num() * weights).sum(-1) / weights.sum(-1)
