"""What a client has in a round: copies of what was sent, a count of its bytes, and where its time goes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fedamm_pl import FedAvg
from fedamm_pl.data.client import Batch, ClientData
from fedamm_pl.federation.client import attempt
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientFailure, ClientTask, Question, State
from fedamm_pl.protocol.session import ClientSession, WatchedLoader
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data, tiny_resnet

NAP = 0.02


def make(data: TinyData, algorithm: type[FedAvg] = FedAvg) -> Any:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, tiny_resnet(NUM_CLASSES, 1), info=data.info)


def session(
    client_data: Callable[[int], ClientData] | None = None,
    ask: Callable[[Question], Answer] | None = None,
    **kept: torch.Tensor,
) -> ClientSession:
    def nobody(question: Question) -> Answer:
        raise AssertionError

    broadcast = Broadcast(3, 1, {"model.w": torch.zeros(10), "n": torch.zeros((), dtype=torch.int64)})
    return ClientSession(broadcast, ClientTask(2, 7), client_data or tiny_data().client, ask or nobody, kept)


def test_what_was_sent_stays_as_it_is_whatever_a_client_does() -> None:
    own = torch.ones(2)
    mine = session(own=own)
    mine.payload["model.w"] += 1
    mine.payload["more"] = torch.ones(1)
    mine.kept["other"] = own
    assert not mine.broadcast.payload["model.w"].any()
    assert set(mine.broadcast.payload) == {"model.w", "n"}
    assert session(own=own).kept.keys() == {"own"}


def test_questions_carry_round_client_and_step_and_their_bytes_count() -> None:
    asked: list[Question] = []

    def ask(question: Question) -> Answer:
        asked.append(question)
        return Answer({"g": torch.zeros(5, dtype=torch.float64)}, {"meta_loss": torch.zeros(())})

    mine = session(ask=ask)
    assert (mine.bytes_received, mine.bytes_sent) == (48, 0)
    for step in (0, 4):
        assert mine.ask(step, {"w": torch.zeros(3)}).payload["g"].shape == (5,)
    assert [(question.round_num, question.client_id, question.step) for question in asked] == [(3, 2, 0), (3, 2, 4)]
    assert (mine.bytes_received, mine.bytes_sent) == (48 + 2 * 40, 2 * 12)


def test_what_is_asked_for_several_clients_at_once_is_the_same_question_and_counts_the_same() -> None:
    mine = session()  # who answers it is not asked
    question, answer = mine.question(4, {"w": torch.zeros(3)}), Answer({"g": torch.zeros(5)})
    mine.count(question, answer)
    assert (question.round_num, question.client_id, question.step) == (3, 2, 4)
    assert (mine.bytes_received, mine.bytes_sent) == (48 + 20, 12)


def test_data_are_fetched_once_when_they_are_needed() -> None:
    data, fetched = tiny_data(), []
    mine = session(lambda client: fetched.append(client) or data.client(client))  # type: ignore[func-returns-value]
    assert fetched == []
    images, labels = mine.support()
    again = mine.support()
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    batches = [labels.tolist() for _, labels in mine.train_loader(mine.data)]
    assert [labels.tolist() for _, labels in mine.train_loader(mine.data)] == batches
    assert [labels.tolist() for _, labels in data.client(2).train_loader(7)] == batches
    assert len(mine.train_loader(mine.data)) == len(batches)
    assert fetched == [2]


def test_time_is_told_apart_by_stage() -> None:
    mine = session()

    def slow() -> Iterator[Batch]:
        for _ in range(2):
            time.sleep(NAP)
            yield torch.zeros(1), torch.zeros(1)

    class Slow(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            return slow()

    for _ in WatchedLoader(Slow(), mine):
        assert mine.stage == "training"
    with mine.during("meta step"):
        assert mine.stage == "meta step"
        time.sleep(NAP)
    assert mine.stage == "training"
    assert 2 * NAP <= mine.seconds["data"] < 20 * NAP
    assert NAP <= mine.seconds["meta step"] < 20 * NAP
    assert mine.seconds["training"] == 0


def test_a_session_stays_at_the_stage_that_failed() -> None:
    mine = session()
    with pytest.raises(KeyError), mine.during("meta step"), mine.during("data"):
        raise KeyError
    assert mine.stage == "data"


class Failing(FedAvg):
    """Raises in one of its hooks."""

    at = ""

    def _fail(self, hook: str) -> None:
        if hook == self.at:
            raise RuntimeError(hook)

    def survey(self, session: ClientSession) -> State:
        self._fail("survey")
        return {}

    def question(self, session: ClientSession) -> State | None:
        self._fail("question")
        return {"w": torch.zeros(1)} if self.at == "ask" else None

    def on_train_start(self) -> None:
        self._fail("fit")
        super().on_train_start()

    def client_payload(self) -> State:
        self._fail("payload")
        return super().client_payload()


@pytest.mark.parametrize(
    ("hook", "stage", "reason"),
    [
        ("survey", "training", "RuntimeError: survey"),
        ("question", "meta step", "RuntimeError: question"),
        ("ask", "meta step", "NotImplementedError: Failing clients ask the server nothing"),
        ("fit", "training", "RuntimeError: fit"),
        ("payload", "training", "RuntimeError: payload"),
        ("data", "data", "OSError: gone"),
    ],
)
def test_a_failure_names_its_stage_and_leaves_no_session_behind(hook: str, stage: str, reason: str) -> None:
    data = tiny_data()
    module = make(data, Failing)
    module.at = hook
    one = Round(module, data)
    mine = one.session(0)
    if hook == "data":

        def gone(client: int) -> ClientData:
            raise OSError("gone")

        mine = ClientSession(one.broadcast, ClientTask(0, 1), gone, one.server.answer)
    used = one.module()
    failure = attempt(used, mine, CPU)
    assert isinstance(failure, ClientFailure)
    assert (failure.client_id, failure.stage) == (0, stage)
    assert failure.reason.startswith(reason)
    assert used.session is None
    used.at = ""  # the next client trains as if nothing had been
    module.at = ""
    expected = Round(module, data).train(1)
    found = one.train(1, used)
    assert [name for name in found.payload if not torch.equal(found.payload[name], expected.payload[name])] == []


def test_draws_of_a_client_leave_the_global_state_alone() -> None:
    data = tiny_data()
    one = Round(make(data), data)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one.train(0)
    assert torch.equal(torch.rand(1), expected)


class Noisy(FedAvg):
    """Adds noise to what it sends."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        return {
            n: value + torch.randn(value.shape) if value.is_floating_point() else value for n, value in payload.items()
        }


def test_noise_on_what_is_sent_follows_from_the_task() -> None:
    data, bias = tiny_data(), "model.classifier.bias"
    one = Round(make(data, Noisy), data)
    found = [one.train(client).payload[bias] for client in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
