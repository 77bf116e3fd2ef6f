"""FedAvg with fine-tuning on the server's meta set: a control for FedAMM with the same images but no meta-learning."""

from dataclasses import replace

import torch
from torch import nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ServerSession


class MetaFineTune(FederatedModule):
    """FedAvg whose server takes a few steps on the cross-entropy of its balanced meta set after each averaging step.

    A method that uses balanced images must be more accurate than this one to show that it makes better use of them.
    With 0 steps it is FedAvg. In a plain Trainer it is FedAvg.

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
        finetune_steps: Steps of the server per round, each on the entire meta set with a new draw of the training transform.
        finetune_lr: Learning rate of these steps, by plain SGD.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    uses_meta_set = True

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
        finetune_steps: int = 5,
        finetune_lr: float = 0.01,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("finetune_steps", finetune_steps, least=0)
        require_range("finetune_lr", finetune_lr, least=0)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return replace(
            super().privileges, work=f"server: {self.hparams['finetune_steps']} steps on its images per round"
        )

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the average, then fine-tune it."""
        state = super().server_step(state, reduced, server)
        self.load_shared_state(state)
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.hparams["finetune_lr"])
        with torch.enable_grad():
            for step in range(self.hparams["finetune_steps"]):
                images, labels = server.meta(step)
                optimizer.zero_grad()
                example_losses(self(images), labels.to(self.device)).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return {**state, **self.shared_state()}
