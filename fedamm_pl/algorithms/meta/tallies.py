"""Data for figures about FedAMM's weight net, computed from sums over the clients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedamm_pl.losses import normalized_weights
from fedamm_pl.models import WeightNet
from fedamm_pl.protocol.messages import State

MAX_WEIGHT = 1e9
"""Larger mean relative weights are impossible, since a batch has fewer examples."""
MAX_FAMILIES = 9
FAMILY_CURVES = tuple(f"weight_curve_{family}" for family in range(1, MAX_FAMILIES + 1))


def tallied(batches: Iterable[tuple[Tensor, Tensor, Tensor]], num_classes: int, grid: Sequence[float]) -> State:
    """Add up the weights and the losses of the batches of an epoch.

    Args:
        batches: Labels, losses and raw weights of each batch, all of shape (B,).
        num_classes: Number of classes C.
        grid: Lower edges of the loss bins.

    Returns:
        ``weights`` (C,): the sum of the relative weights B * omega_i of each class's examples, where B is the batch
        size; FedAvg's relative weights are 1. ``examples`` (C,): the number of these examples. ``losses``: the number
        of examples in each loss bin, one bin from each value of the grid on.
    """
    seen = list(batches)
    counts = torch.zeros(num_classes, dtype=torch.float64)
    tallies = {"weights": counts, "examples": counts.clone(), "losses": torch.zeros(len(grid)).double()}
    if seen:
        labels = torch.cat([batch[0] for batch in seen]).cpu()
        losses = torch.cat([batch[1] for batch in seen]).double().cpu()
        weights = torch.cat([len(raw) * normalized_weights(raw) for *_, raw in seen]).double().cpu()
        bins = torch.bucketize(losses, torch.tensor(grid[1:], dtype=torch.float64), right=True)
        tallies["weights"].index_add_(0, labels, weights)
        tallies["examples"] += labels.bincount(minlength=len(counts))
        tallies["losses"] += bins.bincount(minlength=len(grid))
    return tallies


def described(weight_net: WeightNet, tallies: State, grid: Sequence[float]) -> dict[str, list[float | None]]:
    """Describe a weight net by its curve and by the weights that it gave.

    Args:
        weight_net: V.
        tallies: The sums of the clients' :func:`tallied`; may be empty.
        grid: Losses at which V is shown.

    Returns:
        ``weight_curve``: V at each loss of the grid; with families ``weight_curve_1``, ... in its place, beginning with
        the smallest classes. ``weight_per_class``: the mean of B * omega_i over the examples of a class, 1 in FedAvg;
        None for a class without examples, or with an impossible mean. ``loss_histogram``: the share of the examples in
        each loss bin. The last two are left out without tallies.
    """
    with torch.no_grad():
        found = weight_net.curves(torch.tensor(grid).to(next(weight_net.parameters()))).tolist()
    curves = {"weight_curve": found[0]} if len(found) == 1 else dict(zip(FAMILY_CURVES, found, strict=False))
    if not tallies:
        return curves
    means = (tallies["weights"] / tallies["examples"]).tolist()
    losses = tallies["losses"].clamp(min=0)  # the values that clients send are not trusted
    return {
        **curves,
        "weight_per_class": [mean if 0 <= mean <= MAX_WEIGHT else None for mean in means],
        "loss_histogram": (losses / losses.sum().clamp(min=1)).tolist(),
    }
