"""Accuracy of the global model at each client, on the examples that the client has held out of training."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.module import FederatedModule


def local_accuracies(module: FederatedModule, data: FederatedDataModule, trainer: TrainerConfig) -> list[float]:
    """Measure the accuracy of a module on the held-out examples of each client, in one pass over all of them.

    Args:
        module: The module, on the trainer's device.
        data: Provides the examples that each client has held out.
        trainer: Sets the precision.

    Returns:
        The accuracy at each client, NaN if it holds out no examples; empty if no client holds out any.
    """
    sizes = [len(mine) for mine in data.local_test]
    if not any(sizes):
        return []
    mode, hits = module.training, []
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            module.eval()
            for images, labels in data.local_test_dataloader():
                hits.append(module(images).argmax(1) == labels.to(module.device))
    finally:
        module.train(mode)
    return client_means(torch.cat(hits), sizes)


def client_means(values: Tensor, sizes: Sequence[int]) -> list[float]:
    """Return the mean of each client's values, NaN if it has none.

    Args:
        values: The values of all clients, one client after the other, shape (N,).
        sizes: Number of values of each client.

    Example:
        >>> client_means(torch.tensor([True, False, True]), [2, 0, 1])
        [0.5, nan, 1.0]
    """
    return [part.double().mean().item() for part in torch.split(values.cpu(), list(sizes))]


def over_clients(accuracies: Sequence[float]) -> dict[str, float]:
    """Return ``local/acc_mean``, ``local/acc_std`` and ``local/acc_worst_tenth``, each client counting once.

    Args:
        accuracies: The accuracy at each client; NaN are left out.

    Returns:
        Mean, standard deviation, and the mean over the worst tenth of the clients (rounded down, but at least one
        client); empty without accuracies.

    Example:
        >>> over_clients([0.5, math.nan, 1.0])
        {'local/acc_mean': 0.75, 'local/acc_std': 0.25, 'local/acc_worst_tenth': 0.5}
    """
    found = torch.tensor(sorted(value for value in accuracies if not math.isnan(value)), dtype=torch.float64)
    if not len(found):
        return {}
    worst = found[: max(1, len(found) // 10)]
    return {
        "local/acc_mean": found.mean().item(),
        "local/acc_std": found.std(correction=0).item(),
        "local/acc_worst_tenth": worst.mean().item(),
    }
