"""FedYoYo (Yan et al., *You Are Your Own Best Teacher*, arXiv 2503.06916)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.data.client import Batch, ClientData
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.data.views import strong_view, weak_view
from fedamm_pl.losses import example_losses
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession
from fedamm_pl.seeding import derive_seed, torch_generator

PriorMix = Literal["once", "compounding"]
NUMBERS, PRIOR = "effective_numbers", "prior"
MOST = 1e6
"""Largest effective number of a class in a batch."""
OUTLIER = 1e4
"""Effective numbers above this are replaced in the first round."""
JUMP = 100.0
"""Largest factor by which an effective number may grow or fall from one round to the next."""


def effective_numbers(features: Tensor, labels: Tensor, batches: Iterable[Tensor], num_classes: int) -> Tensor:
    """Return the effective number of examples of each class, estimated from how different their features are.

    For a batch with n examples of a class the number is ``1 / max(sum R / n^2, 1e-6)``, where R are the cosines between
    their features, centred by the class mean over all examples: n if they are uncorrelated, 1 if they are alike. It is
    1 for n = 1. The numbers are summed over the batches.

    Args:
        features: Features of shape (N, D).
        labels: Classes of shape (N,).
        batches: Indices of the examples in each batch.
        num_classes: Number of classes C.

    Returns:
        float64 of shape (C,).
    """
    features = features.double()
    counts = labels.bincount(minlength=num_classes)[:, None]
    means = features.new_zeros(num_classes, features.shape[1]).index_add(0, labels, features) / counts.clamp(min=1)
    directions = functional.normalize(features - means[labels], dim=1)
    total = features.new_zeros(num_classes)
    for chosen in batches:
        members = functional.one_hot(labels[chosen], num_classes).double()  # (B, C)
        number = members.sum(0)
        # the sum of all cosines is the squared length of the sum of the directions
        alike = (members.T @ directions[chosen]).square().sum(1) / number.clamp(min=1).square()
        total += torch.where(number >= 2, 1 / alike.clamp(min=1 / MOST), number)
    return total


def moved_numbers(before: Tensor | None, found: Tensor) -> Tensor:
    """Return the server's effective numbers after a round.

    Args:
        before: Numbers after the previous round, shape (C,); None in the first round.
        found: 1 plus the sum of the clients' numbers, shape (C,).
    """
    if before is not None:
        return (0.9 * before + 0.1 * found).clamp(before / JUMP, before * JUMP)
    usual = found <= OUTLIER
    return found.where(usual | ~usual.any(), found[usual].mean())


class FedYoYo(FederatedModule):
    """FedAvg whose clients learn from two views of each image, the strong view from the weak one, with logits shifted by a prior.

    The prior of a class is a mixture of an estimate for all clients and the client's own class shares: pi = (1 - gamma)
    pi_global + gamma pi_own. The estimate is based on how different the features of each class are under the received
    model, see :func:`effective_numbers`, and not on the counts. But it is an estimate of the counts, and each client
    sends its own: it sends 8 C bytes and receives 4 C. A client uses the estimate of the previous round; in the first
    round it is uniform.

    A step costs two forward and backward passes, since the batch holds both views of its examples; a round costs one
    more pass over the examples. The weak view is the training transform and a rotation. The strong view is the training
    transform, AutoAugment's policy for CIFAR-10 (for images that are not in colour: a rotation by up to 30 degrees),
    and a hole of half the height and width. Eight images share a draw of the policy, so that images need not be
    processed one by one.

    With tau = 0 and kd_weight = 0 it is FedAvg on two views. Without the strong view and the rotation, this is FedAvg,
    bit for bit; with tau > 0 and gamma = 1 instead, it is LogitAdjusted with local counts, for clients that hold all
    classes. In a plain Trainer, where no prior is estimated, it is FedAvg.

    Features of a table have no views: they need ``strong_view`` false and ``rotation`` 0.

    Differences from the authors' program: clients do not first measure the estimate and then train with its outcome,
    which would take a second exchange; and pi is mixed once per round instead of at each step, where it drifts towards
    the client's own shares.

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
        tau: Strength of the shift tau log pi.
        gamma: Share of the client's own prior, in [0, 1].
        prior_mix: once (priors are mixed once per round) or compounding (again at each step).
        kd_weight: Weight of the distillation from the weak to the strong view, for images whose weak view is classified correctly.
        temperature: Temperature of this distillation.
        warmup: Rounds over which this weight grows from 0.
        strong_view: Whether there is a strong view; without it there is no distillation.
        rotation: Maximum rotation of the weak view, in degrees.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {NUMBERS: "sum"}
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
        tau: float = 1.5,
        gamma: float = 0.1,
        prior_mix: PriorMix = "once",
        kd_weight: float = 4.0,
        temperature: float = 1.5,
        warmup: int = 50,
        strong_view: bool = True,
        rotation: float = 15.0,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("tau", tau, least=0)
        if not 0 <= gamma <= 1:
            raise ValueError(f"Expected `gamma` to be in [0, 1], got {gamma}.")
        if prior_mix not in ("once", "compounding"):
            raise ValueError(f"Expected `prior_mix` to be once or compounding, got {prior_mix!r}.")
        require_range("kd_weight", kd_weight, least=0)
        require_range("temperature", temperature, above=0)
        require_range("warmup", warmup, least=0)
        require_range("rotation", rotation, least=0)
        if self.takes_features and (strong_view or rotation):
            raise ValueError(
                "Expected `strong_view` to be false and `rotation` 0 for FedYoYo on features, which have no views like images, "
                f"got {strong_view} and {rotation}."
            )

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        views = "two views of each image, " if self.hparams["strong_view"] else ""
        return Privileges(
            revealed="estimates of its class counts",
            server_state="estimates of the class counts",
            work=f"client: {views}a pass over its examples per round",
        )

    # Client

    def survey(self, session: ClientSession) -> State:
        """Estimate the client's class counts from the features under the received model."""
        data = session.data
        parts = [
            (features_and_logits(self.model, self.prepare(images))[0].cpu(), labels.cpu())
            for images, labels in data.plain_batches()
        ]
        features, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        generator = torch_generator(derive_seed(session.task.seed, "effective numbers"))
        order = torch.randperm(data.num_examples, generator=generator)
        batches = torch.split(order, data.batch_size)
        return {NUMBERS: effective_numbers(features, labels, batches, self.hparams["num_classes"])}

    def local_data(self, session: ClientSession) -> ClientData:
        """Return the client's data; without the training transform if there are two views, which apply it."""
        data = session.data
        return dataclasses.replace(data, augmentation="none") if self.hparams["strong_view"] else data

    def on_train_start(self) -> None:
        """Set the priors of the round."""
        super().on_train_start()
        self._step = 0
        if self.session is not None:
            counts = self.session.data.class_counts(self.hparams["num_classes"]).to(self.device)
            self._own = counts.float() / counts.sum()
            self._prior = self.session.payload[PRIOR].to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss over the views."""
        session, options = self.session, self.hparams
        if session is None:
            return super().training_step(batch, batch_idx)
        if not self.sees_again:
            self._step += 1
            if self._step == 1 or options["prior_mix"] == "compounding":
                self._prior = (1 - options["gamma"]) * self._prior + options["gamma"] * self._own
        views, labels = self._views(batch[0].to(self.device), session), batch[1].to(self.device)
        shifted = self(torch.cat(views)) + (self._prior ** options["tau"] + 1e-9).log()
        losses = example_losses(shifted, labels.repeat(len(views)))
        self.track(len(labels), loss=losses.sum() / len(views))
        if len(views) == 1:
            return losses.mean()
        weak, strong = shifted.chunk(2)
        right = weak.argmax(1) == labels
        known, learned = ((side / options["temperature"]).log_softmax(1) for side in (weak.detach(), strong))
        distances = (known.exp() * (known - learned)).sum(1).where(right, 0)
        self.track(0, distilled=distances.sum())
        growing = min(session.broadcast.round_num / options["warmup"], 1.0) if options["warmup"] else 1.0
        weight: float = options["kd_weight"] * growing
        loss: Tensor = losses.mean() + weight * distances.sum() / right.sum().clamp(min=1)
        return loss

    def _views(self, images: Tensor, session: ClientSession) -> list[Tensor]:
        """Return the views of a batch; the second pass of a sharpness-aware step gets the same views."""
        generator = torch_generator(derive_seed(session.task.seed, "views", self._step))
        rotation = self.hparams["rotation"]
        if not self.hparams["strong_view"]:
            return [weak_view(images, "none", rotation, generator)]
        augmentation = session.data.augmentation
        weak = weak_view(images, augmentation, rotation, generator)
        return [weak, strong_view(images, augmentation, generator)]

    # Server

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model and the prior, which is uniform in the first round."""
        numbers = state.get(NUMBERS, torch.ones(self.hparams["num_classes"], dtype=torch.float64)).cpu()
        return {**super().broadcast(state, server), PRIOR: (numbers / numbers.sum()).float()}

    def expected_payload(self, sent: State) -> State:
        """Return the model and the effective numbers."""
        numbers = torch.zeros(self.hparams["num_classes"], dtype=torch.float64)
        return {**super().expected_payload(sent), NUMBERS: numbers}

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Return the payload after checking it.

        Raises:
            ValueError: If an effective number is below 0, or larger than possible for the client's number of examples.
        """
        numbers, most = result.payload[NUMBERS], MOST * result.num_examples
        if bool((numbers < 0).any()) or bool((numbers > 1.001 * most).any()):
            raise ValueError(f"its {NUMBERS} are not all between 0 and {most:g}")
        return result.payload

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the averaged model, and update the effective numbers."""
        before = state.get(NUMBERS)
        numbers = moved_numbers(None if before is None else before.cpu(), 1 + reduced[NUMBERS].cpu())
        return {**super().server_step(state, reduced, server), NUMBERS: numbers}
