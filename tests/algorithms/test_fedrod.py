"""FedRoD: its shared part is the balanced softmax, its heads against plain loops, and what does not leave a client."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms import FedRoD, LogitAdjusted
from fedamm_pl.algorithms.fedrod import Hypernetwork
from fedamm_pl.protocol.messages import State
from tests.algorithms.test_methods_by_hand import HIDDEN, LR, PlainServer, clients, federate, kept_by, make, mlp
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

MOMENTUM, DECAY, GAMMA, EPOCHS = 0.9, 5e-4, 0.5, 2


@pytest.mark.parametrize("absent", ["mask", "one"])
@pytest.mark.parametrize("head", ["linear", "hypernetwork"])
def test_the_shared_model_is_the_balanced_softmax_bit_for_bit(absent: str, head: str) -> None:
    """With BatchNorm and momentum; clients lack classes."""
    data = tiny_data(partition="by_num_classes", min_classes_per_client=2)
    assert (torch.from_numpy(data.client_class_counts) == 0).any()
    common: dict[str, Any] = {"momentum": MOMENTUM, "absent": absent}

    def trained(algorithm: Any, **options: Any) -> Any:
        module = make(algorithm, data, "tests.tiny.tiny_resnet", **common, **options)
        return federate(module, data, 3, client_fraction=0.5, local_epochs=1)

    theirs = trained(LogitAdjusted, counts="local", tau=GAMMA)
    mine = trained(FedRoD, gamma=GAMMA, head=head)
    for name, value in theirs.state.shared.items():
        assert torch.equal(mine.state.shared[name], value), name
    assert mine.state.history[-1]["client/loss"] == theirs.state.history[-1]["client/loss"]


# Heads, against loops of nothing but torch.


def plain_client(
    server: PlainServer, data: TinyData, round_num: int, client: int, own: Any
) -> tuple[dict[str, Tensor], Any]:
    """Train a client: a step of Nesterov's SGD on the model, a step of plain SGD on what is its own, on the same batch.

    Args:
        server: Has the global weights, and the batches.
        data: The clients.
        round_num: The round.
        client: The client.
        own: What makes its head, a module: features (B, D) -> (B, C).
    """
    network = mlp().double()
    network.load_state_dict(server.w)
    sgd = torch.optim.SGD(network.parameters(), LR, MOMENTUM, weight_decay=DECAY, nesterov=True)
    counts = data.client(client).class_counts(NUM_CLASSES).double()
    for images, labels in server.batches(round_num, client):
        features = network[:3](server.prepare(images))
        logits = network[3](features)
        shifted = logits + torch.where(counts > 0, GAMMA * counts.log(), -torch.inf)
        loss = (shifted.logsumexp(1) - shifted.gather(1, labels[:, None])[:, 0]).mean()
        before = {name: value.clone().requires_grad_() for name, value in own.named_parameters()}
        added = torch.func.functional_call(own, before, (features.detach(),))
        grads = torch.autograd.grad(functional.cross_entropy(logits.detach() + added, labels), list(before.values()))
        own.load_state_dict(
            {
                n: v.detach() - LR * (grad + DECAY * v.detach())
                for (n, v), grad in zip(before.items(), grads, strict=True)
            }
        )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return network.state_dict(), own


def test_linear_heads_equal_a_plain_loop_over_rounds_in_which_clients_come_again() -> None:
    data = clients()
    module = make(FedRoD, data, momentum=MOMENTUM, gamma=GAMMA)
    server = PlainServer(module, data, 0.67, EPOCHS)
    heads = {client: nn.Linear(HIDDEN, NUM_CLASSES).double() for client in range(3)}
    for head in heads.values():
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    seen: list[int] = []
    for round_num in range(1, 4):
        trained = {}
        for client in server.sampled(round_num):
            trained[client], heads[client] = plain_client(server, data, round_num, client, heads[client])
            seen.append(client)
        server.w = server.mean_by_examples(trained)
    assert len(seen) > len(set(seen))
    run = federate(module, data, 3, client_fraction=0.67, local_epochs=EPOCHS)
    expected = {f"model.{name}": value for name, value in server.w.items()}
    torch.testing.assert_close(run.state.shared, expected, rtol=1e-8, atol=1e-9)
    kept = kept_by(run)
    assert kept.keys() == set(seen)
    for client, state in kept.items():
        own: State = {f"own.{name}": value for name, value in heads[client].state_dict().items()}
        torch.testing.assert_close(state, own, rtol=1e-8, atol=1e-9)
        assert float(state["own.weight"].abs().max()) > 1e-3


class OfShares(nn.Module):
    """A hypernetwork written out, for one client."""

    def __init__(self, state: State, counts: Tensor) -> None:
        super().__init__()
        self.shares = counts.double() / counts.sum()
        self.a, self.b, self.c, self.d = (nn.Parameter(value.clone()) for value in state.values())

    def forward(self, features: Tensor) -> Tensor:
        hidden = (self.a @ self.shares + self.b).clamp(min=0)
        return features @ (self.c @ hidden + self.d).view(NUM_CLASSES, HIDDEN).T


def test_a_hypernetwork_equals_a_plain_loop_and_is_averaged() -> None:
    data = clients()
    module = make(FedRoD, data, momentum=MOMENTUM, gamma=GAMMA, head="hypernetwork")
    names = ["hidden.weight", "hidden.bias", "weights.weight", "weights.bias"]
    own = {name: module.own.state_dict()[name] for name in names}
    assert not own["weights.weight"].any()
    assert not own["weights.bias"].any()
    server = PlainServer(module, data, 1.0, EPOCHS)
    for round_num in (1, 2):
        trained, nets = {}, {}
        for client in range(3):
            net = OfShares(own, data.client(client).class_counts(NUM_CLASSES))
            trained[client], net = plain_client(server, data, round_num, client, net)
            nets[client] = dict(zip(names, net.state_dict().values(), strict=True))
        sizes = [data.client_size(client) for client in range(3)]
        server.w = server.mean_by_examples(trained)
        own = {name: sum(size * nets[k][name] for k, size in enumerate(sizes)) / sum(sizes) for name in names}
    run = federate(module, data, 2, local_epochs=EPOCHS)
    expected = {f"model.{name}": value for name, value in server.w.items()}
    expected |= {f"own.{name}": value for name, value in own.items()}
    torch.testing.assert_close(run.state.shared, expected, rtol=1e-8, atol=1e-9)
    assert not run.state.kept
    assert torch.equal(run.module.own.hidden.weight, run.state.shared["own.hidden.weight"])  # delivered
    assert run.state.history[-1]["personal/acc"] > 0


def test_heads_start_at_0_so_that_a_client_starts_with_the_shared_logits() -> None:
    assert not Hypernetwork(3, 5)(torch.tensor([0.2, 0.8, 0.0])).any()
    data = tiny_data()
    for head in ("linear", "hypernetwork"):
        module = FedRoD(NUM_CLASSES, 1, mlp(), info=data.info, head=head)  # type: ignore[arg-type]
        features, logits = torch.randn(5, HIDDEN), torch.randn(5, NUM_CLASSES)
        counts = torch.tensor([3, 1, 0, 0])
        assert torch.equal(module.personal_logits(features, logits, counts), logits)


# What leaves a client, and edges.


@pytest.mark.parametrize("head", ["linear", "hypernetwork"])
def test_a_client_sends_the_model_and_at_most_the_hypernetwork(head: str) -> None:
    data = tiny_data()
    torch.manual_seed(0)
    module = FedRoD(NUM_CLASSES, 1, mlp(), info=data.info, head=head)  # type: ignore[arg-type]
    result = Round(module, data).train(0)
    own = {name for name in module.state_dict() if name.startswith("own.")}
    model = {name for name in module.state_dict() if name.startswith("model.")}
    assert result.payload.keys() == (model if head == "linear" else model | own)
    assert result.kept.keys() == (own if head == "linear" else set())


def test_a_client_of_one_class_sends_back_what_it_got() -> None:
    """All other classes leave the softmax, so there is nothing to learn; its own head learns its class."""
    data = tiny_data(num_clients=6, partition="by_shards", shards_per_client=1)
    (client, *_) = [k for k in range(6) if (data.client(k).class_counts(NUM_CLASSES) > 0).sum() == 1]
    torch.manual_seed(0)
    one = Round(FedRoD(NUM_CLASSES, 1, mlp(), weight_decay=0.0, info=data.info), data)
    result = one.train(client)
    assert result.metrics["loss"] == 0.0
    for name, value in result.payload.items():
        assert torch.equal(value, one.state[name])
    bias = result.kept["own.bias"]
    assert int(bias.argmax()) == int(data.client(client).class_counts(NUM_CLASSES).argmax())
    assert float(bias.max()) > 0
