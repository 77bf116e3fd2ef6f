"""Whole rounds of the methods against plain torch loops, and their parts against autograd and torch's own optimizer."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedamm_pl import FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import Climb, CReFF, FedETF, FedNova, FedProx, MetaFineTune, Moon, RatioLoss, Scaffold
from fedamm_pl.algorithms.creff import class_gradient_sums, match_features, matching_loss, retrain
from fedamm_pl.algorithms.fedetf import ETFHead
from fedamm_pl.algorithms.fednova import normalizer
from fedamm_pl.algorithms.ratio_loss import class_ratios
from fedamm_pl.data.client import Batch
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.federation.sampling import sample_clients
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.models import classifier_of, features_and_logits
from fedamm_pl.protocol.messages import ClientResult, ClientTask
from fedamm_pl.protocol.session import ClientSession, ServerSession
from fedamm_pl.seeding import derive_seed
from tests.tiny import NUM_CLASSES, TinyData, tiny_data, tiny_resnet

LR, DECAY, HIDDEN = 0.1, 5e-4, 12
DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_CLASSES))


def clients(num_clients: int = 3) -> TinyData:
    """Clients of different sizes and classes."""
    return tiny_data(num_clients=num_clients, partition="by_dirichlet", dirichlet_alpha=0.5)


def make(algorithm: type[FederatedModule], data: TinyData, network: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    network = network or mlp()
    return algorithm(NUM_CLASSES, 1, network, **{"lr": LR, "momentum": 0.0, "info": data.info, **options}).double()


def federate(module: FederatedModule, data: TinyData, num_rounds: int, **options: Any) -> Orchestrator:
    run = Orchestrator(module, data, num_rounds=num_rounds, trainer=DOUBLE, **{"client_fraction": 1.0, **options})
    run.run()
    return run


class PlainServer:
    """The rounds of FedAvg with nothing but torch: who takes part, its batches, plain SGD on a loss, the average."""

    def __init__(self, module: FederatedModule, data: TinyData, client_fraction: float, local_epochs: int) -> None:
        self.network, self.data, self.epochs = module.model, data, local_epochs
        self.w = {name: value.detach().clone() for name, value in module.model.named_parameters()}
        self.mean, self.std, self.fraction = module.mean, module.std, client_fraction

    def prepare(self, images: Tensor) -> Tensor:
        return (images.double() / 255 - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)

    def logits(self, w: State, images: Tensor) -> Tensor:
        return functional_call(self.network, w, (self.prepare(images),))

    def cross_entropy(self, w: State, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.logits(w, batch[0]), batch[1])

    def sampled(self, round_num: int) -> list[int]:
        return sample_clients(self.data.num_clients, self.fraction, 0, round_num)

    def batches(self, round_num: int, client: int) -> Iterator[Batch]:
        loader = self.data.client(client).train_loader(derive_seed(0, "client", round_num, client))
        for _ in range(self.epochs):
            yield from loader

    def train(
        self,
        round_num: int,
        client: int,
        loss: Callable[[State, Batch], Tensor] | None = None,
        correction: State | None = None,
    ) -> tuple[State, int]:
        """Return the weights of a client after its round, and its number of steps."""
        w, steps = dict(self.w), 0
        for batch in self.batches(round_num, client):
            leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
            grads = torch.autograd.grad((loss or self.cross_entropy)(leaves, batch), list(leaves.values()))
            for (name, value), grad in zip(w.items(), grads, strict=True):
                w[name] = value - LR * (grad + DECAY * value + (correction[name] if correction else 0))
            steps += 1
        return w, steps

    def mean_by_examples(self, states: dict[int, State], uniform: bool = False) -> State:
        sizes = {client: 1 if uniform else self.data.client_size(client) for client in states}
        total = sum(sizes.values())
        return {
            name: sum((size / total * states[client][name] for client, size in sizes.items()), torch.tensor(0.0))
            for name in self.w
        }


def kept_by(run: Orchestrator) -> dict[int, State]:
    """What each client that has taken part keeps to itself."""
    return {client: run._store.read(client, version) for client, version in run.state.kept.items()}


def assert_close(run: Orchestrator, expected: State, prefix: str = "model.") -> None:
    found = {name.removeprefix(prefix): value for name, value in run.state.shared.items() if name.startswith(prefix)}
    torch.testing.assert_close(found, {name: value.double() for name, value in expected.items()}, rtol=1e-9, atol=1e-9)


# Scaffold.


@pytest.mark.parametrize("aggregation", ["num_examples", "uniform"])
@pytest.mark.parametrize(("num_clients", "fraction"), [(2, 1.0), (3, 0.67)])
def test_scaffold_equals_option_ii_of_the_paper_in_the_weights_of_the_models(
    num_clients: int, fraction: float, aggregation: str
) -> None:
    """c moves by |S| / K * sum_k p_k (c_k+ - c_k); the paper's clients, and those of uniform aggregation, weigh the same."""
    data, uniform = clients(num_clients), aggregation == "uniform"
    assert len({data.client_size(client) for client in range(num_clients)}) > 1
    server = PlainServer(make(Scaffold, data), data, fraction, local_epochs=2)
    c = {name: torch.zeros_like(value) for name, value in server.w.items()}
    own = {client: dict(c) for client in range(num_clients)}
    for round_num in range(1, 5):
        trained, changes = {}, {}
        for k in server.sampled(round_num):
            trained[k], steps = server.train(round_num, k, correction={n: c[n] - own[k][n] for n in c})
            new = {n: own[k][n] - c[n] + (server.w[n] - trained[k][n]) / (steps * LR) for n in c}
            changes[k] = {n: new[n] - own[k][n] for n in c}
            own[k] = new
        assert len(trained) == 2
        server.w = server.mean_by_examples(trained, uniform)
        change = server.mean_by_examples(changes, uniform)
        c = {n: c[n] + len(changes) / num_clients * change[n] for n in c}
    run = federate(make(Scaffold, data), data, 4, client_fraction=fraction, local_epochs=2, aggregation=aggregation)
    assert max(float(value.abs().max()) for value in c.values()) > 1e-2
    assert_close(run, server.w)
    assert_close(run, c, "control.model.")
    for client, kept in kept_by(run).items():
        torch.testing.assert_close(kept, {f"model.{n}": v for n, v in own[client].items()}, rtol=1e-9, atol=1e-9)


def test_control_variates_of_scaffold_are_mean_gradients_of_the_client() -> None:
    """Option II telescopes: c_k is the mean of the gradients that the client met, here of a single full-batch step."""
    data = tiny_data(num_clients=2, batch_size=1000, augmentation="none", partition="by_dirichlet")
    module = make(Scaffold, data)
    server = PlainServer(module, data, 1.0, local_epochs=1)
    expected = []
    for client in range(2):
        leaves = {name: value.clone().requires_grad_() for name, value in server.w.items()}
        (batch,) = data.client(client).plain_batches(1000)
        grads = torch.autograd.grad(server.cross_entropy(leaves, batch), list(leaves.values()))
        expected.append({f"model.{n}": g + DECAY * v for (n, v), g in zip(server.w.items(), grads, strict=True)})
    run = federate(module, data, 1, local_epochs=1)
    kept = kept_by(run)
    for client in range(2):
        torch.testing.assert_close(kept[client], expected[client], rtol=1e-8, atol=1e-10)


def test_c_of_scaffold_is_the_gradient_of_what_the_average_minimises() -> None:
    """After one full-batch step of every client, without weight decay: of the mean loss over all examples, any client's."""
    data = tiny_data(num_clients=3, batch_size=1000, augmentation="none", partition="by_dirichlet")
    module = make(Scaffold, data, weight_decay=0.0)
    server = PlainServer(module, data, 1.0, local_epochs=1)
    batches = [next(iter(data.client(client).plain_batches(1000))) for client in range(3)]
    assert len({len(labels) for _, labels in batches}) == 3
    union = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    leaves = {name: value.clone().requires_grad_() for name, value in server.w.items()}
    gradients = torch.autograd.grad(server.cross_entropy(leaves, union), list(leaves.values()))
    run = federate(module, data, 1, local_epochs=1)
    assert_close(run, dict(zip(leaves, gradients, strict=True)), "control.model.")


def test_scaffold_of_equal_clients_weighs_them_uniformly_as_the_paper_does() -> None:
    data = tiny_data(partition="iid", imbalance_factor=1.0)
    assert len({data.client_size(client) for client in range(4)}) == 1
    states = [
        federate(
            make(Scaffold, data), data, 3, client_fraction=0.5, local_epochs=1, aggregation=aggregation
        ).state.shared
        for aggregation in ("num_examples", "uniform")
    ]
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-14)


# FedNova.


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 57])
def test_normalizer_is_the_distance_that_torch_goes_under_a_constant_gradient(num_steps: int, momentum: float) -> None:
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum, nesterov=momentum > 0)
    for _ in range(num_steps):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    assert normalizer(num_steps, momentum) == pytest.approx(weight.item(), rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_normalizer_sums_the_coefficients_of_single_gradients(momentum: float) -> None:
    """A gradient met n steps before the end moves the model by 1 + rho + ... + rho^(n + 1), without momentum by 1."""
    coefficients = [sum(momentum**power for power in range(n + 2)) if momentum else 1.0 for n in range(7)]
    assert normalizer(7, momentum) == pytest.approx(sum(coefficients), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_round_of_fednova_is_the_scaled_mean_of_normalised_updates(momentum: float) -> None:
    data = clients()
    module = make(FedNova, data, momentum=momentum)
    server = PlainServer(module, data, 1.0, local_epochs=2)
    for round_num in (1, 2):
        updates, works, sizes = [], [], []
        for client in range(3):
            network, steps = mlp().double(), 0
            network.load_state_dict(server.w)
            optimizer = torch.optim.SGD(network.parameters(), LR, momentum, weight_decay=DECAY, nesterov=momentum > 0)
            for images, labels in server.batches(round_num, client):
                optimizer.zero_grad()
                functional.cross_entropy(network(server.prepare(images)), labels).backward()
                optimizer.step()
                steps += 1
            updates.append({n: v.detach() - server.w[n] for n, v in network.named_parameters()})
            # the work: velocity u and position x of a weight under gradient 1, step by step
            u = x = 0.0
            for _ in range(steps):
                u = momentum * u + 1
                x += 1 + momentum * u if momentum else 1
            works.append(x)
            sizes.append(data.client_size(client))
        assert len(set(works)) > 1
        p = [size / sum(sizes) for size in sizes]
        effective = sum(share * work for share, work in zip(p, works, strict=True))
        for n in server.w:
            parts = [share * update[n] / work for share, update, work in zip(p, updates, works, strict=True)]
            server.w[n] = server.w[n] + effective * torch.stack(parts).sum(0)
    run = federate(module, data, 2, local_epochs=2)
    assert_close(run, server.w)
    assert set(run.state.shared) == {f"model.{name}" for name in server.w}


def test_fednova_averages_batchnorm_statistics_as_fedavg_does() -> None:
    data = clients()
    runs = [federate(make(a, data, tiny_resnet(NUM_CLASSES, 1)), data, 1, local_epochs=1) for a in (FedNova, FedAvg)]
    mine, theirs = (run.state.shared for run in runs)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        if "running" in name or "num_batches" in name:
            assert torch.equal(mine[name], theirs[name])
    assert not torch.equal(mine["model.conv1.weight"], theirs["model.conv1.weight"])


# FedProx.


def test_fedprox_equals_a_plain_implementation() -> None:
    data, mu = clients(), 0.7
    server = PlainServer(make(FedProx, data), data, 1.0, local_epochs=3)
    for round_num in (1, 2):
        start = dict(server.w)

        def loss(w: State, batch: Batch, start: State = start) -> Tensor:
            return server.cross_entropy(w, batch) + mu / 2 * sum(((w[n] - start[n]) ** 2).sum() for n in w)

        server.w = server.mean_by_examples({k: server.train(round_num, k, loss)[0] for k in range(3)})
    assert_close(federate(make(FedProx, data, mu=mu), data, 2, local_epochs=3), server.w)


def test_second_step_of_fedprox_is_pulled_back_by_mu_times_the_first() -> None:
    """w2 = w1 - lr (g(w1) + mu (w1 - w0)): with the same batch twice, FedAvg's w2 less lr mu (w1 - w0)."""
    data, mu = tiny_data(num_clients=1, partition="iid", batch_size=1000, augmentation="none"), 2.0
    w0 = make(FedAvg, data, weight_decay=0.0).shared_state()
    w1, w2 = (
        federate(make(FedAvg, data, weight_decay=0.0), data, 1, local_epochs=epochs).state.shared for epochs in (1, 2)
    )
    found = federate(make(FedProx, data, weight_decay=0.0, mu=mu), data, 1, local_epochs=2).state.shared
    expected = {name: w2[name] - LR * mu * (w1[name] - w0[name]) for name in w0}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# Moon.


def test_moon_equals_a_plain_implementation_with_the_model_of_the_last_participation() -> None:
    data, temperature, mu, num_rounds = clients(4), 0.4, 1.5, 5
    module = make(Moon, data, mu=mu, temperature=temperature, projection=None)
    server = PlainServer(module, data, 0.5, local_epochs=2)
    previous: dict[int, tuple[int, State]] = {}
    gaps = []

    def features(w: State, images: Tensor) -> Tensor:
        return torch.relu(server.prepare(images).flatten(1) @ w["1.weight"].T + w["1.bias"])

    for round_num in range(1, num_rounds + 1):
        trained, start = {}, dict(server.w)
        for k in server.sampled(round_num):
            seen, before = previous.get(k, (0, None))
            gaps += [round_num - seen] if before else []

            def loss(w: State, batch: Batch, start: State = start, before: State | None = before) -> Tensor:
                if before is None:
                    return server.cross_entropy(w, batch)
                z, z_global, z_previous = (features(state, batch[0]) for state in (w, start, before))
                scores = torch.stack([(z * other).sum(1) for other in (z_global, z_previous)], 1)
                scores = scores / z.norm(dim=1)[:, None]
                scores = scores / torch.stack([z_global.norm(dim=1), z_previous.norm(dim=1)], 1) / temperature
                contrast = functional.cross_entropy(scores, torch.zeros(len(z), dtype=torch.int64))
                return server.cross_entropy(w, batch) + mu * contrast

            trained[k] = server.train(round_num, k, loss)[0]
            previous[k] = round_num, trained[k]
        server.w = server.mean_by_examples(trained)
    assert {1, 2} <= set(gaps) or max(gaps) > 1  # some come again after having sat out
    run = federate(module, data, num_rounds, client_fraction=0.5, local_epochs=2)
    assert_close(run, server.w)
    kept = kept_by(run)
    assert kept.keys() == previous.keys()
    for client, (_, model) in previous.items():
        expected = {f"model.{name}": value for name, value in model.items()}
        torch.testing.assert_close(kept[client], expected, rtol=1e-9, atol=1e-9)


class Watched(Moon):
    """Records the modes of the networks that are compared, and the names of the state with them."""

    modes: ClassVar[list[bool]] = []
    names: ClassVar[set[str]] = set()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        for network in self._compared:
            self.modes.extend(part.training for part in network.modules())
        self.modes.extend(not part.training for part in self.model.modules())
        self.names.update(self.state_dict())


def test_networks_compared_by_moon_evaluate_and_stay_out_of_the_state() -> None:
    data = clients(2)
    module = make(Watched, data, tiny_resnet(NUM_CLASSES, 1))
    Watched.modes.clear()
    Watched.names.clear()
    run = federate(module, data, 2, local_epochs=1)
    assert len(Watched.modes) > 100
    assert not any(Watched.modes)
    assert Watched.names == set(module.state_dict())
    batches = max(len(data.client(client).train_loader(0)) for client in range(2))
    assert run.state.shared["model.bn1.num_batches_tracked"] <= 2 * batches  # the forward passes of training alone


# Climb.


@pytest.mark.parametrize(("dual_lr", "primal_rounds", "aggregation"), [(3.0, 1, "num_examples"), (1e4, 2, "uniform")])
def test_climb_equals_a_plain_dual_ascent(dual_lr: float, primal_rounds: int, aggregation: str) -> None:
    data, tolerance = clients(4), 0.01
    module = make(Climb, data, dual_lr=dual_lr, tolerance=tolerance, primal_rounds=primal_rounds)
    server = PlainServer(module, data, 0.75, local_epochs=2)
    dual, moved = [0.0] * 4, 0
    for round_num in range(1, 5):
        losses, trained = {}, {}
        scales = [1 + value - sum(dual) / 4 for value in dual]
        for k in server.sampled(round_num):
            (batch,) = data.client(k).plain_batches(1000)
            losses[k] = float(server.cross_entropy(server.w, batch))
            w, _ = server.train(round_num, k)
            trained[k] = {n: server.w[n] + scales[k] * (w[n] - server.w[n]) for n in w}
        server.w = server.mean_by_examples(trained, aggregation == "uniform")
        mean = sum(losses.values()) / len(losses)
        if round_num % primal_rounds == 0:
            for k, loss in losses.items():
                dual[k] = min(100.0, max(0.0, dual[k] + dual_lr * (loss - mean - tolerance)))
        moved += sum(value > 0 for value in dual)
    assert moved >= 3
    assert (max(dual) == 100) == (dual_lr > 100)
    run = federate(module, data, 4, client_fraction=0.75, local_epochs=2, aggregation=aggregation)
    assert run.state.shared["dual"].tolist() == pytest.approx(dual, rel=1e-8, abs=1e-10)
    assert_close(run, server.w)


def test_loss_that_climb_measures_is_that_of_the_global_model_on_plain_examples() -> None:
    data = clients(2)
    module = make(Climb, data, tiny_resnet(NUM_CLASSES, 1), lr=0.05)
    start = make(Climb, data, tiny_resnet(NUM_CLASSES, 1)).eval()
    run = federate(module, data, 1, local_epochs=2)
    losses = []
    for client in range(2):
        (batch,) = data.client(client).plain_batches(1000)
        with torch.no_grad():
            losses.append(float(functional.cross_entropy(start(batch[0]), batch[1], reduction="sum")))
    expected = sum(losses) / sum(data.client_size(client) for client in range(2))  # weighted as all client metrics
    assert run.state.history[-1]["client/global_loss"] == pytest.approx(expected, rel=1e-5)  # logged in float32


def test_climb_leaves_batchnorm_statistics_unscaled() -> None:
    data = clients()
    runs = {}
    for algorithm, options in ((Climb, {"dual_lr": 50.0, "tolerance": 0.0}), (FedAvg, {})):
        network = tiny_resnet(NUM_CLASSES, 1)
        # lr so small that both train the same model and see the same statistics
        module = make(algorithm, data, network, lr=1e-12, **options)
        runs[algorithm] = federate(module, data, 2, local_epochs=1).state.shared
    assert runs[Climb]["dual"].max() > 1
    for name in runs[FedAvg]:
        if "running" in name or "num_batches" in name:
            torch.testing.assert_close(runs[Climb][name], runs[FedAvg][name], rtol=1e-6, atol=1e-8)


class Unmeasured(Climb):
    """Client 1 reports another loss of the global model, or none."""

    reported: float | None

    def survey(self, session: ClientSession) -> State:
        surveyed = super().survey(session)
        if session.task.client_id == 1 and self.reported is not None:
            surveyed["global_loss"] = torch.tensor(self.reported, dtype=torch.float64)
        return {} if session.task.client_id == 1 and self.reported is None else surveyed


@pytest.mark.parametrize("reported", [None, float("nan"), float("inf"), -1.0])
def test_client_that_reports_no_sound_loss_to_climb_costs_its_own_result_alone(reported: float | None) -> None:
    data = clients()
    module = make(Unmeasured, data)
    module.reported = reported
    run = federate(module, data, 2, local_epochs=1)
    assert run.state.counts["failed_rounds"] == 0
    assert run.state.shared["dual"].isfinite().all()


# RatioLoss.


def problem(num_examples: int = 24, size: int = 5) -> tuple[Tensor, Tensor, nn.Linear]:
    layer = nn.Linear(size, NUM_CLASSES).double()
    features = torch.randn(num_examples, size, dtype=torch.float64)
    return features, torch.arange(num_examples) % NUM_CLASSES, layer


def test_class_ratios_are_those_of_autograd_gradients() -> None:
    features, labels, layer = problem()
    gradients = []
    for c in range(NUM_CLASSES):
        loss = functional.cross_entropy(layer(features[labels == c]), labels[labels == c])
        gradients.append(torch.autograd.grad(loss, layer.weight)[0])
    expected = []
    for p in range(NUM_CLASSES):
        others = [float(gradients[j][p].sum()) for j in range(NUM_CLASSES) if j != p]
        expected.append(abs(float(gradients[p][p].sum())) / abs(sum(others) / len(others)))
    found = class_ratios(features, layer(features).detach(), labels, max_ratio=1e9)
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    bound = sorted(expected)[1]
    clipped = class_ratios(features, layer(features).detach(), labels, max_ratio=bound)
    assert clipped.tolist() == pytest.approx([min(value, bound) for value in expected], rel=1e-10)


def test_class_ratio_of_unequal_numbers_of_images_is_that_of_their_means() -> None:
    features, labels, layer = problem()
    more = torch.cat([features, features[labels == 2]]), torch.cat([labels, labels[labels == 2]])
    once = class_ratios(features, layer(features), labels, 1e9)
    twice = class_ratios(more[0], layer(more[0]), more[1], 1e9)
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("features", [torch.zeros(8, 3), torch.tensor([[1.0, -1.0, 0.0]]).expand(8, 3)])
def test_zero_denominators_give_the_largest_ratio(features: Tensor) -> None:
    labels = torch.arange(8) % NUM_CLASSES
    assert class_ratios(features, torch.randn(8, NUM_CLASSES), labels, 7.0).tolist() == [7.0] * NUM_CLASSES


def test_ratios_of_a_perfect_model_are_bounded_and_never_nan() -> None:
    labels = torch.arange(8) % NUM_CLASSES
    logits = 1e4 * functional.one_hot(labels, NUM_CLASSES).float()
    ratios = class_ratios(torch.rand(8, 3), logits, labels, 10.0)
    assert ratios.isfinite().all()
    assert ((ratios >= 0) & (ratios <= 10)).all()


def test_neglected_class_has_the_largest_ratio() -> None:
    labels = torch.arange(40) % NUM_CLASSES
    logits = torch.randn(40, NUM_CLASSES)
    logits[:, 2] -= 4  # never predicted
    ratios = class_ratios(torch.rand(40, 6), logits, labels, 1e3)
    assert int(ratios.argmax()) == 2


def test_ratioloss_weighs_each_class_by_alpha_plus_beta_times_its_ratio() -> None:
    data, alpha, beta = clients(2), 0.5, 0.3
    module = make(RatioLoss, data, alpha=alpha, beta=beta, max_ratio=4.0)
    server = PlainServer(module, data, 1.0, local_epochs=2)
    for round_num in (1, 2):
        images, labels = data.meta_batch(derive_seed(0, "server_meta", round_num, 0))
        network = mlp().double()
        network.load_state_dict(server.w)
        with torch.no_grad():
            features, logits = features_and_logits(network, server.prepare(images))
        ratios = class_ratios(features, logits, labels, 4.0)

        def loss(w: State, batch: Batch, weights: Tensor = alpha + beta * ratios) -> Tensor:
            losses = functional.cross_entropy(server.logits(w, batch[0]), batch[1], reduction="none")
            return (weights[batch[1]] * losses).mean()

        server.w = server.mean_by_examples({k: server.train(round_num, k, loss)[0] for k in range(2)})
    assert_close(federate(module, data, 2, local_epochs=2), server.w)


# CReFF.


def test_class_gradient_sums_are_those_of_autograd() -> None:
    features, labels, layer = problem()
    found = class_gradient_sums(features, labels, layer.weight.detach(), layer.bias.detach())
    for c in range(NUM_CLASSES):
        loss = functional.cross_entropy(layer(features[labels == c]), labels[labels == c], reduction="sum")
        weight, bias = torch.autograd.grad(loss, (layer.weight, layer.bias))
        torch.testing.assert_close(found[c], torch.cat([weight, bias[:, None]], 1))


def test_class_gradient_sums_of_an_absent_class_are_0_and_those_of_batches_add_up() -> None:
    features, labels, layer = problem()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    some = labels != 1
    assert not class_gradient_sums(features[some], labels[some], weight, bias)[1].any()
    parts = [class_gradient_sums(features[part], labels[part], weight, bias) for part in (slice(9), slice(9, None))]
    torch.testing.assert_close(sum(parts), class_gradient_sums(features, labels, weight, bias))


def test_matching_loss_is_the_sum_of_cosine_distances() -> None:
    first, second = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = 0.0
    for k in range(3):
        for row in range(4):
            expected += 1 - float(functional.cosine_similarity(first[k, row, :5], second[k, row, :5], dim=0))
        expected += 1 - float(functional.cosine_similarity(first[k, :, 5], second[k, :, 5], dim=0))
    assert float(matching_loss(first, second)) == pytest.approx(expected, rel=1e-5)


def test_matching_loss_of_equal_gradients_is_0_at_any_length() -> None:
    gradients = torch.randn(3, 4, 6, dtype=torch.float64)
    assert float(matching_loss(gradients, gradients)) == pytest.approx(0, abs=1e-4)
    assert float(matching_loss(gradients, 5 * gradients)) == pytest.approx(0, abs=1e-4)
    assert float(matching_loss(gradients, -gradients)) == pytest.approx(2 * 3 * 5, rel=1e-4)


def test_matching_loss_of_zero_gradients_has_a_finite_slope() -> None:
    gradients = torch.zeros(2, 3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(matching_loss(gradients, torch.randn(2, 3, 4)), gradients)
    assert slope.isfinite().all()


def gradients_of(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean class gradients of artificial features, by the function that clients use."""
    num_classes, number, size = features.shape
    labels = torch.arange(num_classes).repeat_interleave(number)
    return class_gradient_sums(features.reshape(-1, size), labels, weight, bias) / number


def test_match_features_lowers_the_loss_and_leaves_other_classes_alone() -> None:
    real, labels, layer = problem()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    target = class_gradient_sums(real, labels, weight, bias) / 6
    features, held = torch.randn(NUM_CLASSES, 3, 5, dtype=torch.float64), torch.tensor([0, 2, 3])
    before = features.clone()
    losses = []
    for num_steps in (0, 20, 200):
        found = match_features(features, held, target[held], weight, bias, num_steps, 0.1)
        losses.append(float(matching_loss(gradients_of(found, weight, bias)[held], target[held])))
        assert torch.equal(found[1], before[1])
        assert not found.requires_grad
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.5 * losses[0]
    assert torch.equal(features, before)  # nothing is changed behind the caller


def test_one_step_of_match_features_is_a_step_down_the_slope() -> None:
    real, labels, layer = problem()
    weight, bias, held = layer.weight.detach(), layer.bias.detach(), torch.arange(NUM_CLASSES)
    target = class_gradient_sums(real, labels, weight, bias) / 6
    features = torch.randn(NUM_CLASSES, 3, 5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(matching_loss(gradients_of(features, weight, bias), target), features)
    found = match_features(features.detach(), held, target, weight, bias, 1, 0.1)
    torch.testing.assert_close(found, features.detach() - 0.1 * slope)


def test_features_that_match_already_stay() -> None:
    _, _, layer = problem()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    features = torch.randn(NUM_CLASSES, 3, 5, dtype=torch.float64)
    target = gradients_of(features, weight, bias)
    found = match_features(features, torch.arange(NUM_CLASSES), target, weight, bias, 10, 0.1)
    torch.testing.assert_close(found, features, rtol=1e-3, atol=1e-3)


def test_retrain_separates_and_is_balanced() -> None:
    centres = 4 * torch.eye(NUM_CLASSES, 6)
    features = centres[:, None] + 0.3 * torch.randn(NUM_CLASSES, 20, 6)
    start = torch.randn(NUM_CLASSES, 6)
    before = start.clone()
    weight, bias = retrain(features, start, 100, 0.1)
    predicted = functional.linear(features, weight, bias).argmax(-1)
    assert torch.equal(predicted, torch.arange(NUM_CLASSES)[:, None].expand(-1, 20))
    assert torch.equal(start, before)
    assert not weight.requires_grad
    assert not bias.requires_grad
    unmoved, zero = retrain(features, start, 0, 0.1)
    assert torch.equal(unmoved, before)
    assert not zero.any()


def test_retrain_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        weight, _ = retrain(torch.randn(NUM_CLASSES, 5, 3), torch.zeros(NUM_CLASSES, 3), 1, 0.1)
    assert weight.any()


def test_retrain_in_one_batch_of_all_is_full_batch_to_rounding() -> None:
    features, start = (
        torch.randn(NUM_CLASSES, 5, 3, dtype=torch.float64),
        torch.randn(NUM_CLASSES, 3, dtype=torch.float64),
    )
    for momentum in (0.0, 0.9):
        full = retrain(features, start, 7, 0.1, momentum)
        torch.testing.assert_close(retrain(features, start, 7, 0.1, momentum, 20, torch.Generator()), full)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_retrain_in_batches_is_a_bare_loop_over_shuffled_passes(momentum: float) -> None:
    """Of 20 features, batches of 8 are 8, 8 and 4; the fifth step is in the second pass."""
    features, start = (
        torch.randn(NUM_CLASSES, 5, 3, dtype=torch.float64),
        torch.randn(NUM_CLASSES, 3, dtype=torch.float64),
    )
    weight, bias = retrain(features, start, 5, 0.1, momentum, 8, torch.Generator().manual_seed(3))
    layer = nn.Linear(3, NUM_CLASSES).double()
    layer.load_state_dict({"weight": start, "bias": torch.zeros(NUM_CLASSES)})
    speed = {name: torch.zeros_like(value) for name, value in layer.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(20, generator=generator) for _ in range(2)]
    for part in (orders[0][:8], orders[0][8:16], orders[0][16:], orders[1][:8], orders[1][8:16]):
        layer.zero_grad()
        functional.cross_entropy(layer(features.reshape(20, 3)[part]), part // 5).backward()
        with torch.no_grad():
            for name, value in layer.named_parameters():
                speed[name] = momentum * speed[name] + value.grad  # type: ignore[operator]
                value -= 0.1 * speed[name]
    torch.testing.assert_close((weight, bias), (layer.weight.detach(), layer.bias.detach()))


def test_batches_of_creff_are_drawn_anew_in_each_round_and_for_each_seed() -> None:
    data = clients(2)
    options: dict[str, Any] = {"num_features": 5, "match_steps": 0, "retrain_steps": 7, "retrain_batch_size": 4}
    ends = [
        federate(make(CReFF, data, **options), data, 1, local_epochs=1, seed=seed).state.shared["retrained.weight"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


class Returned(CReFF):
    """Keeps what clients return."""

    payloads: ClassVar[list[State]] = []

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        self.payloads.append(result.payload)
        return super().contribution(result, server)


def test_creff_clients_return_exact_mean_gradients_of_the_retrained_classifier() -> None:
    data = clients()
    options: dict[str, Any] = {"num_features": 5, "match_steps": 3, "retrain_steps": 3}
    first = federate(make(CReFF, data, tiny_resnet(NUM_CLASSES, 1), **options), data, 1, local_epochs=1).state.shared
    module = make(Returned, data, tiny_resnet(NUM_CLASSES, 1), **options)
    Returned.payloads.clear()
    federate(module, data, 2, local_epochs=1)
    assert len(Returned.payloads) == 6
    network = make(CReFF, data, tiny_resnet(NUM_CLASSES, 1), **options)
    network.load_shared_state(first)
    network.eval()
    for client, payload in enumerate(Returned.payloads[3:]):
        (batch,) = data.client(client).plain_batches(1000)
        counts = data.client(client).class_counts(NUM_CLASSES)
        with torch.no_grad():
            features, _ = features_and_logits(network.model, network.prepare(batch[0]))
        sums = class_gradient_sums(features, batch[1], first["retrained.weight"], first["retrained.bias"])
        expected = sums / counts.clamp(min=1)[:, None, None]
        torch.testing.assert_close(payload["class_gradients"], expected, rtol=1e-8, atol=1e-10)
        assert payload["present"].tolist() == (counts > 0).long().tolist()


# FedETF.


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_corners_have_length_1_and_equal_angles(num_classes: int) -> None:
    corners = ETFHead(7, num_classes, 1.0).corners
    cosines = torch.full((num_classes, num_classes), -1 / (num_classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(corners.T @ corners, cosines, rtol=0, atol=1e-5)


def test_logits_of_the_head_are_scaled_cosines_with_the_corners() -> None:
    head = ETFHead(7, NUM_CLASSES, 3.0)
    features = torch.randn(5, 7)
    projected = head.projection(features)
    expected = [[3.0 * functional.cosine_similarity(x, corner, dim=0) for corner in head.corners.T] for x in projected]
    torch.testing.assert_close(head(features), torch.stack([torch.stack(line) for line in expected]))
    assert head(torch.zeros(1, 7)).isfinite().all()


def test_training_moves_projection_and_scale_but_never_the_corners() -> None:
    data = clients(2)
    run = Orchestrator(make(FedETF, data, tiny_resnet(NUM_CLASSES, 1)), data, num_rounds=1, trainer=DOUBLE)
    worker = Worker(run.spec())
    head = worker.module.model.classifier
    before = {"corners": head.corners.clone(), **{n: v.detach().clone() for n, v in head.named_parameters()}}
    worker.begin(run.server.broadcast(run.state.shared, 1, local_epochs=1))
    assert isinstance(worker.train(ClientTask(0, 0), {}), ClientResult)
    assert torch.equal(head.corners, before["corners"])
    for name, value in head.named_parameters():
        assert not torch.equal(value, before[name]), name
    assert not any("corners" in name for name in run.state.shared)


def test_only_the_last_linear_layer_is_replaced() -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, NUM_CLASSES))
    )
    kept = [network[1], network[3][0]]
    module = FedETF(NUM_CLASSES, 1, network)
    assert module.model[1] is kept[0]
    assert module.model[3][0] is kept[1]
    assert isinstance(module.model[3][1], ETFHead)
    assert module.model[3][1].projection.in_features == 6
    assert sum(isinstance(part, ETFHead) for part in module.model.modules()) == 1


def test_network_that_is_a_linear_layer_gets_a_head_too() -> None:
    module = FedETF(NUM_CLASSES, 1, nn.Linear(8, NUM_CLASSES))
    assert any(isinstance(part, ETFHead) for part in module.modules())


# MetaFineTune.


@pytest.mark.parametrize("build", [lambda channels: mlp(), lambda channels: tiny_resnet(NUM_CLASSES, channels)])
def test_server_of_metafinetune_takes_plain_steps_on_the_meta_set(build: Callable[[int], nn.Module]) -> None:
    data, steps, lr = clients(2), 3, 0.2
    average = federate(make(FedAvg, data, build(1)), data, 1, local_epochs=1).state.shared
    module = make(FedAvg, data, build(1))
    module.load_shared_state(average)
    network = module.model.train()
    for step in range(steps):
        images, labels = data.meta_batch(derive_seed(0, "server_meta", 1, step))
        grads = torch.autograd.grad(
            functional.cross_entropy(network(module.prepare(images)), labels), list(network.parameters())
        )
        with torch.no_grad():
            for parameter, grad in zip(network.parameters(), grads, strict=True):
                parameter -= lr * grad
    run = federate(make(MetaFineTune, data, build(1), finetune_steps=steps, finetune_lr=lr), data, 1, local_epochs=1)
    assert any(not torch.equal(run.state.shared[name], value) for name, value in average.items())
    torch.testing.assert_close(run.state.shared, module.shared_state(), rtol=1e-9, atol=1e-10)


def test_the_classifier_of_the_shipped_networks_is_found() -> None:
    network = tiny_resnet(NUM_CLASSES, 1)
    images = torch.randn(3, 1, 8, 8)
    assert classifier_of(network, images, NUM_CLASSES) == "classifier"
    network.eval()
    features, logits = features_and_logits(network, images)
    torch.testing.assert_close(network.classifier(features), logits)
    assert not network.classifier._forward_hooks
