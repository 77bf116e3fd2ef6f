"""FedLC (Zhang et al., *Federated Learning with Label Distribution Skew via Logits Calibration*, ICML 2022)."""

from torch import Tensor, nn

from fedamm_pl.algorithms.class_prior import ClassPriorModule, check_absent
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import Absent, calibrated_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range


class FedLC(ClassPriorModule):
    """FedAvg on the cross-entropy of z_c - tau n_c^(-1/4), where n_c is the client's number of examples of class c.

    The fewer examples a class has, the larger the margin by which its logit must exceed the others. A class that the
    client does not hold would have an infinite margin, so it is left out of the softmax. The client then does not lower
    its logit, which is the purpose of the method. With ``absent: one`` the class counts as one example instead, and its
    logit is lowered almost like that of any rare class.

    Nothing extra is sent; the counts stay at the client. With tau = 0 and ``absent: one`` it is FedAvg, bit for bit;
    with tau = 0 and ``absent: mask`` it is FedAvg on the softmax over the client's own classes, where a client with a
    single class has a loss of 0 and learns nothing. In a plain Trainer the counts are those in ``info``.

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
        tau: Strength of the calibration.
        absent: How a class without local examples is treated: mask (left out of the softmax) or one (as if it had one example).

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
        absent: Absent = "mask",
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("tau", tau, least=0)
        check_absent(absent)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the calibrated cross-entropy of each example."""
        return calibrated_losses(logits, labels, self.class_counts, self.hparams["tau"], self.hparams["absent"])
