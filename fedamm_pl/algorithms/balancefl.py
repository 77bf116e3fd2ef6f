"""BalanceFL (Shuai et al., *BalanceFL: Addressing Class Imbalance in Long-Tail Federated Learning*, IPSN 2022)."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from fedamm_pl.data.client import Batch, ClientData
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.models import deep_copy, features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ClientSession
from fedamm_pl.seeding import derive_seed, torch_generator

AbsentFrom = Literal["batch", "client"]


def pooled_covariance(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the within-class covariance of features, weighted by class size, and the class counts.

    The covariance is ``sum_c n_c Cov_c / n``, where Cov_c is the sample covariance of class c (n_c - 1 in the
    denominator), or 0 for a class with one example.

    Args:
        batches: Batches of features (B, D) and labels (B,).
        num_classes: Number of classes C.

    Returns:
        A covariance of shape (D, D) and counts of shape (C,), float64 on the CPU.
    """
    found = [(features.cpu().double(), labels.cpu()) for features, labels in batches]
    features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    counts = labels.bincount(minlength=num_classes).double()
    means = features.new_zeros(num_classes, features.shape[1]).index_add(0, labels, features)
    centred = features - (means / counts.clamp(min=1)[:, None])[labels]
    weights = counts / (counts - 1).clamp(min=1)
    return (weights[labels, None] * centred).T @ centred / len(labels), counts


def square_root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance (D, D): standard normal draws times it have this covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def balanced_losses(
    logits: Tensor, noisy: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three loss terms of BalanceFL for each example.

    Args:
        logits: Logits of the features without noise, shape (B, C).
        noisy: Logits of the features with noise, shape (B, C).
        teacher: Logits of the received model, shape (B, C).
        labels: Classes of shape (B,), all of them present.
        present: Which classes are present, shape (C,).
        temperature: Temperature T of the distillation.

    Returns:
        Three tensors of shape (B,): the cross-entropy of ``noisy`` over the present classes; the distillation loss
        ``-sum_c softmax(teacher / T)_c log softmax(logits / T)_c`` over the other classes, 0 if there are none; and the
        entropy of ``softmax(logits)`` over the present classes.
    """
    least = torch.finfo(logits.dtype).min  # finite, so that 0 times it is 0
    entropies = logits.masked_fill(~present, least).log_softmax(1)
    known = teacher.masked_fill(present, least).div(temperature).softmax(1)
    learned = logits.masked_fill(present, least).div(temperature).log_softmax(1)
    return (
        example_losses(noisy.masked_fill(~present, least), labels),
        -(known * learned).sum(1).where(~present.all(), 0),
        -(entropies.exp() * entropies).sum(1),
    )


class BalanceFL(FederatedModule):
    """FedAvg whose clients train as if they had the same number of examples of each class.

    Four measures achieve this. A client draws the n_k examples of an epoch with replacement, each of its classes with
    the same probability. With probability 1 - n_kc / max_j n_kj, noise is added to the features of an example of class
    c; it has the within-class covariance of the features under the received model. The cross-entropy is computed only
    over the classes of the batch, or of the client; for the other classes the received model is the teacher. Finally,
    the entropy of the predictions over the former classes is increased; it is summed over the batch, so its weight
    grows with the batch size.

    With entropy_weight = 0 it equals FedAvg on balanced draws, if each client holds the same number of examples of each
    class and each batch has all classes. Nothing extra is sent or kept. A round costs one more pass over the examples,
    and each step costs a forward pass of the received model. In a plain Trainer, where nothing has been received, it is
    FedAvg.

    Differences from the authors' program: the received model runs in evaluation mode, also to measure the covariance of
    the noise; and the noise is drawn anew at each step instead of using 500 draws in turn.

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
        absent: Classes for which the received model is the teacher: batch (those not in the batch) or client (those that the client
            lacks).
        kd_weight: Weight of the distillation.
        temperature: Temperature of the distillation.
        entropy_weight: Weight of the entropy, summed over the batch.
        feature_noise: Whether noise is added to the features of rare classes.

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
        absent: AbsentFrom = "batch",
        kd_weight: float = 1.0,
        temperature: float = 2.0,
        entropy_weight: float = 0.002,
        feature_noise: bool = True,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        if absent not in ("batch", "client"):
            raise ValueError(f"Expected `absent` to be batch or client, got {absent!r}.")
        require_range("kd_weight", kd_weight, least=0)
        require_range("temperature", temperature, above=0)
        require_range("entropy_weight", entropy_weight, least=0)
        self._classifier = self.classifier_name()

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            work="client: a forward pass of the received model per step, a pass over its examples per round"
        )

    def survey(self, session: ClientSession) -> State:
        """Measure the covariance of the features for the client's own use; nothing is sent."""
        self._noise = None
        if self.hparams["feature_noise"]:
            batches = session.data.plain_batches()
            features = (
                (features_and_logits(self.model, self.prepare(images))[0], labels) for images, labels in batches
            )
            covariance, counts = pooled_covariance(features, self.hparams["num_classes"])
            self._noise = square_root(covariance).float(), (1 - counts / counts.max()).float()
        return {}

    def local_data(self, session: ClientSession) -> ClientData:
        """Return the client's data with class-balanced sampling."""
        return dataclasses.replace(session.data, balanced=True)

    def on_train_start(self) -> None:
        """Set up the received model as the teacher."""
        super().on_train_start()
        self._teacher: list[nn.Module] = []  # in a list, so that it stays out of the state_dict
        if self.session is not None:
            self._teacher = [deep_copy(self.model).eval()]
            self._held = self.session.data.class_counts(self.hparams["num_classes"]).to(self.device) > 0
            self._step = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the batch loss with its three terms."""
        if not self._teacher:
            return super().training_step(batch, batch_idx)
        images, labels = self.prepare(batch[0]), batch[1].to(self.device)
        features, logits = features_and_logits(self.model, images)
        noisy = logits
        if self._noise is not None:
            layer = self.model.get_submodule(self._classifier)
            noisy = layer(features + self._eps(labels, features))
        with torch.no_grad():
            (network,) = self._teacher
            _, teacher = features_and_logits(network, images)
        present = self._held
        if self.hparams["absent"] == "batch":
            present = torch.zeros_like(present).index_fill(0, labels, True)
        losses, distilled, entropies = balanced_losses(
            logits, noisy, teacher, labels, present, self.hparams["temperature"]
        )
        self.track(len(labels), loss=losses.sum(), distilled=distilled.sum(), entropy=entropies.sum())
        loss = losses.mean() + self.hparams["kd_weight"] * distilled.mean()
        return loss - self.hparams["entropy_weight"] * entropies.sum()  # type: ignore[no-any-return]

    def _eps(self, labels: Tensor, features: Tensor) -> Tensor:
        """Return the feature noise of a batch; the second pass of a sharpness-aware step gets the same noise."""
        assert self._noise is not None
        assert self.session is not None
        root, share = self._noise
        self._step += not self.sees_again
        generator = torch_generator(derive_seed(self.session.task.seed, "feature noise", self._step))
        draws = torch.randn(features.shape, generator=generator, dtype=root.dtype) @ root
        changed = torch.rand(len(labels), generator=generator, dtype=root.dtype) < share[labels.cpu()]
        return (draws * changed[:, None]).to(features)
