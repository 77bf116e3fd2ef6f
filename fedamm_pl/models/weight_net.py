"""The weight net: a small MLP from an example's loss to its weight (Shu et al., Meta-Weight-Net, NeurIPS 2019)."""

from torch import Tensor, nn


class WeightNet(nn.Module):
    """V: loss -> weight in (0, 1), an MLP 1 -> hidden -> 1 with ReLU and a final sigmoid.

    Args:
        hidden: Width of the hidden layer.
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        """Map losses of shape (B,) to weights of shape (B,)."""
        weights: Tensor = self.layers(losses.unsqueeze(1)).squeeze(1)
        return weights
