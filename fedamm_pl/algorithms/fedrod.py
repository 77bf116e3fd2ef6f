"""FedRoD (Chen, Chao, *On Bridging Generic and Personalized Federated Learning for Image Classification*, ICLR 2022)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms.class_prior import ClassPriorModule, check_absent
from fedamm_pl.data.client import Batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import Absent, example_losses, logit_adjusted_losses
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.privileges import NOTHING, Privileges

Head = Literal["linear", "hypernetwork"]


class Hypernetwork(nn.Module):
    """Computes the weights of a client's own head from its class shares: ``Linear(C, D), ReLU, Linear(D, C D)``.

    Its last layer starts at 0, and so does every head.

    Args:
        num_classes: Number of classes C.
        size: Size D of the features.
    """

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_classes, size)
        self.weights = zeroed(nn.Linear(size, num_classes * size))

    def forward(self, shares: Tensor) -> Tensor:
        """Map class shares (C,) to weights (C, D)."""
        weights: Tensor = self.weights(self.hidden(shares).relu())
        return weights.view(len(shares), -1)


class FedRoD(ClassPriorModule):
    """FedAvg with the balanced softmax of local class counts, and in addition a personal head on top of the logits.

    The shared model minimises the cross-entropy of z_c + gamma log n_kc. With the same ``absent`` this is
    ``LogitAdjusted`` with local counts, bit for bit, since the personal loss does not reach the shared model. With
    gamma = 0 and ``absent: one`` it is FedAvg. The client's own logits are ``q = stop(g) + H_k stop(z)``, where g are
    the shared logits and z the features. They are trained by plain cross-entropy in the same steps, without momentum.
    H_k starts at 0, so q starts equal to g.

    ``test/acc`` is the accuracy of the shared model. ``personal/acc`` in the rows of a run is the accuracy of q, with
    test images weighted by the client's own class counts, averaged over the clients; ``personal/acc_global`` is that of
    g with the same weights. They cost a pass over the test set at each evaluation, and C (D + 1) products per client
    and image.

    A linear head stays at the client, which keeps C (D + 1) numbers between its rounds; nothing extra is sent. A
    hypernetwork computes the head from the client's class shares and is averaged with the model: C D^2 + 2 C D + D more
    numbers are sent in each direction, and nothing is kept. In a plain Trainer it is the balanced softmax with the
    counts in ``info``, and a head is trained alongside.

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
        gamma: Strength of the adjustment.
        absent: How a class without examples is treated: mask (left out of the softmax) or one (as if it had one example).
        head: The personal head: linear (kept at the client) or hypernetwork (computed from class shares).

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    uses_features = True

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
        gamma: float = 1.0,
        absent: Absent = "mask",
        head: Head = "linear",
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("gamma", gamma, least=0)
        check_absent(absent)
        if head not in ("linear", "hypernetwork"):
            raise ValueError(f"Expected `head` to be linear or hypernetwork, got {head!r}.")
        layer = self.model.get_submodule(self.classifier_name())
        assert isinstance(layer, nn.Linear)
        self.own: nn.Linear | Hypernetwork
        if head == "linear":
            self.own, self.personal = zeroed(nn.Linear(layer.in_features, num_classes)), ("own.",)
        else:
            self.own, self.shared = Hypernetwork(num_classes, layer.in_features), ("model.", "own.")

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        linear = self.hparams["head"] == "linear"
        return Privileges(
            revealed=NOTHING if linear else "a trained hypernetwork",
            client_state="its own head" if linear else NOTHING,
            work="client: its own head at each step",
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the sum of the losses of the shared model and of the client's own head."""
        labels = batch[1]
        features, logits = features_and_logits(self.model, self.prepare(batch[0]))
        losses = self.objective_of(logits, labels)
        own = self.personal_logits(features.detach(), logits.detach(), self.class_counts)
        own_losses = example_losses(own, labels)
        self.track(len(labels), loss=losses.sum(), personal_loss=own_losses.sum())
        return self.batch_loss(losses) + own_losses.mean()

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the balanced softmax loss of each example."""
        return logit_adjusted_losses(logits, labels, self.class_counts, self.hparams["gamma"], self.hparams["absent"])

    def configure_optimizers(self) -> Any:
        """Return the local optimizer, without momentum for the parameters of the client's own head."""
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": list(self.own.parameters()), "momentum": 0.0, "nesterov": False})
        return optimizer

    def personal_logits(self, features: Tensor, logits: Tensor, class_counts: Tensor) -> Tensor:
        """Return q: the shared logits plus the output of the client's own head."""
        if isinstance(self.own, nn.Linear):
            added: Tensor = self.own(features)
        else:
            shares = (class_counts / class_counts.sum()).to(features.dtype)
            added = functional.linear(features, self.own(shares))
        return logits + added


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Set the weights and the bias of a layer to 0, and return it."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer
