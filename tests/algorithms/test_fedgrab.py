"""Fed-GraB: the controller by hand, rounds against a loop that multiplies the gradients themselves, and its limit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl import FederatedModule, Orchestrator
from fedamm_pl.algorithms import FedGraB
from fedamm_pl.algorithms.fedgrab import chances_of, controlled, counted, example_weights, weight_of
from fedamm_pl.federation.executors import Vectorized
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import State
from fedamm_pl.seeding import derive_seed, torch_generator
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

CPU = TrainerConfig(accelerator="cpu", precision="32-true")
DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")


def data(**options: Any) -> TinyData:
    return tiny_data(partition="by_dirichlet", num_clients=3, **options)


def make(algorithm: Any = FedGraB, **options: Any) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES))
    return algorithm(NUM_CLASSES, 1, network, **{"lr": 0.1, "info": data().info, **options})


# The controller


def test_weight_is_the_published_one_and_1_at_0() -> None:
    control = torch.tensor([-7.0, 0.0, 3.0], dtype=torch.float64)
    published = [(10 / 9) / (1 / 9 + math.exp(-x / 2)) for x in (-7.0, 0.0, 3.0)]
    assert weight_of(control).tolist() == pytest.approx(published, rel=1e-12)
    assert float(weight_of(torch.zeros(()))) == 1.0
    assert weight_of(torch.tensor([-100.0, 100.0])).isfinite().all()


def test_controller_by_hand() -> None:
    start = torch.zeros(5, 2)
    start[0], start[1] = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])  # errors 1 and -2
    one = controlled(start, (10.0, 0.01, 0.1))
    torch.testing.assert_close(one[2], torch.tensor([10 + 0.01 + 0.1, -20 - 0.02 - 0.2]))
    assert one[3].tolist() == [1.0, -2.0]
    assert one[4].tolist() == [0.0, 0.0]
    two = controlled(torch.stack([one[0] + 0.5, *one[1:]]), (10.0, 0.01, 0.1))  # errors 0.5 and -2.5
    changes = [10 * -0.5 + 0.01 * 0.5 + 0.1 * (0.5 - 2), 10 * -0.5 - 0.01 * 2.5 + 0.1 * (-2.5 + 4)]
    torch.testing.assert_close(two[2], one[2] + torch.tensor(changes))
    assert two[3:].tolist() == [[0.5, -2.5], [1.0, -2.0]]
    far = controlled(torch.cat([torch.tensor([[0.0, 99.0], [99.0, 0.0]]), one[2:]]), (10.0, 0.01, 0.1))
    assert far[2].tolist() == [100.0, -100.0]


def test_totals_are_the_absolute_gradients_that_the_logits_get() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 1, 0, 1])
    members = functional.one_hot(labels, 3).float()
    balanced = torch.tensor([True, True, False])
    weights = example_weights(torch.tensor([1.0, -2.0, 50.0]), members, balanced)
    assert weights[:, 2].tolist() == [1.0] * 5
    assert float(weights[0, 0]) == pytest.approx(float(weight_of(torch.tensor(1.0))))
    assert float(weights[0, 1]) == pytest.approx(float(weight_of(torch.tensor(2.0))))
    losses = functional.binary_cross_entropy_with_logits(logits, members, reduction="none")
    (slopes,) = torch.autograd.grad((weights * losses).sum(1).mean(), logits)
    found = counted(torch.ones(5, 3), logits.detach(), members, weights, balanced)
    expected = [[1 + slopes[labels == c, c].abs().sum(), 1 + slopes[labels != c, c].abs().sum()] for c in (0, 1)]
    torch.testing.assert_close(found[:2, :2], torch.tensor(expected).T)
    assert found[:2, 2].tolist() == [1.0, 1.0]  # not counted
    assert bool((found[2:] == 1).all())


def test_chances_go_by_size_and_equals_by_index() -> None:
    assert chances_of(torch.tensor([3, 8, 3]).float()).tolist() == pytest.approx([0.1**0.5, 1.0, 0.1])
    assert chances_of(torch.tensor([5.0])).tolist() == [1.0]


# Whole rounds


def by_hand(one: Round, client: int, kept: State, chances: Tensor, network: nn.Module) -> tuple[State, Tensor]:
    """A client's round that multiplies the gradients of the logits itself; returns the model and the controller."""
    session = one.session(client)
    draws = torch_generator(derive_seed(session.task.seed, "FedGraB"))
    module = make().double()
    module.model = network
    module.load_shared_state(one.broadcast.payload)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    positive, negative, control, last, before = kept["controller"].double() if kept else torch.zeros(5, NUM_CLASSES)
    loader = session.data.train_loader(session.task.seed)
    for _ in range(one.broadcast.local_epochs):
        for images, labels in loader:
            error = negative - positive
            control = control + 10 * (error - last) + 0.01 * error + 0.1 * (error - 2 * last + before)
            control, last, before = control.clip(-100, 100), error, last
            in_play = torch.rand(NUM_CLASSES, generator=draws) >= chances
            logits = network(module.prepare(images).double())
            slopes = (logits.detach().sigmoid() - functional.one_hot(labels, NUM_CLASSES)) / len(labels)
            added = torch.zeros(2, NUM_CLASSES, dtype=torch.float64)
            for row, label in enumerate(labels.tolist()):
                for c in range(NUM_CLASSES):
                    if in_play[c]:
                        x = control[c] if c == label else -control[c]
                        slopes[row, c] *= (10 / 9) / (1 / 9 + torch.exp(-x / 2))
                        added[0 if c == label else 1, c] += slopes[row, c].abs()
            positive, negative = positive + added[0], negative + added[1]
            optimizer.zero_grad()
            logits.backward(slopes)
            optimizer.step()
    return module.shared_state(), torch.stack([positive, negative, control, last, before])


@pytest.mark.parametrize("ranks", ["estimated", "global_counts"])
def test_rounds_are_those_of_a_loop_that_multiplies_the_gradients(ranks: str) -> None:
    module, state, kept, mine = make(ranks=ranks), None, {}, {}
    for number in (1, 2):
        one = Round(module, data(), DOUBLE, state=state, round_num=number, local_epochs=2)
        if ranks == "estimated":
            sizes = one.broadcast.payload["model.3.weight"].square().sum(1).sqrt()
        else:
            sizes = torch.tensor(data().info["class_counts"]).double()
        order = sorted(range(NUM_CLASSES), key=lambda c, sizes=sizes: -float(sizes[c]))  # type: ignore[misc]
        chances = torch.tensor([0.1 ** (order.index(c) / (NUM_CLASSES - 1)) for c in range(NUM_CLASSES)])
        results = []
        for client in range(3):
            result = one.train(client, kept=kept.get(client))
            expected, controller = by_hand(one, client, mine.get(client, {}), chances, make().double().model)
            for name, value in expected.items():
                torch.testing.assert_close(result.payload[name], value, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result.kept["controller"].double(), controller, rtol=1e-3, atol=1e-3)
            kept[client], mine[client] = result.kept, {"controller": controller}
            results.append(result)
        assert any(float(state["controller"][2].abs().max()) > 1 for state in kept.values())
        state = one.update(results)


class Sigmoids(FederatedModule):
    """FedAvg on the binary cross-entropy summed over the classes."""

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        members = functional.one_hot(labels, logits.shape[1]).to(logits)
        return functional.binary_cross_entropy_with_logits(logits, members, reduction="none").sum(1)


def test_without_gains_it_is_fedavg_on_sigmoids_bit_for_bit() -> None:
    runs = []
    for algorithm, options in ((FedGraB, {"proportional": 0.0, "integral": 0.0, "derivative": 0.0}), (Sigmoids, {})):
        run = Orchestrator(make(algorithm, **options), data(), num_rounds=2, local_epochs=2, trainer=CPU)
        run.run()
        runs.append(run)
    mine, theirs = runs
    assert mine.state.history == theirs.state.history
    for name, value in theirs.state.shared.items():
        assert torch.equal(mine.state.shared[name], value)


@pytest.mark.parametrize("optimizer", ["sam", "asam"])
def test_controller_moves_once_a_step_also_where_a_step_sees_its_batch_twice(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def noting(*arguments: Any) -> Tensor:
        calls.append(True)
        return controlled(*arguments)

    monkeypatch.setattr("fedamm_pl.algorithms.fedgrab.controlled", noting)
    one = Round(make(local_optimizer=optimizer), data())
    session = one.session(0)
    result = one.train(0)
    assert len(calls) == len(session.data.train_loader(0))
    assert float(result.kept["controller"][:2].sum()) > 0
    # with rho 0 the second pass would see what the first saw; the totals must not count it
    small = Round(make(local_optimizer=optimizer, rho=1e-9), data()).train(0)
    plain = Round(make(), data()).train(0)
    torch.testing.assert_close(small.kept["controller"], plain.kept["controller"], rtol=1e-3, atol=1e-3)
    assert small.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-4)


def test_absent_class_is_pushed_down_less_and_less() -> None:
    controller, members = torch.zeros(5, 2), torch.tensor([[1.0, 0.0]])
    balanced, sizes = torch.tensor([True, True]), []
    for _ in range(60):
        controller = controlled(controller, (10.0, 0.01, 0.1))
        weights = example_weights(controller[2], members, balanced)
        sizes.append(float(weights[0, 1]))
        controller = counted(controller, torch.zeros(1, 2), members, weights, balanced)
    assert sizes[0] == 1.0
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.05


def test_ranks_do_not_depend_on_the_layers_place_and_need_one() -> None:
    conv = nn.Sequential(nn.Conv2d(1, NUM_CLASSES, 8), nn.Flatten())
    with pytest.raises(ValueError, match="Expected `model` to end in a linear layer"):
        FedGraB(NUM_CLASSES, 1, conv)
    module = FedGraB(NUM_CLASSES, 1, conv, info=data().info, ranks="global_counts")
    result = Round(module, data()).train(0)
    assert result.bytes_received == sum(value.nbytes for value in module.shared_state().values()) + 8 * NUM_CLASSES


def test_counts_are_needed_where_ranks_are_those_of_the_counts() -> None:
    known: Any = {name: value for name, value in data().info.items() if name != "class_counts"}
    with pytest.raises(ValueError, match="Expected `info` of FedGraB to hold class_counts, got none"):
        Round(make(ranks="global_counts", info=known), data())


def test_clients_do_not_train_side_by_side() -> None:
    with pytest.raises(ValueError, match="training_step of its own"):
        Orchestrator(make(), data(), num_rounds=1, executor=Vectorized(), trainer=CPU).run()
