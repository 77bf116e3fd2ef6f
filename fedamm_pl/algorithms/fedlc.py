"""FedLC (Zhang et al., *Federated Learning with Label Distribution Skew via Logits Calibration*, ICML 2022)."""

from torch import Tensor, nn

from fedamm_pl.algorithms.class_prior import ClassPriorModule
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import calibrated_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range


class FedLC(ClassPriorModule):
    """FedAvg on the cross-entropy of z_c - tau n_c^(-1/4), n_c the client's own examples of the class.

    With tau = 0 it is FedAvg. A class without examples counts as one example.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: Its momentum, Nesterov's unless 0.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.
        local_optimizer: Of local training: sgd, or sam or asam, which follow the gradient at a worst point nearby.
        rho: How near that is; null: 0.1 for sam, 0.7 for asam.
        tau: Strength of the calibration.

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
        tau: float = 1.0,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("tau", tau, least=0)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the calibrated cross-entropy of each example."""
        return calibrated_losses(logits, labels, self.class_counts, self.hparams["tau"])
