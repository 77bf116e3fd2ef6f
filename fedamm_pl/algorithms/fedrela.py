"""FedReLa (Hu et al., *Imbalanced Federated Learning via Re-Labeling*, ICML 2026, arXiv 2606.26037)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.class_prior import check_absent
from fedamm_pl.data.client import ClientData, augmented_batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import Absent, logit_adjusted_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ClientSession
from fedamm_pl.seeding import derive_seed, torch_generator

Base = Literal["cross_entropy", "balanced_softmax"]
LABELS = "labels"
LEAST_SPREAD = 1e-6
BATCH_SIZE = 500
"""Examples per forward pass of a prediction; it affects only the memory that this takes."""


def rarity(counts: Tensor) -> Tensor:
    """Return how rare each class is at a client: 1 for the rarest, 0 for the most frequent, linear between; 1 if all are alike.

    Args:
        counts: Number of examples of each class, shape (C,); classes without examples are included.

    Returns:
        float64 of shape (C,).

    Example:
        >>> rarity(torch.tensor([10, 5, 0]))
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    most, least = counts.max(), counts.min()
    return 1 - (counts - least).double() / (most - least).clamp(min=1)


def gains(probabilities: Tensor, labels: Tensor, rate: float) -> Tensor:
    """Return a gain for each example and class, which determines how likely the class becomes the example's new label.

    Each probability is standardised over the examples with the same label: z = (q - mean) / standard deviation. The
    gain is ``tanh(z - t_c) max(d_c - d_y, 0)``, where the threshold t_c is exceeded by ``rate`` per cent of the z of
    class c, and d is the :func:`rarity`. It is 0 for classes that are no rarer than the example's own.

    Args:
        probabilities: Predicted probabilities q of shape (n, C).
        labels: Classes of shape (n,).
        rate: Rate in per cent.

    Returns:
        float64 of shape (n, C).
    """
    (size, num_classes), q = probabilities.shape, probabilities.double()
    counts = labels.bincount(minlength=num_classes)
    held = counts.clamp(min=1)[:, None]
    means = torch.zeros(num_classes, num_classes).to(q).index_add(0, labels, q) / held
    centred = q - means[labels]
    spreads = (torch.zeros_like(means).index_add(0, labels, centred**2) / held).sqrt().clamp(min=LEAST_SPREAD)
    z = centred / spreads[labels]
    place = size - 1 - int(rate / 100 * size)
    thresholds = z.sort(0).values[min(max(place, 0), size - 1)]
    rarer = rarity(counts)
    return (z - thresholds).tanh() * (rarer - rarer[labels][:, None]).clamp(min=0)


def relabelled(gain: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
    """Return new labels: the class with the largest gain among those whose gain exceeds its draw, else the old label.

    Args:
        gain: Gains of shape (n, C).
        labels: Classes of shape (n,).
        draws: Draws, uniform in [0, 1), shape (n, C).

    Example:
        >>> relabelled(torch.tensor([[0.0, 0.3, 0.9], [0.0, 0.3, 0.9]]), torch.tensor([0, 0]), torch.tensor([[0.5], [0.95]]))
        tensor([2, 0])
    """
    most, best = gain.where(gain > draws, 0).max(1)
    return torch.where(most > 0, best, labels)


class FedReLa(FederatedModule):
    """FedAvg, or balanced softmax, whose clients late in training re-label a few examples of frequent classes as rarer classes.

    In its first round from relabel_round on, a client looks for examples to which the received model gives a high
    probability, compared with other examples of their class, of belonging to a class that is rarer at the client (see
    :func:`gains`). Some of them, chosen at random, get the label of that class. From then on the client trains on the
    new labels, and the learning rate is multiplied by lr_factor. The new labels are computed only once, from the
    original ones.

    relabel_round is an absolute round, whatever the number of rounds is. The authors choose 80 or 90 % of the number of
    rounds; the default is 90 % of 500. Set it in a shorter run, or no client re-labels. Before that round, and with
    rate = 0 and lr_factor = 1, it is FedAvg, bit for bit, or with base = balanced_softmax it is LogitAdjusted with
    local counts and tau = 1. A client whose classes are equally frequent keeps its labels, and no example gets the
    label of a class that is as frequent as its own at the client, or more frequent. Nothing extra is sent. A client
    keeps its new labels, 8 bytes for each example, and computes num_passes forward passes over its examples, once. The
    share of changed labels is logged as ``client/relabelled``. In a plain Trainer nothing is re-labelled: it is the
    base method.

    Differences from the authors' program: the model predicts in evaluation mode; a client re-labels when it next takes
    part (the authors need all clients in that round); and no run ends early because of its accuracy on the test set.

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
        relabel_round: First round in which clients re-label.
        rate: Percentage of examples that exceed the threshold of a class.
        num_passes: Number of predictions that are averaged, each with a new draw of the training transform.
        lr_factor: Factor on the learning rate from relabel_round on.
        base: The loss: cross_entropy, or balanced_softmax of the client's class counts (after re-labelling, of the new counts).
        absent: balanced_softmax: whether a class without examples is left out of the softmax (mask) or counts as one example (one).

    Raises:
        ValueError: If an option is out of range or there is no such network; at the start of a fit if counts are unknown.
    """

    class_counts: Tensor
    """Number of examples of each class during a fit, shape (C,)."""

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
        relabel_round: int = 450,
        rate: float = 5.0,
        num_passes: int = 5,
        lr_factor: float = 0.1,
        base: Base = "cross_entropy",
        absent: Absent = "one",
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("relabel_round", relabel_round, least=1)
        if not 0 <= rate <= 100:
            raise ValueError(f"Expected `rate` to be in [0, 100], got {rate}.")
        require_range("num_passes", num_passes, least=1)
        require_range("lr_factor", lr_factor, above=0)
        if base not in get_args(Base):
            raise ValueError(f"Expected `base` to be cross_entropy or balanced_softmax, got {base!r}.")
        check_absent(absent)
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64), persistent=False)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        passes = self.hparams["num_passes"]
        return Privileges(
            client_state="new labels for its examples, from round relabel_round on",
            work=f"client: {passes} passes over its examples, once",
        )

    def survey(self, session: ClientSession) -> State:
        """Re-label in the client's first round from ``relabel_round`` on; nothing is sent."""
        data = session.data
        if self._late(session) and LABELS not in session.kept:
            generator = torch_generator(derive_seed(session.task.seed, "relabel"))
            gain = gains(self._predicted(data, generator), _own_labels(data), self.hparams["rate"])
            draws = torch.rand(gain.shape, generator=generator, dtype=gain.dtype)
            session.kept = {**session.kept, LABELS: relabelled(gain, _own_labels(data), draws)}
        kept = session.kept.get(LABELS)
        changed = 0.0 if kept is None else float((kept.cpu() != _own_labels(data)).double().mean())
        session.metrics["relabelled"] = changed
        return {}

    def _predicted(self, data: ClientData, generator: torch.Generator) -> Tensor:
        """Return class probabilities (n, C) of a client's examples, averaged over draws of the training transform."""
        passes = []
        for _ in range(self.hparams["num_passes"]):
            logits = []
            for chosen in torch.split(data.indices, BATCH_SIZE):
                images, _ = augmented_batch(data.images, data.labels, chosen, data.augmentation, generator)
                logits.append(self(images).float().cpu())
            passes.append(torch.cat(logits).softmax(1))
        return torch.stack(passes).mean(0)

    def local_data(self, session: ClientSession) -> ClientData:
        """Return the client's data, with the new labels if there are any."""
        data = session.data
        return data.relabelled(session.kept[LABELS]) if LABELS in session.kept else data

    @property
    def local_lr(self) -> float:
        """Learning rate of the local SGD, multiplied by ``lr_factor`` from ``relabel_round`` on."""
        late = self.session is not None and self._late(self.session)
        return super().local_lr * (self.hparams["lr_factor"] if late else 1.0)

    def on_train_start(self) -> None:
        """Set the class counts of the training data, if the loss needs them."""
        super().on_train_start()
        if self.hparams["base"] == "cross_entropy":
            return
        if self.session is not None:
            counts = self.local_data(self.session).class_counts(self.hparams["num_classes"])
        else:
            counts = self.known_counts()
        self.class_counts = counts.to(self.device)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the base method's loss of each example."""
        if self.hparams["base"] == "cross_entropy":
            return super().objective(logits, labels)
        return logit_adjusted_losses(logits, labels, self.class_counts, 1.0, self.hparams["absent"])

    def _late(self, session: ClientSession) -> bool:
        return bool(session.broadcast.round_num >= self.hparams["relabel_round"])


def _own_labels(data: ClientData) -> Tensor:
    """Return the original labels of a client's examples, in their order, shape (n,), on the CPU."""
    return data.labels[data.indices.to(data.labels.device)].cpu()
