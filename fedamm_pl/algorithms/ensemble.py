"""The ensemble of the clients' models on a pool of the server's images, and the net that calibrates it, for FEDIC."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.protocol.messages import State

NET, MOMENTS = "calibration_net.", "calibration_adam."
LABELLED, UNLABELLED = 20, 128
"""Number of images in a labelled and in an unlabelled batch."""
MAX_OUTPUT = 1e6
"""Largest absolute logit or feature of a model that takes part in the ensemble."""


class CalibrationNet(nn.Module):
    """Combines the logits of several models into a teacher: weights per image, an adjustment per class, and a gate.

    The weights of the models are ``a_k = sigmoid(u . z_k + u0)``, divided by their sum. The combined logits are
    ``z' = s * sum_k a_k z_k + t``, where s and t have one entry per class. The gate is ``c = sigmoid(v . f + v0)``,
    where f is the mean of the models' features. The teacher is ``c z' + (1 - c) g``, where g are the logits of the
    fine-tuned model. u and s start at 1, v at random values like those of a linear layer, and the others at 0.

    Args:
        num_classes: Number of classes C.
        num_features: Number of features D.
        generator: Draws v.
    """

    def __init__(self, num_classes: int, num_features: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = num_features**-0.5
        self.vote = nn.Parameter(torch.ones(num_classes))
        self.vote_bias = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(num_classes))
        self.shift = nn.Parameter(torch.zeros(num_classes))
        self.gate = nn.Parameter(torch.empty(num_features).uniform_(-bound, bound, generator=generator))
        self.gate_bias = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor, features: Tensor, refined: Tensor) -> Tensor:
        """Return the teacher's logits, shape (B, C).

        Args:
            logits: z_k of the models, shape (K, B, C).
            features: f, shape (B, D).
            refined: g, shape (B, C).
        """
        # a softmax of log-sigmoids, because a sum of sigmoids may be 0 in floating point
        shares = functional.logsigmoid(logits @ self.vote + self.vote_bias).softmax(0)  # (K, B)
        joined = self.scale * torch.einsum("kb,kbc->bc", shares, logits) + self.shift
        gate = (features @ self.gate + self.gate_bias).sigmoid()[:, None]  # (B, 1)
        teacher: Tensor = gate * joined + (1 - gate) * refined
        return teacher


@dataclasses.dataclass
class Pool:
    """The images of a round, and the outputs of the clients' models on them.

    Attributes:
        images: A draws of the same n images, one draw after the other, uint8, shape (N, in_channels, H, W) with N = A
            n.
        labels: Labels of one draw, shape (n,), on the module's device.
        votes: Logits of each model, each of shape (N, C).
        features: Sum of the models' features, shape (N, D); a scalar 0 before the first model.
    """

    images: Tensor
    labels: Tensor
    votes: list[Tensor] = dataclasses.field(default_factory=list)
    features: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))

    def add(self, features: Tensor, logits: Tensor) -> bool:
        """Add the outputs of a model; return False if they cannot be used in an ensemble, else True."""
        if not all(bool((part.abs() <= MAX_OUTPUT).all()) for part in (features, logits)):  # also refuses NaN
            return False
        self.votes.append(logits)
        self.features = self.features.to(features) + features
        return True

    def labelled(self, generator: torch.Generator) -> Tensor:
        """Draw a labelled batch: distinct images, each from a random draw; return their indices."""
        size = len(self.labels)
        chosen = torch.randperm(size, generator=generator)[:LABELLED]
        return chosen + size * torch.randint(len(self.images) // size, chosen.shape, generator=generator)

    def unlabelled(self, generator: torch.Generator) -> Tensor:
        """Draw an unlabelled batch from all draws of the images; return the indices."""
        return torch.randperm(len(self.images), generator=generator)[:UNLABELLED]

    def labels_of(self, indices: Tensor) -> Tensor:
        """Return the labels of images by their indices."""
        return self.labels[(indices % len(self.labels)).to(self.labels.device)]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the divergence KL(teacher || student) of the class probabilities, averaged over the images.

    Args:
        student: Logits of shape (B, C).
        teacher: Logits of shape (B, C).
        temperature: Divides both logits; the loss is not multiplied by its square.
    """
    mine, theirs = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)


def kept_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return the parameters of a net and the state of its optimizer, as entries of the server's state."""
    kept = {NET + name: value.detach().clone() for name, value in net.named_parameters()}
    for name, parameter in net.named_parameters():
        for part, value in optimizer.state[parameter].items():
            kept[f"{MOMENTS}{part}.{name}"] = value.detach().clone()
    return kept


def take_up(net: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Restore a net and its optimizer from the entries of :func:`kept_of`, if there are any."""
    for name, parameter in net.named_parameters():
        if NET + name in state:
            parameter.data.copy_(state[NET + name])
        parts = [key for key in state if key.startswith(MOMENTS) and key.endswith(f".{name}")]
        if parts:
            # Adam's step count stays on the CPU
            optimizer.state[parameter] = {
                part: state[key].cpu().clone() if part == "step" else state[key].to(parameter, copy=True)
                for key in parts
                if (part := key.removeprefix(MOMENTS).removesuffix(f".{name}"))
            }
