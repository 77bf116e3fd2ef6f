"""Class-balanced loss (Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019)."""

import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.class_prior import ClassPriorModule, Counts
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import class_balanced_weights, example_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range


class ClassBalanced(ClassPriorModule):
    """FedAvg on cross-entropy weighted by (1 - beta) / (1 - beta^n_c), normalised to a mean of 1 over the classes present.

    In the paper the weights of all classes sum to C. Here only the classes that are present count, as an absent class
    has no examples; with all classes present there is no difference. With beta = 0 it is FedAvg, bit for bit. Local
    counts stay at the client. Global counts, which the server must know, and estimated counts (see
    :class:`ClassPriorModule`) cost 8 C bytes more to each client. In a plain Trainer the counts are those in ``info``.

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
        counts: Which examples n_c counts: local (the client's own), global (all clients', known) or estimated (all clients', inferred);
            the latter two are sent with the model.
        beta: In [0, 1): how fast the value of further examples of a class decreases.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    class_weights: Tensor
    """Weight of each class during a fit, shape (C,)."""

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
        counts: Counts = "local",
        beta: float = 0.9999,
    ) -> None:
        super().__init__(
            num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho, counts
        )
        require_range("beta", beta, least=0)
        if beta >= 1:
            raise ValueError(f"Expected `beta` to be below 1, got {beta}.")
        self.register_buffer("class_weights", torch.ones(num_classes), persistent=False)

    def on_train_start(self) -> None:
        """Compute the class weights of the fit."""
        super().on_train_start()
        self.class_weights = class_balanced_weights(self.class_counts, self.hparams["beta"])

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted cross-entropy of each example."""
        return self.class_weights[labels] * example_losses(logits, labels)
