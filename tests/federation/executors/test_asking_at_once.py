"""Clients that train side by side also ask the server side by side, if method and network allow; the messages stay the same."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.data.client import ClientData
from fedamm_pl.federation.executors import Executor, Sequential, Vectorized
from fedamm_pl.federation.executors.obstacles import asks_at_once
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import Answer, ClientFailure, ClientResult, Question, State
from fedamm_pl.protocol.session import ClientSession, ServerSession
from tests.federation.executors.contract import broadcast, tasks
from tests.federation.small import CPU, make, spec
from tests.tiny import TinyData, tiny_data

EXACT = TrainerConfig(accelerator="cpu", precision="64-true")
NETWORKS = ["tests.tiny.tiny_resnet", "tests.federation.executors.test_asking_at_once.mlp"]


def mlp(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 16), nn.ReLU(), nn.Linear(16, num_classes))


class Uneven(TinyData):
    """Clients of 60, 33, 17, 5 and 2 examples, and of a single one; the support of a round would be 8."""

    def client(self, client_id: int) -> ClientData:
        whole = super().client(0)
        sizes = [60, 33, 17, 5, 2, 1]
        own = torch.arange(240)[sum(sizes[:client_id]) : sum(sizes[: client_id + 1])]
        return ClientData(whole.images, whole.labels, own, 16, "crop_flip", whole.support_size)

    def client_size(self, client_id: int) -> int:
        return self.client(client_id).num_examples


def uneven() -> Uneven:
    return Uneven("uneven", num_clients=6, num_meta_per_class=2, imbalance_factor=0.2, batch_size=16)


def outcomes(
    executor: Executor, trainer: TrainerConfig = EXACT, kind: type[FedAMM] = FedAMM, **options: Any
) -> list[ClientResult | ClientFailure]:
    """A round of all clients."""
    data = options.pop("data", None) or uneven()
    given = spec(make(kind, data, **{"lr": 0.1, "meta_lr": 0.5, **options}), data, trainer)
    with executor.open(given) as runner:
        return list(runner.run(broadcast(given, 1), tasks(1, range(data.num_clients)), lambda client: {}))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    assert isinstance(expected, ClientResult), expected
    assert isinstance(found, ClientResult), found
    assert (found.bytes_sent, found.bytes_received) == (expected.bytes_sent, expected.bytes_received)
    assert found.metrics == pytest.approx(expected.metrics, rel=tolerance)
    assert "meta_loss" in expected.metrics
    for ours, theirs in ((found.payload, expected.payload), (found.tallies, expected.tallies)):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class Counts:
    """How often the two ways of asking were taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at_once, self.alone = 0, 0
        questions, question = FedAMM.questions, FedAMM.question

        def counted(module: FedAMM, sessions: Any) -> Any:
            found = questions(module, sessions)
            self.at_once += len(found or [])
            return found

        def counted_alone(module: FedAMM, session: ClientSession) -> Any:
            self.alone += 1
            return question(module, session)

        monkeypatch.setattr(FedAMM, "questions", counted)
        monkeypatch.setattr(FedAMM, "question", counted_alone)


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_clients_return_what_they_return_one_after_the_other(
    model: str, differentiation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": model, "differentiation": differentiation}
    expected = outcomes(Sequential(), **options)
    counts = Counts(monkeypatch)
    found = outcomes(Vectorized(4), **options)
    assert (counts.at_once, counts.alone) == (2 + 6, 2)  # the check's two clients, also by a Trainer
    sent = make(FedAMM, uneven(), model=model).shared_state()
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-9)
        moved = ours.payload["weight_net.layers.0.weight"] - sent["weight_net.layers.0.weight"]
        assert float(moved.abs().max()) > 1e-6
    assert len({float(ours.metrics["meta_loss"]) for ours in found}) == 6  # each has its own


def moved(result: Any) -> torch.Tensor:
    """By how much the weight net of a result has moved, as one vector."""
    assert isinstance(result, ClientResult), result
    sent = make(FedAMM, tiny_data()).shared_state()
    names = [name for name in sent if name.startswith("weight_net.")]
    return torch.cat([(result.payload[name] - sent[name]).double().flatten() for name in names])


@pytest.mark.parametrize("model", NETWORKS)
# 8 bits of mantissa: one client after the other is off by as much, on the ResNet by 0.3
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 0.25)])
def test_in_less_precision_weight_nets_are_right_as_far_as_it_allows(
    model: str, precision: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": model, "differentiation": "forward", "weight_decay": 0.0}
    exact = outcomes(Sequential(), data=tiny_data(), **options)
    counts = Counts(monkeypatch)
    trainer = TrainerConfig(accelerator="cpu", precision=precision)
    found = outcomes(Vectorized(), trainer, data=tiny_data(), **options)
    assert counts.at_once == 2 + 4
    for ours, right in zip(map(moved, found), map(moved, exact), strict=True):
        assert float((ours - right).norm()) <= tolerance * float(right.norm())


# When each asks by itself


class OwnQuestion(FedAMM):
    """Asks for the meta gradient elsewhere than at w_hat."""

    def question(self, session: ClientSession) -> State | None:
        asked = super().question(session)
        return asked and {name: 2 * value for name, value in asked.items()}


class Deaf(FedAMM):
    """A server that does not answer one client."""

    def answers(self, questions: Any, server: ServerSession) -> list[Answer]:
        if any(question.client_id == 2 for question in questions):
            raise RuntimeError("no answers")
        return super().answers(questions, server)


class DeafToOne(FedAMM):
    """The same, whichever way it is asked."""

    def answer(self, question: Question, server: ServerSession) -> Answer:
        if question.client_id == 2:
            raise RuntimeError("no answer")
        return super().answer(question, server)


class Personal(FedAMM):
    """With an entry that stays at the client."""

    personal = ("own",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("own", torch.zeros(1))


def test_only_a_method_whose_questions_stand_for_its_question_asks_at_once() -> None:
    data = tiny_data()
    kinds = (FedAMM, Deaf, OwnQuestion, DeafToOne, Personal, FedAvg)
    assert [asks_at_once(make(kind, data)) for kind in kinds] == [True, True, False, False, False, False]


@pytest.mark.parametrize("kind", [OwnQuestion, Deaf])
def test_where_it_does_not_do_at_once_each_asks_by_itself(kind: type[FedAMM]) -> None:
    found, expected = (outcomes(executor, kind=kind, model=NETWORKS[1]) for executor in (Vectorized(), Sequential()))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-9)


def test_a_client_that_gets_no_answer_fails_alone() -> None:
    found = outcomes(Vectorized(), kind=DeafToOne, model=NETWORKS[1])
    assert [isinstance(outcome, ClientFailure) for outcome in found] == [client == 2 for client in range(6)]
    assert str(found[2]).startswith("client 2 failed (meta step): RuntimeError: no answer (test_asking_at_once.py")


class Unreadable(Uneven):
    """The data of one client cannot be opened."""

    def client(self, client_id: int) -> ClientData:
        if client_id == 2:
            raise OSError("no data")
        return super().client(client_id)

    def client_size(self, client_id: int) -> int:
        return 17 if client_id == 2 else super().client_size(client_id)


def test_a_client_without_data_fails_alone() -> None:
    data = Unreadable("uneven", num_clients=6, num_meta_per_class=2, imbalance_factor=0.2, batch_size=16)
    found = outcomes(Vectorized(), data=data, model=NETWORKS[1])
    expected = outcomes(Sequential(), model=NETWORKS[1])
    assert str(found[2]).startswith("client 2 failed (data): OSError: no data (test_asking_at_once.py")
    for ours, theirs in zip(found[:2] + found[3:], expected[:2] + expected[3:], strict=True):
        assert_close(ours, theirs, 1e-9)


class Cube(torch.autograd.Function):
    """An operator that ``vmap`` takes, without forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: torch.Tensor) -> torch.Tensor:
        return values**3

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: torch.Tensor) -> None:
        context.save_for_backward(*inputs)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        (values,) = context.saved_tensors
        return gradient * 3 * values**2


class Cubed(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return Cube.apply(values)


def cubed(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 8), nn.Tanh(), Cubed(), nn.Linear(8, num_classes))


def test_a_network_without_forward_mode_asks_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"model": "tests.federation.executors.test_asking_at_once.cubed", "differentiation": "functional"}
    expected = outcomes(Sequential(), **options)
    counts = Counts(monkeypatch)
    found = outcomes(Vectorized(), **options)
    assert (counts.at_once, counts.alone) == (0, 2 + 2 + 6)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-9)


def test_why_they_do_not_ask_at_once_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(module: FedAMM, sessions: Any) -> Any:
        raise RuntimeError("vmap does not know this")

    options = {"model": NETWORKS[1], "differentiation": "forward"}
    expected = outcomes(Sequential(), CPU, **options)
    monkeypatch.setattr(FedAMM, "questions", broken)
    with caplog.at_level(logging.WARNING, "fedamm_pl"):
        found = outcomes(Vectorized(), CPU, **options)
    (said,) = [record.getMessage() for record in caplog.records if "one after the other" in record.getMessage()]
    assert "RuntimeError: vmap does not know this" in said
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-3)
