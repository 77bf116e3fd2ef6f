"""CReFF (Shang et al., *Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training with Federated Features*, IJCAI 2022)."""

from collections.abc import Iterator, Mapping
from itertools import islice, repeat
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession

GRADIENTS, PRESENT = "class_gradients", "present"
FEATURES, WEIGHT, BIAS = "features", "retrained.weight", "retrained.bias"
MAX_LENGTH = 1e15
"""Largest norm of a client's class gradients, so that the squares of their sum fit into float32."""


class CReFF(FederatedModule):
    """FedAvg whose server re-trains the classifier on balanced artificial features, fitted to the clients' gradients.

    Besides its training, a client computes for each of its classes the mean gradient of the cross-entropy with respect
    to the re-trained classifier, on the features of the global model in evaluation mode. The server averages these
    gradients over the clients that hold the class, optimises ``num_features`` artificial features per class so that
    their gradients point in the same direction, and trains a new classifier on them. Clients continue training the
    averaged model; it is evaluated and delivered with the re-trained classifier.

    The gradients reveal which classes a client holds. In each round, each client sends C * C * (D + 1) numbers more for
    the gradients, plus 8 C bytes that say which classes it holds, and receives C * (D + 1) numbers more for the
    re-trained classifier. Differences from the authors' program: the class gradients are exact means over the client's
    unaugmented examples (theirs are means over 10 draws of at most 32 augmented ones); in the first round they are
    those of the model's own classifier (theirs: of a random one); and the classifier is re-trained in full-batch steps
    with momentum. The authors train it for 300 epochs in batches of 32. For 10 classes this is ``retrain_steps: 9600,
    retrain_batch_size: 32, retrain_lr: 0.01, retrain_momentum: 0``. Step size times steps is 96 there; with the defaults
    it is 30, or about 300 with the effect of the momentum.
    The averaged model is FedAvg's, bit for bit; in a plain Trainer it is FedAvg.

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
        num_features: Artificial features per class.
        match_steps: Steps of the server on the features per round.
        match_lr: Learning rate of these steps, by plain SGD.
        retrain_steps: Steps of the server on the classifier per round.
        retrain_lr: Learning rate of these steps, by SGD.
        retrain_momentum: Its momentum (not Nesterov).
        retrain_batch_size: Artificial features per step, reshuffled in each epoch; null: all.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {GRADIENTS: "sum", PRESENT: "sum"}
    uses_features: ClassVar[bool] = True

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
        num_features: int = 100,
        match_steps: int = 100,
        match_lr: float = 0.1,
        retrain_steps: int = 300,
        retrain_lr: float = 0.1,
        retrain_momentum: float = 0.9,
        retrain_batch_size: int | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("num_features", num_features, least=1)
        require_range("match_steps", match_steps, least=0)
        require_range("match_lr", match_lr, least=0)
        require_range("retrain_steps", retrain_steps, least=0)
        require_range("retrain_lr", retrain_lr, least=0)
        require_range("retrain_momentum", retrain_momentum, least=0)
        if retrain_batch_size is not None:
            require_range("retrain_batch_size", retrain_batch_size, least=1)
        self._classifier = self.head_name()

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        steps = (
            f"{self.hparams['match_steps']} and {self.hparams['retrain_steps']} steps on artificial features per round"
        )
        return Privileges(
            revealed="mean classifier gradients per class, and which classes it holds",
            server_state="artificial features, a re-trained classifier",
            work=f"client: a pass over its examples; server: {steps}",
        )

    # Client

    def survey(self, session: ClientSession) -> State:
        """Compute the class gradients of the round."""
        weight, bias = (session.payload[name].to(self.device) for name in (WEIGHT, BIAS))
        num_classes = self.hparams["num_classes"]
        sums = weight.new_zeros(num_classes, num_classes, weight.shape[1] + 1)
        counts = torch.zeros(num_classes, dtype=torch.int64, device=self.device)
        for images, labels in session.data.plain_batches():
            features, _ = features_and_logits(self.model, self.prepare(images))
            sums += class_gradient_sums(features.to(weight.dtype), labels.to(self.device), weight, bias)
            counts += labels.to(self.device).bincount(minlength=num_classes)
        return {GRADIENTS: sums / counts.clamp(min=1)[:, None, None], PRESENT: (counts > 0).long()}

    # Server

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model and the re-trained classifier; before the first round, the model's own classifier."""
        return {**super().broadcast(state, server), **self._retrained(state)}

    def expected_payload(self, sent: State) -> State:
        """Return the model, the class gradients, and which classes are present."""
        num_classes, size = sent[WEIGHT].shape
        gradients = sent[WEIGHT].new_zeros(num_classes, num_classes, size + 1)
        present = torch.zeros(num_classes, dtype=torch.int64, device=sent[WEIGHT].device)
        return {**super().expected_payload(sent), GRADIENTS: gradients, PRESENT: present}

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Return the payload, with the class gradients in float64 for the sum.

        Raises:
            ValueError: If an entry that says whether the client holds a class is not 0 or 1, or if the gradients belong
                to classes that the client does not hold or are too large for float32 arithmetic.
        """
        present = result.payload[PRESENT]
        if ((present != 0) & (present != 1)).any():
            raise ValueError(f"{PRESENT} holds other values than 0 and 1")
        gradients = result.payload[GRADIENTS].cpu().double()
        if (length := float(gradients.norm())) > MAX_LENGTH:
            raise ValueError(f"its {GRADIENTS} are of length {length:g}, beyond {MAX_LENGTH:g}")
        if gradients[present.cpu() == 0].any():
            raise ValueError(f"its {GRADIENTS} are of classes that it does not hold")
        return {**result.payload, GRADIENTS: gradients}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the averaged model, match the artificial features, and re-train the classifier."""
        retrained, options = self._retrained(state), self.hparams
        weight, bias = retrained[WEIGHT], retrained[BIAS]
        num_classes, size = weight.shape
        holders = reduced[PRESENT].cpu()
        generator = server.generator("creff")
        features = state.get(FEATURES)
        if features is None:
            features = torch.randn(num_classes, options["num_features"], size, generator=generator)
        held = (holders > 0).nonzero().flatten()
        target = (reduced[GRADIENTS][held] / holders[held, None, None]).to(weight)
        steps = options["match_steps"], options["match_lr"]
        features = match_features(features.to(weight), held.to(weight.device), target, weight, bias, *steps)
        start = nn.init.kaiming_uniform_(torch.empty(num_classes, size), a=5**0.5, generator=generator).to(weight)
        how = {name: options[f"retrain_{name}"] for name in ("lr", "momentum", "batch_size")}
        weight, bias = retrain(features, start, options["retrain_steps"], **how, generator=generator)
        return {**super().server_step(state, reduced, server), FEATURES: features, WEIGHT: weight, BIAS: bias}

    def deployed(self, state: State) -> State:
        """Return the averaged model with the re-trained classifier."""
        retrained = self._retrained(state)
        classifier = {f"{self._classifier}.weight": retrained[WEIGHT], f"{self._classifier}.bias": retrained[BIAS]}
        return {**super().deployed(state), **classifier}

    def _retrained(self, state: State) -> State:
        names = {WEIGHT: f"{self._classifier}.weight", BIAS: f"{self._classifier}.bias"}
        return {name: state.get(name, state[own]) for name, own in names.items()}


def class_gradient_sums(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum, for each class, the gradients of its examples' cross-entropy with respect to a linear classifier.

    Args:
        features: Features of shape (B, D).
        labels: Classes of shape (B,).
        weight: Weight of the classifier, shape (C, D).
        bias: Bias of the classifier, shape (C,).

    Returns:
        Shape (C, C, D + 1): class of the examples, row of the classifier, and the weights and bias of that row.
    """
    num_classes = len(bias)
    members = functional.one_hot(labels, num_classes).to(features.dtype)
    errors = functional.linear(features, weight, bias).softmax(1) - members  # (B, C): d loss / d logits
    inputs = functional.pad(features, (0, 1), value=1.0)  # (B, D + 1)
    return torch.einsum("bk,bc,bd->kcd", members, errors, inputs)


def matching_loss(gradients: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine, summed over the classes and over the rows of the weight, plus once per class for the bias.

    Args:
        gradients: Gradients on artificial features, shape (K, C, D + 1).
        target: Gradients on real features, of the same shape.
    """

    def distances(mine: Tensor, theirs: Tensor) -> Tensor:
        lengths: Tensor = mine.norm(dim=-1) * theirs.norm(dim=-1)
        return 1 - (mine * theirs).sum(-1) / (lengths + 1e-6)

    total: Tensor = distances(gradients[..., :-1], target[..., :-1]).sum()
    total += distances(gradients[..., -1], target[..., -1]).sum()
    return total


def match_features(
    features: Tensor, held: Tensor, target: Tensor, weight: Tensor, bias: Tensor, num_steps: int, lr: float
) -> Tensor:
    """Optimise the artificial features of some classes so that their gradients point like those of real features.

    Args:
        features: Artificial features of shape (C, n, D).
        held: Classes with a target, shape (K,); the features of the other classes do not change.
        target: Mean class gradients of real features, shape (K, C, D + 1).
        weight: Weight of the classifier, shape (C, D).
        bias: Bias of the classifier, shape (C,).
        num_steps: Number of steps.
        lr: Step size of plain SGD.

    Returns:
        Features of shape (C, n, D).
    """
    moving = features[held].clone().requires_grad_()
    members = functional.one_hot(held, len(bias)).to(features.dtype)[:, None]  # (K, 1, C)
    with torch.enable_grad():
        for _ in range(num_steps):
            errors = functional.linear(moving, weight, bias).softmax(-1) - members  # (K, n, C)
            inputs = functional.pad(moving, (0, 1), value=1.0)
            gradients = errors.transpose(1, 2) @ inputs / moving.shape[1]  # (K, C, D + 1)
            (slope,) = torch.autograd.grad(matching_loss(gradients, target), moving)
            moving = (moving - lr * slope).detach().requires_grad_()
    return features.index_copy(0, held, moving.detach())


def retrain(
    features: Tensor,
    weight: Tensor,
    num_steps: int,
    lr: float,
    momentum: float = 0.9,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Train a linear classifier on the artificial features.

    Args:
        features: Artificial features of shape (C, n, D).
        weight: Initial weights, shape (C, D); the bias starts at 0.
        num_steps: Number of SGD steps.
        lr: Step size.
        momentum: Momentum of SGD (not Nesterov).
        batch_size: Features per step; None: all of them.
        generator: Draws the order of the features.

    Returns:
        Weights of shape (C, D), bias of shape (C,).
    """
    weight, bias = weight.clone().requires_grad_(), weight.new_zeros(len(weight)).requires_grad_()
    labels = torch.arange(len(features), device=features.device).repeat_interleave(features.shape[1])
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=momentum)
    flat = features.flatten(0, 1)
    parts = repeat((flat, labels)) if batch_size is None else batches(flat, labels, batch_size, generator)
    with torch.enable_grad():
        for inputs, targets in islice(parts, num_steps):
            loss = functional.cross_entropy(functional.linear(inputs, weight, bias), targets)
            weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
            optimizer.step()
    return weight.detach(), bias.detach()


def batches(
    features: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of features (N, D) and labels (N,) endlessly, in a new order in each pass."""
    while True:
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for first in range(0, len(labels), batch_size):
            part = order[first : first + batch_size]
            yield features[part], labels[part]
