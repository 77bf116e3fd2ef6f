"""Figures: data in, matplotlib Figure out. Nothing here opens a window or touches matplotlib's global state."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import nn


def weight_curves(weight_nets: Mapping[str, Sequence[nn.Module]], largest_loss: float = 10.0) -> Figure:
    """Draw the learned mapping loss -> weight V(loss), a line with a band of the range over seeds for each label.

    Args:
        weight_nets: Label -> weight nets, one a seed.
        largest_loss: Right end of the axis, in nats of cross-entropy.

    Returns:
        A figure of 5 x 3.2 inches.
    """
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    losses = torch.linspace(0, largest_loss, 200)
    styles = ["-", "--", ":", "-."]
    for index, (label, nets) in enumerate(weight_nets.items()):
        with torch.no_grad():
            curves = torch.stack([net(losses.to(next(net.parameters()))).float().cpu() for net in nets])
        (line,) = axes.plot(losses, curves.mean(0), styles[index % len(styles)], color=f"C{index}", label=label)
        axes.fill_between(losses, curves.min(0).values, curves.max(0).values, color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="cross-entropy of the example (nats)", ylabel="weight V(loss), unnormalised", ylim=(0, 1))
    axes.set_xlim(0, largest_loss)
    axes.grid(alpha=0.3)
    if len(weight_nets) > 1:
        axes.legend(frameon=False)
    return figure
