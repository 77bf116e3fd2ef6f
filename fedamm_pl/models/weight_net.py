"""The weight net: a small MLP that maps an example's loss to its weight (Shu et al., Meta-Weight-Net, NeurIPS 2019).

With one output for each family of classes it is the weight net of CMW-Net (Shu, Yuan, Meng, Xu, TPAMI 2023).
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightNet(nn.Module):
    """V: loss -> weight in (0, 1), an MLP 1 -> hidden -> ... -> 1 with ReLU and a final sigmoid.

    With ``num_families`` F it has F outputs on the same hidden layers, one for each family of classes. Families whose
    outputs have equal parameters get equal weights, bit for bit those of a net with that single output.

    Args:
        hidden: Width of the hidden layers.
        depth: Number of hidden layers.
        num_families: Number of outputs F.
        flat: Whether the last layer starts at 0, so that V is 1/2 everywhere.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(self, hidden: int = 100, depth: int = 1, num_families: int = 1, flat: bool = False) -> None:
        super().__init__()
        for name, size in (("hidden", hidden), ("depth", depth), ("num_families", num_families)):
            if size < 1:
                raise ValueError(f"Expected `{name}` to be 1 or more, got {size}.")
        layers: list[nn.Module] = []
        for inputs in (1, *[hidden] * (depth - 1)):
            layers += [nn.Linear(inputs, hidden), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, num_families), nn.Sigmoid())
        self.num_families = num_families
        if flat:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    @property
    def last(self) -> nn.Linear:
        """The last linear layer."""
        return cast(nn.Linear, self.layers[-2])

    def forward(self, losses: Tensor, families: Tensor | None = None) -> Tensor:
        """Map losses to weights.

        Args:
            losses: Of shape (B,).
            families: Family 0..F - 1 of each example, shape (B,); None: the first family.

        Returns:
            Weights of shape (B,).
        """
        if self.num_families == 1:
            weights: Tensor = self.layers(losses.unsqueeze(1)).squeeze(1)
            return weights
        features = self.layers[:-2](losses.unsqueeze(1))
        # each output is computed separately, with the shapes of a single-output net, so that it rounds like one
        rows = zip(self.last.weight[:, None], self.last.bias[:, None], strict=True)
        weights = torch.cat([functional.linear(features, *row).sigmoid() for row in rows], 1)
        return weights[:, 0] if families is None else weights.gather(1, families.unsqueeze(1)).squeeze(1)

    def curves(self, losses: Tensor) -> Tensor:
        """Map losses of shape (n,) to the weights of each family, shape (F, n)."""
        return torch.stack(
            [self(losses, torch.full_like(losses, family, dtype=torch.int64)) for family in range(self.num_families)]
        )
