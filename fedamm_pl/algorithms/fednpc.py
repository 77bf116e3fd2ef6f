"""FedNPC (Gao et al., *Stochastic Noise-driven Post-hoc Classifier Calibration*, CVPR 2026 Findings)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms.post_hoc import PostHocModule, When
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ServerSession


class FedNPC(PostHocModule):
    """FedAvg whose server trains the classifier for a few steps on noise: normal features with independently drawn labels.

    The noise carries no information about the classes, so the rows and the bias of the classifier move towards their
    means over the classes. Training is FedAvg's, bit for bit. With 0 steps the model is FedAvg's, too; with infinitely
    many steps all its logits would be equal. No data are needed, and nothing is sent. In a plain Trainer it is FedAvg.

    The authors' program keeps the step with the best test accuracy; here the last one is kept. The authors' 27 steps
    are for 10 classes, after 200 rounds of 10 epochs; for 100 classes they take 49. A classifier that has trained less
    has smaller weights, and momentum carries them past the means: its rows are then reversed, and accuracy falls below
    chance. Compare the accuracy with FedAvg's.

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
        num_features: Noise features drawn for each step.
        noise_steps: Number of steps; use fewer for a classifier that has been trained little.
        noise_lr: Learning rate of these steps, by SGD with momentum 0.9.
        calibrate: evaluations (before each evaluation) or end (only before the last one).

    Raises:
        ValueError: If an option is out of range, there is no such network, or no linear layer gives its logits.
    """

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
        num_features: int = 10_000,
        noise_steps: int = 27,
        noise_lr: float = 0.1,
        calibrate: When = "evaluations",
    ) -> None:
        super().__init__(
            num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho, calibrate
        )
        require_range("num_features", num_features, least=1)
        require_range("noise_steps", noise_steps, least=0)
        require_range("noise_lr", noise_lr, least=0)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(work=f"server: {self.hparams['noise_steps']} steps on noise before an evaluation")

    def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
        """Return the classifier after its steps on noise."""
        weight, bias = self.classifier_of(state)
        options, generator = self.hparams, server.generator("fednpc")
        return self.as_state(
            *trained_on_noise(
                weight, bias, options["num_features"], options["noise_steps"], options["noise_lr"], generator
            )
        )


def trained_on_noise(
    weight: Tensor, bias: Tensor, num_features: int, num_steps: int, lr: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Train a linear classifier on normal features and independent uniform labels, newly drawn for each step.

    Args:
        weight: Initial weight, shape (C, D).
        bias: Initial bias, shape (C,).
        num_features: Features per step.
        num_steps: Number of steps of SGD with momentum 0.9 on the mean cross-entropy.
        lr: Step size.
        generator: Source of the draws.

    Returns:
        Weight and bias.
    """
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9)
    with torch.enable_grad():
        for _ in range(num_steps):
            features = torch.randn(num_features, weight.shape[1], generator=generator).to(weight)
            labels = torch.randint(len(bias), (num_features,), generator=generator).to(weight.device)
            loss = functional.cross_entropy(functional.linear(features, weight, bias), labels)
            weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
            optimizer.step()
    return weight.detach(), bias.detach()
