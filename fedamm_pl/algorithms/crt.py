"""cRT: classifier re-training (Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*, ICLR 2020)."""

import torch
from torch import Tensor

from fedamm_pl.algorithms.decoupled import DecoupledModule


class CRT(DecoupledModule):
    """FedAvg, followed by training a new random classifier on the fixed features, with balanced sampling of the classes.

    ``where: server``: the classifier is re-trained before an evaluation, on the server's balanced images. Training is
    FedAvg's, bit for bit, and with 0 steps it is exactly FedAvg. It is the control for MetaFineTune, which updates the
    entire network.

    ``where: clients``: the classifier is re-trained in the rounds from ``stage2_start`` on, on the clients' own images,
    see :class:`DecoupledModule`. A client then sends the classifier, C (D + 1) numbers, and its class counts, 8 C
    bytes, in place of the model, so its class counts are revealed; it receives the model and 8 bytes. Before that round
    it is FedAvg, bit for bit. A median or trimmed mean does not protect the sums that the server computes from the
    classifiers.

    The authors use a learning rate of 0.2 for batches of 512, which falls to 0 over 10 epochs. Here it is
    ``retrain_lr``, which is constant at the clients. In a plain Trainer it is FedAvg.

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
        where: Where the second stage takes place: server (on its balanced images) or clients.
        stage2_start: The round in which the second stage starts at the clients; a run that ends earlier is FedAvg.
        retrain_steps: Number of steps of the server.
        retrain_lr: Learning rate of the second stage; the run's ``lr_decay`` does not change it.
        calibrate: When the server does it: evaluations (before each evaluation) or end (only before the last one).

    Raises:
        ValueError: If an option is out of range or does not apply to ``where``, there is no such network, or no linear
            layer gives its logits.
    """

    def renewed(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a new random classifier, initialised like a linear layer of torch."""
        bound = weight.shape[1] ** -0.5
        new = [torch.rand(value.shape, generator=generator) * 2 * bound - bound for value in (weight, bias)]
        return new[0].to(weight), new[1].to(bias)

    def started(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Return copies of the weight and the bias: the whole classifier is trained."""
        return [weight.clone(), bias.clone()]

    def classifier(self, trained: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the trained weight and bias."""
        weight, bias = trained
        return weight, bias
