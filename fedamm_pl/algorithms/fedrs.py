"""FedRS (Li, Zhan, *FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data*, KDD 2021)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.class_prior import ClassPriorModule
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range

Scaling = Literal["missing", "frequency"]


def restricted_scales(counts: Tensor, alpha: float, scaling: Scaling) -> Tensor:
    """Return the factors of the logits: less than 1 for classes that a client lacks, or has few examples of.

    Args:
        counts: Examples n_c of each class, shape (C,).
        alpha: The scale of a class without examples.
        scaling: missing: 1 for every other class; frequency: ``alpha + (1 - alpha) n_c / max_j n_j``.

    Returns:
        Scales of shape (C,).

    Example:
        >>> counts = torch.tensor([4, 1, 0])
        >>> restricted_scales(counts, 0.5, "missing"), restricted_scales(counts, 0.5, "frequency")
        (tensor([1.0000, 1.0000, 0.5000]), tensor([1.0000, 0.6250, 0.5000]))
    """
    share = (counts > 0).float() if scaling == "missing" else counts / counts.max().clamp(min=1)
    return alpha + (1 - alpha) * share


class FedRS(ClassPriorModule):
    """FedAvg on the cross-entropy of s_c z_c, with s_c = alpha below 1 for classes that the client lacks.

    A smaller logit has a smaller gradient, so a client without examples of a class hardly changes the row of that class
    in the classifier. The whole logit is scaled, including its bias (the paper's layer has none); the model is
    evaluated without scales. ``scaling: missing`` is that of the paper; the authors' program lets the scales depend on
    the class frequencies, which is ``scaling: frequency``.

    Nothing extra is sent; the counts stay at the client. With alpha = 1 it is FedAvg, bit for bit; with ``missing``, so
    is the training of a client that holds all classes. In a plain Trainer the counts are those in ``info``.

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
        alpha: Scale of the logit of a class without local examples, in [0, 1].
        scaling: missing (all other classes have scale 1) or frequency (the fewer local examples, the closer to alpha).

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    scales: Tensor
    """Scale of the logit of each class during a fit, shape (C,)."""

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
        alpha: float = 0.5,
        scaling: Scaling = "missing",
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("alpha", alpha, least=0)
        if alpha > 1:
            raise ValueError(f"Expected `alpha` to be 1 or less, got {alpha}.")
        if scaling not in get_args(Scaling):
            raise ValueError(f"Expected `scaling` to be missing or frequency, got {scaling!r}.")
        self.register_buffer("scales", torch.ones(num_classes), persistent=False)

    def on_train_start(self) -> None:
        """Compute the scales of the fit."""
        super().on_train_start()
        self.scales = restricted_scales(self.class_counts, self.hparams["alpha"], self.hparams["scaling"])

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the scaled logits of each example."""
        return example_losses(self.scales * logits, labels)
