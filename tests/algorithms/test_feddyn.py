"""FedDyn: whole rounds against a plain torch loop, the closed cases of its paper, its bounds, what it leaves alone, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl import Orchestrator
from fedamm_pl.algorithms import FedDyn
from fedamm_pl.algorithms.feddyn import dynamic_term
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import State
from tests.algorithms.test_methods_by_hand import DOUBLE, LR, PlainServer, clients, federate, kept_by, make
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, tiny_data

ALPHA = 0.3


def of_the_model(state: State) -> State:
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def assert_close(found: State, expected: State) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("num_clients", "fraction"), [(3, 1.0), (3, 0.67)])
def test_rounds_are_those_of_the_paper(num_clients: int, fraction: float) -> None:
    """Unequal clients: a_k is alpha over K n_k / N, the mean of the models is plain, h counts those who are not drawn as well."""
    data = clients(num_clients)
    sizes = [data.client_size(client) for client in range(num_clients)]
    assert len(set(sizes)) > 1
    server = PlainServer(make(FedDyn, data), data, fraction, local_epochs=2)
    h = {name: torch.zeros_like(value) for name, value in server.w.items()}
    own = {client: dict(h) for client in range(num_clients)}
    mean = server.w
    for round_num in range(1, 5):
        trained: dict[int, State] = {}
        for k in server.sampled(round_num):
            weight = ALPHA / (num_clients * sizes[k] / sum(sizes))
            assert weight < 1 / (2 * LR)

            def loss(w: State, batch: Any, k: int = k, weight: float = weight) -> Tensor:
                """The paper's form: the cross-entropy + a <w, l - w_t> + a / 2 |w|^2."""
                linear = sum(((w[n] * (own[k][n] - server.w[n])).sum() for n in w), torch.tensor(0.0))
                square = sum(((w[n] ** 2).sum() for n in w), torch.tensor(0.0))
                return server.cross_entropy(w, batch) + weight * linear + weight / 2 * square

            trained[k], _ = server.train(round_num, k, loss)
        for k, w in trained.items():
            own[k] = {n: own[k][n] + w[n] - server.w[n] for n in w}
        mean = server.mean_by_examples(trained, uniform=True)
        h = {n: sum((own[k][n] for k in own), torch.tensor(0.0)) / num_clients for n in h}
        server.w = {n: mean[n] + h[n] for n in h}
    module = make(FedDyn, data, alpha=ALPHA)
    run = federate(module, data, 4, client_fraction=fraction, local_epochs=2)
    assert max(float(value.abs().max()) for value in h.values()) > 1e-2
    assert_close(of_the_model(run.state.shared), server.w)
    assert_close({n: run.state.shared[f"memory.model.{n}"] for n in h}, h)
    assert_close(of_the_model(module.shared_state()), mean)
    for client, kept in kept_by(run).items():
        assert_close(of_the_model(kept), own[client])


def test_after_one_round_of_all_the_next_model_is_twice_the_mean_less_the_last() -> None:
    data = clients()
    module = make(FedDyn, data, alpha=ALPHA)
    start = module.shared_state()
    run = federate(module, data, 1, local_epochs=1)
    for name, delivered in module.shared_state().items():
        torch.testing.assert_close(run.state.shared[name], 2 * delivered - start[name], rtol=1e-12, atol=1e-12)
        assert not torch.equal(delivered, start[name])


def test_a_single_client_comes_to_a_stationary_point_of_its_loss() -> None:
    """Where its memory is 0: the terms do not move it. The weight decay makes the loss strongly convex."""
    data = tiny_data(num_clients=1, partition="iid", batch_size=1000, augmentation="none")
    module = make(FedDyn, data, nn.Sequential(nn.Flatten(), nn.Linear(64, NUM_CLASSES)), alpha=1.0, weight_decay=0.3)
    run = federate(module, data, 60, local_epochs=5, eval_interval=60)
    (batch,) = data.client(0).plain_batches(1000)
    loss = module.objective(module(batch[0]), batch[1]).mean()
    parameters = list(module.model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        assert (gradient + 0.3 * parameter).abs().max() < 1e-4
    assert max(float(value.abs().max()) for value in kept_by(run)[0].values()) < 1e-3


def test_dynamic_term_has_the_gradient_of_the_paper() -> None:
    now = torch.tensor([3.0, 1.0], requires_grad=True)
    received, memory = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.25])
    (gradient,) = torch.autograd.grad(dynamic_term(now, received, memory), now)
    assert gradient.tolist() == [2.5, 2.25]


# Bounds


def test_the_weight_of_a_tiny_client_is_bounded() -> None:
    data = tiny_data(num_clients=2)
    module = make(FedDyn, data, alpha=1e9)
    result = Round(module, data, DOUBLE).train(0)
    plain = Round(make(FedDyn, data, alpha=0.0), data, DOUBLE).train(0)
    start = module.shared_state()
    moved, free = (
        max(float((found.payload[name] - value).abs().max()) for name, value in start.items())
        for found in (result, plain)
    )
    assert 0 < moved < free


def test_long_gradients_are_shortened() -> None:
    data = tiny_data(num_clients=2, batch_size=1000)
    for limit, length in ((1e-3, 1e-3), (None, None)):
        module = make(FedDyn, data, max_grad_norm=limit, weight_decay=0.0)
        payload, start = Round(module, data, DOUBLE).train(0).payload, module.shared_state()
        step = torch.cat([(payload[name] - value).flatten() for name, value in start.items()]).norm() / LR
        if length is None:
            assert step > 0.1
        else:
            assert float(step) == pytest.approx(length, rel=1e-2)


# What it leaves alone


class Mixed(nn.Module):
    """A layer that does not train, BatchNorm's statistics, and two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.norm = nn.Linear(64, 64).requires_grad_(False), nn.BatchNorm1d(64)
        self.one, self.two = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.two.weight = self.one.weight
        self.last = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.two(self.one(self.norm(self.frozen(images.flatten(1))))))
        return logits


def test_statistics_are_averaged_by_examples_and_frozen_layers_stay() -> None:
    data = clients()
    torch.manual_seed(0)
    module = make(FedDyn, data, Mixed(), alpha=ALPHA)
    round_ = Round(module, data, DOUBLE)
    results = [round_.train(client) for client in range(3)]
    state, total = round_.update(results), sum(result.num_examples for result in results)
    name = "model.norm.running_mean"
    weighted = sum(result.payload[name] * result.num_examples / total for result in results)
    torch.testing.assert_close(state[name], weighted)
    assert state["model.norm.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(state["model.frozen.weight"], module.shared_state()["model.frozen.weight"])
    assert torch.equal(state["model.one.weight"], state["model.two.weight"])
    trained = {"one.weight", "two.weight", "norm.weight", "norm.bias", "last.weight", "last.bias"}
    assert {key for key in state if key.startswith("memory.")} == {f"memory.model.{key}" for key in trained}
    assert set(results[0].kept) == {f"model.{key}" for key in trained - {"two.weight"}}


def test_in_half_precision_memories_are_float32() -> None:
    data = tiny_data()
    torch.manual_seed(0)
    module = FedDyn(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", lr=0.05, info=data.info)
    run = Orchestrator(module, data, num_rounds=2, trainer=TrainerConfig("cpu", precision="bf16-true"), eval_interval=2)
    run.run()
    dtypes = {
        name.partition(".")[0]: value.dtype for name, value in run.state.shared.items() if name.endswith("weight")
    }
    assert dtypes == {"model": torch.bfloat16, "memory": torch.float32}
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)


# Refusals


def test_a_server_optimizer_is_refused_by_name() -> None:
    data = tiny_data()
    with pytest.raises(ValueError, match="Expected `server_optimizer` to be none for FedDyn, got adam"):
        Orchestrator(make(FedDyn, data), data, num_rounds=1, server_optimizer="adam", trainer=DOUBLE)


def test_the_number_of_examples_must_be_known() -> None:
    data = tiny_data()
    info: Any = {name: value for name, value in data.info.items() if name != "class_counts"}
    with pytest.raises(ValueError, match="Expected `info` of FedDyn to hold class_counts"):
        federate(make(FedDyn, data, info=info), data, 1)
