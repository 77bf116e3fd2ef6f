"""FedETF (Li et al., *No Fear of Classifier Biases*, ICCV 2023), without its personalisation."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms.class_prior import ClassPriorModule
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import logit_adjusted_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range


class ETFHead(nn.Module):
    """Scaled cosines between a learned projection of the features and the fixed corners of a simplex, one per class.

    The corners are the columns of ``sqrt(C / (C - 1)) (I - 1/C)`` (a simplex equiangular tight frame). They have length
    1, and the cosine between any two is -1 / (C - 1). They are not rotated at random, because the projection can learn
    any rotation.

    Args:
        in_features: Size D of the features.
        num_classes: Number of classes C, which is also the size of the projection.
        scale: Initial value of the learned scale of the cosines.
    """

    corners: Tensor

    def __init__(self, in_features: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.projection = nn.Linear(in_features, num_classes)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        corners = (num_classes / (num_classes - 1)) ** 0.5 * (torch.eye(num_classes) - 1 / num_classes)
        self.register_buffer("corners", corners, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, C)."""
        return self.scale * functional.normalize(self.projection(features)) @ self.corners


class FedETF(ClassPriorModule):
    """FedAvg with a fixed simplex classifier on normalised features, trained with the balanced softmax of local class counts.

    The network's last linear layer is replaced by an :class:`ETFHead`, so the classifiers of different clients cannot
    drift apart. As in the authors' program, a class that a client does not hold counts as one example, and weight decay
    also acts on the learned scale. The authors' scale starts at 10 in their default network for CIFAR-10, which is the
    default here, and at 1 in most of their other networks. Two parts are left out: a random rotation of the corners,
    which the projection can learn, and the personal fine-tuning, which alternates between projection and prototypes. No
    setting makes it equal to FedAvg. Only the model is sent; the counts stay at the client, and in a plain Trainer they
    are those in ``info``.

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
        scale: Initial value of the learned scale of the cosines.

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
        scale: float = 10.0,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("scale", scale, above=0)
        self.replace_classifier(lambda layer: ETFHead(layer.in_features, num_classes, scale))

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the balanced softmax loss of each example."""
        return logit_adjusted_losses(logits, labels, self.class_counts, 1.0)
