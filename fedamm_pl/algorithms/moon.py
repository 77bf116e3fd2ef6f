"""MOON (Li, He, Song, *Model-Contrastive Federated Learning*, CVPR 2021)."""

import torch
from torch import Tensor, nn

from fedamm_pl.data.client import Batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import contrastive_losses
from fedamm_pl.models import deep_copy, features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges


class ProjectionHead(nn.Module):
    """Two layers that compute the projections that MOON compares, and a classifier that takes the projections.

    Args:
        in_features: Size D of the features.
        projection: Size P of the projections.
        num_classes: Number of classes C.
    """

    def __init__(self, in_features: int, projection: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_features, in_features)
        self.projection = nn.Linear(in_features, projection)
        self.classifier = nn.Linear(projection, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, C)."""
        logits: Tensor = self.classifier(self.projection(self.hidden(features).relu()))
        return logits


class Moon(FederatedModule):
    """FedAvg with a term that pulls a client's features towards those of the global model and away from those of its previous model.

    As in the paper, MOON compares the outputs of a projection head, Linear(D, D), ReLU, Linear(D, P), which are also
    the inputs of the classifier. The network's last layer is replaced by a :class:`ProjectionHead`, so the model that
    is exchanged is larger by D (D + 1) + P (D + 1) + C (P - D) numbers. ``projection: null`` leaves the network
    unchanged and compares the inputs of its last linear layer; these come out of a ReLU, so their cosines are all near
    1.

    A client that takes part for the first time has no previous model and trains as in FedAvg. In the paper the initial
    network is used instead. In the first round this is the global model itself, and the term has no gradient, so the
    difference affects only clients that join later. With mu = 0 it is FedAvg, bit for bit, of the network with or
    without that head.

    A client keeps its previous model to itself: one more model in memory for each client that has taken part. The
    global and the previous model run in evaluation mode, and a step costs two more forward passes. In a plain Trainer
    there is no previous model, and it is FedAvg.

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
        mu: Weight of the contrastive term.
        temperature: Temperature of the contrastive term.
        projection: Output size P of the projection head; null: no projection head.

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
        mu: float = 1.0,
        temperature: float = 0.5,
        projection: int | None = 256,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("mu", mu, least=0)
        require_range("temperature", temperature, above=0)
        if projection is not None:
            require_range("projection", projection, least=1)
            self.replace_classifier(
                lambda layer: ProjectionHead(layer.in_features, projection, num_classes).to(layer.weight)
            )

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            client_state="its last model",
            work="client: two more forward passes per step, of the global model and its last model",
        )

    def on_train_start(self) -> None:
        """Set up the global and the previous model."""
        super().on_train_start()
        self._compared: list[nn.Module] = []  # in a list, so that they stay out of the state_dict
        if self.session is not None and self.session.kept and self.hparams["mu"] > 0:
            previous = deep_copy(self.model)
            previous.load_state_dict({name.removeprefix("model."): value for name, value in self.session.kept.items()})
            self._compared = [deep_copy(self.model).eval(), previous.eval()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the batch loss with the contrastive term."""
        if not self._compared:
            return super().training_step(batch, batch_idx)
        images, labels = self.prepare(batch[0]), batch[1]
        features, logits = features_and_logits(self.model, images)
        with torch.no_grad():
            near, far = (features_and_logits(model, images)[0] for model in self._compared)
        losses = self.objective_of(logits, labels)
        contrast = contrastive_losses(features, near, far, self.hparams["temperature"])
        self.track(len(labels), loss=losses.sum(), contrast=contrast.sum())
        mu: float = self.hparams["mu"]
        return losses.mean() + mu * contrast.mean()

    def client_payload(self) -> dict[str, Tensor]:
        """Return the trained model, and keep it as the client's previous model."""
        payload = super().client_payload()
        if self.session is not None:
            self.session.kept = payload
        return payload
