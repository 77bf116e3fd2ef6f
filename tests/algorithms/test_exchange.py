"""FedAMM's question and answer: asked before the fit or in it, answered by a module of the server's own, recomputed alike."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, Orchestrator
from fedamm_pl.algorithms.meta import meta_gradient
from fedamm_pl.federation.executors import Sequential
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.codec import decode, encode
from fedamm_pl.protocol.messages import Answer, Question, State, payload_bytes
from fedamm_pl.protocol.session import ClientSession, ServerSession
from fedamm_pl.seeding import derive_seed
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data, tiny_resnet

DIFFERENTIATIONS = ["higher", "functional", "forward"]
every_differentiation = pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)


class Moody(nn.Module):
    """In training mode its logits depend on a buffer that each batch moves; in evaluation mode they are others."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, NUM_CLASSES)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(images.flatten(1))
        if not self.training:
            return -logits
        scaled = logits / (1 + self.seen)
        self.seen.copy_(self.seen + 1)
        return scaled


class Dropping(nn.Sequential):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, NUM_CLASSES), nn.Dropout(0.1)
        )


def resnet() -> nn.Module:
    return tiny_resnet(NUM_CLASSES, 1)


def make(algorithm: type[FedAMM], data: TinyData, network: Callable[[], nn.Module] = resnet, **options: Any) -> Any:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, network(), lr=0.1, info=data.info, **{"meta_lr": 0.3, **options})


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# When it is asked.


class Watched(FedAMM):
    """Notes what happens to a client, in order."""

    events: ClassVar[list[str]] = []

    def question(self, session: ClientSession) -> State | None:
        assert self.training
        asked = super().question(session)
        self.events.append("asks" if asked else "asks nothing")
        return asked

    def on_train_start(self) -> None:
        assert self.session is not None
        self.events.append("starts with an answer" if self.session.answer else "starts without")
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.events.append("step")


@pytest.mark.parametrize("meta_update", ["asynchronous", "synchronous"])
def test_it_is_asked_before_the_fit_or_in_the_middle_of_it(meta_update: str) -> None:
    data = tiny_data()
    module = make(Watched, data, meta_update=meta_update, meta_interval=2)
    one, questions = Round(module, data), []
    steps = len(data.client(1).train_loader(0))

    def ask(question: Question) -> Answer:
        questions.append(question)
        Watched.events.append("answered")
        return one.server.answer(question)

    Watched.events.clear()
    result = one.train(1, ask=ask)
    if meta_update == "asynchronous":
        assert not module.asks_in_fit
        assert Watched.events == ["asks", "answered", "starts with an answer", *["step"] * steps]
        assert [question.step for question in questions] == [0]
    else:
        assert module.asks_in_fit
        expected = ["asks nothing", "starts without"]
        for step in range(steps):
            expected += ["answered", "step"] if step % 2 == 0 else ["step"]
        assert Watched.events == expected
        assert [question.step for question in questions] == list(range(0, steps, 2))
    assert {(question.round_num, question.client_id) for question in questions} == {(1, 1)}
    sent = sum(payload_bytes(question.payload) for question in questions)
    assert result.bytes_sent == payload_bytes(result.payload) + sent
    assert result.bytes_received == payload_bytes(one.broadcast.payload) + sent  # g is as large as w_hat
    assert result.meta_seconds > 0


def test_asking_in_mid_fit_is_refused_where_it_cannot_be_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequential, "can_ask", False)
    data = tiny_data()
    Orchestrator(make(FedAMM, data), data, num_rounds=1, trainer=CPU)
    with pytest.raises(
        ValueError, match="answers clients during local training for FedAMM with these options, got Sequential"
    ):
        Orchestrator(make(FedAMM, data, meta_update="synchronous"), data, num_rounds=1, trainer=CPU)


# Who answers.


class Recorded(FedAMM):
    """Notes what is asked and answered; its clients train with the network in evaluation mode."""

    exchanged: ClassVar[list[tuple[Question, Answer]]] = []
    sent: ClassVar[dict[int, State]] = {}

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.session is not None
        self.model.eval()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        for name, buffer in self.model.named_buffers():
            buffer.add_(1 if "num_batches" not in name else 0)

    def answer(self, question: Question, server: ServerSession) -> Answer:
        answer = super().answer(question, server)
        self.exchanged.append((question, answer))
        self.sent[question.round_num] = server.sent
        return answer


@pytest.mark.parametrize("meta_update", ["asynchronous", "synchronous"])
@pytest.mark.parametrize("network", [Moody, resnet])
def test_the_server_answers_with_the_model_that_it_has_sent(network: Any, meta_update: str) -> None:
    """Neither buffers nor mode of the client's module, which differ by then, play a role."""
    data = tiny_data(augmentation="none")
    Recorded.exchanged.clear()
    module = make(Recorded, data, network, meta_update=meta_update)
    run = Orchestrator(module, data, num_rounds=2, local_epochs=2, trainer=CPU, eval_interval=1)
    run.run()
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    steps = 2 * len(data.client(0).train_loader(0))  # clients are of equal size
    assert len(Recorded.exchanged) == 4 * (1 if meta_update == "asynchronous" else steps)
    fresh = make(FedAMM, data, network)
    for question, answer in Recorded.exchanged:
        fresh.load_shared_state(Recorded.sent[question.round_num])
        images, labels = data.meta_batch(derive_seed(0, "meta", question.round_num, question.client_id, question.step))
        at = {name.removeprefix("model."): value for name, value in question.payload.items()}
        gradient, loss = meta_gradient(fresh.model, at, (fresh.prepare(images), labels))
        assert_equal(answer.payload, {f"model.{name}": value for name, value in gradient.items()})
        assert torch.equal(answer.metrics["meta_loss"], loss)


def test_an_answer_depends_on_nothing_that_was_asked_or_drawn_before() -> None:
    data = tiny_data()
    one, questions = Round(make(FedAMM, data, Dropping), data), []
    for client in range(3):
        one.train(client, ask=lambda question: questions.append(question) or one.server.answer(question))  # type: ignore[func-returns-value]
    torch.manual_seed(5)
    answers = [one.server.answer(question) for question in questions]
    elsewhere = Round(make(FedAMM, data, Dropping), data).server
    elsewhere.begin(one.broadcast)
    for question, answer in reversed(list(zip(questions, answers, strict=True))):
        torch.manual_seed(question.client_id)
        found = elsewhere.answer(question)
        assert_equal(found.payload, answer.payload)
        assert_equal(found.metrics, answer.metrics)
    other = Round(make(FedAMM, data, Dropping), data, seed=1).server
    other.begin(one.broadcast)
    assert not torch.equal(other.answer(questions[0]).metrics["meta_loss"], answers[0].metrics["meta_loss"])


# Two phases: asked here, trained there.


@every_differentiation
@pytest.mark.parametrize(
    ("network", "precision"), [(Dropping, "32-true"), (Dropping, "bf16-mixed"), (resnet, "32-true")]
)
def test_a_client_may_be_trained_elsewhere_than_it_asked(network: Any, differentiation: str, precision: Any) -> None:
    data = tiny_data()
    trainer = TrainerConfig(accelerator="cpu", precision=precision)

    def start() -> Round:
        return Round(make(FedAMM, data, network, differentiation=differentiation), data, trainer, local_epochs=2)

    expected = start().train(2)

    class Waiting(Exception):  # noqa: N818
        pass

    asked: list[bytes] = []

    def leave(question: Question) -> Answer:
        asked.append(encode(question))
        raise Waiting

    torch.manual_seed(1)
    first = start()
    with pytest.raises(Waiting):
        first.train(2, ask=leave)
    server = start().server
    question = decode(asked[0])
    assert isinstance(question, Question)
    answer = decode(encode(server.answer(question)))
    assert isinstance(answer, Answer)

    torch.manual_seed(2)
    again: list[Question] = []

    def stored(question: Question) -> Answer:
        again.append(question)
        return answer

    second = start()
    module = second.module()
    with torch.no_grad():  # of what the module held nothing is left
        for parameter in module.parameters():
            parameter.normal_()
    found = second.train(2, module, stored)
    assert_equal(again[0].payload, question.payload)
    assert_equal(found.payload, expected.payload)
    assert_equal(found.tallies, expected.tallies)
    assert found.metrics == expected.metrics


def test_a_module_that_has_trained_another_client_asks_and_trains_alike() -> None:
    data = tiny_data()
    one = Round(make(FedAMM, data, Dropping), data)
    used = one.module()
    for client in (0, 1):
        one.train(client, used)
    assert_equal(one.train(2, used).payload, one.train(2).payload)


def test_fedavg_asks_nothing() -> None:
    data = tiny_data()
    module = FedAvg(NUM_CLASSES, 1, tiny_resnet(NUM_CLASSES, 1), info=data.info)

    def ask(question: Question) -> Answer:
        raise AssertionError

    result = Round(module, data).train(0, ask=ask)
    assert result.meta_seconds < 0.1
