"""Logit adjustment (Menon et al., ICLR 2021) and balanced softmax (Ren et al., NeurIPS 2020)."""

from torch import Tensor, nn

from fedamm_pl.algorithms.class_prior import ClassPriorModule, Counts, check_absent
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import Absent, logit_adjusted_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range


class LogitAdjusted(ClassPriorModule):
    """FedAvg on the cross-entropy of z_c + tau log pi_c with the class prior pi: rare classes must win by a margin.

    tau = 1 is the balanced softmax. A class without examples, which is frequent with local counts, counts as one
    example by default: its logit is lowered a little, like that of a rare class. In the formulas its prior is 0, so it
    is left out of the softmax and its logit is not lowered at all; ``absent: mask`` does this. With global counts the
    two differ only for classes that no client holds.

    With tau = 0 and ``absent: one`` it is FedAvg, bit for bit. Local counts stay at the client. Global counts, which
    the server must know, and estimated counts (see :class:`ClassPriorModule`) cost 8 C bytes more to each client. In a
    plain Trainer the counts are those in ``info``.

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
        counts: Which prior: local (the client's own), global (all clients', known) or estimated (all clients', inferred); the latter two
            are sent with the model.
        tau: Strength of the adjustment.
        absent: How a class without examples is treated: one (as if it had one example) or mask (left out of the softmax).

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
        counts: Counts = "global",
        tau: float = 1.0,
        absent: Absent = "one",
    ) -> None:
        super().__init__(
            num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho, counts
        )
        require_range("tau", tau, least=0)
        check_absent(absent)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the adjusted cross-entropy of each example."""
        return logit_adjusted_losses(logits, labels, self.class_counts, self.hparams["tau"], self.hparams["absent"])
