"""CCVR (Luo et al., *No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data*, NeurIPS 2021)."""

import logging
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms.feature_sums import add_features, drawn, impossible, no_sums, pooled, require_counts
from fedamm_pl.algorithms.post_hoc import PostHocModule, When
from fedamm_pl.data.client import Batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession

log = logging.getLogger(__name__)

COUNTS, SUMS, PRODUCTS = "features.counts", "features.sums", "features.products"
MOST_BYTES, MANY_BYTES = 2**31, 2**28
"""Sizes of a client's sums in bytes: above the first an error is raised, above the second a warning is logged."""


class CCVR(PostHocModule):
    """FedAvg whose server re-trains the classifier on virtual features drawn from one Gaussian per class.

    Before the evaluation all clients send, for each class, the number of their examples, the sum of their features under the trained
    model, and the sum of the products of these features. Together they give exactly the mean and covariance of the features of all
    clients. The server draws the same number of features per class and re-trains the classifier on them, starting from the trained one.
    For a class with a single example, features are drawn close to it; a class without examples is left out, and its row of the classifier
    does not change. In covariances, negative eigenvalues are set to 0, and 1e-6 is added to all eigenvalues.

    Training is FedAvg's, bit for bit; with ``num_features`` or ``retrain_epochs`` 0 it is exactly FedAvg. At each
    calibration a client reveals its class counts and the means and covariances of its features, in C (1 + D + D (D + 1)
    / 2) numbers of 8 bytes for D features. It also receives the trained model and makes a pass over its examples. In a
    plain Trainer it is FedAvg.

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
        num_features: Virtual features per class.
        clip: Whether to set negative virtual features to 0, like real features after a rectifier.
        retrain_epochs: Passes of the server over the virtual features.
        retrain_lr: Learning rate of the server's SGD with momentum 0.9.
        retrain_batch_size: Virtual features per batch.
        calibrate: evaluations (before each evaluation) or end (only before the last one).

    Raises:
        ValueError: If an option is out of range, there is no such network, or no linear layer gives its logits.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {"features.": "sum"}

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
        num_features: int = 200,
        clip: bool = False,
        retrain_epochs: int = 10,
        retrain_lr: float = 0.01,
        retrain_batch_size: int = 64,
        calibrate: When = "end",
    ) -> None:
        super().__init__(
            num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho, calibrate
        )
        require_range("num_features", num_features, least=0)
        require_range("retrain_epochs", retrain_epochs, least=0)
        require_range("retrain_lr", retrain_lr, least=0)
        require_range("retrain_batch_size", retrain_batch_size, least=1)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            revealed="per class: counts, sums of features and of their products",
            work="to calibrate: all clients pass over their examples, the server trains the last layer",
        )

    def check(self, batch: Batch) -> None:
        """Refuse a network whose feature size makes the sums of products too large, and warn if they are large.

        Raises:
            ValueError: If a client's sums take more than 2 GiB.
        """
        super().check(batch)
        num_classes, size = self._weight_shape()
        num_bytes = 8 * num_classes * (1 + size + size * (size + 1) // 2)
        if num_bytes > MOST_BYTES:
            raise ValueError(
                f"Expected `model` to give features of which CCVR's sums take at most {MOST_BYTES} bytes, got {num_bytes} for "
                f"{num_classes} classes of {size} features."
            )
        if num_bytes > MANY_BYTES:
            log.warning("CCVR: each client sends %.1f GB of sums, %d features a class", num_bytes / 1e9, size)

    def calibrates(self, last: bool) -> bool:
        """Return whether a calibration is due and the options leave something to train."""
        some = self.hparams["num_features"] > 0 and self.hparams["retrain_epochs"] > 0
        return some and super().calibrates(last)

    # Client

    def statistics(self, session: ClientSession) -> State:
        """Return the sums over the features of the client's examples."""
        num_classes, size = self._weight_shape()
        counts, sums, products = no_sums(num_classes, size)
        for images, labels in session.data.plain_batches():
            features, _ = features_and_logits(self.model, self.prepare(images))
            add_features(features, labels, counts, sums, products)
        return {COUNTS: counts, SUMS: sums, PRODUCTS: products}

    # Server

    def expected_statistics(self, sent: State) -> State:
        """Return sums of the expected names, shapes and types, all 0."""
        counts, sums, products = no_sums(*self._weight_shape())
        return {COUNTS: counts, SUMS: sums, PRODUCTS: products}

    def accepted_statistics(self, result: ClientResult, server: ServerSession) -> State:
        """Return the sums after checking them.

        Raises:
            ValueError: If they cannot be the sums of as many features as the client has examples.
        """
        sent = {name: value.cpu() for name, value in result.payload.items()}
        counts = sent[COUNTS].tolist()
        require_counts(counts, result.num_examples)
        for label, count in enumerate(counts):
            if wrong := impossible(count, sent[SUMS][label], sent[PRODUCTS][label]):
                raise ValueError(f"its sums for class {label} are those of no {count} features: {wrong}")
        return sent

    def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
        """Return the classifier re-trained on virtual features."""
        weight, bias = self.classifier_of(state)
        options, generator = self.hparams, server.generator("ccvr")
        counts, sums, products = (statistics[name].cpu() for name in (COUNTS, SUMS, PRODUCTS))
        held = counts.nonzero().flatten()
        features = torch.stack(
            [
                drawn(*pooled(int(counts[label]), sums[label], products[label]), options["num_features"], generator)
                for label in held.tolist()
            ]
        )
        if options["clip"]:
            features = features.clamp(min=0)
        labels = held.repeat_interleave(options["num_features"])
        return self.as_state(
            *retrained(
                (features.flatten(0, 1).to(weight), labels.to(weight.device)),
                (weight, bias),
                options["retrain_epochs"],
                options["retrain_batch_size"],
                options["retrain_lr"],
                generator,
            )
        )

    def _weight_shape(self) -> tuple[int, int]:
        num_classes, size = self.state_dict()[f"{self._head}.weight"].shape
        return num_classes, size


def retrained(
    examples: tuple[Tensor, Tensor],
    classifier: tuple[Tensor, Tensor],
    num_epochs: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train a linear classifier on features; classes without any are left out of the softmax, and their rows do not change.

    Args:
        examples: Features of shape (N, D), labels of shape (N,).
        classifier: Weight of shape (C, D) and bias of shape (C,) to start from.
        num_epochs: Passes over the features.
        batch_size: Features per batch.
        lr: Learning rate of SGD with momentum 0.9.
        generator: Draws the order of the features.

    Returns:
        Weight and bias.
    """
    features, labels = examples
    weight, bias = (value.clone().requires_grad_() for value in classifier)
    absent = labels.bincount(minlength=len(bias)) == 0
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9)
    with torch.enable_grad():
        for _ in range(num_epochs):
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                logits = functional.linear(features[batch], weight, bias).masked_fill(absent, -torch.inf)
                weight.grad, bias.grad = torch.autograd.grad(
                    functional.cross_entropy(logits, labels[batch]), (weight, bias)
                )
                optimizer.step()
    return weight.detach(), bias.detach()
