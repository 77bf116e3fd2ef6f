"""FedFocal: focal loss (Lin et al., ICCV 2017) at the clients (Sarkar et al., *Fed-Focal Loss*, 2020)."""

from torch import Tensor, nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import focal_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.module import FederatedModule


class FedFocal(FederatedModule):
    """FedAvg with the loss -(1 - p)^gamma log p: examples that are already classified correctly count less. With gamma = 0 it is FedAvg.

    The client sampling that Sarkar et al. add is left out.

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
        gamma: Exponent of the focal loss.

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
        gamma: float = 2.0,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("gamma", gamma, least=0)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the focal loss of each example."""
        return focal_losses(logits, labels, self.hparams["gamma"])
