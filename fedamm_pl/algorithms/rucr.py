"""RUCR (Huang et al., *Federated Learning with Long-Tailed Non-IID Data via Representation Unification and Classifier Rectification*)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms.rectification import rectify, virtual_features
from fedamm_pl.data.client import Batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.models import features_and_logits
from fedamm_pl.precision import at_least_float32
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession
from fedamm_pl.seeding import derive_seed, torch_generator

MEANS, COUNTS, UNITS = "class_means", "class_counts", "class_directions"
"""Names of the class means and counts that a client sends, and of the directions derived from them by the server."""
ANCHORS, SHARES, DIRECTIONS = "anchors", "shares", "directions"
"""Names of the additional entries that the server sends."""
WEIGHT, BIAS = "rectified.weight", "rectified.bias"
MAX_LENGTH = 1e15
"""Largest norm of a client's class means, so that the squares of their sums fit into float32."""


def anchor_losses(
    features: Tensor, labels: Tensor, anchors: Tensor, shares: Tensor, held: Tensor, temperature: float
) -> Tensor:
    """Return the cross-entropy of each example's cosines with the anchors of the classes that the client holds.

    The score of class c is cos(z, P_c) / t if the client holds it and it has an anchor, else 0. log q_y is added only
    to the score of the example's own class y.

    Args:
        features: Features z of shape (B, D).
        labels: Classes y of shape (B,).
        anchors: Anchors P of shape (C, D).
        shares: Shares q of shape (C,); 0 for classes without an anchor.
        held: Whether the client holds each class, shape (C,).
        temperature: Temperature t.

    Returns:
        Losses of shape (B,); 0 for examples whose class has no anchor.
    """
    cosines = functional.normalize(features, dim=1) @ functional.normalize(anchors, dim=1).T
    known = shares > 0
    scores = (cosines / temperature).where(known & held, 0)
    own = functional.one_hot(labels, len(shares)).bool()
    scores = scores + shares.where(known, 1).log().where(own, 0)
    return functional.cross_entropy(scores, labels, reduction="none").where(known[labels], 0)


class RUCR(FederatedModule):
    """FedAvg with features pulled towards global class means; late in training clients re-train classifiers on balanced features.

    Clients measure the mean features of their classes under the received model. The server combines them into anchors.
    In the next round a loss term with weight mu, see :func:`anchor_losses`, pulls the features of each class towards
    its anchor. In the first round there are no anchors.

    From round rectify_round on, each client trains a copy of its classifier after its local training, with the same
    number of features for each class, see :func:`virtual_features`. They are mixtures of the mean directions of all
    classes and of the client's own features; the server has the direction of a class from the last round in which a
    client held it. The average of these classifiers replaces that of the averaged model in evaluation and delivery;
    training continues without it. rectify_round is an absolute round, whatever the number of rounds is: the default is
    for the last 20 of 500. Set it in a shorter run, or nothing is rectified.

    With mu = 0, and before rectify_round, it is FedAvg, bit for bit; in a plain Trainer it is FedAvg, too. It reveals
    the class counts and mean features of each client. A client sends 8 C bytes and C D numbers more, and receives C (D
    + 1) numbers more. From rectify_round on it sends another C (D + 1) numbers and receives another C D. A round costs
    one more pass over the examples.

    Differences from the authors' program: the anchors are those of the previous round, which saves an exchange; the
    directions are those of clients that take part; both are measured in evaluation mode; and mixed features are as long
    as real ones (``rescale``).

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
        mu: Weight of the term that pulls features to the anchors.
        temperature: Temperature t of this term.
        rectify_round: First round in which classifiers are re-trained; in the first round of a run there are no directions yet.
        rectify_epochs: Epochs over the mixed features.
        rectify_lr: Learning rate of this re-training, by plain SGD.
        rectify_batch_size: Mixed features per step.
        num_features: Mixed features per class.
        mix_low: Minimum share of the class direction in a mixed feature.
        mix_high: Maximum share.
        rescale: Whether mixed features are multiplied by the mean length of the client's features.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {MEANS: "sum", UNITS: "sum", COUNTS: "sum", "rectified.": "average"}
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
        mu: float = 0.15,
        temperature: float = 0.9,
        rectify_round: int = 481,
        rectify_epochs: int = 50,
        rectify_lr: float = 0.01,
        rectify_batch_size: int = 256,
        num_features: int = 100,
        mix_low: float = 0.35,
        mix_high: float = 0.95,
        rescale: bool = True,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("mu", mu, least=0)
        require_range("temperature", temperature, above=0)
        require_range("rectify_round", rectify_round, least=1)
        require_range("rectify_epochs", rectify_epochs, least=0)
        require_range("rectify_lr", rectify_lr, least=0)
        require_range("rectify_batch_size", rectify_batch_size, least=1)
        require_range("num_features", num_features, least=1)
        if not 0 <= mix_low <= 1:
            raise ValueError(f"Expected `mix_low` to be in [0, 1], got {mix_low}.")
        if not mix_low <= mix_high <= 1:
            raise ValueError(f"Expected `mix_high` to be in [{mix_low}, 1], got {mix_high}.")
        self._classifier = self.head_name()

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            revealed="class counts and mean features",
            server_state="mean features of all classes",
            work="client: a pass over its examples per round; in late rounds re-trains its classifier on features",
        )

    # Client

    def survey(self, session: ClientSession) -> State:
        """Measure the mean features of the client's classes."""
        parts = [
            (features_and_logits(self.model, self.prepare(images))[0].float(), labels.to(self.device))
            for images, labels in session.data.plain_batches()
        ]
        features, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        counts = labels.bincount(minlength=self.hparams["num_classes"])
        sums = features.new_zeros(len(counts), features.shape[1]).index_add(0, labels, features)
        self._features = features if DIRECTIONS in session.payload else None
        return {MEANS: sums / counts.clamp(min=1)[:, None], COUNTS: counts}

    def on_train_start(self) -> None:
        """Set the anchors of the round."""
        super().on_train_start()
        self._anchors: tuple[Tensor, Tensor, Tensor] | None = None
        if self.session is not None and self.hparams["mu"] > 0 and self.session.payload[SHARES].any():
            anchors, shares = (self.session.payload[name].to(self.device) for name in (ANCHORS, SHARES))
            self._anchors = anchors, shares, self.session.surveyed[COUNTS].to(self.device) > 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the batch loss with the term that pulls features to the anchors."""
        if self._anchors is None:
            return super().training_step(batch, batch_idx)
        images, labels = self.prepare(batch[0]), batch[1].to(self.device)
        features, logits = features_and_logits(self.model, images)
        losses = example_losses(logits, labels)
        anchors, shares, held = (value.to(features) if value.is_floating_point() else value for value in self._anchors)
        drawn = anchor_losses(features, labels, anchors, shares, held, self.hparams["temperature"])
        self.track(len(labels), loss=losses.sum(), anchored=drawn.sum())
        mu: float = self.hparams["mu"]
        return losses.mean() + mu * drawn.mean()

    def client_payload(self) -> State:
        """Return the trained model and, from ``rectify_round`` on, its re-trained classifier."""
        payload, session = super().client_payload(), self.session
        return payload if session is None or DIRECTIONS not in session.payload else self._rectified(payload, session)

    def _rectified(self, payload: State, session: ClientSession) -> State:
        options, names = self.hparams, (f"{self._classifier}.weight", f"{self._classifier}.bias")
        sent = payload[names[0]].dtype
        weight, bias = (at_least_float32(payload[name]) for name in names)
        assert self._features is not None
        directions, own = session.payload[DIRECTIONS].to(weight), self._features.to(weight)
        self._features = None
        known = directions.any(1).nonzero().flatten()
        generator = torch_generator(derive_seed(session.task.seed, "rectify"))
        bounds = options["mix_low"], options["mix_high"]
        made = virtual_features(directions[known], own, options["num_features"], *bounds, options["rescale"], generator)
        training = options["rectify_epochs"], options["rectify_lr"], options["rectify_batch_size"]
        weight, bias = rectify(made, known, weight, bias, *training, generator)
        return {**payload, WEIGHT: weight.to(sent), BIAS: bias.to(sent)}

    # Server

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model, the anchors (zeros before the first round) and, from ``rectify_round`` on, the directions."""
        none = torch.zeros(state[f"{self._classifier}.weight"].shape)
        names = {ANCHORS: none, SHARES: none[:, 0]}
        if server.round_num >= self.hparams["rectify_round"]:
            names[DIRECTIONS] = none
        return {**super().broadcast(state, server), **{name: state.get(name, value) for name, value in names.items()}}

    def expected_payload(self, sent: State) -> State:
        """Return the model, class means and counts and, from ``rectify_round`` on, a classifier."""
        late = {}
        if DIRECTIONS in sent:
            late = {to: sent[f"{self._classifier}.{to.rpartition('.')[2]}"] for to in (WEIGHT, BIAS)}
        counts = torch.zeros(self.hparams["num_classes"], dtype=torch.int64)
        return {**super().expected_payload(sent), MEANS: torch.zeros(sent[ANCHORS].shape), COUNTS: counts, **late}

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Return the payload, with the means replaced by float64 sums of features and of directions.

        Raises:
            ValueError: If the counts do not match the client's number of examples, or if the means belong to classes
                that the client does not hold or are too large for float32 arithmetic.
        """
        counts, means = result.payload[COUNTS].cpu(), result.payload[MEANS].cpu().double()
        if bool((counts < 0).any()) or int(counts.sum()) != result.num_examples:
            raise ValueError(f"its {COUNTS} are not those of {result.num_examples} examples")
        if bool(means[counts == 0].any()):
            raise ValueError(f"its {MEANS} are of classes that it does not hold")
        if (length := float(means.norm())) > MAX_LENGTH:
            raise ValueError(f"its {MEANS} are of length {length:g}, beyond {MAX_LENGTH:g}")
        sums = {MEANS: counts[:, None] * means, UNITS: counts[:, None] * functional.normalize(means, dim=1)}
        return {**result.payload, **sums}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the averaged model, anchors and directions and, from ``rectify_round`` on, the averaged classifier."""
        counts = reduced[COUNTS].cpu()
        held = counts > 0
        sums = {name: (reduced[name].cpu() / counts.clamp(min=1)[:, None]).float() for name in (MEANS, UNITS)}
        before = state.get(DIRECTIONS, torch.zeros(sums[UNITS].shape)).cpu()
        made = {
            ANCHORS: sums[MEANS],
            SHARES: (counts.double() / counts.sum()).float(),
            DIRECTIONS: sums[UNITS].where(held[:, None], before),
            **{name: reduced[name] for name in (WEIGHT, BIAS) if name in reduced},
        }
        return {**super().server_step(state, reduced, server), **made}

    def deployed(self, state: State) -> State:
        """Return the averaged model, with the average of the re-trained classifiers if there is one."""
        names = {WEIGHT: f"{self._classifier}.weight", BIAS: f"{self._classifier}.bias"}
        return {**super().deployed(state), **{own: state[name] for name, own in names.items() if name in state}}
