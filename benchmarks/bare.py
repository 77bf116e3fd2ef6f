"""A FedAMM round as a bare loop, with nothing but its arithmetic."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from benchmarks.federations import LR
from fedamm_pl import Orchestrator
from fedamm_pl.data.client import Batch
from fedamm_pl.federation.sampling import sample_clients
from fedamm_pl.protocol.messages import State
from fedamm_pl.seeding import derive_seed

MOMENTUM, WEIGHT_DECAY, META_LR = 0.9, 5e-4, 0.01


@dataclass
class Prepared:
    """Batches of a client and from the server's meta set for one round, as normalised tensors on the device."""

    num_examples: int
    batches: list[Batch]
    support: Batch
    meta: Batch


def prepare(run: Orchestrator, round_num: int) -> list[Prepared]:
    """Draw the same clients and batches as the round itself."""
    module, config = run.server.module, run.config

    def ready(batch: Batch) -> Batch:
        return module.prepare(batch[0]), batch[1].to(module.device)

    prepared = []
    for client in sample_clients(run.data.num_clients, config.client_fraction, run.seed, round_num):
        data, seed = run.data.client(client), derive_seed(run.seed, "client", round_num, client)
        loader = data.train_loader(seed)
        batches = [ready(batch) for _ in range(config.local_epochs) for batch in loader]
        meta = run.data.meta_batch(derive_seed(run.seed, "meta", round_num, client, 0))
        prepared.append(Prepared(data.num_examples, batches, ready(data.support(seed)), ready(meta)))
    return prepared


def weighted(losses: Tensor, raw: Tensor) -> Tensor:
    """Return the weighted loss of a batch."""
    return (raw / raw.sum() * losses).sum()


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.SGD:
    """Return the optimizer of the method."""
    return torch.optim.SGD(parameters, lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def bare_meta_step(network: nn.Module, weight_net: nn.Module, client: Prepared) -> State:
    """Return v_k after a virtual step and the meta gradient; a directional derivative replaces the double backward."""
    (images, labels), (meta_images, meta_labels) = client.support, client.meta

    def losses_at(params: State) -> Tensor:
        buffers = {name: value.clone() for name, value in network.named_buffers()}
        return cross_entropy(functional_call(network, {**params, **buffers}, (images,)), labels, reduction="none")

    params = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    losses = losses_at(params)
    constant = losses.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(weighted(constant, weight_net(constant)), constant, create_graph=True)
    gradients = torch.autograd.grad(losses, list(params.values()), slopes.detach())
    stepped = {
        name: (value - LR * gradient).detach().requires_grad_()
        for (name, value), gradient in zip(params.items(), gradients, strict=True)
    }
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    meta_loss = cross_entropy(functional_call(network, {**stepped, **buffers}, (meta_images,)), meta_labels)
    direction = torch.autograd.grad(meta_loss, list(stepped.values()))
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(value.detach(), tangent)  # type: ignore[no-untyped-call]
            for (name, value), tangent in zip(params.items(), direction, strict=True)
        }
        inner = forward_ad.unpack_dual(losses_at(duals)).tangent  # type: ignore[no-untyped-call]
    values = torch.autograd.grad(-LR * (slopes * inner).sum(), list(weight_net.parameters()))
    return {
        name: (value - (1 + MOMENTUM) * META_LR * (gradient + WEIGHT_DECAY * value)).detach()
        for (name, value), gradient in zip(weight_net.named_parameters(), values, strict=True)
    }


def bare_round(network: nn.Module, weight_net: nn.Module, clients: list[Prepared]) -> State:
    """Run a round that starts from the weights of the two networks, and return the averages."""
    start = {name: value.clone() for name, value in network.state_dict().items()}
    sums: State = {}
    total = sum(client.num_examples for client in clients)
    for client in clients:
        network.load_state_dict(start)
        network.train()
        trained = {f"weight_net.{name}": value for name, value in bare_meta_step(network, weight_net, client).items()}
        optimizer = sgd(network.parameters(), LR)
        seen = torch.zeros((), device=client.meta[0].device)
        for images, labels in client.batches:
            losses = cross_entropy(network(images), labels, reduction="none")
            with torch.no_grad():
                raw = weight_net(losses)
            optimizer.zero_grad()
            weighted(losses, raw).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen += losses.detach().sum()
        trained |= {f"model.{name}": value for name, value in network.state_dict().items()}
        for name, value in trained.items():
            sums[name] = sums.get(name, 0) + client.num_examples / total * value.double()
        float(seen)  # the orchestrated round reads the loss too
    return sums
