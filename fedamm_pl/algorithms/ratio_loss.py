"""Ratio Loss (Wang, Xu, Wang, Zhu, *Addressing Class Imbalance in Federated Learning*, AAAI 2021)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ServerSession


def class_ratios(features: Tensor, logits: Tensor, labels: Tensor, max_ratio: float) -> Tensor:
    """Estimate from gradients on balanced data how much each class is under-represented in the training of the model.

    G^j is the gradient of the mean cross-entropy of class j's images with respect to the last layer's weights. Each
    gradient is summed over a row of weights. The ratio of class p compares, for the row of output p, the gradient of
    class p itself with the mean gradient of the other classes: ``R_p = |sum_i G^p_pi| / |mean_(j != p) sum_i G^j_pi|``.
    A class that the model neglects has a large ratio. Ratios are bounded, also where the denominator is 0.

    Args:
        features: Inputs of the last layer, shape (N, D).
        logits: Outputs of the last layer, shape (N, C).
        labels: Classes of shape (N,), each class at least once.
        max_ratio: Upper bound on the ratios.

    Returns:
        Ratios of shape (C,), in [0, max_ratio].
    """
    num_classes = logits.shape[1]
    members = nn.functional.one_hot(labels, num_classes).to(logits.dtype)  # (N, C)
    slopes = (logits.softmax(1) - members) * features.sum(1, keepdim=True)  # (N, C): summed over a row's weights
    sums = members.T @ slopes / members.sum(0)[:, None]  # (C, C): class of the images, row of the weights
    own = sums.diagonal()
    others = (sums.sum(0) - own) / (num_classes - 1)
    return (own.abs() / others.abs()).nan_to_num(max_ratio, max_ratio).clamp(max=max_ratio)


class RatioLoss(FederatedModule):
    """FedAvg on cross-entropy weighted by alpha + beta R_c, with R_c from the server's balanced meta set; see :func:`class_ratios`.

    The server computes the ratios of the global model before each round, in evaluation mode, and sends them with the
    model: C numbers more. Like FedAMM, it uses labelled images that plain FedAvg does not have. With alpha = 1 and beta
    = 0 it is FedAvg, bit for bit. In a plain Trainer there is no server, and it is FedAvg.

    The published formula divides weight by weight, which fails where a gradient vanishes; here, as in the authors'
    program, sums over weights are divided. Differences from that program: (1) The sums are over the whole row of a
    class. The authors sum only over selected weights of it, those where the change of the class is the largest and the
    changes of all other classes are below 0.8 of it. (2) The gradients are exact gradients of the received model in
    evaluation mode. The authors use the changes of the weights in a training on the class's images. (3) The bound is
    10. The authors' bound is 5000 (and 10 where the denominator is 0), with which training can diverge. (4) The monitor
    of the paper, which estimates the class counts of a round and switches the loss on when they change, is not
    implemented: the loss is used in all rounds.

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
        alpha: Weight of every class.
        beta: Weight of the ratio.
        max_ratio: Upper bound on the ratio.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    uses_meta_set = True
    uses_features = True

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
        alpha: float = 1.0,
        beta: float = 0.1,
        max_ratio: float = 10.0,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("alpha", alpha, least=0)
        require_range("beta", beta, least=0)
        require_range("max_ratio", max_ratio, above=0)
        self.register_buffer("class_weights", torch.ones(num_classes), persistent=False)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return replace(super().privileges, work="server: a pass over its images per round")

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model and its class ratios."""
        self.load_shared_state(state)
        images, labels = server.meta(0)
        self.eval()
        with torch.no_grad():
            features, logits = features_and_logits(self.model, self.prepare(images))
        ratios = class_ratios(features, logits, labels.to(logits.device), self.hparams["max_ratio"])
        return {**super().broadcast(state, server), "ratios": ratios}

    def on_train_start(self) -> None:
        """Set the class weights of the round."""
        super().on_train_start()
        self.class_weights = torch.ones(self.hparams["num_classes"], device=self.device)
        if self.session is not None:
            ratios = self.session.payload["ratios"].to(self.device)
            self.class_weights = self.hparams["alpha"] + self.hparams["beta"] * ratios

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted cross-entropy of each example."""
        return self.class_weights[labels] * example_losses(logits, labels)
