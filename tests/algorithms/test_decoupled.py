"""cRT and LWS in both places, against plain loops: what is trained, on what, how it is averaged, and what is refused."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.algorithms import CRT, LWS
from fedamm_pl.algorithms.decoupled import COUNTS, STAGE
from fedamm_pl.federation.executors import Vectorized
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.session import ServerSession
from fedamm_pl.seeding import derive_seed
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
SIZE, MOMENTUM, DECAY = 8, 0.9, 5e-4
HEAD = ("model.4.weight", "model.4.bias")
both = pytest.mark.parametrize("kind", [CRT, LWS])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(data: TinyData, kind: type[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    body = [nn.Flatten(), nn.Linear(64, SIZE), nn.BatchNorm1d(SIZE), nn.ReLU()]
    network = nn.Sequential(*body, nn.Linear(SIZE, NUM_CLASSES))
    return kind(NUM_CLASSES, 1, network, info=data.info, **{"lr": 0.05, **options})


def at_clients(data: TinyData, kind: type[Any], start: int = 1, **options: Any) -> Any:
    return make(data, kind, where="clients", stage2_start=start, **options)


def clients(**options: Any) -> TinyData:
    """Clients of different sizes, none of which holds all classes."""
    return tiny_data(partition="by_shards", **options)


def federate(module: Any, data: TinyData, num_rounds: int, **options: Any) -> Orchestrator:
    options = {"client_fraction": 1.0, "local_epochs": 1, "eval_interval": 1, "trainer": CPU, **options}
    run = Orchestrator(module, data, num_rounds=num_rounds, **options)
    run.run()
    return run


def logits(kind: type[Any], trained: list[Tensor], weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """``W z + b`` of cRT, ``s_c (W_c z + b_c)`` of LWS."""
    if kind is CRT:
        return functional.linear(features, *trained)
    return trained[0] * functional.linear(features, weight, bias)


def started(kind: type[Any], weight: Tensor, bias: Tensor) -> list[Tensor]:
    first = [weight.clone(), bias.clone()] if kind is CRT else [torch.ones(len(bias), dtype=bias.dtype)]
    return [value.requires_grad_() for value in first]


# At the server.


@both
def test_the_server_trains_the_classifier_on_its_balanced_images(kind: type[Any]) -> None:
    """Against torch's own schedule: ``CosineAnnealingLR`` over the steps."""
    data, steps = tiny_data(num_meta_per_class=5), 12
    one = Round(make(data, kind, retrain_steps=steps, retrain_lr=0.2).double(), data, DOUBLE)
    made = one.server.calibrated(one.state, [])
    module = one.module().eval()
    weight, bias = (one.state[name] for name in HEAD)
    if kind is CRT:
        generator = one.server.session.generator("CRT")
        bound = SIZE**-0.5
        weight = (torch.rand(NUM_CLASSES, SIZE, generator=generator) * 2 - 1).double() * bound
        bias = (torch.rand(NUM_CLASSES, generator=generator) * 2 - 1).double() * bound
    trained = started(kind, weight, bias)
    optimizer = torch.optim.SGD(trained, 0.2, MOMENTUM, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        images, labels = one.server.session.meta(step)
        features = module.model[:4](module.prepare(images)).detach()
        optimizer.zero_grad()
        functional.cross_entropy(logits(kind, trained, weight, bias, features), labels).backward()
        optimizer.step()
        schedule.step()
    if kind is LWS:
        trained = [trained[0][:, None] * weight, trained[0] * bias]
    for name, value in zip(HEAD, trained, strict=True):
        torch.testing.assert_close(made[f"calibrated.{name}"], value.detach(), rtol=1e-6, atol=1e-7)
        assert not torch.allclose(made[f"calibrated.{name}"], made[name], rtol=1e-2)
    assert {name for name in made if name.startswith("calibrated.")} == {f"calibrated.{name}" for name in HEAD}


# At the clients.


def second_stage(kind: type[Any], one: Round, client: int, epochs: int, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a client makes of the classifier, and its class counts, by a plain loop."""
    module, own = one.module().eval(), one.data.client(client)
    module.load_shared_state(one.broadcast.payload)
    weight, bias = (one.broadcast.payload[name] for name in HEAD)
    counts = own.class_counts(NUM_CLASSES)
    trained = started(kind, weight, bias)
    optimizer = torch.optim.SGD(trained, lr, MOMENTUM, weight_decay=DECAY, nesterov=True)
    for images, labels in balanced(one, client, epochs):
        features = module.model[:4](module.prepare(images)).detach()
        scores = logits(kind, trained, weight, bias, features)[:, counts > 0]
        place = (counts > 0).long().cumsum(0) - 1
        optimizer.zero_grad()
        functional.cross_entropy(scores, place[labels]).backward()
        optimizer.step()
    if kind is LWS:
        trained = [trained[0][:, None] * weight, trained[0] * bias]
    return trained[0].detach(), trained[1].detach(), counts


def balanced(one: Round, client: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a client: as many examples as it holds, drawn with replacement, its classes equally often."""
    own = one.data.client(client)
    loader = own.train_loader(derive_seed(one.seed, "client", one.broadcast.round_num, client))
    loader.balanced = True
    for _ in range(epochs):
        yield from loader


@both
def test_clients_train_the_classifier_and_rows_are_averaged_by_their_examples(kind: type[Any]) -> None:
    data = clients()
    module = at_clients(data, kind, retrain_lr=0.05).double()
    one = Round(module, data, DOUBLE, local_epochs=2)
    results = [one.train(client) for client in (0, 3)]
    own = [second_stage(kind, one, client, 2, 0.05) for client in (0, 3)]
    for result, (weight, bias, counts) in zip(results, own, strict=True):
        held = counts > 0
        assert not held.all()
        torch.testing.assert_close(result.payload[HEAD[0]][held], weight[held], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.payload[HEAD[1]][held], bias[held], rtol=1e-9, atol=1e-9)
        assert torch.equal(result.payload[COUNTS], counts)
    state = one.update(results)
    sums = sum(counts for _, _, counts in own)
    assert isinstance(sums, Tensor)
    assert (sums == 0).any()  # a class that neither holds
    for place, name in enumerate(HEAD):
        for label in range(NUM_CLASSES):
            expected = one.broadcast.payload[name][label]
            if sums[label]:
                parts = [counts[label] * trained[place][label] for *trained, counts in own]
                expected = sum(parts, torch.tensor(0.0)) / sums[label]
            torch.testing.assert_close(state[name][label], expected, rtol=1e-9, atol=1e-9)
    rest = {name: value for name, value in state.items() if name not in (*HEAD, STAGE)}
    assert rest.keys() == one.state.keys() - set(HEAD)
    assert all(torch.equal(value, one.state[name]) for name, value in rest.items())  # running statistics, too


@both
def test_the_first_stage_is_fedavg_and_the_second_leaves_the_features_alone(kind: type[Any]) -> None:
    data = clients()
    options: dict[str, Any] = {"client_fraction": 0.5}
    theirs = federate(make(data, FedAvg), data, 2, **options)
    for number in (2, 4):
        mine = federate(at_clients(data, kind, start=3), data, number, **options)
        for name, value in theirs.state.shared.items():
            assert torch.equal(mine.state.shared[name], value) == (number == 2 or name not in HEAD)
    rows = [row["client/bytes_sent"] for row in mine.state.history[1:]]
    model = sum(value.nbytes for value in theirs.state.shared.values())
    head = sum(theirs.state.shared[name].nbytes for name in HEAD)
    assert rows == [model, model, head + 8 * NUM_CLASSES, head + 8 * NUM_CLASSES]


def test_lws_with_a_learning_rate_of_0_changes_no_bit() -> None:
    data = clients()
    theirs = federate(make(data, FedAvg), data, 1)
    mine = federate(at_clients(data, LWS, start=2, retrain_lr=0.0), data, 3)
    for name, value in theirs.state.shared.items():
        assert torch.equal(mine.state.shared[name], value)
    assert mine.state.history[-1]["test/loss"] == theirs.state.history[-1]["test/loss"]


def test_the_new_classifier_is_drawn_once_and_sent_to_all() -> None:
    data = clients()
    module = at_clients(data, CRT, start=2)
    first = Round(module, data, round_num=1)
    assert STAGE not in first.broadcast.payload
    second = Round(module, data, round_num=2, state=first.state)
    assert not torch.equal(second.broadcast.payload[HEAD[0]], first.state[HEAD[0]])
    assert second.broadcast.payload[HEAD[0]].abs().max() <= SIZE**-0.5
    state = second.update([second.train(client) for client in range(4)])
    third = Round(module, data, round_num=3, state=state)
    for name in HEAD:
        assert torch.equal(third.broadcast.payload[name], state[name])


class Failing(CRT):
    """The second stage fails in its first round."""

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        if server.round_num == 2:
            raise ValueError("not today")
        return super().contribution(result, server)


def test_after_a_failed_round_the_second_stage_starts_in_the_next() -> None:
    data = clients()
    run = federate(at_clients(data, Failing, start=2), data, 2)
    assert run.state.counts["failed_rounds"] == 1
    assert STAGE not in run.state.shared
    theirs = federate(make(data, FedAvg), data, 1)
    assert all(torch.equal(value, theirs.state.shared[name]) for name, value in run.state.shared.items())
    again = federate(at_clients(data, Failing, start=2), data, 3)
    assert STAGE in again.state.shared
    assert (again.state.shared[HEAD[0]] - theirs.state.shared[HEAD[0]]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, -1), "its class counts are below 0: -1"),
        ((0, 10**6), r"its class counts add up to \d+, it reports \d+ examples"),
    ],
)
def test_counts_that_cannot_be_are_refused(change: tuple[int, int], message: str) -> None:
    data = clients()
    one = Round(at_clients(data, CRT), data)
    result = one.train(0)
    result.payload[COUNTS][change[0]] = change[1]
    with pytest.raises(ValueError, match=message):
        one.server.contribution(result)


class Poisoned(CRT):
    """A client whose classifier is far away."""

    def client_payload(self) -> State:
        sent = super().client_payload()
        assert self.session is not None
        far = self.session.task.client_id == 1
        return {name: value + 1000 if far and name in HEAD else value for name, value in sent.items()}


def test_the_classifier_of_a_client_is_bounded_as_its_model_is() -> None:
    data = clients()
    theirs = federate(at_clients(data, Poisoned, start=2), data, 2)
    assert theirs.state.shared[HEAD[0]].abs().max() > 100
    mine = federate(at_clients(data, Poisoned, start=2), data, 2, max_update_norm=1.0)
    assert mine.state.shared[HEAD[0]].abs().max() < 2


@both
def test_sharpness_aware_steps_are_of_the_first_stage(kind: type[Any]) -> None:
    data = clients()
    run = federate(at_clients(data, kind, start=2, local_optimizer="sam"), data, 2)
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    one, other = (Round(at_clients(data, kind, local_optimizer=name), data).train(0).payload for name in ("sam", "sgd"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# Options.


def test_the_options_of_one_place_are_refused_in_the_other() -> None:
    data = clients()
    with pytest.raises(ValueError, match="`stage2_start` to be a round, 1 or later, where clients, got None"):
        make(data, CRT, where="clients")
    with pytest.raises(ValueError, match="`stage2_start` to be a round, 1 or later, where clients, got 0"):
        at_clients(data, LWS, start=0)
    with pytest.raises(ValueError, match="`stage2_start` to be null where server, got 3"):
        make(data, LWS, stage2_start=3)


@both
def test_what_a_place_takes(kind: type[Any], caplog: pytest.LogCaptureFixture) -> None:
    without = clients(num_meta_per_class=0)
    assert not at_clients(without, kind).uses_meta_set
    federate(at_clients(without, kind), without, 1)
    with pytest.raises(ValueError, match="`num_meta_per_class` to be 1 or more"):
        federate(make(without, kind), without, 1)
    data = clients()
    with caplog.at_level(logging.WARNING):
        federate(make(data, kind, retrain_steps=1), data, 1, aggregation="median")
    with pytest.raises(ValueError, match=r"cannot protect the sums that its clients send \(rows\., class_counts\)"):
        federate(at_clients(data, kind), data, 1, aggregation="median")
    with pytest.raises(ValueError, match=f"to suit {kind.__name__}, got Vectorized: its steps are more than SGD"):
        federate(at_clients(data, kind), data, 1, executor=Vectorized())
