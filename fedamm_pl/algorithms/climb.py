"""CLIMB (Shen et al., *An Agnostic Approach to Federated Learning with Class Imbalance*, ICLR 2022)."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule, require_range
from fedamm_pl.protocol.session import ServerSession

DUAL, LOSS = "dual", "global_loss"


class Climb(FederatedModule):
    """FedAvg under the constraint that no client's loss is more than a tolerance above the mean of the clients.

    The dual variable lambda_k of each client grows while it is: ``lambda_k <- max(0, lambda_k + dual_lr (f_k - mean f -
    tolerance))``, with f_k the global model's loss on the client's examples before it trains and the mean over the clients of
    the round. The server scales the client's update by ``1 + lambda_k - mean lambda``, with the lambdas before the round and
    their mean over all clients. Only clients that take part measure their loss (the paper asks all of them), which costs one
    pass over their examples and 8 bytes sent. With dual_lr = 0 it is FedAvg, bit for bit; in a plain Trainer it is FedAvg too.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: Its momentum, Nesterov's unless 0.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.
        dual_lr: Step size of the dual ascent.
        tolerance: How far above the mean a client's loss may be.

    Raises:
        ValueError: If an option is out of range or there is no such network.
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
        dual_lr: float = 0.1,
        tolerance: float = 0.1,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info)
        require_range("dual_lr", dual_lr, least=0)
        require_range("tolerance", tolerance, least=0)

    def on_train_start(self) -> None:
        """Measure the loss of the global model on the client's examples."""
        super().on_train_start()
        if self.session is not None:
            self.eval()
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():  # this hook runs outside of it
                losses = [example_losses(self(images), labels) for images, labels in self.session.data.plain_batches()]
            self.train()
            self._global_loss = torch.cat(losses).mean()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means and the loss of the global model."""
        super().on_train_epoch_end()
        if self.session is not None:
            self.log("train/global_loss", self._global_loss)

    def expected_payload(self, sent: State) -> State:
        """Return the model and a loss."""
        return {**super().expected_payload(sent), LOSS: torch.zeros((), dtype=torch.float64)}

    def client_payload(self) -> State:
        """Return the trained model and the loss of the global one."""
        return {**super().client_payload(), LOSS: self._global_loss.cpu().double()}

    def server_update(self, state: State, results: Iterable[ClientResult], server: ServerSession) -> State:
        """Average the scaled updates, then move the dual variables."""
        dual = state.get(DUAL, torch.zeros(server.num_clients, dtype=torch.float64))
        scales = (1 + dual - dual.mean()).tolist()
        losses: dict[int, float] = {}

        def scaled() -> Iterator[ClientResult]:
            for result in results:
                losses[result.client_id] = float(result.payload[LOSS])
                trained = {name for name, _ in self.named_parameters()}
                payload = {
                    name: state[name].to(value.device).lerp(value, scales[result.client_id])
                    if name in trained
                    else value
                    for name, value in result.payload.items()
                }
                yield dataclasses.replace(result, payload=payload)

        new = super().server_update(state, scaled(), server)
        del new[LOSS]
        clients = torch.tensor(list(losses))
        spread = torch.tensor(list(losses.values()), dtype=torch.float64)
        spread = spread - spread.mean() - self.hparams["tolerance"]
        moved = dual.cpu().index_add(0, clients, self.hparams["dual_lr"] * spread).clamp(min=0)
        return {**new, DUAL: moved}
