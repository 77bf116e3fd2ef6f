"""FedProx (Li et al., *Federated Optimization in Heterogeneous Networks*, MLSys 2020)."""

import torch
from torch import Tensor, nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges


class FedProx(FederatedModule):
    """FedAvg with mu / 2 times the squared distance from the global model added to the client's loss.

    With mu = 0 it is FedAvg, bit for bit. In a plain Trainer the global model is the one at the start of the fit.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour, or the number of features of a table.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: Its Nesterov momentum; 0 for none.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.
        local_optimizer: Optimizer of local training: sgd, sam or asam; the latter two follow the gradient at the worst nearby point.
        rho: Radius of the neighbourhood of sam and asam; null: 0.1 for sam, 0.7 for asam.
        mu: Weight of the proximal term.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        model: str | nn.Module = "resnet32",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        info: ImageInfo | None = None,
        local_optimizer: LocalOptimizer = "sgd",
        rho: float | None = None,
        mu: float = 0.01,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("mu", mu, least=0)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(work="client: distance from the received model per step")

    def on_train_start(self) -> None:
        """Remember the global model."""
        super().on_train_start()
        self._global = [parameter.detach().clone() for parameter in self.model.parameters()]

    def batch_loss(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the batch loss with the proximal term."""
        loss = super().batch_loss(losses, present)
        if self.hparams["mu"] == 0:
            return loss
        pairs = zip(self.model.parameters(), self._global, strict=True)
        distance = torch.stack([((now - start) ** 2).sum() for now, start in pairs]).sum()
        mu: float = self.hparams["mu"]
        return loss + mu / 2 * distance
